"""Model card: README.md of a run's folder, generated from its `RunRecord`.

RunRecord + config.json + history.jsonl -> README.md, training_curve.png, .eval_results/<data set>.yaml
"""

import json
import re
import shutil
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from .cost import Cost
from .curve import write_curve
from .portable import code, fenced, licence_id, plain
from .results import RunRecord, read_history
from .saved_files import CARD, CURVE, EVAL_RESULTS, PICTURE, PREDICTIONS
from .usage import usage

TEMPLATE = Path(__file__).with_name("card_template.md")
UNKNOWN = "unknown"
COST_COLUMNS = (
    *("model", "parameters", "GFLOPs per sample", "ms, 1 sample", "ms, 32 samples", "samples/s", "MB on disk"),
    *("score", "fraction of the original's score"),
)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
DATASET_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def write_card(output_dir: str | Path, record: RunRecord, model_id: str | None = None) -> Path:
    """Write the card of the model in ``output_dir``, with its training curve and its scores in the Hub's formats.

    Args:
        output_dir: folder of a run, with config.json and, for the curve, history.jsonl. For a detector, the latest
            image of its predictions is included. An existing README.md is replaced.
        record: record of the run.
        model_id: model id in the usage example; by default the folder's name.

    Returns:
        The path of README.md.

    Raises:
        FileNotFoundError: there is no config.json.
    """
    output_dir, record = Path(output_dir), RunRecord.from_dict(record.to_dict())  # shortens local paths
    config = json.loads((output_dir / "config.json").read_text(encoding="utf-8"))
    model_id = model_id or output_dir.resolve().name
    title = model_id.split("/")[-1]
    curve = write_curve(output_dir, read_history(output_dir), title)
    if drawn := sorted(output_dir.glob(PREDICTIONS)):
        shutil.copyfile(drawn[-1], output_dir / PICTURE)
    card = ModelCard.from_template(
        metadata(record, title),
        template_path=str(TEMPLATE),
        title=plain(title),
        summary=summary(record, config),
        usage=usage(config, model_id),
        data=table(data_rows(record)),
        scores=table(score_rows(record), ("split", "metric", "value", "signature")),
        teacher=code(record.distillation["teacher"]) if record.distillation else None,
        terms=table(term_rows(record), ("term", "weight", "temperature", "tokens", "student from teacher")),
        original=code(record.compression["source"]) if record.compression else None,
        compression=table(compression_rows(record), ("method", "options and result")),
        costs=table(cost_rows(record.costs), cost_columns(record)),
        cost_note=cost_note(record),
        training=table(training_rows(record)),
        curve=CURVE if curve else None,
        picture=PICTURE if (output_dir / PICTURE).is_file() else None,
        command=fenced(" ".join(record.command.splitlines())),
        # The JSON round trip converts tuples and paths to plain YAML values.
        arguments=fenced(
            yaml.safe_dump(json.loads(json.dumps(record.arguments, default=str)), sort_keys=False).strip()
        ),
        versions=table(((plain(name), plain(v)) for name, v in record.versions.items()), ("package", "version")),
        hardware=table(
            (plain(name.replace("_gb", " (GB)").replace("_", " ")), known(v)) for name, v in record.hardware.items()
        ),
        licence=licence(record, config),
    )
    card.save(output_dir / CARD)
    write_eval_results(output_dir, record)
    return output_dir / CARD


def metadata(record: RunRecord, title: str) -> ModelCardData:
    """Return the YAML metadata with which the Hub indexes the model."""
    data, dataset = record.data, hub_dataset(record)
    results = [
        EvalResult(
            task_type=record.task,
            dataset_type=dataset or dataset_name(record),
            dataset_name=dataset_name(record),
            dataset_config=data.get("name"),
            dataset_split=metric["split"],
            dataset_revision=data.get("revision"),
            metric_type=metric["name"],
            metric_name=metric["name"],
            metric_value=metric["value"],
            metric_args={"signature": metric["signature"]} if metric.get("signature") else None,
        )
        for metric in record.metrics
    ]
    base = record.base_model
    return ModelCardData(
        model_name=title,
        language=languages(record),
        license=licence_id(record.arguments.get("license")) or UNKNOWN,
        library_name="transformers",
        pipeline_tag=record.task,
        base_model=base if base and HUB_ID.fullmatch(base) and not Path(base).exists() else None,
        datasets=[dataset] if dataset else None,
        metrics=list(dict.fromkeys(metric["name"] for metric in record.metrics)) or None,
        tags=["hf-tfm", record.model_type, record.task],
        eval_results=results,
    )


def hub_dataset(record: RunRecord) -> str | None:
    """Return the id of a data set on the Hub; None for a local or generated one."""
    path, revision = record.data["path"], record.data.get("revision")
    # Older records lack on_hub, and the path may refer to something else on this machine.
    known = record.data.get("on_hub", bool(revision or (HUB_ID.fullmatch(path) and not Path(path).exists())))
    return path if known and DATASET_ID.fullmatch(path) else None


def dataset_name(record: RunRecord) -> str:
    """Return the data set's Hub id, or the last part of a local path."""
    return hub_dataset(record) or Path(record.data["path"]).name


def languages(record: RunRecord) -> list[str] | None:
    """Return the languages of a text pair if both columns are named after one, as in "translation.en"."""
    columns = [record.data.get(f"{side}_column") or "" for side in ("source", "target")]
    codes = [column.split(".")[-1] for column in columns]
    return codes if all(re.fullmatch("[a-z]{2}", code) for code in codes) else None


def summary(record: RunRecord, config: dict[str, Any]) -> str:
    """Summarise the model in one or two sentences: type, size, initialisation, task and data."""
    pair = languages(record)
    task = plain(record.task) + (f" from {pair[0]} to {pair[1]}" if pair else "")
    text = (
        f"A {code(record.model_type)} model with {record.parameters:,} parameters, {origin(record, config)} for "
        f"{task} on {plain(dataset_name(record))}, with hf-tfm {plain(record.versions.get('hf-tfm', UNKNOWN))}."
    )
    if config["model_type"] != record.model_type:
        text += (
            f" It was then converted to transformers' {code(config['model_type'])}; parity_certificate.json shows "
            "that both give the same outputs."
        )
    return text


def origin(record: RunRecord, config: dict[str, Any]) -> str:
    """Describe how the model was initialised."""
    if found := record.distillation:
        layers = f", initialised with its layers {layer_names(own)}," if (own := found["student_layers"]) else ""
        base = f", initialised from {code(record.base_model)}," if record.base_model else ""
        return f"distilled from {code(found['teacher'])}{layers}{base}"
    if record.base_model:
        return f"initialised from {code(record.base_model)} and trained"
    if record.arguments.get("pretrained_backbone"):
        name = config.get("backbone") or (config.get("backbone_config") or {}).get("backbone")
        source = record.arguments.get("backbone") or name
        owner = "timm's pretrained" if source == name else "the pretrained"
        return f"trained from scratch except for {owner} backbone {code(source)},"
    return "trained from scratch"


def layer_names(layers: list[int] | dict[str, list[int]]) -> str:
    """Format the teacher layers that a student was initialised from."""
    if isinstance(layers, dict):
        return "; ".join(f"{stack} {layer_names(own)}" for stack, own in layers.items())
    return ", ".join(map(str, layers))


def term_rows(record: RunRecord) -> list[tuple[Any, ...]]:
    """Return the rows of the table of distillation terms."""
    return [
        (
            plain(term["name"]),
            number(term["weight"]),
            number(term["temperature"]),
            plain(term["tokens"]),
            plain(", ".join(f"{ours} from {theirs}" if theirs else "true labels" for ours, theirs in term["pairs"]))
            + (f", {term['projection'][0]} to {term['projection'][1]} features" if term["projection"] else ""),
        )
        for term in (record.distillation["terms"] if record.distillation else ())
    ]


def compression_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Return the rows of the table of compression methods."""
    return [
        (plain(one["name"]), plain(", ".join(f"{key} {value}" for key, value in one.items() if key != "name")))
        for one in (record.compression["methods"] if record.compression else ())
    ]


def cost_columns(record: RunRecord) -> tuple[str, ...]:
    """Return the columns of the cost table; the first model is the teacher or the original."""
    return COST_COLUMNS if record.compression else (*COST_COLUMNS[:-1], "fraction of the teacher's score")


def cost_note(record: RunRecord) -> str:
    """Describe the score and the sample that the cost table refers to."""
    costs = record.costs or [{}]
    said = [f"Score: {plain(costs[-1]['metric'])}."] if "metric" in costs[-1] else []
    return " ".join([*said, *([f"Sample: {plain(costs[-1]['sample'])}."] if "sample" in costs[-1] else [])])


def data_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Return the rows of the table of task and data."""
    data, dataset = record.data, hub_dataset(record)
    fingerprint = data.get("fingerprint")
    if isinstance(fingerprint, dict):
        fingerprint = ", ".join(f"{plain(split)} {code(known(value))}" for split, value in fingerprint.items())
    elif fingerprint:
        fingerprint = code(fingerprint)
    sides = ("source", "target", "text", "image", "label", "objects", "panoptic", "prompt")
    sides += ("completion", "chosen", "rejected")
    columns = [data[f"{side}_column"] for side in sides if data.get(f"{side}_column")]
    rows = ", ".join(
        f"{plain(split)} {'not counted' if count is None else f'{count:,}'}"
        for split, count in data.get("rows", {}).items()
    )
    return [
        ("task", plain(record.task)),
        (
            "data set",
            f"[{dataset}](https://huggingface.co/datasets/{dataset})" if dataset else plain(dataset_name(record)),
        ),
        ("configuration", plain(data.get("name") or "none")),
        ("revision", known(data.get("revision")) if dataset else "none: not on the Hub"),
        ("fingerprint", fingerprint or UNKNOWN),
        ("columns", " to ".join(code(column) for column in columns) or UNKNOWN),
        ("rows", rows or UNKNOWN),
        ("licence", known(data.get("license"))),
    ]


def score_rows(record: RunRecord) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table of scores."""
    return [
        (
            plain(m["split"]),
            plain(m["name"]),
            number(m["value"]),
            code(m["signature"]) if m.get("signature") else "none",
        )
        for m in record.metrics
    ]


def cost_rows(costs: Iterable[Cost] | None) -> list[tuple[str, ...]]:
    """Return the rows of the table of inference costs of a model and of those it is compared with."""
    fields = ("parameters", "gflops", "milliseconds_1", "milliseconds_32", "samples_per_second", "megabytes", "score")
    return [
        (
            plain(cost["model"]),
            *("none" if cost.get(field) is None else number(cost[field]) for field in fields),
            f"{100 * cost['kept']:.1f} %" if "kept" in cost else "none",
        )
        for cost in costs or ()
    ]


def training_rows(record: RunRecord) -> list[tuple[str, str]]:
    """Return the rows of the table of training statistics."""
    training = record.training
    skipped = training.get("skipped_steps")
    speed, best = training.get("items_per_second"), training.get("best")
    return [
        ("started", plain(record.started)),
        ("finished", plain(record.finished)),
        ("training time", f"{timedelta(seconds=round(training['seconds']))}, excluding set-up and evaluation"),
        (
            "steps",
            f"{training['steps']:,}" + (f", of which {skipped:,} skipped (gradient not finite)" if skipped else ""),
        ),
        ("epochs", number(training["epochs"])),
        ("speed", f"{speed:,.0f} {plain(training.get('item') or 'items')} per second" if speed else UNKNOWN),
        ("best evaluation", ", ".join(f"{plain(k)} {number(v)}" for k, v in best.items()) if best else UNKNOWN),
        ("saved weights", known(training.get("weights"))),
    ]


def licence(record: RunRecord, config: dict[str, Any]) -> str:
    """Return the licences of weights, data and code; unspecified ones are "unknown"."""
    lines = [
        f"- Weights: {plain(record.arguments.get('license') or 'unknown; not specified by the run')}.",
        f"- Training data: {plain(record.data.get('license') or 'unknown; not specified by the run')}.",
    ]
    if "auto_map" in config:
        lines.append("- Model code (the Python files in this repository): Apache-2.0, from hf-tfm.")
    return "\n".join(lines)


def write_eval_results(output_dir: Path, record: RunRecord) -> Path | None:
    """Write the scores to ``.eval_results/<data set>.yaml``, which the Hub aggregates by data set.

    The format identifies data sets by Hub id, so no file is written for other data sets.
    """
    dataset = hub_dataset(record)
    if dataset is None or not record.metrics:
        return None
    entries = [
        EvalResultEntry(
            dataset_id=dataset,
            task_id="_".join(filter(None, (record.data.get("name"), metric["split"], metric["name"]))),
            value=metric["value"],
            dataset_revision=record.data.get("revision"),
            date=record.finished,
            notes=metric.get("signature"),
        )
        for metric in record.metrics
    ]
    path = output_dir / EVAL_RESULTS / f"{dataset.replace('/', '--')}.yaml"
    path.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False, allow_unicode=True)
    path.write_text(text, encoding="utf-8")
    return path


def table(rows: Iterable[tuple], header: tuple[str, ...] = ("", "")) -> str:
    """Format a Markdown table; "" without rows."""
    lines = [
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    ]
    if not lines:
        return ""
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines])


def known(value: Any) -> str:
    """Format a value for Markdown; None becomes "unknown"."""
    return UNKNOWN if value is None else plain(value)


def number(value: Any) -> str:
    """Format a number with four significant digits, integers in full; other values as by `known`."""
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.4g}"
    return f"{value:,.0f}" if isinstance(value, (int, float)) and not isinstance(value, bool) else known(value)
