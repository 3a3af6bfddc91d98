"""Split the signals of a batch into samples, as stored in a cache, and collate them again.

(B, T, D), (B, H, T, T), (n, C) of a batch -> of each sample without padding -> of another batch, padded again
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batching import Sample, SampleRef, fetch, sample_ref
from ..models.cross_entropy import IGNORE_INDEX
from .signals import HIDDEN, LOGITS, PLACES, REST, SCORE, TOP, Signals, parts

PROBES = 32  # samples whose inputs are hashed
WIDE = 2**16  # largest number of classes whose indices fit in uint16


@dataclass(frozen=True)
class TrainingSamples:
    """The training data of a run, as a teacher reads it.

    Args:
        rows: training data, as ``collate`` takes them.
        collate: ``collate(rows, samples, epoch)`` -> batch, with masks and augmentation as in training.
        inputs: batch -> keyword arguments of the model.
        positions: batch -> positions of the rows of logits, see `signals.collect`, or None.
        data: fingerprint of the rows.
        options: options of the run that determine the model inputs; JSON values.
        refs: epoch -> its samples, if inputs depend on more than their rows, as with a `ShapeSampler`.
    """

    rows: Sequence[Any]
    collate: Callable[..., dict[str, Any]]
    inputs: Callable[[dict[str, Any]], dict[str, Any]]
    positions: Callable[[dict[str, Any]], Tensor | None]
    data: str
    options: Mapping[str, Any] = field(default_factory=dict)
    refs: Callable[[int], Sequence[Sample]] | None = None

    def batch(self, samples: list[Sample], epoch: int) -> dict[str, Any]:
        """Collate samples.

        Raises:
            ValueError: samples depend on the other samples of their batch.
        """
        rows = [sample_ref(sample).index for sample in samples]
        batch = self.collate(fetch(self.rows, rows), samples, epoch)
        if "partner" in batch:
            raise ValueError("images that are mixed with their neighbours cannot be cached: turn mixing off")
        return batch

    def hash(self, epochs: int) -> str:
        """Hash the model inputs of evenly spaced samples in the first and the last epoch.

        The hash depends on the tokenizer, the processor, the maximum length, masking, augmentation and their seed.
        """
        digest = hashlib.sha256()
        for epoch in sorted({0, epochs - 1}):
            for index in np.unique(np.linspace(0, len(self.rows) - 1, PROBES).astype(int)).tolist():
                batch = self.batch([index], epoch)
                given = {**self.inputs(batch), "places": self.positions(batch)}  # hashed in caches by this name
                for name, value in sorted(given.items()):
                    if isinstance(value, Tensor):
                        digest.update(f"{name} {tuple(value.shape)} {value.dtype}".encode())
                        digest.update(value.contiguous().numpy().tobytes())
        return digest.hexdigest()[:16]


def encode(signals: Signals, top_k: int | None, temperature: float, dtype: torch.dtype) -> Signals:
    """Convert signals to the stored form: in the cache's dtype and, if ``top_k`` is given, only the largest logits.

    Args:
        temperature: temperature at which the remaining logits are summed.
    """
    found = {name: value.to(dtype) for name, value in signals.items() if name != LOGITS or top_k is None}
    if LOGITS in signals and top_k is not None:
        logits = signals[LOGITS].float()
        if top_k >= logits.shape[-1]:
            raise ValueError(f"top_k must be below the {logits.shape[-1]} classes, got {top_k}")
        top, positions = logits.topk(top_k, dim=-1)
        found[TOP] = top.to(dtype)
        found[PLACES] = positions.to(torch.uint16 if logits.shape[-1] <= WIDE else torch.int32)
        found[REST] = (logits / temperature).scatter(-1, positions, -torch.inf).logsumexp(-1)
    return found


def read_samples(batch: Mapping[str, Any], samples: Sequence[Sample]) -> list[SampleRef]:
    """Return the samples that are in a batch: unreadable images are not."""
    refs = [sample_ref(sample) for sample in samples]
    if "images" not in batch:
        return refs
    kept = set(batch["indices"].tolist())
    return [ref for ref in refs if ref.index in kept]


def token_mask(batch: Mapping[str, Any], stack: str = "") -> Tensor | None:
    """Return (B, T) bool of a batch of texts, True at tokens; None for images.

    Args:
        stack: for an encoder-decoder model, "encoder" for the tokens of the source; any other for those of the target.
    """
    if "input_ids" not in batch:
        return None
    if "decoder_input_ids" in batch and stack != "encoder":
        return batch["labels"] != IGNORE_INDEX
    ids = batch["input_ids"]
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)


def masks_of(batch: Mapping[str, Any], stack: str) -> tuple[Tensor | None, Tensor | None]:
    """Return the `token_mask` of the queries, or states, of a stack and that of its keys."""
    return token_mask(batch, stack), token_mask(batch, "encoder" if stack == "cross" else stack)


def split(batch: Mapping[str, Any], signals: Signals, positions: Tensor | None) -> list[Signals]:
    """Split the signals of a batch into samples, without padding.

    Args:
        positions: positions of the rows of logits among the B T tokens, ascending.

    Raises:
        ValueError: the positions are not ascending, so the rows of a sample may not be contiguous.
    """
    mask = token_mask(batch)
    size = len(next(batch[name] for name in ("input_ids", "pixel_values") if name in batch))
    if positions is not None and bool((positions.diff() < 0).any()):
        raise ValueError("positions must ascend: rows of logits are kept sample by sample")
    rows = None if positions is None else (positions // mask.shape[1]).bincount(minlength=size).tolist()
    found: list[Signals] = [{} for _ in range(size)]
    for name, value in signals.items():
        stack, kind, _ = parts(name)
        queries, keys = masks_of(batch, stack)
        per_row = rows is not None and name in (LOGITS, TOP, PLACES, REST)
        for i, part in enumerate(value.split(rows) if per_row else value):
            if queries is not None and kind == HIDDEN:
                part = part[queries[i]]  # (t, D)
            elif queries is not None and keys is not None and kind == SCORE:
                part = part[:, queries[i]][:, :, keys[i]]  # (H, t, s)
            found[i][name] = part
    return found


def join(batch: Mapping[str, Any], samples: Sequence[Signals], positions: Tensor | None) -> Signals:
    """Collate the signals of samples, the inverse of `split`; the padding of the batch may differ.

    Raises:
        ValueError: the number of rows or tokens does not match the batch.
    """
    found: Signals = {}
    for name in samples[0]:
        stack, kind, _ = parts(name)
        queries, keys = masks_of(batch, stack)
        values = [sample[name] for sample in samples]
        if positions is not None and name in (LOGITS, TOP, PLACES, REST):
            found[name] = torch.cat(values)
            check_length(name, len(found[name]), len(positions), "rows")
        elif queries is not None and keys is not None and kind in (HIDDEN, SCORE):
            found[name] = padded(name, values, (queries,) if kind == HIDDEN else (queries, keys))
        else:
            found[name] = torch.stack(values)
    if PLACES in found:
        found[PLACES] = found[PLACES].long()
    return found


def padded(name: str, values: Sequence[Tensor], masks: Sequence[Tensor]) -> Tensor:
    """Pad states (t, D) of each sample to (B, T, D) with 0, or scores (H, t, s) to (B, H, T, S) with -inf.

    Args:
        masks: (B, T) of the states; or of the queries, and (B, S) of the keys.
    """
    wide = [mask.shape[1] for mask in masks]
    sizes = [value.shape[-2:][: len(masks)] for value in values]
    for size, *lengths in zip(sizes, *(mask.sum(1).tolist() for mask in masks), strict=True):
        for cached, wanted in zip(size, lengths, strict=True):
            check_length(name, cached, wanted, "tokens")
    if all(list(size) == wide for size in sizes):
        return torch.stack(list(values))
    first = values[0]
    shape = (*wide, first.shape[-1]) if len(masks) == 1 else (first.shape[0], *wide)
    found = first.new_full((len(values), *shape), 0.0 if len(masks) == 1 else -torch.inf)
    for i, value in enumerate(values):
        rows, *columns = (tokens_of(mask[i]) for mask in masks)
        if not columns:
            found[i, rows] = value
        elif isinstance(rows, slice) or isinstance(columns[0], slice):
            found[i][:, rows, columns[0]] = value
        else:
            found[i][:, rows[:, None], columns[0]] = value
    return found


def tokens_of(mask: Tensor) -> slice | Tensor:
    """Return the positions of the tokens of a sample, (T,): a slice, which is copied several times faster than single
    positions, or indices if there are gaps."""
    start, length = int(mask.int().argmax()), int(mask.sum())
    here = slice(start, start + length)
    return here if bool(mask[here].all()) else mask.nonzero()[:, 0]


def check_length(name: str, cached: int, wanted: int, what: str) -> None:
    """Raise ValueError if the cached length differs from that of the batch."""
    if cached != wanted:
        raise ValueError(
            f'the cache has {cached} {what} of signal "{name}" where the batch has {wanted}: it is of other samples'
        )
