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
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from ..data.batching import TokenBudgetSampler, part_of_rank, rng
from ..metrics import Bleu, Chrf, ExactMatch
from ..models.cross_entropy import IGNORE_INDEX
from ..models.mask_predict import mask_targets
from ..models.modeling_transformer import shift_right

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
        tokenizer: of both sides.
        seed: of the masks a mask-predict model trains on.
    """

    item = "target tokens"
    term = "token"

    def __init__(self, config, tokenizer: PreTrainedTokenizerBase, seed: int = 0):
        self.config, self.tokenizer, self.seed = config, tokenizer, seed
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
            losses["length"] = output.length_loss
        return losses


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
        generation: arguments of ``generate``, such as ``num_beams`` and ``length_penalty``; ``max_length`` is lowered
            to the longest source of a batch plus `EXTRA_LENGTH`.
        batch_tokens: padded source tokens times beams in a batch.
    """
    generation = dict(generation or {})
    max_length = generation.pop("max_length", None) or model.generation_config.max_length or 512
    ids = tokenizer(list(texts))["input_ids"]
    beams = generation.get("num_beams") or generation.get("length_candidates") or 1
    lengths = np.array([len(row) for row in ids])
    sampler = TokenBudgetSampler(lengths, max(batch_tokens // beams, int(lengths.max())), shuffle=False)
    steps = sampler.steps(0)
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    done: list[tuple[int, str]] = []
    for step in tqdm(steps, desc="translate", disable=not progress, leave=False):
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
    "exact_match": ExactMatch,
}


def score(predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of ``name``, ``value`` and ``signature`` for each metric asked for.

    Raises:
        ValueError: a metric is not known.
    """
    rows = []
    for name in metrics:
        if name not in METRICS:
            raise ValueError(f'metric "{name}" is not known; there are {", ".join(METRICS)}')
        result = METRICS[name]().compute(predictions=list(predictions), references=list(references))
        value = result[name.split("_lowercase")[0]]
        rows.append({"name": name, "value": float(value), "signature": result.get("signature")})
    return rows
