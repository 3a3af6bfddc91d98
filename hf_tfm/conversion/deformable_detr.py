"""TfmDeformableDetr <-> transformers' Deformable DETR: the same architecture with other weight names.

Our classes read files of transformers' Deformable DETR, and ``save_original_format=True`` writes them (`NATIVE_NAMES`
in deformable_detr_stacks.py), so the configuration is converted, and the heads that one file stores once.
"""

import re
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import (
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DeformableDetrModel,
    PreTrainedModel,
)

from ..models.configuration_deformable_detr import BACKBONE_LEVELS, TfmDeformableDetrConfig
from ..models.modeling_deformable_detr import TfmDeformableDetrForObjectDetection, TfmDeformableDetrModel
from .conversion import Conversion, require_fixed
from .detr import (
    EPS,
    dilated,
    integer_weights,
    rebuilt,
    timm_backbone,
    timm_features,
    timm_name,
    with_frozen_norms,
)
from .vit import translated

# Fields with the same name and meaning in both configurations.
FIELDS = (
    "num_channels",
    "num_queries",
    "num_feature_levels",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_n_points",
    "encoder_ffn_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_n_points",
    "decoder_ffn_dim",
    "with_box_refine",
    "two_stage",
    "activation_function",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "position_embedding_type",
    "init_xavier_std",
    "dilation",
    "auxiliary_loss",
    "class_cost",
    "bbox_cost",
    "giou_cost",
    "bbox_loss_coefficient",
    "giou_loss_coefficient",
    "focal_alpha",
)
INTEGERS = tuple(name for name in FIELDS if name.endswith("_cost") or name.endswith("_loss_coefficient"))

# Fields that do not affect the outputs are carried along as extra fields of the other configuration, so that a round
# trip is lossless.
OURS_CARRIED = (
    *("backbone_frozen_stages", "backbone_norm_momentum", "class_loss_coefficient", "focal_gamma", "nms_threshold"),
)
THEIRS_CARRIED = ("encoder_layerdrop", "max_position_embeddings", "init_std", "eos_coefficient")

LOSSES = (
    "The outputs are equal, the training losses are not. transformers weights the class loss with 1, where the "
    "authors and this package use class_loss_coefficient (2 in the paper); it divides by the objects of a "
    "micro-batch; in two stages it computes no loss of the encoder's proposals, whose heads get no gradient; and in "
    "the matching cost it replaces NaN by the largest number (transformers 5.24)."
)


def to_deformable_detr(config: TfmDeformableDetrConfig) -> DeformableDetrConfig:
    """Convert our configuration to transformers'.

    Raises:
        ValueError: a field has a value that `DeformableDetrForObjectDetection` cannot express.
    """
    require_fixed("deformable_detr", config, {"backbone_norm": "frozen", "layer_norm_eps": EPS})
    heads = config.decoder_layers + config.two_stage
    if heads == 1 and config.with_box_refine:
        raise ValueError(
            "deformable_detr cannot express decoder_layers=1 with with_box_refine=True: transformers fails to tie the "
            "heads of a single layer (5.24)"
        )
    changed = {
        **integer_weights("deformable_detr", config, INTEGERS),
        "tie_word_embeddings": heads > 1,
        "two_stage_num_proposals": config.num_queries,
        "backbone_config": timm_backbone("deformable_detr", config, backbone_levels(config)),
    }
    return translated(config, DeformableDetrConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED), **changed)


def to_deformable_detr_model(config: TfmDeformableDetrConfig) -> DeformableDetrConfig:
    """`to_deformable_detr` without heads: transformers' base model never refines boxes, nor proposes them."""
    require_fixed("deformable_detr", config, {"with_box_refine": False})
    return to_deformable_detr(config)


def backbone_levels(config: Any) -> tuple[int, ...]:
    """Return the indices of the backbone's feature maps, counted from the last."""
    return tuple(range(-min(config.num_feature_levels, BACKBONE_LEVELS), 0))


def from_deformable_detr(model: DeformableDetrForObjectDetection | DeformableDetrModel) -> TfmDeformableDetrConfig:
    """Convert the configuration of transformers' ``model`` to ours.

    Raises:
        ValueError: a field has a value that `TfmDeformableDetrConfig` cannot express.
    """
    config = model.config
    fields: dict[str, Any] = {
        "backbone": timm_name(config.backbone_config),
        "dilation": config.dilation or dilated(config.backbone_config),
    }
    if config.two_stage:
        fields["num_queries"] = config.two_stage_num_proposals
    ours = translated(config, TfmDeformableDetrConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED), **fields)
    expected = list(timm_features(ours, backbone_levels(ours)).body.feature_info.out_indices)
    if sorted(config.backbone_config.out_indices) != expected:
        raise ValueError(
            f"the backbone must give the feature maps {expected} for num_feature_levels={ours.num_feature_levels}, "
            f"got out_indices {list(config.backbone_config.out_indices)}"
        )
    return ours


def with_every_class_head(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Repeat the class head that transformers shares between the layers of a refining detector; ours has one each."""
    layers = {int(found[1]) for name in weights if (found := re.match(r"model\.decoder\.bbox_embed\.(\d+)\.", name))}
    shared = {kind: weights.get(f"class_embed.0.{kind}") for kind in ("weight", "bias")}
    repeated = {
        f"class_embed.{i}.{kind}": value.clone()
        for i in layers
        for kind, value in shared.items()
        if value is not None and f"class_embed.{i}.{kind}" not in weights
    }
    return weights | repeated


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model of the same outputs in evaluation mode with frozen norms and the first group of queries alone."""
    model = with_frozen_norms(model)
    return model if model.config.query_groups == 1 else rebuilt(model, query_groups=1)


DEFORMABLE_DETR = Conversion(
    name="deformable_detr",
    ours=TfmDeformableDetrForObjectDetection,
    theirs=DeformableDetrForObjectDetection,
    to_theirs=to_deformable_detr,
    to_ours=from_deformable_detr,
    file_to_ours=with_every_class_head,
    prepare=prepared,
    remarks=lambda config: [LOSSES],
)
DEFORMABLE_DETR_MODEL = replace(
    DEFORMABLE_DETR,
    ours=TfmDeformableDetrModel,
    theirs=DeformableDetrModel,
    to_theirs=to_deformable_detr_model,
    file_to_ours=None,
    remarks=None,
)
CONVERSIONS = (DEFORMABLE_DETR, DEFORMABLE_DETR_MODEL)
