"""What the recipes with a budget of tokens share: their loaders, and what a stream allows."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator

from ..arguments import TokenBatchArguments
from ..data.batching import StepLoader, TokenBudgetSampler
from ..data.stream import StreamLoader


def token_loader(
    args: TokenBatchArguments,
    accelerator: Accelerator,
    collate: Callable[..., Any],
    rows: Any,
    lengths: Callable[[datasets.Dataset], np.ndarray],
    length: Callable[[dict], Sequence[int]],
    learning: bool,
) -> StepLoader | StreamLoader:
    """Batches of about equally many tokens of a split, for training or evaluation.

    Args:
        rows: examples, or for training a stream of them.
        lengths: all rows -> tokens of the sides of each; ``length``: one example -> tokens of its sides.
    """
    placement = {
        "micro_batch_tokens": args.micro_batch_tokens,
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "num_workers": args.dataloader_num_workers if learning else 0,
        "pin_memory": accelerator.device.type == "cuda",
    }
    if isinstance(rows, datasets.IterableDataset):
        return StreamLoader(rows, length, args.batch_tokens, collate, args.seed, **placement)
    sampler = TokenBudgetSampler(lengths(rows), args.batch_tokens, args.seed, shuffle=learning)
    return StepLoader(rows, sampler, collate, **placement)


def check_stream(args: TokenBatchArguments, max_length: int, scored: Sequence[str]) -> None:
    """Refuse knobs that a stream of training data does not allow.

    Args:
        max_length: tokens of the longest sample.
        scored: splits that are evaluated.

    Raises:
        ValueError: the length of the run is not given, the stream is scored too, or a sample may not fit a batch.
    """
    if args.max_steps is None:
        raise ValueError("streaming needs max_steps: the length of a stream is not known")
    if args.train_split in scored:
        raise ValueError(f'streaming: train_split "{args.train_split}" cannot be scored too')
    budget = min(args.batch_tokens, args.micro_batch_tokens or args.batch_tokens)
    if max_length > budget:
        raise ValueError(f"max_length must be at most the {budget} tokens of a batch, got {max_length}")
