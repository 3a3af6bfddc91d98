"""The results file: what a run was, what it cost and what came out, as JSON that other programs can rely on.

<output_dir>/results.json     one `RunRecord`
<output_dir>/history.jsonl    one row a log line or evaluation
"""

import json
import os
import platform
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict, get_type_hints

import torch

from ..memory import machine_memory
from .cost import Cost
from .portable import portable, portable_command
from .saved_files import HISTORY, RESULTS
from .schema import check_keys, check_type

PACKAGES = (
    "hf-tfm",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "accelerate",
    "datasets",
    "tokenizers",
    "huggingface-hub",
    "sacrebleu",
    "faster-coco-eval",
)


class _Data(TypedDict):
    path: str


class Data(_Data, total=False):
    """What a run learned from and was scored on.

    ``path``, ``name`` and ``revision`` as `datasets.load_dataset` takes them; ``revision`` None where it is not known
    or does not exist. ``on_hub``: it is a data set of the Hub, not a folder or a generated one. ``fingerprint`` of the
    content, of all or by split. ``rows`` by split, None where not counted.
    """

    name: str | None
    revision: str | None
    on_hub: bool
    fingerprint: str | dict[str, str | None] | None
    license: str | None
    source_column: str | None
    target_column: str | None
    text_column: str | None
    image_column: str | None
    label_column: str | None
    objects_column: str | None
    panoptic_column: str | None
    rows: dict[str, int | None]


class _Metric(TypedDict):
    name: str
    value: float
    split: str


class Metric(_Metric, total=False):
    """One score; ``signature`` says how it was computed, as sacrebleu does."""

    signature: str | None


class _Training(TypedDict):
    steps: int
    epochs: float
    seconds: float


class Training(_Training, total=False):
    """The cost of a run.

    ``steps`` of the optimizer, ``epochs``, ``seconds`` of training without set-up and evaluation; ``items_per_second``
    counted in ``item``, say "target tokens"; ``skipped_steps`` for a gradient that was not finite; ``best``, the
    evaluation that decided; ``weights``, which ones were saved.
    """

    items_per_second: float | None
    item: str | None
    skipped_steps: int
    best: dict[str, Any] | None
    weights: str | None


class DistilledTerm(TypedDict):
    """A term of a distillation loss; ``pairs`` of the student's signals and the teacher's, "" for the true labels;
    ``projection``, the widths of the linear layer between them."""

    name: str
    weight: float
    temperature: float
    tokens: str
    pairs: list[list[str]]
    projection: list[int] | None


class Distillation(TypedDict):
    """What a student learned from: ``teacher``, folder or Hub id; ``student_layers`` of it that the student began
    with; ``cached`` signals, or those of a teacher in memory."""

    teacher: str
    student_layers: list[int] | dict[str, list[int]] | None
    cached: bool
    terms: list[DistilledTerm]


@dataclass(kw_only=True)
class RunRecord:
    """The record of a training run, as it stands in results.json.

    Args:
        task: what the model was trained for, say "translation".
        model_type: of the model's configuration.
        parameters: number of trained and fixed parameters, shared ones once.
        base_model: folder or Hub id that training started from; None from scratch.
        data: see `Data`.
        arguments: every knob of the run.
        command: the line that repeats it.
        metrics: see `Metric`.
        training: see `Training`.
        versions: of each package.
        hardware: see `describe_hardware`.
        started, finished: ISO 8601 dates with time zone.
        costs: what the model, and those it is compared with, cost to use, see `Cost`.
        distillation: see `Distillation`; None without a teacher.

    Raises:
        ValueError: a field has the wrong type, or a value that cannot be; the message names it.
    """

    task: str
    model_type: str
    parameters: int
    data: Data
    arguments: dict[str, Any]
    command: str
    metrics: list[Metric]
    training: Training
    versions: dict[str, str]
    hardware: dict[str, Any]
    started: str
    finished: str
    base_model: str | None = None
    costs: list[Cost] | None = None
    distillation: Distillation | None = None

    def __post_init__(self):
        for name, kind in get_type_hints(RunRecord).items():
            check_type(getattr(self, name), kind, name)
        counts = {"parameters": self.parameters, **{f"training.{k}": self.training[k] for k in ("steps", "epochs")}}
        counts["training.seconds"] = self.training["seconds"]
        counts |= {f"data.rows.{split}": n for split, n in self.data.get("rows", {}).items() if n is not None}
        for name, value in counts.items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        dates = [parse_date(getattr(self, name), name) for name in ("started", "finished")]
        if dates[1] < dates[0]:
            raise ValueError(f"finished must not be before started ({self.started}), got {self.finished}")

    def to_dict(self) -> dict[str, Any]:
        """The content of results.json: paths of this machine are shortened, see `portable`."""
        content = portable(asdict(self) | {"command": ""})
        return content | {"command": portable_command(self.command)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "RunRecord":
        """The record that `to_dict` wrote.

        Raises:
            ValueError: a field is missing, unknown or wrong.
        """
        known = {field.name for field in fields(cls)}
        check_keys(content, known - {"base_model", "costs", "distillation"}, known, "results")
        return cls(**content)

    def save(self, folder: str | Path) -> Path:
        """Write results.json in ``folder``; the old one stays until the new one is whole."""
        path = Path(folder) / RESULTS
        part = path.with_name(path.name + ".part")
        part.write_text(json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        part.replace(path)
        return path

    @classmethod
    def load(cls, folder: str | Path) -> "RunRecord":
        """Read results.json of ``folder``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not a valid record.
        """
        path = Path(folder) / RESULTS
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def parse_date(text: str, where: str) -> datetime:
    """An ISO 8601 date with time zone."""
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        date = None
    if date is None or date.tzinfo is None:
        raise ValueError(f'{where} must be an ISO 8601 date with time zone, got "{text}"')
    return date


def collect_versions() -> dict[str, str]:
    """Versions of Python and of the installed packages that a result depends on."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def describe_hardware(device: str | torch.device | None = None, count: int | None = None) -> dict[str, Any]:
    """The hardware this process runs on; what the system does not tell is None.

    Args:
        device: where the model is trained; default, CUDA where there is one.
        count: processes that train together, one a GPU; default, those of `torch.distributed`.

    Returns:
        ``device`` ("cpu", "cuda" ...), ``count``, ``cpu`` (name), ``cpu_cores`` this process may use, ``threads`` of
        torch, ``memory_gb`` of the machine in units of 10^9 bytes; on CUDA also ``gpu`` (name) and ``gpu_memory_gb``.
    """
    kind = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type
    if count is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        count = torch.distributed.get_world_size() if distributed else 1
    hardware = {
        "device": kind,
        "count": count,
        "cpu": cpu_name(),
        "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(machine_memory() / 1e9, 1),
    }
    if kind == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        hardware |= {"gpu": gpu.name, "gpu_memory_gb": round(gpu.total_memory / 1e9, 1)}
    return hardware


def cpu_name() -> str | None:
    """The processor's name, as Linux tells it, else the system's word for it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """The rows of history.jsonl in ``folder``, by step; none where there is no such file.

    A resumed run may have logged a step twice: the later row counts. The last line may be cut off by a kill: it is
    left out.

    Raises:
        ValueError: another line is not a row with a ``step``.
    """
    path = Path(folder) / HISTORY
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: dict[tuple[int, bool], dict[str, Any]] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            rows[row["step"], "evaluation" in row] = row
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number < len(lines):
                raise ValueError(f'{path} line {number} is not a row with a "step": {line[:100]}') from error
    return [rows[key] for key in sorted(rows)]
