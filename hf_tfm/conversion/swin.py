"""TfmSwin <-> transformers' Swin: the same architecture and weight names.

Our classes read files of transformers' Swin, and ``save_original_format=True`` writes them with the names that every
release of it reads (`NATIVE_NAMES` in modeling_swin.py), so only the configuration is converted.
"""

from dataclasses import replace

from transformers import SwinConfig, SwinForImageClassification, SwinModel

from ..models.configuration_swin import TfmSwinConfig
from ..models.modeling_swin import TfmSwinForImageClassification, TfmSwinModel
from ..models.patches import sides
from ..models.windows import Windows, fit_windows
from .conversion import Conversion, require_fixed
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


SWIN_MODEL = Conversion(
    name="swin",
    ours=TfmSwinModel,
    theirs=SwinModel,
    to_theirs=to_swin,
    to_ours=from_swin,
    remarks=lambda config: fit_remarks(config, "transformers"),
)
SWIN = replace(SWIN_MODEL, ours=TfmSwinForImageClassification, theirs=SwinForImageClassification)
CONVERSIONS = (SWIN, SWIN_MODEL)
