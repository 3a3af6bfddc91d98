"""TfmDetr <-> transformers' DETR: the same architecture with other weight names.

Our classes read files of transformers' DETR, and ``save_original_format=True`` writes them (`NATIVE_NAMES` in
detr_stacks.py), so only the configuration is converted.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from transformers import DetrConfig, DetrForObjectDetection, DetrForSegmentation, DetrModel, PreTrainedModel

from ..models.backbones import FrozenBatchNorm, FrozenBatchNormAct, TimmFeatures
from ..models.configuration_detr import WEIGHTS, TfmDetrConfig
from ..models.modeling_detr import TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation, TfmDetrModel
from .conversion import Conversion, refuse, require_fixed
from .vit import translated

# Fields with the same name and meaning in both configurations.
FIELDS = (
    "num_channels",
    "num_queries",
    "d_model",
    "encoder_layers",
    "encoder_attention_heads",
    "encoder_ffn_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_ffn_dim",
    "activation_function",
    "dropout",
    "attention_dropout",
    "activation_dropout",
    "position_embedding_type",
    "init_xavier_std",
    "dilation",
    *WEIGHTS,
    "eos_coefficient",
)

# Fields that do not affect the outputs are carried along as extra fields of the other configuration, so that a round
# trip is lossless.
OURS_CARRIED = ("backbone_frozen_stages", "backbone_norm_momentum", "nms_threshold")
THEIRS_CARRIED = ("encoder_layerdrop", "decoder_layerdrop", "init_std")

# With auxiliary losses, transformers' DETR feeds layer-normed states into the next decoder layer (5.23) and so
# computes a different function from the paper's; our training option is carried along under this name.
CARRIED_AUXILIARY = "tfm_auxiliary_loss"
EPS = 1e-5  # of all norms in transformers, whatever the timm model uses


def timm_name(backbone: Any) -> str:
    """Return the name of the timm model given by the ``backbone_config`` of transformers' `DetrConfig`.

    Raises:
        ValueError: the backbone is not a timm model.
    """
    if backbone.model_type != "timm_backbone":
        raise ValueError(f"backbone_config must be a timm_backbone, got {backbone.model_type}")
    return backbone.backbone


def dilated(backbone: Any) -> bool:
    """Return whether a ``backbone_config`` dilates the last stage."""
    return getattr(backbone, "output_stride", None) == 16


def finer_stride(backbone: Any) -> int | None:
    """Return the ``output_stride`` of a ``backbone_config`` if it is finer than that of ``dilation``."""
    return 8 if getattr(backbone, "output_stride", None) == 8 else None


def integer_weights(target: str, config: Any, names: tuple[str, ...]) -> dict[str, int]:
    """Return weights of costs and losses as integers, which they are in transformers.

    Raises:
        ValueError: a weight is no integer.
    """
    weights = {name: int(getattr(config, name)) for name in names}
    for name, value in weights.items():
        if value != getattr(config, name):
            refuse(target, name, getattr(config, name), value)
    return weights


def timm_features(config: Any, out_indices: tuple[int, ...]) -> TimmFeatures:
    """Return the backbone of a configuration, with frozen norms and without weights."""
    with torch.device("meta"):
        return TimmFeatures(config.backbone, config.num_channels, out_indices, "frozen")


def timm_backbone(target: str, config: Any, out_indices: tuple[int, ...]) -> dict[str, Any]:
    """Return the ``backbone_config`` of transformers for the backbone of our configuration.

    Args:
        target: name of their class, for errors.
        out_indices: of the feature maps, see `TimmFeatures`.

    Raises:
        ValueError: the backbone is not a timm model with its default arguments, or has norms that transformers freezes
            in another way.
    """
    if config.backbone_config is not None:
        raise ValueError(f"{target} cannot express a backbone of type {config.backbone_config['model_type']}")
    if config.backbone_kwargs:
        raise ValueError(f"{target} cannot express backbone_kwargs={config.backbone_kwargs!r}")
    features = timm_features(config, out_indices)
    for norm in features.modules():
        if isinstance(norm, FrozenBatchNormAct) or (isinstance(norm, FrozenBatchNorm) and norm.eps != EPS):
            raise ValueError(
                f"{target} cannot express backbone={config.backbone!r}: when transformers freezes its norms, it drops "
                f"what follows inside them and adds {EPS} to the variance"
            )
    backbone = {
        "model_type": "timm_backbone",
        "backbone": config.backbone,
        "num_channels": config.num_channels,
        "features_only": True,
        "use_pretrained_backbone": False,
        "out_indices": list(features.body.feature_info.out_indices),
    }
    return backbone | ({} if config.output_stride is None else {"output_stride": config.output_stride})


def to_detr(config: TfmDetrConfig) -> DetrConfig:
    """Convert our configuration to transformers'.

    Raises:
        ValueError: a field has a value that `DetrForObjectDetection` cannot express.
    """
    fixed = {"norm_first": False, "backbone_norm": "frozen", "layer_norm_eps": EPS}
    require_fixed("detr", config, fixed)
    changed = {
        **integer_weights("detr", config, WEIGHTS),
        CARRIED_AUXILIARY: config.auxiliary_loss,
        "auxiliary_loss": False,
        "backbone_config": timm_backbone("detr", config, (-4, -3, -2, -1)),
    }
    return translated(config, DetrConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED), **changed)


def from_detr(model: DetrForObjectDetection | DetrForSegmentation | DetrModel) -> TfmDetrConfig:
    """Convert the configuration of transformers' ``model`` to ours.

    Raises:
        ValueError: a field has a value that `TfmDetrConfig` cannot express.
    """
    config = model.config
    if config.auxiliary_loss:
        raise ValueError(
            "a detr with auxiliary_loss=True feeds layer-normed states into the next decoder layer, which the paper's "
            "does not: set it to false in its config.json if the model was not trained so"
        )
    fields: dict[str, Any] = {
        "backbone": timm_name(config.backbone_config),
        "dilation": config.dilation or dilated(config.backbone_config),
        "backbone_output_stride": finer_stride(config.backbone_config),
        "auxiliary_loss": getattr(config, CARRIED_AUXILIARY, True),
    }
    return translated(config, TfmDetrConfig, FIELDS, (*OURS_CARRIED, *THEIRS_CARRIED), **fields)


def with_frozen_norms(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze the statistics of the batch norms of ``model``, which does not change its output in evaluation mode."""
    return rebuilt(model, backbone_norm="frozen") if model.config.backbone_norm == "batch" else model


@torch.no_grad()
def rebuilt(model: PreTrainedModel, **fields: Any) -> PreTrainedModel:
    """Return a model in evaluation mode with other configuration fields, and the weights of ``model`` that it has."""
    config = copy.deepcopy(model.config)
    for name, value in fields.items():
        setattr(config, name, value)
    new, weights = type(model)(config), model.state_dict()
    new.load_state_dict({name: weights[name] for name in new.state_dict()})
    return new.eval()


DETR = Conversion(
    name="detr",
    ours=TfmDetrForObjectDetection,
    theirs=DetrForObjectDetection,
    to_theirs=to_detr,
    to_ours=from_detr,
    prepare=with_frozen_norms,
)
DETR_MODEL = replace(DETR, ours=TfmDetrModel, theirs=DetrModel)
DETR_PANOPTIC = replace(DETR, ours=TfmDetrForPanopticSegmentation, theirs=DetrForSegmentation)
CONVERSIONS = (DETR, DETR_MODEL, DETR_PANOPTIC)
