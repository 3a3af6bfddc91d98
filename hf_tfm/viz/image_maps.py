"""Attention of an image model: per-head maps over the image, and attention rollout.

    PIL image -> pixel values -> one forward pass with maps -> the row of one query over the patches -> PNG

Shapes: L layers; H heads; N = rows x columns patches; T tokens, including those before the patches, such as [class].
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention import forming_maps, pick
from .images import (
    NamedImage,
    enlarge,
    is_masked_autoencoder,
    mask_ratio_of,
    name_of,
    pixels,
    require_image_model,
    size_option,
    visible,
)
from .mosaic import Mosaic
from .rollout import attention_rollout

QUERIES = {"class": "the [class] token", "mean": "the mean of patches"}


@dataclass(frozen=True)
class ImageMaps:
    """Attention maps of a model for one image.

    Args:
        model: name of the model.
        name: name of the image.
        image: (H, W, 3) float32 in [0, 1], the image as the model reads it.
        query: "class", the [class] token, or "mean", the mean over all patches.
        heads: (L, H, rows, columns) float32, attention to each patch; attention to other tokens is omitted, so the sum
            may be below 1.
        rollout: (rows, columns) float32, contribution of each patch to the query after the last layer.
        prediction: predicted class with its probability, for a classifier.
    """

    model: str
    name: str
    image: np.ndarray
    query: str
    heads: np.ndarray
    rollout: np.ndarray
    prediction: str | None = None


@torch.no_grad()
def image_attention_maps(
    model: PreTrainedModel, processor: Any, image: NamedImage, query: str | None = None
) -> ImageMaps:
    """Run a model on one image and return its attention maps.

    A masked autoencoder sees the whole image here.

    Args:
        model: a model on image patches, such as `TfmViTForImageClassification`, `TfmMAEModel` or `ViTModel`, with any
            attention backend. It runs without dropout, and its state is restored.
        processor: processor of the model.
        image: result of `read_image`.
        query: "class" or "mean"; by default the one that the model bases its prediction on.

    Raises:
        ValueError: the model has no patches, no such query or no maps over all its tokens, or the patch size does not
            divide the image.
    """
    require_image_model(model.config, type(model).__name__)
    if query is None:
        query = "mean" if getattr(model.config, "pooling", "cls") == "mean" else "class"
    if query not in QUERIES:
        raise ValueError(f'query must be {" or ".join(QUERIES)}, got "{query}"')
    pixel_values, grid = pixels(model, processor, image.image)
    with forming_maps(model):
        outputs = forward_whole(model, pixel_values, grid[0] * grid[1])
    attentions = outputs.attentions
    before = attentions[0].shape[-1] - grid[0] * grid[1]  # tokens before the patches
    if before < 0 or len({maps.shape for maps in attentions}) > 1:
        raise ValueError(
            f"{type(model).__name__} has no attention between all patches of an image: its first map is "
            f"{tuple(attentions[0].shape)} for {grid[0] * grid[1]} patches"
        )
    if query == "class" and not before:
        raise ValueError(f'{type(model).__name__} has no [class] token: query must be "mean"')

    def over_image(maps: Tensor) -> np.ndarray:  # (..., T, T) -> (..., rows, columns)
        row = maps[..., 0, :] if query == "class" else maps[..., before:, :].mean(dim=-2)
        return row[..., before:].unflatten(-1, grid).float().cpu().numpy()

    return ImageMaps(
        model=name_of(model),
        name=image.name,
        image=visible(processor, pixel_values),
        query=query,
        heads=over_image(torch.cat(list(attentions))),
        rollout=over_image(attention_rollout(attentions)[0]),
        prediction=prediction(model, outputs),
    )


def forward_whole(model: PreTrainedModel, pixel_values: Tensor, patches: int) -> Any:
    """Run the model on (1, C, H, W) with maps; in a masked autoencoder all patches are visible and in order."""
    options = {"output_attentions": True, **size_option(model, pixel_values)}
    if not is_masked_autoencoder(model.config):
        return model(pixel_values, **options)
    order = torch.arange(patches, device=pixel_values.device)[None] / patches
    with mask_ratio_of(model, 0.0):
        return model(pixel_values, noise=order, **options)


def prediction(model: PreTrainedModel, outputs: Any) -> str | None:
    """Return a classifier's most probable class, with its probability."""
    if not type(model).__name__.endswith("ForImageClassification"):
        return None
    probability, label = outputs.logits[0].float().softmax(dim=-1).max(dim=-1)
    return f"{model.config.id2label[label.item()]} ({probability:.0%})"


def overlay(image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Overlay a map (rows, columns) in [0, 1] in colour on an image (H, W, 3) in grey, opaque where the map is
    high."""
    weights = enlarge(weights, image)
    colour = matplotlib.colormaps["autumn"](weights)[..., :3]
    cover = 0.9 * weights[..., None]
    return (1 - cover) * 0.4 * image.mean(axis=-1, keepdims=True) + cover * colour


def scaled(weights: np.ndarray) -> np.ndarray:
    """Scale a map to a maximum of 1."""
    return weights / max(weights.max(), 1e-12)


def plot_image_attention(
    maps: ImageMaps,
    output_dir: str | Path,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
) -> list[Path]:
    """Plot the attention of each head over the image, and attention rollout.

    Args:
        maps: result of `image_attention_maps`.
        output_dir: folder for ``heads.png``, with a row per layer and a column per head, and ``rollout.png``.
        layers: layers of ``heads.png``, counted from 0; by default all. Rollout always covers all layers.
        heads: heads of ``heads.png``, counted from 0; by default all.

    Returns:
        The two files.

    Raises:
        ValueError: a layer or head does not exist, or an image would be too large.
    """
    chosen_layers = pick(layers, maps.heads.shape[0], "layers")
    chosen_heads = pick(heads, maps.heads.shape[1], "heads")
    about = f"{maps.name}, predicted: {maps.prediction}" if maps.prediction else maps.name
    each = "each map scaled to its largest value"
    per_head = Mosaic(
        [[overlay(maps.image, scaled(maps.heads[layer, head])) for head in chosen_heads] for layer in chosen_layers],
        rows=[f"layer {layer}" for layer in chosen_layers],
        columns=[f"head {head}" for head in chosen_heads],
        title=[f"{maps.model}: attention of {QUERIES[maps.query]}, {each}", about],
        side=1.1,
    )
    rollout = scaled(maps.rollout)
    weighted = maps.image * enlarge(rollout, maps.image)[..., None]
    rolled = Mosaic(
        [[maps.image, overlay(maps.image, rollout), weighted]],
        rows=[""],
        columns=["image", "rollout", "image times rollout"],
        title=[f"{maps.model}: attention rollout of {QUERIES[maps.query]}", about],
        side=2.4,
    )
    folder = Path(output_dir)
    return [per_head.save(folder / "heads.png"), rolled.save(folder / "rollout.png")]
