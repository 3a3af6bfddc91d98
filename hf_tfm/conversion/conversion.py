"""What a conversion is: a two-way table between one of our classes and a class of another library."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


def refuse(target: str, field: str, value: Any, needed: Any) -> NoReturn:
    """Say that ``target`` cannot express ``field=value``."""
    raise ValueError(f"{target} cannot express {field}={value!r}: it needs {needed!r}")


def require_fixed(target: str, config: Any, fixed: dict[str, Any]) -> None:
    """Refuse a configuration in which a field has another value than the one that ``target`` can express."""
    for field, value in fixed.items():
        if getattr(config, field) != value:
            refuse(target, field, getattr(config, field), value)


def carried(config: PreTrainedConfig, fields: tuple[str, ...]) -> dict[str, Any]:
    """Those of ``fields`` that the configuration has, and says something of: what rides along to the other side."""
    return {field: getattr(config, field) for field in fields if getattr(config, field, None) is not None}


@dataclass(frozen=True)
class Conversion:
    """Names and configurations of two classes that compute the same.

    Args:
        name: what a user calls the other side, as in ``--to marian``.
        ours: our class.
        theirs: the class of the other library.
        to_theirs: our configuration -> theirs; ValueError names a field that cannot be expressed.
        to_ours: their model -> our configuration; the model, because some of it shows in the weights alone.
        names: our configuration -> {our weight name: their weight name}, all of ours. Several of ours may go to one of
            theirs, which holds them one below the other (a fused projection). None where our class reads their files,
            and writes them with ``save_original_format=True``.
        file_to_theirs, file_to_ours: the weights of a file of the one side -> those of the other's, where ``names`` is
            None and their files differ in a few names.
        prepare: our model -> the same function in the form that they have.
        zero_in_theirs: weights that are zero in theirs where ``names`` leaves them out.
        computed_in_theirs: weights that only they have, fixed by their class.
        unread_by_theirs: weights that files of theirs may hold and their class has no use for; they are left out.
        build, read, write: how theirs is made of a configuration, read from a folder, written to a folder, where it is
            not a class of transformers.
        carry_processor: (source folder, target folder, to_ours) -> None, says how images or texts are prepared, and
            keeps what else only one side has; None where both sides read the same files.
    """

    name: str
    ours: type[PreTrainedModel]
    theirs: type[nn.Module]
    to_theirs: Callable[[PreTrainedConfig], Any]
    to_ours: Callable[[Any], PreTrainedConfig]
    names: Callable[[PreTrainedConfig], dict[str, str]] | None = None
    file_to_theirs: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    file_to_ours: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None
    prepare: Callable[[PreTrainedModel], PreTrainedModel] | None = None
    zero_in_theirs: tuple[str, ...] = ()
    computed_in_theirs: tuple[str, ...] = ()
    unread_by_theirs: tuple[str, ...] = ()
    build: Callable[[Any], nn.Module] | None = None
    read: Callable[[Path], nn.Module] | None = None
    write: Callable[[nn.Module, Path], None] | None = None
    carry_processor: Callable[[Path, Path, bool], None] | None = None

    def weights_to_theirs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Weights of our ``model`` under their names.

        Raises:
            ValueError: a weight of the model is not in the table, or the reverse.
        """
        weights, names = model.state_dict(), self.names(model.config)
        require_same(weights.keys(), names.keys())
        return {
            theirs: weights[ours[0]] if len(ours) == 1 else torch.cat([weights[name] for name in ours])
            for theirs, ours in grouped(names).items()
        }

    def weights_to_ours(self, model: nn.Module, config: PreTrainedConfig) -> dict[str, Tensor]:
        """Weights of their ``model`` under our names; ``config`` is ours.

        Raises:
            ValueError: a weight of the model is not in the table, or the reverse.
        """
        groups = grouped(self.names(config))
        only_theirs = {*self.zero_in_theirs, *self.computed_in_theirs} - groups.keys()
        weights = {name: weight for name, weight in model.state_dict().items() if name not in only_theirs}
        require_same(weights.keys(), groups.keys())
        return {
            name: part
            for theirs, ours in groups.items()
            for name, part in zip(ours, weights[theirs].chunk(len(ours)), strict=True)
        }


def grouped(names: dict[str, str]) -> dict[str, list[str]]:
    """{ours: theirs} the other way round: {theirs: [ours, ...]}, in the order of the table."""
    groups: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        groups.setdefault(theirs, []).append(ours)
    return groups


def require_same(weights, names) -> None:
    """Refuse a table that does not name the weights of the model, all of them and no others."""
    if weights != names:
        raise ValueError(
            f"the name table does not fit the model: not in the table {sorted(weights - names)}, "
            f"not in the model {sorted(names - weights)}"
        )
