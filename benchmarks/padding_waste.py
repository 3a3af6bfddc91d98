"""Share of padding in batches of sentence pairs, by batching method.

python -m benchmarks padding_waste --dataset DATA

An epoch of training pairs, padded to the longest source and target of each batch:
  random               batches of 64 in random order
  length grouped       transformers' LengthGroupedSampler, by source length, batches of 64
  two sides            our order by both lengths, batches of 64
  two sides, budget    the same with our token budget, that of multi30k_tiny
"""

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler

from hf_tfm.data.batching import TokenBudgetSampler, padding_waste
from hf_tfm.data.text import pair_lengths

from . import common, peers


def main(
    dataset: str = "bentrevett/multi30k",
    source_column: str = "en",
    target_column: str = "de",
    vocab_size: int = 10_000,
    batch_size: int = 64,
    batch_tokens: int = 4096,
) -> None:
    """Measure and write benchmarks/results/padding_waste.json.

    Args:
        dataset: training pairs; a Hub id or a local folder.
        source_column, target_column: its columns or languages.
        vocab_size: of the joint byte-pair encoding.
        batch_size: sentences per batch.
        batch_tokens: token budget per batch: padded tokens on the longer side.
    """
    rows, _ = peers.tokenized(dataset, vocab_size, source_column, target_column)
    lengths = pair_lengths(rows)
    generator = torch.Generator().manual_seed(0)
    grouped = list(LengthGroupedSampler(batch_size, lengths=lengths[:, 0].tolist(), generator=generator))
    batches = {
        f"random, {batch_size} sentences": peers.random_batches(len(lengths), batch_size, seed=0),
        f"transformers' LengthGroupedSampler, {batch_size} sentences": [
            grouped[i : i + batch_size] for i in range(0, len(grouped), batch_size)
        ],
        f"both sides sorted, {batch_size} sentences": peers.sorted_batches(lengths, batch_size),
        f"both sides sorted, {batch_tokens} tokens": TokenBudgetSampler(lengths, batch_tokens).steps(0),
    }
    common.write(
        "padding_waste",
        {
            "dataset": dataset,
            "pairs": len(lengths),
            "tokens": int(lengths.sum()),
            "waste": {name: padding_waste(steps, lengths) for name, steps in batches.items()},
        },
    )
