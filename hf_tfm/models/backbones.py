"""Feature maps of timm's models, as the stem of a Transformer (hybrid ViT; DETR).

pixels (B, C, H, W) -> feature map (B, F, H / s, W / s), s the stride of the chosen stage
"""

from torch import Tensor, nn
from transformers.utils import is_timm_available


class TimmFeatures(nn.Module):
    """One feature map of a timm model with random weights; a checkpoint brings its own.

    Args:
        name: of the timm model.
        num_channels: of the images.
        out_index: which of its feature maps, by timm's ``out_indices``.

    Raises:
        ImportError: timm is not installed.
        ValueError: timm has no model of this name.
    """

    def __init__(self, name: str, num_channels: int = 3, out_index: int = -1):
        super().__init__()
        if not is_timm_available():
            raise ImportError(f'backbone="{name}" needs timm: pip install timm')
        if is_timm_available():  # here and in this form, since the import is slow and the file travels
            import timm
        if not timm.is_model(name):
            raise ValueError(f'backbone must be the name of a timm model (see timm.list_models()), got "{name}"')
        self.body = timm.create_model(
            name, features_only=True, out_indices=(out_index,), pretrained=False, in_chans=num_channels
        )
        for module in self.body.modules():
            module.of_timm = True  # for `reset`: transformers hands over modules one by one, without their names
        self.channels = self.body.feature_info.channels()[-1]
        self.stride = self.body.feature_info.reduction()[-1]

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, F, ceil(H / s), ceil(W / s))."""
        return self.body(pixel_values)[-1]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the feature map of an image."""
        return -(-height // self.stride), -(-width // self.stride)


def reset(module: nn.Module) -> bool:
    """Draw new weights by torch's own rule if the module is part of a timm model; whether it is."""
    of_timm = getattr(module, "of_timm", False)
    if of_timm and hasattr(module, "reset_parameters"):
        module.reset_parameters()
    return of_timm
