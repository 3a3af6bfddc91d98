"""Small random Deformable DETRs that several tests share; images and labels are those of tiny_detr."""

import torch
from tiny_detr import scramble_detr

from hf_tfm import TfmDeformableDetrConfig, TfmDeformableDetrForObjectDetection

TINY = {
    "backbone": "test_resnet",  # of timm: four stages, 0.4 M parameters, strides 4 to 32
    "num_queries": 7,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 8,
    "encoder_n_points": 3,
    "decoder_n_points": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "num_labels": 5,
}
REFINE = {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True}
VARIANTS = {
    "single-scale": {"num_feature_levels": 1},
    "DC5": {"num_feature_levels": 1, "dilation": True},
    "multi-scale": {},
    "refinement": REFINE,
    "two-stage": TWO_STAGE,
}


def tiny_deformable_config(**fields) -> TfmDeformableDetrConfig:
    return TfmDeformableDetrConfig(**{**TINY, **fields})


@torch.no_grad()
def tiny_deformable(seed: int = 0, **fields) -> TfmDeformableDetrForObjectDetection:
    """A detector of 5 classes in evaluation mode whose every weight is random."""
    torch.manual_seed(seed)
    model = scramble_detr(TfmDeformableDetrForObjectDetection(tiny_deformable_config(**fields)))
    model.model.level_embed.normal_()
    return model
