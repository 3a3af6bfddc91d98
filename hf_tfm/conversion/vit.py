"""TfmViT <-> transformers' ViT: the same architecture with other weight names.

Our classes read files of transformers' ViT, and ``save_original_format=True`` writes them (`NATIVE_NAMES` in
modeling_vit.py), so only the configuration and the kind of positions are converted.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, ViTConfig, ViTForImageClassification, ViTModel

from ..models.configuration_vit import TfmViTConfig
from ..models.modeling_vit import TfmViTForImageClassification, TfmViTModel
from .conversion import Conversion, carried, require_fixed

# Fields with the same name and meaning in both configurations.
ENCODER_FIELDS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "hidden_act",
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "image_size",
    "patch_size",
    "num_channels",
    "qkv_bias",
)
FIELDS = (*ENCODER_FIELDS, "pooler_output_size", "pooler_act")
LABELS = ("id2label", "label2id", "problem_type")

# Fields that do not affect the outputs are carried along as extra fields of the other configuration, so that a round
# trip is lossless.
OURS_CARRIED = ("drop_path_rate", "activation_dropout")
THEIRS_CARRIED = ("encoder_stride",)


def translated(
    config: PreTrainedConfig, target: type[PreTrainedConfig], fields: tuple[str, ...], riding: tuple[str, ...], **new
) -> Any:
    """Convert ``config`` to the class ``target``: copy ``fields`` and labels, and those of ``riding`` that are set.

    Args:
        new: fields with a different value, or that only the target has.
    """
    kept = {field: getattr(config, field) for field in (*fields, *LABELS)}
    return target(**{**kept, **carried(config, riding), **new})


def to_vit(config: TfmViTConfig) -> ViTConfig:
    """Convert our configuration to transformers'.

    Raises:
        ValueError: a field has a value that `ViTModel` cannot express.
    """
    if config.pooling != "cls":
        raise ValueError(f"vit cannot express pooling={config.pooling!r}: convert to timm, which can")
    if config.distillation_token:
        raise ValueError("vit cannot express distillation_token=True: a classifier that has one converts to deit")
    require_fixed("vit", config, {"backbone": None})
    return translated(config, ViTConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED))


def to_vit_classifier(config: TfmViTConfig) -> ViTConfig:
    """Extend `to_vit`: the classifier of `ViTForImageClassification` must read the class token directly."""
    require_fixed("vit", config, {"representation_layer": False})
    return to_vit(config)


def from_vit(model: ViTForImageClassification | ViTModel) -> TfmViTConfig:
    """Convert the configuration of transformers' ``model`` to ours."""
    return translated(model.config, TfmViTConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED))


@torch.no_grad()
def with_learned_positions(model: PreTrainedModel) -> PreTrainedModel:
    """Replace the positions of ``model``, of any kind, with an equivalent learned table, one vector per patch."""
    if model.config.position_embedding_type == "learned":
        return model
    model = copy.deepcopy(model)
    embeddings = model.base_model.embeddings
    first, patches = embeddings.positions(embeddings.grid)  # the class token's position is 0 if it has none
    table = torch.cat([torch.zeros_like(patches[:, :1]) + first, patches], dim=1)  # (1, 1 + N, D)
    for name in ("position_embeddings", "row_embeddings", "column_embeddings"):
        if hasattr(embeddings, name):
            delattr(embeddings, name)
    embeddings.position_embeddings = nn.Parameter(table)
    embeddings.kind = model.config.position_embedding_type = "learned"
    return model


VIT_MODEL = Conversion(
    name="vit",
    ours=TfmViTModel,
    theirs=ViTModel,
    to_theirs=to_vit,
    to_ours=from_vit,
    prepare=with_learned_positions,
)
VIT = replace(
    VIT_MODEL, ours=TfmViTForImageClassification, theirs=ViTForImageClassification, to_theirs=to_vit_classifier
)
CONVERSIONS = (VIT, VIT_MODEL)
