"""Attention methods against the self-attention of transformers' Nystromformer and Longformer, with copied weights."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import LongformerConfig, NystromformerConfig
from transformers.models.longformer.modeling_longformer import LongformerSelfAttention
from transformers.models.nystromformer.modeling_nystromformer import NystromformerSelfAttention

from hf_tfm.models.block_attention import LongformerAttention
from hf_tfm.models.low_rank_attention import NystromAttention


def heads(states: Tensor) -> Tensor:
    return states.unflatten(-1, (4, 8)).transpose(1, 2)


def attend(method, layer, theirs, states: Tensor, tokens: Tensor | None = None) -> Tensor:
    projected = (heads(getattr(theirs, name)(states)) for name in ("query", "key", "value"))
    mask = None if tokens is None else tokens[:, None, None]
    return method(layer, *projected, mask)[0].flatten(2)


def states_of(rows: int, length: int) -> Tensor:
    return torch.randn(rows, length, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("kernel_size", [5, 0])
def test_nystromformer(kernel_size):
    """After enough iterations for the pseudo-inverse, whose start differs; large queries make its matrix regular."""
    config = NystromformerConfig(hidden_size=32, num_attention_heads=4, num_landmarks=6, segment_means_seq_len=24)
    config.conv_kernel_size = kernel_size or 5
    torch.manual_seed(0)
    theirs, states = NystromformerSelfAttention(config).eval(), states_of(2, 24)
    theirs.query.weight *= 20
    iterate = theirs.iterative_inv
    theirs.iterative_inv = lambda matrix: iterate(matrix, n_iter=40)
    ours = NystromAttention(num_landmarks=6, iterations=40, kernel_size=kernel_size)
    layer = SimpleNamespace(is_causal=False, attention_weights=ours.weights(4, 8, None))
    if kernel_size:
        layer.attention_weights.kernels.copy_(theirs.conv.weight)
    else:
        theirs.conv.weight.zero_()
    torch.testing.assert_close(attend(ours, layer, theirs, states), theirs(states)[0], rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("num_global_tokens", [0, 2])
def test_longformer(num_global_tokens):
    """A padded batch; the global projections of theirs are equal to the local ones, as ours are at the start."""
    config = LongformerConfig(hidden_size=32, num_attention_heads=4, attention_window=[8], num_hidden_layers=1)
    torch.manual_seed(0)
    theirs, states = LongformerSelfAttention(config, layer_id=0).eval(), states_of(2, 24)
    for name in ("query", "key", "value"):
        getattr(theirs, f"{name}_global").load_state_dict(getattr(theirs, name).state_dict())
    tokens = torch.arange(24) < torch.tensor([[24], [17]])
    mask = torch.zeros(2, 24).masked_fill(~tokens, -10000.0)
    mask[:, :num_global_tokens] = 10000.0
    expected = theirs(
        states,
        attention_mask=mask,
        is_index_masked=mask < 0,
        is_index_global_attn=mask > 0,
        is_global_attn=num_global_tokens > 0,
    )[0]
    ours = LongformerAttention(window=8, num_global_tokens=num_global_tokens)
    layer = SimpleNamespace(is_causal=False, attention_weights=ours.weights(4, 8, None))
    found = attend(ours, layer, theirs, states, tokens)
    torch.testing.assert_close(found[tokens], expected[tokens], rtol=1e-4, atol=1e-5)
