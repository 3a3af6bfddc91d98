"""TfmSwin <-> timm's SwinTransformer.

timm fuses query, key and value projections, puts patch merging at the start of a stage, and has position bias tables
for the windows of one image size: windows that do not fit into a feature map are made smaller when the model is built.
Folders are those of timm_vit.py.
"""

from typing import Any

import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.configuration_swin import SIZES, TfmSwinConfig
from ..models.modeling_swin import TfmSwinForImageClassification
from ..models.patches import sides
from .conversion import Conversion, refuse, require_fixed
from .swin import WHOLE, fit_remarks, grids, layout, require_fit
from .timm_vit import build, carry_processor, file_config, label_fields, mlp_ratio, one_or_two, read, write

FIT = "timm"
TABLE = "relative_position_bias_table"
BLOCK_NAMES = {
    "attention.q_proj": "attn.qkv",
    "attention.k_proj": "attn.qkv",
    "attention.v_proj": "attn.qkv",
    "attention.o_proj": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def names(config: TfmSwinConfig) -> dict[str, str]:
    """Map every weight of the classifier: {ours: timm's}."""
    table = {}
    modules = {
        "swin.embeddings.patch_embeddings.projection": "patch_embed.proj",
        "swin.embeddings.norm": "patch_embed.norm",
    }
    for stage, depth in enumerate(config.depths):
        ours = f"swin.encoder.layers.{stage}"
        for block in range(depth):
            mine, theirs = f"{ours}.blocks.{block}", f"layers.{stage}.blocks.{block}"
            modules |= {f"{mine}.{part}": f"{theirs}.{other}" for part, other in BLOCK_NAMES.items()}
            table[f"{mine}.attention.relative_position_bias.{TABLE}"] = f"{theirs}.attn.{TABLE}"
        if stage < len(config.depths) - 1:
            modules[f"{ours}.downsample.norm"] = f"layers.{stage + 1}.downsample.norm"
            table[f"{ours}.downsample.reduction.weight"] = f"layers.{stage + 1}.downsample.reduction.weight"
    modules["swin.layernorm"] = "norm"
    if config.num_labels:
        modules["classifier"] = "head.fc"
    for mine, theirs in modules.items():
        table[f"{mine}.weight"] = f"{theirs}.weight"
        if config.qkv_bias or not theirs.endswith("attn.qkv"):
            table[f"{mine}.bias"] = f"{theirs}.bias"
    return table


def windows_of_stages(config: TfmSwinConfig) -> list[tuple[int, int]]:
    """Return rows and columns of timm's windows in every stage."""
    return [(min(h, config.window_size), min(w, config.window_size)) for h, w in grids(config, FIT)]


class TimmSwin(Conversion):
    """Conversion whose position bias tables are cut to timm's smaller windows, or filled up with zeros.

    The rows that are cut belong to offsets that do not occur in images of the configuration's size.
    """

    def weights_to_theirs(self, model: PreTrainedModel) -> dict[str, Tensor]:
        """See `Conversion`."""
        weights, config = super().weights_to_theirs(model), model.config
        for name in (name for name in weights if name.endswith(TABLE)):
            rows, columns = windows_of_stages(config)[int(name.split(".")[1])]
            inner = inside(weights[name], config.window_size, rows, columns)
            weights[name] = inner.reshape(-1, inner.shape[-1])
        return weights

    def weights_to_ours(self, model: nn.Module, config: TfmSwinConfig) -> dict[str, Tensor]:
        """See `Conversion`; ``config`` is ours."""
        weights = super().weights_to_ours(model, config)
        for name in (name for name in weights if name.endswith(TABLE)):
            rows, columns = windows_of_stages(config)[int(name.split(".")[3])]
            whole = torch.zeros((2 * config.window_size - 1) ** 2, weights[name].shape[-1])
            inner = inside(whole, config.window_size, rows, columns)
            inner.copy_(weights[name].reshape(inner.shape))
            weights[name] = whole
        return weights


def inside(table: Tensor, window_size: int, rows: int, columns: int) -> Tensor:
    """Return a view of a table ((2 M - 1)^2, A), the offsets in smaller windows: (2 rows - 1, 2 columns - 1, A)."""
    side = 2 * window_size - 1
    plane = table.view(side, side, -1)
    top, left = window_size - rows, window_size - columns
    return plane[top : side - top, left : side - left]


def architecture(config: TfmSwinConfig) -> str:
    """Return timm's closest architecture name; the arguments next to it specify all sizes."""
    for size, fields in SIZES.items():
        if config.embed_dim == fields["embed_dim"] and tuple(config.depths) == fields["depths"]:
            name = f"swin_{size}_patch4_window{config.window_size}_{sides(config.image_size)[0]}"
            return name if timm.is_model(name) else f"swin_{size}_patch4_window7_224"
    return "swin_tiny_patch4_window7_224"


def to_timm(config: TfmSwinConfig) -> dict[str, Any]:
    """Convert our configuration to the config.json of a timm model.

    Raises:
        ValueError: a field has a value that timm's `SwinTransformer` or its file cannot express.
    """
    require_fixed("timm", config, {**WHOLE, "hidden_act": "gelu"})
    require_fit("timm", config, FIT)
    for side, patch in zip(sides(config.image_size), sides(config.patch_size), strict=True):
        if side % patch:
            refuse("timm", "image_size", config.image_size, f"a multiple of patch_size {config.patch_size}")
    return file_config(
        config,
        architecture(config),
        "head.fc",
        patch_size=list(sides(config.patch_size)),
        embed_dim=config.embed_dim,
        depths=list(config.depths),
        num_heads=list(config.num_heads),
        window_size=config.window_size,
        mlp_ratio=mlp_ratio(int(config.mlp_ratio * config.embed_dim), config.embed_dim),
        qkv_bias=config.qkv_bias,
        drop_path_rate=config.drop_path_rate,
        global_pool="avg",
    )


def from_timm(model: SwinTransformer) -> TfmSwinConfig:
    """Convert the architecture of timm's ``model`` to our configuration.

    Raises:
        ValueError: the model has a feature that `TfmSwinConfig` cannot express.
    """
    ours = TfmSwinConfig.__name__
    if type(model) is not SwinTransformer:
        raise ValueError(f"{ours} cannot express a {type(model).__name__} of timm: it needs a SwinTransformer")
    blocks = [block for stage in model.layers for block in stage.blocks]
    first, patch = blocks[0], model.patch_embed
    require_fixed(ours, model, {"global_pool": "avg"})
    require_fixed(ours, first, {"always_partition": False})
    for module in (patch.norm, model.norm):
        if not isinstance(module, nn.LayerNorm):
            refuse(ours, "norm_layer", type(module).__name__, "LayerNorm")
    if not isinstance(first.mlp.act, nn.GELU) or first.mlp.act.approximate != "none":
        refuse(ours, "act_layer", repr(first.mlp.act), "GELU()")
    if first.attn.proj.in_features != model.embed_dim:
        refuse(ours, "head_dim", first.attn.proj.in_features // first.attn.num_heads, "embed_dim / num_heads")
    config = TfmSwinConfig(
        image_size=one_or_two(patch.img_size),
        patch_size=one_or_two(patch.patch_size),
        num_channels=patch.proj.in_channels,
        embed_dim=model.embed_dim,
        depths=[len(stage.blocks) for stage in model.layers],
        num_heads=[stage.blocks[0].attn.num_heads for stage in model.layers],
        window_size=max(side for block in blocks for side in block.window_size),
        mlp_ratio=first.mlp.fc1.out_features / model.embed_dim,
        qkv_bias=first.attn.qkv.bias is not None,
        drop_path_rate=round(getattr(blocks[-1].drop_path2, "drop_prob", 0.0), 6),  # from float32
        layer_norm_eps=model.norm.eps,
        window_fit=FIT,
        **label_fields(model),
    )
    theirs = [(tuple(block.window_size), tuple(block.shift_size)) for block in blocks]
    if theirs != [(windows.size, windows.shift) for windows in layout(config, FIT)]:
        refuse(ours, "window_size", [size for size, _ in theirs], "one size and its shifts for all stages")
    return config


TIMM_SWIN = TimmSwin(
    name="timm",
    ours=TfmSwinForImageClassification,
    theirs=SwinTransformer,
    names=names,
    to_theirs=to_timm,
    to_ours=from_timm,
    build=build,
    read=read,
    write=write,
    carry_processor=carry_processor,
    claims=lambda config: str(config.get("architecture")).startswith("swin_"),
    remarks=lambda config: fit_remarks(config, FIT),
)
CONVERSIONS = (TIMM_SWIN,)
