"""Validation of configurations. Every error names the field, its limit and its value."""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import fields
from difflib import SequenceMatcher
from typing import Any

# Far above the sizes of real models; beyond them torch aborts for lack of memory, or spends hours building layers.
MOST = {"vocab_size": 2**24, "max_position_embeddings": 2**24, "num_queries": 2**16, "layers": 10_000, "": 2**20}
POSITIVE = ("layer_norm_eps", "initializer_factor", "init_xavier_std", "floater_step")
NOT_NEGATIVE = ("initializer_range",)
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "decoder_start_token_id")
SIMILAR = 0.845  # minimum similarity of a misspelt field to the intended one


def require_at_least(config: Any, names: Iterable[str], least: float = 1) -> None:
    """Raise if a field of ``names`` is below ``least``, infinite, or a size beyond `MOST`."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not value >= least or math.isinf(value):  # also true for NaN
            raise ValueError(f"{name} must be at least {least}, got {value}")
        most = MOST.get(name, MOST["layers"] if name.endswith("layers") else MOST[""])
        if isinstance(value, int) and value > most:
            raise ValueError(f"{name} must be at most {most}, got {value}")


def require_common(config: Any) -> None:
    """Validate the fields that several model families share.

    Scales of initial weights and epsilons of norms must be finite and positive (`NOT_NEGATIVE` ones may be 0), and ids
    of special tokens must be in the vocabulary. The family's default ids are always accepted, so that a small
    vocabulary does not require ids.
    """
    for name in (*POSITIVE, *NOT_NEGATIVE):
        value = getattr(config, name, None)
        if value is None:
            continue
        allowed = value >= 0 if name in NOT_NEGATIVE else value > 0
        if isinstance(value, bool) or not allowed or math.isinf(value):
            limit = "at least 0" if name in NOT_NEGATIVE else "above 0"
            raise ValueError(f"{name} must be a finite number {limit}, got {value}")
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None:
        require_at_least(config, ["vocab_size"])
    defaults = {field.name: field.default for field in fields(config)}
    for name in TOKENS if vocabulary is not None else ():
        value = getattr(config, name, None)
        if value is None or value == defaults.get(name):
            continue
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, bool) or not 0 <= token < vocabulary:
                raise ValueError(f"{name} must be in [0, vocab_size = {vocabulary}), got {token}")


def require_label_count(config: Any, num_labels: Any) -> None:
    """Raise if a number of labels is not a count, or differs from that of ``id2label``.

    Args:
        num_labels: the given value, or None.
    """
    if num_labels is None:
        return
    if isinstance(num_labels, bool) or not isinstance(num_labels, int) or not 0 <= num_labels <= MOST[""]:
        raise ValueError(f"num_labels must be an integer in [0, {MOST['']}], got {num_labels}")
    if config.id2label is not None and len(config.id2label) != num_labels:
        raise ValueError(
            f"num_labels must be {len(config.id2label)}, the number of labels in id2label, got {num_labels}"
        )


def refuse_misspelt(kind: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raise on unknown names that are close to a known name; accept other unknown names.

    transformers keeps unknown fields, since files of other versions contain them: a misspelt field would be ignored
    silently.

    Args:
        kind: kind of the names, for the error, such as "field".
    """
    for name in given:
        if name in known or name.startswith("_"):
            continue
        closest = max(known, key=lambda other: SequenceMatcher(None, name, other).ratio())
        if SequenceMatcher(None, name, closest).ratio() >= SIMILAR:
            raise ValueError(f'"{name}" is not a {kind}: did you mean "{closest}"?')


def require_choice(config: Any, name: str, choices: Collection[str]) -> None:
    """Raise if the field ``name`` is not one of ``choices``."""
    if getattr(config, name) not in choices:
        raise ValueError(f'{name} must be one of {", ".join(choices)}, got "{getattr(config, name)}"')


def require_multiple(config: Any, name: str, of: int, reason: str) -> None:
    """Raise if the field ``name`` is not a multiple of ``of``, a number given by ``reason``."""
    if getattr(config, name) % of:
        raise ValueError(f"{name} must be a multiple of {of} for {reason}, got {getattr(config, name)}")


def require_share(config: Any, names: Iterable[str]) -> None:
    """Raise if a field of ``names`` is outside [0, 1)."""
    for name in names:
        if not 0.0 <= getattr(config, name) < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {getattr(config, name)}")


def fields_of_size(sizes: Mapping[str, dict[str, Any]], size: str) -> dict[str, Any]:
    """Return the fields of a named size.

    Raises:
        ValueError: the size is unknown.
    """
    if size not in sizes:
        raise ValueError(f'size must be one of {", ".join(sizes)}, got "{size}"')
    return sizes[size]
