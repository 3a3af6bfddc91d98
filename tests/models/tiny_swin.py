"""Small random Swin Transformers that the tests share."""

import torch
from tiny_vision import scramble

from hf_tfm import TfmSwinBackbone, TfmSwinConfig, TfmSwinForImageClassification, TfmSwinModel

TINY = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
    "drop_path_rate": 0.0,
}


def tiny_swin_config(**fields) -> TfmSwinConfig:
    return TfmSwinConfig(**{**TINY, **fields})


def tiny_swin(seed: int = 0, **fields) -> TfmSwinForImageClassification:
    """A classifier of 5 classes in evaluation mode whose every weight is random."""
    torch.manual_seed(seed)
    return scramble(TfmSwinForImageClassification(tiny_swin_config(**{"num_labels": 5, **fields})))


def tiny_swin_encoder(seed: int = 0, **fields) -> TfmSwinModel:
    torch.manual_seed(seed)
    return scramble(TfmSwinModel(tiny_swin_config(**fields)))


def tiny_swin_backbone(seed: int = 0, **fields) -> TfmSwinBackbone:
    torch.manual_seed(seed)
    return scramble(TfmSwinBackbone(tiny_swin_config(**fields)))
