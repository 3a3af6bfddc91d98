"""Training speed: real target tokens per second of our model and loop against Marian in a plain accelerate loop.

python -m benchmarks translation_training --dataset DATA

Three implementations of one size, interleaved on the same machine, in float32 and bf16 autocast:
  marian_random   transformers' MarianMTModel, Trainer's LabelSmoother, AdamW, random batches of 64
  marian_sorted   the same on our batches of 64 sorted by both lengths
  ours            our model, `train_step`, on those batches
"""

import statistics

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.optim import AdamW
from transformers.trainer_pt_utils import LabelSmoother

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration
from hf_tfm.data.text import pair_lengths
from hf_tfm.tasks.translation import TranslationCollator, TranslationTask
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.optim import build_optimizer

from . import common, peers


def main(
    dataset: str = "bentrevett/multi30k",
    source_column: str = "en",
    target_column: str = "de",
    sizes: tuple[str, ...] = ("tiny", "base"),
    precisions: tuple[str, ...] = ("no", "bf16"),
    vocab_size: int = 10_000,
    batch_size: int = 64,
    batches: int = 4,
    rounds: int = 5,
) -> None:
    """Measure and write benchmarks/results/translation_training.json.

    Args:
        dataset: training pairs; a Hub id or a local folder.
        source_column, target_column: its columns or languages.
        sizes: of TfmTransformerConfig.
        precisions: no (float32) and bf16.
        vocab_size: of the joint byte-pair encoding.
        batch_size: sentences per batch.
        batches: batches per round.
        rounds: timed rounds; medians are reported.
    """
    rows, _ = peers.tokenized(dataset, vocab_size, source_column, target_column)
    lengths = pair_lengths(rows)
    random = peers.random_batches(len(rows), batch_size, seed=0)
    ordered = peers.sorted_batches(lengths, batch_size)
    results = {}
    for size in sizes:
        config = TfmTransformerConfig.of_size(size, vocab_size=vocab_size, max_position_embeddings=256)
        task = TranslationTask.for_model(None)
        variants = {}
        for precision in precisions:
            variants |= implementations(config, task, rows, random, ordered, precision, batches)
        rates = common.interleaved(variants, rounds)
        chosen = [i for number in range(rounds) for b in peers.spread(ordered, batches, number) for i in b]
        source, target = lengths[chosen].sum(axis=0)
        results[size] = report(config, rates, precisions, source / target)
    common.write(
        "translation_training", {"dataset": dataset, "batch_size": batch_size, "rounds": rounds, "sizes": results}
    )


def implementations(config, task, rows, random, ordered, precision: str, batches: int) -> dict:
    """The three variants at one precision, each a function that trains on one round's batches."""
    AcceleratorState._reset_state()  # otherwise one process may have only one precision; prepared models keep theirs

    def collated(plan, number: int):
        chosen = peers.spread(plan, batches, number)
        return [TranslationCollator(config)(rows.__getitems__(batch), batch, 0) for batch in chosen]

    def peer(plan):
        accelerator = Accelerator(mixed_precision=precision)
        model = peers.marian(config)
        model, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=1e-4))
        smoother = LabelSmoother(epsilon=config.label_smoothing)
        model.train()

        def work(number: int) -> int:
            tokens = 0
            for batch in collated(plan, number):
                tokens += task.count(batch)["token"]
                batch = {name: value.to(accelerator.device) for name, value in batch.items()}
                labels = batch.pop("labels")
                loss = smoother(model(**batch, use_cache=False), labels)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            return tokens

        return work

    accelerator = Accelerator(mixed_precision=precision)
    model = TfmTransformerForConditionalGeneration(config)
    args = TrainingArguments(output_dir=".", max_steps=1, learning_rate=1e-4)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    model.train()

    def ours(number: int) -> int:
        tokens = 0
        for batch in collated(ordered, number):
            tokens += task.count(batch)["token"]
            train_step(accelerator, task, model, optimizer, [batch])
        return tokens

    names = {"marian_random": peer(random), "marian_sorted": peer(ordered), "ours": ours}
    return {f"{name}_{label(precision)}": work for name, work in names.items()}


def label(precision: str) -> str:
    return {"no": "fp32", "bf16": "bf16"}[precision]


def report(config, rates: dict[str, list[float]], precisions, source_per_target: float) -> dict:
    """Medians, the relevant ratios, and efficiency."""
    out: dict = {"target_tokens_per_second": {name: round(statistics.median(r)) for name, r in rates.items()}}
    out["ratios"] = {}
    out["share_of_floor"] = {}
    for precision in precisions:
        p = label(precision)
        for peer in ("marian_random", "marian_sorted"):
            out["ratios"][f"ours_{p} / {peer}_{p}"] = round(common.ratio(rates, f"ours_{p}", f"{peer}_{p}"), 2)
        if p != "fp32" and "no" in precisions:
            out["ratios"][f"ours_{p} / marian_random_fp32"] = round(
                common.ratio(rates, f"ours_{p}", "marian_random_fp32"), 2
            )
        flops = peers.training_flops(config, source_per_target, 1)
        rate = common.matmul_rate(peers.dtype_of(precision))
        out["share_of_floor"][p] = {
            "matmul_gflops": round(rate / 1e9),
            "mflop_per_target_token": round(flops / 1e6, 1),
            "share": round(statistics.median(rates[f"ours_{p}"]) * flops / rate, 3),
        }
    return out
