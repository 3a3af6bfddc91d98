"""Language modelling: what one step of pretraining computes.

{"input_ids"} -> padded batch, some tokens masked -> sum of the losses of masked tokens, or of every next token

Shapes: B sequences; T tokens; n tokens with a target.
"""

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from ..data.batching import pad_tokens as padded
from ..data.batching import rng
from ..data.vocabulary import require_tokens, word_starts
from ..models.configuration_bert import TfmBertConfig
from ..models.configuration_gpt import TfmGPTConfig
from ..models.cross_entropy import IGNORE_INDEX
from .base import Loader
from .base import mean_losses as evaluate

Batch = dict[str, Tensor]
NEXT = "next_sentence_label"
OURS = (TfmBertConfig.model_type, TfmGPTConfig.model_type)


class MaskedLanguageTask:
    """Cross-entropy of masked tokens (Devlin et al. 2019, section 3.1), and of whether a second segment follows.

    Of a sequence, 15 % of the tokens are chosen; of those 80 % become the mask token, 10 % a random one and 10 % stay.
    Which, follows from (seed, epoch, index) alone; in evaluation the epoch is always 0.

    Args:
        tokenizer: needs a mask and a padding token.
        mlm_probability: share of tokens chosen, at least one a sequence.
        whole_words: choose words and not tokens, as many as fit in the share.
        seed: of what is chosen.

    Raises:
        ValueError: the tokenizer has no mask or padding token, or with ``whole_words`` does not mark words; or
            ``mlm_probability`` is out of range.
    """

    item = "masked tokens"
    term = "token"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mlm_probability: float = 0.15,
        whole_words: bool = False,
        seed: int = 0,
    ):
        require_tokens(tokenizer, "pad_token", "mask_token")
        if not 0.0 < mlm_probability < 1.0:
            raise ValueError(f"mlm_probability must be in (0, 1), got {mlm_probability}")
        self.mlm_probability, self.seed = mlm_probability, seed
        self.pad, self.mask = tokenizer.pad_token_id, tokenizer.mask_token_id
        self.vocabulary = len(tokenizer)
        self.special = np.zeros(self.vocabulary, dtype=bool)
        self.special[tokenizer.all_special_ids] = True
        if tokenizer.unk_token_id is not None:
            self.special[tokenizer.unk_token_id] = False  # a word nobody knows is a word
        self.starts = word_starts(tokenizer) if whole_words else np.ones(self.vocabulary, dtype=bool)

    def collate(self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """Sequences of `data.language.token_sequences` -> a batch.

        A hidden batch has no labels, so it counts for nothing.

        Returns:
            ``input_ids`` (B, T), masked; ``attention_mask`` (B, T) where there is padding; ``labels`` (B, T);
            ``masked_positions`` (n,) int64, of the labels among the B T; of pairs, ``token_type_ids`` (B, T) and
            ``next_sentence_label`` (B,), 1 where the second segment is a random one.
        """
        batch = padded(examples, self.pad)
        ids, labels = batch["input_ids"].numpy(), np.full(batch["input_ids"].shape, IGNORE_INDEX, dtype=np.int64)
        for row, (example, index) in enumerate(zip(examples, indices, strict=True)):
            if not hidden:
                length = len(example["input_ids"])
                chosen, shown = self.masked(ids[row, :length], rng(self.seed, epoch, index))
                labels[row, chosen] = ids[row, chosen]
                ids[row, chosen] = shown
        batch["labels"] = torch.from_numpy(labels)
        batch["masked_positions"] = torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX))
        if "second" in examples[0]:
            second = torch.tensor([example["second"] for example in examples])
            batch["token_type_ids"] = (torch.arange(ids.shape[1]) >= second[:, None]).long()
            batch[NEXT] = torch.tensor([IGNORE_INDEX if hidden else int(example["random"]) for example in examples])
        return batch

    def masked(self, ids: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Which tokens of a sequence (T,) are to be predicted, (n,) places, and what stands there instead, (n,)."""
        chosen = self.choose(ids, random)
        share = random.random(len(chosen))
        others = random.integers(self.vocabulary, size=len(chosen))
        return chosen, np.where(share < 0.8, self.mask, np.where(share < 0.9, others, ids[chosen]))

    def choose(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Places (n,) of the tokens of a sequence (T,) that are to be predicted, in order."""
        places = np.flatnonzero(~self.special[ids])
        if not len(places):
            return places
        # Special tokens part words: a piece after one begins a word, whatever it looks like.
        word = np.cumsum(self.starts[ids[places]] | np.r_[True, np.diff(places) > 1]) - 1  # of each place
        order = random.permutation(word[-1] + 1)
        lengths = np.bincount(word)[order]
        wanted = max(1, round(self.mlm_probability * len(places)))
        fit = np.cumsum(lengths) <= wanted
        fit[0] = True  # a word longer than the share still is better than none
        return places[np.isin(word, order[fit])]

    def count(self, batch: Batch) -> dict[str, int]:
        """Masked tokens; of pairs, also those."""
        counts = {"token": len(batch["masked_positions"])}
        if NEXT in batch:
            counts["pair"] = int((batch[NEXT] != IGNORE_INDEX).sum())
        return counts

    def inputs(self, batch: Batch) -> Batch:
        """What a model is given to read."""
        return {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}

    def places(self, batch: Batch) -> Tensor:
        """(n,) places of the masked tokens among the B T."""
        return batch["masked_positions"]

    def hard_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss from the logits (n, V) of the masked tokens."""
        return cross_entropy(logits.float(), batch["labels"].flatten()[batch["masked_positions"]], reduction="sum")

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Each term, summed over its items; in a model of ours the logits of other tokens are not formed, nor held."""
        if not is_ours(model):
            return {"token": loss_from_logits(self, model, batch)}
        labels = {name: batch[name] for name in ("labels", "masked_positions")}
        output = model(**self.inputs(batch), **labels, num_items_in_batch=1, return_logits=False)
        losses = {"token": output.loss}
        if NEXT in batch:
            losses["pair"] = cross_entropy(
                output.seq_relationship_logits.float(), batch[NEXT], ignore_index=IGNORE_INDEX, reduction="sum"
            )
        return losses


class CausalLanguageTask:
    """Cross-entropy of every next token (Radford et al. 2018, equation 1).

    Args:
        tokenizer: needs a padding token.

    Raises:
        ValueError: it has none.
    """

    item = "tokens"
    term = "token"

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        require_tokens(tokenizer, "pad_token")
        self.pad = tokenizer.pad_token_id

    def collate(self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """Sequences of `data.language.token_sequences` -> a batch; a hidden one has no labels.

        Returns:
            ``input_ids`` (B, T); ``attention_mask`` (B, T) where there is padding; ``labels`` (B, T), the ids
            themselves.
        """
        batch = padded(examples, self.pad)
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = IGNORE_INDEX
        batch["labels"] = torch.full_like(labels, IGNORE_INDEX) if hidden else labels
        return batch

    def count(self, batch: Batch) -> dict[str, int]:
        """Tokens that follow another."""
        return {"token": int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())}

    def inputs(self, batch: Batch) -> Batch:
        """What a model is given to read."""
        return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}

    def places(self, batch: Batch) -> Tensor:
        """(n,) places among the B T of the tokens that another follows."""
        following = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        return (following != IGNORE_INDEX).flatten().nonzero()[:, 0]

    def hard_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The loss from the logits (n, V) at `places`."""
        following = batch["labels"].flatten()[self.places(batch) + 1]
        return cross_entropy(logits.float(), following, reduction="sum")

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """The loss, summed over tokens; in a model of ours the logits are not held."""
        if not is_ours(model):
            return {"token": loss_from_logits(self, model, batch)}
        inputs = self.inputs(batch)
        output = model(**inputs, labels=batch["labels"], num_items_in_batch=1, return_logits=False, use_cache=False)
        return {"token": output.loss}


def is_ours(model: nn.Module) -> bool:
    """Whether a model, wrapped for several processes or not, is one of `OURS`, whose losses need no logits."""
    return extract_model_from_parallel(model).config.model_type in OURS


def loss_from_logits(task: "LanguageTask", model: nn.Module, batch: Batch) -> Tensor:
    """The loss of any language model, summed over the tokens that have a target."""
    return task.hard_loss(model(**task.inputs(batch)).logits.flatten(0, 1)[task.places(batch)], batch)


LanguageTask = MaskedLanguageTask | CausalLanguageTask


def check_vocabulary(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
    """Refuse a tokenizer that does not belong to a model, or sequences that are too long for it.

    Raises:
        ValueError: with both numbers.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the model has {config.vocab_size} tokens, and its tokenizer more, {len(tokenizer)}")
    if max_length > config.max_position_embeddings:
        raise ValueError(
            f"max_length must be at most the model's max_position_embeddings = {config.max_position_embeddings}, got "
            f"{max_length}"
        )


def score(accelerator: Accelerator, task: LanguageTask, model: nn.Module, loader: Loader) -> list[dict[str, Any]]:
    """Scores of a split as rows of name, value and signature: perplexity, the exponential of a token's mean loss (for
    a masked model, of the masked tokens), and the loss of each term."""
    signature = (
        f"masked: {task.mlm_probability:g}, seed: {task.seed}" if isinstance(task, MaskedLanguageTask) else None
    )
    losses = evaluate(accelerator, task, model, loader)
    tokens = losses.get("token", losses["loss"])
    rows = {"perplexity": math.exp(tokens), "token_loss": tokens}
    if "pair" in losses:
        rows["next_sentence_loss"] = losses["pair"]
    return [{"name": name, "value": value, "signature": signature} for name, value in rows.items()]
