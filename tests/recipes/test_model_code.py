"""Recipes run remote code of an initial model only if trust_remote_code is true."""

import json

import pytest
from recipe_helpers import ROOT, arguments_of, record
from text_recipes import command_line, run_recipe, write_pairs
from transformers import BertConfig, BertForSequenceClassification
from vision_recipes import classify, write_images

from hf_tfm.data.vocabulary import train_wordpiece

CODE = """open({ran!r}, "w").close()
from transformers import BertConfig, BertForSequenceClassification


class OwnConfig(BertConfig):
    model_type = "own"


class OwnClassifier(BertForSequenceClassification):
    config_class = OwnConfig
"""
SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
# The first starts other recipes; the second trains no model and has the option too.
RECIPES = sorted(
    path for path in (ROOT / "recipes").glob("*.py") if path.stem not in ("distill_cache", "augment_texts")
)


@pytest.fixture
def own(tmp_path):
    """A classifier with remote code; when the code runs, it creates a file RAN next to the folder."""
    folder = tmp_path / "own"
    tokenizer = train_wordpiece(["one hundred and two", "hundert zwei"], 90)
    BertForSequenceClassification(BertConfig(**SIZES, vocab_size=len(tokenizer))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForSequenceClassification": "own.OwnClassifier"}
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own", "auto_map": auto_map}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(CODE.format(ran=str(tmp_path / "RAN")))
    return folder


def test_code_runs_only_with_the_option(own, tmp_path):
    given = command_line(write_pairs(tmp_path / "data"), tmp_path / "run", model_name_or_path=own)
    with pytest.raises(
        ValueError, match=r'model_name_or_path ".*": it brings its own code.* trust_remote_code true'
    ) as error:
        run_recipe(*given)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "RAN").exists() and not (tmp_path / "run").exists()
    assert run_recipe(*given, "--trust_remote_code", "true") == 0
    assert (tmp_path / "RAN").exists() and record(tmp_path / "run").model_type == "own"
    assert "trust_remote_code" not in (tmp_path / "run" / "run.json").read_text()


def test_recipe_for_another_task_runs_no_code(own, tmp_path):
    with pytest.raises(ValueError, match=r'model_name_or_path ".*": it brings its own code.* trust_remote_code true'):
        classify(write_images(tmp_path / "data"), tmp_path / "run", model_name_or_path=own)
    assert not (tmp_path / "RAN").exists() and not (tmp_path / "run").exists()


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_training_recipe_has_the_option(recipe):
    fields = arguments_of(recipe).__dataclass_fields__
    assert fields["trust_remote_code"].default is False
