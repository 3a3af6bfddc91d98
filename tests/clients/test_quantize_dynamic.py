"""torch.ao's `quantize_dynamic` replaces exact instances of `nn.Linear`, and must find every linear layer."""

import pytest
import torch
from every_class import CLASSES, inputs_of, tiny
from torch import Tensor, nn
from torch.ao.nn.quantized.dynamic import Linear as QuantizedLinear
from torch.ao.quantization import quantize_dynamic

# With linear layers in their blocks.
TRANSFORMERS = [name for name in CLASSES if not name.startswith(("faster_rcnn", "convlstm"))]


def count(model: nn.Module, kind: type) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.client("torch.ao: quantize_dynamic", "torch")
@pytest.mark.parametrize("name", TRANSFORMERS)
@torch.no_grad()
def test_every_linear_layer_is_quantized(name):
    model = tiny(name)
    linear = count(model, nn.Linear)
    quantized = quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert count(quantized, QuantizedLinear) == linear >= 7, "six of a block, and a head or another block"
    assert not count(quantized, nn.Linear)
    output, expected = quantized(**inputs_of(name)), model(**inputs_of(name))
    for key, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            difference = (output[key] - value).norm() / value.norm()
            assert difference < 0.1, (key, difference)


@pytest.mark.parametrize(
    ("name", "linear"),
    # As many as in transformers' own classes of these sizes; its GPT-2 has a Conv1D for queries, keys and values.
    [("bert-masked", 2 * 6 + 2), ("gpt", 2 * 6 + 1), ("vit", 2 * 6 + 1), ("transformer", 6 + 2 * 10 + 1)],
)
def test_number_of_linear_layers(name, linear):
    assert sum(type(module) is nn.Linear for module in tiny(name).modules()) == linear


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_linear_inputs_have_at_most_three_dimensions(name):
    """bitsandbytes' layers refuse more."""
    model, dimensions = tiny(name), set()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: dimensions.add(inputs[0].ndim))
    model(**inputs_of(name))
    assert dimensions and max(dimensions) <= 3
