"""Proof that a converted model computes what its source computes: both are run, and the difference is written down."""

import hashlib
import platform
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

CERTIFICATE = "parity_certificate.json"
SEED = 0
SOURCE_LENGTHS = (1, 7, 19, 32)
TARGET_LENGTHS = (3, 1, 24, 11)
NEW_TOKENS = 24
TOLERANCE = 1e-5  # for logits up to LOGIT_SCALE; float32 rounding grows in proportion beyond
LOGIT_SCALE = 10.0


def random_batch(lengths: tuple[int, ...], vocab_size: int, pad: int, generator: torch.Generator):
    """Random tokens, padded on the right: ids and attention mask, both (B, T) int64, T the greatest length."""
    position = torch.arange(max(lengths))
    mask = (position < torch.tensor(lengths)[:, None]).long()  # (B, T)
    # Any token but the padding.
    tokens = torch.randint(vocab_size - 1, mask.shape, generator=generator)
    tokens += (tokens >= pad).long()
    return tokens.masked_fill(mask == 0, pad), mask


def fixed_inputs(vocab_size: int, pad: int, limit: int) -> dict[str, Tensor]:
    """The inputs of every check: four sentences of different lengths, at most ``limit`` tokens, on both sides."""
    generator = torch.Generator().manual_seed(SEED)
    source, source_mask = random_batch(tuple(min(n, limit) for n in SOURCE_LENGTHS), vocab_size, pad, generator)
    target, target_mask = random_batch(tuple(min(n, limit) for n in TARGET_LENGTHS), vocab_size, pad, generator)
    return {
        "input_ids": source,
        "attention_mask": source_mask,
        "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
    }


@torch.no_grad()
def compare(source: PreTrainedModel, target: PreTrainedModel) -> dict:
    """Run two sequence-to-sequence models on the fixed inputs, and generate greedily with both.

    Args:
        source, target: models in float32 on one device, with the same vocabulary.

    Returns:
        ``max_abs_difference`` of the logits, ``max_abs_logit``, ``tolerance``, ``greedy_tokens_equal`` and the
        ``inputs`` in words.

    Raises:
        ValueError: the logits differ by more than the tolerance, or the generated tokens differ.
    """
    config = source.config
    limit = config.max_position_embeddings
    inputs = fixed_inputs(config.vocab_size, config.pad_token_id, limit)
    ours, theirs = source.eval()(**inputs).logits, target.eval()(**inputs).logits  # (B, T, V)
    largest = ours.abs().max().item()
    difference = (ours - theirs).abs().max().item()
    tolerance = TOLERANCE * max(1.0, largest / LOGIT_SCALE)
    # `not <=`, so that a NaN fails too.
    if not difference <= tolerance:
        raise ValueError(
            f"the converted model is not the same function: logits differ by {difference:.3g}, the tolerance is "
            f"{tolerance:.3g} for logits up to {largest:.3g}"
        )
    new_tokens = min(NEW_TOKENS, limit)
    generated = [
        model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            do_sample=False,
            num_beams=1,
            min_length=0,
            max_new_tokens=new_tokens,
        )
        for model in (source, target)
    ]
    if not torch.equal(*generated):
        raise ValueError("the converted model generates other tokens than its source")
    return {
        "max_abs_difference": difference,
        "max_abs_logit": largest,
        "tolerance": tolerance,
        "greedy_tokens_equal": True,
        "inputs": {
            "seed": SEED,
            "source_lengths": inputs["attention_mask"].sum(1).tolist(),
            "target_lengths": inputs["decoder_attention_mask"].sum(1).tolist(),
            "new_tokens": new_tokens,
            "dtype": "float32",
            "device": ours.device.type,
        },
    }


def weight_hashes(folder: Path) -> dict[str, str]:
    """sha256 in hex of each weight file in ``folder``, by file name."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    hashes = {}
    for path in files:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        hashes[path.name] = digest.hexdigest()
    return hashes


def provenance() -> dict:
    """Versions of what ran, and when (UTC)."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "hf-tfm")},
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
