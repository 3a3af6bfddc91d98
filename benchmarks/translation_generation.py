"""Generation speed: sentences per second of our `generate` against Marian's, same weights and identical tokens.

python -m benchmarks translation_generation [--model DIR --dataset DATA]

Without ``model`` the weights are random and every sentence gets 24 new tokens; with a trained model its own
translations are timed.
"""

import statistics
from functools import partial

import torch

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration
from hf_tfm.hub.convert import MARIAN, converted

from . import common


def main(
    sizes: tuple[str, ...] = ("tiny", "base"),
    precisions: tuple[str, ...] = ("fp32",),
    batch_sizes: tuple[int, ...] = (1, 16, 64),
    beams: tuple[int, ...] = (1, 5),
    vocab_size: int = 10_000,
    source_length: int = 16,
    new_tokens: int = 24,
    rounds: int = 7,
) -> None:
    """Measure and write benchmarks/results/translation_generation.json.

    Args:
        sizes: of TfmTransformerConfig.
        precisions: fp32, bf16 (weights in that dtype).
        batch_sizes: sentences at once.
        beams: 1 is greedy.
        vocab_size: of the model.
        source_length: tokens of the longest source; others are shorter.
        new_tokens: tokens that every translation gets.
        rounds: timed rounds; medians are reported.
    """
    results: dict = {}
    for size in sizes:
        torch.manual_seed(0)
        config = TfmTransformerConfig.of_size(size, vocab_size=vocab_size, max_position_embeddings=256)
        ours = TfmTransformerForConditionalGeneration(config).eval()
        ours.generation_config.update(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
        marian = converted(MARIAN, ours, "marian").eval()
        for precision in precisions:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            device = "cuda" if torch.cuda.is_available() else "cpu"
            models = {"ours": ours.to(device, dtype), "marian": marian.to(device, dtype)}
            for num_beams in beams:
                for batch_size in batch_sizes:
                    name = f"{size} {precision} beam {num_beams} batch {batch_size}"
                    results[name] = compare(
                        models, batch_size, num_beams, source_length, new_tokens, rounds, vocab_size
                    )
                    print(name, results[name], flush=True)
    common.write("translation_generation", {"new_tokens": new_tokens, "rounds": rounds, "results": results})


def compare(models, batch_size, num_beams, source_length, new_tokens, rounds, vocab_size) -> dict:
    """Sentences per second of both, their ratio, and whether the tokens are the same."""
    device = models["ours"].device
    ids = torch.randint(5, vocab_size, (batch_size, source_length), device=device)
    lengths = torch.arange(batch_size, device=device) % (source_length // 2) + source_length // 2 + 1
    mask = (torch.arange(source_length, device=device) < lengths[:, None]).long()
    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "num_beams": num_beams, "do_sample": False}

    def generate(model):
        with torch.inference_mode():
            return model.generate(input_ids=ids * mask, attention_mask=mask, **options)

    def work(model, number: int) -> int:
        generate(model)
        return batch_size

    same = torch.equal(generate(models["ours"]), generate(models["marian"]))
    rates = common.interleaved({name: partial(work, model) for name, model in models.items()}, rounds)
    return {
        **{f"{name}_sentences_per_second": round(statistics.median(r), 1) for name, r in rates.items()},
        "ratio": round(common.ratio(rates, "ours", "marian"), 2),
        "identical_tokens": same,
    }
