"""TfmSwin <-> transformers' Swin: the same architecture and weight names.

Our classes read files of transformers' Swin, and ``save_original_format=True`` writes them with the names that every
release of it reads (`NATIVE_NAMES` in modeling_swin.py), so only the configuration is converted.
"""

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import SwinConfig, SwinForImageClassification, SwinModel

from ..models.configuration_swin import TfmSwinConfig
from ..models.modeling_swin import TfmSwinForImageClassification, TfmSwinModel
from ..models.patches import sides
from ..models.windows import Windows, fit_windows
from .conversion import Conversion, WeightsFile, require_fixed
from .vit import translated

EPS = 1e-5  # of every layer norm; in the other libraries some norms do not have another one
# Fields with the same name and meaning in both configurations.
FIELDS = (
    *("image_size", "patch_size", "num_channels", "embed_dim", "depths", "num_heads", "window_size", "mlp_ratio"),
    *("qkv_bias", "hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"),
    *("initializer_range", "layer_norm_eps"),
)
THEIRS_CARRIED = ("encoder_stride",)  # of a head that is not converted
# The ablations of the paper are in no other library.
WHOLE = {"use_shift": True, "use_relative_position_bias": True, "layer_norm_eps": EPS}


def grids(config: TfmSwinConfig, fit: str) -> list[tuple[int, int]]:
    """Return the rows and columns of tokens of every stage, for images of the configuration's size."""
    found = []
    for side, patch in zip(sides(config.image_size), sides(config.patch_size), strict=True):
        tokens = side // patch if fit == "torchvision" else -(-side // patch)
        found.append([-(-tokens // 2**stage) for stage in range(len(config.depths))])
    return list(zip(*found, strict=True))


def layout(config: TfmSwinConfig, fit: str) -> list[Windows]:
    """Return the windows of all blocks, for images of the configuration's size and another ``window_fit``.

    Equal layouts are equal functions: where nothing is padded or nothing shifted, the order of both does not matter.
    """
    found = []
    for grid, depth in zip(grids(config, fit), config.depths, strict=True):
        for block in range(depth):
            windows = fit_windows(grid, config.window_size, config.use_shift and block % 2 == 1, fit)
            in_order = windows.is_shifted and windows.padded != grid
            found.append(windows if in_order else windows._replace(pad_first=True))
    return found


def size_of(config: TfmSwinConfig) -> str:
    """Return the size of images in words."""
    return " x ".join(map(str, sides(config.image_size)))


def require_fit(target: str, config: TfmSwinConfig, fit: str) -> None:
    """Refuse a model whose windows on images of its size differ from those of another library.

    Args:
        fit: ``window_fit`` of the library.

    Raises:
        ValueError: names the field.
    """
    if layout(config, config.window_fit) != layout(config, fit):
        raise ValueError(
            f"{target} cannot express window_fit={config.window_fit!r} for images of {size_of(config)} pixels, whose "
            f"windows do not divide the feature maps or exceed them: it needs {fit!r}"
        )


def fit_remarks(config: TfmSwinConfig, fit: str) -> list[str]:
    """Say for the certificate where the converted model may differ."""
    if config.window_fit == fit:
        return []
    return [
        f'window_fit was "{config.window_fit}" and is "{fit}" in the converted model: for images of {size_of(config)} '
        "pixels both are the same; for sizes whose feature maps windows do not divide or exceed, padding and shifting "
        "differ, and so do the outputs"
    ]


def to_swin(config: TfmSwinConfig) -> SwinConfig:
    """Convert our configuration to transformers'.

    Raises:
        ValueError: a field has a value that `SwinModel` cannot express.
    """
    require_fixed("swin", config, WHOLE)
    require_fit("swin", config, "transformers")
    if (small := min(min(grid) for grid in grids(config, "transformers"))) < config.window_size:
        raise ValueError(
            f"swin cannot express window_size={config.window_size} for images of {size_of(config)} pixels: "
            f"transformers fails on feature maps smaller than a window, here {small}; use a smaller window_size or "
            "larger images, or convert to timm"
        )
    return translated(config, SwinConfig, FIELDS, THEIRS_CARRIED)


def from_swin(model: SwinForImageClassification | SwinModel) -> TfmSwinConfig:
    """Convert the configuration of transformers' ``model`` to ours.

    Raises:
        ValueError: the model has a feature that `TfmSwinConfig` cannot express.
    """
    require_fixed(TfmSwinConfig.__name__, model.config, {"use_absolute_embeddings": False, "layer_norm_eps": EPS})
    return translated(model.config, TfmSwinConfig, FIELDS, THEIRS_CARRIED)


# {part of the authors' names: part of transformers'}; queries, keys and values are apart there.
AUTHORS_NAMES = {
    "patch_embed.proj": "swin.embeddings.patch_embeddings.projection",
    "patch_embed.norm": "swin.embeddings.norm",
    "norm": "swin.layernorm",
    "head": "classifier",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
BLOCK = re.compile(r"layers\.(\d+)\.blocks\.(\d+)\.(.+)")
TABLE = "attn.relative_position_bias_table"
COMPUTED = ("relative_position_index", "attn_mask")


def is_authors_swin(weights: dict[str, Tensor]) -> bool:
    """Return True for a classifier with the names of the authors' code."""
    return {f"layers.0.blocks.0.{TABLE}", "patch_embed.norm.weight", "head.weight"} <= weights.keys()


def from_authors(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the authors' weights to those of transformers' `SwinForImageClassification`."""
    found = {}
    for name, weight in weights.items():
        stem, _, kind = name.rpartition(".")
        if name.endswith(COMPUTED):
            continue
        if block := BLOCK.fullmatch(name):
            start, part = f"swin.encoder.{name[: block.start(3)]}", block[3].rpartition(".")[0]
            if block[3] == TABLE:
                found[f"{start}attention.self.relative_position_bias_table"] = weight
            elif part == "attn.qkv":
                for target, third in zip(("query", "key", "value"), weight.chunk(3), strict=True):
                    found[f"{start}attention.self.{target}.{kind}"] = third.clone()
            else:
                found[f"{start}{AUTHORS_NAMES[part]}.{kind}"] = weight
        else:
            found[f"{AUTHORS_NAMES.get(stem, f'swin.encoder.{stem}')}.{kind}"] = weight
    return found


def guessed_config(weights: dict[str, Tensor], arguments: Any, path: Path) -> dict[str, Any]:
    """Infer transformers' config.json for the authors' weights, from shapes.

    Args:
        arguments, path: not needed.
    """
    blocks = sorted({(int(block[1]), int(block[2])) for name in weights if (block := BLOCK.fullmatch(name))})
    stages = sorted({stage for stage, _ in blocks})
    tables = [weights[f"layers.{stage}.blocks.0.{TABLE}"] for stage in stages]
    embed_dim, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    window = (math.isqrt(tables[0].shape[0]) + 1) // 2
    mask = weights.get("layers.0.blocks.1.attn_mask")  # of the windows of an image
    config = SwinConfig(
        image_size=patch * window * math.isqrt(mask.shape[0]) if mask is not None else 224,
        patch_size=patch,
        num_channels=channels,
        embed_dim=embed_dim,
        depths=[sum(found == stage for found, _ in blocks) for stage in stages],
        num_heads=[table.shape[1] for table in tables],
        window_size=window,
        mlp_ratio=weights["layers.0.blocks.0.mlp.fc1.weight"].shape[0] / embed_dim,
        qkv_bias="layers.0.blocks.0.attn.qkv.bias" in weights,
        num_labels=weights["head.weight"].shape[0],
        architectures=[SwinForImageClassification.__name__],
    )
    return config.to_dict()


SWIN_MODEL = Conversion(
    name="swin",
    ours=TfmSwinModel,
    theirs=SwinModel,
    to_theirs=to_swin,
    to_ours=from_swin,
    remarks=lambda config: fit_remarks(config, "transformers"),
)
SWIN = replace(
    SWIN_MODEL,
    ours=TfmSwinForImageClassification,
    theirs=SwinForImageClassification,
    file=WeightsFile("Swin's authors", is_authors_swin, guessed_config, from_authors),
)
CONVERSIONS = (SWIN, SWIN_MODEL)
