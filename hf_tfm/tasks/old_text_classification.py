"""Text classification: what one training step computes, and what a model says of every text of a data set.

    {"input_ids", "label"} lists -> padded to the longest of the batch -> logits -> sum of losses

Shapes: B texts, or pairs of them; T tokens of the longest; C classes, 1 where a number is predicted.
"""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.batching import pad
from ..data.labelled_texts import LABEL
from ..data.vocabulary import tokenizer_name
from ..metrics.glue import Glue
from ..models.cross_entropy import IGNORE_INDEX
from ..models.modeling_gpt import language_loss
from .base import Loader
from .language import padded

Batch = dict[str, Any]
SEGMENTS = "token_type_ids"
IGNORE_LABEL = -100  # of a text that is not labelled, or counts for nothing; NaN where numbers are predicted


def input_names(model: PreTrainedModel) -> tuple[str, ...]:
    """What of a batch a model reads: not ``token_type_ids`` where it has no two segments to tell apart."""
    taken = inspect.signature(model.forward).parameters
    segments = getattr(model.config, "type_vocab_size", 0) > 1 and SEGMENTS in taken
    return ("input_ids", "attention_mask", *([SEGMENTS] if segments else []))


class TextClassificationTask:
    """Cross-entropy of a text's class, or the squared error where a number is predicted.

    Args:
        tokenizer: of the model; it knows what padding is.
        label_ids: from labels as the data set stores them to the model's classes, see `data.labelled_texts.class_ids`;
            None for numbers. None and negative classes mean that a text has no label, None and NaN of numbers.
        names: of what the model reads of a batch, see `input_names`; a batch has all that the tokenizer gives.
        language_weight: adds so much of a decoder's loss of predicting the text itself (Radford et al. 2018, equation
            5), a term of its own: the sum over tokens divided by their number.

    Raises:
        ValueError: the tokenizer has no padding, or ``language_weight`` is negative.
    """

    item = "texts"
    term = "label"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        label_ids: Mapping[int | str, int] | None,
        names: Sequence[str] = ("input_ids", "attention_mask", SEGMENTS),
        language_weight: float = 0.0,
    ):
        if tokenizer.pad_token_id is None:
            raise ValueError(f"{tokenizer_name(tokenizer)} has no pad_token")
        if language_weight < 0.0:
            raise ValueError(f"language_weight must be at least 0, got {language_weight}")
        self.pad = tokenizer.pad_token_id
        self.label_ids = None if label_ids is None else dict(label_ids)
        self.names, self.language_weight = tuple(names), language_weight

    def collate(self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """Examples of `tokenize_texts` -> a batch; a hidden one has no labels, so it counts for nothing.

        Returns:
            ``input_ids``, ``attention_mask`` where there is padding, and ``token_type_ids`` where the examples have
            them, (B, T) int64;
            ``labels`` (B,) int64, or float32 numbers; ``indices`` (B,) of the samples; ``texts``, how many count; with
            ``language_weight`` also ``language_labels`` (B, T).
        """
        batch: Batch = padded(examples, self.pad)
        if SEGMENTS in examples[0]:
            batch[SEGMENTS] = pad([example[SEGMENTS] for example in examples], 0)
        batch["labels"] = self.labels([{} if hidden else example for example in examples], indices)
        if self.language_weight:
            tokens = pad([example["input_ids"] for example in examples], IGNORE_INDEX)
            batch["language_labels"] = tokens.fill_(IGNORE_INDEX) if hidden else tokens
        return batch | {"indices": torch.tensor(indices), "texts": 0 if hidden else len(examples)}

    def labels(self, examples: list[dict[str, Any]], indices: list[int]) -> Tensor:
        """(B,): classes, `IGNORE_LABEL` where there is none; or numbers, NaN where there is none.

        Raises:
            ValueError: a label is not one of the model's classes.
        """
        values = [example.get(LABEL) for example in examples]
        if self.label_ids is None:
            return torch.tensor([float("nan") if value is None else float(value) for value in values])
        classes = []
        for value, index in zip(values, indices, strict=True):
            if value is None or (isinstance(value, int) and value < 0):
                classes.append(IGNORE_LABEL)
            elif value in self.label_ids:
                classes.append(self.label_ids[value])
            else:
                raise ValueError(f"label {value!r} of text {index} is not a class of the model")
        return torch.tensor(classes)

    def count(self, batch: Batch) -> dict[str, int]:
        """Labelled texts, and with ``language_weight`` tokens that follow another."""
        counts = {"label": int(self.labelled(batch["labels"]).sum())}
        if self.language_weight:
            counts["language"] = int((batch["language_labels"][:, 1:] != IGNORE_INDEX).sum())
        return counts

    def labelled(self, labels: Tensor) -> Tensor:
        """Which labels are there, bool of their shape."""
        return ~labels.isnan() if self.label_ids is None else labels != IGNORE_LABEL

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """The model's keyword arguments, without labels."""
        return {name: batch[name] for name in self.names if name in batch}

    def places(self, batch: Batch) -> None:
        """Every row of logits has a target: the labels stand for whole texts."""

    def each_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy or squared error (B,) of logits (B, C); 0 where there is no label."""
        labels = batch["labels"]
        if self.label_ids is None:
            return (logits[:, 0].float() - labels).where(self.labelled(labels), 0.0).square()
        return cross_entropy(logits.float(), labels, ignore_index=IGNORE_LABEL, reduction="none")

    def hard_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """`each_loss`, summed over labelled texts."""
        return self.each_loss(logits, batch).sum()

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Each term, summed over its items."""
        output = model(**self.inputs(batch), output_hidden_states=bool(self.language_weight))
        losses = {"label": self.hard_loss(output.logits, batch)}
        if self.language_weight:
            words = getattr(model, "module", model).get_input_embeddings()  # of a decoder, its output layer too
            total = language_loss(output.hidden_states[-1], None, words, batch["language_labels"], 1)
            losses["language"] = self.language_weight * total
        return losses


@dataclass
class Predictions:
    """What a model says of every text of a data set, in the order of the data set; equal on all ranks.

    Args:
        labels: (N,) int64 classes, `IGNORE_LABEL` where there is none, or float32 numbers, NaN where there is none.
        logits: (N, C) float32.
        loss: mean loss of labelled texts, NaN where there are none.
    """

    labels: np.ndarray
    logits: np.ndarray
    loss: float

    @property
    def predicted(self) -> np.ndarray:
        """(N,): the likeliest classes, or the numbers predicted."""
        return self.logits[:, 0] if self.logits.shape[1] == 1 else self.logits.argmax(axis=1)


def score(found: Predictions, metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Scores of predictions as rows of name, value and signature, which is None.

    Args:
        metrics: of `metrics.glue.METRICS`.
    """
    values = Glue(metrics=metrics).compute(predictions=found.predicted, references=found.labels)
    return [{"name": name, "value": value, "signature": None} for name, value in values.items()]


@torch.inference_mode()
def predict(accelerator: Accelerator, task: TextClassificationTask, model: nn.Module, loader: Loader) -> Predictions:
    """Read every text of a data set once, each rank its share.

    Args:
        task: gives the loader's ``collate``.
    """
    training = model.training
    model.eval()
    parts: list[tuple[Tensor, ...]] = []
    for micro_batches in loader.epoch(0):
        for batch in micro_batches:
            batch = send_to_device(batch, accelerator.device)
            logits = model(**task.inputs(batch)).logits.float()
            # Sharded models exchange weights in every forward: a rank with nothing to do takes part in that alone.
            if batch["texts"]:
                parts.append((batch["indices"], batch["labels"], task.each_loss(logits, batch), logits))
    model.train(training)
    mine = [tuple(part.cpu().numpy() for part in columns) for columns in parts]
    everything = gather_object(mine) if accelerator.num_processes > 1 else mine
    indices, labels, loss, logits = (np.concatenate(column) for column in zip(*everything, strict=True))
    order = indices.argsort()
    known = task.labelled(torch.from_numpy(labels)).numpy()
    mean = float(loss[known].mean(dtype=np.float64)) if known.any() else float("nan")
    return Predictions(labels[order], logits[order], mean)
