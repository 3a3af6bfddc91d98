"""Check values against type annotations, for options from Python, YAML and the command line alike.

annotation, value -> the value, converted if that is lossless (a path to a string, a list to a tuple), or a ValueError

Every error is a single line with the option, its value and the valid values.
"""

import difflib
import functools
import inspect
import json
import math
import numbers
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, cast, get_args, get_origin, get_type_hints

INTEGER_LIMIT = 2**63  # Arrow, numpy and torch use 64-bit integers
LONGEST_SHOWN = 100  # characters of a value in an error message
# Options that may name local files or folders, in which "~" is expanded to a home directory.
PATHS = {
    *("output_dir", "dataset_name", "dataset", "model_name_or_path", "model", "teacher", "tokenizer", "data_files"),
    *("models", "cache", "output", "folder", "beside", "image", "images", "file", "weights"),
    *("reward_model", "reference_model"),
    "calibration_data",
}

Function = TypeVar("Function", bound=Callable[..., Any])


def shown(value: Any) -> str:
    """Format a value for a one-line error: strings quoted and escaped, long values truncated."""
    try:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    except Exception:  # Python refuses to print longer integers; the repr of other classes may raise anything
        text = "an integer of more than 4,300 digits" if isinstance(value, int) else f"a {type(value).__name__}"
    text = " ".join(text.split())
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def one_line(text: object) -> str:
    """Join the lines of a message."""
    return " ".join(str(text).split())


def closest(name: object, known: Iterable[str]) -> str:
    """Suggest the most similar known name, as the end of an error about an unknown name; "" if there is none."""
    found = difflib.get_close_matches(str(name), [str(one) for one in known], n=1, cutoff=0.6)
    return f"; did you mean {found[0]}?" if found else ""


def expected(hint: Any) -> str:
    """Describe the values that an annotation allows."""
    arguments = get_args(hint)
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(
            dict.fromkeys(expected(one) for one in sorted(arguments, key=lambda one: one is type(None)))
        )
    if origin is Literal:
        return f"one of {', '.join(str(choice) for choice in arguments)}"
    if origin is tuple and arguments[-1] is not Ellipsis:
        return f"a list of {len(arguments)} {plural(arguments[0])}"
    if origin in (list, tuple):
        return f"a list of {plural(arguments[0])}"
    if origin is dict or hint is dict or is_dataclass(hint):
        return "a mapping of names to values"
    names = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string", type(None): "null"}
    return names.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def plural(hint: Any) -> str:
    """Describe the items of a list."""
    names = {int: "integers", float: "finite numbers", str: "strings", bool: "booleans", Any: "values"}
    return names.get(hint) or f"items, each {expected(hint)}"


def conform(name: str, value: Any, hint: Any) -> Any:
    """Check a value against an annotation, and convert it to the annotated type.

    Accepted as equivalent are integers for floats, numpy numbers for Python's, paths for strings, tuples for lists and
    vice versa, and mappings for dataclasses. Booleans are not numbers, floats not integers, and strings neither.

    Args:
        name: name of the option, for errors.
        hint: an annotation: int, float, bool, str, None, Literal, unions, lists, tuples, dicts and dataclasses of
            those; values of ``Any`` and instances of other classes are returned unchanged.

    Raises:
        ValueError: the value has the wrong type or length, is not finite, is not a valid choice, or is blank text.
    """
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if origin in (Union, types.UnionType):
        return conform_to_any(name, value, hint)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
        near = closest(value, arguments) if isinstance(value, str) else ""
        if value is False and "no" in arguments:
            near = "; quote it in YAML, where an unquoted no is false"
        raise ValueError(f"{name} must be {expected(hint)}, got {shown(value)}{near}")
    if origin in (list, tuple):
        return conform_items(name, value, hint)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be {expected(hint)}, got {shown(value)}")
        return {
            conform(f"a key of {name}", key, arguments[0]): conform(f"{name}.{key}", part, arguments[1])
            for key, part in value.items()
        }
    if is_dataclass(hint):
        return conform_to_dataclass(name, value, hint)
    return conform_to_class(name, value, hint)


def conform_to_class(name: str, value: Any, hint: Any) -> Any:
    """Apply `conform` to a plain class."""
    if hint is type(None) and value is None:
        return None
    if hint is bool and isinstance(value, bool):
        return value
    if hint is int and isinstance(value, numbers.Integral) and not isinstance(value, bool):
        if not -INTEGER_LIMIT <= int(value) < INTEGER_LIMIT:
            raise ValueError(f"{name} must be a 64-bit integer, got {shown(value)}")
        return value if type(value) is int else int(value)
    if hint is float and isinstance(value, numbers.Real) and not isinstance(value, bool) and finite(value):
        return value if type(value) in (int, float) else float(value)
    if hint is str and isinstance(value, (str, os.PathLike)):
        text = os.fspath(value)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"{name} must be a string that is not empty or blank, got {shown(value)}")
        if "\0" in text:
            raise ValueError(f"{name} must not contain null characters, got {shown(value)}")
        return expanded(name, text) if text[0] == "~" and set(re.split(r"[.\[]", name)) & PATHS else text
    if hint not in (int, float, bool, str, type(None)) and (not isinstance(hint, type) or isinstance(value, hint)):
        return value
    raise ValueError(f"{name} must be {expected(hint)}, got {shown(value)}")


def expanded(name: str, path: str) -> str:
    """Expand "~" or "~USER" at the start of a path to the home directory.

    Raises:
        ValueError: there is no such user.
    """
    found = os.path.expanduser(path)
    if found.startswith("~"):
        raise ValueError(f'{name} "{path}": there is no such user; write "./{path}" for a path that begins with ~')
    return found


def finite(value: Any) -> bool:
    """Return True if a number is finite as a float."""
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer above the largest float
        return False


def conform_to_any(name: str, value: Any, hint: Any) -> Any:
    """Apply `conform` to a union: the first matching alternative wins.

    If exactly one alternative has the value's kind, the error is that of this alternative; otherwise it lists all.
    """
    alternatives = get_args(hint)
    errors = []
    for alternative in alternatives:
        try:
            return conform(name, value, alternative)
        except ValueError as error:
            inside = not str(error).startswith(f"{name} must ")  # the error concerns a part of the value
            if inside or (alternative is str and isinstance(value, str)):
                errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    near = closest(value, literals(hint)) if isinstance(value, str) else ""
    raise ValueError(f"{name} must be {expected(hint)}, got {shown(value)}{near}")


def literals(hint: Any) -> tuple[Any, ...]:
    """Return the choices of a Literal, or of those in a union."""
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(choice for one in get_args(hint) for choice in literals(one))
    return get_args(hint) if get_origin(hint) is Literal else ()


def conform_items(name: str, value: Any, hint: Any) -> Any:
    """Apply `conform` to a list or a tuple."""
    kind, arguments = get_origin(hint), get_args(hint)
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name} must be {expected(hint)}, got {shown(value)}")
    if kind is tuple and arguments[-1] is not Ellipsis:
        if len(value) != len(arguments):
            raise ValueError(f"{name} must be {expected(hint)}, got {len(value)}: {shown(value)}")
        hints: Sequence[Any] = arguments
    else:
        hints = [arguments[0]] * len(value)
    found = [conform(f"{name}[{i}]", item, one) for i, (item, one) in enumerate(zip(value, hints, strict=True))]
    same = type(value) is kind and all(new is old for new, old in zip(found, value, strict=True))
    return value if same else kind(found)


def conform_to_dataclass(name: str, value: Any, kind: Any) -> Any:
    """Apply `conform` to a dataclass: an instance, or a mapping of its fields."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be {expected(kind)}, got {shown(value)}")
    known = {one.name: one for one in fields(kind)}
    for key in value:
        if key not in known:
            raise ValueError(f"{name}.{key} is not an option{closest(key, known)} ({name} has {', '.join(known)})")
    for one in known.values():
        if one.default is MISSING and one.default_factory is MISSING and one.name not in value:
            raise ValueError(f"{name} needs {one.name}, got {shown(dict(value))}")
    try:
        return kind(**value)
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error


cached_type_hints = functools.lru_cache(maxsize=256)(get_type_hints)


def hints_of(kind: Any) -> dict[str, Any]:
    """Return the resolved annotations of a class or function."""
    return cached_type_hints(kind)


def conform_fields(options: Any) -> None:
    """Check every field of a dataclass, frozen or not, against its annotation, and convert it; see `conform`.

    Call it first in ``__post_init__``.

    Raises:
        ValueError: a field has a value that its annotation does not allow.
    """
    hints = hints_of(type(options))
    for one in fields(options):
        value = getattr(options, one.name)
        found = conform(one.name, value, hints[one.name])
        if found is not value:
            object.__setattr__(options, one.name, found)


def check_bounds(name: str, value: Any, least: float | None = None, most: float | None = None) -> None:
    """Check a number, or each of several, against bounds; None is accepted.

    Raises:
        ValueError: it is out of bounds.
    """
    if isinstance(value, (list, tuple)):
        for i, one in enumerate(value):
            check_bounds(f"{name}[{i}]", one, least, most)
        return
    if value is None:
        return
    if least is not None and not value >= least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if most is not None and not value <= most:
        raise ValueError(f"{name} must be at most {most:,}, got {shown(value)}")


def checked(**bounds: tuple[float | None, float | None]) -> Callable[[Function], Function]:
    """Decorate a function to check its arguments against annotations and bounds.

    Args:
        bounds: (minimum, maximum) by argument; None for no limit.

    Raises:
        ValueError: when the decorated function is called, before it runs; see `conform` and `check_bounds`.
        TypeError: when the decorated function is called with a missing or unknown argument.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)

        @functools.wraps(function)
        def checking(*args: Any, **kwargs: Any) -> Any:
            hints = hints_of(function)
            bound = signature.bind(*args, **kwargs)
            for name, value in bound.arguments.items():
                kind = signature.parameters[name].kind
                if name not in hints or kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
                    continue
                bound.arguments[name] = conform(name, value, hints[name])
                check_bounds(name, bound.arguments[name], *bounds.get(name, (None, None)))
            return function(*bound.args, **bound.kwargs)

        return cast(Function, checking)

    return decorate
