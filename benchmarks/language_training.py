"""Speed of language models: real tokens per second of our models and loop against other libraries'.

python -m benchmarks language_training --dataset nyu-mll/glue --dataset_name sst2 [--nanogpt DIR]

Masked language modeling on single sentences, with BERT sizes; this compares pipelines, with batches of their own:
  bert   transformers' BertForMaskedLM, its DataCollatorForLanguageModeling, AdamW, random batches
  ours   TfmBertForMaskedLM, `LanguageModelingTask`, `train_step`, the same batch size, sorted by length
Equal work: the same batch of full-length sequences for both, through ``labels=``, in the same loop with AdamW; and the
encoders alone, without gradients:
  bert           transformers' BertForMaskedLM, BertModel
  ours           TfmBertForMaskedLM, TfmBertModel
  ours_labelled  TfmBertForMaskedLM with ``training_logits=False``: the output layer reads labelled tokens only
Causal language modeling on packed blocks, with GPT-2 sizes:
  gpt2      transformers' GPT2LMHeadModel with its own loss, AdamW
  nanogpt   nanoGPT's GPT with its own optimizer, if its folder is given
  ours      TfmGPTForCausalLM, `LanguageModelingTask`, `train_step`
"""

import statistics
import sys
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim import AdamW
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
)

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM, TfmBertModel, TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.data.language import Texts, sequence_lengths, text_rows, token_sequences
from hf_tfm.data.source import load_splits
from hf_tfm.data.vocabulary import train_bytes, train_wordpiece
from hf_tfm.models.cross_entropy import IGNORE_INDEX
from hf_tfm.tasks.language_modeling import LanguageModelingTask
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.optim import build_optimizer

from . import common, peers

Work = Callable[[int], int]
FIELDS = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
MASKED = 0.15  # fraction of the tokens with a label


def main(
    dataset: str = "nyu-mll/glue",
    dataset_name: str | None = None,
    text_column: str | None = None,
    bert_sizes: tuple[str, ...] = ("mini", "minilm6", "base"),
    gpt_sizes: tuple[str, ...] = ("small",),
    precisions: tuple[str, ...] = ("no", "bf16"),
    vocab_size: int = 30_522,
    batch_size: int = 32,
    length: int = 128,
    block: int = 256,
    blocks: int = 2,
    batches: int = 4,
    rounds: int = 5,
    nanogpt: str | None = None,
) -> None:
    """Measure and write benchmarks/results/language_training.json.

    Args:
        dataset, dataset_name, text_column: training texts.
        bert_sizes: of TfmBertConfig.
        gpt_sizes: of TfmGPTConfig.
        precisions: no (float32) and bf16.
        vocab_size: of the vocabularies trained on the texts; small corpora give fewer tokens.
        batch_size: sentences per BERT batch.
        length: tokens of each sequence of the rows of equal work.
        block: tokens per GPT block; blocks: blocks per batch.
        batches: batches per round.
        rounds: timed rounds; medians are reported.
        nanogpt: folder with nanoGPT's model.py.
    """
    rows = text_rows(load_splits(dataset, dataset_name)["train"], text_column)
    results = {}
    for size in bert_sizes:
        config, variants = masked(rows, size, precisions, vocab_size, batch_size, batches)
        rates = common.interleaved(variants, rounds)
        results[f"bert, {size}"] = report(rates, precisions, masked_flops(config))
        # The vocabulary of BERT, so that the output layer has its real size.
        config = TfmBertConfig.of_size(size)
        rates = common.interleaved(equal_training(config, precisions, batch_size, length, batches), rounds)
        results[f"bert, {size}, equal work, training"] = report(rates, precisions, masked_flops(config))
        rates = common.interleaved(equal_inference(config, precisions, batch_size, length, batches), rounds)
        results[f"bert, {size}, equal work, inference"] = report(rates, precisions, 2 * block_products(config))
    for size in gpt_sizes:
        config, variants = causal(rows, size, precisions, vocab_size, block, blocks, batches, nanogpt)
        rates = common.interleaved(variants, rounds)
        results[f"gpt, {size}"] = report(rates, precisions, causal_flops(config, block))
    settings = {"batch_size": batch_size, "length": length, "block": block, "blocks": blocks, "rounds": rounds}
    common.write("language_training", {"dataset": dataset, **settings, "models": results})


def masked(rows, size: str, precisions, vocab_size: int, batch_size: int, batches: int) -> tuple[object, dict]:
    """The variants for masked tokens, by name and precision."""
    tokenizer = train_wordpiece(Texts(rows), vocab_size)
    found = token_sequences(rows, tokenizer, 128, "rows")
    lengths = sequence_lengths(found)
    config = TfmBertConfig.of_size(size, vocab_size=vocab_size)
    collator = DataCollatorForLanguageModeling(tokenizer)
    random, ordered = (
        peers.random_batches(len(found), batch_size, seed=0),
        peers.sorted_batches(lengths[:, None], batch_size),
    )
    variants = {}
    for precision in precisions:
        native = BertForMaskedLM(stock(config))

        def native_batches(number: int):
            for batch in peers.spread(random, batches, number):
                given = collator([{"input_ids": found[i]["input_ids"]} for i in batch])
                yield given, int(given["attention_mask"].sum())

        variants[f"bert_{label(precision)}"] = plain(precision, native, native_batches, AdamW(native.parameters()))
        variants[f"ours_{label(precision)}"] = with_loop(
            precision, TfmBertForMaskedLM(config), tokenizer, "masked", found, ordered, batches
        )
    return config, variants


def stock(config: TfmBertConfig) -> BertConfig:
    """The configuration of transformers' BERT of the same size."""
    return BertConfig(**{name: getattr(config, name) for name in FIELDS})


def equal_training(config: TfmBertConfig, precisions, batch_size: int, length: int, batches: int) -> dict[str, Work]:
    """Training on the same full-length batch, by name and precision."""
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(config.vocab_size, (batch_size, length), generator=random)
    chosen = torch.rand(ids.shape, generator=random) < MASKED
    given = {"input_ids": ids, "labels": ids.where(chosen, torch.full_like(ids, IGNORE_INDEX))}

    def same(number: int):
        for _ in range(batches):
            yield given, ids.numel()

    models = {
        "bert": lambda: BertForMaskedLM(stock(config)),
        "ours": lambda: TfmBertForMaskedLM(config),
        "ours_labelled": lambda: TfmBertForMaskedLM(TfmBertConfig(**{**config.to_dict(), "training_logits": False})),
    }
    variants = {}
    for precision in precisions:
        for name, build in models.items():
            model = build()
            variants[f"{name}_{label(precision)}"] = plain(precision, model, same, AdamW(model.parameters()))
    return variants


def equal_inference(config: TfmBertConfig, precisions, batch_size: int, length: int, batches: int) -> dict[str, Work]:
    """The last hidden states of the same full-length batch, by name and precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ids = torch.randint(config.vocab_size, (batch_size, length), generator=torch.Generator().manual_seed(0)).to(device)
    models = {"bert": BertModel(stock(config)).to(device).eval(), "ours": TfmBertModel(config).to(device).eval()}

    def encode(model, precision: str) -> Work:
        @torch.inference_mode()
        def work(number: int) -> int:
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                for _ in range(batches):
                    model(ids)
            return batches * ids.numel()

        return work

    return {
        f"{name}_{label(precision)}": encode(model, precision)
        for precision in precisions
        for name, model in models.items()
    }


def causal(
    rows, size: str, precisions, vocab_size: int, block: int, blocks: int, batches: int, nanogpt: str | None
) -> tuple[object, dict]:
    """The variants for next tokens, by name and precision."""
    tokenizer = train_bytes(Texts(rows), vocab_size)
    found = token_sequences(rows, tokenizer, block).filter(lambda row: len(row["input_ids"]) == block)
    config = TfmGPTConfig.of_size(size, vocab_size=vocab_size)
    order = peers.random_batches(len(found), blocks, seed=0)
    variants = {}
    for precision in precisions:

        def tokens(number: int):
            for batch in peers.spread(order, batches, number):
                yield torch.tensor([found[i]["input_ids"] for i in batch])

        def gpt2_batches(number: int):
            for ids in tokens(number):
                yield {"input_ids": ids, "labels": ids, "use_cache": False}, ids.numel()

        native = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=vocab_size,
                n_embd=config.hidden_size,
                n_layer=config.num_hidden_layers,
                n_head=config.num_attention_heads,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
            )
        )
        variants[f"gpt2_{label(precision)}"] = plain(precision, native, gpt2_batches, AdamW(native.parameters()))
        if nanogpt:
            variants[f"nanogpt_{label(precision)}"] = nano(precision, nanogpt, config, tokens)
        variants[f"ours_{label(precision)}"] = with_loop(
            precision, TfmGPTForCausalLM(config), tokenizer, "causal", found, order, batches
        )
    return config, variants


def plain(precision: str, model: torch.nn.Module, batches_of: Callable, optimizer) -> Work:
    """A plain accelerate loop over batches, with a model that computes its loss."""
    AcceleratorState._reset_state()  # otherwise one process may have only one precision; prepared models keep theirs
    accelerator = Accelerator(mixed_precision=precision)
    model, optimizer = accelerator.prepare(model.train(), optimizer)

    def work(number: int) -> int:
        items = 0
        for batch, count in batches_of(number):
            batch = {k: v.to(accelerator.device) if torch.is_tensor(v) else v for k, v in batch.items()}
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            items += count
        return items

    return work


def nano(precision: str, folder: str, config: TfmGPTConfig, tokens: Callable) -> Work:
    """nanoGPT's model and optimizer, in the loop of its train.py."""
    sys.path.insert(0, folder)
    from model import GPT
    from model import GPTConfig as NanoConfig

    model = GPT(
        NanoConfig(
            block_size=config.max_position_embeddings,
            vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_embd=config.hidden_size,
            dropout=config.hidden_dropout_prob,
            bias=True,
        )
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = model.configure_optimizers(0.1, 1e-4, (0.9, 0.95), device)

    def work(number: int) -> int:
        items = 0
        for ids in tokens(number):
            ids = ids.to(device)
            with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
                _, loss = model(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            items += ids.numel()
        return items

    return work


def with_loop(precision: str, model, tokenizer, objective: str, rows, plan, batches: int) -> Work:
    """Our model, task and `train_step`."""
    task = LanguageModelingTask.for_model(model, tokenizer, objective=objective)
    collate = task.collator()
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    args = TrainingArguments(output_dir=".", max_steps=1, learning_rate=1e-4)
    model, optimizer = accelerator.prepare(model.train(), build_optimizer(model, args))

    def work(number: int) -> int:
        items = 0
        for batch in peers.spread(plan, batches, number):
            examples = rows.__getitems__(batch)
            items += sum(len(example["input_ids"]) for example in examples)
            train_step(accelerator, task, model, optimizer, [collate(examples, batch, 0)])
        return items

    return work


def label(precision: str) -> str:
    return {"no": "fp32", "bf16": "bf16"}[precision]


def block_products(config) -> int:
    """Multiply-adds per token in the linear layers of the blocks."""
    D, F = config.hidden_size, config.intermediate_size or 4 * config.hidden_size
    return config.num_hidden_layers * (4 * D * D + 2 * D * F)


def masked_flops(config: TfmBertConfig) -> float:
    """Linear-layer FLOPs per token of a training step, with the head on 15 % of tokens; attention is excluded."""
    D, V = config.hidden_size, config.vocab_size
    return 3 * 2 * (block_products(config) + MASKED * (D * D + D * V))


def causal_flops(config: TfmGPTConfig, block: int) -> float:
    """FLOPs per token of a training step, with attention over half of a block on average."""
    D, V = config.hidden_size, config.vocab_size
    return 3 * 2 * (block_products(config) + config.num_hidden_layers * 2 * D * block / 2 + D * V)


def report(rates: dict[str, list[float]], precisions, flops: float) -> dict:
    """Medians, the ratios of our variants to each peer, and efficiency."""
    rate_of = {precision: common.matmul_rate(peers.dtype_of(precision)) for precision in precisions}
    found: dict = {"tokens_per_second": {name: round(statistics.median(r)) for name, r in rates.items()}}
    found["ratios"], found["share_of_floor"] = {}, {}
    for precision in precisions:
        ours_here = [name for name in rates if name.startswith("ours") and name.endswith(f"_{label(precision)}")]
        for ours in ours_here:
            for peer in rates:
                same = peer.endswith(f"_{label(precision)}") or peer.endswith("_fp32")
                if same and not peer.startswith("ours"):
                    found["ratios"][f"{ours} / {peer}"] = round(common.ratio(rates, ours, peer), 2)
        fastest = max(statistics.median(rates[name]) for name in ours_here)
        found["share_of_floor"][label(precision)] = {
            "matmul_gflops": round(rate_of[precision] / 1e9),
            "mflop_per_token": round(flops / 1e6, 1),
            "share": round(fastest * flops / rate_of[precision], 3),
        }
    return found
