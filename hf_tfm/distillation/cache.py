"""A teacher's signals written once, and read by runs that then need no teacher in memory.

    teacher, batches -> signals of each sample -> shards (see `shards`) -> signals of a batch, made in loader workers

A sample's place is ``epoch * rows + row``: its masks and changes follow from (seed, epoch, index) alone, so a run that
reads epoch e mod E of a cache of E epochs sees the very samples the teacher saw. A writer that was killed goes on with
the first shard that is missing.
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
from ..training.folder import explain_write_errors, write_text
from ..training.run_folder import others
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
    """Size of a cache: its samples, and bytes on disk."""

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
    """Write a teacher's signals of every row and epoch; go on where a killed writer of the same cache stopped.

    Args:
        task: gives batches, see `tasks.distill.Teaching`; of images as they are in training, not mixed.
        rows: of the training data.
        epochs: passes that a run makes before it sees the same chances again.
        signals: names, see `signals`; those of lessons are ``signals_of(lessons, "teacher")``.
        top_k: keep so many logits of a row; default, all.
        dtype: "fp32", "bf16" or "fp16".
        data: fingerprint of the rows.
        name: folder or Hub id of the teacher, by which a run is known to be another's without loading it.
        knobs: those of the run that decide what is read; JSON values.
        temperature: of the soft targets that are learned from the top_k logits.
        numbers: epoch -> numbers of its samples, where they carry more than the row, as a `ShapeSampler`'s.
        batch_size: samples the teacher reads at once.
        shard_samples: samples of a file.
        accelerator: its processes share the work; None where there is one.

    Raises:
        ValueError: the folder holds another cache, and the error says in what it differs; an option is out of range;
            or samples depend on their neighbours.
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
    """See `write_cache`."""
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
    """Make a folder this cache's own, or find that it is.

    Raises:
        ValueError: it holds another, or other files.
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
    """Whether a knob is known to have had another value when a cache was written."""
    return knob in held.knobs and held.knobs[knob] != now


def check_top_k(lessons: Sequence[Lesson], top_k: int | None, temperature: float, cache: str) -> None:
    """Refuse lessons for which the largest logits alone do not do; of a cache that is written or read.

    Args:
        temperature: that of the rest.
        cache: its name, for the error.

    Raises:
        ValueError: it names the lesson.
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
    """Signals of a cache, read by the processes that make batches; in the place of a `Teacher`.

    Args:
        folder: of `write_cache`.

    Raises:
        ValueError: it holds no cache, or one that is not whole or damaged.
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
        """Have shards opened as they are needed, and the last few stay open."""
        self.shard = lru_cache(OPEN_SHARDS)(lambda number: Shard(shard_path(self.folder, number)))

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "shard"}  # open files do not travel

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
        """Refuse a cache of something else, before anything is trained.

        Args:
            task, rows, data, knobs: of the run, see `write_cache`.
            teacher: hash of the teacher it should be of, see `Teacher`; None takes the cache's.
            name: folder or Hub id of that teacher, whose weights need not be there any more: then it is the name that
                has to be the same.

        Raises:
            ValueError: it names what differs: teacher, data, knobs or preprocessing.
        """
        held = self.index
        wanted = {"teacher": teacher or held.teacher, "data": data}
        # Inputs of other data say nothing of how they are made.
        wanted["preprocessing"] = inputs_hash(task, rows, held.epochs) if data == held.data else held.preprocessing
        changed = [(what, getattr(held, what), now) for what, now in wanted.items() if now != getattr(held, what)]
        if name is not None and held.name is not None:
            origin = origin_of(name)
            same = origin == held.origin if origin and held.origin else name == held.name
            changed = changed if same else [("teacher", held.name, name), *changed]
        changed += [(knob, held.knobs[knob], now) for knob, now in (knobs or {}).items() if differs(held, knob, now)]
        if changed:
            words = "; ".join(f"{what} {there} there, {now} now" for what, there, now in changed)
            raise ValueError(f"{self.folder} is the cache of another run: {words}")

    def require(self, lessons: Sequence[Lesson]) -> None:
        """Refuse lessons that need what is not in the cache.

        Raises:
            ValueError: it names the lesson.
        """
        for lesson in lessons:
            if missing := [theirs for _, theirs in lesson.pairs if theirs and theirs not in self.index.signals]:
                raise ValueError(f'term {lesson.name} needs the signal "{missing[0]}", which {self.folder} lacks')
        check_top_k(lessons, self.index.top_k, self.index.temperature, str(self.folder))

    def epoch(self, epoch: int) -> int:
        """The epoch whose samples the cache holds."""
        return epoch % self.index.epochs

    def attach(
        self, batch: dict[str, Any], names: Sequence[str], indices: list[int], epoch: int, places: Tensor | None
    ) -> dict[str, Any]:
        """``signals`` of a batch.

        Args:
            batch: as the task collated it.
            indices: numbers of its samples, some of which a batch of images may lack.
            places: of its rows of logits.

        Raises:
            ValueError: a sample is not in the cache, or is another there.
        """
        kept = {i % COPY for i in batch["indices"].tolist()} if "images" in batch else None
        stored = [TOP, PLACES, REST] if self.index.top_k is not None else [LOGITS]
        names = [own for name in names for own in (stored if name == LOGITS else [name])]
        samples = [self.sample(i, epoch, names) for i in indices if kept is None or i % COPY in kept]
        return {"signals": join(batch, samples, places)}

    def sample(self, number: int, epoch: int, names: Sequence[str]) -> Signals:
        """Signals of one sample."""
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
        """What `attach` put into the batch."""
        return attached["signals"]
