"""Cache of a teacher's signals: written once, then read by runs that do not need the teacher in memory.

    teacher, batches -> signals of each sample -> shards (see `shards`) -> signals of a batch, loaded in workers

The position of a sample is ``epoch * rows + row``. Its masks and augmentation depend only on (seed, epoch, index), so
a run that reads epoch e mod E from a cache of E epochs gets exactly the samples the teacher saw. An interrupted writer
resumes at the first missing shard.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..data.batching import Sample, sample_ref
from ..writing import explain_write_errors, others, write_text
from .chunks import Chunks, shard_tensors
from .model_spec import ModelSpec
from .resolve import ResolvedTerm, signals_of
from .samples import TrainingSamples, join, read_samples
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


@dataclass(frozen=True)
class CacheFormat:
    """Content and form of a cache.

    Args:
        signals: names, see `signals`; for resolved terms, pass ``signals_of(terms, "teacher")``.
        epochs: number of epochs with distinct masks and augmentation; training then cycles through them.
        top_k: number of largest logits stored per row; by default all are stored.
        dtype: "fp32", "bf16" or "fp16".
        temperature: temperature of the soft targets that will be trained on the top_k logits.
        shard_samples: samples per file.

    Raises:
        ValueError: a value is out of range.
    """

    signals: Sequence[str] = (LOGITS,)
    epochs: int = 1
    top_k: int | None = None
    dtype: str = "bf16"
    temperature: float = 1.0
    shard_samples: int = 1024

    def __post_init__(self):
        for name in ("epochs", "top_k", "shard_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not self.signals:
            raise ValueError("signals must name at least one")
        to_dtype(self.dtype)


@torch.no_grad()
def write_cache(
    teacher: Teacher,
    samples: TrainingSamples,
    folder: str | Path,
    form: CacheFormat = CacheFormat(),
    name: str | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
    accelerator: Accelerator | None = None,
    progress: bool = False,
) -> CacheReport:
    """Write a teacher's signals for every row and epoch; resume an interrupted write of the same cache.

    Args:
        name: folder or Hub id of the teacher; identifies the teacher without loading it.
        batch_size: samples per forward pass of the teacher.
        accelerator: its processes share the work; None for a single process.

    Raises:
        ValueError: the folder holds a different cache (the error lists the differences), an option is out of range, or
            samples depend on the other samples of their batch.
        WriteError: the folder cannot be written.
    """
    folder = Path(folder)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if LOGITS in form.signals and form.top_k is not None and form.top_k >= (teacher.spec.outputs or math.inf):
        raise ValueError(f"top_k must be below the {teacher.spec.outputs} classes, got {form.top_k}")
    if teacher.hash is None:
        raise ValueError("a teacher whose weights are not all in memory has no hash, which a cache needs")
    index = CacheIndex(
        teacher=teacher.hash,
        data=samples.data,
        preprocessing=samples.hash(form.epochs),
        rows=len(samples.rows),
        epochs=form.epochs,
        shard_samples=form.shard_samples,
        signals=sorted(form.signals),
        dtype=form.dtype,
        top_k=form.top_k,
        temperature=form.temperature,
        facts=teacher.spec.to_json(),
        name=name,
        origin=None if name is None else origin_of(name),
        options=dict(samples.options),
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
            chunks = Chunks(samples, index.places(shard), batch_size)
            save_shard(path, shard_tensors(teacher, chunks, index, num_workers))
    if accelerator:
        accelerator.wait_for_everyone()
    written = sum(path.stat().st_size for path in (folder / SHARDS).glob("*.safetensors"))
    return CacheReport(index.rows * index.epochs, written)


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


def differs(held: CacheIndex, option: str, now: Any) -> bool:
    """Return True if the cache was written with another value of an option; unrecorded options do not count."""
    return option in held.options and held.options[option] != now


def check_top_k(terms: Sequence[ResolvedTerm], top_k: int | None, temperature: float, cache: str) -> None:
    """Refuse terms that cannot be computed from the top_k logits of a cache, when writing or reading it.

    Args:
        temperature: temperature at which the remaining logits were summed.
        cache: name of the cache, for the error.

    Raises:
        ValueError: names the term.
    """
    for term in terms:
        if top_k is None or LOGITS not in signals_of([term], "teacher"):
            continue
        if term.kind.top is None:
            raise ValueError(f"term {term.name} needs all logits, {cache} has top_k={top_k}")
        if term.kind.temperature and term.term.temperature != temperature:
            raise ValueError(
                f"term {term.name} has temperature {term.term.temperature:g}, and the rest of the logits in "
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
            self.spec = ModelSpec.from_json(self.index.facts)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.folder / INDEX_FILE} is damaged: facts: {error}") from error
        missing = [i for i in range(self.index.shards) if not shard_path(self.folder, i).is_file()]
        if missing:
            raise ValueError(
                f"{folder} lacks {len(missing)} of {self.index.shards} shards: run the command that wrote it "
                "again to resume"
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

    def check(self, samples: TrainingSamples, teacher: str | None = None, name: str | None = None) -> None:
        """Refuse a cache that does not match the run, before training starts.

        Args:
            samples: those of the run.
            teacher: expected weights hash, see `Teacher`; None accepts the cache's own.
            name: folder or Hub id of the expected teacher. Its weights need not exist any more: the names are compared
                if an origin is unknown.

        Raises:
            ValueError: lists the differences in teacher, data, options or preprocessing.
        """
        held = self.index
        wanted = {"teacher": teacher or held.teacher, "data": samples.data}
        # The preprocessing hash is comparable only if the data is the same.
        wanted["preprocessing"] = samples.hash(held.epochs) if samples.data == held.data else held.preprocessing
        found = []
        changed = [(what, getattr(held, what), now) for what, now in wanted.items() if now != getattr(held, what)]
        if name is not None and held.name is not None:
            origin = origin_of(name)
            same = origin == held.origin if origin and held.origin else name == held.name
            if not same and name == held.name:
                found = [f"the weights of the teacher {name} have changed since the cache was written"]
            elif not same:
                changed = [("teacher", held.name, name), *changed]
        options = samples.options.items()
        changed += [(option, held.options[option], now) for option, now in options if differs(held, option, now)]
        found += [f"{what} {there} there, {now} now" for what, there, now in changed]
        if found:
            raise ValueError(f"{self.folder} is the cache of another run: {'; '.join(found)}")

    def require(self, terms: Sequence[ResolvedTerm]) -> None:
        """Refuse terms that need signals the cache does not contain.

        Raises:
            ValueError: names the term.
        """
        for term in terms:
            if missing := [theirs for _, theirs in term.pairs if theirs and theirs not in self.index.signals]:
                raise ValueError(f'term {term.name} needs the signal "{missing[0]}", which {self.folder} lacks')
        check_top_k(terms, self.index.top_k, self.index.temperature, str(self.folder))

    def epoch(self, epoch: int) -> int:
        """Map a training epoch to the cached epoch."""
        return epoch % self.index.epochs

    def attach(
        self, batch: dict[str, Any], names: Sequence[str], samples: list[Sample], epoch: int, positions: Tensor | None
    ) -> dict[str, Any]:
        """Load the ``signals`` of a batch.

        Args:
            batch: output of the task's collate function.
            samples: those to collate; unreadable images are missing from the batch.
            positions: positions of the rows of logits.

        Raises:
            ValueError: a sample is not in the cache, or the cache holds a different one in its position.
        """
        stored = [TOP, PLACES, REST] if self.index.top_k is not None else [LOGITS]
        names = [own for name in names for own in (stored if name == LOGITS else [name])]
        given = [self.sample(ref, epoch, names) for ref in read_samples(batch, samples)]
        return {"signals": join(batch, given, positions)}

    def sample(self, sample: Sample, epoch: int, names: Sequence[str]) -> Signals:
        """Load the signals of one sample."""
        ref = sample_ref(sample)
        row = ref.index
        if row >= self.index.rows:
            raise ValueError(f"sample {row} is not in {self.folder}, which has {self.index.rows} rows")
        shard, place = divmod(epoch * self.index.rows + row, self.index.shard_samples)
        opened: Shard = self.shard(shard)
        if opened.numbers[place] != ref.key:
            raise ValueError(
                f"sample {row} of epoch {epoch} has the number {ref.key}, and in {self.folder} it is "
                f"{opened.numbers[place]}: copies, and images on another canvas, are other samples"
            )
        return opened.sample(place, names)

    def signals(self, attached: dict[str, Any], *_: Any) -> Signals:
        """Return the signals that `attach` added to the batch."""
        return attached["signals"]
