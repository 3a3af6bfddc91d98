"""The linear layer: oneDNN's product where a CPU generates, else torch's own."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.models.linear import LARGE, Linear, generating

WIDTH = 1024

needs_both = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="torch was built without MKL or without oneDNN",
)


class Products(TorchDispatchMode):
    """Counts oneDNN's products."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += "mkldnn" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def layer(request):
    torch.manual_seed(0)
    return Linear(WIDTH, LARGE // WIDTH, bias=request.param)


def plain(layer, x):
    return nn.functional.linear(x, layer.weight, layer.bias)


@needs_both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (3, 5, WIDTH), (2, 3, 4, WIDTH)], ids=str)
def test_in_generation_it_gives_the_numbers_of_torch(layer, shape, mode):
    x, every_other = torch.randn(shape), torch.randn(*shape, 2)[..., 0]  # the other is not contiguous
    with mode(), generating(), Products() as products:
        for given in (x, every_other):
            torch.testing.assert_close(layer(given), plain(layer, given), rtol=1e-5, atol=1e-5)
    assert products.found == 2


@torch.no_grad()
def test_what_is_no_plain_float32_product_goes_torchs_way(layer):
    x = torch.randn(2, WIDTH)
    with Products() as products:
        layer(x)  # nothing is generated
        with generating():
            with torch.enable_grad():
                layer(x)
            with torch.autocast("cpu", torch.bfloat16):
                assert layer(x).dtype == torch.bfloat16
            with torch.backends.mkldnn.flags(enabled=False):
                layer(x)
            assert layer(x[:0]).shape == (0, layer.out_features)
            Linear(16, 16)(torch.randn(2, 16))
            copy.deepcopy(layer).double()(x.double())
            copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert products.found == 0


def test_its_gradients_are_those_of_torch(layer):
    x = torch.randn(3, WIDTH, requires_grad=True)
    layer(x).square().sum().backward()
    own, weights = x.grad.clone(), layer.weight.grad.clone()
    x.grad = layer.weight.grad = None
    plain(layer, x).square().sum().backward()
    assert torch.equal(own, x.grad)
    assert torch.equal(weights, layer.weight.grad)


@torch.no_grad()
def test_it_is_copied_compiled_and_exported_like_torchs(layer):
    x = torch.randn(2, WIDTH)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    with generating():
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain(layer, x))
        for strict in (False, True):
            exported = torch.export.export(layer, (x,), strict=strict)
            assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)


@needs_both
@pytest.mark.parametrize("beams", [1, 2])
def test_a_model_generates_with_it(beams):
    torch.manual_seed(0)
    config = TfmGPTConfig.of_size("tiny", vocab_size=LARGE // 64, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    model, ids = TfmGPTForCausalLM(config).eval(), torch.tensor([[2, 3, 4]])
    with Products() as products:
        model(ids)
        assert products.found == 0
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, num_beams=beams)
    assert products.found == 2, "the output matrix, at each step"
