"""Loaders shared by tasks: batches of a split for this process."""

from collections.abc import Callable, Sequence
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from ..arguments import TokenBatchArguments, TrainingArguments
from ..data.batching import StepLoader, TokenBudgetSampler
from ..data.stream import StreamLoader
from ..data.tokens import Tokenization, allow_forks


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
    training: bool,
) -> StepLoader:
    """Return batches of about equally many tokens of a split.

    Args:
        rows: examples.
        lengths: all rows -> tokens of the sides of each.
    """
    options = {"micro_batch_tokens": args.micro_batch_tokens, **placement(args, accelerator, training)}
    sampler = TokenBudgetSampler(lengths(rows), args.batch_tokens, args.seed, shuffle=training)
    return StepLoader(rows, sampler, collate, **options)


def stream_loader(
    args: TokenBatchArguments,
    accelerator: Accelerator,
    collate: Callable[..., Any],
    rows: datasets.IterableDataset,
    tokenize: Tokenization,
    length: Callable[[dict], Sequence[int]],
) -> StreamLoader:
    """Return batches of about equally many tokens of a stream; its ranks share the tokenization.

    Args:
        length: one example -> tokens of its sides.
    """
    allow_forks()
    exchange = gather_object if accelerator.num_processes > 1 else None
    options = {"micro_batch_tokens": args.micro_batch_tokens, "exchange": exchange, **placement(args, accelerator)}
    return StreamLoader(rows, length, args.batch_tokens, collate, args.seed, tokenize, **options)


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
