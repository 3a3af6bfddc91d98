"""Checks of texts: type, content, characters, tokens, lengths, and duplicates within and between splits."""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from .data_case import DataCase, DataSplit
from .findings import Finding, failed, graded, ok, skipped, warning

MOSTLY = 0.5  # fraction of rows above which a check fails
SOME = 0.01  # fraction of rows above which a fault gets a warning
MANY_COPIES = 0.1  # fraction of a held-out split in the training split above which its scores are meaningless
TOKENIZED = 2_000  # number of evenly spaced texts of a split to tokenize
UNKNOWN, MANY_UNKNOWN = 0.001, 0.05  # fractions of tokens
LOPSIDED = 9  # maximum length ratio of a pair, in characters (as in the corpus cleaning of Moses)
DAMAGED = ("\ufffd", "Ã¤", "Ã¶", "Ã¼", "Ã©", "â€", "ÃŸ")  # replacement character; UTF-8 decoded as Latin-1


def rows_where(flags: Any) -> np.ndarray:
    """Return the row numbers of the true values."""
    return np.flatnonzero(np.fromiter(flags, dtype=bool))


def text_kind(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """All values of text columns are strings."""
    for part, values in split.texts.items():
        wrong = rows_where(not isinstance(value, str) for value in values)
        if len(wrong):
            kinds = sorted({type(values[row]).__name__ for row in wrong})
            yield failed(
                f"{len(wrong)} of {len(values)} values of {part} are not text but {', '.join(kinds)}",
                "fill in or delete these rows; write numbers as text",
                split.sample(wrong[0]),
            )


def empty_texts(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """Texts are not empty; white space counts as empty."""
    for part, values in split.texts.items():
        empty = rows_where(isinstance(value, str) and not value.strip() for value in values)
        if len(empty):
            yield graded(
                len(empty) > MOSTLY * len(values),
                f"{len(empty)} of {len(values)} values of {part} are empty (limit: {MOSTLY:.0%})",
                "delete these rows, or name another text column",
                split.sample(empty[0]),
            )


def damaged_characters(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """Texts show no sign of a wrong encoding."""
    for part, values in split.texts.items():
        damaged = rows_where(isinstance(value, str) and any(mark in value for mark in DAMAGED) for value in values)
        if len(damaged):
            yield graded(
                len(damaged) > MOSTLY * len(values),
                f"{len(damaged)} of {len(values)} values of {part} have characters of a wrong encoding (limit: "
                f"{MOSTLY:.0%})",
                "convert the source file to UTF-8 from its actual encoding, often Latin-1 or Windows-1252",
                split.sample(damaged[0]),
            )


def tokenized(split: DataSplit, case: DataCase) -> Iterator[tuple[str, np.ndarray, list[list[int]]]]:
    """Yield part, rows and token ids of up to `TOKENIZED` evenly spaced texts."""
    for part, values in split.texts.items():
        rows = rows_where(isinstance(value, str) and bool(value.strip()) for value in values)
        rows = (
            rows[np.unique(np.linspace(0, len(rows) - 1, min(TOKENIZED, len(rows))).astype(int))]
            if len(rows)
            else rows
        )
        texts = [values[row] for row in rows]
        ids = case.tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        yield part, rows, ids


def unknown_tokens(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """The tokenizer knows the words."""
    if case.tokenizer is None:
        yield skipped("no tokenizer was given (--tokenizer)")
        return
    unknown = case.tokenizer.unk_token_id
    for part, rows, ids in tokenized(split, case):
        total = sum(map(len, ids))
        counts = np.array([tokens.count(unknown) for tokens in ids])
        share = counts.sum() / max(total, 1)
        if unknown is not None and share > UNKNOWN:
            yield graded(
                share > MANY_UNKNOWN,
                f"{share:.1%} of {total} tokens of {part} are unknown, in {(counts > 0).sum()} of {len(rows)} texts "
                f"(limit: {MANY_UNKNOWN:.0%})",
                "train a tokenizer on these texts, or use a byte-level one",
                split.sample(rows[counts.argmax()]),
            )


def text_lengths(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """Texts fit into the model's input."""
    if case.max_length is None:
        yield skipped("no limit was given (--max_length)")
        return
    unit = "words" if case.tokenizer is None else "tokens"
    if case.tokenizer is None:
        parts = (
            (part, np.arange(len(values)), [value.split() if isinstance(value, str) else [] for value in values])
            for part, values in split.texts.items()
        )
    else:
        parts = tokenized(split, case)
    for part, rows, tokens in parts:
        lengths = np.array([len(found) for found in tokens])
        long = lengths > case.max_length
        if long.any():
            yield graded(
                long.mean() > MOSTLY,
                f"{long.sum()} of {len(rows)} texts of {part} have more than {case.max_length} {unit}, the longest "
                f"{lengths.max()}: they are truncated or dropped (limit: {MOSTLY:.0%})",
                f"increase max_length, or split the texts; 95 % have at most {int(np.quantile(lengths, 0.95))} {unit}",
                split.sample(rows[lengths.argmax()]),
            )


def digests(split: DataSplit) -> list[bytes]:
    """Return (N,) hashes of all texts of each row."""
    rows = zip(*split.texts.values(), strict=True)
    return [
        hashlib.blake2b("\0".join(map(str, row)).encode("utf-8", "replace"), digest_size=12).digest() for row in rows
    ]


def repeated_texts(split: DataSplit, case: DataCase) -> Iterator[Finding]:
    """Texts that are repeated within a split have one label."""
    first: dict[bytes, int] = {}
    copies, other = [], []
    for row, digest in enumerate(digests(split)):
        if digest not in first:
            first[digest] = row
            continue
        copies.append(row)
        if split.columns.label is not None and split.labels[row] != split.labels[first[digest]]:
            other.append(row)
    total = len(split.rows)
    if len(copies) > MOSTLY * total:
        yield failed(
            f"{len(copies)} of {total} rows repeat an earlier one (limit: {MOSTLY:.0%})",
            "delete the duplicates; check that the right column is read",
            split.sample(copies[0]),
        )
    elif len(copies) > MANY_COPIES * total:
        yield warning(
            f"{len(copies)} of {total} rows repeat an earlier one", "delete the duplicates", split.sample(copies[0])
        )
    if other:
        yield graded(
            len(other) > MANY_COPIES * total,
            f"{len(other)} of {total} rows repeat an earlier one with another label (limit: {MANY_COPIES:.0%})",
            "keep the correct label",
            split.sample(other[0]),
        )


def shared_texts(case: DataCase) -> Iterator[Finding]:
    """No text of the training split is in another split."""
    train = {digest: row for row, digest in enumerate(digests(case.train))}
    for split in case.held_out:
        pairs = [(row, train[digest]) for row, digest in enumerate(digests(split)) if digest in train]
        if not pairs:
            yield ok(f"none of {len(split.rows)} rows of {split.name} is in {case.train.name}")
            continue
        share = len(pairs) / len(split.rows)
        yield graded(
            share > MANY_COPIES,
            f"{len(pairs)} of {len(split.rows)} rows of {split.name} are also in {case.train.name}, {share:.1%} "
            f"(limit: {MANY_COPIES:.0%}), the first as row {pairs[0][1]}",
            "delete them from one of the splits; scores would be too high",
            split.sample(pairs[0][0]),
        )


def equal_sides(split: DataSplit, case: DataCase) -> Finding:
    """Source and target differ."""
    return equal_parts(split, ("source", "target"), "delete untranslated pairs; check source_column and target_column")


def equal_completions(split: DataSplit, case: DataCase) -> Finding:
    """Chosen and rejected completions differ."""
    return equal_parts(split, ("chosen", "rejected"), "delete pairs without a preference, which teach nothing")


def equal_parts(split: DataSplit, parts: tuple[str, str], remedy: str) -> Finding:
    """Two parts of a row differ."""
    one, other = (split.texts[part] for part in parts)
    equal = rows_where(a == b and isinstance(a, str) for a, b in zip(one, other, strict=True))
    if len(equal) <= SOME * len(one):
        return ok(f"{len(equal)} of {len(one)} pairs have equal sides")
    return graded(
        len(equal) > MOSTLY * len(one),
        f"{len(equal)} of {len(one)} pairs have equal sides (limit: {MOSTLY:.0%})",
        remedy,
        split.sample(equal[0]),
    )


def length_ratio(split: DataSplit, case: DataCase) -> Finding:
    """Source and target have similar lengths."""
    sides = [
        np.array([len(value) if isinstance(value, str) else 0 for value in split.texts[part]]) + 1
        for part in ("source", "target")
    ]
    ratio = np.maximum(sides[0] / sides[1], sides[1] / sides[0])
    odd = np.flatnonzero(ratio > LOPSIDED)
    if len(odd) <= SOME * len(ratio):
        return ok(f"{len(odd)} of {len(ratio)} pairs have one side more than {LOPSIDED} times as long as the other")
    return graded(
        len(odd) > MOSTLY * len(ratio),
        f"{len(odd)} of {len(ratio)} pairs have one side more than {LOPSIDED} times as long as the other (limit: "
        f"{MOSTLY:.0%})",
        "check that the lines of both languages are aligned; delete these pairs",
        split.sample(odd[ratio[odd].argmax()]),
    )
