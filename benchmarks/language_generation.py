"""Generation speed: tokens per second of our GPT's `generate` against GPT-2's, same weights, same tokens.

python -m benchmarks language_generation
"""

import torch

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.hub.convert import converted
from hf_tfm.hub.convert.gpt2 import GPT2

from . import common, translation_generation


def main(
    sizes: tuple[str, ...] = ("tiny", "small"),
    precisions: tuple[str, ...] = ("fp32",),
    batch_sizes: tuple[int, ...] = (1, 16),
    beams: tuple[int, ...] = (1,),
    vocab_size: int = 50_257,
    prompt_length: int = 16,
    new_tokens: int = 48,
    rounds: int = 5,
) -> None:
    """Measure and write benchmarks/results/language_generation.json.

    Args:
        sizes: of TfmGPTConfig, with random weights.
        precisions: fp32, bf16 (weights in that dtype).
        batch_sizes: prompts at once; they are of different lengths, padded at the left.
        beams: 1 is greedy.
        vocab_size: of the models.
        prompt_length: tokens of the longest prompt.
        new_tokens: tokens that each prompt gets.
        rounds: timed rounds; medians are reported.
    """
    (stock,) = (conversion for conversion in GPT2 if conversion.ours is TfmGPTForCausalLM)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results = {}
    for size in sizes:
        torch.manual_seed(0)
        config = TfmGPTConfig.of_size(size, vocab_size=vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=1)
        ours = TfmGPTForCausalLM(config)
        for precision in precisions:
            dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
            both = {"ours": ours, "peer": converted(stock, ours, stock.name)}
            models = {name: model.to(device, dtype).eval() for name, model in both.items()}
            for num_beams in beams:
                for count in batch_sizes:
                    options = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "num_beams": num_beams}
                    found = translation_generation.compare(
                        models, prompts(prompt_length, vocab_size, count), options, rounds
                    )
                    speeds = {name: round(found[f"{name}_sentences_per_second"] * new_tokens) for name in models}
                    key = f"{size}, {precision}, {num_beams} beam{'s' * (num_beams > 1)}, batch {count}"
                    results[key] = {"tokens_per_second": speeds, **found}
                    print(key, results[key], flush=True)
    common.write("language_generation", {"new_tokens": new_tokens, "rounds": rounds, "results": results})


def prompts(length: int, vocab_size: int, size: int) -> list[dict]:
    """One batch of random prompts of different lengths, padded at the left."""
    (batch,) = translation_generation.random_batches(length, vocab_size, size)
    longest = int(batch["attention_mask"].sum(1).max())
    return [{name: value[:, :longest].flip(1) for name, value in batch.items()}]
