"""Commands hf-tfm compress and hf-tfm show compression: compress a saved model, and measure compressed models.

saved model -> methods -> saved, loaded again -> score, size, time and operations beside the original -> card

A compressed model is a model of the same class, whose configuration describes it; ONNX Runtime has its own files.
"""

import copy
import inspect
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import send_to_device
from huggingface_hub import ModelCardData
from torch import Tensor, nn
from transformers import PreTrainedModel

from .arguments import Arguments
from .compression.methods import EXPORTS, Calibration, Method, apply_methods, describe, read_methods
from .compression.onnx import MANIFEST, OnnxModel, export_onnx, require_packages
from .conversion import local_folder
from .conversion.carry import copy_files
from .finite import check_finite
from .hub.card import COST_COLUMNS, cost_rows, table, write_card
from .hub.cost import Cost, Size, beside_teacher, count_flops, measure_costs
from .hub.loading import load_config, load_model, read_json, require_model
from .hub.portable import code, plain, portable
from .hub.results import Compression, Metric, RunRecord, collect_versions, describe_hardware
from .hub.saved_files import (
    CARD,
    COMPRESSION,
    COMPRESSION_TEXT,
    HISTORY,
    PARETO,
    PROCESSOR_FILES,
    RESULTS,
    TOKENIZER_FILES,
)
from .hub.usage import loading_class
from .tasks.base import Task
from .tasks.distillation import LOWER_IS_BETTER
from .tasks.evaluation import config_of, one_process, options_of, task_of
from .tasks.registry import evaluated_tasks
from .values import check_bounds, checked
from .writing import check_new_folder, place_folder, write_text

WEIGHT_FILES = ("*.safetensors", "*.bin", "*.onnx", "*.onnx.data")
# Options of an evaluation that a command here does not have, because it writes a report of its own.
LEFT_OUT = {"model", "output", "confusion", "tasks"}


@dataclass(kw_only=True)
class CompressArguments(Arguments):
    """Compressing a saved model.

    Args:
        method: layers, heads, neurons, low_rank, magnitude, int8, onnx, onnx_dynamic or onnx_static; or a mapping with
            the name and options, such as {name: heads, ratio: 0.5}; or a list of these, applied in this order.
        output_dir: folder to create.
        dataset_name: data that original and result are scored on; heads, neurons and onnx_static also need its
            training data. Default, neither: the result is not measured.
        calibration_split: split that importances and the ranges of activations are measured on.
        calibration_samples: number of its rows, drawn at random.
        seed: seed of that choice.
    """

    method: Any
    output_dir: str
    dataset_name: str | None = None
    calibration_split: str = "train"
    calibration_samples: int = 512
    seed: int = 0

    def __post_init__(self):
        self.methods: tuple[Method, ...] = read_methods(self.method)
        super().__post_init__()
        check_bounds("calibration_samples", self.calibration_samples, 1, 2**24)
        if not self.methods:
            raise ValueError("method must not be empty")
        for method in self.methods:
            if method.needs_data and self.dataset_name is None:
                raise ValueError(f'method "{method.name}" is measured on data: give dataset_name')


@dataclass(kw_only=True)
class ReportArguments(Arguments):
    """Measuring compressed models.

    Args:
        output_dir: folder for compression.json, compression.md and pareto.png; default, the last model's.
    """

    output_dir: str | None = None


@cache
def arguments_of(group: type[Arguments], task_class: type[Task]) -> type[Any]:
    """Return the arguments of a command for the models of a task: its own, and those of the task's evaluation."""
    return make_dataclass(
        f"{task_class.__name__}{group.__name__}",
        [],
        bases=(group, task_class.EvaluationArguments),
        kw_only=True,
        namespace={"__doc__": group.__doc__.splitlines()[0]},
    )


def kinds_of(group: type[Arguments]) -> dict[str, type[Any]]:
    """Return `arguments_of` all tasks by the kind of their models, for the help of a command."""
    return {one.kind: arguments_of(group, one) for one in evaluated_tasks()}


def arguments(group: type[Arguments], model: str, options: dict[str, Any]) -> tuple[type[Task], Any]:
    """Return the task that evaluates a model, and the arguments of a command.

    Raises:
        ValueError: no task evaluates this model, or an option is not valid for it.
    """
    require_model("model", model, options.get("revision"))
    task_class = task_of(config_of(model, options), model)
    kind = arguments_of(group, task_class)
    known = inspect.signature(kind).parameters.keys() - LEFT_OUT
    for option in options:
        if option not in known:
            raise ValueError(f'{option} is not an option for "{model}", one of the {task_class.kind}')
    return task_class, kind(model=model, **options)


def evaluation_task(task_class: type[Task], args: Any, split: str) -> Task:
    """Return a task with its model loaded, and the rows of a split."""
    own = {name: getattr(args, name) for name in options_of(task_class)}
    task = task_class(task_class.EvaluationArguments(**{**own, "split": split, "output": None}), one_process())
    task.splits = task.load_splits()
    task.load_pretrained()
    return task


def calibration_of(task_class: type[Task], args: CompressArguments) -> Calibration:
    """Return random rows of the calibration split, in batches."""
    task = evaluation_task(task_class, replace_samples(args), args.calibration_split)
    rows = task.splits[args.calibration_split]
    generator = torch.Generator().manual_seed(args.seed)
    chosen = torch.randperm(len(rows), generator=generator)[: args.calibration_samples].sort().values
    task.splits[args.calibration_split] = rows.select(chosen.tolist())
    return Calibration(task.losses, TaskBatches(task, args.calibration_split))


def replace_samples(args: Any) -> Any:
    """Return a copy of the arguments without max_samples, which is for the scored split."""
    found = copy.copy(args)
    found.max_samples = None
    return found


@dataclass
class TaskBatches:
    """Batches of a split, on the task's device."""

    task: Task
    split: str

    def __iter__(self) -> Iterator[Any]:
        for micro_batches in self.task.evaluation_loader(self.split).epoch(0):
            for batch in micro_batches:
                yield send_to_device(batch, self.task.accelerator.device)

    def inputs(self) -> list[dict[str, Any]]:
        """Return the model's inputs of each batch, on the CPU."""
        return [send_to_device(self.task.inputs(batch), "cpu") for batch in self]


def compress(model: str, **options: Any) -> dict[str, Any]:
    """Compress a saved model: remove layers, heads or neurons, factorise or quantise its weights, or export it.

    Args:
        model: folder or Hub id.
        options: fields of `CompressArguments` and of the task's ``EvaluationArguments``.

    Returns:
        See `Report.to_dict`; also ``output_dir`` and ``lines`` for the terminal.

    Raises:
        ValueError: an option is invalid, or the model does not allow a method.
        FileExistsError: ``output_dir`` is not an empty folder.
    """
    task_class, args = arguments(CompressArguments, model, options)
    output_dir = Path(args.output_dir)
    nearest = check_new_folder(output_dir, ".compressing-")
    exported = args.methods[-1] if isinstance(args.methods[-1], EXPORTS) else None
    if exported is not None:
        require_packages()
    source = local_folder(model, args.revision)
    task = None if args.dataset_name is None else evaluation_task(task_class, args, args.split)
    loaded = task.model if task is not None else load_any(model, args)
    check_finite(loaded, f'model "{model}"')
    original = copy.deepcopy(loaded) if task is not None else None
    data = calibration_of(task_class, args) if any(one.needs_data for one in args.methods) else None
    done = apply_methods(loaded, [one for one in args.methods if one is not exported], data)
    with tempfile.TemporaryDirectory(dir=nearest, prefix=".compressing-") as temporary:
        work = Path(temporary) / "model"
        work.mkdir()
        if exported is None:
            loaded.save_pretrained(work)
        else:
            inputs = data.batches.inputs() if data is not None and exported.needs_data else []
            export_onnx(loaded.cpu(), exported, work, inputs)
            done.append({"name": exported.name, **asdict(exported)})
        copy_files(source, work, (*TOKENIZER_FILES, *PROCESSOR_FILES))
        report = Report({"source": str(portable(model)), "methods": done}, args.dataset_name, None)
        result = load_result(work, loaded)
        if task is not None:
            report.split = args.split
            report.measure(task, {"original": (original, source), describe(done): (result, work)})
        report.write(work)
        write_model_card(source, work, report, output_dir.name)
        place_folder(work, output_dir)
    lines = [f"{output_dir}: {report.summary()}", *report.lines()]
    return {**report.to_dict(), "output_dir": str(output_dir), "lines": lines}


def load_any(model: str, args: Any) -> PreTrainedModel:
    """Load a model as the class that it was saved as."""
    config = load_config(model, revision=args.revision, trust_remote_code=args.trust_remote_code)
    auto_class = getattr(transformers, loading_class(config.to_dict()))
    return load_model(auto_class, model, revision=args.revision, trust_remote_code=args.trust_remote_code)


def load_result(folder: Path, like: PreTrainedModel) -> nn.Module:
    """Load a compressed model of the class of ``like``, or an exported one."""
    return OnnxModel(folder) if (folder / MANIFEST).is_file() else load_model(type(like), str(folder))


@dataclass
class Report:
    """What was done to a model; scores and costs of models.

    Args:
        compression: see `hub.results.Compression`.
        dataset, split: data of the scores, None if nothing was measured.
        rows: cost table, the original first.
        metrics: scores of the last model.
    """

    compression: Compression
    dataset: str | None
    split: str | None
    rows: list[Cost] = field(default_factory=list)
    metrics: list[Metric] = field(default_factory=list)

    def measure(self, task: Task, models: dict[str, tuple[nn.Module, Path]]) -> None:
        """Score models and measure their costs, in turn.

        Args:
            models: {name: (model, folder)}, the original first.
        """
        metric, scores, sizes = task.main_metric, {}, {}
        accepted = {"input_ids", "pixel_values"}
        sample = {key: value for key, value in task.sample_inputs().items() if key in accepted}
        for name, (model, folder) in models.items():
            found = task.evaluate(model, task.validation_split)
            scores[name] = found.values[metric]
            if isinstance(model, OnnxModel):
                sizes[name] = exported_size(model, folder, sample)
        self.metrics = found.rows(task.validation_split, task.reported_metrics)
        costs = measure_costs({name: model for name, (model, _) in models.items()}, sample, sizes)
        for cost in costs:
            folder = models[cost["model"]][1]
            cost["megabytes"] = megabytes(folder) or cost["megabytes"]
            cost["score"] = scores[cost["model"]]
            cost["metric"] = f"{metric.replace('_', ' ')}, {task.validation_split}"
        higher = not any(part in metric for part in LOWER_IS_BETTER)
        self.rows = beside_teacher(*costs) if higher else costs

    def to_dict(self) -> dict[str, Any]:
        """Return the content of compression.json."""
        return {
            **self.compression,
            "dataset": None if self.dataset is None else portable(self.dataset),
            "split": self.split,
            "rows": self.rows,
            "versions": collect_versions(),
            "hardware": describe_hardware("cpu"),
        }

    def markdown(self) -> str:
        """Return the report as Markdown."""
        done = [
            (plain(one["name"]), plain(", ".join(f"{k} {v}" for k, v in one.items() if k != "name")) or "none")
            for one in self.compression["methods"]
        ]
        parts = [f"Original: {code(self.compression['source'])}.", table(done, ("method", "options and result"))]
        if self.rows:
            parts += [
                table(cost_rows(self.rows), COST_COLUMNS),
                f"Score: {plain(self.rows[0]['metric'])}. Sample: {plain(self.rows[0]['sample'])}. Times are medians "
                f"of forward passes of all models in turn, on a CPU with {self.rows[0]['threads']} threads.",
                f"![Score against size and time]({PARETO})",
            ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def write(self, folder: Path) -> None:
        """Write compression.json, compression.md and the picture of the Pareto front."""
        write_text(folder / COMPRESSION, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        write_text(folder / COMPRESSION_TEXT, f"# Compression\n\n{self.markdown()}")
        if self.rows:
            from .viz.pareto import plot_pareto  # matplotlib takes long to import

            plot_pareto(self.rows, folder / PARETO)

    def summary(self) -> str:
        """Return in one line what was done."""
        return "; ".join(
            f"{one['name']} " + ", ".join(f"{k} {v}" for k, v in one.items() if k != "name")
            for one in self.compression["methods"]
        )

    def lines(self) -> list[str]:
        """Return the cost table for the terminal."""
        if not self.rows:
            return []
        fields = ("megabytes", "milliseconds_1", "milliseconds_32", "gflops")
        width = max(len(row["model"]) for row in self.rows)
        titles = "".join(f"{title:>10}" for title in ("score", "kept, %", "MB", "ms, 1", "ms, 32", "GFLOPs"))
        found = [f"{'model':<{width}}{titles}"]
        for row in self.rows:
            costs: dict[str, Any] = {**row}
            values = [row["score"], 100 * row.get("kept", 1.0), *(costs[name] for name in fields)]
            found.append(f"{row['model']:<{width}}" + "".join(f"{value:>10.4g}" for value in values))
        return found


def exported_size(model: OnnxModel, folder: Path, sample: dict[str, Tensor]) -> Size:
    """Return the size of an exported model; parameters and operations are those of the model of torch."""
    auto_class = getattr(transformers, loading_class(read_json(folder / "config.json")))
    like = auto_class.from_config(model.config).eval()
    parameters = sum(parameter.numel() for parameter in like.parameters())
    return Size(parameters=parameters, gflops=count_flops(like, sample) / 1e9, megabytes=megabytes(folder) or 0.0)


def megabytes(folder: Path) -> float | None:
    """Return the size of the weights in a folder in 10^6 bytes; None if there are none."""
    files = {path for pattern in WEIGHT_FILES for path in folder.glob(pattern)}
    return sum(path.stat().st_size for path in files) / 1e6 or None


def write_model_card(source: Path, folder: Path, report: Report, name: str) -> None:
    """Write the card of a compressed model: that of its run with the report, or a short one if there is no run."""
    exported = (folder / MANIFEST).is_file()
    if (source / RESULTS).is_file() and not exported:
        record = RunRecord.load(source)
        parameters = report.rows[-1]["parameters"] if report.rows else record.parameters
        record = replace(
            record,
            compression=report.compression,
            costs=report.rows or None,
            metrics=report.metrics,
            parameters=parameters,
        )
        copy_files(source, folder, (HISTORY,))
        record.save(folder)
        write_card(folder, record, model_id=name)
        return
    if exported:
        kind, lines = "ExportedModel", ["from transformers.exporters import ExportedModel"]
    else:
        kind = loading_class(read_json(folder / "config.json"))
        lines = ["import hf_tfm", f"from transformers import {kind}"]
    lines += ["", f'model = {kind}.from_pretrained("{name}")']
    text = [f"# {plain(name)}", "A compressed model, made by hf-tfm.", report.markdown().rstrip(), "## How to use"]
    text.append("\n".join(["```python", *lines, "```"]))
    data = ModelCardData(library_name="transformers", tags=["hf-tfm", "compression"])
    write_text(folder / CARD, f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n")


@checked()
def show_compression(models: list[str], **options: Any) -> dict[str, Any]:
    """Measure compressed models beside the original: score, size, time and operations, and plot the Pareto front.

    Args:
        models: folders, the original first.
        options: fields of `ReportArguments` and of the task's ``EvaluationArguments``.

    Returns:
        See `Report.to_dict`; also ``lines`` for the terminal.

    Raises:
        ValueError: a folder holds no model, or an option is invalid.
    """
    for model in models:
        if not Path(model).is_dir():
            raise ValueError(f'models must be folders, got "{model}"')
    names = [Path(model).resolve().name for model in models]
    if len(models) < 2 or len(set(names)) < len(names):
        raise ValueError(f"models must be at least two folders with different names, got {', '.join(models)}")
    task_class, args = arguments(ReportArguments, models[0], options)
    output_dir = Path(args.output_dir or models[-1])
    output_dir.mkdir(parents=True, exist_ok=True)
    task = evaluation_task(task_class, args, args.split)
    found: dict[str, tuple[nn.Module, Path]] = {}
    for name, model in zip(names, models, strict=True):
        loaded = task.model if not found else load_result(Path(model), task.model)
        found[name] = (loaded, Path(model))
    report = Report({"source": names[0], "methods": []}, args.dataset_name, args.split)
    report.measure(task, found)
    report.write(output_dir)
    return {**report.to_dict(), "lines": [*report.lines(), str(output_dir / PARETO)]}
