"""Models that a run begins with: of a kind that suits the task, and with every weight that the task does not replace.

folder or Hub id -> model type checked -> loaded in float32 -> weights accounted for -> model, names of fresh weights
"""

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from .loading import LoadingError, check_index, explained, load_config, mismatch, no_place, others, unread

TEXT_TYPES = ("tfm_bert", "tfm_gpt", "bert", "distilbert", "gpt2")


@dataclass(frozen=True)
class Suitable:
    """Models that fit an argument.

    Args:
        use: what the model becomes or does, with its article, for errors.
        types: model types that fit.
        auto_class: also any type that this Auto class loads; ``types`` are then examples.
    """

    use: str
    types: tuple[str, ...]
    auto_class: Any = None

    def fits(self, config: PreTrainedConfig) -> bool:
        """Whether a model of this configuration does."""
        if config.model_type in self.types:
            return True
        if self.auto_class is None:
            return False
        remote = getattr(config, "auto_map", None) or {}
        known = type(config) in self.auto_class._model_mapping or self.auto_class.__name__ in remote
        return known or (config.model_type == "timm_wrapper" and "Image" in self.auto_class.__name__)


def check_kind(
    argument: str, source: str, suitable: Suitable | None, trust_remote_code: bool | None = None
) -> PreTrainedConfig:
    """The configuration of a model that an argument names.

    Args:
        argument, trust_remote_code: see `load_config`.
        suitable: models that fit; None for any.

    Raises:
        LoadingError: it is of another kind, or has no readable config.json.
    """
    config = load_config(source, argument, trust_remote_code=trust_remote_code)
    if suitable is not None and not suitable.fits(config):
        examples = "a model such as" if suitable.auto_class else "one of"
        raise LoadingError(
            f'{argument} "{source}" is a {config.model_type} model; {suitable.use} needs {examples} '
            f"{', '.join(suitable.types)}"
        )
    return config


# {argument: models that fit it} by what a recipe trains.
TEXT_CLASSES = {
    "model_name_or_path": Suitable("a text classifier", TEXT_TYPES, AutoModelForSequenceClassification),
    "teacher": Suitable("teaching text classes", TEXT_TYPES, AutoModelForSequenceClassification),
}
IMAGE_CLASSES = {
    "model_name_or_path": Suitable("an image classifier", ("tfm_vit", "tfm_mae", "vit", "vit_mae")),
    "teacher": Suitable("teaching image classes", ("tfm_vit", "vit", "deit"), AutoModelForImageClassification),
}
IMAGE_PATCHES = {
    "model_name_or_path": Suitable("a masked autoencoder", ("tfm_mae", "vit_mae")),
    "teacher": Suitable("teaching a masked autoencoder", ("tfm_mae", "vit_mae")),
}
OBJECTS = {
    "model_name_or_path": Suitable("a detector", ("tfm_detr", "detr")),
    "teacher": Suitable("teaching a detector", ("tfm_detr", "detr")),
}
TRANSLATIONS = {"model_name_or_path": Suitable("a translation model", ("tfm_transformer",))}
MASKED_WORDS = {
    "model_name_or_path": Suitable("a masked language model", ("tfm_bert", "bert")),
    "teacher": Suitable("teaching masked words", ("tfm_bert", "bert", "distilbert"), AutoModelForMaskedLM),
    "model": Suitable("filling in words", ("tfm_bert", "bert", "distilbert"), AutoModelForMaskedLM),
}
NEXT_WORDS = {
    "model_name_or_path": Suitable("a causal language model", ("tfm_gpt", "gpt2")),
    "teacher": Suitable("teaching next words", ("tfm_gpt", "gpt2"), AutoModelForCausalLM),
}


def load_to_train(
    kind: Any,
    source: str,
    head_of: Callable[[PreTrainedModel, str], str],
    fields: dict[str, Any] | None = None,
    argument: str = "model_name_or_path",
    resized: str | None = None,
    trust_remote_code: bool | None = None,
    **data: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """A model in float32 to train further, and the names of its weights that are random.

    Args:
        kind: an Auto class or a model class.
        source: folder or Hub id.
        head_of: (model, name of a weight) -> head that it belongs to; "" where it must come from ``source``. The files
            may lack a head as a whole, not in part.
        fields: of its configuration that the user changes. Weights that exist only by them may be random, and those
            that they leave no place for unread.
        argument: the caller's, for errors.
        resized: pattern of weights of heads whose shape the data decides; in another shape they are random.
        trust_remote_code: see `load_config`.
        data: fields that the data decides.

    Raises:
        LoadingError: weights are missing, left over, not finite or of another shape; or files cannot be read.
    """
    fields = fields or {}
    with explained(argument, source, trust_remote_code is not None):
        check_index(Path(source))
        model, report = kind.from_pretrained(
            source,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            trust_remote_code=bool(trust_remote_code),
            **{**data, **fields},
        )
        missing, shapes = set(report["missing_keys"]), {name: rest for name, *rest in report["mismatched_keys"]}
        allowed = re.compile(r"(?!)" if resized is None else resized)
        if odd := sorted(name for name in shapes if not (head_of(model, name) and allowed.search(name))):
            if fields:
                raise LoadingError(
                    f"model: the weights of {argument} {source} do not fit it: {', '.join(odd[:3])}{others(odd, 3)}"
                )
            raise ValueError(mismatch([(name, *shapes[name]) for name in odd]))
        saved = names_as_saved(model, source, data) if fields else None
        if odd := lost(model, missing, shapes, head_of, saved):
            raise ValueError(f"it has no weights for {', '.join(odd[:3])}{others(odd, 3)}: they would be random")
        if odd := sorted(name for name in unread(model, report) if saved is None or name not in saved):
            raise ValueError(no_place(odd))
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"its weight {name} holds values that are not finite")
    return model, missing | shapes.keys()


def names_as_saved(model: PreTrainedModel, source: str, data: dict[str, Any]) -> set[str]:
    """Weights that the class of ``model`` has by the configuration of ``source``, without a user's changes."""
    kind = type(model)
    config = kind.config_class.from_pretrained(source, trust_remote_code=False, **data)
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return set(kind(config).state_dict())


def lost(
    model: PreTrainedModel,
    missing: set[str],
    unfit: Container[str],
    head_of: Callable[[PreTrainedModel, str], str],
    saved: Container[str] | None,
) -> list[str]:
    """Missing weights that are of no head, or of a head of which the files hold a part; see `load_to_train`."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    kept = {
        head_of(model, name)
        for name in model.state_dict()
        if name not in missing and name not in unfit and name not in tied
    }
    return sorted(
        name
        for name in missing
        if (not (head := head_of(model, name)) or head in kept) and (saved is None or name in saved)
    )
