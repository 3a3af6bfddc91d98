"""TfmMAE <-> the weight names of the masked autoencoder's authors (He et al. 2021, arXiv:2111.06377).

Many programs read these files. This file contains none of the authors' code: its classes combine timm's blocks under
those names, following the paper, so that a converted model can be verified against independent parts.
"""

import json
import math
from dataclasses import replace
from functools import partial
from typing import ClassVar

import torch
from huggingface_hub.dataclasses import strict
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput, ViTMAEModelOutput

from ..models.configuration_mae import TfmMAEConfig
from ..models.configuration_vit import SIZES, TfmViTConfig
from ..models.modeling_mae import TfmMAEForPreTraining, TfmMAEModel, normalize_patches, random_masking
from ..models.patches import patchify
from .conversion import Conversion, WeightsFile, refuse, require_fixed
from .mae import FIELDS, require_same_share, square
from .timm_vit import EPS, block_names, encoder_names, mlp_ratio, to_timm
from .vit import OURS_CARRIED, translated

DECODER_HEADS = 16  # of every published model; not recorded in a file
DECODER_MODULES = ("decoder_embed", "decoder_norm", "decoder_pred")
DECODER_TABLES = ("mask_token", "decoder_pos_embed")


@strict
class AuthorsMAEConfig(TfmMAEConfig):
    """Configuration stored with the weights, which do not determine the number of heads."""

    model_type = "mae_authors"
    _auto_class = None
    auto_classes: ClassVar = {}


class AuthorsMAEEncoder(PreTrainedModel):
    """Encoder with the authors' weight names."""

    config: AuthorsMAEConfig
    main_input_name = "pixel_values"

    def __init__(self, config: AuthorsMAEConfig):
        super().__init__(config)
        width = config.hidden_size
        self.patch_embed = PatchEmbed(config.image_size, config.patch_size, config.num_channels, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, width), requires_grad=False)
        ratio = mlp_ratio(config.intermediate_size, width)
        self.blocks = stack(width, config.num_attention_heads, ratio, config.num_hidden_layers)
        self.norm = nn.LayerNorm(width, eps=EPS)
        self.add_decoder()
        self.post_init()

    def add_decoder(self) -> None:
        """Do nothing: the encoder alone has no decoder."""

    def encode(self, pixel_values: Tensor, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, C, H, W) -> visible tokens (B, 1 + K, D), mask (B, N), positions in the shuffled order (B, N)."""
        patches = self.patch_embed(pixel_values) + self.pos_embed[:, 1:]
        keep, mask, restore = random_masking(*patches.shape[:2], self.config.mask_ratio, noise, patches.device)
        visible = patches.gather(1, keep[..., None].expand(-1, -1, patches.shape[-1]))
        first = (self.cls_token + self.pos_embed[:, :1]).expand(len(visible), -1, -1)
        return self.norm(self.blocks(torch.cat([first, visible], dim=1))), mask, restore

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> ViTMAEModelOutput:
        """See `TfmMAEModel.forward`."""
        states, mask, restore = self.encode(pixel_values, noise)
        return ViTMAEModelOutput(last_hidden_state=states, mask=mask, ids_restore=restore)


class AuthorsMAE(AuthorsMAEEncoder):
    """Encoder and decoder with the authors' weight names."""

    def add_decoder(self) -> None:
        config, width = self.config, self.config.decoder_hidden_size
        self.decoder_embed = nn.Linear(config.hidden_size, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, self.pos_embed.shape[1], width), requires_grad=False)
        ratio = mlp_ratio(config.decoder_intermediate_size, width)
        self.decoder_blocks = stack(width, config.decoder_num_attention_heads, ratio, config.decoder_num_hidden_layers)
        self.decoder_norm = nn.LayerNorm(width, eps=EPS)
        self.decoder_pred = nn.Linear(width, config.patch_size**2 * config.num_channels)

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None) -> ViTMAEForPreTrainingOutput:
        """See `TfmMAEForPreTraining.forward`."""
        states, mask, restore = self.encode(pixel_values, noise)
        states = self.decoder_embed(states)  # (B, 1 + K, E)
        hidden = self.mask_token.expand(len(states), mask.shape[1] + 1 - states.shape[1], -1)
        shuffled = torch.cat([states[:, 1:], hidden], dim=1)  # (B, N, E)
        patches = shuffled.gather(1, restore[..., None].expand(-1, -1, shuffled.shape[-1]))
        tokens = torch.cat([states[:, :1], patches], dim=1) + self.decoder_pos_embed
        logits = self.decoder_pred(self.decoder_norm(self.decoder_blocks(tokens)))[:, 1:]
        target = patchify(pixel_values, self.config.patch_size)
        if self.config.norm_pix_loss:
            target = normalize_patches(target)[0]
        error = (logits - target).square().mean(dim=-1)  # (B, N)
        loss = (error * mask).sum() / mask.sum()
        return ViTMAEForPreTrainingOutput(loss=loss, logits=logits, mask=mask, ids_restore=restore)


def stack(width: int, heads: int, ratio: float, layers: int) -> nn.Sequential:
    """Create a stack of timm's blocks."""
    norm = partial(nn.LayerNorm, eps=EPS)
    return nn.Sequential(*(Block(width, heads, ratio, qkv_bias=True, norm_layer=norm) for _ in range(layers)))


def pairs(modules: dict[str, str]) -> dict[str, str]:
    """Map weight and bias of each module: {ours: theirs}."""
    return {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in modules.items() for kind in ("weight", "bias")}


def encoder_table(config: TfmMAEConfig, prefix: str = "") -> dict[str, str]:
    """Map every weight of the encoder: {ours: theirs}."""
    return {**encoder_names(config, prefix), **pairs({f"{prefix}layernorm": "norm"})}


def names(config: TfmMAEConfig) -> dict[str, str]:
    """Map every weight of encoder and decoder: {ours: theirs}."""
    return {
        **encoder_table(config, "vit."),
        **{f"decoder.{name}": name for name in DECODER_TABLES},
        **pairs({f"decoder.{name}": name for name in DECODER_MODULES}),
        **block_names(config, "decoder.decoder_layers", "decoder_blocks", config.decoder_num_hidden_layers),
    }


def to_authors(config: TfmMAEConfig) -> AuthorsMAEConfig:
    """Convert our configuration to one that the authors' code can build.

    Raises:
        ValueError: a field has a value that it cannot express.
    """
    require_fixed("mae_authors", config, {"hidden_act": "gelu", "layer_norm_eps": EPS, "qkv_bias": True})
    require_same_share("mae_authors", config)
    # The authors use one MLP ratio for encoder and decoder.
    width = config.decoder_hidden_size * config.intermediate_size / config.hidden_size
    if config.decoder_intermediate_size != width:
        refuse("mae_authors", "decoder_intermediate_size", config.decoder_intermediate_size, width)
    return translated(config, AuthorsMAEConfig, FIELDS, OURS_CARRIED, **square("mae_authors", config))


def from_authors(model: AuthorsMAEEncoder) -> TfmMAEConfig:
    """Convert the configuration of a model with the authors' names to ours."""
    require_same_share(TfmMAEConfig.__name__, model.config)
    return translated(model.config, TfmMAEConfig, FIELDS, OURS_CARRIED)


def is_authors_mae(weights: dict[str, Tensor]) -> bool:
    """Return True for weights with the authors' names; a fine-tuned classifier uses timm's."""
    return {"pos_embed", "patch_embed.proj.weight"} <= weights.keys()


def guessed_config(weights: dict[str, Tensor], norm_pix_loss: bool) -> dict:
    """Infer config.json for weights with the authors' names, from shapes and the published models.

    Raises:
        ValueError: the width is not that of a published model, so the number of heads is unknown.
    """
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    heads = {size["hidden_size"]: size["num_attention_heads"] for size in SIZES.values()}
    if width not in heads:
        raise ValueError(
            f"the number of heads is not known for a hidden_size of {width}, only for {', '.join(map(str, heads))}: "
            "put a config.json with num_attention_heads next to the file"
        )
    fields = {
        "hidden_size": width,
        "num_hidden_layers": depth(weights, "blocks"),
        "num_attention_heads": heads[width],
        "intermediate_size": len(weights["blocks.0.mlp.fc1.weight"]),
        "num_channels": channels,
        "patch_size": patch,
        "image_size": patch * math.isqrt(weights["pos_embed"].shape[1] - 1),
    }
    if "head.weight" in weights:
        pooling = "mean" if "fc_norm.weight" in weights else "cls"
        return to_timm(TfmViTConfig(**fields, pooling=pooling, num_labels=len(weights["head.weight"])))
    if "mask_token" in weights:
        fields |= {
            "decoder_hidden_size": weights["mask_token"].shape[-1],
            "decoder_num_hidden_layers": depth(weights, "decoder_blocks"),
            "decoder_num_attention_heads": DECODER_HEADS,
            "decoder_intermediate_size": len(weights["decoder_blocks.0.mlp.fc1.weight"]),
            "norm_pix_loss": norm_pix_loss,
        }
    config = AuthorsMAEConfig(**fields)
    config.architectures = ["AuthorsMAE" if "mask_token" in weights else "AuthorsMAEEncoder"]
    return json.loads(config.to_json_string(use_diff=False))


def depth(weights: dict[str, Tensor], stack_name: str) -> int:
    """Count the blocks of a stack."""
    return len({name.split(".")[1] for name in weights if name.split(".")[0] == stack_name})


AUTHORS = Conversion(
    name="mae_authors",
    ours=TfmMAEForPreTraining,
    theirs=AuthorsMAE,
    names=names,
    to_theirs=to_authors,
    to_ours=from_authors,
    # A fine-tuned classifier has timm's names and becomes a timm folder.
    file=WeightsFile(
        "the masked autoencoder's authors",
        is_authors_mae,
        lambda weights, arguments, _: guessed_config(weights, getattr(arguments, "norm_pix_loss", False)),
    ),
)
AUTHORS_ENCODER = replace(AUTHORS, ours=TfmMAEModel, theirs=AuthorsMAEEncoder, names=encoder_table)
CONVERSIONS = (AUTHORS, AUTHORS_ENCODER)
