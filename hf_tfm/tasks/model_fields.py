"""Configuration of a new model from the arguments ``size`` and ``model``, and its classes."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Protocol

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..limits import MOST_BLOCKS
from ..memory import REPEATED, new_model
from ..values import check_bounds, closest, conform, one_line


class SizedArguments(Protocol):
    """Arguments of a new model: a size of its configuration, and fields that differ from those of the size."""

    size: str
    model: dict[str, Any]


def check_fields(kind: type[PreTrainedConfig], fields: dict[str, Any], taken: Iterable[str]) -> None:
    """Refuse configuration fields that do not exist, that the user cannot choose, or that have another type.

    Args:
        taken: fields that other arguments or the data determine.

    Raises:
        ValueError: there is one; transformers would accept it silently.
    """
    inherited = PreTrainedConfig.__dataclass_fields__.keys()
    taken = {*inherited, *taken}
    for name in fields:
        if name not in kind.__dataclass_fields__ or name in taken or name.startswith("_"):
            known = [one for one in kind.__dataclass_fields__ if one not in taken and not one.startswith("_")]
            raise ValueError(
                f"model.{name} is not a field of {kind.__name__} that can be chosen{closest(name, known)}"
            )
        conform(f"model.{name}", fields[name], kind.__dataclass_fields__[name].type)
        if name in REPEATED:
            check_bounds(f"model.{name}", fields[name], most=MOST_BLOCKS)


def new_config(kind: type[PreTrainedConfig], args: SizedArguments, **fields: Any) -> PreTrainedConfig:
    """Return the configuration, of class ``kind``, of a new model.

    Args:
        fields: fields that the data or other arguments determine.

    Raises:
        ValueError: a field of ``args.model`` is unknown, or a value is out of range.
    """
    try:
        return kind.of_size(args.size, **args.model, **fields)
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"model: {one_line(error)}") from error


def build_new(config: PreTrainedConfig, auto_class: Any) -> PreTrainedModel:
    """Return a new model, unless its training does not fit in memory; see `new_model`.

    Args:
        auto_class: Auto class of the model.
    """
    return new_model(partial(auto_class.from_config, trust_remote_code=False), config)


def dropout_fields(kind: type[PreTrainedConfig]) -> list[str]:
    """Return the names of the dropout and drop path rates of a configuration class."""
    return [name for name in kind.__dataclass_fields__ if name.endswith(("dropout", "dropout_prob", "drop_path_rate"))]


def label_fields(names: Sequence[str]) -> dict[str, dict]:
    """Return the configuration fields for classes with these names, in order."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def fresh_head(model: PreTrainedModel, name: str) -> str:
    """Reinitialise a linear layer, for as many other classes; return ``name``."""
    parent, _, own = name.rpartition(".")
    old = model.get_submodule(name)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is not None)
    model._init_weights(new)
    setattr(model.get_submodule(parent), own, new)
    return name
