"""Small random DETR models, images and labels shared by several tests."""

import torch
from torch import Tensor, nn

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation
from hf_tfm.models.backbones import FrozenBatchNorm

TINY = {
    "backbone": "test_resnet",  # timm test model: four stages, 0.4 M parameters, strides 4 to 32
    "num_queries": 7,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "num_labels": 5,
}
PLAIN = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}  # the same in training and evaluation
# The mask head adds the encoder heads to the width, and requires groups of eight channels.
PANOPTIC = {"encoder_attention_heads": 8}


def tiny_detr_config(**fields) -> TfmDetrConfig:
    return TfmDetrConfig(**{**TINY, **fields})


@torch.no_grad()
def scramble_detr(model: nn.Module) -> nn.Module:
    """Draw all weights and norm statistics such that values keep their scale from layer to layer."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm | nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.normal_(std=0.2)
    return model.eval()


def tiny_detr(seed: int = 0, **fields) -> TfmDetrForObjectDetection:
    """A detector of 5 classes in evaluation mode with all weights random."""
    torch.manual_seed(seed)
    return scramble_detr(TfmDetrForObjectDetection(tiny_detr_config(**fields)))


def tiny_panoptic(seed: int = 0, **fields) -> TfmDetrForPanopticSegmentation:
    torch.manual_seed(seed)
    return scramble_detr(TfmDetrForPanopticSegmentation(tiny_detr_config(**{**PANOPTIC, **fields})))


def tiny_photos(rows: int = 3, height: int = 64, width: int = 96, channels: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, channels, height, width, generator=torch.Generator().manual_seed(seed))


def tiny_padding(sizes: tuple[tuple[int, int], ...], height: int = 64, width: int = 96) -> Tensor:
    """A pixel mask (B, H, W) for images of the given heights and widths."""
    mask = torch.zeros(len(sizes), height, width, dtype=torch.int64)
    for row, (rows, columns) in zip(mask, sizes, strict=True):
        row[:rows, :columns] = 1
    return mask


def tiny_labels(
    counts: tuple[int, ...] = (3, 0, 2), classes: int = 5, size: tuple[int, int] | None = None, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Random objects for each image, boxes as cxcywh inside it; with ``size`` also their masks (n, H, W)."""
    generator = torch.Generator().manual_seed(seed)
    labels = []
    for count in counts:
        centres = 0.3 + 0.4 * torch.rand(count, 2, generator=generator)
        sizes = 0.1 + 0.5 * torch.rand(count, 2, generator=generator)
        labels.append(
            {
                "class_labels": torch.randint(classes, (count,), generator=generator),
                "boxes": torch.cat([centres, sizes], dim=1),
            }
        )
        if size is not None:
            labels[-1]["masks"] = (torch.rand(count, *size, generator=generator) > 0.6).float()
    return labels


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference relative to the norm of ``expected``."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return ((found - expected).norm() / expected.norm().clamp_min(1e-12)).item()
