"""Backbones of detectors that are models of this package or of transformers, and a feature pyramid on plain ones.

pixels (B, C, H, W) -> Vision Transformer, Swin, ResNet ... -> maps (B, F, h, w), largest first
map of a plain Vision Transformer (B, F, h, w) -> maps (B, D, 2 h, 2 w), (B, D, h, w), (B, D, h / 2, w / 2)

Shapes: B images; H, W pixels; F channels of a map; h, w its rows and columns; P patch side; D channels of the pyramid.
"""

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoBackbone, PreTrainedConfig, PreTrainedModel

from .backbones import NORMS, Backbone, TimmFeatures, convert_grouped, convert_norms
from .configuration_backbone import OWN, parse_backbone
from .configuration_swin import TfmSwinConfig
from .modeling_swin import TfmSwinBackbone
from .modeling_vit import TfmViTBackbone

CELLS = 32  # rows and columns of the smallest patches, or strides of 8 pixels, of the image that measures a backbone
PYRAMID_LEVELS = 3  # strides P / 2, P and 2 P


class Stage(NamedTuple):
    """A stage of a backbone: its index among the stages, channels and stride of its feature map."""

    index: int
    channels: int
    stride: int


class Layout(NamedTuple):
    """Measurements of a backbone.

    Args:
        stages: the last stage of each stride, the largest feature map first.
        names: of all stages; the first may be the "stem".
        pads: images must be padded to multiples of the stride.
        batch_norms: it has batch norms.
    """

    stages: tuple[Stage, ...]
    names: tuple[str, ...]
    pads: bool
    batch_norms: bool

    @property
    def stems(self) -> int:
        """Number of stages that are stems, 0 or 1."""
        return int(self.names[0] == "stem")

    @property
    def count(self) -> int:
        """Number of stages without the stem."""
        return len(self.names) - self.stems

    @property
    def is_plain(self) -> bool:
        """True if all feature maps have one size, as those of a Vision Transformer."""
        return len(self.stages) == 1


def new_body(config: PreTrainedConfig) -> PreTrainedModel:
    """Build a backbone with random weights."""
    if type(config) not in OWN.values():
        return AutoBackbone.from_config(config)
    return (TfmSwinBackbone if isinstance(config, TfmSwinConfig) else TfmViTBackbone)(config)


def measured_body(fields: str, indices: list[int] | None = None) -> tuple[PreTrainedModel, Tensor]:
    """Build a backbone without memory for its weights, and an image (1, C, S, S) for it.

    Args:
        fields: its configuration as JSON.
        indices: stages with a feature map; default: all.
    """
    config = parse_backbone(json.loads(fields))
    config.out_indices = list(range(len(config.stage_names))) if indices is None else indices
    patch = getattr(config, "patch_size", 8)
    if not isinstance(patch, int) and len(set(patch)) > 1:
        raise ValueError(f"backbone patch_size must be square, got {tuple(patch)}")
    patch = patch if isinstance(patch, int) else patch[0]
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        body = new_body(config).eval()
        return body, torch.zeros(1, getattr(config, "num_channels", 3), *[CELLS * patch] * 2, dtype=body.dtype)


@lru_cache
def layout_of(fields: str) -> Layout:
    """Measure a backbone, whose stages transformers does not describe.

    Args:
        fields: its configuration as JSON.

    Raises:
        ValueError: it has no feature maps of a usable size.
    """
    model_type = json.loads(fields)["model_type"]
    try:
        body, image = measured_body(fields)
        with torch.no_grad():
            sizes = [tuple(features.shape) for features in body(image).feature_maps]
        pads = not keeps_borders(body, image, sizes)
    except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"a {model_type} model does not work as a backbone: {reason}") from error
    side, found = image.shape[-1], {}
    for index, size in enumerate(sizes):
        if len(size) != 4 or size[2] != size[3] or side % size[3]:
            raise ValueError(f"a {model_type} model does not work as a backbone: a map of {side} pixels is {size}")
        found[side // size[3]] = Stage(index, size[1], side // size[3])
    norms = any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    stages = tuple(found[stride] for stride in sorted(found))
    if not works_at(body, image, stages[-1].stride):
        raise ValueError(f"a {model_type} model does not work as a backbone: it takes images of one size only")
    return Layout(stages, tuple(body.stage_names), pads, norms)


def works_at(body: PreTrainedModel, image: Tensor, more: int) -> bool:
    """Return whether a backbone takes images that are ``more`` pixels wider."""
    try:
        with torch.no_grad():
            body(nn.functional.pad(image, (0, more)))
    except (RuntimeError, ValueError):
        return False
    return True


def keeps_borders(body: PreTrainedModel, image: Tensor, sizes: list[tuple[int, ...]]) -> bool:
    """Return whether a backbone rounds the sizes of its maps up if its strides do not divide the image."""
    try:
        with torch.no_grad():
            larger = body(nn.functional.pad(image, (0, 1, 0, 1))).feature_maps
    except (RuntimeError, ValueError):
        return False
    return all(features.shape[-1] == size[-1] + 1 for features, size in zip(larger, sizes, strict=True))


@lru_cache
def weights_of_stages(
    fields: str, indices: tuple[int, ...], frozen: int | None
) -> tuple[frozenset[str], frozenset[str]]:
    """Return the names of the weights that decide the feature maps ``indices``, and of those that decide the output of
    stage ``frozen``, before a norm.

    Args:
        fields: configuration of the backbone as JSON.
        frozen: index of a stage; None for no stage.
    """
    with torch.inference_mode(False), torch.enable_grad():
        body, image = measured_body(fields, list(indices))
        names, weights = zip(*body.named_parameters(), strict=True)
        output = body(image, output_hidden_states=True)

        def deciding(maps: Iterable[Tensor]) -> frozenset[str]:
            total = sum(features.sum() for features in maps)
            gradients = torch.autograd.grad(total, weights, retain_graph=True, allow_unused=True)
            return frozenset(name for name, found in zip(names, gradients, strict=True) if found is not None)

        used = deciding(output.feature_maps)
        return used, frozenset() if frozen is None else deciding([output.hidden_states[frozen]])


class TransformersFeatures(Backbone):
    """Feature maps of a model of this package or of transformers.

    A hierarchical model has a map for each stride, that of its last stage; a plain Vision Transformer has one, of its
    patches, without the [class] token. Images whose size the stride does not divide are padded with zeros at the
    bottom and on the right.

    Args:
        fields: configuration of the model, with its ``model_type``.
        maps: number of feature maps, the smallest ones; a plain model has one.
        norm: conversion of its batch norms, see `convert_norms`; without any it has no effect.
        frozen_stages: number of frozen stages, in addition to the stem; no gradient flows into them. 0 freezes
            nothing. A stage of a plain model is a block.
        momentum: momentum of batch norm's running statistics.

    Raises:
        ValueError: it has fewer maps or stages, or does not work as a backbone.
    """

    def __init__(
        self,
        fields: dict[str, Any],
        maps: int = 1,
        norm: str = "batch",
        frozen_stages: int = 0,
        momentum: float = 0.1,
    ):
        super().__init__()
        if norm not in NORMS:
            raise ValueError(f'norm must be one of {", ".join(NORMS)}, got "{norm}"')
        key = json.dumps(fields, sort_keys=True)
        layout, config = layout_of(key), parse_backbone(fields)
        self.is_plain = layout.is_plain
        if not self.is_plain and maps > len(layout.stages):
            raise ValueError(
                f"a {config.model_type} backbone has {len(layout.stages)} feature maps of different sizes, {maps} are "
                "needed"
            )
        if frozen_stages > layout.count:
            raise ValueError(
                f"backbone_frozen_stages must be at most {layout.count} for a {config.model_type} backbone, got "
                f"{frozen_stages}"
            )
        stages = layout.stages[-1:] if self.is_plain else layout.stages[-maps:]
        config.out_indices = [stage.index for stage in stages]
        self.body = new_body(config)
        convert_norms(self.body, norm, momentum)
        self.depthwise = convert_grouped(self.body)
        self.channels = [stage.channels for stage in stages]
        self.strides = [stage.stride for stage in stages]
        self.multiple = self.stride if layout.pads else 1
        self.takes_mask = isinstance(self.body, TfmViTBackbone)
        self.frozen_stages = frozen_stages
        frozen = frozen_stages - 1 + layout.stems if frozen_stages else None
        used, first = weights_of_stages(key, tuple(config.out_indices), frozen)
        names = {name for name, _ in self.body.named_parameters()}
        self.frozen_names = sorted((names - used) | (names & first))
        self.freeze()

    def freeze(self) -> None:
        """Disable gradients of the frozen stages, and of weights that the feature maps do not depend on."""
        for name in self.frozen_names:
            self.body.get_parameter(name).requires_grad_(False)
        self.train(self.training)  # puts the frozen batch norms in eval mode

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor | None = None) -> list[Tensor]:
        """Compute feature maps (B, F, ceil(H / s), ceil(W / s)) of images (B, C, H, W).

        Args:
            pixel_mask: (B, H, W), 1 for image and 0 for padding. A Vision Transformer does not attend to padding, and
                resizes its position embeddings to the unpadded images; other models read padding as image.
        """
        height, width = pixel_values.shape[2:]
        margins = (0, -width % self.multiple, 0, -height % self.multiple)
        pixel_values = self.arrange(nn.functional.pad(pixel_values, margins))
        if pixel_mask is None or not self.takes_mask:
            return list(self.body(pixel_values).feature_maps)
        return list(self.body(pixel_values, pixel_mask=nn.functional.pad(pixel_mask, margins)).feature_maps)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of a feature map (B, F, h, w)."""

    def forward(self, features: Tensor) -> Tensor:
        """(B, F, h, w) -> (B, F, h, w)."""
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def refine(channels: int, width: int) -> nn.Sequential:
    """Build the two convolutions of a level, 1 x 1 and 3 x 3, each followed by layer norm."""
    return nn.Sequential(
        nn.Conv2d(channels, width, kernel_size=1, bias=False),
        ChannelNorm(width, eps=1e-6),
        nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False),
        ChannelNorm(width, eps=1e-6),
    )


class SimpleFeaturePyramid(nn.Module):
    """Feature maps of several strides from the last map of a plain Vision Transformer (Li et al. 2022,
    arXiv:2203.16527, section 3, "Simple feature pyramid").

    Strides are half of the patch side by transposed convolution, the patch side, and twice that by max pooling.

    Args:
        channels: F.
        stride: P.
        width: D, number of channels of all levels.
        levels: number of levels, the smallest maps; at most `PYRAMID_LEVELS`.
    """

    def __init__(self, channels: int, stride: int, width: int, levels: int = PYRAMID_LEVELS):
        super().__init__()
        scalings = [
            (stride // 2, nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2), channels // 2),
            (stride, nn.Identity(), channels),
            (2 * stride, nn.MaxPool2d(kernel_size=2, stride=2, ceil_mode=True), channels),
        ][-levels:]
        self.strides = [stride for stride, _, _ in scalings]
        self.channels = [width] * levels
        self.levels = nn.ModuleList(nn.Sequential(scaling, refine(inputs, width)) for _, scaling, inputs in scalings)

    def forward(self, features: Tensor) -> list[Tensor]:
        """(B, F, h, w) -> maps of D channels, the largest first."""
        return [level(features) for level in self.levels]


def build_backbone(config: Any, timm_maps: int, maps: int) -> Backbone:
    """Build the backbone of a detector's configuration.

    Args:
        timm_maps, maps: number of feature maps of a timm model, and of any other.
    """
    norm, stages, momentum = config.backbone_norm, config.backbone_frozen_stages, config.backbone_norm_momentum
    if config.backbone_config is not None:
        return TransformersFeatures(config.backbone_config, maps, norm, stages, momentum)
    indices, arguments = tuple(range(-timm_maps, 0)), (norm, stages, config.output_stride, momentum)
    return TimmFeatures(config.backbone, config.num_channels, indices, *arguments, config.backbone_kwargs)


def build_pyramid(backbone: Backbone, width: int, maps: int) -> SimpleFeaturePyramid | None:
    """Build the pyramid of a detector that reads several feature maps, if its backbone is plain; else return None.

    Args:
        width: number of channels of the maps.
        maps: number of feature maps.
    """
    if maps == 1 or not (isinstance(backbone, TransformersFeatures) and backbone.is_plain):
        return None
    return SimpleFeaturePyramid(backbone.channels[-1], backbone.stride, width, maps)


def may_have_batch_norms(config: Any) -> bool:
    """Return whether the backbone of a detector's configuration has batch norms; True for any timm model.

    Raises:
        ValueError: see `layout_of`.
    """
    fields = getattr(config, "backbone_config", None)  # other packages' detectors may have timm models only
    return fields is None or layout_of(json.dumps(fields, sort_keys=True)).batch_norms
