"""Key-value cache under the argument name of the installed version of transformers.

`transformers` 5.24 renamed the argument and output ``past_key_values`` to ``cache``. Models here use ``cache``; their
public methods accept both names, and outputs use the one that `generate` expects.
"""

import inspect
import warnings
from collections.abc import Callable
from dataclasses import fields
from functools import wraps
from typing import Any

import torch
from transformers import Cache
from transformers.modeling_outputs import BaseModelOutputWithPast

OLD_NAME = "past_key_values"
CACHE_NAME = "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else OLD_NAME
CACHE_NAMES = ["cache", OLD_NAME]


def takes_cache(forward: Callable) -> Callable:
    """Decorate a method with an argument ``cache`` to accept ``past_key_values`` too.

    The old name issues a FutureWarning if the installed transformers uses the new one.

    Raises:
        ValueError: both are given.
    """

    @wraps(forward)
    def renamed(self, *args, **kwargs):
        if OLD_NAME in kwargs:
            if kwargs.get("cache") is not None:
                raise ValueError(f"cache and {OLD_NAME} are two names of one argument: give one of them")
            if OLD_NAME != CACHE_NAME and not torch.compiler.is_compiling():
                warnings.warn(f"`{OLD_NAME}` is deprecated: it is called `cache` now", FutureWarning, stacklevel=2)
            kwargs["cache"] = kwargs.pop(OLD_NAME)
        return forward(self, *args, **kwargs)

    renamed.__signature__ = inspect.signature(forward)  # `generate` inspects it at every token
    return renamed


def cache_of(output: Any) -> Cache | None:
    """Return the cache in a model's output."""
    return getattr(output, CACHE_NAME)
