"""TfmSwin <-> torchvision's SwinTransformer, which fuses query, key and value projections.

torchvision has no format of folders: config.json holds the arguments of the class, and model.safetensors its weights,
which ``torchvision.models.SwinTransformer(**model_args).load_state_dict`` reads.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models import SwinTransformer

from ..hub.loading import read_json
from ..models.configuration_swin import TfmSwinConfig
from ..models.modeling_swin import TfmSwinForImageClassification
from ..models.patches import sides
from .conversion import Conversion, WeightsFile, refuse, require_fixed
from .swin import EPS, WHOLE, fit_remarks, require_fit
from .timm_swin import BLOCK_NAMES, TABLE
from .weight_files import WEIGHTS

NAME = FIT = "torchvision"
INDEX = "relative_position_index"  # a buffer of every block that is saved although it is computed
MLP_NAMES = {"mlp.fc1": "mlp.0", "mlp.fc2": "mlp.3"}


def names(config: TfmSwinConfig) -> dict[str, str]:
    """Map every weight of the classifier: {ours: torchvision's}."""
    modules = {"swin.embeddings.patch_embeddings.projection": "features.0.0", "swin.embeddings.norm": "features.0.2"}
    table = {}
    for stage, depth in enumerate(config.depths):
        ours = f"swin.encoder.layers.{stage}"
        for block in range(depth):
            mine, theirs = f"{ours}.blocks.{block}", f"features.{2 * stage + 1}.{block}"
            modules |= {
                f"{mine}.{part}": f"{theirs}.{MLP_NAMES.get(part, name)}" for part, name in BLOCK_NAMES.items()
            }
            table[f"{mine}.attention.relative_position_bias.{TABLE}"] = f"{theirs}.attn.{TABLE}"
        if stage < len(config.depths) - 1:
            modules[f"{ours}.downsample.norm"] = f"features.{2 * stage + 2}.norm"
            table[f"{ours}.downsample.reduction.weight"] = f"features.{2 * stage + 2}.reduction.weight"
    modules |= {"swin.layernorm": "norm", "classifier": "head"}
    for mine, theirs in modules.items():
        table |= {f"{mine}.{kind}": f"{theirs}.{kind}" for kind in ("weight", "bias")}
    return table


def to_torchvision(config: TfmSwinConfig) -> dict[str, Any]:
    """Convert our configuration to the arguments of torchvision's class, and what else describes the model.

    Raises:
        ValueError: a field has a value that it cannot express.
    """
    require_fixed(NAME, config, {**WHOLE, "hidden_act": "gelu", "num_channels": 3, "qkv_bias": True})
    require_fit(NAME, config, FIT)
    if not config.num_labels:
        refuse(NAME, "num_labels", 0, "at least 1")
    if sum(config.depths) < 2:  # it divides by the number of blocks less one
        refuse(NAME, "depths", config.depths, "at least two blocks in total")
    return {
        "model_type": NAME,
        "architectures": [SwinTransformer.__name__],
        "model_args": {
            "patch_size": list(sides(config.patch_size)),
            "embed_dim": config.embed_dim,
            "depths": list(config.depths),
            "num_heads": list(config.num_heads),
            "window_size": [config.window_size] * 2,
            "mlp_ratio": config.mlp_ratio,
            "dropout": config.hidden_dropout_prob,
            "attention_dropout": config.attention_probs_dropout_prob,
            "stochastic_depth_prob": config.drop_path_rate,
            "num_classes": config.num_labels,
        },
        "image_size": config.image_size,
        "label_names": [config.id2label[label] for label in range(config.num_labels)],
    }


def from_torchvision(model: SwinTransformer) -> TfmSwinConfig:
    """Convert a model that `build` made to our configuration.

    Raises:
        ValueError: the model has a feature that `TfmSwinConfig` cannot express.
    """
    content, ours = model.file_config, TfmSwinConfig.__name__
    arguments = {"mlp_ratio": 4.0, "dropout": 0.0, "attention_dropout": 0.0, "stochastic_depth_prob": 0.1}
    arguments |= content["model_args"]
    rows, columns = arguments["window_size"]
    if rows != columns:
        refuse(ours, "window_size", arguments["window_size"], "a square")
    names = content.get("label_names") or [f"LABEL_{label}" for label in range(arguments["num_classes"])]
    height, width = arguments["patch_size"]
    return TfmSwinConfig(
        image_size=content.get("image_size", 224),
        patch_size=height if height == width else [height, width],
        embed_dim=arguments["embed_dim"],
        depths=arguments["depths"],
        num_heads=arguments["num_heads"],
        window_size=rows,
        mlp_ratio=arguments["mlp_ratio"],
        hidden_dropout_prob=arguments["dropout"],
        attention_probs_dropout_prob=arguments["attention_dropout"],
        drop_path_rate=arguments["stochastic_depth_prob"],
        layer_norm_eps=EPS,
        window_fit=FIT,
        id2label=dict(enumerate(names)),
        label2id={name: label for label, name in enumerate(names)},
    )


def is_torchvision_swin(weights: dict[str, Tensor]) -> bool:
    """Return True for weights with torchvision's names; its second version has other position biases."""
    return {f"features.1.0.attn.{TABLE}", "features.0.0.weight", "head.weight"} <= weights.keys()


def guessed_config(weights: dict[str, Tensor], arguments: Any, path: Path) -> dict[str, Any]:
    """Infer config.json for torchvision's weights, from shapes.

    Args:
        arguments, path: not needed.
    """
    blocks = [re.fullmatch(rf"features\.(\d+)\.\d+\.attn\.{TABLE}", name) for name in weights]
    stages = sorted({int(block[1]) for block in blocks if block})
    tables = [weights[f"features.{stage}.0.attn.{TABLE}"] for stage in stages]
    embed_dim, _, *patch = weights["features.0.0.weight"].shape
    return {
        "model_type": NAME,
        "architectures": [SwinTransformer.__name__],
        "model_args": {
            "patch_size": patch,
            "embed_dim": embed_dim,
            "depths": [sum(block is not None and int(block[1]) == stage for block in blocks) for stage in stages],
            "num_heads": [table.shape[1] for table in tables],
            "window_size": [(math.isqrt(tables[0].shape[0]) + 1) // 2] * 2,
            "mlp_ratio": weights["features.1.0.mlp.0.weight"].shape[0] / embed_dim,
            "num_classes": weights["head.weight"].shape[0],
        },
        "image_size": 224,
    }


def build(config: dict[str, Any]) -> SwinTransformer:
    """Build a model from its config.json, and attach the latter for saving."""
    model = SwinTransformer(**config["model_args"])
    for module in model.modules():
        if hasattr(module, INDEX):
            module._non_persistent_buffers_set.add(INDEX)  # not a weight: left out of the state that is converted
    model.file_config = config
    return model


def read(folder: Path) -> nn.Module:
    """Load a model from ``folder``, in float32.

    Raises:
        ValueError: weights are missing or unexpected.
    """
    model = build(read_json(folder / "config.json"))
    weights = {name: weight for name, weight in load_file(folder / WEIGHTS).items() if not name.endswith(INDEX)}
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(
            f'model "{folder}" is not a complete {type(model).__name__} of torchvision: {error}'
        ) from error
    return model


def write(model: SwinTransformer, folder: Path) -> None:
    """Save a model created by `build`, with the buffers that torchvision expects."""
    folder.mkdir(parents=True)
    weights = {
        name: value.contiguous() for name, value in {**model.state_dict(), **dict(model.named_buffers())}.items()
    }
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(model.file_config, indent=2) + "\n", encoding="utf-8")


TORCHVISION_SWIN = Conversion(
    name=NAME,
    ours=TfmSwinForImageClassification,
    theirs=SwinTransformer,
    names=names,
    to_theirs=to_torchvision,
    to_ours=from_torchvision,
    build=build,
    read=read,
    write=write,
    file=WeightsFile("torchvision's Swin", is_torchvision_swin, guessed_config),
    remarks=lambda config: fit_remarks(config, FIT),
)
CONVERSIONS = (TORCHVISION_SWIN,)
