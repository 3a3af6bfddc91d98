"""The checks of configurations. Every error names the field, its limit and the value it has."""

from collections.abc import Collection, Iterable, Mapping
from typing import Any


def require_at_least(config: Any, names: Iterable[str], least: float = 1) -> None:
    """Refuse a configuration in which a field of ``names`` is below ``least``."""
    for name in names:
        if getattr(config, name) < least:
            raise ValueError(f"{name} must be at least {least}, got {getattr(config, name)}")


def require_choice(config: Any, name: str, choices: Collection[str]) -> None:
    """Refuse a configuration in which the field ``name`` is none of ``choices``."""
    if getattr(config, name) not in choices:
        raise ValueError(f'{name} must be one of {", ".join(choices)}, got "{getattr(config, name)}"')


def require_multiple(config: Any, name: str, of: int, reason: str) -> None:
    """Refuse a configuration in which the field ``name`` is no multiple of a number that comes from ``reason``."""
    if getattr(config, name) % of:
        raise ValueError(f"{name} must be a multiple of {of} for {reason}, got {getattr(config, name)}")


def require_share(config: Any, names: Iterable[str]) -> None:
    """Refuse a configuration in which a field of ``names`` is outside [0, 1)."""
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")


def fields_of_size(sizes: Mapping[str, dict[str, Any]], size: str) -> dict[str, Any]:
    """The fields of a named size.

    Raises:
        ValueError: the size is not known.
    """
    if size not in sizes:
        raise ValueError(f'size must be one of {", ".join(sizes)}, got "{size}"')
    return sizes[size]
