"""Text pairs from any data set, and the joint subword tokenizer of source and target.

load_dataset(...) -> {"source", "target"} strings -> byte-pair encoding -> {"input_ids", "labels"}
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .source import describe_rows, show_progress_of
from .source import gather as gather  # part of what recipes need of texts, like the next two
from .source import load_splits as load_splits
from .source import take_split as take_split

PAD, BOS, EOS, UNK, MASK = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>")  # ids 0 to 4


def text_pairs(rows, source_column: str, target_column: str):
    """Rows with the two texts alone, as ``source`` and ``target``.

    Args:
        rows: a `datasets` split, streamed or not.
        source_column: a column, a dotted path into one, or a language in a column named "translation".
        target_column: the same.

    Raises:
        ValueError: there are no rows, there is no such column, or a value in it is not text.
    """
    first = next(iter(rows), None)
    if first is None:
        raise ValueError("the data set has no rows")
    paths = {
        "source": column_path(first, source_column, "source_column"),
        "target": column_path(first, target_column, "target_column"),
    }

    def pick(batch: Mapping[str, list], indices: list[int]) -> dict[str, list[str]]:
        return {side: texts_at(batch, indices, path) for side, path in paths.items()}

    show_progress_of(rows)
    return rows.map(pick, batched=True, with_indices=True, remove_columns=list(first))


def column_path(row: Mapping, name: str, argument: str) -> list[str]:
    """The keys that lead to a text of a row.

    Raises:
        ValueError: they lead nowhere; the error names the columns there are.
    """
    # "translation" is `datasets`' own feature for text pairs: a column of languages.
    for path in ([name], name.split("."), ["translation", name]):
        value = row
        for key in path:
            if not isinstance(value, Mapping) or key not in value:
                break
            value = value[key]
        else:
            return path
    raise ValueError(f'{argument} "{name}" is not a column of the data set; it has {", ".join(leaves(row))}')


def leaves(row: Mapping, prefix: str = "") -> list[str]:
    """The columns of a row, as dotted paths."""
    names = []
    for key, value in row.items():
        names += leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [prefix + key]
    return names


def texts_at(batch: Mapping[str, list], indices: list[int], path: list[str]) -> list[str]:
    """The texts of a batch of rows that ``path`` leads to.

    Raises:
        ValueError: one is not text; the error names the row.
    """
    values = batch[path[0]]
    for key in path[1:]:
        values = [value.get(key) if isinstance(value, Mapping) else None for value in values]
    for index, value in zip(indices, values, strict=True):
        if not isinstance(value, str):
            raise ValueError(f'column "{".".join(path)}" must hold text, got {value!r} in row {index}')
    return values


def fingerprint(rows: datasets.Dataset) -> str:
    """A hash of the rows' content, the same wherever and however they are stored."""
    digest = hashlib.sha256()
    for batch in rows.select_columns(sorted(rows.column_names)).iter(1000):
        digest.update(repr(batch).encode())
    return digest.hexdigest()[:16]


def describe(splits: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """`describe_rows` with the `fingerprint` of texts."""
    return describe_rows(splits, fingerprint)


def sentences(rows) -> Iterator[str]:
    """All texts of both sides of text pairs."""
    for batch in rows.iter(1000):
        yield from batch["source"]
        yield from batch["target"]


def train_tokenizer(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> PreTrainedTokenizerFast:
    """Train a joint byte-pair encoding (Sennrich et al. 2016, arXiv:1508.07909) on bytes, so nothing is unknown.

    Args:
        texts: sentences of both sides.
        vocab_size: tokens, the special ones and 256 bytes among them; fewer come of a small corpus.
        lowercase: lower-case everything.

    Returns:
        A tokenizer that ends every sentence with ``</s>``.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes.
    """
    smallest = 256 + len(SPECIAL_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes and special tokens), got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    steps = [normalizers.NFC()] + ([normalizers.Lowercase()] if lowercase else [])
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    # Words carry their leading space; the first one's is not part of the text.
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


def tokenize_pairs(rows, tokenizer: PreTrainedTokenizerBase, max_length: int):
    """``source`` and ``target`` texts -> ``input_ids`` and ``labels``, each with its end token.

    Pairs with a side longer than ``max_length`` tokens are left out.
    """

    def tokenize(batch: dict) -> dict:
        return {
            "input_ids": tokenizer(batch["source"])["input_ids"],
            "labels": tokenizer(batch["target"])["input_ids"],
        }

    def short(batch: dict) -> list[bool]:
        pairs = zip(batch["input_ids"], batch["labels"], strict=True)
        return [max(len(source), len(target)) <= max_length for source, target in pairs]

    show_progress_of(rows)
    # Said in words, it quiets the tokenizers library, which warns when a data loader forks after it used its threads.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    rows = rows.map(tokenize, batched=True, remove_columns=["source", "target"]).filter(short, batched=True)
    return rows if isinstance(rows, datasets.IterableDataset) else rows.flatten_indices()


def pair_lengths(rows: datasets.Dataset) -> np.ndarray:
    """(N, 2) tokens of source and target."""
    return np.stack([pc.list_value_length(rows.data.column(c)).to_numpy() for c in ("input_ids", "labels")], axis=1)


def pair_length(example: dict) -> tuple[int, int]:
    """Tokens of source and target of one example."""
    return len(example["input_ids"]), len(example["labels"])
