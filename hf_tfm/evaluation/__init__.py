"""Score a saved model, or one on the Hub, on any split of any data set: hf-tfm evaluate.

config.json -> the kind of model -> the function of `KINDS` that scores it
"""

import inspect
from functools import partial
from typing import Any

from transformers import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING, PreTrainedConfig

from ..hub.loading import load_config, require_model
from ..hub.pretrained import MASKED_AUTOENCODERS
from ..tasks.evaluation import evaluate_task
from ..tasks.image_classification import ImageClassificationTask
from ..tasks.language_modeling import LanguageModelingTask
from ..tasks.masked_image import MaskedImageTask
from ..tasks.object_detection import DetectionTask
from ..tasks.text_classification import TextClassificationTask
from ..tasks.translation import TranslationTask

__all__ = [
    "KINDS",
    "evaluate",
    "lines",
]

KINDS: dict[str, Any] = {
    "translation models": TranslationTask,
    "image classifiers": ImageClassificationTask,
    "detectors": DetectionTask,
    "masked autoencoders": MaskedImageTask,
    "language models": LanguageModelingTask,
    "text classifiers": TextClassificationTask,
}


def evaluate(model: str, **options: Any) -> dict[str, Any]:
    """Score a saved model on a split of a data set.

    Args:
        model: folder or Hub id, of this package or of transformers; its config.json decides the kind.
        options: of the function that scores this kind, see `KINDS`.

    Returns:
        What that function does.

    Raises:
        ValueError: the model is of another kind, or an option is for another kind.
    """
    for option in ("dataset_name", "split"):
        if not options.get(option, option):
            raise ValueError(f"{option} must be a name, got {options[option]!r}")
    several = (name for name, kind in KINDS.items() if isinstance(kind, type) and kind.evaluates_several(options))
    if (kind := next(several, None)) is None:
        revision, trust_remote_code = options.get("revision"), options.get("trust_remote_code", False)
        require_model("model", model, revision)
        config = load_config(model, revision=revision, trust_remote_code=trust_remote_code)
        kind = kind_of(config, model)
    takes = {name: set(options_of(kind)) for name, kind in KINDS.items()}
    for option in options:
        if option not in takes[kind]:
            others = " and ".join(name for name in KINDS if option in takes[name])
            reason = f"is for {others}" if others else "is no option of evaluate"
            raise ValueError(f'{option} {reason}; "{model}" is one of the {kind}')
    chosen = KINDS[kind]
    if isinstance(chosen, type):
        args = chosen.EvaluationArguments(model=model, **options)
        return chosen.evaluate_all(args, partial(evaluate_task, chosen))
    return chosen(model, **options)


def options_of(kind: Any) -> list[str]:
    """Names of the options of one of `KINDS`."""
    return list(inspect.signature(kind.EvaluationArguments if isinstance(kind, type) else kind).parameters)


def kind_of(config: PreTrainedConfig, model: str) -> str:
    """Which of `KINDS` a model is, by the class it was saved as.

    Raises:
        ValueError: none of them.
    """
    saved = ", ".join(config.architectures or ())
    if "ForImageClassification" in saved or config.model_type == "timm_wrapper":
        return "image classifiers"
    if TextClassificationTask.accepts(config):
        return "text classifiers"
    if DetectionTask.accepts(config):
        return "detectors"
    if LanguageModelingTask.accepts(config):
        return "language models"
    if config.model_type in MASKED_AUTOENCODERS and "ForPreTraining" in saved:
        return "masked autoencoders"
    remote = getattr(config, "auto_map", None) or {}
    # is_encoder_decoder does not tell: DETR's configuration says so of itself.
    if type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING or "AutoModelForSeq2SeqLM" in remote:
        return "translation models"
    raise ValueError(
        f'"{model}" is a {config.model_type} model saved as {saved or "no class"}, and evaluate is for '
        f"{', '.join(KINDS)}"
    )


def lines(result: dict[str, Any]) -> list[str]:
    """A result as people read it, a line for each score and figure."""
    if "lines" in result:
        return result["lines"]
    said = [
        f"{row['split']}  {row['name']:<15} {row['value']:8.3f}  {row['signature'] or ''}".rstrip()
        for row in result["metrics"]
    ]
    if "per_class" in result:
        said += class_lines(result["per_class"])
    if "images" in result:
        left_out = ", ".join(f"{count} {reason}" for reason, count in result["left_out"].items())
        speed = result["throughput"]
        said.append(f"{result['images']} images; left out: {left_out}")
        said.append(
            f"images/s: {speed['model']:.0f} by the model alone, {speed['whole']:.0f} with reading and resizing"
        )
    if "texts" in result:
        speed = result["throughput"]
        said.append(f"{result['texts']} texts, {result['unlabelled']} of them without a label")
        said.append(f"texts/s: {speed['model']:.0f} by the model alone, {speed['whole']:.0f} with tokenizing")
    return said


def class_lines(per_class: dict[str, dict[str, float]]) -> list[str]:
    """The scores of each class as a table; "-" where a class has none."""
    names = list(dict.fromkeys(name for scores in per_class.values() for name in scores))
    width = max(map(len, ("class", *per_class)))
    rows = [("class", names), *((name, [cell(scores.get(n)) for n in names]) for name, scores in per_class.items())]
    return [" ".join([f"{name:<{width}}", *(f"{value:>7}" for value in values)]) for name, values in rows]


def cell(value: float | None) -> str:
    """A score as the table has it."""
    return "-" if value is None else f"{value:.3f}"
