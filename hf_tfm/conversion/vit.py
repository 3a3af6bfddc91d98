"""TfmViT <-> transformers' ViT: one architecture, two sets of names.

Our classes read files of transformers' ViT, and ``save_original_format=True`` writes them (`NATIVE_NAMES` in
modeling_vit.py), so what is left to convert is the configuration and the kind of positions.
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

# Fields of the same name and meaning on both sides.
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

# Fields that say nothing about the outputs. They ride along as extra fields of the other configuration, so that a
# round trip gives back what it took.
OURS_CARRIED = ("drop_path_rate", "activation_dropout")
THEIRS_CARRIED = ("encoder_stride",)


def translated(
    config: PreTrainedConfig, target: type[PreTrainedConfig], fields: tuple[str, ...], riding: tuple[str, ...], **new
) -> Any:
    """``config`` as a configuration of the class ``target``: its ``fields``, those of ``riding`` it has, its labels.

    Args:
        new: fields with another value, or only of the target.
    """
    kept = {field: getattr(config, field) for field in (*fields, *LABELS)}
    return target(**{**kept, **carried(config, riding), **new})


def to_vit(config: TfmViTConfig) -> ViTConfig:
    """Our architecture as transformers' configuration.

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
    """Like `to_vit`; `ViTForImageClassification` moreover has its classifier right on the class token."""
    require_fixed("vit", config, {"representation_layer": False})
    return to_vit(config)


def from_vit(model: ViTForImageClassification | ViTModel) -> TfmViTConfig:
    """The architecture of transformers' ``model`` as our configuration."""
    return translated(model.config, TfmViTConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED))


@torch.no_grad()
def with_learned_positions(model: PreTrainedModel) -> PreTrainedModel:
    """``model`` with its positions written out as one vector a patch, whatever their kind."""
    if model.config.position_embedding_type == "learned":
        return model
    model = copy.deepcopy(model)
    embeddings = model.base_model.embeddings
    first, patches = embeddings.positions(embeddings.grid)  # the class token's, 0 where it has none
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
