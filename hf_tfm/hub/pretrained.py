"""Load models to start training from: of a suitable type, and with all weights that the task does not replace.

folder or Hub id -> model type checked -> loaded in float32 -> weights accounted for -> model, names of new weights
"""

import re
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import (
    CAUSAL_LM,
    DETECTOR,
    IMAGE_CLASSIFIER,
    MASKED_AUTOENCODER,
    MASKED_LM,
    NEXT_SENTENCE_LM,
    PANOPTIC_DETECTOR,
    SEQ2SEQ,
    TEXT_CLASSIFIER,
    VIDEO_FORECASTER,
    Head,
)
from .loading import LoadingError, check_index, explained, load_config, mismatch, no_place, others, unread


@dataclass(frozen=True)
class Suitable:
    """Models that are valid for an argument: those that the families of a head train further.

    Args:
        use: what the model is used for, in the words of the error message.
        head: head of the model.
        any_class: also all models that the Auto class of the head loads, of any library.
        examples: model types of those, for the error message.
    """

    use: str
    head: Head
    any_class: bool = False
    examples: tuple[str, ...] = ()

    @property
    def types(self) -> list[str]:
        """Valid model types; with ``any_class`` examples of them."""
        return [*self.head.own_types(), *self.examples] if self.any_class else self.head.model_types()

    def fits(self, config: PreTrainedConfig) -> bool:
        """Return True if a model with this configuration is valid."""
        if config.model_type in self.types:
            return True
        if not self.any_class:
            return False
        name = self.head.auto_class
        remote = getattr(config, "auto_map", None) or {}
        known = type(config) in getattr(transformers, name)._model_mapping or name in remote
        return known or (config.model_type == "timm_wrapper" and "Image" in name)


def check_kind(
    argument: str, source: str, suitable: Suitable | None, trust_remote_code: bool | None = None
) -> PreTrainedConfig:
    """Load the configuration of a model passed as an argument, and check its type.

    Args:
        argument, trust_remote_code: see `load_config`.
        suitable: valid models; None for any.

    Raises:
        LoadingError: it has another type, or no readable config.json.
    """
    config = load_config(source, argument, trust_remote_code=trust_remote_code)
    if suitable is not None and not suitable.fits(config):
        examples = "a model such as" if suitable.any_class else "one of"
        raise LoadingError(
            f'{argument} "{source}" is a {config.model_type} model; {suitable.use} needs {examples} '
            f"{', '.join(suitable.types)}"
        )
    return config


# Valid models by argument, for each kind of recipe. The examples are types of transformers.
TEXT_EXAMPLES, MASKED_EXAMPLES = ("bert", "distilbert", "gpt2"), ("bert", "distilbert")
TEXT_CLASSES = {
    "model_name_or_path": Suitable("a text classifier", TEXT_CLASSIFIER, True, TEXT_EXAMPLES),
    "teacher": Suitable("distilling a text classifier", TEXT_CLASSIFIER, True, TEXT_EXAMPLES),
}
IMAGE_CLASSES = {
    "model_name_or_path": Suitable("an image classifier", IMAGE_CLASSIFIER),
    "teacher": Suitable("distilling an image classifier", IMAGE_CLASSIFIER, True, ("vit", "deit")),
}
IMAGE_PATCHES = {
    "model_name_or_path": Suitable("a masked autoencoder", MASKED_AUTOENCODER),
    "teacher": Suitable("distilling a masked autoencoder", MASKED_AUTOENCODER),
}
OBJECTS = {
    "model_name_or_path": Suitable("a detector", DETECTOR),
    "teacher": Suitable("distilling a detector", DETECTOR),
}
SEGMENTS = {"model_name_or_path": Suitable("a detector", PANOPTIC_DETECTOR)}
TRANSLATIONS = {
    "model_name_or_path": Suitable("a translation model", SEQ2SEQ),
    "teacher": Suitable("distilling a translation model", SEQ2SEQ, True, ("marian", "bart")),
}
VIDEOS = {"model_name_or_path": Suitable("a video forecaster", VIDEO_FORECASTER)}
MASKED_WORDS = {
    "model_name_or_path": Suitable("a masked language model", MASKED_LM),
    "teacher": Suitable("distilling a masked language model", MASKED_LM, True, MASKED_EXAMPLES),
    "model": Suitable("filling in words", MASKED_LM, True, MASKED_EXAMPLES),
}
SENTENCE_PAIRS = {"model_name_or_path": Suitable("next sentence prediction", NEXT_SENTENCE_LM)}
NEXT_WORDS = {
    "model_name_or_path": Suitable("a causal language model", CAUSAL_LM),
    "teacher": Suitable("distilling a causal language model", CAUSAL_LM, True, ("gpt2",)),
}


def load_to_train(
    kind: Any,
    source: str,
    head_of: Callable[[PreTrainedModel, str], str],
    fields: dict[str, Any] | None = None,
    argument: str = "model_name_or_path",
    resized: str | None = None,
    unused: str | None = None,
    trust_remote_code: bool | None = None,
    **data: Any,
) -> tuple[Any, set[str]]:
    """Load a model in float32 for further training, and return it with the names of its newly initialised weights.

    Args:
        kind: an Auto class, a `Head` or a model class.
        source: folder or Hub id.
        head_of: (model, weight name) -> head that the weight belongs to, or "" if it must come from ``source``. A head
            may be missing from the files as a whole, but not in part.
        fields: configuration fields changed by the user. Weights that exist only because of them may be random, and
            weights that they remove may be unused.
        argument: name of the caller's argument, for errors.
        resized: pattern of head weights whose shape depends on the data; they are random if their shape differs.
        unused: pattern of saved weights that the model need not have.
        trust_remote_code: see `load_config`.
        data: configuration fields that depend on the data.

    Raises:
        LoadingError: weights are missing, unused, not finite or of another shape; or files cannot be read.
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
        odd = sorted(name for name in unread(model, report) if saved is None or name not in saved)
        if odd := [name for name in odd if unused is None or not re.search(unused, name)]:
            raise ValueError(no_place(odd))
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"its weight {name} holds values that are not finite")
    return model, missing | shapes.keys()


def names_as_saved(model: PreTrainedModel, source: str, data: dict[str, Any]) -> set[str]:
    """Return the weight names of the class of ``model`` with the configuration of ``source``, without user changes."""
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
    """Return missing weights that belong to no head, or to a head that is partly saved; see `load_to_train`."""
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
