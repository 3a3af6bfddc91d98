"""Generation speed: sentences per second of our `generate` against Marian's or Pegasus', same weights, same tokens.

python -m benchmarks translation_generation [--model DIR --dataset DATA]

With random weights all sentences of a batch get the same number of tokens. A trained ``model`` is also timed on a test
set, where sentences end at different lengths, as in practice.
"""

import statistics
from functools import partial

import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedModel

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration
from hf_tfm.conversion import converted
from hf_tfm.conversion.marian_pegasus import MARIAN, PEGASUS
from hf_tfm.data import text

from . import common, peers


def main(
    sizes: tuple[str, ...] = ("tiny", "base"),
    precisions: tuple[str, ...] = ("fp32",),
    batch_sizes: tuple[int, ...] = (1, 16, 64),
    beams: tuple[int, ...] = (1, 5),
    vocab_size: int = 10_000,
    source_length: int = 16,
    new_tokens: int = 24,
    rounds: int = 7,
    model: str | None = None,
    dataset: str = "bentrevett/multi30k",
    split: str = "test_2016_flickr",
    source_column: str = "en",
    target_column: str = "de",
    batches: int = 4,
) -> None:
    """Measure and write benchmarks/results/translation_generation.json.

    Args:
        sizes: of TfmTransformerConfig, with random weights.
        precisions: fp32, bf16 (weights in that dtype).
        batch_sizes: sentences per batch.
        beams: numbers of beams; 1 is greedy search.
        vocab_size: of the models with random weights.
        source_length: tokens of the longest source; others are shorter.
        new_tokens: generated tokens per translation.
        rounds: timed rounds; medians are reported.
        model: folder or Hub id of a trained model, timed on real sentences too.
        dataset, split, source_column, target_column: source of the real sentences.
        batches: number of batches of real sentences, evenly spaced by length.
    """
    results: dict = {}

    def measure(name: str, ours: PreTrainedModel, batches_of, options: dict) -> None:
        for precision in precisions:
            models = twins(ours, {"fp32": torch.float32, "bf16": torch.bfloat16}[precision])
            for num_beams in beams:
                for size in batch_sizes:
                    key = f"{name}, {precision}, {num_beams} beam{'s' * (num_beams > 1)}, batch {size}"
                    results[key] = compare(models, batches_of(size), {**options, "num_beams": num_beams}, rounds)
                    print(key, results[key], flush=True)

    for size in sizes:
        torch.manual_seed(0)
        config = TfmTransformerConfig.of_size(size, vocab_size=vocab_size, max_position_embeddings=256)
        ours = TfmTransformerForConditionalGeneration(config)
        options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        measure(f"{size}, equal lengths", ours, partial(random_batches, source_length, vocab_size), options)
    if model:
        tokenizer = AutoTokenizer.from_pretrained(model)
        sources = text.text_pairs(text.load_splits(dataset)[split], source_column, target_column)["source"]
        trained = AutoModelForSeq2SeqLM.from_pretrained(model)
        measure("trained, real sentences", trained, partial(real_batches, sources, tokenizer, batches), {})
    common.write(
        "translation_generation", {"new_tokens": new_tokens, "rounds": rounds, "dataset": dataset, "results": results}
    )


def twins(ours: PreTrainedModel, dtype: torch.dtype) -> dict[str, PreTrainedModel]:
    """Our model and the native class with its weights, in eval mode on the benchmark device."""
    conversion = PEGASUS if ours.config.norm_first else MARIAN
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = {"ours": ours, "peer": converted(conversion, ours, conversion.name)}
    return {name: m.to(device, dtype).eval() for name, m in models.items()}


def random_batches(source_length: int, vocab_size: int, size: int) -> list[dict]:
    """One batch of random sources of different lengths."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, vocab_size, (size, source_length), generator=generator)
    lengths = torch.arange(size) % (source_length // 2) + source_length // 2 + 1
    mask = (torch.arange(source_length) < lengths[:, None]).long()
    return [{"input_ids": ids * mask, "attention_mask": mask}]


def real_batches(sources: list[str], tokenizer, count: int, size: int) -> list[dict]:
    """Some batches of the sentences sorted by length."""
    sources = sorted(sources, key=len)
    parts = [sources[start : start + size] for start in range(0, len(sources), size)]
    return [dict(tokenizer(part, return_tensors="pt", padding=True)) for part in peers.spread(parts, count, 0)]


def compare(models: dict[str, PreTrainedModel], batches: list[dict], options: dict, rounds: int) -> dict:
    """Sentences per second of both models, their ratio, and the share of identical outputs."""
    device = models["ours"].device
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]

    @torch.inference_mode()
    def generate(model) -> list[list[int]]:
        out = [model.generate(**batch, do_sample=False, **options) for batch in batches]
        return [row.tolist() for part in out for row in part]

    def work(model, number: int) -> int:
        return len(generate(model))

    said = [generate(model) for model in models.values()]
    rates = common.interleaved({name: partial(work, model) for name, model in models.items()}, rounds)
    return {
        **{f"{name}_sentences_per_second": round(statistics.median(r), 1) for name, r in rates.items()},
        "ratio": round(common.ratio(rates, "ours", "peer"), 2),
        "identical_sentences": sum(a == b for a, b in zip(*said, strict=True)) / len(said[0]),
    }
