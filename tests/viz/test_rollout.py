"""Attention rollout against the paper's sums written out."""

import pytest
import torch

from hf_tfm.viz import attention_rollout


def maps(layers: int, heads: int, tokens: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(layers + tokens)
    scores = torch.randn(layers, batch, heads, tokens, tokens, generator=generator)
    return list((3 * scores).softmax(dim=-1))


def written_out(attentions: list[torch.Tensor]) -> torch.Tensor:
    """Sums and products one at a time."""
    B, H, T, _ = attentions[0].shape
    result = torch.zeros(B, T, T, dtype=torch.float64)
    for b in range(B):
        paths = [[float(i == j) for j in range(T)] for i in range(T)]
        for layer in attentions:
            step = [[sum(layer[b, h, i, j].item() for h in range(H)) / H for j in range(T)] for i in range(T)]
            step = [[(value + (i == j)) / 2 for j, value in enumerate(row)] for i, row in enumerate(step)]
            paths = [[sum(step[i][k] * paths[k][j] for k in range(T)) for j in range(T)] for i in range(T)]
        result[b] = torch.tensor(paths)
    return result


@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 2, 4)])
def test_rollout_is_the_product_of_layers(shape):
    attentions = maps(*shape)
    rollout = attention_rollout(attentions)
    torch.testing.assert_close(rollout.double(), written_out(attentions), atol=1e-6, rtol=0)
    torch.testing.assert_close(rollout.sum(dim=-1), torch.ones(rollout.shape[:2]))


def test_first_layer_is_the_rightmost_factor():
    a, b = maps(2, 1, 3)
    assert (attention_rollout([a, b]) - attention_rollout([b, a])).abs().max() > 0.01


def test_identity_attention_gives_the_identity():
    torch.testing.assert_close(attention_rollout([torch.eye(4).expand(2, 3, 4, 4)] * 5), torch.eye(4).expand(2, 4, 4))


def test_half_precision_is_summed_in_float32():
    attentions = [layer.bfloat16() for layer in maps(4, 2, 5)]
    rollout = attention_rollout(attentions)
    assert rollout.dtype == torch.float32
    torch.testing.assert_close(rollout.sum(dim=-1), torch.ones(2, 5))


@pytest.mark.parametrize(
    ("attentions", "message"),
    [
        ([], "attentions must hold the maps of at least one layer, got none"),
        ([torch.ones(2, 3, 3)], r"must be \(B, H, T, T\) .* got \(2, 3, 3\) in layer 0"),
        ([torch.ones(1, 2, 3, 4)], r"got \(1, 2, 3, 4\) in layer 0"),
        ([torch.ones(1, 2, 3, 3), torch.ones(1, 2, 4, 4)], r"got \(1, 2, 4, 4\) in layer 1"),
    ],
)
def test_invalid_maps_are_refused(attentions, message):
    with pytest.raises(ValueError, match=message):
        attention_rollout(attentions)
