"""Small random models and batches shared by the model tests."""

import torch
from torch import Tensor

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration

TINY = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "max_position_embeddings": 40,
    "dropout": 0.0,
}


def tiny_config(**fields) -> TfmTransformerConfig:
    return TfmTransformerConfig(**{**TINY, **fields})


def tiny_model(seed: int = 0, **fields) -> TfmTransformerForConditionalGeneration:
    """A model in evaluation mode with all weights random, because default biases of 0 would hide bugs."""
    torch.manual_seed(seed)
    model = TfmTransformerForConditionalGeneration(tiny_config(**fields)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_batch(
    rows: int = 4, source: int = 7, target: int = 6, vocab_size: int = 48, seed: int = 0
) -> dict[str, Tensor]:
    """Ids (B, S) and (B, T) with masks of different lengths, the first row full; ids are 5 or larger."""
    generator = torch.Generator().manual_seed(seed)
    batch = {}
    for prefix, length in (("", source), ("decoder_", target)):
        ids = torch.randint(5, vocab_size, (rows, length), generator=generator)
        lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
        lengths[0] = length
        mask = (torch.arange(length) < lengths).long()
        batch[f"{prefix}input_ids"] = ids.masked_fill(mask == 0, 0)
        batch[f"{prefix}attention_mask"] = mask
    return batch


def mask_answers(batch: dict[str, Tensor], mask_token_id: int = 4) -> dict[str, Tensor]:
    """The batch with every other target id masked, as input of a mask-predict model."""
    ids = batch["decoder_input_ids"]
    places = (torch.arange(ids.shape[1]) % 2 == 0) & (batch["decoder_attention_mask"] == 1)
    return {**batch, "decoder_input_ids": ids.masked_fill(places, mask_token_id)}


def largest_difference(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape, (a.shape, b.shape)
    return (a - b).abs().max().item()
