"""The linear layer: torch's numbers by oneDNN where nothing but a plain product is asked for, else torch's own way."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from hf_tfm.models.linear import LARGE, Linear

WIDTH = 1024


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def layer(request):
    torch.manual_seed(0)
    return Linear(WIDTH, LARGE // WIDTH, bias=request.param)


def plain(layer, x):
    return nn.functional.linear(x, layer.weight, layer.bias)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (3, 5, WIDTH), (2, 3, 4, WIDTH)], ids=str)
def test_without_gradients_it_gives_the_numbers_of_torch(layer, shape):
    x = torch.randn(shape)
    with torch.no_grad():
        assert layer.suits_onednn(x)
        torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-5, atol=1e-5)
        every_other = torch.randn(*shape, 2)[..., 0]  # not contiguous
        torch.testing.assert_close(layer(every_other), plain(layer, every_other), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_is_no_plain_float32_product_goes_torchs_way(layer):
    x = torch.randn(2, WIDTH)
    with torch.enable_grad():
        assert not layer.suits_onednn(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not layer.suits_onednn(x)
        assert layer(x).dtype == torch.bfloat16
    with torch.backends.mkldnn.flags(enabled=False):
        assert not layer.suits_onednn(x)
    assert layer(x[:0]).shape == (0, layer.out_features)
    assert not layer.suits_onednn(x[:0])
    assert not layer.suits_onednn(x.double())
    assert not layer.suits_onednn(x.to("meta"))
    small = Linear(16, 16)
    assert not small.suits_onednn(torch.randn(2, 16))


@torch.no_grad()
def test_its_operations_are_counted(layer):
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, WIDTH))
    assert counter.get_total_flops() == 2 * 3 * layer.weight.numel()


def test_its_gradients_are_those_of_torch(layer):
    x = torch.randn(3, WIDTH, requires_grad=True)
    layer(x).square().sum().backward()
    own, weights = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = None
    plain(layer, x).square().sum().backward()
    assert torch.equal(own, x.grad)
    assert torch.equal(weights, layer.weight.grad)


def test_a_compiled_layer_and_an_exported_one_hold_no_foreign_operation(layer):
    with torch.no_grad():
        exported = torch.export.export(layer, (torch.randn(2, WIDTH),))
    assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)
