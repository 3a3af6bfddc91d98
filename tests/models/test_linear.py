"""Linear layers use oneDNN products during generation on a CPU, and torch's own otherwise."""

import copy
from threading import Thread

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.models.linear import LARGE, generating, is_plain, project

WIDTH = 1024

needs_both = pytest.mark.skipif(
    not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()),
    reason="torch was built without MKL or without oneDNN",
)


class Products(TorchDispatchMode):
    """Counts oneDNN products."""

    found = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found += "mkldnn" in str(func)
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=[True, False], ids=["bias", "no-bias"])
def layer(request):
    torch.manual_seed(0)
    return nn.Linear(WIDTH, LARGE // WIDTH, bias=request.param)


def plain(layer, x):
    return nn.functional.linear(x, layer.weight, layer.bias)


@needs_both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (3, 5, WIDTH), (2, 3, 4, WIDTH)], ids=str)
def test_generation_gives_the_same_numbers_as_torch(layer, shape, mode):
    x, every_other = torch.randn(shape), torch.randn(*shape, 2)[..., 0]  # the other one is not contiguous
    with mode(), generating(), Products() as products:
        for given in (x, every_other):
            torch.testing.assert_close(project(layer, given), plain(layer, given), rtol=1e-5, atol=1e-5)
    assert products.found == 2


@torch.no_grad()
def test_only_plain_float32_products_use_onednn(layer):
    x = torch.randn(2, WIDTH)
    with Products() as products:
        project(layer, x)  # not during generation
        with generating():
            with torch.enable_grad():
                project(layer, x)
            with torch.autocast("cpu", torch.bfloat16):
                assert project(layer, x).dtype == torch.bfloat16
            with torch.backends.mkldnn.flags(enabled=False):
                project(layer, x)
            assert project(layer, x[:0]).shape == (0, layer.out_features)
            project(nn.Linear(16, 16), torch.randn(2, 16))
            project(copy.deepcopy(layer).double(), x.double())
            project(copy.deepcopy(layer).to("meta"), x.to("meta"))
    assert products.found == 0


def doubled(layer: nn.Linear) -> nn.Module:
    return nn.Sequential(layer, Doubler())


class Doubler(nn.Module):
    def forward(self, x):
        return 2 * x


def hooked(layer: nn.Linear) -> nn.Module:
    layer.register_forward_hook(lambda module, args, output: 2 * output)
    return layer


def replaced(layer: nn.Linear) -> nn.Module:
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)
    return layer


def subclassed(layer: nn.Linear) -> nn.Module:
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Twice
    return layer


def parametrized(layer: nn.Linear) -> nn.Module:
    for name in ("weight", "bias"):
        if getattr(layer, name) is not None:
            nn.utils.parametrize.register_parametrization(layer, name, Doubler())
    return layer


@pytest.mark.parametrize("change", [doubled, hooked, replaced, subclassed, parametrized])
@torch.no_grad()
def test_modified_layers_are_called_as_modules(layer, change):
    """The contributions of adapters, hooks and replaced forwards must not be lost."""
    x = torch.randn(2, WIDTH)
    assert is_plain(layer, nn.Linear)
    expected = 2 * plain(layer, x)
    layer = change(layer)
    with generating(), Products() as products:
        torch.testing.assert_close(project(layer, x), expected, rtol=1e-5, atol=1e-5)
    assert not is_plain(layer, nn.Linear) and products.found == 0


class Product(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return project(self.layer, x)


@torch.no_grad()
def test_it_compiles_and_exports_like_torch(layer):
    x, model = torch.randn(2, WIDTH), Product(layer)
    with generating():
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        assert torch.equal(compiled(x), plain(layer, x))
        for strict in (False, True):
            exported = torch.export.export(model, (x,), strict=strict)
            assert not any("mkldnn" in str(node.target) for node in exported.graph.nodes)


@needs_both
@torch.no_grad()
def test_generation_in_one_thread_does_not_affect_another(layer):
    found, x = [], torch.randn(2, WIDTH)

    def multiply():
        with torch.no_grad(), Products() as products:
            project(layer, x)
        found.append(products.found)

    with generating():
        thread = Thread(target=multiply)
        thread.start()
        thread.join()
        multiply()
    multiply()
    assert found == [0, 1, 0]


@needs_both
@pytest.mark.parametrize("beams", [1, 2])
def test_model_uses_it_in_generation(beams):
    torch.manual_seed(0)
    config = TfmGPTConfig.of_size("tiny", vocab_size=LARGE // 64, pad_token_id=0, bos_token_id=1, eos_token_id=1)
    model, ids = TfmGPTForCausalLM(config).eval(), torch.tensor([[2, 3, 4]])
    with Products() as products:
        model(ids)
        assert products.found == 0
        model.generate(ids, max_new_tokens=2, min_new_tokens=2, num_beams=beams)
    assert products.found == 2, "the output matrix, at each step"
