"""Load image models and images, and convert model inputs back to displayable images.

path or "dataset:split:index" -> PIL image -> the model's own processor -> pixel values -> (H, W, 3) in [0, 1]
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    PreTrainedConfig,
    PreTrainedModel,
)

from ..data.images import BadImage, decode
from ..data.source import load_splits, take_split
from ..families import FAMILIES, MASKED_AUTOENCODER
from ..hub.loading import load_config, load_model
from ..models.patches import patch_grid

DATASET_ROW = re.compile(r"(?P<dataset>.+):(?P<split>[\w.-]+):(?P<index>-?\d+)")


@dataclass(frozen=True)
class NamedImage:
    """An image and its display name."""

    name: str
    image: Image.Image


def reads_patches(config: PreTrainedConfig | type[PreTrainedConfig]) -> bool:
    """Return True if a model, or those of a configuration class, split images into patches."""
    of_frames = getattr(config, "prediction_length", None) is not None  # a video forecaster
    return not of_frames and None not in (getattr(config, "patch_size", None), getattr(config, "image_size", None))


def is_masked_autoencoder(config: PreTrainedConfig) -> bool:
    """Return True for a masked autoencoder of this package or of transformers, with or without its decoder."""
    return config.model_type in MASKED_AUTOENCODER.model_types()


def require_image_model(config: PreTrainedConfig, model: str) -> None:
    """Refuse a model that does not split images into patches."""
    if not reads_patches(config):
        ours = [family.config.model_type for family in FAMILIES if reads_patches(family.config)]
        raise ValueError(
            f'"{model}" is a {config.model_type} model: pictures of images are for models of image patches, such as '
            f"{', '.join(ours)}, vit and vit_mae"
        )


def load_encoder(model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load an image model from a folder or the Hub, with its classifier or decoder if it has one.

    Raises:
        ValueError: it is not a model on image patches.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    require_image_model(config, model)
    heads = {"ForImageClassification": AutoModelForImageClassification, "ForPreTraining": AutoModelForPreTraining}
    saved = "".join(config.architectures or ())
    auto = next((auto for head, auto in heads.items() if saved.endswith(head)), AutoModel)
    # A missing pooler, which pretraining omits, is harmless because its output is not used.
    return load_model(auto, model, trust_remote_code=trust_remote_code, may_lack=lambda name: "pooler." in name)


def load_autoencoder(model: str, trust_remote_code: bool = False) -> PreTrainedModel:
    """Load a masked autoencoder with its decoder, of this package or of transformers.

    Raises:
        ValueError: it is another kind of model, or its decoder was not saved.
    """
    config = load_config(model, trust_remote_code=trust_remote_code)
    if not is_masked_autoencoder(config):
        raise ValueError(
            f'"{model}" is a {config.model_type} model: reconstructions are for masked autoencoders, '
            f"{' and '.join(MASKED_AUTOENCODER.model_types())}"
        )
    return load_model(AutoModelForPreTraining, model, trust_remote_code=trust_remote_code)


def read_image(where: str) -> NamedImage:
    """Read an image from a file or a data set.

    Args:
        where: a path, or "dataset:split:index" with a data set that `load_splits` accepts.

    Raises:
        ValueError: there is no such file, data set, split or row, or it is not an image.
    """
    path = Path(where)
    if path.is_file():
        return NamedImage(path.name, as_picture(where, where))
    row = DATASET_ROW.fullmatch(where)
    if row is None:
        raise ValueError(
            f'there is no image "{where}": it must be a file, or a row of a data set, dataset:split:index'
        )
    dataset, split, index = row["dataset"], row["split"], int(row["index"])
    rows = take_split(load_splits(dataset), split, "split")
    columns = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    if not columns:
        raise ValueError(f'data set "{dataset}" has no column of images; it has {", ".join(rows.column_names)}')
    if not 0 <= index < len(rows):
        raise ValueError(f'index must be from 0 to {len(rows) - 1} for split "{split}" of "{dataset}", got {index}')
    value = rows.cast_column(columns[0], datasets.Image(decode=False))[index][columns[0]]
    return NamedImage(f"{Path(dataset).name} {split} {index}", as_picture(value, where))


def as_picture(value: Any, where: str) -> Image.Image:
    """Decode an image to an upright RGB image.

    Raises:
        ValueError: it cannot be read; the error names its location ``where``.
    """
    try:
        return to_pil_image(decode(value))
    except BadImage as error:
        raise ValueError(f'image "{where}" cannot be read: {error}') from error


def pixels(model: PreTrainedModel, processor: Any, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
    """Return the model input of an image, (1, C, H, W) on its device, and the (rows, columns) of its patches.

    Raises:
        ValueError: the patch size does not divide the processed image, or the model's input is neither grey nor RGB.
    """
    if model.config.num_channels not in (1, 3):
        raise ValueError(f"num_channels must be 1 or 3 for a plot, got {model.config.num_channels}")
    image = image.convert("L" if model.config.num_channels == 1 else "RGB")
    pixel_values = processor(image, return_tensors="pt")["pixel_values"].to(model.device)
    backbone = getattr(getattr(model.base_model, "embeddings", None), "backbone", None)  # patches of its feature map
    size = pixel_values.shape[2:] if backbone is None else backbone.grid(*pixel_values.shape[2:])
    return pixel_values, patch_grid(*size, model.config.patch_size, "the image after its processor")


def size_option(model: PreTrainedModel, pixel_values: Tensor) -> dict[str, bool]:
    """Return the argument that lets a transformers model accept another image size; ours ignores it."""
    size = model.config.image_size
    own = (size, size) if isinstance(size, int) else tuple(size)
    return {} if tuple(pixel_values.shape[2:]) == own else {"interpolate_pos_encoding": True}


def visible(processor: Any, pixel_values: Tensor) -> np.ndarray:
    """Undo the processor's scaling: pixel values (1, C, H, W) -> (H, W, 3) float32 in [0, 1]."""
    image = pixel_values[0].detach().float().cpu().permute(1, 2, 0)  # (H, W, C)
    if processor.do_normalize:
        image = image * torch.tensor(processor.image_std) + torch.tensor(processor.image_mean)
    image = image / (255 * processor.rescale_factor if processor.do_rescale else 255)
    return image.clamp(0, 1).expand(-1, -1, 3).numpy().astype(np.float32)


def enlarge(values: np.ndarray, image: np.ndarray) -> np.ndarray:
    """Expand one value per patch (rows, columns) to one per pixel of an image (H, W, 3): (H, W)."""
    rows, columns = (np.arange(size) * n // size for size, n in zip(image.shape, values.shape, strict=False))
    return values[rows][:, columns]


def name_of(model: PreTrainedModel) -> str:
    """Return the display name of a model: its folder's name, its Hub id, or its class."""
    name = str(model.config._name_or_path or type(model).__name__)
    return Path(name).resolve().name if Path(name).exists() else name


@contextmanager
def mask_ratio_of(model: PreTrainedModel, mask_ratio: float | None) -> Iterator[float]:
    """Temporarily change the mask ratio of a masked autoencoder; None keeps it."""
    before = model.config.mask_ratio
    if mask_ratio is not None and not 0.0 <= mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must be in [0, 1), got {mask_ratio}")
    model.config.mask_ratio = before if mask_ratio is None else mask_ratio
    try:
        yield model.config.mask_ratio
    finally:
        model.config.mask_ratio = before
