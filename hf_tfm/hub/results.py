"""Results file: configuration, cost and scores of a run as JSON with a stable schema.

In the folder of a run, results.json holds one `RunRecord`, and history.jsonl one row per log line or evaluation.
"""

import json
import math
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
    """Data that a run was trained and evaluated on.

    ``path``, ``name`` and ``revision`` as in `datasets.load_dataset`; ``revision`` is None if unknown or not
    applicable. ``on_hub``: True for a data set on the Hub, as opposed to a folder or a generated one. ``fingerprint``
    of the content, for all of it or by split. ``rows`` by split, None if not counted.
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
    prompt_column: str | None
    completion_column: str | None
    chosen_column: str | None
    rejected_column: str | None
    rows: dict[str, int | None]


class _Metric(TypedDict):
    name: str
    value: float
    split: str


class Metric(_Metric, total=False):
    """A score; ``signature`` specifies how it was computed, as in sacrebleu."""

    signature: str | None


class _Training(TypedDict):
    steps: int
    epochs: float
    seconds: float


class Training(_Training, total=False):
    """Training statistics of a run.

    Optimizer ``steps``, ``epochs``, ``seconds`` of training without set-up and evaluation; ``items_per_second``
    counted in ``item``, for example "target tokens"; ``skipped_steps`` with a non-finite gradient; ``best``, the best
    evaluation; ``weights``, the saved weights.
    """

    items_per_second: float | None
    item: str | None
    skipped_steps: int
    best: dict[str, Any] | None
    weights: str | None


class DistilledTerm(TypedDict):
    """A term of a distillation loss; ``pairs`` of student and teacher signals, "" for the true labels; ``projection``,
    the input and output size of the linear layer between them."""

    name: str
    weight: float
    temperature: float
    tokens: str
    pairs: list[list[str]]
    projection: list[int] | None


class Distillation(TypedDict):
    """Distillation setup: ``teacher``, folder or Hub id; ``student_layers``, the teacher layers that the student was
    initialised from; ``cached``, True if signals came from a cache instead of a teacher in memory."""

    teacher: str
    student_layers: list[int] | dict[str, list[int]] | None
    cached: bool
    terms: list[DistilledTerm]


class Compression(TypedDict):
    """Compression of a model: ``source``, folder or Hub id of the original; ``methods`` in order, with options and
    results."""

    source: str
    methods: list[dict[str, Any]]


@dataclass(kw_only=True)
class RunRecord:
    """Record of a training run, stored in results.json.

    Args:
        task: pipeline tag of the task, for example "translation".
        model_type: model type of the configuration.
        parameters: number of parameters, frozen ones included and shared ones once.
        base_model: folder or Hub id that training started from; None from scratch.
        data: see `Data`.
        arguments: all arguments of the run.
        command: command that repeats the run.
        metrics: see `Metric`.
        training: see `Training`.
        versions: version of each package.
        hardware: see `describe_hardware`.
        started, finished: ISO 8601 dates with time zone.
        costs: inference costs of the model and the models it is compared with, see `Cost`.
        distillation: see `Distillation`; None without a teacher.
        compression: see `Compression`; None for a model that is not compressed.
        evaluations: scores during training, each with its ``step``, ``epoch`` and ``seconds`` of training time.

    Raises:
        ValueError: a field has the wrong type or an impossible value; the message names it.
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
    compression: Compression | None = None
    evaluations: list[dict[str, int | float]] | None = None

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
        """Return the content of results.json, with local paths shortened, see `portable`."""
        content = portable(asdict(self) | {"command": ""})
        return content | {"command": portable_command(self.command)}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "RunRecord":
        """Create a record from the output of `to_dict`.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        known = {field.name for field in fields(cls)}
        check_keys(
            content, known - {"base_model", "costs", "distillation", "compression", "evaluations"}, known, "results"
        )
        return cls(**content)

    def save(self, folder: str | Path) -> Path:
        """Write results.json to ``folder``, atomically."""
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
        return cls.from_file(Path(folder) / RESULTS)

    @classmethod
    def from_file(cls, path: Path) -> "RunRecord":
        """Read a results file, see `load`."""
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


def parse_date(text: str, where: str) -> datetime:
    """Parse an ISO 8601 date with time zone."""
    try:
        date = datetime.fromisoformat(text)
    except ValueError:
        date = None
    if date is None or date.tzinfo is None:
        raise ValueError(f'{where} must be an ISO 8601 date with time zone, got "{text}"')
    return date


def collect_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
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
    """Describe the hardware of this process; unknown values are None.

    Args:
        device: training device; by default CUDA if available.
        count: number of training processes, one per GPU; by default that of `torch.distributed`.

    Returns:
        ``device`` ("cpu", "cuda" ...), ``count``, ``cpu`` (name), ``cpu_cores`` available to this process, ``threads``
        of torch, ``memory_gb`` of the machine in units of 10^9 bytes; on CUDA also ``gpu`` (name) and
        ``gpu_memory_gb``.
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
    """Return the processor's name as reported by Linux, or else by the `platform` module."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or None


def evaluations_of(rows: list[dict[str, Any]]) -> list[dict[str, int | float]]:
    """Return the evaluations among the rows of `read_history`, as `RunRecord` holds them: finite numbers only."""
    found = [
        {**{name: row[name] for name in ("step", "epoch", "seconds") if name in row}, **row["evaluation"]}
        for row in rows
        if "evaluation" in row
    ]
    return [{name: value for name, value in row.items() if math.isfinite(value)} for row in found]


def read_evaluations(run: str | Path) -> list[dict[str, int | float]]:
    """Read the evaluations during training, see `RunRecord`, of a run that may still be running.

    Args:
        run: its folder, or its results file.

    Raises:
        ValueError: there are none, or a file is damaged.
    """
    path = Path(run)
    if path.is_file():
        found = RunRecord.from_file(path).evaluations
    elif rows := read_history(path):
        found = evaluations_of(rows)
    else:
        found = RunRecord.load(path).evaluations if (path / RESULTS).is_file() else None
    if not found:
        raise ValueError(f'runs must be folders or results files of runs with evaluations, got "{run}"')
    return found


def read_history(folder: str | Path) -> list[dict[str, Any]]:
    """Read the rows of history.jsonl in ``folder``, sorted by step; empty if there is no such file.

    If a resumed run logged a step twice, the later row counts. A truncated last line, left by a killed run, is
    ignored.

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
