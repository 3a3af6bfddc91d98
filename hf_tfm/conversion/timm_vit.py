"""TfmViT <-> timm's VisionTransformer, which fuses query, key and value projections and names its pooling differently.

The folder can be loaded by timm (``timm.create_model("local-dir:FOLDER", pretrained=True)``), and the Hub shows it as
a timm model: config.json with the architecture and its arguments, model.safetensors.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from transformers.activations import ACT2FN

from ..command import reworded
from ..hub.loading import read_json
from ..models.configuration_vit import SIZES, ImageEncoderConfig, TfmViTConfig
from ..models.modeling_vit import TfmViTForImageClassification
from ..models.patches import sides
from .conversion import Conversion, refuse, require_fixed
from .vit import with_learned_positions
from .weight_files import WEIGHTS

PROCESSOR = "preprocessor_config.json"
EPS = 1e-6  # of every layer norm; a timm file cannot specify another value
# {our name: timm's}
ACTIVATIONS = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "quick_gelu": "quick_gelu", "relu": "relu"}
POOLING = {"cls": "token", "mean": "avg"}

TOP_NAMES = {"embeddings.cls_token": "cls_token", "embeddings.position_embeddings": "pos_embed"}
BLOCK_NAMES = {
    "self_attn.q_proj": "attn.qkv",
    "self_attn.k_proj": "attn.qkv",
    "self_attn.v_proj": "attn.qkv",
    "self_attn.out_proj": "attn.proj",
    "self_attn_residual.norm": "norm1",
    "feed_forward.up_proj": "mlp.fc1",
    "feed_forward.down_proj": "mlp.fc2",
    "feed_forward_residual.norm": "norm2",
}
# Attribute values of a timm model without these extensions; the name table covers the others.
PLAIN = {"has_class_token": True, "no_embed_class": False, "num_reg_tokens": 0, "pool_include_prefix": False}


def block_names(config: ImageEncoderConfig, ours: str, theirs: str, layers: int) -> dict[str, str]:
    """Map every weight of a stack of ``layers`` blocks: {ours: timm's}."""
    return {
        f"{ours}.{layer}.{module}.{kind}": f"{theirs}.{layer}.{BLOCK_NAMES[module]}.{kind}"
        for layer in range(layers)
        for module in BLOCK_NAMES
        for kind in ("weight", "bias")
        if kind == "weight" or config.qkv_bias or BLOCK_NAMES[module] != "attn.qkv"
    }


def encoder_names(config: ImageEncoderConfig, prefix: str = "vit.") -> dict[str, str]:
    """Map every weight of the encoder under ``prefix`` except its final norm: {ours: timm's}."""
    names = {prefix + ours: theirs for ours, theirs in TOP_NAMES.items()}
    for kind in ("weight", "bias"):
        names[f"{prefix}embeddings.patch_embeddings.projection.{kind}"] = f"patch_embed.proj.{kind}"
    return {**names, **block_names(config, f"{prefix}layers", "blocks", config.num_hidden_layers)}


def names(config: TfmViTConfig) -> dict[str, str]:
    """Map every weight of the classifier: {ours: timm's}."""
    modules = {"vit.layernorm": "norm"} if config.pooling == "cls" else {"vit.fc_norm": "fc_norm"}
    if config.num_labels:
        modules["classifier"] = "head"
    table = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}
    return {**encoder_names(config), **table}


def mlp_ratio(width: int, hidden_size: int) -> float:
    """Return the ratio for which timm's ``int(hidden_size * ratio)`` is exactly ``width``, despite rounding."""
    ratio = width / hidden_size
    return ratio if int(hidden_size * ratio) == width else math.nextafter(ratio, math.inf)


def architecture(config: TfmViTConfig) -> str:
    """Return timm's closest architecture name; the arguments next to it specify all sizes."""
    for size, fields in SIZES.items():
        if config.hidden_size == fields["hidden_size"]:
            name = f"vit_{size}_patch{sides(config.patch_size)[0]}_{sides(config.image_size)[0]}"
            if timm.is_model(name):
                return name
    return "vit_base_patch16_224"


def to_timm(config: TfmViTConfig) -> dict[str, Any]:
    """Convert our configuration to the config.json of a timm model.

    Raises:
        ValueError: a field has a value that timm's `VisionTransformer` or its file cannot express.
    """
    fixed = {"layer_norm_eps": EPS, "representation_layer": False, "backbone": None, "distillation_token": False}
    require_fixed("timm", config, fixed)
    if config.hidden_act not in ACTIVATIONS:
        refuse("timm", "hidden_act", config.hidden_act, ", ".join(ACTIVATIONS))
    return file_config(
        config,
        architecture(config),
        "head",
        patch_size=list(sides(config.patch_size)),
        embed_dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        mlp_ratio=mlp_ratio(config.intermediate_size, config.hidden_size),
        qkv_bias=config.qkv_bias,
        act_layer=ACTIVATIONS[config.hidden_act],
        global_pool=POOLING[config.pooling],
    )


def file_config(config: Any, name: str, classifier: str, **arguments: Any) -> dict[str, Any]:
    """Return the config.json of a timm model.

    Args:
        config: our configuration of an image classifier.
        name: timm's name of the architecture.
        classifier: name of the classifier's module.
        arguments: of the model, besides those for the images.
    """
    size = list(sides(config.image_size))
    labels = [config.id2label[label] for label in range(config.num_labels)]
    named = labels != [f"LABEL_{label}" for label in range(config.num_labels)]
    return {
        "architecture": name,
        "num_classes": config.num_labels,
        "num_features": config.hidden_size,
        "global_pool": arguments["global_pool"],
        **({"label_names": labels} if named else {}),
        "model_args": {"img_size": size, "in_chans": config.num_channels, **arguments},
        "pretrained_cfg": {
            "num_classes": config.num_labels,
            "input_size": [config.num_channels, *size],
            "fixed_input_size": True,
            "first_conv": "patch_embed.proj",
            "classifier": classifier,
            "custom_load": False,
        },
    }


def label_fields(model: nn.Module) -> dict[str, Any]:
    """Return our configuration fields for the classes of a timm model."""
    labels = model.pretrained_cfg.get("label_names")
    named = labels if isinstance(labels, dict) else dict(enumerate(labels or ()))
    if not named or len(named) != model.num_classes:
        return {"num_labels": model.num_classes}
    label_map = {int(label): name for label, name in named.items()}
    return {"id2label": label_map, "label2id": {name: label for label, name in label_map.items()}}


def from_timm(model: VisionTransformer) -> TfmViTConfig:
    """Convert the architecture of timm's ``model`` to our configuration.

    Raises:
        ValueError: the model has a feature that `TfmViTConfig` cannot express.
    """
    ours = TfmViTConfig.__name__
    if type(model) is not VisionTransformer:
        raise ValueError(f"{ours} cannot express a {type(model).__name__} of timm: it needs a VisionTransformer")
    require_fixed(ours, model, PLAIN)
    if model.global_pool not in POOLING.values():
        refuse(ours, "global_pool", model.global_pool, ", ".join(POOLING.values()))
    mean, block = model.global_pool == "avg", model.blocks[0]
    norm = model.fc_norm if mean else model.norm
    if not isinstance(norm, nn.LayerNorm):
        refuse(ours, "fc_norm", isinstance(model.fc_norm, nn.LayerNorm), mean)
    # Compared by their values, because timm has several classes for the same function.
    probe = torch.linspace(-4, 4, 65)
    activations = [name for name in ACTIVATIONS if torch.allclose(ACT2FN[name](probe), block.mlp.act(probe.clone()))]
    if not activations:
        refuse(ours, "act_layer", type(block.mlp.act).__name__, ", ".join(ACTIVATIONS.values()))
    patch = model.patch_embed
    return TfmViTConfig(
        hidden_size=model.embed_dim,
        num_hidden_layers=len(model.blocks),
        num_attention_heads=block.attn.num_heads,
        intermediate_size=block.mlp.fc1.out_features,
        hidden_act=activations[0],
        layer_norm_eps=norm.eps,
        image_size=one_or_two(patch.img_size),
        patch_size=one_or_two(patch.patch_size),
        num_channels=patch.proj.in_channels,
        qkv_bias=block.attn.qkv.bias is not None,
        pooling="mean" if mean else "cls",
        **label_fields(model),
    )


def one_or_two(size: tuple[int, int]) -> int | list[int]:
    """Return a size as in configurations: one integer if it is square."""
    return size[0] if size[0] == size[1] else list(size)


def build(config: dict[str, Any]) -> nn.Module:
    """Build a timm model from its config.json, and attach the latter for saving."""
    model = timm.create_model(config["architecture"], num_classes=config["num_classes"], **config["model_args"])
    model.file_config = config
    return model


def read(folder: Path) -> nn.Module:
    """Load a timm model from ``folder``, in float32.

    Raises:
        ValueError: weights are missing or unexpected.
    """
    try:
        return timm.create_model(f"local-dir:{folder}", pretrained=True)
    except RuntimeError as error:
        raise ValueError(f'model "{folder}" is not a complete model of timm: {reworded(error)}') from error


def write(model: nn.Module, folder: Path) -> None:
    """Save a model created by `build`."""
    folder.mkdir(parents=True)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.file_config, indent=2) + "\n", encoding="utf-8")


def carry_processor(source: Path, target: Path, to_ours: bool) -> None:
    """Convert the preprocessing between transformers' file and timm's config.json.

    Warns, and writes no file, if transformers' processor cannot express timm's configuration.
    """
    path = (source if to_ours else target) / "config.json"
    config = read_json(path)
    said = (source / PROCESSOR).is_file()
    if not to_ours and said:
        processor = read_json(source / PROCESSOR)
        config["pretrained_cfg"].update(to_data_config(processor))
        path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    # Before timm 0.9 these settings were at the top level.
    data = config.get("pretrained_cfg", config)
    if to_ours and not said and "mean" in data:
        height, width = sides(config.get("model_args", {}).get("img_size") or data["input_size"][1:])
        mode, share = data.get("crop_mode", "center"), data.get("crop_pct") or 1.0
        if (mode, share) != ("squash", 1.0) and (mode != "center" or height != width):
            warnings.warn(
                f"no image processor is written: transformers cannot express crop_mode={mode!r} with "
                f"crop_pct={share} for images of {height} x {width}",
                stacklevel=2,
            )
            return
        processor = from_data_config(data, height, width)
        (target / PROCESSOR).write_text(json.dumps(processor, indent=2) + "\n", encoding="utf-8")


def to_data_config(processor: dict[str, Any]) -> dict[str, Any]:
    """Convert a saved image processor of transformers to timm's data config."""
    normalized = processor.get("do_normalize", True)
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    cropped = bool(processor.get("do_center_crop")) and "shortest_edge" in size
    return {
        "mean": processor["image_mean"] if normalized else [0.0, 0.0, 0.0],
        "std": processor["image_std"] if normalized else [1.0, 1.0, 1.0],
        "interpolation": Image.Resampling(processor.get("resample", Image.Resampling.BILINEAR)).name.lower(),
        "crop_pct": crop["height"] / size["shortest_edge"] if cropped else 1.0,
        "crop_mode": "center" if cropped else "squash",
    }


def from_data_config(data: dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """Convert timm's data config to a saved `ViTImageProcessor` of transformers, for images of this size."""
    processor = {
        "image_processor_type": "ViTImageProcessor",
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(data["mean"]),
        "image_std": list(data["std"]),
        "do_resize": True,
        "resample": int(Image.Resampling[data.get("interpolation", "bicubic").upper()]),
    }
    if data.get("crop_mode") == "squash":
        return {**processor, "size": {"height": height, "width": width}}
    # As in timm: the shorter side is resized to slightly more than the crop.
    return {
        **processor,
        "size": {"shortest_edge": math.floor(height / (data.get("crop_pct") or 1.0))},
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
    }


TIMM = Conversion(
    name="timm",
    ours=TfmViTForImageClassification,
    theirs=VisionTransformer,
    names=names,
    to_theirs=to_timm,
    to_ours=from_timm,
    prepare=with_learned_positions,
    build=build,
    read=read,
    write=write,
    carry_processor=carry_processor,
)
CONVERSIONS = (TIMM,)
