"""bitsandbytes, torchao and quanto quantize the same linear layers as in transformers' own classes."""

import pytest
import torch
from every_class import CLASSES, FAMILIES, tiny
from test_called_layers import outputs_of
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    QuantoConfig,
    TorchAoConfig,
    ViTConfig,
    ViTForImageClassification,
)

pytestmark = [pytest.mark.clients, pytest.mark.filterwarnings("ignore")]

LINEAR = [name for name in FAMILIES if name != "convlstm"]
NAMES = [*LINEAR, "bert-masked", "bert-untied", "gpt-untied", "gpt-classifier", "mae-base", "detr-panoptic"]
NONE = "no linear layers"
NEEDS = "needs pip install hf-tfm[clients]"


def linear(model: nn.Module) -> dict[str, nn.Module]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def assert_close(found: PreTrainedModel, model: PreTrainedModel, name: str) -> None:
    """The outputs differ, by less than a share of their norm.

    Detections of Faster R-CNN are in the order of their scores, in which some change places.
    """
    share = 0.5 if name == "faster_rcnn" else 0.1
    found, expected = outputs_of(found.eval(), name), outputs_of(model, name)
    differences = []
    for key, value in expected.items():
        if value.is_floating_point() and key != "mask":
            differences.append(((found[key].float() - value).norm() / value.norm()).item())
    assert 0 < max(differences) < share, differences


def loaded(model: PreTrainedModel, folder, configuration) -> PreTrainedModel:
    model.save_pretrained(folder)
    found, report = type(model).from_pretrained(
        folder, quantization_config=configuration, device_map="cpu", output_loading_info=True
    )
    assert not any(report.values()), report
    return found


# --- bitsandbytes ----------------------------------------------------------------------------------------------------


def own_modules(model: PreTrainedModel) -> set[str]:
    """Names of linear layers except those that transformers always keeps in full precision.

    These are the output layer of a language model, and the layer of the last parameter if that is a weight.
    """
    left = {list(model.named_parameters())[-1][0].removesuffix(".weight")}
    left |= {key.removesuffix(".weight") for key in model.all_tied_weights_keys}
    output = model.get_output_embeddings()
    return {name for name, module in linear(model).items() if module is not output} - left


@pytest.mark.client("bitsandbytes: 8 bit on a CPU", "bitsandbytes", others=NONE)
@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes_8_bit(name, tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=NEEDS)
    model = tiny(name)
    found = loaded(model, tmp_path, BitsAndBytesConfig(load_in_8bit=True))
    quantized = {key for key, module in found.named_modules() if isinstance(module, bitsandbytes.nn.Linear8bitLt)}
    assert quantized == own_modules(model)
    assert_close(found, model, name)


GPT2 = {"vocab_size": 48, "n_layer": 2, "n_head": 2, "n_embd": 16, "bos_token_id": 1, "eos_token_id": 2}
STOCK = {
    "bert-masked": (BertForMaskedLM, BertConfig, {}),
    "gpt": (GPT2LMHeadModel, GPT2Config, GPT2),
    "vit": (ViTForImageClassification, ViTConfig, {}),
}


@pytest.mark.client("bitsandbytes: 8 bit on a CPU", "bitsandbytes", others=NONE)
@pytest.mark.parametrize("name", STOCK)
def test_number_of_layers_equals_the_native_class(name, tmp_path):
    """GPT-2's single matrix of queries, keys and values is three layers here."""
    bitsandbytes = pytest.importorskip("bitsandbytes", reason=NEEDS)
    model_class, config_class, fields = STOCK[name]
    fields = fields or {key: value for key, value in CLASSES[name][1].items() if key != "num_labels"}
    stock = loaded(model_class(config_class(**fields)), tmp_path / "stock", BitsAndBytesConfig(load_in_8bit=True))
    ours = loaded(tiny(name), tmp_path / "ours", BitsAndBytesConfig(load_in_8bit=True))
    kind = bitsandbytes.nn.Linear8bitLt
    counts = [sum(isinstance(module, kind) for module in model.modules()) for model in (ours, stock)]
    assert counts[0] - counts[1] == (2 * 2 if name == "gpt" else 0) and counts[1] >= 8


# --- torchao ---------------------------------------------------------------------------------------------------------


@pytest.mark.client("torchao: int8 weights", "torchao", others=NONE)
@pytest.mark.parametrize("name", NAMES)
def test_torchao(name, tmp_path):
    pytest.importorskip("torchao", reason=NEEDS)
    from torchao.quantization import Int8WeightOnlyConfig
    from torchao.utils import TorchAOBaseTensor

    model = tiny(name)
    found = loaded(model, tmp_path, TorchAoConfig(Int8WeightOnlyConfig()))
    quantized = {key for key, module in linear(found).items() if isinstance(module.weight, TorchAOBaseTensor)}
    assert quantized == own_modules(model)
    assert_close(found, model, name)


# --- quanto ----------------------------------------------------------------------------------------------------------


@pytest.mark.client("quanto: int8 weights, saved and loaded", "optimum-quanto", others=NONE)
@pytest.mark.parametrize("name", NAMES)
def test_quanto(name, tmp_path):
    quanto = pytest.importorskip("optimum.quanto", reason=NEEDS)
    from safetensors.torch import load_file, save_file

    model, other, loaded_again = tiny(name), tiny(name), tiny(name, seed=1)
    quanto.quantize(other, weights=quanto.qint8)
    quanto.freeze(other)
    quantized = {key for key, module in other.named_modules() if isinstance(module, quanto.QLinear)}
    assert quantized == set(linear(model))
    assert_close(other, model, name)
    path = tmp_path / "model.safetensors"
    save_file({key: value.clone() for key, value in other.state_dict().items()}, path)
    quanto.requantize(loaded_again, load_file(path), quanto.quantization_map(other), device=torch.device("cpu"))
    found, expected = outputs_of(loaded_again.eval(), name), outputs_of(other, name)
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value)


@pytest.mark.client("quanto: QuantoConfig", "optimum-quanto", others=NONE)
@pytest.mark.parametrize("name", NAMES)
def test_quanto_by_from_pretrained(name, tmp_path):
    quanto = pytest.importorskip("optimum.quanto", reason=NEEDS)
    model = tiny(name)
    found = loaded(model, tmp_path, QuantoConfig(weights="int8"))
    quantized = {key for key, module in found.named_modules() if isinstance(module, quanto.QLinear)}
    assert quantized == own_modules(model)
    assert_close(found, model, name)
