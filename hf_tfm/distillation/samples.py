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


def token_mask(batch: Mapping[str, Any]) -> Tensor | None:
    """Return (B, T) bool of a batch of texts, True at tokens; None for images."""
    if "input_ids" not in batch:
        return None
    ids = batch["input_ids"]
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones_like(ids, dtype=torch.bool)


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
        _, kind, _ = parts(name)
        per_row = rows is not None and name in (LOGITS, TOP, PLACES, REST)
        for i, part in enumerate(value.split(rows) if per_row else value):
            if mask is not None and kind == HIDDEN:
                part = part[mask[i]]  # (t, D)
            elif mask is not None and kind == SCORE:
                part = part[:, mask[i]][:, :, mask[i]]  # (H, t, t)
            found[i][name] = part
    return found


def join(batch: Mapping[str, Any], samples: Sequence[Signals], positions: Tensor | None) -> Signals:
    """Collate the signals of samples, the inverse of `split`; the padding of the batch may differ.

    Raises:
        ValueError: the number of rows or tokens does not match the batch.
    """
    mask = token_mask(batch)
    found: Signals = {}
    for name in samples[0]:
        _, kind, _ = parts(name)
        values = [sample[name] for sample in samples]
        if positions is not None and name in (LOGITS, TOP, PLACES, REST):
            found[name] = torch.cat(values)
            check_length(name, len(found[name]), len(positions), "rows")
        elif mask is not None and kind in (HIDDEN, SCORE):
            found[name] = padded(name, kind, values, mask)
        else:
            found[name] = torch.stack(values)
    if PLACES in found:
        found[PLACES] = found[PLACES].long()
    return found


def padded(name: str, kind: str, values: Sequence[Tensor], mask: Tensor) -> Tensor:
    """Pad states (t, D) of each sample to (B, T, D) with 0, or scores (H, t, t) to (B, H, T, T) with -inf."""
    B, T = mask.shape
    first = values[0]
    shape = (B, T, first.shape[-1]) if kind == HIDDEN else (B, first.shape[0], T, T)
    for value, length in zip(values, mask.sum(1).tolist(), strict=True):
        check_length(name, value.shape[-2], length, "tokens")
    if min(value.shape[-2] for value in values) == T:
        return torch.stack(list(values))
    found = first.new_full(shape, 0.0 if kind == HIDDEN else -torch.inf)
    for i, value in enumerate(values):
        start, length = int(mask[i].int().argmax()), value.shape[-2]
        here = slice(start, start + length)  # a slice is copied several times faster than single positions
        if not mask[i, here].all():
            here = mask[i].nonzero()[:, 0]
        if kind == HIDDEN:
            found[i, here] = value
        else:
            found[i][:, here if isinstance(here, slice) else here[:, None], here] = value
    return found


def check_length(name: str, cached: int, wanted: int, what: str) -> None:
    """Raise ValueError if the cached length differs from that of the batch."""
    if cached != wanted:
        raise ValueError(
            f'the cache has {cached} {what} of signal "{name}" where the batch has {wanted}: it is of other samples'
        )
