"""Exact gradient accumulation in transformers' Trainer, for every head.

    micro-batches of a step -> model.count_items of each -> sum, over ranks too -> num_items_in_batch of every forward

Trainer counts ``labels`` that are not -100, which is right for heads with one kind of label. If a batch has none
(question answering, masked autoencoders), a list of them (detection) or two kinds (BERT pretraining), Trainer averages
the means of micro-batches instead: 4 x 2 then differs from 1 x 8 if micro-batches differ in their number of items.
Models with such heads have a method ``count_items``.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

Items = dict[str, Tensor] | Tensor | None


def total(counts: list[Any]) -> Any:
    """Sum numbers, or dictionaries of numbers; each sum is a float64 tensor."""
    if isinstance(counts[0], dict):
        return {name: total([count[name] for count in counts]) for name in counts[0]}
    return torch.stack([torch.as_tensor(count).detach().to("cpu", torch.float64) for count in counts]).sum()


class StepItemsMixin:
    """Count the items of a step with the model's ``count_items``, if it has one.

    Put it before a Trainer class: ``class MyTrainer(StepItemsMixin, Seq2SeqTrainer)``; `StepItemsTrainer` combines it
    with `transformers.Trainer`.
    """

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Items]:
        """Return the micro-batches of a step, and their number of items."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = getattr(self.accelerator.unwrap_model(self.model), "count_items", None)
        if count is None or not batches:
            return batches, items
        step = total([count(**batch) for batch in batches])
        values = step if isinstance(step, dict) else {"": step}
        values = {name: value.to(device, torch.float32) for name, value in values.items()}
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            values = {name: self.accelerator.gather(value).sum() for name, value in values.items()}
        return batches, values if isinstance(step, dict) else values[""]


class StepItemsTrainer(StepItemsMixin, Trainer):
    """`transformers.Trainer` with `StepItemsMixin`."""
