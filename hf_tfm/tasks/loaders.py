"""Loaders shared by tasks: batches of a split for this process."""

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator

from ..arguments import TokenBatchArguments, TrainingArguments
from ..data.batching import StepLoader, TokenBudgetSampler


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
