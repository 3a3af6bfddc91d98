"""Fields of annotation files, converted one by one; errors name the file, the entry, the field and its value.

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
LARGEST = 2**63 - 1  # an int64
SHOWN = 60  # letters of a value in an error
REQUIRED = object()


def load_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it cannot be read, or is not JSON; the error names the file.
    """
    try:
        return json.loads(read_bytes(file))
    except RecursionError:
        raise ValueError(f"{file} is not JSON that can be read: it is nested too deeply") from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from error


def shown(value: Any) -> str:
    """A value as errors print it, cut to a length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of thousands of digits
        text = type(value).__name__
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


@dataclass(frozen=True)
class Entry:
    """An object of an annotation file.

    Args:
        values: its fields.
        file: that holds it, for errors.
        name: of the entry, for errors.
    """

    values: Mapping[str, Any]
    file: Path | str
    name: str

    def error(self, key: str, wanted: str) -> ValueError:
        """A field has a value that it must not have."""
        return ValueError(f'{self.file}, {self.name}: "{key}" must be {wanted}, got {shown(self.values.get(key))}')

    def value(self, key: str, default: Any = REQUIRED) -> Any:
        """A field as it is stored; ``default`` where it is missing or null.

        Raises:
            ValueError: it is missing and there is no default.
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
        """An id, an integer or text, as text: annotations refer to 7 as "7" too.

        Raises:
            ValueError: it is missing, or neither.
        """
        return identity(self.value(key)) or self.fail(key, "an integer or text")

    def integer(self, key: str, default: Any = REQUIRED, least: int = -LARGEST, most: int = LARGEST) -> Any:
        """A whole number, also as text.

        Raises:
            ValueError: it is missing, not whole, or out of range.
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
        """A number, also as text; it may be NaN or infinite.

        Raises:
            ValueError: it is missing or something else.
        """
        if (value := self.value(key, default)) is default:
            return value
        found = number(value)
        return self.fail(key, "a number") if found is None else found

    def text(self, key: str) -> str:
        """Text that is not empty.

        Raises:
            ValueError: it is missing, empty or something else.
        """
        value = self.value(key)
        return value if is_text(value) and value.strip() else self.fail(key, "text that is not empty")

    def flag(self, key: str, default: Any = REQUIRED) -> Any:
        """True or false: a boolean, 0 or 1, or "yes", "no", "true", "false", "0", "1".

        Raises:
            ValueError: it is missing or something else.
        """
        if (value := self.value(key, default)) is default:
            return value
        found = flag(value)
        return self.fail(key, "true or false") if found is None else found

    def box(self, key: str) -> list[float] | None:
        """Four numbers; None of a field that is null or an empty list.

        Raises:
            ValueError: it is missing or something else.
        """
        value = self.value(key, REQUIRED if key not in self.values else None)
        if value is None or (isinstance(value, list) and not value):
            return None
        numbers = [number(side) for side in value] if isinstance(value, list | tuple) else []
        return self.fail(key, "four numbers") if len(numbers) != 4 or None in numbers else numbers

    def entries(self, key: str, name: str) -> list["Entry"]:
        """A list of objects, each called by its id or else its place.

        Raises:
            ValueError: it is missing or something else.
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
    """Whether a value is text that files can be called, and Arrow can store."""
    try:
        return isinstance(value, str) and "\0" not in value and bool(value.encode() or True)
    except UnicodeEncodeError:  # half of a surrogate pair
        return False


def identity(value: Any) -> str | None:
    """An id as text; None of what is no id. Whole floats, as pandas writes integers, are integers."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    try:
        return str(value).strip() or None
    except ValueError:  # thousands of digits
        return None


def as_int64(text: str) -> int | None:
    """The integer that a text is; None of other text, and of integers of more than 64 bits."""
    digits = text.removeprefix("-")
    if not (digits.isdecimal() and len(digits) <= len(str(LARGEST))):
        return None
    return int(text) if abs(int(text)) <= LARGEST else None


def number(value: Any) -> float | None:
    """A number, also as text; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except ValueError:
        return None


def flag(value: Any) -> bool | None:
    """True or false in any of the forms of `Entry.flag`; None of anything else."""
    if isinstance(value, bool):
        return value
    return FLAGS.get((identity(value) or "").lower())


def twice(values: list[Any]) -> Any | None:
    """The first value that is there before; None where all are distinct."""
    seen: set[Any] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)
