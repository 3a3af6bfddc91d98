"""ConvLSTM: gates against a plain loop over time and torch's LSTM, published sizes, and its fused recurrence."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from hf_tfm import TfmConvLSTMConfig, TfmConvLSTMForPrediction, TfmConvLSTMModel
from hf_tfm.models.modeling_convlstm import ConvLSTMLayer
from hf_tfm.models.video import fold, unfold

TINY = {"hidden_size": [6, 4], "num_hidden_layers": 2, "kernel_size": 3, "image_size": [16, 8], "patch_size": 4}
STACKED = {**TINY, "strides": [1, 2], "stem_size": 5, "peephole": "none", "patch_size": 2}
# The forms of a layer: peepholes and norm.
FORMS = {
    "plain": {"peephole": "none"},
    "channel": {"peephole": "channel"},
    "position": {"peephole": "position"},
    "norm": {"peephole": "channel", "gate_norm_group_size": 2},
}


def tiny(seed: int = 0, **fields) -> TfmConvLSTMForPrediction:
    """A model in float64 whose weights, peepholes included, are all random."""
    torch.manual_seed(seed)
    model = TfmConvLSTMForPrediction(TfmConvLSTMConfig(**{**TINY, **fields})).double()
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    return model


def videos(frames: int = 3, rows: int = 2, seed: int = 0) -> Tensor:
    return torch.rand(rows, frames, 1, 16, 8, generator=torch.Generator().manual_seed(seed)).double()


def gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def plain_layer(layer: ConvLSTMLayer, inputs: Tensor | None, hidden: Tensor | None, cell: Tensor | None, steps: int):
    """Equation 3 of the paper, one step and one gate after the other, on concatenated input and hidden state."""
    D, side = layer.channels, layer.hidden_conv.kernel_size[0]
    weight, bias = layer.hidden_conv.weight, layer.hidden_conv.bias
    if inputs is not None:
        weight, bias = torch.cat([layer.input_conv.weight, weight], dim=1), layer.input_conv.bias
    if hidden is None:
        hidden = cell = inputs.new_zeros(inputs.shape[0], D, *inputs.shape[3:])
    peephole = torch.zeros(3, D, 1, 1).double() if layer.peephole is None else layer.peephole
    outputs = []
    for t in range(steps):
        joint = hidden if inputs is None else torch.cat([inputs[:, t], hidden], dim=1)
        sums = conv2d(joint, weight, bias, padding=side // 2)
        if layer.gate_norm is not None:
            sums = layer.gate_norm(sums)
        i, f, o, g = (sums[:, k * D : (k + 1) * D] for k in range(4))
        i = torch.sigmoid(i + peephole[0] * cell)
        f = torch.sigmoid(f + peephole[1] * cell)
        cell = f * cell + i * torch.tanh(g)
        hidden = torch.sigmoid(o + peephole[2] * cell) * torch.tanh(cell)
        outputs.append(hidden)
    return torch.stack(outputs, dim=1), hidden, cell


@pytest.mark.parametrize("driven", [True, False], ids=["input", "no input"])
@pytest.mark.parametrize("form", FORMS)
def test_layer_equals_a_plain_loop(form, driven):
    """Outputs, last state, and gradients with respect to the weights, the input and the first state."""
    torch.manual_seed(0)
    config = TfmConvLSTMConfig(**{**TINY, **FORMS[form]})
    layer = ConvLSTMLayer(config, 3 if driven else None, 4, (4, 2)).double()
    for parameter in layer.parameters():
        parameter.data.normal_(std=0.5)
    inputs = torch.randn(2, 5, 3, 4, 2).double().requires_grad_() if driven else None
    first = tuple(torch.randn(2, 4, 4, 2).double().requires_grad_() for _ in range(2))
    assert layer.is_fused(inputs) == (form != "norm")
    for state in (first, None) if driven else (first,):
        found = []
        for function in (layer, lambda *given: plain_layer(layer, *given)):
            outputs, hidden, cell = function(inputs, *(state or (None, None)), 5)
            assert torch.equal(hidden, outputs[:, -1])
            loss = (outputs * torch.linspace(-1, 1, outputs.numel()).view(outputs.shape)).sum() + cell.square().sum()
            wanted = [*layer.parameters(), *(() if inputs is None else (inputs,)), *(state or ())]
            found.append([outputs, hidden, cell, *torch.autograd.grad(loss, wanted)])
        for ours, plain in zip(*found, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-9, atol=1e-10)


def test_gradient_of_the_fused_recurrence():
    """By finite differences."""
    layer = ConvLSTMLayer(TfmConvLSTMConfig(**TINY), 1, 2, (2, 2)).double()
    layer.peephole.data.normal_()
    inputs = torch.randn(1, 3, 1, 2, 2).double().requires_grad_()
    state = tuple(torch.randn(1, 2, 2, 2).double().requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(lambda *given: layer(*given, 3)[0], (inputs, *state))


def test_one_cell_equals_torch_lstm():
    """A map of one cell and kernels of side 1; torch's gates are in the order i, f, g, o."""
    torch.manual_seed(0)
    config = TfmConvLSTMConfig(**{**TINY, "kernel_size": 1, "peephole": "none"})
    layer, other = ConvLSTMLayer(config, 3, 4, (1, 1)), nn.LSTM(3, 4, batch_first=True)
    order = torch.arange(16).view(4, 4)[[0, 1, 3, 2]].flatten()
    with torch.no_grad():
        layer.input_conv.weight.copy_(other.weight_ih_l0[order][..., None, None])
        layer.hidden_conv.weight.copy_(other.weight_hh_l0[order][..., None, None])
        layer.input_conv.bias.copy_((other.bias_ih_l0 + other.bias_hh_l0)[order])
    inputs = torch.randn(2, 6, 3)
    expected, (hidden, cell) = other(inputs)
    outputs, *state = layer(inputs[..., None, None], None, None, 6)
    torch.testing.assert_close(outputs.flatten(2), expected)
    for found, want in zip(state, (hidden, cell), strict=True):
        torch.testing.assert_close(found.flatten(1), want[0])


@pytest.mark.parametrize(
    ("sizes", "parameters"), [([256], 13_524_496), ([128, 128], 10_042_896), ([128, 64, 64], 7_585_296)]
)
def test_parameters_are_those_of_the_paper(sizes, parameters):
    """Shi et al. 2015, table 1; with a peephole weight per channel, and no input convolution where there is no
    input."""
    with torch.device("meta"):
        model = TfmConvLSTMForPrediction(TfmConvLSTMConfig(hidden_size=sizes, num_hidden_layers=len(sizes)))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert TfmConvLSTMConfig().hidden_sizes == TfmConvLSTMConfig.of_size("base").hidden_sizes == [128, 64, 64]


@pytest.mark.parametrize(
    "fields", [{}, STACKED, {**STACKED, "gate_norm_group_size": 4}], ids=["paper", "stacked", "norm"]
)
def test_network_equals_a_plain_one(fields):
    """Encoder and forecaster, written step by step: whose states are copied where, and what the output reads."""
    model = tiny(**fields)
    encoder, forecaster, x = model.convlstm, model.forecaster, videos()
    maps = torch.stack([fold(frames, model.config.patch_size) for frames in x.unbind(1)], dim=1)
    states = []
    for i, layer in enumerate(encoder.layers):
        if fields:
            maps = torch.stack([encoder.stages[i](frames) for frames in maps.unbind(1)], dim=1)
        maps, *state = plain_layer(layer, maps, None, None, 3)
        states.append(state)
    if fields:
        states.reverse()  # the forecaster begins with the smallest map
    hidden, outputs = None, []
    for i, layer in enumerate(forecaster.layers):
        hidden, *_ = plain_layer(layer, hidden, *states[i], 2)
        outputs.append(hidden)
        if fields:
            hidden = torch.stack([forecaster.stages[i](frames) for frames in hidden.unbind(1)], dim=1)
    features = hidden if fields else torch.cat(outputs, dim=2)
    logits = [unfold(forecaster.head(frames), model.config.patch_size) for frames in features.unbind(1)]
    found = model(x, prediction_length=2)
    torch.testing.assert_close(found.predictions, torch.stack(logits, dim=1).sigmoid(), rtol=1e-9, atol=1e-10)
    assert torch.equal(TfmConvLSTMModel.forward(encoder, x).last_hidden_state, encoder(x).last_hidden_state)


def test_losses_are_means_over_pixels():
    x, labels = videos(), videos(2, seed=1)
    labels[0, 0, :, 3] = -100
    for loss, function in (("bce", nn.functional.binary_cross_entropy), ("mse", nn.functional.mse_loss)):
        output = tiny(loss=loss)(x, labels=labels)
        assert output.predictions.shape == labels.shape
        known = labels != -100
        expected = function(output.predictions[known].float(), labels[known].float())
        torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-7)


def test_frames_to_predict():
    model = tiny(prediction_length=4).eval()
    assert model(videos()).predictions.shape == (2, 4, 1, 16, 8)
    longer = model(videos(), prediction_length=6).predictions
    assert longer.shape[1] == 6 and torch.equal(longer[:, :4], model(videos()).predictions)
    with pytest.raises(ValueError, match="prediction_length must be 2, the frames of labels, got 3"):
        model(videos(), labels=videos(2), prediction_length=3)
    with pytest.raises(ValueError, match="prediction_length must be at least 1, got 0"):
        model(videos(), prediction_length=0)
    with pytest.raises(
        ValueError, match=r"pixel_values_videos must have shape \(B, T, 1, H, W\), got \(2, 3, 16, 8\)"
    ):
        model(videos()[:, :, 0])
    with pytest.raises(ValueError, match=r"labels must have shape \(2, 2, 1, 16, 8\), got \(2, 2, 1, 8, 8\)"):
        model(videos(), labels=videos(2)[..., :8, :])


def test_gradient_checkpointing_and_the_unfused_loop_change_nothing():
    model = tiny().train()
    x, labels = videos(), videos(2, seed=1)
    expected = gradients(model, model(x, labels=labels).loss)
    other = copy.deepcopy(model)
    for reentrant in (False, True):
        other.gradient_checkpointing_enable({"use_reentrant": reentrant})
        other.zero_grad()
        other(x, labels=labels).loss.backward()
        assert all(torch.equal(p.grad, want) for p, want in zip(other.parameters(), expected, strict=True))
    hooked = copy.deepcopy(model)
    calls = []
    for layer in hooked.convlstm.layers:  # a convolution with a hook is called, in every step
        layer.hidden_conv.register_forward_hook(lambda *call: calls.append(call))
    for found, want in zip(gradients(hooked, hooked(x, labels=labels).loss), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    assert len(calls) == 2 * 2  # two layers, and the first of three steps has no hidden state


def test_other_sizes_are_read_unless_peepholes_have_positions():
    larger = torch.rand(1, 2, 1, 24, 16).double()
    assert tiny()(larger).predictions.shape == (1, 10, 1, 24, 16)
    with pytest.raises(RuntimeError):
        tiny(peephole="position")(larger)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kernel_size": 4}, "kernel_size must be odd, got 4"),
        ({"hidden_size": [4]}, r"hidden_size must have num_hidden_layers = 2 values, got \[4\]"),
        ({"hidden_size": 0}, "hidden_size must be at least 1, got 0"),
        ({"peephole": "all"}, 'peephole must be one of none, channel, position, got "all"'),
        ({"strides": [1, 3]}, "strides must be 1 or 2, got 3"),
        (
            {"strides": [2, 2], "patch_size": 8},
            "strides must divide the maps of image_size / patch_size, got 2 for 2 x 1",
        ),
        (
            {"gate_norm_group_size": 5},
            r"gate_norm_group_size must divide the gates of every layer, 4 \* 6 channels, got 5",
        ),
        ({"loss": "mae"}, 'loss must be one of bce, mse, got "mae"'),
        ({"patch_size": 3}, "image_size must be a multiple of the patch in height and width, got 16 x 8"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        TfmConvLSTMConfig(**{**TINY, **fields})


def test_autocast_keeps_the_cell_in_float32():
    model, x = tiny().float().eval(), videos().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.convlstm(x)
    assert all(cell.dtype == torch.float32 for _, cell in found.states)
    expected = model.convlstm(x).last_hidden_state
    torch.testing.assert_close(found.last_hidden_state, expected, rtol=0.1, atol=0.02)
