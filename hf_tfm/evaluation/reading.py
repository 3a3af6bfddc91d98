"""What evaluations of image models read: the model with its processor, the images, and how fast both go."""

from collections.abc import Iterator
from typing import Any

import datasets
from tqdm import tqdm
from transformers import PreTrainedModel

from ..data.batching import StepLoader
from ..data.equal_batches import BatchSampler
from ..data.files import data_roots
from ..data.images import WatchedLoader, image_rows, require_readable
from ..data.pixels import suitable
from ..data.source import first as first
from ..data.source import load_splits, take_split
from ..hub.loading import load_with_processor
from ..tasks.evaluation import one_process as one_process
from ..tasks.images import ImageTask
from ..tasks.stopwatch import Stopwatch as Stopwatch


def load_image_model(
    auto_class: Any, model: str, revision: str | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, Any]:
    """Model, in float32, and image processor of a folder or a Hub id; the processor as `ImageTask` takes one.

    Raises:
        ValueError: see `load_with_processor`; or images have no fixed size.
    """
    loaded, processor = load_with_processor(auto_class, model, revision, trust_remote_code)
    return loaded, suitable(processor)


def read_split(
    dataset_name: str,
    split: str,
    dataset_config: str | None,
    dataset_revision: str | None,
    data_files: dict[str, str | list[str]] | None,
    image_column: str | None,
    label_column: str | None = None,
    labelled: bool = True,
) -> datasets.Dataset:
    """A split as `image_rows`."""
    splits = load_splits(dataset_name, dataset_config, dataset_revision, data_files)
    roots = data_roots(dataset_name, data_files)
    rows = image_rows(take_split(splits, split, "split"), image_column, label_column, labelled, roots)
    require_readable(rows, len(rows), split)
    return rows


class EvaluationLoader(WatchedLoader):
    """All images once, with a progress bar; in order, unless a sampler has another.

    Args:
        task: its ``collate`` makes the batches.
        max_bad_images: see `WatchedLoader`.
        sampler: another order; then ``batch_size`` is the sampler's.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        task: ImageTask,
        batch_size: int,
        num_workers: int,
        max_bad_images: int,
        pin_memory: bool,
        progress: bool,
        sampler: BatchSampler | None = None,
    ):
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        sampler = sampler or BatchSampler(len(rows), batch_size, shuffle=False)
        loader = StepLoader(rows, sampler, task.collate, num_workers=num_workers, pin_memory=pin_memory)
        super().__init__(loader, max_bad_images)
        self.progress = progress

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[dict[str, Any]]]:
        """See `StepLoader`."""
        steps = super().epoch(epoch, start)
        yield from tqdm(steps, total=self.steps_per_epoch(), unit="batch", disable=not self.progress)
