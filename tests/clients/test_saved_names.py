"""`save_pretrained` writes the names of the modules, so any program can load the file."""

import copy
import re

import accelerate
import pytest
import safetensors.torch
import torch
from every_class import CLASSES, FAMILIES, class_of, inputs_of, outputs_of, tiny
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DetrConfig,
    DetrForObjectDetection,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.conversion_mapping import get_model_conversion_mapping

import hf_tfm

# The first class of every family, tied and untied weights, and a model in a model; the other classes are slow.
KEPT = (*FAMILIES, "bert-pretraining", "gpt-untied", "vit-backbone", "detr-panoptic")
EVERY = pytest.mark.parametrize(
    "name", [name if name in KEPT else pytest.param(name, marks=pytest.mark.slow) for name in CLASSES]
)


def assert_same(found: nn.Module, expected: nn.Module, loader: str = "") -> None:
    """Bit-equal weights under equal names."""
    found, expected = found.state_dict(), expected.state_dict()
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])], loader


def reinitialized(model: nn.Module) -> nn.Module:
    """A model of the same class and configuration with other weights."""
    torch.manual_seed(99)
    return type(model)(copy.deepcopy(model.config))


def load_strict(model, folder):
    model.load_state_dict(safetensors.torch.load_file(folder / "model.safetensors"), strict=True)


def load_assigned(model, folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    model.load_state_dict(weights, strict=True, assign=True)
    with torch.no_grad():  # tied weights stay tied
        for target, source in model.all_tied_weights_keys.items():
            assert model.get_parameter(target) is model.get_parameter(source)


LOADERS = {
    "load_state_dict": load_strict,
    "load_state_dict(assign=True)": load_assigned,
    "safetensors.load_model": lambda model, folder: safetensors.torch.load_model(model, folder / "model.safetensors"),
    "accelerate.load_checkpoint_in_model": lambda model, folder: accelerate.load_checkpoint_in_model(model, folder),
}


@pytest.mark.client("safetensors: files read by module names", "safetensors")
@pytest.mark.client("accelerate: load_checkpoint_in_model, load_checkpoint_and_dispatch", "accelerate")
@EVERY
def test_every_program_loads_a_saved_file(name, tmp_path):
    model = tiny(name)
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert weights.keys() == model.state_dict().keys() - model.all_tied_weights_keys.keys()
    for loader, load in LOADERS.items():
        other = reinitialized(model)
        load(other, tmp_path)
        assert_same(other, model, loader)
    with accelerate.init_empty_weights():
        empty = reinitialized(model)
    empty.tie_weights()
    assert_same(accelerate.load_checkpoint_and_dispatch(empty, tmp_path, device_map={"": "cpu"}), model)
    other, report = class_of(name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(other, model)


@EVERY
def test_renaming_does_not_affect_own_names(name):
    model = tiny(name)
    for key in model.state_dict():
        for prefix in ("", "model.", "extra.0."):
            for transform in get_model_conversion_mapping(model):
                assert transform.rename_source_key(prefix + key) == (prefix + key, None)


@pytest.mark.parametrize("name", ["bert", "gpt", "vit", "mae", "detr"])
def test_missing_weight_is_still_reported(name, tmp_path):
    """Copying a tied weight must not hide that the weight itself is missing."""
    model = tiny(name)
    model.save_pretrained(tmp_path)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    for key in list(weights)[:3]:
        rest = {other: weight for other, weight in weights.items() if other != key}
        with pytest.raises(RuntimeError, match=re.escape(key)):
            reinitialized(model).load_state_dict(rest)
    with pytest.raises(RuntimeError, match="unheard"):
        reinitialized(model).load_state_dict({**weights, "unheard.of": torch.zeros(1)})


@pytest.mark.parametrize("name", ["bert", "gpt", "vit", "mae", "detr", "transformer"])
def test_shards_and_given_state_dicts_use_own_names(name, tmp_path):
    model = tiny(name)
    size = sum(weight.nbytes for weight in model.state_dict().values())
    model.save_pretrained(tmp_path / "shards", max_shard_size=size // 3)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    other = reinitialized(model)
    accelerate.load_checkpoint_in_model(other, tmp_path / "shards")
    assert_same(other, model)
    assert_same(class_of(name).from_pretrained(tmp_path / "shards"), model)
    reinitialized(model).save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    other = reinitialized(model)
    load_strict(other, tmp_path / "given")
    assert_same(other, model)


class WithBranches(hf_tfm.TfmGPTForCausalLM):
    """A user's class with modules named like parts of GPT-2."""

    def __init__(self, config):
        super().__init__(config)
        self.branch = nn.ModuleList([nn.Linear(4, 4)])
        self.ln_1 = nn.LayerNorm(4)
        self.post_init()


class WithParts(hf_tfm.TfmBertForSequenceClassification):
    """A user's class with modules named like parts of BERT."""

    def __init__(self, config):
        super().__init__(config)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(4, 4)})
        self.post_init()


@pytest.mark.parametrize(("model_class", "name"), [(WithBranches, "gpt"), (WithParts, "bert")])
def test_subclasses_save_and_load_their_own_modules(model_class, name, tmp_path):
    torch.manual_seed(0)
    model = model_class(class_of(name).config_class(**CLASSES[name][1]))
    model.save_pretrained(tmp_path)
    other, report = model_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert_same(other, model)
    other = reinitialized(model)
    load_strict(other, tmp_path)
    assert_same(other, model)


TEXT = {"vocab_size": 48, "max_position_embeddings": 24, "hidden_size": 16, "num_attention_heads": 2}
STOCK = {
    "bert": (BertForSequenceClassification, BertConfig, {**TEXT, "num_hidden_layers": 2, "intermediate_size": 32}),
    "gpt": (
        GPT2LMHeadModel,
        GPT2Config,
        {"vocab_size": 48, "n_positions": 24, "n_embd": 16, "n_layer": 2, "n_head": 2},
    ),
    "vit": (ViTForImageClassification, ViTConfig, CLASSES["vit"][1]),
    "detr": (DetrForObjectDetection, DetrConfig, {**CLASSES["detr"][1], "use_timm_backbone": True}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STOCK)
def test_model_loaded_from_a_native_file_is_saved_under_own_names(name, tmp_path):
    stock_class, config_class, fields = STOCK[name]
    torch.manual_seed(0)
    stock_class(config_class(**fields)).save_pretrained(tmp_path / "native")
    names = safetensors.torch.load_file(tmp_path / "native" / "model.safetensors").keys()
    if name == "bert":  # the original BERT release uses these parameter names for norms; saving must not restore them
        weights = safetensors.torch.load_file(tmp_path / "native" / "model.safetensors")
        weights = {key.replace("LayerNorm.weight", "LayerNorm.gamma"): value for key, value in weights.items()}
        safetensors.torch.save_file(weights, tmp_path / "native" / "model.safetensors", {"format": "pt"})
    model, report = class_of(name).from_pretrained(tmp_path / "native", output_loading_info=True)
    assert not any(report.values()), report
    model.save_pretrained(tmp_path / "own")
    other = reinitialized(model)
    load_strict(other, tmp_path / "own")
    assert_same(other, model)
    model.save_pretrained(tmp_path / "again", save_original_format=True)
    assert safetensors.torch.load_file(tmp_path / "again" / "model.safetensors").keys() == names


# (class saved, class that loads, full names of weights that may be newly initialized)
ACROSS = (
    ("bert-base", "bert", r"classifier\..*"),
    ("bert", "bert-base", ""),
    ("bert-masked", "bert", r"classifier\..*|bert\.pooler\..*"),
    ("bert-pretraining", "bert", r"classifier\..*"),
    ("bert", "bert-tagger", r""),
    ("bert-base", "bert-masked", r"lm_head\..*"),
    ("gpt-base", "gpt", ""),
    ("gpt", "gpt-base", ""),
    ("gpt", "gpt-classifier", r"score\..*"),
    ("vit-base", "vit", r"classifier\..*"),
    ("vit", "vit-base", r"pooler\..*"),
    ("vit", "vit-backbone", ""),
    ("mae", "vit", r"classifier\..*"),
    ("mae", "mae-base", ""),
    ("transformer", "transformer-base", ""),
    ("transformer-base", "transformer", ""),
    ("detr", "detr-base", ""),
    ("detr-base", "detr", r"class_labels_classifier\..*|bbox_predictor\..*"),
    ("detr-panoptic", "detr", ""),
    ("detr-panoptic", "detr-base", ""),
    ("detr", "detr-panoptic", r"mask_head\..*|bbox_attention\..*"),
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("saved", "loaded", "new"), ACROSS, ids=lambda value: value or "-")
def test_weights_are_exchanged_between_the_classes_of_a_family(saved, loaded, new, tmp_path):
    model = tiny(saved)
    model.save_pretrained(tmp_path)
    _, report = class_of(loaded).from_pretrained(tmp_path, output_loading_info=True)
    missing = [key for key in report["missing_keys"] if not re.fullmatch(new, key)]
    assert not missing and not report["mismatched_keys"], report
    assert bool(report["missing_keys"]) == bool(new)


def test_offloaded_models_are_saved_under_own_names(tmp_path):
    model = tiny("vit")
    model.save_pretrained(tmp_path / "first")
    device_map = {"vit": "cpu", "classifier": "disk"}
    moved = class_of("vit").from_pretrained(
        tmp_path / "first", device_map=device_map, offload_folder=tmp_path / "offload"
    )
    moved.save_pretrained(tmp_path / "second")
    other = reinitialized(model)
    load_strict(other, tmp_path / "second")
    assert_same(other, model)


def test_merged_adapters_are_saved_under_own_names(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    for name, target in (("gpt", ["q_proj"]), ("bert", ["q_proj", "up_proj"])):
        adapted = peft.get_peft_model(tiny(name), peft.LoraConfig(target_modules=target, init_lora_weights=False))
        merged = adapted.merge_and_unload()
        merged.save_pretrained(tmp_path / name)
        other = reinitialized(merged)
        load_strict(other, tmp_path / name)
        assert_same(other, merged)
        expected = outputs_of(merged, name)
        found = outputs_of(class_of(name).from_pretrained(tmp_path / name), name)
        assert all(torch.equal(found[key], expected[key]) for key in expected) and inputs_of(name)
