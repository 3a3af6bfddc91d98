"""Every layer is called as a module: hooks run, and it works while its weights are on another device or on disk.

Where a model reads a weight directly, to save time or memory, it must detect that the layer is not a plain one.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from every_class import CLASSES, inputs_of, tiny
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_tfm.models.cross_entropy import IGNORE_INDEX

VARIANTS = {
    "additive": ("transformer", {"attention_score": "additive", "position_embedding_type": "learned"}),
    "luong": ("rnn_seq2seq", {"attention_score": "concat", "cell": "lstm"}),
    "learned_2d": ("vit", {"position_embedding_type": "learned_2d"}),
    "hybrid": ("vit", {"backbone": "test_resnet", "patch_size": 1, "image_size": 64}),
    "detr-learned": ("detr", {"position_embedding_type": "learned"}),
    "detr-frozen": ("detr", {"backbone": "resnet18", "backbone_norm": "frozen"}),
}
EVERY = pytest.mark.parametrize(
    ("name", "fields"), [*((name, {}) for name in CLASSES), *VARIANTS.values()], ids=[*CLASSES, *VARIANTS]
)
# Not called without labels (the length head), or only the owner of a weight shared with other layers (shared).
NOT_CALLED = {"shared", "model.shared", "length_head.output"}


def own_weights(model: nn.Module) -> dict[str, nn.Module]:
    """Modules with their own parameters, by name."""
    modules = model.named_modules()
    return {name: module for name, module in modules if next(module.parameters(recurse=False), None) is not None}


@torch.no_grad()
def outputs_of(model: PreTrainedModel, name: str) -> dict[str, Tensor]:
    """Every tensor of the output; feature maps are numbered."""
    output = dict(model(**inputs_of(name)).items())
    output |= {f"map {i}": states for i, states in enumerate(output.pop("feature_maps", ()))}
    return {key: value for key, value in output.items() if isinstance(value, Tensor)}


def note(called: set[str], name: str, *_) -> None:
    called.add(name)


def watch(model: nn.Module, called: set[str]) -> set[str]:
    """Record the names of modules with weights as they are called."""
    modules = own_weights(model)
    for name, module in modules.items():
        module.register_forward_hook(partial(note, called, name))
    return set(modules)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and expected
    for key in expected:
        scale = expected[key].abs().max().item()
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=1e-4 * scale + 1e-6)


@EVERY
def test_every_layer_is_called(name, fields):
    model, called = tiny(name, **fields), set()
    expected = outputs_of(model, name)
    names = watch(model, called)
    assert_same(outputs_of(model, name), expected)
    assert names - called <= NOT_CALLED


def language_batch(name: str) -> dict[str, Tensor]:
    inputs = inputs_of(name)
    labels = inputs["input_ids"].clone()
    labels[:, ::3] = IGNORE_INDEX
    if name == "gpt-classifier":
        return {**inputs, "labels": torch.tensor([0, 1]), "language_weight": 0.5}
    inputs.pop("decoder_input_ids", None)
    return {**inputs, "labels": labels, "return_logits": False}


LANGUAGE = [
    *("transformer", "transformer-mask-predict", "rnn_seq2seq"),
    *("bert-masked", "bert-pretraining", "gpt", "gpt-classifier"),
]


@pytest.mark.parametrize("name", LANGUAGE)
def test_every_layer_is_called_for_a_loss_without_logits(name):
    """The gradients are equal, too."""
    model, called, batch = tiny(name), set(), language_batch(name)
    found = []
    for watched in (False, True):
        model.zero_grad()
        torch.manual_seed(0)  # mask-predict masks at random
        names = watch(model, called) if watched else set()
        loss = model(**batch).loss
        loss.backward()
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append(torch.cat([loss.detach()[None], *(grad.flatten() for grad in grads)]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
    assert names - called <= {"shared", "model.shared"}


@pytest.mark.client("accelerate: cpu_offload, disk_offload", "accelerate")
@EVERY
@pytest.mark.parametrize(
    "target", [*(pytest.param(target, marks=pytest.mark.slow) for target in ("cpu", "disk")), "disk-with-buffers"]
)
def test_offloaded_layers(name, fields, target, tmp_path):
    """All weights are on the meta device except while their layer runs."""
    check_offloaded(tiny(name, **fields), name, target, tmp_path)


@pytest.mark.parametrize("name", ["transformer", "vit"])
def test_layers_offloaded_to_the_cpu(name, tmp_path):
    check_offloaded(tiny(name), name, "cpu", tmp_path)


def check_offloaded(model: PreTrainedModel, name: str, target: str, folder: Path) -> None:
    expected = outputs_of(model, name)
    if target == "cpu":
        cpu_offload(model, execution_device="cpu")
    else:
        disk_offload(model, folder, execution_device="cpu", offload_buffers=target == "disk-with-buffers")
    assert all(parameter.is_meta for parameter in model.parameters())
    assert_same(outputs_of(model, name), expected)


@pytest.mark.parametrize("name", LANGUAGE)
def test_offloaded_layers_give_a_loss_without_logits(name, tmp_path):
    model, batch, found = tiny(name), language_batch(name), []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.no_grad():
            found.append(model(**batch).loss)
        if len(found) == 1:
            disk_offload(model, tmp_path, execution_device="cpu")
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["transformer", "transformer-mask-predict", "rnn_seq2seq", "gpt"])
def test_offloaded_models_generate(name, tmp_path):
    model, inputs = tiny(name), inputs_of(name)
    inputs.pop("decoder_input_ids", None)
    expected = model.generate(**inputs, max_new_tokens=6)
    disk_offload(model, tmp_path, execution_device="cpu")
    assert torch.equal(model.generate(**inputs, max_new_tokens=6), expected)


def map_of(model: PreTrainedModel) -> dict[str, str]:
    """The first block on disk, the rest on the CPU."""
    blocks = model._no_split_modules
    devices = {}

    def assign(module: nn.Module, prefix: str) -> None:
        for key, child in module.named_children():
            name = f"{prefix}{key}"
            if type(child).__name__ in blocks or not list(child.children()):
                first = type(child).__name__ in blocks and "disk" not in devices.values()
                devices[name] = "disk" if first else "cpu"
            else:
                assign(child, f"{name}.")
        devices.update({f"{prefix}{key}": "cpu" for key, _ in module.named_parameters(recurse=False)})

    assign(model, "")
    return devices


@pytest.mark.client("accelerate: device map with a block on disk", "accelerate")
@pytest.mark.parametrize("name", ["transformer", "rnn_seq2seq", "bert", "gpt", "vit", "mae", "detr"])
def test_a_block_on_disk(name, tmp_path):
    """`from_pretrained` with a device map."""
    model = tiny(name)
    model.save_pretrained(tmp_path / "model")
    loaded = type(model).from_pretrained(
        tmp_path / "model", device_map=map_of(model), offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in loaded.parameters())
    assert_same(outputs_of(loaded, name), outputs_of(model, name))
