"""Verify that a converted model computes the same function as its source: run both and record the differences."""

import hashlib
import platform
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..models.patches import patch_grid, sides

SEED = 0
SOURCE_LENGTHS = (1, 7, 19, 32)
TARGET_LENGTHS = (3, 1, 24, 11)
NEW_TOKENS = 24
IMAGES = 3
PHOTOS = ((160, 224), (128, 192), (97, 150))  # heights and widths in a padded batch, for models without a fixed size
# Outputs to compare, if both models have them.
OUTPUTS = (
    *("logits", "prediction_logits", "seq_relationship_logits", "start_logits", "end_logits"),
    *("cls_logits", "distillation_logits", "pred_boxes", "pred_masks"),
    *("last_hidden_state", "pooler_output", "loss", "mask"),
)
TOLERANCE = 1e-5  # for logits up to LOGIT_SCALE; float32 rounding grows in proportion beyond
LOGIT_SCALE = 10.0


def random_batch(lengths: tuple[int, ...], vocab_size: int, pad: int, generator: torch.Generator):
    """Create random right-padded tokens: ids and attention mask, both (B, T) int64, T the maximum length."""
    position = torch.arange(max(lengths))
    mask = (position < torch.tensor(lengths)[:, None]).long()  # (B, T)
    # Any token except padding.
    tokens = torch.randint(vocab_size - 1, mask.shape, generator=generator)
    tokens += (tokens >= pad).long()
    return tokens.masked_fill(mask == 0, pad), mask


def fixed_inputs(vocab_size: int, pad: int, limit: int) -> dict[str, Tensor]:
    """Create the inputs for encoder-decoder models: four sentence pairs of different lengths, at most ``limit``
    tokens."""
    generator = torch.Generator().manual_seed(SEED)
    source, source_mask = random_batch(tuple(min(n, limit) for n in SOURCE_LENGTHS), vocab_size, pad, generator)
    target, target_mask = random_batch(tuple(min(n, limit) for n in TARGET_LENGTHS), vocab_size, pad, generator)
    return {
        "input_ids": source,
        "attention_mask": source_mask,
        "decoder_input_ids": target,
        "decoder_attention_mask": target_mask,
    }


def fixed_texts(config: PreTrainedConfig, choices: bool) -> dict[str, Tensor]:
    """Create the inputs for single-text models: four texts of different lengths, using all segments of the model.

    Without a padding token there is only one text, because classifiers on the last token could not find the end of the
    others.

    Args:
        choices: the texts are multiple-choice endings, (1, 4, T) instead of (4, T).
    """
    generator = torch.Generator().manual_seed(SEED)
    pad, limit = config.pad_token_id, config.max_position_embeddings
    lengths = (max(SOURCE_LENGTHS),) if pad is None else SOURCE_LENGTHS
    ids, mask = random_batch(tuple(min(n, limit) for n in lengths), config.vocab_size, pad or 0, generator)
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0):
        inputs["token_type_ids"] = torch.randint(config.type_vocab_size, ids.shape, generator=generator)
    return {name: value[None] for name, value in inputs.items()} if choices else inputs


def fixed_images(config: PreTrainedConfig, count: int = IMAGES, seed: int = SEED) -> dict[str, Tensor]:
    """Create the inputs for vision models: images (B, C, H, W) of the model's size, and masking noise if it masks."""
    generator = torch.Generator().manual_seed(seed)
    height, width = sides(config.image_size)
    images = torch.randn(count, config.num_channels, height, width, generator=generator)
    if not hasattr(config, "mask_ratio"):
        return {"pixel_values": images}
    rows, columns = patch_grid(height, width, config.patch_size)
    return {"pixel_values": images, "noise": torch.rand(count, rows * columns, generator=generator)}


def fixed_photos(
    config: PreTrainedConfig, sizes: Sequence[tuple[int, int]] = PHOTOS, seed: int = SEED
) -> dict[str, Tensor]:
    """Create the inputs for detectors: padded images (B, C, H, W) of ``sizes``, and their pixel mask."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (max(sides) for sides in zip(*sizes, strict=True))
    mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for row, (rows, columns) in zip(mask, sizes, strict=True):
        row[:rows, :columns] = 1
    images = torch.randn(len(sizes), config.num_channels, height, width, generator=generator)
    return {"pixel_values": images * mask[:, None], "pixel_mask": mask}


def compare(source: nn.Module, target: nn.Module, config: PreTrainedConfig) -> dict:
    """Compare the outputs of two models on the fixed inputs, including generated tokens if they generate text.

    Args:
        source, target: models in float32 on one device, of the same architecture.
        config: configuration of our model of the two.

    Returns:
        ``max_abs_difference`` of the main output (logits if there are any), with ``max_abs_output`` and ``tolerance``;
        ``differences`` of every output; for text ``greedy_tokens_equal``; a description of the ``inputs``.

    Raises:
        ValueError: an output differs by more than the tolerance, or the generated tokens differ.
    """
    if hasattr(config, "image_size") or hasattr(config, "num_queries"):
        inputs = fixed_images(config) if hasattr(config, "image_size") else fixed_photos(config)
        shapes = {name: list(value.shape) for name, value in inputs.items()}
        return {**compare_outputs(source, target, inputs), "inputs": described(source, shapes)}
    if not config.is_encoder_decoder:
        return compare_texts(source, target, config)
    inputs = fixed_inputs(config.vocab_size, config.pad_token_id, config.max_position_embeddings)
    new_tokens = min(NEW_TOKENS, config.max_position_embeddings)
    lengths = {
        "source_lengths": inputs["attention_mask"].sum(1).tolist(),
        "target_lengths": inputs["decoder_attention_mask"].sum(1).tolist(),
        "new_tokens": new_tokens,
    }
    return {
        **compare_outputs(source, target, inputs),
        "greedy_tokens_equal": compare_generated(source, target, inputs, new_tokens),
        "inputs": described(source, lengths),
    }


def compare_texts(source: PreTrainedModel, target: PreTrainedModel, config: PreTrainedConfig) -> dict:
    """`compare` single-text models; for causal models, generation starts from left-padded prompts."""
    inputs = fixed_texts(config, choices=type(source).__name__.endswith("ForMultipleChoice"))
    lengths = {"lengths": inputs["attention_mask"].sum(-1).flatten().tolist()}
    found = compare_outputs(source, target, inputs)
    if source.can_generate():
        prompts = {name: inputs[name][:, : config.max_position_embeddings // 2].flip(1) for name in inputs}
        lengths["new_tokens"] = min(NEW_TOKENS, config.max_position_embeddings - prompts["input_ids"].shape[1])
        found["greedy_tokens_equal"] = compare_generated(source, target, prompts, lengths["new_tokens"])
    return {**found, "inputs": described(source, lengths)}


def described(model: nn.Module, inputs: dict) -> dict:
    """Describe the inputs and the precision for the certificate."""
    parameter = next(model.parameters())
    return {"seed": SEED, **inputs, "dtype": str(parameter.dtype).split(".")[1], "device": parameter.device.type}


def compare_outputs(source: nn.Module, target: nn.Module, inputs: dict[str, Tensor]) -> dict:
    """Compare all outputs that both models have; see `compare`.

    In float32 first; if a difference exceeds the tolerance, which rounding in a deep model may cause, again in
    float64.
    """
    found = differences(source, target, inputs)
    if not all(within_tolerance(*pair) for pair in found.values()):
        precise = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
        found = differences(source.double(), target.double(), precise)
    for name, (difference, largest) in found.items():
        if not within_tolerance(difference, largest):
            raise ValueError(
                f"the converted model gives different outputs: {name} differ by {difference:.3g}, the tolerance is "
                f"{tolerance_for(largest):.3g} for {name} up to {largest:.3g}"
            )
    difference, largest = next(iter(found.values()))
    return {
        "max_abs_difference": difference,
        "max_abs_output": largest,
        "tolerance": tolerance_for(largest),
        "differences": {name: pair[0] for name, pair in found.items()},
    }


def tolerance_for(largest: float) -> float:
    """Return the tolerance for values up to ``largest``."""
    return TOLERANCE * max(1.0, largest / LOGIT_SCALE)


def within_tolerance(difference: float, largest: float) -> bool:
    """Return True if the difference is within rounding error; False for NaN."""
    return difference <= tolerance_for(largest)


@torch.no_grad()
def differences(source: nn.Module, target: nn.Module, inputs: dict[str, Tensor]) -> dict[str, tuple[float, float]]:
    """Return (largest difference, largest value) of each output that both models have."""
    outputs = []
    for model in (source.eval(), target.eval()):
        # Images are passed by position, because timm names the first argument differently.
        output = model(*inputs.values()) if "pixel_values" in inputs else model(**inputs)
        outputs.append({"logits": output} if isinstance(output, Tensor) else output)
    found = {}
    for name in (name for name in OUTPUTS if all(output.get(name) is not None for output in outputs)):
        ours, theirs = (output[name] for output in outputs)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"the converted model gives different outputs: {name} of shape {tuple(ours.shape)} became "
                f"{tuple(theirs.shape)}"
            )
        found[name] = ((ours - theirs).abs().max().item(), ours.abs().max().item())
    return found


@torch.no_grad()
def compare_generated(
    source: PreTrainedModel, target: PreTrainedModel, inputs: dict[str, Tensor], new_tokens: int
) -> bool:
    """Check that both models generate the same tokens greedily, and return True.

    Raises:
        ValueError: they differ.
    """
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
        raise ValueError("the converted model generates different tokens than its source")
    return True


def weight_hashes(path: Path) -> dict[str, str]:
    """Return the sha256 hex digest of each weight file in the folder ``path``, or of that single file, by file
    name."""
    files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
    return {weights.name: file_hash(weights) for weights in ([path] if path.is_file() else files)}


def file_hash(path: Path) -> str:
    """Return the sha256 hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def provenance() -> dict:
    """Return package versions and the date (UTC)."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "timm", "hf-tfm")},
        },
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
