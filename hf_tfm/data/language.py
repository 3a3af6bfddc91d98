"""Token sequences from running text, for language model pretraining.

load_dataset(...) -> {"text"} -> tokens -> {"input_ids"}: packed blocks, one row per text, or pairs of segments
"""

import logging
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
from .progress import show_progress_of
from .source import load_splits, take_split
from .text import check_filled, column_path, texts_at
from .tokens import tokenization_key, tokenized
from .vocabulary import tokenizer_name

log = logging.getLogger(__name__)

TEXT = "text"
Sequences = Literal["packed", "rows", "pairs"]


@dataclass(kw_only=True)
class Corpus:
    """An additional training corpus.

    Args:
        dataset_name: any data set that `datasets.load_dataset` accepts.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        text_column: text column, or a dotted path into one; default: "text" or the only string column.
        split: split of the data set.
    """

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    text_column: str | None = None
    split: str = "train"

    def __post_init__(self):
        conform_fields(self)

    def rows(self):
        """Load the texts, as `text_rows` returns them."""
        splits = load_splits(self.dataset_name, self.dataset_config, self.dataset_revision)
        return text_rows(take_split(splits, self.split, f"split of {self.dataset_name}"), self.text_column)


def text_rows(rows, text_column: str | None = None):
    """Return rows with a single column ``text``; rows that are empty or only whitespace are dropped.

    Args:
        rows: a `datasets` split, streamed or not.
        text_column: a column or a dotted path into one; default: "text" or the only string column.

    Raises:
        ValueError: if there are no rows, the column is missing or ambiguous, a value is not a string, or all texts are
            empty.
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
    check_filled(rows, path, "text_column")

    def pick(batch: Mapping[str, list], indices: list[int]) -> dict[str, list[str]]:
        return {TEXT: [text for text in texts_at(batch, indices, path) if text.strip()]}

    show_progress_of(rows)
    # The same features for every corpus, so that corpora can be concatenated.
    features = datasets.Features({TEXT: datasets.Value("string")})
    found = rows.map(pick, batched=True, with_indices=True, remove_columns=list(first), features=features)
    if isinstance(rows, datasets.Dataset) and (empty := len(rows) - len(found)):
        if not len(found):
            raise ValueError(f'all {empty} texts of column "{text_column}" are empty')
        log.info("%d of %d texts are empty and are left out", empty, len(rows))
    return found


class Texts:
    """A re-iterable over the texts of `text_rows`."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self) -> Iterator[str]:
        for batch in self.rows.iter(1000):
            yield from batch[TEXT]


class SequenceTokenization:
    """Texts -> sequences of at most ``max_length`` tokens, as ``input_ids``; a `tokens.Tokenization`.

    Texts are processed in batches, so once per batch a block may end early or a segment may be left over.

    Args:
        tokenizer: its special tokens are put around each sequence as around a text, [CLS] ... [SEP]. If it adds none,
            as for a decoder, blocks are cut without any.
        sequences: "packed" concatenates texts and cuts them into full blocks, with an end token after each document
            (Liu et al. 2019, arXiv:1907.11692, section 4.2); "rows" makes one truncated sequence per text; "pairs"
            takes two segments of a document and replaces the second by a random one in half of the pairs (Devlin et
            al. 2019, section 3.1). The columns ``second`` (where the second segment begins) and ``random`` describe
            the pair. After a document with a single segment the second one is always random.
        documents: whether each row is a document; if False, rows are pieces of a running text.
        seed: seed of the random second segments.

    Raises:
        ValueError: if the tokenizer has no end token, or ``max_length`` leaves no room for tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        sequences: Sequences = "packed",
        documents: bool = True,
        seed: int = 0,
    ):
        self.tokenizer, self.sequences, self.documents, self.seed = tokenizer, sequences, documents, seed
        self.around = SpecialTokens(tokenizer)
        ends = len(self.around.after) * (2 if sequences == "pairs" else 1)
        self.room = max_length - len(self.around.before) - ends
        if self.room < 2:
            raise ValueError(f"max_length must leave room for tokens other than the special ones, got {max_length}")
        columns = {"input_ids": datasets.Sequence(datasets.Value("int32"))}
        if sequences == "pairs":
            columns |= {"second": datasets.Value("int32"), "random": datasets.Value("bool")}
        self.features = datasets.Features(columns)
        options = (max_length, sequences, documents, seed if sequences == "pairs" else 0)
        self.key = tokenization_key(tokenizer, "sequences", *options)

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        around, room = self.around, self.room
        texts = self.tokenizer(batch[TEXT], add_special_tokens=False, return_attention_mask=False, verbose=False)
        ids = [np.array(row, dtype=np.int32) for row in texts["input_ids"] if row]
        if self.sequences == "rows":
            ends = ids if len(around.after) else [np.append(row, np.int32(around.end)) for row in ids]
            return {"input_ids": [around.wrap(row[:room]) for row in ends]}
        if self.sequences == "pairs":
            return segment_pairs(ids if self.documents else join(ids), around, room, rng(self.seed, indices[0]))
        packed = blocks(ids, around.end if self.documents else None, room)
        return {"input_ids": [around.wrap(block) for block in packed]}


def token_sequences(
    rows: datasets.Dataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    sequences: Sequences = "packed",
    documents: bool = True,
    seed: int = 0,
) -> datasets.Dataset:
    """Return the sequences of `SequenceTokenization` of all rows of `text_rows`, cached by `datasets`.

    Raises:
        ValueError: there are none; or see `SequenceTokenization`.
    """
    found = tokenized(rows, SequenceTokenization(tokenizer, max_length, sequences, documents, seed))
    if not len(found):
        raise ValueError(f"{len(rows)} texts give no sequence of up to max_length = {max_length} tokens")
    return found


class SpecialTokens:
    """The special tokens that a tokenizer adds before and after a text; `end` is the token that ends a document.

    Raises:
        ValueError: if there is no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        plain = tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = tokenizer("a")["input_ids"]
        start = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
        self.before = np.array(whole[:start], dtype=np.int32)
        self.after = np.array(whole[start + len(plain) :], dtype=np.int32)
        ends = [*self.after.tolist(), tokenizer.sep_token_id, tokenizer.eos_token_id]
        if not any(token is not None for token in ends):
            raise ValueError(f"{tokenizer_name(tokenizer)} has no token that ends a text (eos or sep)")
        self.end = next(token for token in ends if token is not None)

    def wrap(self, *segments: np.ndarray) -> np.ndarray:
        """Concatenate segments with special tokens: `before` once, `after` after each segment."""
        return np.concatenate([self.before, *(part for segment in segments for part in (segment, self.after))])


def join(ids: list[np.ndarray]) -> list[np.ndarray]:
    """Concatenate pieces of a running text."""
    return [np.concatenate(ids)] if ids else []


def blocks(ids: list[np.ndarray], end: int | None, size: int) -> list[np.ndarray]:
    """Concatenate texts, with ``end`` after each unless it is None, and cut them into blocks of ``size`` tokens."""
    if not ids:
        return []
    parts = ids if end is None else [np.append(row, np.int32(end)) for row in ids]
    stream = np.concatenate(parts)
    return [stream[start : start + size] for start in range(0, len(stream), size)]


def segment_pairs(
    documents: list[np.ndarray], around: SpecialTokens, room: int, random: np.random.Generator
) -> dict[str, list]:
    """Pair neighbouring segments of documents, replacing the second one by a random segment in half of the pairs."""
    half = room // 2
    pieces = [[text[i : i + half] for i in range(0, len(text), half)] for text in documents]
    segments = [(d, piece) for d, own in enumerate(pieces) for piece in own]
    rows: dict[str, list] = {"input_ids": [], "second": [], "random": []}
    for i in range(0, len(segments) - 1, 2):
        (document, first), (other, second) = segments[i], segments[i + 1]
        # A segment of the next document does not continue the first one.
        replaced = other != document or bool(random.integers(2))
        if replaced and other == document:
            second = segments[other_place(len(segments), i, random)][1]
        rows["input_ids"].append(around.wrap(first, second))
        rows["second"].append(len(around.before) + len(first) + len(around.after))
        rows["random"].append(replaced)
    return rows


def other_place(count: int, i: int, random: np.random.Generator) -> int:
    """Draw a number below ``count`` other than i and i + 1; returns i + 1 if there is none."""
    if count <= 2:
        return i + 1
    drawn = int(random.integers(count - 2))
    return drawn if drawn < i else drawn + 2


def sequence_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Return the number of tokens of each sequence, (N,)."""
    return pc.list_value_length(rows.data.column("input_ids")).to_numpy()


def sequence_length(example: dict[str, Any]) -> tuple[int]:
    """Return the number of tokens of one sequence."""
    return (len(example["input_ids"]),)
