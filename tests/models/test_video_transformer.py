"""Video Transformer: factorised attention against full attention with a mask, positions, both kinds of decoding."""

import copy

import pytest
import torch
from torch import Tensor

from hf_tfm import TfmVideoTransformerConfig, TfmVideoTransformerForPrediction
from hf_tfm.models.modeling_video_transformer import SpaceTimeBlock
from hf_tfm.models.positions import sincos_2d, sinusoidal

TINY = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": [8, 16],
    "patch_size": 4,
    "context_length": 3,
    "prediction_length": 2,
}


def tiny(**fields) -> TfmVideoTransformerForPrediction:
    torch.manual_seed(0)
    model = TfmVideoTransformerForPrediction(TfmVideoTransformerConfig(**{**TINY, **fields})).double().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def videos(frames: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(2, frames, 1, 8, 16, generator=torch.Generator().manual_seed(seed)).double()


@pytest.mark.parametrize("causal", [False, True])
def test_block_equals_full_attention_with_a_mask(causal):
    """Attention over time is that over all tokens in which a token sees the same patch only, and over space the same
    frame only."""
    torch.manual_seed(0)
    T, N = 5, 8
    block = SpaceTimeBlock(TfmVideoTransformerConfig(**TINY, autoregressive=causal), 0).double().eval()
    states = torch.randn(2, T * N, 16).double()
    frame, patch = torch.arange(T * N) // N, torch.arange(T * N) % N
    same_patch, same_frame = patch[:, None] == patch, frame[:, None] == frame
    if causal:
        same_patch = same_patch & (frame[:, None] >= frame)

    def attend(layer, x, mask):
        q, k, v = (
            project(x).unflatten(-1, (2, -1)).transpose(1, 2) for project in (layer.q_proj, layer.k_proj, layer.v_proj)
        )
        scores = (q @ k.transpose(2, 3) / 8**0.5).masked_fill(~mask, -torch.inf)
        return layer.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))

    expected = states + attend(block.time_attn, block.time_attn_residual.norm(states), same_patch)
    expected = expected + attend(block.space_attn, block.space_attn_residual.norm(expected), same_frame)
    expected = expected + block.feed_forward(block.feed_forward_residual.norm(expected))
    torch.testing.assert_close(block(states, T), expected, rtol=1e-9, atol=1e-10)


def test_positions_are_sums_of_time_and_space():
    model = tiny().transformer
    expected = sinusoidal(torch.arange(5), 16)[:, None] + sincos_2d(2, 4, 16)
    assert torch.equal(model.positions(5, (2, 4)).float(), expected)
    longer = model.positions(9, (3, 2)).float()  # beyond the tables of the configuration
    assert torch.equal(longer, sinusoidal(torch.arange(9), 16)[:, None] + sincos_2d(3, 2, 16))


def test_future_frames_are_predicted_in_parallel():
    model, x = tiny(), videos()
    labels = videos(2, seed=1)
    found = model(x, labels=labels)
    assert torch.equal(found.predictions, model(x).predictions) and found.predictions.shape == labels.shape
    expected = torch.nn.functional.binary_cross_entropy(found.predictions.float(), labels.float())
    torch.testing.assert_close(found.loss, expected, rtol=1e-5, atol=1e-7)
    changed = videos()
    changed[:, 0] = 0
    assert not torch.equal(model(changed).predictions, found.predictions)
    assert model(x, prediction_length=4).predictions.shape[1] == 4


def test_autoregressive_decoding_reads_its_own_predictions():
    model, x = tiny(autoregressive=True), videos()
    free = model(x, prediction_length=3).predictions
    first = model(x, prediction_length=1).predictions
    second = model(torch.cat([x, first], dim=1), prediction_length=1).predictions
    assert torch.equal(free[:, :1], first) and torch.allclose(free[:, 1:2], second, rtol=0, atol=1e-12)
    # Teacher forcing with its own predictions gives them again; with other labels, later frames differ.
    forced = model(x, labels=free).predictions
    torch.testing.assert_close(forced, free, rtol=1e-9, atol=1e-12)
    other = free.clone()
    other[:, 1] = 1 - other[:, 1]
    forced = model(x, labels=other).predictions
    torch.testing.assert_close(forced[:, :2], free[:, :2], rtol=1e-9, atol=1e-12)
    assert (forced[:, 2] - free[:, 2]).abs().max() > 1e-6


def test_gradient_checkpointing_changes_nothing():
    model, labels = tiny().train(), videos(2, seed=1)
    other = copy.deepcopy(model)
    other.gradient_checkpointing_enable()
    found = []
    for one in (model, other):
        one(videos(), labels=labels).loss.backward()
        found.append([parameter.grad for parameter in one.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_attention_maps_are_of_time_and_space():
    maps = tiny()(videos(), output_attentions=True).attentions
    assert [tuple(one.shape) for one in maps] == [(2 * 8, 2, 5, 5), (2 * 5, 2, 8, 8)] * 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 18}, "hidden_size must be a multiple of 4 for 2-D sine-cosine positions, got 18"),
        ({"prediction_length": 0}, "prediction_length must be at least 1, got 0"),
    ],
)
def test_fields_out_of_range(fields, message):
    with pytest.raises(ValueError, match=message):
        TfmVideoTransformerConfig(**{**TINY, **fields})
