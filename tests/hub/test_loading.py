"""Damaged or nonsensical model files give a one-line error with argument and cause, before memory is allocated."""

import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    BertTokenizer,
    ViTConfig,
    ViTForImageClassification,
    modeling_utils,
)

import hf_tfm
from hf_tfm import memory
from hf_tfm.conversion import convert
from hf_tfm.hub.loading import LoadingError, check_vocabulary, load_config, load_model, load_tokenizer

SIZES = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.fixture
def vit(tmp_path):
    """The folder of a tiny classifier."""
    torch.manual_seed(0)
    folder = tmp_path / "vit"
    ViTForImageClassification(ViTConfig(**SIZES, image_size=16, patch_size=8)).save_pretrained(folder)
    return folder


def change_config(folder, **fields) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def change_weights(folder, **weights) -> None:
    """Replace weights in a file; None removes one."""
    path = folder / "model.safetensors"
    found = load_file(path) | {name.replace("__", "."): value for name, value in weights.items()}
    save_file({name: value for name, value in found.items() if value is not None}, path, {"format": "pt"})


def refusal(folder) -> str:
    with pytest.raises(LoadingError) as refused:
        load_model(AutoModelForImageClassification, str(folder), "teacher")
    message = str(refused.value)
    assert "\n" not in message and message.startswith(f'teacher "{folder}": ')
    return message


def converted(folder, tmp_path) -> str:
    with pytest.raises(ValueError) as refused:
        convert(folder, "tfm", tmp_path / "converted")
    message = str(refused.value)
    assert "\n" not in message and "converting-" not in message
    assert not (tmp_path / "converted").exists()
    return message


def test_intact_model_loads(vit):
    model = load_model(AutoModelForImageClassification, str(vit))
    assert not model.training and model.dtype == torch.float32


def test_loading_logs_no_warning(tmp_path):
    """Among others, transformers would list the layers that a plan of tensor parallelism leaves out."""
    config = hf_tfm.TfmViTConfig(**SIZES, image_size=16, patch_size=8)
    hf_tfm.TfmViTForImageClassification(config).save_pretrained(tmp_path)
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    root = logging.getLogger("transformers")
    root.addHandler(handler)
    try:
        load_model(AutoModelForImageClassification, str(tmp_path))
    finally:
        root.removeHandler(handler)
    assert not [record.getMessage() for record in records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a valid safetensors file"),
        (pickle.dumps({"a": 1}), "not a valid safetensors file"),
        ((10**9).to_bytes(8, "little") + b"{}", "not a valid safetensors file"),
        ((2).to_bytes(8, "little") + b"[]", "not a valid safetensors file"),
    ],
    ids=["empty", "pickle", "huge_header", "list"],
)
def test_damaged_weights_are_reported(vit, content, expected, tmp_path):
    (vit / "model.safetensors").write_bytes(content)
    for message in (refusal(vit), converted(vit, tmp_path)):
        assert expected in message and "model.safetensors" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "must be a mapping, got list"),
        (b"\xff\xfe", "is not a valid JSON file"),
        (b"{", "is not a valid JSON file"),
        (b"[" * 100_000, "is not a valid JSON file"),
    ],
)
def test_damaged_configuration_is_reported(vit, content, expected, tmp_path):
    (vit / "config.json").write_bytes(content)
    for message in (refusal(vit), converted(vit, tmp_path)):
        assert expected in message and "config.json" in message


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_labels": 10**9}, "num_labels of its config.json must be at most 1,000,000, got 1,000,000,000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers of its config.json must be at most 10,000"),
        ({"hidden_size": 10**6, "intermediate_size": 10**6}, "according to its config.json, its weights take"),
        ({"_attn_implementation": "user/kernel"}, 'refers to code of "user/kernel", which is not run'),
    ],
)
def test_configuration_larger_than_memory_is_refused_at_once(vit, fields, expected, monkeypatch):
    monkeypatch.setattr(memory, "usable_memory", lambda: 10**9)
    change_config(vit, **fields)
    assert expected in refusal(vit)


def test_mismatched_weights_are_reported(vit, tmp_path):
    change_config(vit, intermediate_size=16)
    for message in (refusal(vit), converted(vit, tmp_path)):
        assert "intermediate.dense.bias" in message or "mlp.fc1.bias" in message
        assert "(8,)" in message and "(16,)" in message


def test_missing_and_nonfinite_weights_are_reported(vit):
    change_weights(vit, classifier__bias=torch.full((2,), torch.nan))
    assert "its weight classifier.bias holds values that are not finite" in refusal(vit)
    change_weights(vit, classifier__bias=None, classifier__weight=None)
    assert "it has no weights for classifier.bias, classifier.weight: they would be random" in refusal(vit)
    assert load_model(AutoModelForImageClassification, str(vit), may_lack=lambda name: "classifier" in name)


def test_index_may_refer_only_to_files_in_the_folder(vit):
    index = vit / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    assert "names '../model.safetensors', which is not a file of the folder" in refusal(vit)
    index.write_text("{}")
    assert "has no weight_map" in refusal(vit)


class Evil:
    def __reduce__(self):
        return print, ("ran",)


def test_pickled_code_never_runs(vit, tmp_path, capsys):
    (vit / "model.safetensors").unlink()
    torch.save({"a": Evil()}, vit / "pytorch_model.bin")
    for message in (refusal(vit), converted(vit, tmp_path)):
        assert "pickled" in message and "weights_only" not in message
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize("content", [[1, 2], "text", {"model": [torch.zeros(1)]}, {"model": {"a": 1}}])
def test_file_without_weights_is_refused(content, tmp_path):
    torch.save(content, tmp_path / "authors.pth")
    assert "authors.pth must hold" in converted(tmp_path / "authors.pth", tmp_path)


def test_tokenizer_of_another_model_is_refused(tmp_path):
    with pytest.raises(LoadingError, match='tokenizer "'):
        load_tokenizer(str(tmp_path), "tokenizer")
    words = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "two"])}
    with pytest.raises(LoadingError, match=r"its tokenizer has 6 tokens, but the model only 5 embeddings"):
        check_vocabulary("m", ViTConfig(vocab_size=5), BertTokenizer(words))


def test_folder_without_a_configuration_is_refused(tmp_path):
    with pytest.raises(LoadingError, match=r'model_name_or_path ".*config\.json'):
        load_config(str(tmp_path), "model_name_or_path")


def test_load_report_of_transformers_is_suppressed(tmp_path, monkeypatch):
    """An encoder loaded from a classifier's folder: our loader has checked the weights itself."""
    config = hf_tfm.TfmBertConfig.of_size("tiny", vocab_size=64)
    hf_tfm.TfmBertForSequenceClassification(config).save_pretrained(tmp_path)
    seen = []
    monkeypatch.setattr(modeling_utils.logger, "handle", lambda record: seen.append(record.getMessage()))
    load_model(AutoModel, str(tmp_path), may_lack=lambda name: "pooler" in name)
    assert not any("LOAD REPORT" in text for text in seen)
    hf_tfm.TfmBertModel.from_pretrained(tmp_path)
    assert any("LOAD REPORT" in text for text in seen), "elsewhere it is printed"
