"""Streams of training data: arguments, and loaders of texts and images; see `data.stream`."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import datasets
import numpy as np
from accelerate import Accelerator

from ..arguments import ImageBatchArguments, SplitArguments, TokenBatchArguments, TrainingArguments
from ..data.batching import Sampler, TokenBudgetSampler
from ..data.exchange import ProcessExchange
from ..data.stream import Prepare, StreamLoader, pool_seed
from ..data.tokens import Tokenization, allow_forks
from .loaders import placement

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StreamArguments(SplitArguments, TrainingArguments):
    """Training on a stream.

    Args:
        streaming: stream the training split instead of downloading it; needs max_steps.
        stream_files: number of files of a stream that are read in turn, at most. The processes share them: with fewer
            files than processes, several processes read the same file.
    """

    streaming: bool = False
    stream_files: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="stream_files", at_most={"stream_files": 100_000})
        if not self.streaming:
            return
        if self.max_steps is None:
            raise ValueError("streaming needs max_steps: the length of a stream is not known")
        if self.holdout is not None or self.max_train_samples is not None:
            raise ValueError("streaming reads the whole training split: give no holdout and no max_train_samples")
        if self.train_split in (self.held_out, *self.test_splits):
            raise ValueError(f'streaming: train_split "{self.train_split}" cannot be scored too')


@dataclass(kw_only=True)
class TokenStreamArguments(TokenBatchArguments, StreamArguments):
    """Training on a stream of texts."""


@dataclass(kw_only=True)
class ImageStreamArguments(ImageBatchArguments, StreamArguments):
    """Training on a stream of images.

    Args:
        stream_files: number of files of a stream that are read in turn, at most; each may hold a group of encoded
            images in memory. The processes share them: with fewer files than processes, several processes read the
            same file.
        shuffle_buffer: number of images of a stream that are shuffled together, over all processes; 10,000 encoded
            images of ImageNet take about 1 GB, and up to three times that while the next ones are read. A stream
            sorted by class needs several classes in the buffer.
    """

    stream_files: int = 16
    shuffle_buffer: int = 10_000

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="shuffle_buffer", at_most={"shuffle_buffer": 10_000_000})
        if self.streaming and self.warmup_epochs is not None:
            raise ValueError("streaming needs warmup_steps, not warmup_epochs: the length of a stream is not known")


def stream_loader(
    args: TokenStreamArguments,
    accelerator: Accelerator,
    collate: Callable[..., Any],
    rows: datasets.IterableDataset,
    tokenize: Tokenization,
    length: Callable[[dict], Sequence[int]],
) -> StreamLoader:
    """Return batches of about equally many tokens of a stream; its ranks and workers share the tokenization.

    Args:
        length: one example -> tokens of its sides.
    """
    allow_forks()
    place = stream_placement(args, accelerator, rows)
    workers = place.pop("num_workers")
    return StreamLoader(
        rows,
        lambda lengths, first: TokenBudgetSampler(lengths, args.batch_tokens, pool_seed(args.seed, first)),
        collate,
        length,
        prepare=tokenize,
        micro_batch_tokens=args.micro_batch_tokens,
        num_workers=min(1, workers),
        num_readers=workers,
        **place,
    )


def image_stream_loader(
    args: ImageStreamArguments,
    accelerator: Accelerator,
    collate: Callable[..., Any],
    rows: datasets.IterableDataset,
    sampler: Callable[[np.ndarray, int], Sampler],
    size: Callable[[dict], Sequence[int]] | None = None,
    prepare: Prepare | None = None,
) -> StreamLoader:
    """Return batches of equally many images of a stream; only the last one of an epoch may have fewer.

    Args:
        sampler, size, prepare: see `StreamLoader`.
    """
    place = stream_placement(args, accelerator, rows)
    return StreamLoader(
        rows,
        sampler,
        collate,
        size,
        prepare=prepare,
        pool_samples=-(-args.shuffle_buffer // args.batch_size) * args.batch_size,
        micro_batch_tokens=args.micro_batch_size,
        num_readers=min(1, place["num_workers"]),
        **place,
    )


def stream_placement(
    args: StreamArguments, accelerator: Accelerator, rows: datasets.IterableDataset
) -> dict[str, Any]:
    """Return the arguments of a `StreamLoader` that do not depend on the kind of its rows.

    Warns if several processes have to read the same file.
    """
    files, several = min(args.stream_files, rows.num_shards), accelerator.num_processes > 1
    if accelerator.num_processes > files and accelerator.is_main_process:
        log.warning(
            "%d processes read %d files of the stream at a time, so several read the same one: give stream_files=%d, "
            "and at least as many files",
            *(accelerator.num_processes, files, accelerator.num_processes),
        )
    exchange = ProcessExchange(timedelta(seconds=args.ddp_timeout)) if several else None
    return {"seed": args.seed, "max_lanes": args.stream_files, "exchange": exchange, **placement(args, accelerator)}


def check_longest(args: TokenBatchArguments, max_length: int) -> None:
    """Refuse a stream whose samples may exceed a batch.

    Args:
        max_length: tokens of the longest sample.
    """
    budget = min(args.batch_tokens, args.micro_batch_tokens or args.batch_tokens)
    if max_length > budget:
        raise ValueError(f"max_length must be at most the {budget} tokens of a batch, got {max_length}")
