"""Two-way mapping between one of our classes and a class of another library."""

from collections.abc import Callable, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel


def refuse(target: str, field: str, value: Any, needed: Any) -> NoReturn:
    """Raise a ValueError: ``target`` cannot express ``field=value``."""
    raise ValueError(f"{target} cannot express {field}={value!r}: it needs {needed!r}")


def require_fixed(target: str, config: Any, fixed: dict[str, Any]) -> None:
    """Refuse a configuration in which a field differs from the only value that ``target`` can express."""
    for field, value in fixed.items():
        if getattr(config, field) != value:
            refuse(target, field, getattr(config, field), value)


def carried(config: PreTrainedConfig, fields: tuple[str, ...]) -> dict[str, Any]:
    """Return those of ``fields`` that are set in the configuration, to be carried along in the other one."""
    return {field: getattr(config, field) for field in fields if getattr(config, field, None) is not None}


@dataclass(frozen=True)
class WeightsFile:
    """A pickled file of weights without a configuration, as authors and libraries publish them.

    Args:
        owner: whose files these are, in the words of an error message.
        matches: weights by name -> True if the file is of this kind.
        guess: (weights, training arguments or None, path) -> config.json of a folder that the conversion reads. A
            config.json next to the file takes precedence.
        rename: weights of the file -> weights of that folder; None if they are the same.
    """

    owner: str
    matches: Callable[[dict[str, Tensor]], bool]
    guess: Callable[[dict[str, Tensor], Any, Path], dict[str, Any]]
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None


@dataclass(frozen=True)
class Conversion:
    """Mapping of names and configurations between two classes that compute the same function.

    Args:
        name: user-facing name of the other class, as in ``--to marian``.
        ours: our class.
        theirs: class of the other library.
        to_theirs: our configuration -> theirs; a ValueError names a field that cannot be expressed.
        to_ours: their model -> our configuration; takes the model because some properties show only in the weights.
        names: our configuration -> {our weight name: their weight name} for all of our weights. Several of ours may
            map to one of theirs that concatenates them along the first dimension (a fused projection). None if our
            class reads their files, and writes them with ``save_original_format=True``.
        file_to_theirs, file_to_ours: convert the weights of one side's file to those of the other's, if ``names`` is
            None and the files differ in a few names.
        prepare: our model -> an equivalent model in a form that their class supports.
        zero_in_theirs: weights of theirs that are zero if ``names`` omits them.
        computed_in_theirs: weights that only their class has, and computes itself.
        unread_by_theirs: weights that their files may contain although their class does not use them; dropped.
        build, read, write: build their model from a configuration, read it from a folder, and write it to a folder, if
            it is not a class of transformers.
        carry_processor: (source folder, target folder, to_ours) -> None, converts the preprocessing and keeps other
            data that only one side has; None if both sides read the same files.
        claims: content of config.json -> True if it is of their class, for classes that share a model type, as those
            of timm; None for the class that is tried for all others.
        file: files of weights that `convert` also reads, as a folder of theirs.
        remarks: our configuration -> sentences for the certificate of a model of theirs, on differences that its
            inputs do not show.
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
    claims: Callable[[dict[str, Any]], bool] | None = None
    file: WeightsFile | None = None
    remarks: Callable[[Any], list[str]] | None = None

    def table(self, config: PreTrainedConfig) -> dict[str, str]:
        """Return {our weight name: their weight name} of our configuration.

        Raises:
            ValueError: the conversion has no ``names``.
        """
        if self.names is None:
            raise ValueError(f'the conversion "{self.name}" has no table of names: our class reads the same files')
        return self.names(config)

    def weights_to_theirs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the weights of our ``model`` under their names.

        Raises:
            ValueError: a weight of the model is missing from the table, or vice versa.
        """
        weights, names = model.state_dict(), self.table(model.config)
        require_same(weights.keys(), names.keys())
        return {
            theirs: weights[ours[0]] if len(ours) == 1 else torch.cat([weights[name] for name in ours])
            for theirs, ours in grouped(names).items()
        }

    def weights_to_ours(self, model: nn.Module, config: PreTrainedConfig) -> dict[str, Tensor]:
        """Return the weights of their ``model`` under our names; ``config`` is ours.

        Raises:
            ValueError: a weight of the model is missing from the table, or vice versa.
        """
        groups = grouped(self.table(config))
        only_theirs = {*self.zero_in_theirs, *self.computed_in_theirs} - groups.keys()
        weights = {name: weight for name, weight in model.state_dict().items() if name not in only_theirs}
        require_same(weights.keys(), groups.keys())
        return {
            name: part
            for theirs, ours in groups.items()
            for name, part in zip(ours, weights[theirs].chunk(len(ours)), strict=True)
        }


def grouped(names: dict[str, str]) -> dict[str, list[str]]:
    """Invert {ours: theirs} to {theirs: [ours, ...]}, in the order of the table."""
    groups: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        groups.setdefault(theirs, []).append(ours)
    return groups


def require_same(weights: Set[str], names: Set[str]) -> None:
    """Require that the table names exactly the weights of the model."""
    if weights != names:
        raise ValueError(
            f"the name table does not fit the model: not in the table {sorted(weights - names)}, "
            f"not in the model {sorted(names - weights)}"
        )
