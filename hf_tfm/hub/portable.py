"""Text of records and cards that travel: no paths of this machine, and no markup from names that others chose.

str, dict or list -> paths made relative or cut to their last part
any value -> one line for Markdown prose, or for a code span
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

LONGEST = 200
# An absolute path or one of a home folder, alone or in a longer word: --config=/home/me/a.yaml, {"train": "/data/x"}.
PATH = re.compile(r"(?<![\w/:.~-])(?:~[\w.-]*)?/[^\s\"',;\]})]+|(?<![\w/])~[\w.-]*(?=$|[\s\"',])")
MARKUP = re.compile(r"([\\`*\[\]#!])")
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


def short_path(path: str) -> str:
    """An absolute path relative to the working directory, or its last part where it lies elsewhere."""
    whole = Path(os.path.expanduser(path))
    if not whole.is_absolute():
        return path
    here = Path.cwd()
    if whole != here and whole.is_relative_to(here):
        return str(whole.relative_to(here))
    return whole.name or "."


def portable(value: Any) -> Any:
    """The same value with every absolute path in its strings shortened, see `short_path`; keys stay."""
    if isinstance(value, dict):
        return {name: portable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(portable(item) for item in value)
    if isinstance(value, Path):
        return short_path(str(value))
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")) and "\n" not in value:  # a path alone, which may hold spaces
        return short_path(value)
    return PATH.sub(lambda found: short_path(found[0]), value)


def portable_command(command: str) -> str:
    """A command line with every path in it shortened."""
    try:
        return shlex.join(portable(shlex.split(command)))
    except ValueError:  # not one that shlex wrote
        return portable(command)


def plain(value: Any, longest: int = LONGEST) -> str:
    """A value as one line of Markdown that shows it as it is: no links, pictures, headings, code or HTML."""
    text = " ".join(str(value).split())
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return MARKUP.sub(r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


def code(value: Any, longest: int = LONGEST) -> str:
    """A value in a Markdown code span."""
    text = " ".join(str(value).split()).replace("`", "'")
    return f"`{text if len(text) <= longest else text[: longest - 3] + '...'}`"


def fenced(text: str) -> str:
    """Lines for a fenced code block, without a fence of their own."""
    return text.replace("```", "'''")


def licence_id(value: Any) -> str | None:
    """A licence's short id as the Hub has them, such as "apache-2.0"; None where the value is no such id."""
    return value.lower() if isinstance(value, str) and LICENCE.fullmatch(value) else None
