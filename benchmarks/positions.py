"""Cost of FLOATER, rotary and ALiBi positions: training steps and translations per second beside sinusoidal ones.

python -m benchmarks positions

One size, random batches of sentences of equal length, interleaved on the same machine:
  train   forward and backward pass and an optimizer step
  infer   greedy decoding with a cache; FLOATER's table is there
"""

import statistics

import torch

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration

from . import common

KINDS = ("sinusoidal", "floater", "floater_input", "rotary", "alibi")


def main(
    size: str = "tiny",
    length: int = 16,
    tokens: int = 4096,
    sentences: int = 32,
    vocab_size: int = 10_000,
    rounds: int = 5,
    adjoint: bool = True,
) -> None:
    """Measure and write benchmarks/results/positions.json.

    Args:
        size: of TfmTransformerConfig.
        length: tokens of a sentence, on both sides.
        tokens: of a training batch, on each side.
        sentences: that are translated at once.
        vocab_size: of the model.
        rounds: timed rounds; medians are reported.
        adjoint: gradients of FLOATER by the adjoint, otherwise by automatic differentiation.
    """
    options = {"vocab_size": vocab_size, "norm_first": True, "floater_adjoint": adjoint}
    variants = {}
    for name in KINDS:
        kind, _, scope = name.partition("_")
        fields = {"position_embedding_type": kind, "floater_scope": scope or "all"}
        torch.manual_seed(0)
        config = TfmTransformerConfig.of_size(size, **options, **fields)
        variants |= implementations(name, config, length, tokens, sentences)
    rates = common.interleaved(variants, rounds)
    ratios = {
        f"{use}: {name} / sinusoidal": round(common.ratio(rates, f"{use} {name}", f"{use} sinusoidal"), 3)
        for use in ("train", "infer")
        for name in KINDS[1:]
    }
    per_second = {name: round(statistics.median(values), 2) for name, values in rates.items()}
    content = {"size": size, "length": length, "tokens": tokens, "sentences": sentences, "rounds": rounds}
    common.write("positions", {**content, "per_second": per_second, "ratios": ratios})


def implementations(name: str, config: TfmTransformerConfig, length: int, tokens: int, sentences: int) -> dict:
    """Training and inference with one kind: each a function that returns the number of sentences it processed."""
    model = TfmTransformerForConditionalGeneration(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def ids(rows: int) -> torch.Tensor:
        return torch.randint(5, config.vocab_size, (rows, length))

    def train(number: int) -> int:
        source, target = ids(tokens // length), ids(tokens // length)
        model.train()
        mask = torch.ones_like(source)
        model(input_ids=source, attention_mask=mask, labels=target, return_logits=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return len(source)

    evaluated = TfmTransformerForConditionalGeneration(config).eval()

    @torch.inference_mode()
    def infer(number: int) -> int:
        return len(evaluated.generate(ids(sentences), max_new_tokens=length, min_new_tokens=length))

    return {f"train {name}": train, f"infer {name}": infer}
