"""Make text of records and cards safe to publish: no local paths, and no markup from user-chosen names.

str, dict or list -> paths made relative or cut to their last part
any value -> one line for Markdown prose, or for a code span
"""

import os
import re
import shlex
from pathlib import Path
from typing import Any

LONGEST = 200
# An absolute or home-relative path, alone or inside a word: --config=/home/me/a.yaml, {"train": "/data/x"}.
PATH = re.compile(r"(?<![\w/:.~-])(?:~[\w.-]*)?/[^\s\"',;\]})]+|(?<![\w/])~[\w.-]*(?=$|[\s\"',])")
MARKUP = re.compile(r"([\\`*\[\]#!])")
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")


def short_path(path: str) -> str:
    """Make an absolute path relative to the working directory, or reduce it to its last part if it lies elsewhere."""
    whole = Path(os.path.expanduser(path))
    if not whole.is_absolute():
        return path
    here = Path.cwd()
    if whole != here and whole.is_relative_to(here):
        return str(whole.relative_to(here))
    return whole.name or "."


def portable(value: Any) -> Any:
    """Shorten every absolute path in the strings of a value, see `short_path`; dictionary keys are unchanged."""
    if isinstance(value, dict):
        return {name: portable(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(portable(item) for item in value)
    if isinstance(value, Path):
        return short_path(str(value))
    if not isinstance(value, str):
        return value
    if value.startswith(("/", "~")) and "\n" not in value:  # the whole string is a path, possibly with spaces
        return short_path(value)
    return PATH.sub(lambda found: short_path(found[0]), value)


def portable_command(command: str) -> str:
    """Shorten every path in a command line."""
    try:
        return shlex.join(portable(shlex.split(command)))
    except ValueError:  # not valid shell syntax
        return portable(command)


def plain(value: Any, longest: int = LONGEST) -> str:
    """Escape a value as one line of Markdown: no links, images, headings, code or HTML."""
    text = " ".join(str(value).split())
    text = text if len(text) <= longest else f"{text[: longest - 3]}..."
    return MARKUP.sub(r"\\\1", text).replace("<", "&lt;").replace(">", "&gt;")


def code(value: Any, longest: int = LONGEST) -> str:
    """Format a value as a Markdown code span."""
    text = " ".join(str(value).split()).replace("`", "'")
    return f"`{text if len(text) <= longest else text[: longest - 3] + '...'}`"


def fenced(text: str) -> str:
    """Escape code fences in the content of a fenced code block."""
    return text.replace("```", "'''")


def licence_id(value: Any) -> str | None:
    """Return the value as a Hub licence id such as "apache-2.0"; None if it is not an id."""
    return value.lower() if isinstance(value, str) and LICENCE.fullmatch(value) else None
