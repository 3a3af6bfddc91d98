"""Parts that all detectors with object queries share: base class, backbone, box head, outputs.

    pixels (B, C, H, W), pixel mask (B, H, W) -> feature maps (B, F, h, w), masks of their cells (B, h, w)
    query states (..., D) -> box logits (..., 4)

Shapes: B images; H, W pixels; h, w cells of a feature map; D = config.d_model; L = config.decoder_layers; Q object
queries. A pixel mask is 1 for image and 0 for padding.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import ModelOutput, maybe_autocast

from .backbones import Backbone
from .image_backbones import SimpleFeaturePyramid
from .linear import floating_dtype
from .native_names import OwnNamesPreTrainedModel
from .set_loss import normalizers

Labels = list[dict[str, Tensor]]


class DetectorPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of detectors: loading and saving."""

    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    # Checkpoints of batch norms store a batch count, which frozen ones do not have.
    _keys_to_ignore_on_load_unexpected = [r"num_batches_tracked"]  # noqa: RUF012

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as in transformers, but keep the backbone's frozen stages frozen (transformers 5.23 unfreezes them)."""
        found = super().from_pretrained(*args, **kwargs)
        for module in (found[0] if isinstance(found, tuple) else found).modules():
            if isinstance(module, Backbone):
                module.freeze()
        return found

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise a module as in transformers, also one whose weights are all in its submodules: of classes outside
        of transformers these are skipped (5.24), in case their ``_init_weights`` ignores which weights were loaded,
        as it does for modules of timm."""
        own = next(module.parameters(recurse=False), next(module.buffers(recurse=False), None))
        inside = own is None and not getattr(module, "of_timm", False)
        super()._initialize_weights(module, is_custom_code and not inside)


class WithBackbone:
    """Mixin for a base model with a ``backbone``, and a ``pyramid`` on top of it or None."""

    config: Any
    backbone: Backbone
    pyramid: SimpleFeaturePyramid | None

    @property
    def stride(self) -> int:
        """Side of a cell of the largest feature map that the Transformer reads, in pixels."""
        return self.backbone.stride

    def freeze_backbone(self) -> None:
        """Freeze the backbone, including the statistics of its batch norms."""
        self.backbone.requires_grad_(False)
        self.backbone.train(self.backbone.training)  # puts frozen batch norms in eval mode

    def unfreeze_backbone(self) -> None:
        """Unfreeze the whole backbone, including its frozen stages; frozen norms have no trainable parameters."""
        self.backbone.requires_grad_(True)
        self.backbone.train(self.backbone.training)

    def feature_maps(self, pixel_values: Tensor, pixel_mask: Tensor | None) -> list[Tensor]:
        """Compute the feature maps of images (B, C, H, W), largest first: (B, F, h, w) each.

        Raises:
            ValueError: the images have a wrong number of channels, or the mask has another size than the images.
        """
        B, C, H, W = pixel_values.shape
        if self.config.num_channels != C:
            raise ValueError(f"pixel_values must have {self.config.num_channels} channels, got {C}")
        if pixel_mask is not None and pixel_mask.shape != (B, H, W):
            raise ValueError(f"pixel_mask must have shape {(B, H, W)}, got {tuple(pixel_mask.shape)}")
        # Convolutions are fastest with channels-last input.
        pixel_values = pixel_values.to(self.dtype).contiguous(memory_format=torch.channels_last)
        maps = self.backbone(pixel_values, pixel_mask)
        return maps if self.pyramid is None else self.pyramid(maps[-1])


class CountsItems:
    """Mixin for a detector whose losses are divided by the items of a whole step."""

    config: Any

    def count_items(self, labels: Labels, **batch: Any) -> dict[str, float]:
        """Return the ``num_items_in_batch`` of a batch; counts of micro-batches add up to those of the step."""
        return normalizers([len(label["class_labels"]) for label in labels], self.config)


def cell_mask(pixel_mask: Tensor | None, features: Tensor) -> Tensor:
    """Return the mask of the cells of a feature map (B, F, h, w): (B, h, w) bool, or (1, h, w) without padding."""
    size = features.shape[2:]
    if pixel_mask is None:
        return torch.ones(1, *size, dtype=torch.bool, device=features.device)
    return nn.functional.interpolate(pixel_mask[None].float(), size=size)[0].bool()


class BoxHead(nn.Module):
    """Box head: three linear layers with ReLU in between (Carion et al. 2020, section 3.2)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(hidden_size, width) for width in (hidden_size, hidden_size, 4))

    def forward(self, states: Tensor) -> Tensor:
        """Compute the logits of boxes from states: (..., D) -> (..., 4), in float32 under autocast."""
        for layer in self.layers[:-1]:
            states = layer(states).relu()
        # Boxes need more precision than bf16, whose spacing just below 1 is 1/256: half a pixel of a 128-pixel image.
        with maybe_autocast(states.device.type, enabled=False):
            last = self.layers[-1]
            return last(states.to(floating_dtype(last, states.dtype)))


def auxiliary(logits: Tensor, boxes: Tensor) -> list[dict[str, Tensor]] | None:
    """Return the predictions of all decoder layers but the last, or None if there are none."""
    pairs = zip(logits[:-1], boxes[:-1], strict=True)
    return [{"logits": own, "pred_boxes": box} for own, box in pairs] or None


def shared_outputs(outputs: ModelOutput, *without: str) -> dict[str, Tensor]:
    """Return the fields of the base model's output that the outputs of the heads repeat, except some."""
    return {name: outputs.get(name) for name in outputs if name not in without}
