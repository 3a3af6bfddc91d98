"""Translation: what one training step computes, and how a model is scored (Vaswani et al. 2017, section 5).

    {"input_ids", "labels"} lists -> padded batch -> sums of losses, and counts of what they sum over

Shapes: B sentences; S source, T target positions.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForSeq2SeqLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.batching import TokenBudgetSampler, part_of_rank, rng
from ..hub.loading import load_config
from ..hub.pretrained import load_to_train
from ..metrics import Bleu, Chrf, ExactMatch
from ..models import TfmTransformerConfig
from ..models.cross_entropy import IGNORE_INDEX
from ..models.mask_predict import mask_targets
from ..models.modeling_transformer import shift_right
from ..training.model_fields import check_fields

Batch = dict[str, Tensor]
EXTRA_LENGTH = 50  # a translation ends at the source's length plus 50 tokens (Vaswani et al. 2017, section 6.1)


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of ids -> (B, longest) int64, filled up with ``value``."""
    table = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        table[i, : len(row)] = row
    return torch.from_numpy(table)


class TranslationTask:
    """Token cross-entropy, and for a mask-predict model the length's too.

    Args:
        config: of the model.
        seed: of the masks a mask-predict model trains on.
    """

    item = "target tokens"
    term = "token"

    def __init__(self, config: TfmTransformerConfig, seed: int = 0):
        self.config, self.seed = config, seed
        self.masked = config.decoding == "mask_predict"

    def collate(self, examples: list[dict[str, Any]], indices: list[int], epoch: int, hidden: bool = False) -> Batch:
        """Examples -> ``input_ids``, ``attention_mask`` (B, S), ``decoder_input_ids``, ``labels`` (B, T).

        A hidden batch has no labels, so it counts for nothing.
        """
        source = pad([example["input_ids"] for example in examples], self.config.pad_token_id)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        labels = pad([example["labels"] for example in examples], IGNORE_INDEX)
        batch = {"input_ids": source, "attention_mask": (torch.arange(source.shape[1]) < lengths[:, None]).long()}
        if self.masked:
            noise = [rng(self.seed, epoch, index).random(labels.shape[1] + 1, dtype=np.float32) for index in indices]
            inputs, labels, real = mask_targets(labels, self.config, torch.from_numpy(np.stack(noise)))
            batch |= {"decoder_input_ids": inputs, "decoder_attention_mask": real}
        else:
            batch["decoder_input_ids"] = shift_right(
                labels, self.config.pad_token_id, self.config.decoder_start_token_id
            )
        batch["labels"] = torch.full_like(labels, IGNORE_INDEX) if hidden else labels
        return batch

    def count(self, batch: Batch) -> dict[str, int]:
        """Items of each term, from the targets alone; read before the batch leaves the host."""
        counts = {"token": int((batch["labels"] != IGNORE_INDEX).sum())}
        if self.masked:
            counts["length"] = int((batch["labels"] != IGNORE_INDEX).any(dim=1).sum())
        return counts

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Each term, summed over its items."""
        output = model(**batch, num_items_in_batch=1, return_logits=False)
        losses = {"token": output.token_loss}
        if self.masked:
            # A hidden batch still has lengths: without its target mask, attention would have nothing to look at.
            losses["length"] = output.length_loss * (batch["labels"] != IGNORE_INDEX).any()
        return losses


def build_config(
    size: str, fields: dict[str, Any], tokenizer: PreTrainedTokenizerBase | None = None
) -> TfmTransformerConfig:
    """The configuration of a new translation model.

    Args:
        size: see `TfmTransformerConfig.of_size`.
        fields: that differ from the size's.
        tokenizer: gives the vocabulary and its special tokens; None to check the rest before there is one.

    Raises:
        ValueError: a field is unknown or has no such value, or the tokenizer lacks a token.
    """
    by_tokenizer = [name for name in TfmTransformerConfig.__dataclass_fields__ if "token_id" in name]
    check_fields(TfmTransformerConfig, fields, by_tokenizer)
    given = {}
    if tokenizer is not None:
        check_tokenizer(tokenizer)
        ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "mask")}
        start = ids["pad_token_id"] if ids["bos_token_id"] is None else ids["bos_token_id"]
        given = {"vocab_size": len(tokenizer), **ids, "decoder_start_token_id": start}
    try:
        config = TfmTransformerConfig.of_size(size, **{**given, **fields})
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"model: {error}") from error
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {len(tokenizer)} tokens, got {config.vocab_size}"
        )
    return config


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that cannot mark padding, or where a sentence ends.

    Raises:
        ValueError: it says what is missing.
    """
    for name in ("pad", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(f'tokenizer "{tokenizer.name_or_path}" has no {name}_token')
    if tokenizer("a")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise ValueError(f'tokenizer "{tokenizer.name_or_path}" does not end a text with its eos_token')


def load_translator(name: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A translation model to train further, of a folder or a Hub id.

    Raises:
        ValueError: it is of another kind, or the tokenizer does not belong to it.
    """
    config = load_config(name, "model_name_or_path", trust_remote_code=None)
    if config.model_type != TfmTransformerConfig.model_type:
        raise ValueError(
            f'model_name_or_path "{name}" is a {config.model_type} model, not a {TfmTransformerConfig.model_type}: '
            "convert it first with hf-tfm convert --to tfm"
        )
    check_tokenizer(tokenizer)
    model, _ = load_to_train(AutoModelForSeq2SeqLM, name, lambda model, weight: "")
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f'model_name_or_path "{name}" has {model.config.vocab_size} tokens, fewer than the '
            f"{len(tokenizer)} of its tokenizer"
        )
    for token in ("pad", "eos"):
        ours, theirs = getattr(model.config, f"{token}_token_id"), getattr(tokenizer, f"{token}_token_id")
        if theirs not in (ours if isinstance(ours, list) else [ours]):
            raise ValueError(
                f'model_name_or_path "{name}": {token}_token_id is {ours} in the model, {theirs} in the tokenizer'
            )
    return model


def check_positions(config: TfmTransformerConfig, max_length: int) -> None:
    """Refuse learned positions that end before the longest text.

    Raises:
        ValueError: with both lengths.
    """
    if config.position_embedding_type == "learned" and config.max_position_embeddings < max_length:
        raise ValueError(
            "max_length must be at most max_position_embeddings of a model with learned positions, got "
            f"{max_length} and {config.max_position_embeddings}"
        )


@torch.inference_mode()
def translate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    accelerator: Accelerator | None = None,
    generation: dict[str, Any] | None = None,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[str]:
    """Translate texts, in batches of similar length, each rank its share; every rank gets all translations.

    Args:
        model: any sequence-to-sequence model with ``generate``.
        tokenizer: a source longer than its ``model_max_length`` is cut there.
        accelerator: tells the ranks apart; None where there is one.
        generation: arguments of ``generate``, such as ``num_beams`` and ``length_penalty``; ``max_length`` is lowered
            to the longest source of a batch plus `EXTRA_LENGTH`.
        batch_tokens: padded source tokens times beams in a batch.
    """
    generation = dict(generation or {})
    max_length = generation.pop("max_length", None) or model.generation_config.max_length or 512
    if not len(texts):
        return []
    # Most tokenizers have no limit, which is a number near 10^30; asked to cut there, they warn.
    limit = {"truncation": True} if tokenizer.model_max_length < 10**9 else {}
    ids = tokenizer(list(texts), **limit)["input_ids"]
    beams = (
        generation.get("length_candidates") or generation.get("num_beams") or model.generation_config.num_beams or 1
    )
    lengths = np.array([len(row) for row in ids])
    sampler = TokenBudgetSampler(lengths, max(batch_tokens // beams, int(lengths.max())), shuffle=False)
    steps = sampler.steps(0)
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    done: list[tuple[int, str]] = []
    for step in tqdm(steps, desc="translate", disable=not (progress and rank == 0), leave=False):
        part = part_of_rank(step, rank, world_size)
        if not part:
            continue
        batch = tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt").to(device)
        longest = min(max_length, batch["input_ids"].shape[1] + EXTRA_LENGTH)
        output = model.generate(**batch, max_length=longest, **generation)
        done += zip(part, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
    model.train(training)
    if world_size > 1:
        done = gather_object(done)
    return [text.strip() for _, text in sorted(done)]


def generation_config(config, num_beams: int, length_penalty: float, max_length: int) -> GenerationConfig:
    """How a trained model translates unless told otherwise; saved beside it."""
    shared = {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "max_length": max_length,
    }
    if config.decoding == "mask_predict":
        return GenerationConfig(**shared)
    beams = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": num_beams > 1}
    return GenerationConfig(**shared, **(beams if num_beams > 1 else {}))


METRICS: dict[str, Callable[[], Any]] = {
    "bleu": Bleu,
    "bleu_lowercase": lambda: Bleu(lowercase=True),
    "chrf": Chrf,
    "chrf_lowercase": lambda: Chrf(lowercase=True),
    "exact_match": ExactMatch,
}


def check_metrics(names: Sequence[str], argument: str = "metrics") -> None:
    """Refuse a metric that is not known, before time is spent on translations.

    Raises:
        ValueError: it names the metrics there are.
    """
    for name in names:
        if name not in METRICS:
            raise ValueError(f'{argument} must be among {", ".join(METRICS)}, got "{name}"')


def score(predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of ``name``, ``value`` and ``signature`` for each metric asked for.

    Raises:
        ValueError: a metric is not known, or there is nothing to score.
    """
    check_metrics(metrics)
    rows = []
    for name in metrics:
        result = METRICS[name]().compute(predictions=list(predictions), references=list(references))
        value = result[name.split("_lowercase")[0]]
        rows.append({"name": name, "value": float(value), "signature": result.get("signature")})
    return rows
