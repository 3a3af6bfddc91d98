"""Reward functions: built-in rules, and functions of the user's own.

name | module:function -> function(prompts, completions, **columns) -> one reward per completion

The signature is that of trl's reward functions; ``columns`` are the other columns of the data set, as lists.
"""

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from ..data.spelled_numbers import spelling_reward
from ..values import closest

RewardFunction = Callable[..., Sequence[float]]


def exact_match_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Return 1 for a completion equal to the column ``completion``, apart from white space at its ends, else 0.

    Raises:
        ValueError: the data has no such column.
    """
    if "completion" not in columns:
        raise ValueError(f'reward "exact_match" needs a column "completion", the data has {", ".join(columns)}')
    return [float(a.strip() == b.strip()) for a, b in zip(completions, columns["completion"], strict=True)]


RULES: dict[str, RewardFunction] = {"spelling": spelling_reward, "exact_match": exact_match_reward}


def reward_function(argument: str, name: str) -> RewardFunction:
    """Return a reward function by its name in `RULES`, or as ``module:function``, which imports the module.

    A module is searched for in the current folder too.

    Args:
        argument: the option that names it, for errors.

    Raises:
        ValueError: there is no such function.
    """
    if name in RULES:
        return RULES[name]
    module, colon, function = name.partition(":")
    if not (colon and module and function):
        raise ValueError(
            f'{argument} must be one of {", ".join(RULES)} or "module:function", got "{name}"{closest(name, RULES)}'
        )
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f'{argument} "{name}": module {module} cannot be imported ({error})') from error
    if not callable(getattr(found, function, None)):
        raise ValueError(f'{argument} "{name}": module {module} has no function {function}')
    return getattr(found, function)


def call_reward(
    argument: str, name: str, prompts: Sequence[str], completions: Sequence[str], columns: dict[str, list]
) -> list[float]:
    """Return the rewards of completions by a function; other arguments as in `reward_function`.

    Raises:
        ValueError: it does not return one finite number per completion.
    """
    found = [float(value) for value in reward_function(argument, name)(prompts, completions, **columns)]
    if len(found) != len(completions):
        raise ValueError(f'{argument} "{name}" returned {len(found)} rewards for {len(completions)} completions')
    if wrong := [value for value in found if not math.isfinite(value)]:
        raise ValueError(f'{argument} "{name}" returned {wrong[0]}: rewards must be finite numbers')
    return found
