"""TfmDetr <-> the weight names of DETR's authors (Carion et al. 2020, arXiv:2005.12872).

Many programs read these files. A converted model is verified against an implementation from independent parts, see
detr_authors_model.py.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.configuration_detr import TfmDetrConfig
from ..models.modeling_detr import TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation
from .conversion import Conversion, WeightsFile, refuse, require_fixed
from .detr import EPS, with_frozen_norms
from .detr import FIELDS as SHARED_FIELDS
from .detr_authors_model import AuthorsDetr, AuthorsDetrConfig, AuthorsDetrSegm
from .vit import translated

FIELDS = (
    *SHARED_FIELDS,
    *("backbone", "backbone_norm", "backbone_norm_momentum", "backbone_frozen_stages"),
    *("norm_first", "layer_norm_eps", "auxiliary_loss", "nms_threshold"),
)
# The authors' code supports only these: number of blocks in layer1 and layer3, and whether blocks are bottlenecks.
BACKBONES = {
    (2, 2, False): "resnet18",
    (3, 6, False): "resnet34",
    (3, 6, True): "resnet50",
    (3, 23, True): "resnet101",
}
PUBLISHED_WIDTH, PUBLISHED_HEADS = 256, 8  # of every published model; a file does not contain the number of heads

# (our name, their name), applied in order.
RENAMES = (
    (r"model\.backbone\.body\.", "backbone.0.body."),
    (r"model\.position_embedding\.row_embeddings\.", "backbone.1.row_embed."),
    (r"model\.position_embedding\.column_embeddings\.", "backbone.1.col_embed."),
    (r"model\.input_projection\.", "input_proj."),
    (r"model\.query_position_embeddings\.", "query_embed."),
    (r"model\.(encoder|decoder)\.layernorm\.", r"transformer.\1.norm."),
    (r"model\.(encoder|decoder)\.layers\.", r"transformer.\1.layers."),
    (r"self_attn\.[qkv]_proj\.", "self_attn.in_proj_"),
    (r"cross_attn\.[qkv]_proj\.", "multihead_attn.in_proj_"),
    (r"cross_attn\.out_proj\.", "multihead_attn.out_proj."),
    (r"self_attn_residual\.norm\.", "norm1."),
    (r"cross_attn_residual\.norm\.", "norm2."),
    (r"(encoder\.layers\.\d+)\.feed_forward_residual\.norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.feed_forward_residual\.norm\.", r"\1.norm3."),
    (r"feed_forward\.up_proj\.", "linear1."),
    (r"feed_forward\.down_proj\.", "linear2."),
    (r"class_labels_classifier\.", "class_embed."),
    (r"bbox_predictor\.", "bbox_embed."),
    (r"bbox_attention\.([qk])_proj\.", r"bbox_attention.\1_linear."),
    (r"mask_head\.first\.conv\.", "mask_head.lay1."),
    (r"mask_head\.first\.norm\.", "mask_head.gn1."),
    (r"mask_head\.second\.conv\.", "mask_head.lay2."),
    (r"mask_head\.second\.norm\.", "mask_head.gn2."),
    *((rf"mask_head\.steps\.{i}\.adapter\.", f"mask_head.adapter{i + 1}.") for i in range(3)),
    *((rf"mask_head\.steps\.{i}\.refine\.conv\.", f"mask_head.lay{i + 3}.") for i in range(3)),
    *((rf"mask_head\.steps\.{i}\.refine\.norm\.", f"mask_head.gn{i + 3}.") for i in range(3)),
    (r"mask_head\.last\.", "mask_head.out_lay."),
)


def names(config: TfmDetrConfig, panoptic: bool = False) -> dict[str, str]:
    """Map every weight: {ours: theirs}."""
    with torch.device("meta"):
        own = (TfmDetrForPanopticSegmentation if panoptic else TfmDetrForObjectDetection)(config).state_dict()
    table = {}
    for name in own:
        renamed = name
        for ours, theirs in RENAMES:
            renamed = re.sub(ours, theirs, renamed)
        table[name] = renamed
    return table


def panoptic_names(config: TfmDetrConfig) -> dict[str, str]:
    """Map every weight of the detector and the mask head: {ours: theirs}."""
    return names(config, panoptic=True)


def to_authors(config: TfmDetrConfig) -> AuthorsDetrConfig:
    """Convert our configuration to one that the authors' code can build.

    Raises:
        ValueError: a field has a value that it cannot express.
    """
    fixed = {"backbone_norm": "frozen", "num_channels": 3, "activation_function": "relu", "layer_norm_eps": EPS}
    alike = {
        "decoder_attention_heads": config.encoder_attention_heads,
        "decoder_ffn_dim": config.encoder_ffn_dim,
        "backbone_output_stride": None,
    }
    require_fixed("detr_authors", config, {**fixed, **alike})
    if config.backbone not in BACKBONES.values():
        found = config.backbone or config.backbone_config["model_type"]
        refuse("detr_authors", "backbone", found, ", ".join(BACKBONES.values()))
    if config.dilation and config.backbone in ("resnet18", "resnet34"):
        refuse("detr_authors", "dilation", True, False)
    return translated(config, AuthorsDetrConfig, FIELDS, ())


def to_authors_panoptic(config: TfmDetrConfig) -> AuthorsDetrConfig:
    """Extend `to_authors`: their mask head requires a ResNet-50 or -101, and norms with eight groups."""
    if config.backbone not in ("resnet50", "resnet101"):
        refuse("detr_authors", "backbone", config.backbone, "resnet50, resnet101")
    if config.d_model % 128:
        refuse("detr_authors", "d_model", config.d_model, "a multiple of 128")
    return to_authors(config)


def from_authors(model: AuthorsDetr | AuthorsDetrSegm) -> TfmDetrConfig:
    """Convert the configuration of a model with the authors' names to ours."""
    return translated(model.config, TfmDetrConfig, FIELDS, ())


def is_authors_detr(weights: dict[str, Tensor]) -> bool:
    """Return True for DETR weights with the authors' names, with or without a mask head."""
    return any(f"{prefix}transformer.decoder.norm.weight" in weights for prefix in ("", "detr."))


def guessed_config(weights: dict[str, Tensor], arguments: Any, path: Path) -> dict:
    """Infer config.json for weights with the authors' names, from shapes and the training arguments.

    Args:
        arguments: namespace of the training arguments; None if the file has none, as the published files.
        path: path of the file; without arguments, "dc5" in its name indicates a dilated last stage.

    Raises:
        ValueError: the width is not the published one, so the number of heads is unknown; or the backbone is unknown.
    """
    panoptic = "mask_head.lay1.weight" in weights
    weights = {name.removeprefix("detr."): weight for name, weight in weights.items()}
    queries, width = weights["query_embed.weight"].shape
    if width != PUBLISHED_WIDTH and not hasattr(arguments, "nheads"):
        raise ValueError(
            f"the number of heads is not known for a d_model of {width}, only for {PUBLISHED_WIDTH}: put a "
            "config.json with encoder_attention_heads next to the file"
        )
    heads = getattr(arguments, "nheads", PUBLISHED_HEADS)
    ffn = len(weights["transformer.encoder.layers.0.linear1.weight"])
    body = "backbone.0.body."
    bottlenecks = f"{body}layer1.0.conv3.weight" in weights
    kind = (depth(weights, f"{body}layer1."), depth(weights, f"{body}layer3."), bottlenecks)
    if kind not in BACKBONES:
        raise ValueError(f"{path} has an unknown backbone; known are {', '.join(BACKBONES.values())}")
    config = AuthorsDetrConfig(
        backbone=BACKBONES[kind],
        dilation=getattr(arguments, "dilation", "dc5" in path.stem.lower()),
        num_queries=queries,
        d_model=width,
        encoder_layers=depth(weights, "transformer.encoder.layers."),
        decoder_layers=depth(weights, "transformer.decoder.layers."),
        encoder_attention_heads=heads,
        decoder_attention_heads=heads,
        encoder_ffn_dim=ffn,
        decoder_ffn_dim=ffn,
        norm_first="transformer.encoder.norm.weight" in weights,
        position_embedding_type="learned" if "backbone.1.row_embed.weight" in weights else "sine",
        num_labels=len(weights["class_embed.weight"]) - 1,
    )
    config.architectures = ["AuthorsDetrSegm" if panoptic else "AuthorsDetr"]
    return json.loads(config.to_json_string(use_diff=False))


def depth(weights: dict[str, Tensor], prefix: str) -> int:
    """Count the numbered submodules under ``prefix``."""
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


DETR_AUTHORS = Conversion(
    name="detr_authors",
    ours=TfmDetrForObjectDetection,
    theirs=AuthorsDetr,
    names=names,
    to_theirs=to_authors,
    to_ours=from_authors,
    prepare=with_frozen_norms,
    file=WeightsFile("DETR's authors", is_authors_detr, guessed_config),
)
DETR_AUTHORS_PANOPTIC = replace(
    DETR_AUTHORS,
    ours=TfmDetrForPanopticSegmentation,
    theirs=AuthorsDetrSegm,
    names=panoptic_names,
    to_theirs=to_authors_panoptic,
)
CONVERSIONS = (DETR_AUTHORS, DETR_AUTHORS_PANOPTIC)
