"""Sampled completions of prompts, as a function of the seed of each prompt alone.

prompts -> left-padded batch, encoded once for all completions of a prompt -> sampled tokens -> completions

Token t of a completion is the inverse of the cumulative distribution at the t-th of its own uniform random numbers. So
completions do not depend, except for rounding, on which prompts are decoded together, on how many processes decode, or
on when other completions end.

Shapes: P prompts; B = P G completions; R of them unfinished; T tokens; V vocabulary size.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..models.generation import DecoderRows, decode
from ..models.linear import generating

Ids = np.ndarray  # (T,) int64


class PreallocatedLayer(DynamicLayer):
    """`DynamicLayer` that writes keys and values to memory for all tokens to come, instead of copying them at every
    token.

    Args:
        capacity: maximum number of tokens.
    """

    def __init__(self, capacity: int):
        super().__init__()
        self.capacity, self.memory = capacity, None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer`."""
        before = self.get_seq_length()
        if self.memory is None:
            B, H = key_states.shape[:2]
            self.memory = [
                states.new_empty(B, H, self.capacity, states.shape[3]) for states in (key_states, value_states)
            ]
            if before:
                self.memory[0][:, :, :before], self.memory[1][:, :, :before] = self.keys, self.values
        after = before + key_states.shape[2]
        self.memory[0][:, :, before:after], self.memory[1][:, :, before:after] = key_states, value_states
        self.keys, self.values = (memory[:, :, :after] for memory in self.memory)
        self.is_initialized = True
        return self.keys, self.values

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See `DynamicLayer`."""
        super().batch_repeat_interleave(repeats)
        self.memory = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """See `DynamicLayer`."""
        super().reorder_cache(beam_idx)
        self.memory = None


def preallocated_cache(model: PreTrainedModel, capacity: int) -> DynamicCache:
    """Return an empty cache of a model in which the layers that attend to everything are preallocated."""
    cache = DynamicCache(config=model.config)
    cache.layers = [PreallocatedLayer(capacity) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


@dataclass
class CopiedRows(DecoderRows):
    """`DecoderRows` with several rows per prompt, which share the computation of the prompt.

    Args:
        copies: rows per prompt, next to each other; attention_mask and position_ids have one row per prompt.
    """

    copies: int = 1

    def scores(self, ids: Tensor) -> Tensor:
        """See `Rows`."""
        scores = super().scores(ids[:: self.copies])
        if self.copies > 1:
            copies, self.copies = self.copies, 1
            self.position_ids = self.position_ids.repeat_interleave(copies, 0)
            if self.attention_mask is not None:
                self.attention_mask = self.attention_mask.repeat_interleave(copies, 0)
            self.cache.batch_repeat_interleave(copies)
            scores = scores.repeat_interleave(copies, 0)
        return scores


class RandomChoice:
    """Samples from softmax(scores / temperature); see `models.generation.decode`.

    Args:
        uniforms: (B, T) random numbers in [0, 1), one for each new token.
        start: length of the prompts.
        temperature: 0 for the most likely token.

    Attributes:
        log_probs: (B, T) of the chosen tokens; 0 with temperature 0.
    """

    def __init__(self, uniforms: Tensor, start: int, temperature: float):
        # Just below 1, so that rounding never selects a token behind the last possible one.
        self.uniforms, self.start, self.temperature = uniforms * (1.0 - 1e-6), start, temperature
        self.log_probs = torch.zeros_like(uniforms)

    def __call__(self, scores: Tensor, output: Tensor, active: Tensor, step: int) -> Tensor:
        if self.temperature == 0.0:
            return scores.argmax(dim=-1)
        probabilities = (scores.float() / self.temperature).softmax(-1)  # (R, V)
        total = probabilities.cumsum(-1)
        draws = self.uniforms[active, step - self.start, None] * total[:, -1:]  # (R, 1)
        chosen = torch.searchsorted(total, draws, right=True).clamp_max(scores.shape[1] - 1)  # (R, 1)
        self.log_probs[active, step - self.start] = probabilities.gather(1, chosen)[:, 0].log()
        return chosen[:, 0]


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Ids],
    uniforms: np.ndarray,
    ends: Sequence[int],
    pad_token_id: int,
    temperature: float = 1.0,
    batch_size: int | None = None,
) -> tuple[list[Ids], list[np.ndarray]]:
    """Return completions of prompts, each with the token that ends it if it ends, and the log-probabilities of their
    tokens.

    Args:
        model: a causal language model with a key-value cache, in eval mode or without dropout.
        prompts: P prompts.
        uniforms: (B, T) random numbers in [0, 1) for the new tokens of each completion, those of a prompt next to each
            other; T is the maximum number of new tokens.
        ends: tokens that end a completion.
        temperature: of the distribution; 0 for the most likely token.
        batch_size: completions that are decoded at once; default, all.

    Returns:
        B completions, in order; and their log-probabilities, 0 with temperature 0.
    """
    copies, longest = len(uniforms) // len(prompts), uniforms.shape[1]
    device = next(model.parameters()).device
    at_once = max(1, (batch_size or len(uniforms)) // copies)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # less padding
    found: dict[int, tuple[Ids, np.ndarray]] = {}
    for first in range(0, len(order), at_once):
        chosen = order[first : first + at_once]
        width = max(len(prompts[i]) for i in chosen)
        ids = torch.full((len(chosen), width), pad_token_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i]) :] = torch.as_tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1
        rows = [i * copies + copy for i in chosen for copy in range(copies)]
        draws = torch.as_tensor(uniforms[rows]).to(device)
        tokens = decode_copies(model, ids.to(device), mask.to(device), draws, ends, pad_token_id, temperature)
        for row, ids_of_row, values in zip(rows, *(each.cpu().numpy() for each in tokens), strict=True):
            stop = np.flatnonzero(np.isin(ids_of_row, ends))
            size = stop[0] + 1 if len(stop) else longest
            found[row] = ids_of_row[:size], values[:size]
    return [found[row][0] for row in range(len(uniforms))], [found[row][1] for row in range(len(uniforms))]


def decode_copies(
    model: PreTrainedModel,
    ids: Tensor,
    mask: Tensor,
    uniforms: Tensor,
    ends: Sequence[int],
    pad_token_id: int,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """Return the new tokens (B, T) of left-padded prompts (P, T) with their mask, and their log-probabilities (B, T);
    other arguments as in `sample`."""
    copies, width = len(uniforms) // len(ids), ids.shape[1]
    longest = width + uniforms.shape[1]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = None if bool(mask.all()) else mask
    rows = CopiedRows(model, padded, positions, preallocated_cache(model, longest), copies)
    choice = RandomChoice(uniforms, width, temperature)
    end_ids = torch.as_tensor(list(ends), device=ids.device)
    with generating():
        output = decode(rows, ids.repeat_interleave(copies, 0), choice, end_ids, pad_token_id, longest)
    return output[:, width:], choice.log_probs[:, : output.shape[1] - width]
