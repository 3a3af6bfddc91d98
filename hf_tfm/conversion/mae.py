"""TfmMAE <-> transformers' ViTMAE: the same architecture and weight files, different configurations; see vit.py."""

from dataclasses import replace

from transformers import PreTrainedConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel

from ..models.configuration_mae import DECODER_FIELDS, TfmMAEConfig
from ..models.modeling_mae import TfmMAEForPreTraining, TfmMAEModel, num_visible
from ..models.patches import patch_grid, sides
from .conversion import Conversion, refuse
from .vit import ENCODER_FIELDS, OURS_CARRIED, translated

FIELDS = (*ENCODER_FIELDS, *DECODER_FIELDS, "mask_ratio", "norm_pix_loss")


def square(target: str, config: PreTrainedConfig) -> dict[str, int]:
    """Return ``image_size`` and ``patch_size`` as integers.

    Raises:
        ValueError: one of them is not square, which ``target`` cannot express.
    """
    for field in ("image_size", "patch_size"):
        height, width = sides(getattr(config, field))
        if height != width:
            refuse(target, field, getattr(config, field), height)
    return {field: sides(getattr(config, field))[0] for field in ("image_size", "patch_size")}


def require_same_share(target: str, config: PreTrainedConfig) -> None:
    """Refuse a ``mask_ratio`` with which the other class keeps a different number of patches.

    It keeps ``int(N * (1 - mask_ratio))``: at a ratio of 0.9, 9 of 100 patches because of rounding, where we keep 10.
    """
    rows, columns = patch_grid(*sides(config.image_size), config.patch_size)
    total = rows * columns
    ours, theirs = num_visible(total, config.mask_ratio), int(total * (1 - config.mask_ratio))
    if ours != theirs:
        refuse(target, "mask_ratio", config.mask_ratio, round(1 - (ours + 0.5) / total, 6))


def to_vit_mae(config: TfmMAEConfig) -> ViTMAEConfig:
    """Convert our configuration to transformers'.

    Raises:
        ValueError: a field has a value that `ViTMAEForPreTraining` cannot express.
    """
    require_same_share("vit_mae", config)
    return translated(config, ViTMAEConfig, FIELDS, OURS_CARRIED, **square("vit_mae", config))


def from_vit_mae(model: ViTMAEForPreTraining | ViTMAEModel) -> TfmMAEConfig:
    """Convert the configuration of transformers' ``model`` to ours.

    Raises:
        ValueError: a field has a value that `TfmMAEConfig` cannot express.
    """
    require_same_share(TfmMAEConfig.__name__, model.config)
    return translated(model.config, TfmMAEConfig, FIELDS, OURS_CARRIED)


VIT_MAE = Conversion(
    name="vit_mae",
    ours=TfmMAEForPreTraining,
    theirs=ViTMAEForPreTraining,
    to_theirs=to_vit_mae,
    to_ours=from_vit_mae,
)
VIT_MAE_MODEL = replace(VIT_MAE, ours=TfmMAEModel, theirs=ViTMAEModel)
CONVERSIONS = (VIT_MAE, VIT_MAE_MODEL)
