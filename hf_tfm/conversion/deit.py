"""TfmViT with a distillation token <-> transformers' DeiT with two classifiers.

Blocks are read and written with the weight names of transformers' files, as in vit.py. The differences: the prefix of
all names, the name of the class token's classifier, and DeiT's learned position of the distillation token. Only the
sum of that token and its position matters, and ours stores the sum.
"""

import torch
from torch import Tensor
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from ..models.configuration_vit import TfmViTConfig
from ..models.modeling_vit import TfmViTForImageClassification
from .conversion import Conversion, require_fixed
from .vit import FIELDS, OURS_CARRIED, THEIRS_CARRIED, translated, with_learned_positions

RENAMED = (("vit.", "deit."), ("classifier.", "cls_classifier."))  # prefixes: (ours, theirs)
OUR_TOKEN, THEIR_TOKEN = "vit.distillation_token", "deit.embeddings.distillation_token"
POSITIONS = "embeddings.position_embeddings"


def to_deit(config: TfmViTConfig) -> DeiTConfig:
    """Convert our configuration to transformers'.

    Raises:
        ValueError: the model has no distillation token, or has a backbone.
    """
    require_fixed("deit", config, {"distillation_token": True, "backbone": None})
    return translated(config, DeiTConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED))


def from_deit(model: DeiTForImageClassificationWithTeacher) -> TfmViTConfig:
    """Convert the configuration of transformers' ``model`` to ours."""
    riding = (*OURS_CARRIED, *THEIRS_CARRIED)
    return translated(model.config, TfmViTConfig, FIELDS, riding, distillation_token=True)


def renamed(weights: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """Replace prefixes of weight names, given as (old, new)."""
    found = {}
    for name, weight in weights.items():
        old, new = next((pair for pair in names if name.startswith(pair[0])), ("", ""))
        found[new + name.removeprefix(old)] = weight
    return found


def file_to_deit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of our file to those of theirs; the position of the distillation token is zero."""
    weights = renamed(weights, ((OUR_TOKEN, THEIR_TOKEN), *RENAMED))
    table = weights[f"deit.{POSITIONS}"]  # (1, 1 + N, D)
    positions = torch.cat([table[:, :1], torch.zeros_like(table[:, :1]), table[:, 1:]], dim=1)
    return {**weights, f"deit.{POSITIONS}": positions}


def file_from_deit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the weights of their file to those of ours; the position of the distillation token is added to the
    token."""
    weights = renamed(weights, ((THEIR_TOKEN, OUR_TOKEN), *((theirs, ours) for ours, theirs in RENAMED)))
    table = weights[f"vit.{POSITIONS}"]  # (1, 2 + N, D)
    positions = torch.cat([table[:, :1], table[:, 2:]], dim=1)
    return {**weights, f"vit.{POSITIONS}": positions, OUR_TOKEN: weights[OUR_TOKEN] + table[:, 1:2]}


DEIT = Conversion(
    name="deit",
    ours=TfmViTForImageClassification,
    theirs=DeiTForImageClassificationWithTeacher,
    to_theirs=to_deit,
    to_ours=from_deit,
    prepare=with_learned_positions,
    file_to_theirs=file_to_deit,
    file_to_ours=file_from_deit,
)
CONVERSIONS = (DEIT,)
