"""What a conversion is: a two-way table between one of our classes and a class of another library."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel


def refuse(target: str, field: str, value: Any, needed: Any) -> NoReturn:
    """Say that ``target`` cannot express ``field=value``."""
    raise ValueError(f"{target} cannot express {field}={value!r}: it needs {needed!r}")


@dataclass(frozen=True)
class Conversion:
    """Names and configurations of two classes that compute the same.

    Args:
        name: what a user calls the other side, as in ``--to marian``.
        ours: our class.
        theirs: the class of the other library.
        names: our configuration -> {our weight name: their weight name}, all of ours, each to another.
        to_theirs: our configuration -> theirs; ValueError names a field that cannot be expressed.
        to_ours: their model -> our configuration; the model, because some of it shows in the weights alone.
        zero_in_theirs: weights that are zero in theirs where ``names`` leaves them out.
        computed_in_theirs: weights that only they have, fixed by their class.
    """

    name: str
    ours: type[PreTrainedModel]
    theirs: type[PreTrainedModel]
    names: Callable[[PreTrainedConfig], dict[str, str]]
    to_theirs: Callable[[PreTrainedConfig], PreTrainedConfig]
    to_ours: Callable[[PreTrainedModel], PreTrainedConfig]
    zero_in_theirs: tuple[str, ...] = ()
    computed_in_theirs: tuple[str, ...] = ()

    def weights_to_theirs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """Weights of our ``model`` under their names.

        Raises:
            ValueError: a weight of the model is not in the table, or the reverse.
        """
        return rename(model.state_dict(), self.names(model.config))

    def weights_to_ours(self, model: PreTrainedModel, config: PreTrainedConfig) -> dict[str, Tensor]:
        """Weights of their ``model`` under our names; ``config`` is ours.

        Raises:
            ValueError: a weight of the model is not in the table, or the reverse.
        """
        table = {theirs: ours for ours, theirs in self.names(config).items()}
        only_theirs = {*self.zero_in_theirs, *self.computed_in_theirs} - table.keys()
        return rename({name: w for name, w in model.state_dict().items() if name not in only_theirs}, table)


def rename(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    """``weights`` under the names that ``names`` gives, {old: new}.

    Raises:
        ValueError: the two do not name the same weights.
    """
    if weights.keys() != names.keys():
        raise ValueError(
            f"the name table does not fit the model: not in the table {sorted(weights.keys() - names.keys())}, "
            f"not in the model {sorted(names.keys() - weights.keys())}"
        )
    return {names[name]: weight for name, weight in weights.items()}
