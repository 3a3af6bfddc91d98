"""Loaders shared by tasks: batches of a split for this process."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator

from ..arguments import TokenBatchArguments, TrainingArguments
from ..data.batching import StepLoader, TokenBudgetSampler
from ..data.stream import StreamLoader


def placement(args: TrainingArguments, accelerator: Accelerator, workers: bool = True) -> dict[str, Any]:
    """Return the arguments of a loader that depend on this process.

    Args:
        workers: use ``args.dataloader_num_workers`` worker processes; otherwise none.
    """
    return {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "num_workers": args.dataloader_num_workers if workers else 0,
        "pin_memory": accelerator.device.type == "cuda",
    }


def token_loader(
    args: TokenBatchArguments,
    accelerator: Accelerator,
    collate: Callable[..., Any],
    rows: Any,
    lengths: Callable[[datasets.Dataset], np.ndarray],
    length: Callable[[dict], Sequence[int]],
    training: bool,
) -> StepLoader | StreamLoader:
    """Return batches of about equally many tokens of a split.

    Args:
        rows: examples, or a stream of them.
        lengths: all rows -> tokens of the sides of each; ``length``: one example -> tokens of its sides.
    """
    options = {"micro_batch_tokens": args.micro_batch_tokens, **placement(args, accelerator, training)}
    if isinstance(rows, datasets.IterableDataset):
        return StreamLoader(rows, length, args.batch_tokens, collate, args.seed, **options)
    sampler = TokenBudgetSampler(lengths(rows), args.batch_tokens, args.seed, shuffle=training)
    return StepLoader(rows, sampler, collate, **options)


def check_stream(args: TokenBatchArguments, train_split: str, max_length: int, scored: Sequence[str]) -> None:
    """Refuse arguments that a stream of training data does not allow.

    Args:
        train_split: split that is streamed.
        max_length: tokens of the longest sample.
        scored: splits that are evaluated.

    Raises:
        ValueError: the length of the run is not given, the stream is scored too, or a sample may exceed a batch.
    """
    if args.max_steps is None:
        raise ValueError("streaming needs max_steps: the length of a stream is not known")
    if train_split in scored:
        raise ValueError(f'streaming: train_split "{train_split}" cannot be scored too')
    budget = min(args.batch_tokens, args.micro_batch_tokens or args.batch_tokens)
    if max_length > budget:
        raise ValueError(f"max_length must be at most the {budget} tokens of a batch, got {max_length}")
