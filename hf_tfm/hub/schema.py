"""Validation of JSON data against type annotations, with errors that give the location."""

import math
import types
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict


def check_keys(value: Any, required: set[str], known: set[str], where: str) -> None:
    """Refuse anything but a mapping with all ``required`` and only ``known`` keys."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be a mapping, got {value!r}")
    if missing := sorted(required - value.keys()):
        raise ValueError(f"{where} has no {missing[0]}")
    if unknown := sorted(value.keys() - known):
        raise ValueError(f"{where} has an unknown field {unknown[0]}; known: {', '.join(sorted(known))}")


def check_type(value: Any, kind: Any, where: str) -> None:
    """Refuse a value that does not match the annotation; ``where`` is its location, for example "data.rows.train".

    Numbers must be finite, as in JSON, and booleans are not numbers.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return
    if is_typeddict(kind):
        hints = get_type_hints(kind)
        check_keys(value, set(kind.__required_keys__), set(hints), where)
        for key, item in value.items():
            check_type(item, hints[key], f"{where}.{key}")
    elif origin in (Union, types.UnionType):
        # Recurse into the union member whose outer type fits, so that an error gives the location inside it.
        fits = [member for member in arguments if isinstance(value, outer_types(member))]
        if not fits:
            raise ValueError(f"{where} must be {describe_type(kind)}, got {value!r}")
        check_type(value, fits[0], where)
    elif not isinstance(value, outer_types(kind)) or (isinstance(value, bool) and kind in (int, float)):
        raise ValueError(f"{where} must be {describe_type(kind)}, got {value!r}")
    elif origin is dict:
        for key, item in value.items():
            check_type(key, arguments[0], f"a key of {where}")
            check_type(item, arguments[1], f"{where}.{key}")
    elif origin is list:
        for index, item in enumerate(value):
            check_type(item, arguments[0], f"{where}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{where} must be finite, got {value}")


def outer_types(kind: Any) -> type | tuple[type, ...]:
    """Return the `isinstance` argument for an annotation."""
    if kind is float:
        return (float, int)
    return dict if is_typeddict(kind) else get_origin(kind) or kind


def describe_type(kind: Any) -> str:
    """Describe an annotation, for example "text or null"."""
    if get_args(kind) and get_origin(kind) in (Union, types.UnionType):
        return " or ".join(describe_type(member) for member in get_args(kind))
    words = {str: "text", int: "a whole number", float: "a number", dict: "a mapping", list: "a list"}
    return words.get(get_origin(kind) or kind, "null")
