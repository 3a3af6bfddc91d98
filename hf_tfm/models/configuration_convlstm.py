"""Configuration of the convolutional LSTM (Shi et al. 2015, arXiv:1506.04214)."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .checks import fields_of_size, require_at_least, require_choice, require_common
from .patches import patch_grid, sides
from .travel import TravellingConfig
from .video import validate_video_fields

# Base: the paper's best network on Moving MNIST, "5x5-128-5x5-64-5x5-64" of table 1. Tiny: our own.
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 32, "num_hidden_layers": 2, "kernel_size": 3},
    "base": {"hidden_size": [128, 64, 64], "num_hidden_layers": 3, "kernel_size": 5},
}
PEEPHOLES = ("none", "channel", "position")


@strict
class TfmConvLSTMConfig(TravellingConfig):
    """Configuration of a `TfmConvLSTMForPrediction`. Defaults to the paper's network on Moving MNIST.

    Args:
        hidden_size: channels of the states, a number or one for each layer.
        num_hidden_layers: layers of the encoder, and of the forecaster.
        kernel_size: side of the gates' convolutions, odd.
        peephole: weights from the cell to the gates: "none", "channel" (a weight per channel, with which the
            parameters of the paper's table 1 agree) or "position" (one per channel and cell of the map, for one image
            size).
        gate_norm_group_size: channels in a group of the group norm of the gates; None for no norm, as in the paper.
        layer_norm_eps: epsilon of the group norms.
        strides: strides of the convolutions before the layers, 1 or 2: the layers then have maps of decreasing size,
            and the forecaster goes from the smallest to the largest, with transposed convolutions between them. None:
            no such convolutions; the forecaster has the encoder's order, and a 1x1 convolution reads the states of all
            its layers (the paper).
        stem_size: output channels of the first of these convolutions, and input channels of the last.
        initializer_factor: factor of the Xavier-uniform initial weights.
        image_size: pixels of a frame, a number or (height, width); other sizes are read too unless ``peephole`` is
            "position".
        patch_size: side of the patches whose pixels become channels, a number or (height, width).
        num_channels: channels of a frame.
        context_length: frames that are read; other numbers are read too.
        prediction_length: frames that are predicted by default.
        loss: "bce", the binary cross-entropy with pixels as probabilities (the paper), or "mse".

    Raises:
        ValueError: a field has the wrong type or is out of range.
    """

    model_type = "tfm_convlstm"
    auto_classes: ClassVar = {
        "AutoConfig": "configuration_convlstm.TfmConvLSTMConfig",
        "AutoModel": "modeling_convlstm.TfmConvLSTMModel",
        "AutoModelForTimeSeriesPrediction": "modeling_convlstm.TfmConvLSTMForPrediction",
    }
    base_model_fsdp_plan: ClassVar = {"layers.*": "free_full_weight"}

    hidden_size: int | list[int] | tuple[int, ...] = (128, 64, 64)
    num_hidden_layers: int = 3
    kernel_size: int = 5
    peephole: str = "channel"
    gate_norm_group_size: int | None = None
    layer_norm_eps: float = 1e-5
    strides: list[int] | tuple[int, ...] | None = None
    stem_size: int = 16
    initializer_factor: float = 1.0
    image_size: int | list[int] | tuple[int, int] = 64
    patch_size: int | list[int] | tuple[int, int] = 4
    num_channels: int = 1
    context_length: int = 10
    prediction_length: int = 10
    loss: str = "bce"

    def __post_init__(self, **kwargs):
        if isinstance(self.hidden_size, tuple):
            self.hidden_size = list(self.hidden_size)
        super().__post_init__(**kwargs)

    @classmethod
    def of_size(cls, size: str, **fields: Any) -> "TfmConvLSTMConfig":
        """Return the configuration of a named size, "tiny" or "base", overridden by ``fields``.

        Raises:
            ValueError: the size is unknown.
        """
        return cls(**{**fields_of_size(SIZES, size), **fields})

    @property
    def hidden_sizes(self) -> list[int]:
        """Channels of the states of each layer."""
        if isinstance(self.hidden_size, int):
            return [self.hidden_size] * self.num_hidden_layers
        return list(self.hidden_size)

    def map_sizes(self) -> list[tuple[int, int]]:
        """Return (rows, columns) of the maps of each layer.

        Raises:
            ValueError: a stride does not divide a map.
        """
        rows, columns = patch_grid(*sides(self.image_size), self.patch_size, "image_size")
        found = []
        for stride in self.strides or [1] * self.num_hidden_layers:
            if rows % stride or columns % stride:
                raise ValueError(
                    f"strides must divide the maps of image_size / patch_size, got {stride} for {rows} x {columns}"
                )
            rows, columns = rows // stride, columns // stride
            found.append((rows, columns))
        return found

    def validate_architecture(self) -> None:
        """Validate relations between fields; called by the strict validation of transformers and huggingface_hub."""
        require_common(self)
        require_at_least(self, ("num_hidden_layers", "kernel_size", "stem_size"))
        validate_video_fields(self)
        require_choice(self, "peephole", PEEPHOLES)
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {self.kernel_size}")
        for name in ("hidden_size", "strides"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)) and len(value) != self.num_hidden_layers:
                raise ValueError(f"{name} must have num_hidden_layers = {self.num_hidden_layers} values, got {value}")
        if min(self.hidden_sizes) < 1:
            raise ValueError(f"hidden_size must be at least 1, got {self.hidden_size}")
        for stride in self.strides or ():
            if stride not in (1, 2):
                raise ValueError(f"strides must be 1 or 2, got {stride}")
        self.map_sizes()
        if self.gate_norm_group_size is not None:
            require_at_least(self, ("gate_norm_group_size",))
            for size in self.hidden_sizes:
                if 4 * size % self.gate_norm_group_size:
                    raise ValueError(
                        f"gate_norm_group_size must divide the gates of every layer, 4 * {size} channels, got "
                        f"{self.gate_norm_group_size}"
                    )
