"""The table of model families: values derived from it, and families of other packages."""

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import every_class
import pytest
import torch
import transformers

import hf_tfm
from hf_tfm import families, plugins
from hf_tfm.conversion import conversions
from hf_tfm.families import FAMILIES, Family, family_of, register_family


def test_stub_lists_the_exports_of_the_package():
    assert (Path(hf_tfm.__file__).parent / "__init__.pyi").read_text() == families.stub()
    assert all(hasattr(hf_tfm, name) for name in hf_tfm.__all__)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_auto_classes_support_every_family(family):
    assert family_of(family.name) is family
    for auto_class, kind in family.classes().items():
        auto = getattr(transformers, auto_class)
        if auto is not transformers.AutoConfig:
            assert auto._model_mapping[family.config] is kind
    assert transformers.AutoConfig.for_model(family.config.model_type).__class__ is family.config


def test_every_conversion_starts_from_a_class_of_its_family():
    kinds = {kind for family in FAMILIES for kind in family.classes().values()}
    assert {conversion.ours for conversion in conversions()} <= kinds


def test_common_tests_have_a_tiny_model_of_every_family():
    """A new family needs only one entry of fields."""
    assert {*every_class.FIELDS} == {family.name for family in FAMILIES}
    classes = {path.rpartition(".")[2] for family in FAMILIES for path in family.auto_classes.values()}
    assert classes - {family.config.__name__ for family in FAMILIES} == {
        kind for kind, _ in every_class.CLASSES.values()
    }
    assert {*every_class.FAMILIES} <= every_class.CLASSES.keys()


def test_duplicate_family_name_or_type_is_refused():
    register_family(FAMILIES[0])
    for changed in (replace(FAMILIES[0], name="other"), replace(FAMILIES[0], config=FAMILIES[1].config)):
        with pytest.raises(ValueError, match="already"):
            register_family(changed)
    with pytest.raises(ValueError, match='no model family "swan"; available: transformer, vit'):
        family_of("swan")


PLUGIN = """
from hf_tfm import TfmViTConfig, TfmViTForImageClassification, TfmViTModel
from hf_tfm.families import Family


class ToyConfig(TfmViTConfig):
    model_type = "toy"
    auto_classes = {"AutoConfig": "toy_family.ToyConfig", "AutoModel": "toy_family.ToyModel"}


class ToyModel(TfmViTModel):
    config_class = ToyConfig


TOY = Family("toy", ToyConfig)
"""


def test_entry_points_add_families(tmp_path, monkeypatch, capsys):
    (tmp_path / "toy_family.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    points = [EntryPoint("toy", "toy_family:TOY", plugins.FAMILIES), EntryPoint("gone", "no_such:F", "x")]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == plugins.FAMILIES else [])
    monkeypatch.setattr(families, "FAMILIES", list(FAMILIES))
    hf_tfm.register()
    assert "the plug-in gone (no_such:F) cannot be loaded: No module named 'no_such'" in capsys.readouterr().err
    toy = family_of("toy")
    assert isinstance(toy, Family)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = transformers.AutoConfig.for_model("toy", **sizes, image_size=8, patch_size=4)
    model = transformers.AutoModel.from_config(config)
    assert type(model) is toy.classes()["AutoModel"]
    assert not hasattr(hf_tfm, "ToyModel") and "toy_family" in sys.modules


@pytest.mark.parametrize("name", every_class.CLASSES)
def test_every_model_says_what_reads_its_input(name):
    """Quantization libraries and PEFT ask for it."""
    assert isinstance(every_class.tiny(name).get_input_embeddings(), torch.nn.Module)
