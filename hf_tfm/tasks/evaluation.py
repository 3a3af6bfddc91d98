"""Scoring a saved model with its task: ``hf-tfm evaluate``.

config.json -> task -> arguments -> model, processor and rows -> `Task.evaluate` -> metrics, details -> JSON file
"""

import inspect
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedConfig, PreTrainedModel

from ..arguments import EvaluationArguments
from ..data.source import read_splits
from ..hub.cost import count_flops
from ..hub.external import external_model, folder_or_id, weights_file
from ..hub.loading import load_config, require_model
from ..hub.results import collect_versions
from ..launcher import create_accelerator
from ..writing import require_writable, write_json
from .base import Task
from .registry import evaluated_tasks
from .stopwatch import Stopwatch


def evaluate(model: str, **options: Any) -> dict[str, Any]:
    """Score a saved model on a split of a data set.

    Args:
        model: folder or Hub id, of this package or of transformers; its config.json decides the task. Or a model of
            another library, see `hub.external`.
        options: fields of the task's ``EvaluationArguments``.

    Returns:
        See `evaluate_task`.

    Raises:
        ValueError: no task evaluates this model, or an option belongs to another task.
    """
    for option in ("dataset_name", "split"):
        if not options.get(option, option):
            raise ValueError(f"{option} must be a name, got {options[option]!r}")
    classes, model = evaluated_tasks(), folder_or_id(model)
    chosen = next((one for one in classes if one.evaluates_several(options)), None)
    if chosen is None:
        config = config_of(model, options)
        chosen = refined(task_of(config, model), config, options)
    for option in options:
        if option not in options_of(chosen):
            others = " and ".join(one.kind for one in classes if option in options_of(one))
            reason = f"is for {others}" if others else "is not an option of evaluate"
            raise ValueError(f'{option} {reason}; "{model}" is one of the {chosen.kind}')
    args = chosen.EvaluationArguments(model=model, **options)
    return chosen.evaluate_all(args, partial(evaluate_task, chosen))


def config_of(model: str, options: dict[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a model to evaluate.

    Args:
        options: of the evaluation.

    Raises:
        ValueError: there is no such model, or an option is for other models.
    """
    revision = options.get("revision")
    if (external := external_model(model)) is not None:
        if revision is not None:
            raise ValueError(f'revision "{revision}" applies only to a model on the Hub, got model "{model}"')
        return external.config
    for option in ("weights", "random_weights"):
        if options.get(option):
            raise ValueError(f'{option} is for models timm:NAME and torchvision:NAME, got model "{model}"')
    require_model("model", model, revision)
    return load_config(model, revision=revision, trust_remote_code=options.get("trust_remote_code", False))


def options_of(task_class: type[Task]) -> list[str]:
    """Return the names of the options of an evaluation."""
    return list(inspect.signature(task_class.EvaluationArguments).parameters)


def task_of(config: PreTrainedConfig, model: str) -> type[Task]:
    """Return the task that evaluates a saved model.

    Raises:
        ValueError: there is none.
    """
    classes = [one for one in evaluated_tasks() if one.refines is None]
    # Later tasks are more specific: the configurations of translation models are also those of other models.
    for task_class in reversed(classes):
        if task_class.accepts(config):
            return task_class
    saved = ", ".join(config.architectures or ())
    raise ValueError(
        f'"{model}" is a {config.model_type} model saved as {saved or "no class"}, but evaluate supports '
        f"{', '.join(one.kind for one in classes)}"
    )


def refined(task_class: type[Task], config: PreTrainedConfig, options: dict[str, Any]) -> type[Task]:
    """Return the task that scores a model on a data set: one of those that refine ``task_class``, or itself.

    Options that only one of them has decide, else the columns of the data set.
    """
    others = [one for one in evaluated_tasks() if one.refines is task_class and one.accepts(config)]
    own = set(options_of(task_class))
    if special := options.keys() - own:
        return next((one for one in others if special <= {*options_of(one)}), task_class)
    if not others or any(options.keys() - {*options_of(one)} for one in others):
        return task_class
    name, split = options["dataset_name"], options.get("split", EvaluationArguments.split)
    subset, revision, files = (options.get(one) for one in ("dataset_config", "dataset_revision", "data_files"))
    splits = read_splits(name, subset, revision, files, False)
    columns = splits[split].column_names if split in splits else ()
    return next((one for one in others if one.reads(columns or ())), task_class)


def evaluate_task(task_class: type[Task], args: EvaluationArguments, listing: bool = False) -> dict[str, Any]:
    """Score a saved model on a split.

    Args:
        listing: return the listing of the task's `Scores` too.

    Returns:
        ``model``, ``dataset``, ``split``, ``fingerprint`` and number of ``rows``; ``metrics``, rows of name, value,
        signature and split; ``versions``; ``mixed_precision``; the details of the task's `Scores`; if the task counts
        its samples, their number and the ``throughput``, see `Stopwatch`; if it `Task.reports_cost`, ``parameters``,
        ``gflops`` and the ``gflops_input``; and for a model of another library, see `library_details`.

    Raises:
        ValueError: model, data and arguments do not fit each other.
        OSError: the file ``args.output`` cannot be written.
    """
    if args.output:
        require_writable("output", args.output)
    task = task_class(args, one_process())
    task.splits = task.load_splits()
    task.load_pretrained()
    task.model = task.model.to(task.accelerator.device)
    with torch.autocast(task.accelerator.device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        with Stopwatch(task.model) as watch:
            scores = task.evaluate(task.model, args.split)
        details = scores.details | (model_cost(task.model, watch.sample) if task.reports_cost else {})
    rows = task.splits[args.split]
    result = {
        "model": args.model,
        "dataset": args.dataset_name,
        "split": args.split,
        "fingerprint": task.fingerprint(rows),
        "rows": len(rows),
        "metrics": scores.rows(args.split, task.reported_metrics),
        "versions": collect_versions(),
        **({} if scores.samples is None else {task.sample: scores.samples}),
        **details,
        **library_details(args),
        "mixed_precision": args.mixed_precision,
        **({} if scores.samples is None else {"throughput": watch.throughput(scores.samples)}),
    }
    if args.output:
        write_json({**result, **scores.listing}, args.output)
    task.end_evaluation(scores)
    return {**result, **scores.listing} if listing else result


def model_cost(model: PreTrainedModel, sample: dict[str, Any]) -> dict[str, Any]:
    """Return the number of ``parameters``, and the ``gflops`` of a forward pass with ``gflops_input``.

    Args:
        sample: arguments of the forward pass for one sample.
    """
    images = sample["pixel_values"]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "gflops": count_flops(model, sample) / 1e9,
        "gflops_input": " x ".join(map(str, images.shape[1:])),
    }


def library_details(args: Any) -> dict[str, Any]:
    """Return for a model of another library its ``weights`` and the ``published`` scores of these, see `Published`."""
    if (external := external_model(args.model)) is None:
        return {}
    if args.random_weights:
        return {"weights": "random"}
    file = weights_file("weights", args.weights) if args.weights else None
    return {"weights": str(file or "pretrained"), "published": external.published(file)}


def one_process() -> Accelerator:
    """Return the accelerator of an evaluation.

    Raises:
        ValueError: there are several processes.
    """
    accelerator = create_accelerator()
    if accelerator.num_processes > 1:
        raise ValueError(f"evaluate runs in one process, got {accelerator.num_processes}")
    return accelerator


def lines(result: dict[str, Any]) -> list[str]:
    """Return the lines of a result for the terminal."""
    if "lines" in result:
        return result["lines"]
    published = {
        one["name"]: f"published: {one['value']:.3f} on {one['data']} ({one['source']})"
        for one in result.get("published", ())
    }
    found = [
        f"{row['split']}  {row['name']:<15} {row['value']:8.3f}  "
        f"{row['signature'] or ''}{published.get(row['name'], '')}".rstrip()
        for row in result["metrics"]
    ]
    if result.get("weights") == "random":
        found.append("weights: random, so the scores only show that evaluation works")
    if "per_class" in result:
        found += table_lines("class", result["per_class"])
    if "by_frame" in result:
        found += table_lines("frame", by_row(result["by_frame"]))
    if "throughput" in result:
        speed, sample = result["throughput"], next(one.sample for one in evaluated_tasks() if one.sample in result)
        left_out = ", ".join(f"{count} {reason}" for reason, count in result.get("left_out", {}).items())
        unlabelled = f", {result['unlabelled']} of them without a label" if "unlabelled" in result else ""
        found.append(f"{result[sample]} {sample}{unlabelled}" + (f"; left out: {left_out}" if left_out else ""))
        found.append(
            f"{sample}/s: {speed['model']:.0f} by the model alone, {speed['whole']:.0f} with reading and preprocessing"
        )
    if "gflops" in result:
        found.append(
            f"parameters: {result['parameters'] / 1e6:.1f} M; {result['gflops']:.2f} GFLOPs for an input of "
            f"{result['gflops_input']}"
        )
    return found


def by_row(columns: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Return scores of several predictions by row, counted from 1, instead of by prediction and score."""
    lists = {
        score if name == "model" else f"{name} {score}": values
        for name, scores in columns.items()
        for score, values in scores.items()
    }
    count = len(next(iter(lists.values())))
    return {str(i + 1): {name: values[i] for name, values in lists.items()} for i in range(count)}


def table_lines(head: str, rows: dict[str, dict[str, float]]) -> list[str]:
    """Return the scores of each class, or frame, as a table; "-" marks a missing score.

    Args:
        head: of the first column.
    """
    names = list(dict.fromkeys(name for scores in rows.values() for name in scores))
    width, widths = max(map(len, (head, *rows))), [max(7, len(name)) for name in names]
    table = [(head, names), *((name, [cell(scores.get(n)) for n in names]) for name, scores in rows.items())]
    return [
        " ".join([f"{name:<{width}}", *(f"{value:>{space}}" for value, space in zip(values, widths, strict=True))])
        for name, values in table
    ]


def cell(value: float | None) -> str:
    """Return a score as text."""
    return "-" if value is None else f"{value:.3f}"
