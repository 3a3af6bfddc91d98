"""Small random Vision Transformers and images shared by the model tests."""

import torch
from torch import Tensor

from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmViTBackbone,
    TfmViTConfig,
    TfmViTForImageClassification,
    TfmViTModel,
)

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
}
TINY_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 24,
    "decoder_num_hidden_layers": 2,
    "decoder_num_attention_heads": 2,
}
HYBRID = {"backbone": "resnet18", "image_size": 64, "patch_size": 1}  # 2 x 2 cells of resnet18's last feature map


def tiny_vit_config(**fields) -> TfmViTConfig:
    return TfmViTConfig(**{**TINY, **fields})


def tiny_mae_config(**fields) -> TfmMAEConfig:
    return TfmMAEConfig(**{**TINY, **TINY_DECODER, **fields})


@torch.no_grad()
def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Draw larger weights, biases and norms than by default, which leaves a model almost linear."""
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.add_(0.1 * torch.randn_like(parameter))
        elif "backbone" not in name:
            parameter.normal_(std=0.2)
    return model.eval()


def tiny_vit(seed: int = 0, **fields) -> TfmViTForImageClassification:
    """A classifier of 5 classes in evaluation mode with all weights random."""
    torch.manual_seed(seed)
    return scramble(TfmViTForImageClassification(tiny_vit_config(**{"num_labels": 5, **fields})))


def tiny_encoder(seed: int = 0, **fields) -> TfmViTModel:
    torch.manual_seed(seed)
    return scramble(TfmViTModel(tiny_vit_config(**fields)))


def tiny_backbone(seed: int = 0, **fields) -> TfmViTBackbone:
    torch.manual_seed(seed)
    return scramble(TfmViTBackbone(tiny_vit_config(**fields)))


def tiny_mae(seed: int = 0, **fields) -> TfmMAEForPreTraining:
    torch.manual_seed(seed)
    return scramble(TfmMAEForPreTraining(tiny_mae_config(**fields)))


def tiny_images(rows: int = 3, height: int = 16, width: int = 16, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, height, width, generator=torch.Generator().manual_seed(seed))


def tiny_noise(rows: int = 3, patches: int = 16, seed: int = 0) -> Tensor:
    """Noise that determines which patches a masked autoencoder masks."""
    return torch.rand(rows, patches, generator=torch.Generator().manual_seed(seed))


def gradients(model: torch.nn.Module) -> Tensor:
    """All gradients, flattened; a parameter without one counts as zero."""
    return torch.cat(
        [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters() if p.requires_grad]
    )
