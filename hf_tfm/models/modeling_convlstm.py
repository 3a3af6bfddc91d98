"""Convolutional LSTM for video forecasting (Shi et al. 2015, arXiv:1506.04214, sections 3.1 and 3.2).

    videos (B, T, C, H, W) -> patches as channels (B, T, P P C, h, w) -> encoder -> states of each layer, copied
    -> forecaster, F steps -> hidden states of its layers -> convolution -> (B, F, C, H, W)

A layer computes, with * for a convolution and . for an elementwise product (equation 3):

    i, f = sigmoid(W_x * X_t + W_h * H_{t-1} + w . C_{t-1} + b)    g = tanh(W_x * X_t + W_h * H_{t-1} + b)
    C_t  = f . C_{t-1} + i . g
    o    = sigmoid(W_x * X_t + W_h * H_{t-1} + w . C_t + b)        H_t = o . tanh(C_t)

The W_x * X_t of all steps and gates are one convolution, outside the loop over time.

Shapes: B videos; T frames that are read, F that are predicted; C channels; H, W pixels; P patch side; h, w cells of a
map; D channels of a layer's states.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_convlstm import TfmConvLSTMConfig
from .convlstm_scan import scan
from .input_checks import refuse_unknown
from .linear import is_plain
from .losses import Items
from .native_names import OwnNamesPreTrainedModel
from .patches import sides
from .video import (
    VideoForecastOutput,
    check_videos,
    count_pixels,
    fold,
    forecast_loss,
    frames_to_predict,
    over_frames,
    to_predictions,
    unfold,
)

State = tuple[Tensor, Tensor]  # hidden state and cell, (B, D, h, w) each
SLOPE = 0.2  # of the leaky ReLUs between layers


class ConvLSTMLayer(GradientCheckpointingLayer):
    """A convolutional LSTM over a sequence of maps (equation 3); the channels of the gates are in the order i, f, o,
    g.

    Args:
        in_channels: channels of the input; None for a layer without input (zeros in the paper's forecaster).
        channels: D.
        size: (h, w) of the maps, for peepholes of every position.
    """

    def __init__(self, config: TfmConvLSTMConfig, in_channels: int | None, channels: int, size: tuple[int, int]):
        super().__init__()
        self.channels = channels
        shape = {"kernel_size": config.kernel_size, "padding": config.kernel_size // 2}
        self.input_conv = None if in_channels is None else nn.Conv2d(in_channels, 4 * channels, **shape)
        self.hidden_conv = nn.Conv2d(channels, 4 * channels, **shape, bias=in_channels is None)
        group = config.gate_norm_group_size
        self.gate_norm = (
            None if group is None else nn.GroupNorm(4 * channels // group, 4 * channels, eps=config.layer_norm_eps)
        )
        cells = size if config.peephole == "position" else (1, 1)
        self.peephole = None if config.peephole == "none" else nn.Parameter(torch.zeros(3, channels, *cells))

    def step(self, gates: Tensor, cell: Tensor | None) -> State:
        """Compute the next hidden state and cell.

        Args:
            gates: (B, 4 D, h, w), sums of the convolutions.
            cell: None for zeros.
        """
        if self.gate_norm is not None:
            gates = self.gate_norm(gates)
        if self.peephole is None:
            shares, new = gates.split([3 * self.channels, self.channels], dim=1)
            write, keep, output = shares.sigmoid().chunk(3, dim=1)
            cell = write * new.tanh() if cell is None else torch.addcmul(write * new.tanh(), keep, cell)
            return output * cell.tanh(), cell
        shares, output, new = gates.split([2 * self.channels, self.channels, self.channels], dim=1)
        if cell is None:
            cell = shares[:, : self.channels].sigmoid() * new.tanh()
        else:
            shares = torch.addcmul(shares.unflatten(1, (2, -1)), self.peephole[:2], cell[:, None]).sigmoid()
            write, keep = shares.unbind(1)
            cell = torch.addcmul(write * new.tanh(), keep, cell)
        return torch.addcmul(output, self.peephole[2], cell).sigmoid() * cell.tanh(), cell

    def forward(
        self, inputs: Tensor | None, hidden: Tensor | None, cell: Tensor | None, steps: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute the hidden states (B, steps, D, h, w) of a sequence, and the last hidden state and cell.

        Args:
            inputs: (B, steps, in_channels, h, w), or None for a layer without input.
            hidden, cell: state before the first step; None for zeros.
            steps: number of steps.
        """
        driven = None
        if inputs is not None:
            driven = over_frames(self.input_conv, inputs.transpose(0, 1))  # (steps, B, 4 D, h, w)
        if self.is_fused(driven):
            conv = self.hidden_conv
            outputs, cell = scan(driven, conv.weight, conv.bias, self.peephole, hidden, cell, steps)
            return outputs.transpose(0, 1), outputs[-1], cell
        found = []
        for drive in (None,) * steps if driven is None else driven.unbind():
            if hidden is None:
                gates = drive
            else:
                gates = self.hidden_conv(hidden)
                gates = gates if drive is None else gates + drive
            # Under autocast the cell remains in float32.
            hidden, cell = self.step(gates.to((inputs if cell is None else cell).dtype), cell)
            found.append(hidden)
        return torch.stack(found, dim=1), hidden, cell

    def is_fused(self, driven: Tensor | None) -> bool:
        """Return whether `scan` computes the same: without norms, autocast, traced graphs, and replaced
        convolutions."""
        weight = self.hidden_conv.weight
        return (
            self.gate_norm is None
            and is_plain(self.hidden_conv, nn.Conv2d)
            and not torch.compiler.is_compiling()
            and not torch.jit.is_tracing()
            and not torch.is_autocast_enabled(weight.device.type)
            and (driven is None or driven.dtype == weight.dtype)
        )


@dataclass
class TfmConvLSTMModelOutput(ModelOutput):
    """Output of the encoder.

    ``last_hidden_state`` (B, T, D, h, w) of the last layer; ``states``, the last hidden state and cell of each layer;
    on request ``hidden_states``, the input and output of each layer.
    """

    last_hidden_state: Tensor | None = None
    states: tuple[State, ...] | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class TfmConvLSTMPreTrainedModel(OwnNamesPreTrainedModel):
    """Base class of the ConvLSTM models: weight initialisation, loading and saving."""

    config: TfmConvLSTMConfig
    base_model_prefix = "convlstm"
    main_input_name = "pixel_values_videos"
    input_modalities = ("video",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["ConvLSTMLayer"]  # noqa: RUF012
    _can_record_outputs = {"hidden_states": ConvLSTMLayer}  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Initialise convolutions with Xavier uniform, those of each gate on their own, and biases with zeros."""
        if isinstance(module, ConvLSTMLayer):
            for conv in filter(None, (module.input_conv, module.hidden_conv)):
                fans = (conv.in_channels + module.channels) * conv.kernel_size[0] * conv.kernel_size[1]
                bound = self.config.initializer_factor * math.sqrt(6 / fans)
                init.uniform_(conv.weight, -bound, bound)
            if module.peephole is not None:
                init.zeros_(module.peephole)
        elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            init.xavier_uniform_(module.weight, gain=self.config.initializer_factor)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.GroupNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


class TfmConvLSTMModel(TfmConvLSTMPreTrainedModel):
    """Encoder: a stack of ConvLSTM layers over the frames of a video, without outputs of pixels."""

    _auto_class = "AutoModel"
    # In checkpoints of the whole model.
    _keys_to_ignore_on_load_unexpected = [r"^forecaster\."]  # noqa: RUF012

    def __init__(self, config: TfmConvLSTMConfig):
        super().__init__(config)
        height, width = sides(config.patch_size)
        channels, sizes = config.num_channels * height * width, config.hidden_sizes
        inputs = [channels, *sizes[:-1]]
        self.stages = None
        if config.strides is not None:
            outputs = [config.stem_size, *sizes[:-1]]
            self.stages = nn.ModuleList(
                nn.Sequential(nn.Conv2d(*pair, 3, stride, padding=1), nn.LeakyReLU(SLOPE))
                for *pair, stride in zip(inputs, outputs, config.strides, strict=True)
            )
            inputs = outputs
        self.layers = nn.ModuleList(
            ConvLSTMLayer(config, *shape) for shape in zip(inputs, sizes, config.map_sizes(), strict=True)
        )
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Return what reads the frames."""
        return self.layers[0] if self.stages is None else self.stages[0]

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(self, pixel_values_videos: Tensor, **kwargs: Unpack[TransformersKwargs]) -> TfmConvLSTMModelOutput:
        """Encode videos (B, T, C, H, W) of any number of frames."""
        check_videos(self.config, pixel_values_videos)
        refuse_unknown(kwargs, self.config._attn_implementation)
        videos = pixel_values_videos.to(self.layers[0].hidden_conv.weight.dtype)
        states = over_frames(lambda frames: fold(frames, self.config.patch_size), videos)  # (B, T, P P C, h, w)
        if self.training and self.gradient_checkpointing:
            states.requires_grad_()  # or reentrant checkpoints of the first layer would give no gradients
        last = []
        for i, layer in enumerate(self.layers):
            if self.stages is not None:
                states = over_frames(self.stages[i], states)
            states, *state = layer(states, None, None, states.shape[1])
            last.append(tuple(state))
        return TfmConvLSTMModelOutput(last_hidden_state=states, states=tuple(last))


class ConvLSTMForecaster(nn.Module):
    """Forecaster: starts from the encoder's states, reads no frames, and predicts pixels (section 3.2, figure 3).

    Its first layer has no input. In the paper that is the layer of the lowest level; with ``strides``, that of the
    smallest map.
    """

    def __init__(self, config: TfmConvLSTMConfig):
        super().__init__()
        self.patch_size = config.patch_size
        height, width = sides(config.patch_size)
        channels, sizes = config.num_channels * height * width, config.hidden_sizes
        maps = config.map_sizes()
        self.stages = None
        # Levels of the encoder's layers in the order of the forecaster's.
        self.order = list(range(len(sizes)))
        if config.strides is None:
            self.head = nn.Conv2d(sum(sizes), channels, 1)
        else:
            self.order.reverse()
            outputs = [config.stem_size, *sizes[1:]]
            self.stages = nn.ModuleList(
                nn.Sequential(upsampling(sizes[i], outputs[i], config.strides[i]), nn.LeakyReLU(SLOPE))
                for i in self.order
            )
            self.head = nn.Conv2d(config.stem_size, channels, 1)
        self.layers = nn.ModuleList(
            ConvLSTMLayer(config, None if before is None else sizes[before], sizes[i], maps[i])
            for before, i in zip([None, *self.order], self.order, strict=False)
        )

    def forward(self, states: tuple[State, ...], steps: int) -> Tensor:
        """Predict the pixels (B, steps, C, H, W) that follow the states of the encoder's layers, before a sigmoid."""
        outputs: list[Tensor] = []
        hidden = None
        for number, (layer, level) in enumerate(zip(self.layers, self.order, strict=True)):
            hidden, *_ = layer(hidden, *states[level], steps)
            outputs.append(hidden)
            if self.stages is not None:
                hidden = over_frames(self.stages[number], hidden)
        features = torch.cat(outputs, dim=2) if self.stages is None else hidden
        return over_frames(lambda maps: unfold(self.head(maps), self.patch_size), features)


def upsampling(in_channels: int, out_channels: int, stride: int) -> nn.Module:
    """Return the convolution that inverts the stride of one of the encoder."""
    if stride == 1:
        return nn.Conv2d(in_channels, out_channels, 3, padding=1)
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride, padding=1)


class TfmConvLSTMForPrediction(TfmConvLSTMPreTrainedModel):
    """Encoder and forecaster that predict the next frames of a video (section 3.2)."""

    _auto_class = "AutoModelForTimeSeriesPrediction"
    _fsdp_plan = {"forecaster.layers.*": "free_full_weight"}  # noqa: RUF012

    def __init__(self, config: TfmConvLSTMConfig):
        super().__init__(config)
        self.convlstm = TfmConvLSTMModel(config)
        self.forecaster = ConvLSTMForecaster(config)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        pixel_values_videos: Tensor,
        labels: Tensor | None = None,
        prediction_length: int | None = None,
        num_items_in_batch: Items | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> VideoForecastOutput:
        """Predict the frames that follow videos (B, T, C, H, W) with pixels in [0, 1].

        Args:
            labels: (B, F, C, H, W), these frames, in [0, 1]; -100 for pixels that count for nothing.
            prediction_length: F; by default that of the labels, or of the configuration.
            num_items_in_batch: number of pixel values of the whole step, see `forecast_loss`.
        """
        outputs = self.convlstm(pixel_values_videos, **kwargs)
        steps = frames_to_predict(self.config, labels, prediction_length)
        logits = self.forecaster(outputs.states, steps)
        loss = None if labels is None else forecast_loss(self.config, logits, labels, num_items_in_batch)
        predictions = to_predictions(self.config, logits)
        return VideoForecastOutput(loss=loss, predictions=predictions, hidden_states=outputs.hidden_states)

    def count_items(self, labels: Tensor, **batch) -> Tensor:
        """Return the ``num_items_in_batch`` of a batch: the number of pixel values with a label."""
        return count_pixels(labels)
