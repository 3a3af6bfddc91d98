"""Generation speed: tokens per second of our GPT's `generate` against GPT-2's, same weights, same tokens.

python -m benchmarks language_generation [--model RUN --dataset nyu-mll/glue --dataset_name sst2]

Texts of equal lengths by models with random weights; with ``model``, trained by language_pretrain with objective
causal, also texts that end at different lengths.
"""

from collections.abc import Iterator

import torch
from transformers import AutoTokenizer

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.conversion import converted
from hf_tfm.conversion.gpt2 import GPT2
from hf_tfm.data.language import text_rows
from hf_tfm.data.source import load_splits

from . import common, translation_generation

BEGUN = 3  # prompt tokens for a trained model


def main(
    sizes: tuple[str, ...] = ("tiny", "small"),
    precisions: tuple[str, ...] = ("fp32",),
    batch_sizes: tuple[int, ...] = (1, 16),
    beams: tuple[int, ...] = (1,),
    vocab_size: int = 50_257,
    prompt_length: int = 16,
    new_tokens: int = 48,
    rounds: int = 5,
    model: str | None = None,
    dataset: str = "nyu-mll/glue",
    dataset_name: str | None = None,
    split: str = "validation",
    text_column: str | None = None,
) -> None:
    """Measure and write benchmarks/results/language_generation.json.

    Args:
        sizes: of TfmGPTConfig, with random weights.
        precisions: fp32, bf16 (weights in that dtype).
        batch_sizes: prompts per batch; they have different lengths and are left-padded.
        beams: numbers of beams; 1 is greedy search.
        vocab_size: of the models with random weights.
        prompt_length: tokens of the longest prompt.
        new_tokens: generated tokens per text; the maximum for a trained model.
        rounds: timed rounds; medians are reported.
        model: folder of a trained TfmGPTForCausalLM with its tokenizer.
        dataset, dataset_name, split, text_column: texts whose first tokens are the prompts.
    """
    (stock,) = (conversion for conversion in GPT2 if conversion.ours is TfmGPTForCausalLM)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = list(text_rows(load_splits(dataset, dataset_name)[split], text_column)["text"]) if model else []
    results = {}
    for name, ours, batch_of, least in implementations(sizes, vocab_size, prompt_length, new_tokens, model, texts):
        for precision in precisions:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            both = {"ours": ours, "peer": converted(stock, ours, stock.name)}
            models = {side: each.to(device, dtype).eval() for side, each in both.items()}
            for num_beams in beams:
                for count in batch_sizes:
                    options = {"max_new_tokens": new_tokens, "min_new_tokens": least, "num_beams": num_beams}
                    batches = batch_of(count)
                    found = translation_generation.compare(models, batches, options, rounds)
                    length = mean_length(models["ours"], batches, options)
                    speeds = {side: round(found[f"{side}_sentences_per_second"] * length) for side in models}
                    key = f"{name}, {precision}, {num_beams} beam{'s' * (num_beams > 1)}, batch {count}"
                    results[key] = {"tokens_per_second": speeds, "new_tokens": round(length, 1), **found}
                    print(key, results[key], flush=True)
    common.write("language_generation", {"new_tokens": new_tokens, "rounds": rounds, "results": results})


def implementations(
    sizes: tuple[str, ...], vocab_size: int, prompt_length: int, new_tokens: int, model: str | None, texts: list[str]
) -> Iterator[tuple]:
    """(name, our model, prompts by index, minimum new tokens) of each setting, one at a time."""
    for size in sizes:
        torch.manual_seed(0)
        config = TfmGPTConfig.of_size(size, vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=1)
        yield size, TfmGPTForCausalLM(config), lambda count: prompts(prompt_length, vocab_size, count), new_tokens
    if model:
        tokenizer = AutoTokenizer.from_pretrained(model)
        yield "trained", TfmGPTForCausalLM.from_pretrained(model), lambda count: beginnings(tokenizer, texts, count), 0


def prompts(length: int, vocab_size: int, size: int) -> list[dict]:
    """One batch of random prompts of different lengths, left-padded."""
    (batch,) = translation_generation.random_batches(length, vocab_size, size)
    longest = int(batch["attention_mask"].sum(1).max())
    return [{name: value[:, :longest].flip(1) for name, value in batch.items()}]


def beginnings(tokenizer, texts: list[str], size: int) -> list[dict]:
    """Four batches of prompts from the beginnings of texts."""
    ids = [tokenizer(text)["input_ids"][:BEGUN] for text in texts[:: len(texts) // (8 * size)]]
    ids = torch.tensor([row for row in ids if len(row) == BEGUN][: 4 * size])
    return [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(size)]


@torch.inference_mode()
def mean_length(model: TfmGPTForCausalLM, batches: list[dict], options: dict) -> float:
    """New tokens per text, end token included."""
    device = model.device
    lengths = []
    for batch in batches:
        new = model.generate(**{k: v.to(device) for k, v in batch.items()}, do_sample=False, **options)
        new = new[:, batch["input_ids"].shape[1] :]
        ended = new == model.generation_config.eos_token_id
        lengths += torch.where(ended.any(1), ended.int().argmax(1) + 1, new.shape[1]).tolist()
    return sum(lengths) / len(lengths)
