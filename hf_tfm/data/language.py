"""Sequences of tokens from running text, to pretrain a language model on.

load_dataset(...) -> {"text"} -> tokens -> {"input_ids"}: packed blocks, a row each, or pairs of segments
"""

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import datasets
import numpy as np
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

from ..values import conform_fields
from .batching import rng
from .csv_files import written
from .source import load_splits, show_progress_of, take_split
from .text import column_path, texts_at

log = logging.getLogger(__name__)

TEXT = "text"
Sequences = Literal["packed", "rows", "pairs"]


@dataclass(kw_only=True)
class Corpus:
    """Texts to learn from beside the main ones.

    Args:
        dataset_name: what `datasets.load_dataset` takes.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        text_column: see `text_rows`.
        split: of the data set.
    """

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    text_column: str | None = None
    split: str = "train"

    def __post_init__(self):
        conform_fields(self)

    def rows(self):
        """Its texts, as `text_rows` gives them."""
        splits = load_splits(self.dataset_name, self.dataset_config, self.dataset_revision)
        return text_rows(take_split(splits, self.split, f"split of {self.dataset_name}"), self.text_column)


def text_rows(rows, text_column: str | None = None):
    """Rows with one text each, as ``text``; rows of nothing but white space are left out.

    Args:
        rows: a `datasets` split, streamed or not.
        text_column: a column or a dotted path into one; default, "text" or the only column of strings.

    Raises:
        ValueError: there are no rows, there is no such column or several that could be meant, a value in it is not
            text, or all are empty.
    """
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("the data set has no rows")
    if text_column is None:
        strings = [name for name, value in first.items() if isinstance(value, str)]
        if TEXT not in strings and len(strings) != 1:
            raise ValueError(f"text_column must be given: the columns of strings are {', '.join(strings) or 'none'}")
        text_column = TEXT if TEXT in strings else strings[0]
    rows = written(rows, [text_column])
    first = next(iter(rows))
    path = column_path(first, text_column, "text_column")

    def pick(batch: Mapping[str, list], indices: list[int]) -> dict[str, list[str]]:
        return {TEXT: [text for text in texts_at(batch, indices, path) if text.strip()]}

    show_progress_of(rows)
    features = datasets.Features({TEXT: datasets.Value("string")})  # the same of every corpus, so that they join
    found = rows.map(pick, batched=True, with_indices=True, remove_columns=list(first), features=features)
    if isinstance(rows, datasets.Dataset) and (empty := len(rows) - len(found)):
        if not len(found):
            raise ValueError(f'all {empty} texts of column "{text_column}" are empty')
        log.info("%d of %d texts are empty and are left out", empty, len(rows))
    return found


class Texts:
    """The texts of `text_rows`, as often as they are wanted."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self) -> Iterator[str]:
        for batch in self.rows.iter(1000):
            yield from batch[TEXT]


def token_sequences(
    rows,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    sequences: Sequences = "packed",
    documents: bool = True,
    seed: int = 0,
):
    """Texts -> sequences of at most ``max_length`` tokens, as ``input_ids``.

    Texts are taken a thousand at a time, so once in a thousand rows a block may end early, or a segment be left over.

    Args:
        rows: of `text_rows`.
        tokenizer: its special tokens stand around a sequence as around a text, [CLS] ... [SEP]. Where it adds none,
            as a decoder's, blocks are cut right through.
        sequences: "packed", text after text cut into full blocks, with an end token after each document (Liu et al.
            2019, arXiv:1907.11692, section 4.2); "rows", a text each, cut off at the end; "pairs", two segments of a
            document, the second in half of the pairs a random one, as ``second`` (where it begins) and ``random`` say
            (Devlin et al. 2019, section 3.1); it is always random after a document of one segment.
        documents: each row is a document; False: rows are pieces of a running text.
        seed: of the random second segments.

    Raises:
        ValueError: the tokenizer has no token that ends a text, or ``max_length`` leaves no room for tokens.
    """
    around = SpecialTokens(tokenizer)
    room = max_length - len(around.before) - len(around.after) * (2 if sequences == "pairs" else 1)
    if room < 2:
        raise ValueError(f"max_length must leave room for tokens beside the special ones, got {max_length}")
    columns = {"input_ids": datasets.Sequence(datasets.Value("int32"))}
    if sequences == "pairs":
        columns |= {"second": datasets.Value("int32"), "random": datasets.Value("bool")}

    def make(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        texts = tokenizer(batch[TEXT], add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = [np.array(row, dtype=np.int32) for row in texts["input_ids"] if row]
        if sequences == "rows":
            ends = ids if len(around.after) else [np.append(row, np.int32(around.end)) for row in ids]
            return {"input_ids": [around.wrap(row[:room]) for row in ends]}
        if sequences == "pairs":
            return segment_pairs(ids if documents else join(ids), around, room, rng(seed, indices[0]))
        packed = blocks(ids, around.end if documents else None, room)
        return {"input_ids": [around.wrap(block) for block in packed]}

    show_progress_of(rows)
    # Said in words, it quiets the tokenizers library, which warns when a data loader forks after it used its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    found = rows.map(make, batched=True, with_indices=True, remove_columns=[TEXT], features=datasets.Features(columns))
    if isinstance(rows, datasets.Dataset) and not len(found):
        raise ValueError(f"{len(rows)} texts give no sequence of up to max_length = {max_length} tokens")
    return found


class SpecialTokens:
    """The tokens a tokenizer puts before and after a text; `end` is the one that ends a document.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.before = np.array(whole[:start], dtype=np.int32)
        self.after = np.array(whole[start + len(plain) :], dtype=np.int32)
        ends = [*self.after.tolist(), tokenizer.sep_token_id, tokenizer.eos_token_id]
        if not any(token is not None for token in ends):
            raise ValueError(f'tokenizer "{tokenizer.name_or_path}" has no token that ends a text (eos or sep)')
        self.end = next(token for token in ends if token is not None)

    def wrap(self, *segments: np.ndarray) -> np.ndarray:
        """Segments with the special tokens around them, those after each."""
        return np.concatenate([self.before, *(part for segment in segments for part in (segment, self.after))])


def join(ids: list[np.ndarray]) -> list[np.ndarray]:
    """Pieces of a running text as one."""
    return [np.concatenate(ids)] if ids else []


def blocks(ids: list[np.ndarray], end: int | None, size: int) -> list[np.ndarray]:
    """Texts one after the other, with ``end`` after each if there is one, cut into blocks of ``size`` tokens."""
    if not ids:
        return []
    parts = ids if end is None else [np.append(row, np.int32(end)) for row in ids]
    stream = np.concatenate(parts)
    return [stream[start : start + size] for start in range(0, len(stream), size)]


def segment_pairs(
    documents: list[np.ndarray], around: SpecialTokens, room: int, random: np.random.Generator
) -> dict[str, list]:
    """Neighbouring segments of documents, the second replaced by one of another place in half of the pairs."""
    half = room // 2
    pieces = [[text[i : i + half] for i in range(0, len(text), half)] for text in documents]
    segments = [(d, piece) for d, own in enumerate(pieces) for piece in own]
    rows: dict[str, list] = {"input_ids": [], "second": [], "random": []}
    for i in range(0, len(segments) - 1, 2):
        (document, first), (other, second) = segments[i], segments[i + 1]
        replaced = other != document or bool(random.integers(2))  # the next document's segment does not follow
        if replaced and other == document:
            second = segments[other_place(len(segments), i, random)][1]
        rows["input_ids"].append(around.wrap(first, second))
        rows["second"].append(len(around.before) + len(first) + len(around.after))
        rows["random"].append(replaced)
    return rows


def other_place(count: int, i: int, random: np.random.Generator) -> int:
    """A number below ``count`` that is neither i nor i + 1; i + 1 where there is no other."""
    if count <= 2:
        return i + 1
    drawn = int(random.integers(count - 2))
    return drawn if drawn < i else drawn + 2


def sequence_lengths(rows: datasets.Dataset) -> np.ndarray:
    """(N,) tokens of each sequence."""
    return pc.list_value_length(rows.data.column("input_ids")).to_numpy()


def sequence_length(example: dict[str, Any]) -> tuple[int]:
    """Tokens of one sequence."""
    return (len(example["input_ids"]),)
