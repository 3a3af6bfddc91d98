"""Conversion of single fields of annotation files; errors name the file, the entry, the field and its value.

Entry({"id": "7", "iscrowd": "no"}, file, "annotation 7") -> .identity("id") "7", .flag("iscrowd", False) False
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .files import read_bytes

FLAGS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
LARGEST = 2**63 - 1  # maximum int64
SHOWN = 60  # maximum number of characters of a value in an error message
REQUIRED = object()


def load_json(file: Path) -> Any:
    """Load a JSON file.

    Raises:
        ValueError: if it cannot be read or is not JSON; the message names the file.
    """
    try:
        return json.loads(read_bytes(file))
    except RecursionError:
        raise ValueError(f"{file} cannot be read as JSON: it is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def shown(value: Any) -> str:
    """Format a value for error messages, truncated to `SHOWN` characters."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer with thousands of digits
        text = type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@dataclass(frozen=True)
class Entry:
    """An object of an annotation file.

    Args:
        values: its fields.
        file: file that contains it, for error messages.
        name: name of the entry, for error messages.
    """

    values: Mapping[str, Any]
    file: Path | str
    name: str

    def error(self, key: str, wanted: str) -> ValueError:
        """Return the error for a field with an invalid value."""
        return ValueError(f'{self.file}, {self.name}: "{key}" must be {wanted}, got {shown(self.values.get(key))}')

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        """Return a field as stored; ``default`` if it is missing or null.

        Raises:
            ValueError: if it is missing and there is no default.
        """
        value = self.values.get(key)
        if value is not None:
            return value
        if default is not REQUIRED:
            return default
        if key in self.values:
            raise ValueError(f'{self.file}, {self.name}: "{key}" is null')
        have = ", ".join(map(str, self.values)) or "nothing"
        raise ValueError(f'{self.file}, {self.name} has no "{key}"; it has {have}')

    def identity(self, key: str) -> str:
        """Return an id, an integer or a string, as a string: annotations may refer to 7 as "7".

        Raises:
            ValueError: if it is missing or of another type.
        """
        return identity(self.value(key)) or self.fail(key, "an integer or text")

    def integer(self, key: str, default: Any = REQUIRED, least: int = -LARGEST, most: int = LARGEST) -> Any:
        """Return an integer, which may be stored as a string.

        Raises:
            ValueError: if it is missing, not an integer or out of range.
        """
        if (value := self.value(key, default)) is default:
            return value
        found = as_int64(identity(value) or "")
        if found is None:
            self.fail(key, "an integer of 64 bits")
        if not least <= found <= most:
            self.fail(key, f"in [{least}, {most}]" if most < LARGEST else f"at least {least}")
        return found

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """Return a number, which may be stored as a string and may be NaN or infinite.

        Raises:
            ValueError: if it is missing or not a number.
        """
        if (value := self.value(key, default)) is default:
            return value
        found = number(value)
        return self.fail(key, "a number") if found is None else found

    def text(self, key: str) -> str:
        """Return a non-empty string.

        Raises:
            ValueError: if it is missing, empty or of another type.
        """
        value = self.value(key)
        return value if is_text(value) and value.strip() else self.fail(key, "text that is not empty")

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        """Return a flag, stored as a boolean, 0 or 1, or "yes", "no", "true", "false", "0", "1".

        Raises:
            ValueError: if it is missing or anything else.
        """
        if (value := self.value(key, default)) is default:
            return value
        found = flag(value)
        return self.fail(key, "true or false") if found is None else found

    def box(self, key: str) -> list[float] | None:
        """Return four numbers; None for a null field or an empty list.

        Raises:
            ValueError: if it is missing or anything else.
        """
        value = self.value(key, REQUIRED if key not in self.values else None)
        if value is None or (isinstance(value, list) and not value):
            return None
        numbers = [number(side) for side in value] if isinstance(value, list | tuple) else []
        return self.fail(key, "four numbers") if len(numbers) != 4 or None in numbers else numbers

    def entries(self, key: str, name: str) -> list["Entry"]:
        """Return a list of objects, each named by its id or, without one, by its position.

        Raises:
            ValueError: if it is missing or anything else.
        """
        value = self.value(key)
        if not isinstance(value, list):
            self.fail(key, "a list of objects")
        for i, values in enumerate(value):
            if not isinstance(values, Mapping):
                raise ValueError(f'{self.file}: "{key}" must be a list of objects, got {shown(values)} at place {i}')
        names = (shown(values["id"]) if "id" in values else f"at place {i}" for i, values in enumerate(value))
        return [Entry(values, self.file, f"{name} {own}") for values, own in zip(value, names, strict=True)]

    def fail(self, key: str, wanted: str) -> Any:
        """Raise `error`."""
        raise self.error(key, wanted)


def is_text(value: Any) -> bool:
    """Return whether a value is a string that is valid as a file name and in Arrow."""
    try:
        return isinstance(value, str) and "\0" not in value and bool(value.encode() or True)
    except UnicodeEncodeError:  # an unpaired surrogate
        return False


def identity(value: Any) -> str | None:
    """Return an id as a string; None if it is not an id. Integral floats, as pandas writes integers, are integers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return str(value).strip() or None
    except ValueError:  # thousands of digits
        return None


def as_int64(text: str) -> int | None:
    """Parse a string as an integer; None if it is not one or exceeds 64 bits."""
    digits = text.removeprefix("-")
    if not (digits.isdecimal() and len(digits) <= len(str(LARGEST))):
        return None
    return int(text) if abs(int(text)) <= LARGEST else None


def number(value: Any) -> float | None:
    """Convert a number or numeric string to float; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def flag(value: Any) -> bool | None:
    """Convert any of the forms of `Entry.flag` to a bool; None for anything else."""
    if isinstance(value, bool):
        return value
    return FLAGS.get((identity(value) or "").lower())


def twice(values: list[Any]) -> Any | None:
    """Return the first value that occurs a second time; None if all are distinct."""
    seen: set[Any] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)
