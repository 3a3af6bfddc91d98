"""Text pairs from any data set, and the joint subword tokenizer of source and target.

load_dataset(...) -> {"source", "target"} strings -> byte-pair encoding -> {"input_ids", "labels"}
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .csv_files import separator_hint, written
from .progress import show_progress_of
from .source import describe_rows
from .source import gather as gather  # re-exported for the recipes, like the next two
from .source import load_splits as load_splits
from .source import take_split as take_split
from .tokens import tokenization_key, tokenized
from .vocabulary import cut_words

log = logging.getLogger(__name__)

EXTRA_LENGTH = 50  # a translation is at most the source length plus 50 tokens (Vaswani et al. 2017, section 6.1)

PAD, BOS, EOS, UNK, MASK = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")  # ids 0 to 4


def text_pairs(rows, source_column: str, target_column: str):
    """Return rows with only ``source`` and ``target`` texts; pairs with an empty side are dropped.

    Args:
        rows: a `datasets` split, streamed or not.
        source_column: a column, a dotted path into one, or a language in a column named "translation".
        target_column: like ``source_column``.

    Raises:
        ValueError: if there are no rows, a column is missing, a value is not a string, or all pairs have an empty
            side.
    """
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("the data set has no rows")
    if source_column == target_column:
        raise ValueError(f'source_column and target_column are the same, "{source_column}"')
    rows = written(rows, (source_column, target_column))
    first = next(iter(rows))
    paths = {
        "source": column_path(first, source_column, "source_column"),
        "target": column_path(first, target_column, "target_column"),
    }

    for side, path in paths.items():
        check_filled(rows, path, f"{side}_column")

    def pick(batch: Mapping[str, list], indices: list[int]) -> dict[str, list[str]]:
        sides = [texts_at(batch, indices, path) for path in paths.values()]
        full = [pair for pair in zip(*sides, strict=True) if all(side.strip() for side in pair)]
        return {side: [pair[place] for pair in full] for place, side in enumerate(paths)}

    show_progress_of(rows)
    pairs = rows.map(pick, batched=True, with_indices=True, remove_columns=list(first))
    if isinstance(rows, datasets.Dataset) and (empty := len(rows) - len(pairs)):
        if not len(pairs):
            raise ValueError(f'all {empty} pairs have an empty "{source_column}" or "{target_column}"')
        log.warning("%d of %d pairs have an empty source or target and are left out", empty, len(rows))
    return pairs


def column_path(row: Mapping, name: str, argument: str) -> list[str]:
    """Return the keys that lead to a text of a row.

    Raises:
        ValueError: if the column does not exist; the message lists the columns.
    """
    # "translation" is the usual column of `datasets`' Translation feature: a dict of languages.
    for path in ([name], name.split("."), ["translation", name]):
        value = row
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                break
            value = value[key]
        else:
            return path
    hint = separator_hint(leaves(row))
    raise ValueError(f'{argument} "{name}" is not a column of the data set; it has {", ".join(leaves(row))}{hint}')


def check_filled(rows: Any, path: list[str], argument: str) -> None:
    """Raise if a column holds nothing in a split: the files of the splits have different columns.

    Args:
        path: of `column_path`; only a column itself is looked at.

    Raises:
        ValueError: names the columns that hold something.
    """
    if len(path) > 1 or not isinstance(rows, datasets.Dataset):
        return

    def empty(column: str) -> bool:
        return rows.data.column(column).null_count == len(rows)

    if rows._indices is None and empty(path[0]):
        filled = [column for column in rows.column_names if not empty(column)]
        raise ValueError(
            f'{argument} "{path[0]}" is empty in all {len(rows)} rows of a split, whose columns are '
            f"{', '.join(filled) or 'all empty'}: files of the splits have different columns{separator_hint(filled)}"
        )


def leaves(row: Mapping, prefix: str = "") -> list[str]:
    """Return the columns of a row as dotted paths."""
    names = []
    for key, value in row.items():
        names += leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return names


def texts_at(batch: Mapping[str, list], indices: list[int], path: list[str]) -> list[str]:
    """Return the texts at ``path`` in a batch of rows.

    Raises:
        ValueError: if a value is not a string; the message names the row.
    """
    values = batch[path[0]]
    for key in path[1:]:
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    for index, value in zip(indices, values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f'column "{".".join(path)}" must hold text, got {value!r} in row {index}')
    return values


def fingerprint(rows: datasets.Dataset) -> str:
    """Return a hash of the rows' content, independent of how and where they are stored."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(sorted(rows.column_names)).iter(1000):
        digest.update(repr(batch).encode())
    return digest.hexdigest()[:16]


def describe(splits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Call `describe_rows` with the `fingerprint` of texts."""
    return describe_rows(splits, fingerprint)


def sentences(rows) -> Iterator[str]:
    """Yield all texts of both sides of text pairs."""
    for batch in rows.iter(1000):
        yield from batch["source"]
        yield from batch["target"]


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Train a joint byte-level byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) without unknown tokens.

    Args:
        texts: sentences of both sides.
        vocab_size: maximum vocabulary size, including special tokens and 256 bytes; a small corpus yields fewer
            tokens.
        lowercase: lower-case all text.

    Returns:
        A tokenizer that ends every sentence with ``</s>``.

    Raises:
        ValueError: if ``vocab_size`` is too small for the bytes.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes and special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC()] + ([normalizers.Lowercase()] if lowercase else [])
    tokenizer.normalizer = normalizers.Sequence(steps)
    words = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.pre_tokenizer = cut_words(words)
    # Words carry their leading space, which is not part of the text for the first word.
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL_TOKENS),
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.pre_tokenizer = words
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS}", pair=f"$A {EOS} $B {EOS}", special_tokens=[(EOS, SPECIAL_TOKENS.index(EOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        mask_token=MASK,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def word_count(text: str) -> int:
    """Return the number of words, separated by white space."""
    return len(text.split())


def pairs_of_length(rows, at_least: int | None, at_most: int | None, split: str):
    """Return the rows of `text_pairs` whose longer side has a number of words in a range.

    Args:
        at_least, at_most: limits, None for none.
        split: name of the rows, for the error.

    Raises:
        ValueError: there are none.
    """
    if at_least is None and at_most is None:
        return rows
    low, high = at_least or 0, float("inf") if at_most is None else at_most

    def fits(batch: dict) -> list[bool]:
        pairs = zip(batch["source"], batch["target"], strict=True)
        return [low <= max(word_count(source), word_count(target)) <= high for source, target in pairs]

    show_progress_of(rows)
    kept = rows.filter(fits, batched=True)
    if isinstance(rows, datasets.IterableDataset):
        return kept
    if not len(kept):
        limits = f"at least {at_least}" if at_most is None else f"at most {at_most}"
        raise ValueError(f'"{split}" has no pair whose longer side has {limits} words')
    return kept.flatten_indices()


class PairTokenization:
    """``source`` and ``target`` texts -> ``input_ids`` and ``labels``, each with its end token; a
    `tokens.Tokenization`.

    Pairs with a side longer than ``max_length`` tokens are dropped.
    """

    features = datasets.Features(dict.fromkeys(("input_ids", "labels"), datasets.Sequence(datasets.Value("int32"))))

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int):
        self.tokenizer, self.max_length = tokenizer, max_length
        self.key = tokenization_key(tokenizer, "pairs", max_length)

    def __call__(self, batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        sides = [self.tokenizer(batch[side])["input_ids"] for side in ("source", "target")]
        kept = [pair for pair in zip(*sides, strict=True) if max(map(len, pair)) <= self.max_length]
        return {name: [pair[place] for pair in kept] for place, name in enumerate(self.features)}


def tokenize_pairs(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> datasets.Dataset:
    """Return the examples of `PairTokenization` of all pairs, cached by `datasets`.

    Raises:
        ValueError: if all pairs are longer than ``max_length``.
    """
    kept = tokenized(rows, PairTokenization(tokenizer, max_length))
    if not len(kept):
        raise ValueError(f"all {len(rows)} pairs are longer than max_length = {max_length} tokens")
    if len(kept) < len(rows):
        log.warning(
            "%d of %d pairs are longer than max_length = %d tokens and are left out",
            len(rows) - len(kept),
            len(rows),
            max_length,
        )
    return kept


def pair_lengths(rows: datasets.Dataset) -> np.ndarray:
    """Return the number of source and target tokens, (N, 2)."""
    return np.stack([pc.list_value_length(rows.data.column(c)).to_numpy() for c in ("input_ids", "labels")], axis=1)


def pair_length(example: dict) -> tuple[int, int]:
    """Return the number of source and target tokens of one example."""
    return len(example["input_ids"]), len(example["labels"])
