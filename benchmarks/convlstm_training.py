"""ConvLSTM training step against an implementation that computes one cell after the other.

python -m benchmarks convlstm_training

The peer is written the way public implementations are: at every step, one convolution of the concatenated input and
hidden state of each layer, zeros as input of the forecaster, and autograd through all of it. Both have the network of
Shi et al. 2015 (arXiv:1506.04214, section 3.2) and the same weights, except those that read the zeros.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from hf_tfm import TfmConvLSTMConfig, TfmConvLSTMForPrediction
from hf_tfm.models.video import fold, over_frames, unfold

from . import common

OURS, PEER = "ours", "cell_by_cell"


class Cell(nn.Module):
    """A step of a layer; gates are in the order i, f, o, g."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.channels = channels
        self.conv = nn.Conv2d(in_channels + channels, 4 * channels, kernel_size, padding=kernel_size // 2)
        self.peephole = nn.Parameter(torch.zeros(3, channels, 1, 1))

    def forward(self, inputs: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        i, f, o, g = self.conv(torch.cat([inputs, hidden], dim=1)).chunk(4, dim=1)
        i = torch.sigmoid(i + self.peephole[0] * cell)
        f = torch.sigmoid(f + self.peephole[1] * cell)
        cell = f * cell + i * torch.tanh(g)
        return torch.sigmoid(o + self.peephole[2] * cell) * torch.tanh(cell), cell


class CellByCell(nn.Module):
    """Encoder and forecaster of `Cell`s."""

    def __init__(self, config: TfmConvLSTMConfig):
        super().__init__()
        self.config, sizes = config, config.hidden_sizes
        inputs = [config.num_channels * config.patch_size**2, *sizes[:-1]]
        self.encoder, self.forecaster = (
            nn.ModuleList(Cell(*shape, config.kernel_size) for shape in zip(inputs, sizes, strict=True))
            for _ in range(2)
        )
        self.head = nn.Conv2d(sum(sizes), inputs[0], 1)

    def forward(self, videos: Tensor, steps: int) -> Tensor:
        frames = over_frames(lambda images: fold(images, self.config.patch_size), videos)
        B, T, _, *grid = frames.shape
        states = [(frames.new_zeros(B, cell.channels, *grid),) * 2 for cell in self.encoder]
        for t in range(T):
            hidden = frames[:, t]
            for level, cell in enumerate(self.encoder):
                states[level] = cell(hidden, *states[level])
                hidden = states[level][0]
        outputs = []
        for _ in range(steps):
            hidden = torch.zeros_like(frames[:, 0])
            for level, cell in enumerate(self.forecaster):
                states[level] = cell(hidden, *states[level])
                hidden = states[level][0]
            outputs.append(self.head(torch.cat([hidden for hidden, _ in states], dim=1)))
        return over_frames(lambda maps: unfold(maps, self.config.patch_size), torch.stack(outputs, dim=1))


def peer_of(model: TfmConvLSTMForPrediction) -> CellByCell:
    """Return the peer of a model, with its weights."""
    peer = CellByCell(model.config)
    layers = [*model.convlstm.layers, *model.forecaster.layers]
    with torch.no_grad():
        for layer, cell in zip(layers, [*peer.encoder, *peer.forecaster], strict=True):
            driven = layer.input_conv
            cell.conv.weight[:, -layer.channels :] = layer.hidden_conv.weight
            if driven is not None:
                cell.conv.weight[:, : -layer.channels] = driven.weight
            cell.conv.bias.copy_((layer.hidden_conv if driven is None else driven).bias)
            cell.peephole.copy_(layer.peephole)
        peer.head.load_state_dict(model.forecaster.head.state_dict())
    return peer


@dataclass(frozen=True)
class Setting:
    """Sizes of a network and of its batches."""

    hidden_size: int
    num_hidden_layers: int
    kernel_size: int
    image_size: int
    batch_size: int

    def model(self) -> TfmConvLSTMForPrediction:
        """Return our model, with frames in patches of 4 x 4 pixels."""
        shape = {name: getattr(self, name) for name in ("hidden_size", "num_hidden_layers", "kernel_size")}
        return TfmConvLSTMForPrediction(TfmConvLSTMConfig(**shape, image_size=self.image_size, patch_size=4))


SETTINGS = (Setting(32, 2, 3, 32, 16), Setting(64, 2, 3, 64, 8))


def main(frames: int = 10, rounds: int = 5) -> None:
    """Measure and write benchmarks/results/convlstm_training.json.

    Args:
        frames: frames that are read, and predicted.
        rounds: timed rounds; medians are reported.
    """
    common.write(
        "convlstm_training", {"frames": frames, "settings": [measure(one, frames, rounds) for one in SETTINGS]}
    )


def measure(setting: Setting, frames: int, rounds: int) -> dict:
    """Milliseconds of a forward and a backward pass, and the speedup."""
    torch.manual_seed(0)
    model = setting.model()
    peer = peer_of(model)
    shape = (setting.batch_size, frames, 1, setting.image_size, setting.image_size)
    videos, labels = torch.rand(shape), torch.rand(shape)

    def step(module: nn.Module, number: int) -> int:
        module.zero_grad()
        if module is model:
            loss = model(videos, labels=labels).loss
        else:
            loss = binary_cross_entropy_with_logits(peer(videos, frames), labels)
        loss.backward()
        return 1

    rates = common.interleaved({OURS: partial(step, model), PEER: partial(step, peer)}, rounds)
    return {
        **vars(setting),
        "milliseconds": {name: round(1e3 / sorted(found)[len(found) // 2], 1) for name, found in rates.items()},
        "speedup": round(common.ratio(rates, OURS, PEER), 2),
    }
