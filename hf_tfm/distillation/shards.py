"""Files of a cache of a teacher's signals.

    <folder>/index.json                    teacher, data, preprocessing and format of the cache
    <folder>/teacher.json                  the teacher's cost and score, if measured
    <folder>/shards/00000.safetensors      concatenated signals of a range of samples, and their shapes

For every signal, a shard holds the values of all its samples in one flat tensor and their shapes in
``<signal>#shape``; `NUMBER` holds the sample numbers. A shard is written under a temporary name, synced to disk and
then renamed.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..hub.cost import Cost
from ..hub.schema import check_keys, check_type
from ..writing import explain_write_errors, sync, write_text
from .signals import Signals

INDEX_FILE, COST_FILE, SHARDS = "index.json", "teacher.json", "shards"
NUMBER = "number"  # sample number at collation; -1 for a missing sample
SHAPE = "#shape"


@dataclass(frozen=True)
class CacheIndex:
    """Content of index.json.

    Args:
        teacher: hash of the teacher's weights; data: fingerprint of the rows; preprocessing: hash of the model inputs.
        rows, epochs: number of rows, and of epochs with distinct masks and augmentation.
        shard_samples: samples per shard.
        signals: names of the requested signals.
        dtype: storage dtype; top_k: logits kept per row, None for all; temperature: at which the others are summed.
        facts: those of the teacher, see `ModelSpec`.
        name, origin: folder or Hub id of the teacher, and its `origin_of`; None for a model created in memory.
        options: options of the writing run that determine the model inputs.
        teacher_dtype: dtype of the teacher's computation.
    """

    teacher: str
    data: str
    preprocessing: str
    rows: int
    epochs: int
    shard_samples: int
    signals: list[str]
    dtype: str
    top_k: int | None
    temperature: float
    facts: dict[str, Any]
    name: str | None = None
    origin: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    teacher_dtype: str = "fp32"

    @property
    def shards(self) -> int:
        """Number of shards of a complete cache."""
        return math.ceil(self.rows * self.epochs / self.shard_samples)

    def places(self, shard: int) -> range:
        """Return the range of sample positions of a shard."""
        return range(shard * self.shard_samples, min((shard + 1) * self.shard_samples, self.rows * self.epochs))

    @classmethod
    def load(cls, folder: Path) -> "CacheIndex":
        """Load and validate the index of a cache.

        Raises:
            ValueError: there is none, or it is damaged.
        """
        file = folder / INDEX_FILE
        if not file.is_file():
            raise ValueError(f"{folder} holds no cache of a teacher's signals: it has no {INDEX_FILE}")
        try:
            content, kinds = json.loads(file.read_text(encoding="utf-8")), get_type_hints(cls)
            if isinstance(content, dict) and "knobs" in content:  # the name in earlier versions
                content["options"] = content.pop("knobs")
            optional = {"name", "origin", "options", "teacher_dtype"}
            check_keys(content, set(kinds) - optional, set(kinds), "the content")
            for name, value in content.items():
                check_type(value, kinds[name], name)
            for name in ("rows", "epochs", "shard_samples"):
                if content[name] < 1:
                    raise ValueError(f"{name} must be at least 1, got {content[name]}")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder} holds no cache of a teacher's signals that can be read: {file} is damaged ({error}). "
                "Delete the folder and write the cache again"
            ) from error
        return cls(**content)


def shard_path(folder: Path, shard: int) -> Path:
    """Return the path of a shard."""
    return folder / SHARDS / f"{shard:05d}.safetensors"


def differences(held: CacheIndex, wanted: CacheIndex) -> list[str]:
    """List the differences between two caches, for an error message."""
    ours, theirs = json.loads(json.dumps(asdict(held))), json.loads(json.dumps(asdict(wanted)))
    same = ("name", "origin")  # not compared: the weights hash identifies the teacher
    changed = [name for name in ours if name not in same and ours[name] != theirs[name]]
    return [f"{name}: {ours[name]} there, {theirs[name]} now" for name in changed]


def save_cost(folder: Path, cost: Cost, of: str) -> None:
    """Save the teacher's cost, a row of `hub.cost`, and the identifier of what its score was measured on."""
    write_text(folder / COST_FILE, json.dumps({"of": of, "cost": cost}, indent=2) + "\n")


def load_cost(folder: Path, of: str) -> Cost | None:
    """Load the row of `save_cost`, without its score if that was measured on something else; None if there is none.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / COST_FILE
    if not file.is_file():
        return None
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        check_keys(held, {"of", "cost"}, {"of", "cost"}, "the content")
        check_type(held["cost"], Cost, "cost")
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} is damaged ({error}): write the cache again, or delete the file to continue "
            "without the teacher's costs"
        ) from error
    return cast(Cost, {name: value for name, value in held["cost"].items() if name != "score" or held["of"] == of})


def pack(samples: Sequence[tuple[int, Signals] | None]) -> dict[str, Tensor]:
    """Concatenate samples into the tensors of a shard.

    Args:
        samples: number and signals of each sample, all with the same signal names; None for a missing sample. At least
            one must be present.
    """
    first = next(sample[1] for sample in samples if sample is not None)
    tensors = {NUMBER: torch.tensor([-1 if sample is None else sample[0] for sample in samples])}
    for name, like in first.items():
        own = [like[:0] if sample is None else sample[1][name] for sample in samples]
        tensors[name] = torch.cat([value.flatten() for value in own])
        tensors[name + SHAPE] = torch.tensor([value.shape for value in own], dtype=torch.int32)
    return tensors


def save_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a shard atomically."""
    part = path.with_name(f".part-{path.name}")
    with explain_write_errors(path):
        save_file(tensors, part)
        sync(part)
        part.replace(path)
        sync(path.parent)


def check_shard(path: Path) -> None:
    """Refuse a damaged shard, judging by its header and length.

    Raises:
        ValueError: it is damaged.
    """
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
    except (OSError, SafetensorError) as error:
        names, reason = set(), str(error)
    else:
        reason = "it has no signals"
    if NUMBER not in names or not any(name.endswith(SHAPE) for name in names):
        raise ValueError(f"{path} is damaged ({reason}): delete it and run the command that wrote the cache again")


class Shard:
    """A shard opened for reading; its values stay memory-mapped on disk."""

    def __init__(self, path: Path):
        self.path = path
        self.file = safe_open(path, framework="pt")
        self.numbers: list[int] = self.file.get_tensor(NUMBER).tolist()
        self.shapes: dict[str, list[list[int]]] = {}
        self.ends: dict[str, list[int]] = {}
        for name in [key.removesuffix(SHAPE) for key in self.file.keys() if key.endswith(SHAPE)]:  # noqa: SIM118
            shapes = self.file.get_tensor(name + SHAPE)
            self.shapes[name] = shapes.tolist()
            self.ends[name] = shapes.long().prod(dim=1).cumsum(0).tolist()

    def sample(self, place: int, names: Sequence[str]) -> Signals:
        """Load the signals of the sample at a position of the shard."""
        found = {}
        for name in names:
            end, shape = self.ends[name][place], self.shapes[name][place]
            start = end - math.prod(shape)
            found[name] = self.file.get_slice(name)[start:end].reshape(shape)
            if found[name].is_floating_point() and found[name].isnan().any():
                raise ValueError(
                    f'{self.path} holds NaN in the signal "{name}" of sample {self.numbers[place]}: delete it '
                    "and run the command that wrote the cache again; if NaN occurs again, the teacher's output is NaN"
                )
        return found
