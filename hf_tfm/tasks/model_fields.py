"""Configuration of a new model from the arguments ``size`` and ``model``, and its classes."""

import copy
import inspect
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Protocol, get_origin

from accelerate.utils import extract_model_from_parallel
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from torch.optim.swa_utils import AveragedModel
from transformers import PreTrainedConfig, PreTrainedModel

from ..families import Head
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


def as_listed(kind: type[PreTrainedConfig], name: str, value: Any) -> Any:
    """Return the value of a field, a list instead of a tuple if the field takes only lists."""
    hint = kind.__dataclass_fields__[name].type if isinstance(value, tuple) else None
    return conform(name, value, hint) if get_origin(hint) is list else value


def new_config(kind: type[PreTrainedConfig], args: SizedArguments, **fields: Any) -> PreTrainedConfig:
    """Return the configuration, of class ``kind``, of a new model.

    Args:
        fields: fields that the data or other arguments determine.

    Raises:
        ValueError: a field of ``args.model`` is unknown, or a value is out of range.
    """
    try:
        return kind.of_size(
            args.size, **{name: as_listed(kind, name, value) for name, value in args.model.items()}, **fields
        )
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"model: {one_line(error)}") from error


def build_new(config: PreTrainedConfig, head: Head) -> PreTrainedModel:
    """Return a new model, unless its training does not fit in memory; see `new_model`.

    Args:
        head: of the model.
    """
    return new_model(head.model_class(config.model_type), config)


@cache
def forward_arguments(kind: type[nn.Module]) -> frozenset[str]:
    """Return the names of the arguments of ``forward`` of a class."""
    return frozenset(inspect.signature(kind.forward).parameters)


def takes(model: nn.Module, argument: str) -> bool:
    """Return True if the forward pass of a model, wrapped or not, takes an argument."""
    plain = extract_model_from_parallel(model, keep_torch_compile=False)
    plain = plain.module if isinstance(plain, AveragedModel) else plain
    return argument in forward_arguments(type(plain))


def sums_losses(model: nn.Module) -> bool:
    """Return True if a language model can compute sums of token losses without keeping the logits.

    Its forward pass then takes ``num_items_in_batch``, ``return_logits`` and, for masked tokens,
    ``masked_positions``, as `TfmBertForMaskedLM.forward` does.
    """
    return takes(model, "return_logits")


def dropout_fields(kind: type[PreTrainedConfig]) -> list[str]:
    """Return the names of the dropout and drop path rates of a configuration class."""
    return [name for name in kind.__dataclass_fields__ if name.endswith(("dropout", "dropout_prob", "drop_path_rate"))]


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Return the configuration fields for classes with these names, in order."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def head_of(model: PreTrainedModel, name: str) -> str:
    """Return the head of a weight, for `load_to_train`: its module above the base model, or a pooler in that."""
    top = name.split(".")[0]
    return "pooler" if ".pooler." in name else "" if top == model.base_model_prefix else top


def fresh_head(model: PreTrainedModel, name: str) -> str:
    """Reinitialise a linear layer, for as many other classes; return ``name``."""
    parent, _, own = name.rpartition(".")
    new = copy.deepcopy(model.get_submodule(name))  # with the attributes that `_init_weights` reads
    model._init_weights(new)
    setattr(model.get_submodule(parent), own, new)
    return name
