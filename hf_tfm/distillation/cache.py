"""Cache of a teacher's signals: written once, then read by runs that do not need the teacher in memory.

    teacher, batches -> signals of each sample -> shards (see `shards`) -> signals of a batch, loaded in workers

The position of a sample is ``epoch * rows + row``. Its masks and augmentation depend only on (seed, epoch, index), so
a run that reads epoch e mod E from a cache of E epochs gets exactly the samples the teacher saw. An interrupted writer
resumes at the first missing shard.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..data.batching import COPY
from ..writing import explain_write_errors, others, write_text
from .chunks import Chunks, shard_tensors
from .facts import Facts
from .plan import Lesson, signals_of
from .samples import inputs_hash, join
from .shards import INDEX_FILE, SHARDS, CacheIndex, Shard, check_shard, differences, save_shard, shard_path
from .signals import LOGITS, PLACES, REST, TOP, Signals
from .teacher import Teacher, origin_of, to_dtype

OPEN_SHARDS = 64


@dataclass(frozen=True)
class CacheReport:
    """Size of a cache: number of samples, and bytes on disk."""

    samples: int
    bytes: int

    @property
    def bytes_per_sample(self) -> float:
        return self.bytes / self.samples


@torch.no_grad()
def write_cache(
    teacher: Teacher,
    task: Any,
    rows: Sequence[Any],
    folder: str | Path,
    epochs: int = 1,
    signals: Sequence[str] = (LOGITS,),
    top_k: int | None = None,
    dtype: str = "bf16",
    *,
    data: str,
    name: str | None = None,
    knobs: Mapping[str, Any] | None = None,
    temperature: float = 1.0,
    numbers: Callable[[int], Sequence[int]] | None = None,
    batch_size: int = 64,
    shard_samples: int = 1024,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> CacheReport:
    """Write a teacher's signals for every row and epoch; resume an interrupted write of the same cache.

    Args:
        task: creates batches, see `tasks.distill.Teaching`; images are augmented as in training but not mixed.
        rows: training data.
        epochs: number of epochs with distinct masks and augmentation; training then cycles through them.
        signals: names, see `signals`; for lessons, pass ``signals_of(lessons, "teacher")``.
        top_k: number of largest logits stored per row; by default all are stored.
        dtype: "fp32", "bf16" or "fp16".
        data: fingerprint of the rows.
        name: folder or Hub id of the teacher; identifies the teacher without loading it.
        knobs: options of the run that determine the model inputs; JSON values.
        temperature: temperature of the soft targets that will be trained on the top_k logits.
        numbers: epoch -> sample numbers, if these encode more than the row, as those of a `ShapeSampler` do.
        batch_size: samples per forward pass of the teacher.
        shard_samples: samples per file.
        accelerator: its processes share the work; None for a single process.

    Raises:
        ValueError: the folder holds a different cache (the error lists the differences), an option is out of range, or
            samples depend on the other samples of their batch.
        WriteError: the folder cannot be written.
    """
    folder = Path(folder)
    sizes = {"epochs": epochs, "top_k": top_k, "batch_size": batch_size, "shard_samples": shard_samples}
    check_cacheable(teacher, task, signals, dtype, sizes)
    index = CacheIndex(
        teacher=teacher.hash,
        data=data,
        preprocessing=inputs_hash(task, rows, epochs),
        rows=len(rows),
        epochs=epochs,
        shard_samples=shard_samples,
        signals=sorted(signals),
        dtype=dtype,
        top_k=top_k,
        temperature=temperature,
        facts=teacher.facts.to_json(),
        name=name,
        origin=None if name is None else origin_of(name),
        knobs=dict(knobs or {}),
        teacher_dtype=teacher.dtype,
    )
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    if rank == 0:
        begin(folder, index)
    if accelerator:
        accelerator.wait_for_everyone()
        begin(folder, index)
    for shard in tqdm(range(rank, index.shards, world_size), "cache", disable=not progress):
        path = shard_path(folder, shard)
        if not path.is_file():
            chunks = Chunks(task, rows, index.places(shard), numbers, batch_size)
            save_shard(path, shard_tensors(teacher, task, chunks, index, num_workers))
    if accelerator:
        accelerator.wait_for_everyone()
    written = sum(path.stat().st_size for path in (folder / SHARDS).glob("*.safetensors"))
    return CacheReport(index.rows * index.epochs, written)


def check_cacheable(
    teacher: Teacher, task: Any, signals: Sequence[str], dtype: str, sizes: dict[str, int | None]
) -> None:
    """Validate the arguments of `write_cache`."""
    if getattr(task, "mixing", None) is not None:
        raise ValueError("images that are mixed with their neighbours cannot be cached: turn mixing off")
    for name, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if LOGITS in signals and sizes["top_k"] is not None and sizes["top_k"] >= (teacher.facts.outputs or math.inf):
        raise ValueError(f"top_k must be below the {teacher.facts.outputs} classes, got {sizes['top_k']}")
    if teacher.hash is None:
        raise ValueError("a teacher whose weights are not all in memory has no hash, which a cache needs")
    if not signals:
        raise ValueError("signals must name at least one")
    to_dtype(dtype)


def begin(folder: Path, index: CacheIndex) -> None:
    """Create the cache folder, or check that an existing one holds this cache.

    Raises:
        ValueError: the folder holds a different cache, or other files.
    """
    if (folder / INDEX_FILE).is_file():
        if changed := differences(CacheIndex.load(folder), index):
            raise ValueError(f"{folder} holds another cache ({'; '.join(changed)}): choose another folder")
        return
    if folder.is_dir() and (found := others(folder)):
        raise ValueError(
            f"cache {folder} is not empty and holds no cache of a teacher's signals ({', '.join(found[:3])}): choose "
            "another folder"
        )
    with explain_write_errors(folder):
        (folder / SHARDS).mkdir(parents=True, exist_ok=True)
    write_text(folder / INDEX_FILE, json.dumps(asdict(index), indent=2) + "\n")


def differs(held: CacheIndex, knob: str, now: Any) -> bool:
    """Return True if the cache was written with another value of an option; unrecorded options do not count."""
    return knob in held.knobs and held.knobs[knob] != now


def check_top_k(lessons: Sequence[Lesson], top_k: int | None, temperature: float, cache: str) -> None:
    """Refuse lessons that cannot be computed from the top_k logits of a cache, when writing or reading it.

    Args:
        temperature: temperature at which the remaining logits were summed.
        cache: name of the cache, for the error.

    Raises:
        ValueError: names the lesson.
    """
    for lesson in lessons:
        if top_k is None or LOGITS not in signals_of([lesson], "teacher"):
            continue
        if lesson.kind.top is None:
            raise ValueError(f"term {lesson.name} needs all logits, {cache} has top_k={top_k}")
        if lesson.kind.temperature and lesson.term.temperature != temperature:
            raise ValueError(
                f"term {lesson.name} has temperature {lesson.term.temperature:g}, and the rest of the logits in "
                f"{cache} is of {temperature:g}"
            )


class CachedTeacher:
    """Drop-in replacement for `Teacher` that reads signals from a cache in the data loader workers.

    Args:
        folder: folder written by `write_cache`.

    Raises:
        ValueError: the folder holds no cache, or an incomplete or damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.index = CacheIndex.load(self.folder)
        try:
            self.facts = Facts.from_json(self.index.facts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder / INDEX_FILE} is damaged: facts: {error}") from error
        missing = [i for i in range(self.index.shards) if not shard_path(self.folder, i).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {self.index.shards} shards: the command that wrote it goes on"
            )
        for number in range(self.index.shards):
            check_shard(shard_path(self.folder, number))
        self.open_shards()

    def open_shards(self) -> None:
        """Open shards lazily and keep the most recently used ones open."""
        self.shard = lru_cache(OPEN_SHARDS)(lambda number: Shard(shard_path(self.folder, number)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shard"}  # open files cannot be pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.open_shards()

    def check(
        self,
        task: Any,
        rows: Sequence[Any],
        data: str,
        teacher: str | None = None,
        *,
        name: str | None = None,
        knobs: Mapping[str, Any] | None = None,
    ) -> None:
        """Refuse a cache that does not match the run, before training starts.

        Args:
            task, rows, data, knobs: those of the run, see `write_cache`.
            teacher: expected weights hash, see `Teacher`; None accepts the cache's own.
            name: folder or Hub id of the expected teacher. Its weights need not exist any more: the names are compared
                if an origin is unknown.

        Raises:
            ValueError: lists the differences in teacher, data, options or preprocessing.
        """
        held = self.index
        wanted = {"teacher": teacher or held.teacher, "data": data}
        # The preprocessing hash is comparable only if the data is the same.
        wanted["preprocessing"] = inputs_hash(task, rows, held.epochs) if data == held.data else held.preprocessing
        words = []
        changed = [(what, getattr(held, what), now) for what, now in wanted.items() if now != getattr(held, what)]
        if name is not None and held.name is not None:
            origin = origin_of(name)
            same = origin == held.origin if origin and held.origin else name == held.name
            if not same and name == held.name:
                words = [f"the weights of the teacher {name} are others now than those that the cache is of"]
            elif not same:
                changed = [("teacher", held.name, name), *changed]
        changed += [(knob, held.knobs[knob], now) for knob, now in (knobs or {}).items() if differs(held, knob, now)]
        words += [f"{what} {there} there, {now} now" for what, there, now in changed]
        if words:
            raise ValueError(f"{self.folder} is the cache of another run: {'; '.join(words)}")

    def require(self, lessons: Sequence[Lesson]) -> None:
        """Refuse lessons that need signals the cache does not contain.

        Raises:
            ValueError: names the lesson.
        """
        for lesson in lessons:
            if missing := [theirs for _, theirs in lesson.pairs if theirs and theirs not in self.index.signals]:
                raise ValueError(f'term {lesson.name} needs the signal "{missing[0]}", which {self.folder} lacks')
        check_top_k(lessons, self.index.top_k, self.index.temperature, str(self.folder))

    def epoch(self, epoch: int) -> int:
        """Map a training epoch to the cached epoch."""
        return epoch % self.index.epochs

    def attach(
        self, batch: dict[str, Any], names: Sequence[str], indices: list[int], epoch: int, places: Tensor | None
    ) -> dict[str, Any]:
        """Load the ``signals`` of a batch.

        Args:
            batch: output of the task's collate function.
            indices: sample numbers; unreadable images are missing from the batch.
            places: positions of the rows of logits.

        Raises:
            ValueError: a sample is not in the cache, or the cache holds a different one in its position.
        """
        kept = {i % COPY for i in batch["indices"].tolist()} if "images" in batch else None
        stored = [TOP, PLACES, REST] if self.index.top_k is not None else [LOGITS]
        names = [own for name in names for own in (stored if name == LOGITS else [name])]
        samples = [self.sample(i, epoch, names) for i in indices if kept is None or i % COPY in kept]
        return {"signals": join(batch, samples, places)}

    def sample(self, number: int, epoch: int, names: Sequence[str]) -> Signals:
        """Load the signals of one sample."""
        row = number % COPY
        if row >= self.index.rows:
            raise ValueError(f"sample {row} is not in {self.folder}, which has {self.index.rows} rows")
        shard, place = divmod(epoch * self.index.rows + row, self.index.shard_samples)
        opened: Shard = self.shard(shard)
        if opened.numbers[place] != number:
            raise ValueError(
                f"sample {row} of epoch {epoch} has the number {number}, and in {self.folder} it is "
                f"{opened.numbers[place]}: copies, and images on another canvas, are other samples"
            )
        return opened.sample(place, names)

    def signals(self, attached: dict[str, Any], *_: Any) -> Signals:
        """Return the signals that `attach` added to the batch."""
        return attached["signals"]
