"""Tokenization of rows, of a data set with a cache or of a piece of a stream."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import datasets
from transformers import PreTrainedTokenizerBase

from .local_files import package_key
from .progress import show_progress_of

PASSING = ("truncation", "padding")  # parts of a fast tokenizer that its last call sets


class Tokenization(Protocol):
    """(rows by column, their indices) -> examples by column, not necessarily as many.

    ``features`` are those of the examples, None to infer them; ``key`` is equal for tokenizations with equal results,
    or None if unknown.
    """

    @property
    def features(self) -> datasets.Features | None: ...

    @property
    def key(self) -> str | None: ...

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> Mapping[str, list]: ...


def allow_forks() -> None:
    """If set explicitly, the tokenizers library does not warn when a data loader forks after it used threads."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def tokenization_key(tokenizer: PreTrainedTokenizerBase, *options: Any) -> str | None:
    """Return a hash of a tokenizer's content and of options; None for one that is not of the `tokenizers` library.

    `datasets` would hash the object, which also holds the folder that it was loaded from and the options of its last
    call: every run would tokenize again.
    """
    if not tokenizer.is_fast:
        return None
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    content = {name: part for name, part in state.items() if name not in PASSING}
    tokens = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    sides = tokenizer.truncation_side, tokenizer.model_input_names
    about = [type(tokenizer).__name__, content, tokens, sides, options]
    return hashlib.sha256(json.dumps(about, default=str).encode()).hexdigest()


def tokenized(
    rows: datasets.Dataset, tokenize: Tokenization, columns: Sequence[str] | None = None
) -> datasets.Dataset:
    """Return the examples of all rows, cached by `datasets` under the rows' fingerprint and ``tokenize.key``.

    Args:
        columns: columns of the rows that are dropped; default: all.

    Raises:
        ValueError: a row is invalid.
    """
    show_progress_of(rows)
    allow_forks()
    cached_as = None
    if tokenize.key is not None:
        cached_as = hashlib.sha256(f"{rows._fingerprint} {tokenize.key} {package_key()}".encode()).hexdigest()[:32]
    return rows.map(
        tokenize,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names if columns is None else list(columns),
        features=tokenize.features,
        new_fingerprint=cached_as,
    )
