"""Tiny random image models and a photo shared by the plot tests."""

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining, TfmViTConfig, TfmViTForImageClassification
from hf_tfm.viz import NamedImage

TINY = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "patch_size": 4,
    "initializer_range": 0.5,  # the maps of a freshly initialized model are almost uniform; these are not
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
CLASSES = {
    "vit": (TfmViTForImageClassification, TfmViTConfig, {}),
    "mae": (TfmMAEForPreTraining, TfmMAEConfig, DECODER),
    "native_vit": (ViTForImageClassification, ViTConfig, {}),
    "native_mae": (ViTMAEForPreTraining, ViTMAEConfig, DECODER),
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def image_model(name: str, image_size=16, **fields):
    model_class, config_class, more = CLASSES[name]
    torch.manual_seed(0)
    return model_class(config_class(image_size=image_size, **TINY, **more, **fields)).eval()


def image_processor(**fields) -> ViTImageProcessor:
    """A processor that does not resize."""
    return ViTImageProcessor(**{"do_resize": False, "image_mean": MEAN, "image_std": STD, **fields})


def photo(height: int = 16, width: int = 16, seed: int = 0) -> NamedImage:
    values = np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8)
    return NamedImage(f"photo {seed}", Image.fromarray(values))
