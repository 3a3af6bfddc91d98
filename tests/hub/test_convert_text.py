"""BERT and GPT convert to transformers' classes and to the names of TinyBERT's authors, and back."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from convert_helpers import config_of
from hub_helpers import run_python
from safetensors.torch import load_file, save_file
from test_convert import assert_same_weights
from text_helpers import BY_NAME, SHAPE, WORDS, assert_same_outputs, ours, outputs_of, theirs, tokenizer
from transformers import AutoTokenizer, BertModel, GPT2LMHeadModel, pipeline

import hf_tfm
from hf_tfm import TfmBertForPreTraining, TfmBertForSequenceClassification, TfmBertForTokenClassification
from hf_tfm.conversion import convert

EVERY = pytest.mark.parametrize("name", BY_NAME)
# Native fields without effect here.
DISTILBERT_ONLY = ("seq_classif_dropout", "qa_dropout", "sinusoidal_pos_embds", "classifier_dropout")
GPT2_ONLY = ("reorder_and_upcast_attn", "summary_")


# A class of each library is converted in bfloat16, too; the others are slow.
HALF = ("bert-TfmBertForPreTraining", "distilbert-TfmBertForMaskedLM", "gpt2-TfmGPTForCausalLM")
DTYPES = [
    pytest.param(name, dtype, marks=pytest.mark.slow if dtype is torch.bfloat16 and name not in HALF else ())
    for dtype in (torch.float32, torch.bfloat16)
    for name in BY_NAME
]


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_ours_to_native_and_back(tmp_path, name, dtype):
    conversion = BY_NAME[name]
    model = ours(conversion, hidden_dropout_prob=0.3, activation_dropout=0.2).to(dtype)
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", conversion.name, tmp_path / "theirs")
    there, report = conversion.theirs.from_pretrained(
        tmp_path / "theirs", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {weight.dtype for weight in load_file(tmp_path / "theirs" / "model.safetensors").values()} == {dtype}
    assert config_of(tmp_path / "theirs")["architectures"] == [conversion.theirs.__name__]
    assert "auto_map" not in config_of(tmp_path / "theirs") and not list((tmp_path / "theirs").glob("*.py"))
    expected = outputs_of(model.float())
    assert_same_outputs(outputs_of(there), expected)
    assert certificate["differences"].keys() == expected.keys()
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    assert certificate["inputs"]["lengths"] == [1, 7, 19, 32]
    assert certificate.get("greedy_tokens_equal") is (True if name == "gpt2-TfmGPTForCausalLM" else None)

    convert(tmp_path / "theirs", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    before, after = config_of(tmp_path / "ours"), config_of(tmp_path / "back")
    added = [field for field in after.keys() - before.keys() if field.startswith((*DISTILBERT_ONLY, *GPT2_ONLY))]
    for field in {*added, "classifier_dropout"}:  # None here and the resolved number there are equivalent
        after.pop(field, None), before.pop(field, None)
    assert before == after


# Two heads of each library; test_ours_to_native_and_back converts the others in both directions.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in HALF or name.endswith("SequenceClassification") else pytest.mark.slow)
        for name in BY_NAME
    ],
)
def test_native_to_ours_and_back(tmp_path, name):
    conversion = BY_NAME[name]
    fields = {"gpt2": {"n_inner": 40, "layer_norm_epsilon": 1e-3}, "distilbert": {"activation": "relu"}}
    model = theirs(conversion, **fields.get(conversion.name, {"hidden_act": "relu"}))
    model.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", "tfm", tmp_path / "ours")
    converted, report = conversion.ours.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_outputs(outputs_of(converted), outputs_of(model))
    assert converted.config.id2label == model.config.id2label
    convert(tmp_path / "ours", conversion.name, tmp_path / "back")
    assert_same_weights(tmp_path / "theirs", tmp_path / "back")
    before, after = config_of(tmp_path / "theirs"), config_of(tmp_path / "back")
    for field in ("activation_dropout", "pooler", "classifier_dropout", "training_logits"):  # without effect there
        after.pop(field, None), before.pop(field, None)
    assert before == after


@pytest.mark.parametrize("name", [name for name in BY_NAME if name.startswith("distilbert")])
def test_table_covers_every_weight(name):
    conversion = BY_NAME[name]
    model = ours(conversion)
    table = conversion.names(model.config)
    assert table.keys() == model.state_dict().keys()
    assert set(table.values()) == theirs(conversion).state_dict().keys() and len(set(table.values())) == len(table)


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("bert-TfmBertForMaskedLM", {"position_embedding_type": "floater", "floater_scope": "input"}),
        ("distilbert-TfmBertForMaskedLM", {"position_embedding_type": "sinusoidal"}),
    ],
)
def test_positions_that_are_added_to_embeddings_become_a_table(tmp_path, name, fields):
    model = ours(BY_NAME[name], **fields)
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", BY_NAME[name].name, tmp_path / "stock")
    assert certificate["max_abs_difference"] < 1e-5
    convert(tmp_path / "stock", "tfm", tmp_path / "back")
    back = type(model).from_pretrained(tmp_path / "back")
    assert back.config.position_embedding_type == "learned"
    assert_same_outputs(outputs_of(model), outputs_of(back))


def test_without_pooler_or_with_untied_embeddings(tmp_path):
    conversion = BY_NAME["bert-TfmBertModel"]
    model = BertModel(theirs(conversion).config, add_pooling_layer=False)
    model.save_pretrained(tmp_path / "bert")
    convert(tmp_path / "bert", "tfm", tmp_path / "ours")
    assert config_of(tmp_path / "ours")["pooler"] == "none"
    convert(tmp_path / "ours", "bert", tmp_path / "back")
    assert_same_weights(tmp_path / "bert", tmp_path / "back")
    ours(BY_NAME["gpt2-TfmGPTForCausalLM"], tie_word_embeddings=False).save_pretrained(tmp_path / "untied")
    assert convert(tmp_path / "untied", "gpt2", tmp_path / "gpt2")["greedy_tokens_equal"]
    assert "lm_head.weight" in load_file(tmp_path / "gpt2" / "model.safetensors")


def test_classifier_without_padding_token(tmp_path):
    """GPT-2 then reads the last token regardless of the mask, and accepts one text at a time."""
    conversion = BY_NAME["gpt2-TfmGPTForSequenceClassification"]
    ours(conversion, pad_token_id=None).save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", "gpt2", tmp_path / "gpt2")["inputs"]["lengths"] == [32]


def test_files_of_the_original_bert_release(tmp_path):
    """A pickle whose config names one of two heads, norms with gamma and beta, a buffer, and only vocab.txt."""
    model = theirs(BY_NAME["bert-TfmBertForPreTraining"])
    model.save_pretrained(tmp_path / "new")
    weights = load_file(tmp_path / "new" / "model.safetensors")
    renamed = {re.sub(r"LayerNorm\.weight$", "LayerNorm.gamma", name): w for name, w in weights.items()}
    renamed = {re.sub(r"LayerNorm\.bias$", "LayerNorm.beta", name): w for name, w in renamed.items()}
    assert sum(name.endswith(("gamma", "beta")) for name in renamed) == 2 * 6
    renamed["bert.embeddings.position_ids"] = torch.arange(40)[None]
    renamed["cls.predictions.decoder.weight"] = renamed["bert.embeddings.word_embeddings.weight"]
    (tmp_path / "old").mkdir()
    torch.save(renamed, tmp_path / "old" / "pytorch_model.bin")
    config = config_of(tmp_path / "new") | {"architectures": ["BertForMaskedLM"]}
    (tmp_path / "old" / "config.json").write_text(json.dumps(config))
    (tmp_path / "old" / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    certificate = convert(tmp_path / "old", "tfm", tmp_path / "ours")
    assert certificate["target"]["class"] == "TfmBertForPreTraining"
    assert list(certificate["source"]["weights"]) == ["pytorch_model.bin"]
    assert_same_outputs(outputs_of(TfmBertForPreTraining.from_pretrained(tmp_path / "ours")), outputs_of(model))
    words = AutoTokenizer.from_pretrained(tmp_path / "ours").tokenize("The one baed")
    assert words == ["the", "one", "[UNK]"]
    # Except for the norm names, our classes read such files directly.
    weights["bert.embeddings.position_ids"] = renamed["bert.embeddings.position_ids"]
    save_file(weights, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    direct, report = TfmBertForPreTraining.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert_same_outputs(outputs_of(direct), outputs_of(model))


def test_unused_weights_of_older_files_are_ignored(tmp_path):
    conversion = BY_NAME["bert-TfmBertForTokenClassification"]
    model = theirs(conversion)
    model.save_pretrained(tmp_path / "bert")
    path = tmp_path / "bert" / "model.safetensors"
    extra = {"bert.pooler.dense.weight": torch.ones(32, 32), "bert.pooler.dense.bias": torch.ones(32)}
    save_file({**load_file(path), **extra}, path, {"format": "pt"})
    convert(tmp_path / "bert", "tfm", tmp_path / "ours")
    assert_same_outputs(
        outputs_of(TfmBertForTokenClassification.from_pretrained(tmp_path / "ours")), outputs_of(model)
    )


def test_files_of_the_original_gpt2_release(tmp_path):
    """The decoder's names without the head's prefix, and with causal mask buffers."""
    conversion = BY_NAME["gpt2-TfmGPTForCausalLM"]
    model = theirs(conversion)
    model.transformer.save_pretrained(tmp_path / "gpt2")
    path = tmp_path / "gpt2" / "model.safetensors"
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 40, 40).tril() for i in range(2)}
    save_file({**load_file(path), **masks}, path, {"format": "pt"})
    config = config_of(tmp_path / "gpt2") | {"architectures": ["GPT2LMHeadModel"]}
    (tmp_path / "gpt2" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "gpt2", "tfm", tmp_path / "ours")
    converted = hf_tfm.TfmGPTForCausalLM.from_pretrained(tmp_path / "ours")
    assert_same_outputs(outputs_of(converted), outputs_of(GPT2LMHeadModel.from_pretrained(tmp_path / "gpt2")))
    direct, report = hf_tfm.TfmGPTForCausalLM.from_pretrained(tmp_path / "gpt2", output_loading_info=True)
    assert not report["unexpected_keys"] and not report["missing_keys"]
    assert_same_outputs(outputs_of(direct), outputs_of(converted))


def authors_folder(folder: Path, labels: int | None, fit_size: int = 48):
    """A student as saved by the TinyBERT authors' program, and its classifier's logits, written out by hand."""
    torch.manual_seed(3)
    name = "TfmBertForSequenceClassification" if labels else "TfmBertForPreTraining"
    kind = BY_NAME[f"bert-{name}"]
    fields = {"num_labels": labels, "id2label": None, "label2id": None} if labels else {}
    model = theirs(kind, **fields)
    weights = {k: v.clone() for k, v in model.state_dict().items() if k != "cls.predictions.decoder.bias"}
    weights |= {"fit_dense.weight": torch.randn(fit_size, 32), "fit_dense.bias": torch.randn(fit_size)}
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    kept = (*SHAPE, "intermediate_size", "hidden_act", "type_vocab_size", "initializer_range")
    config = {name: getattr(model.config, name) for name in kept}
    config |= {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "pre_trained": "", "training": ""}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    return model, weights


@torch.no_grad()
@pytest.mark.parametrize("labels", [1, pytest.param(2, marks=pytest.mark.slow), 5])
def test_task_student_of_the_tinybert_authors(tmp_path, labels):
    model, weights = authors_folder(tmp_path / "authors", labels)
    ids = torch.randint(1, 50, (3, 12), generator=torch.Generator().manual_seed(1))
    pooled = model.bert(ids).pooler_output
    expected = pooled.relu() @ weights["classifier.weight"].T + weights["classifier.bias"]
    assert (model(ids).logits - expected).abs().max() > 0.1, "transformers' class must differ"
    certificate = convert(tmp_path / "authors", "tfm", tmp_path / "ours")
    assert list(certificate["source"]["weights"]) == ["pytorch_model.bin"]
    converted = TfmBertForSequenceClassification.from_pretrained(tmp_path / "ours").eval()
    torch.testing.assert_close(converted(ids).logits, expected, rtol=1e-6, atol=1e-5)
    assert converted.config.num_labels == labels and converted.config.pooler == "tanh_relu"
    loaded = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert loaded.tokenize("The ONE") == ["the", "one"]

    convert(tmp_path / "ours", "tinybert", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    assert found.keys() == weights.keys() and all(torch.equal(found[name], weights[name]) for name in weights)
    assert (tmp_path / "back" / "vocab.txt").read_text().split() == WORDS
    convert(tmp_path / "back", "tfm", tmp_path / "again")
    assert_same_weights(tmp_path / "ours", tmp_path / "again")
    projections = [load_file(tmp_path / name / "projection.safetensors") for name in ("ours", "again")]
    assert projections[0].keys() == projections[1].keys() == {"fit_dense.weight", "fit_dense.bias"}
    with pytest.raises(ValueError, match="bert cannot express pooler='tanh_relu': it needs 'tanh'"):
        convert(tmp_path / "ours", "bert", tmp_path / "bert")


def test_general_student_of_the_tinybert_authors(tmp_path):
    model, weights = authors_folder(tmp_path / "authors", labels=None)
    # As on the Hub: with a model type, but without a class.
    config = config_of(tmp_path / "authors") | {"model_type": "bert"}
    (tmp_path / "authors" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "authors", "tfm", tmp_path / "ours")
    assert_same_outputs(outputs_of(TfmBertForPreTraining.from_pretrained(tmp_path / "ours")), outputs_of(model))
    convert(tmp_path / "ours", "tinybert", tmp_path / "back")
    found = load_file(tmp_path / "back" / "model.safetensors")
    tied = {"cls.predictions.decoder.weight"}
    assert found.keys() == weights.keys() - tied and all(torch.equal(found[name], weights[name]) for name in found)
    convert(tmp_path / "ours", "bert", tmp_path / "bert")  # an ordinary BERT
    assert_same_outputs(outputs_of(type(model).from_pretrained(tmp_path / "bert")), outputs_of(model))


@pytest.mark.parametrize("name", ["bert-TfmBertForSequenceClassification", "distilbert-TfmBertForMaskedLM"])
def test_tokenizer_is_converted(tmp_path, name):
    conversion = BY_NAME[name]
    ours(conversion).save_pretrained(tmp_path / "ours")
    tokenizer().save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", conversion.name, tmp_path / "theirs")
    assert certificate["tokenizer_equal"] is True
    assert convert(tmp_path / "theirs", "tfm", tmp_path / "back")["tokenizer_equal"] is True
    texts = ["the one", "one the one"]
    given, expected = (AutoTokenizer.from_pretrained(tmp_path / name)(texts)["input_ids"] for name in ("back", "ours"))
    assert given == expected


AUTO_CLASSES = {
    "bert-TfmBertForMaskedLM": "AutoModelForMaskedLM",
    "distilbert-TfmBertForSequenceClassification": "AutoModelForSequenceClassification",
    "gpt2-TfmGPTForCausalLM": "AutoModelForCausalLM",
}


def test_they_load_as_native_classes_without_the_package(tmp_path):
    code = """
import json
import torch
import transformers

try:
    import hf_tfm
    raise SystemExit("the package is importable")
except ModuleNotFoundError:
    pass
found = {}
for name, auto_class in CLASSES.items():
    model = getattr(transformers, auto_class).from_pretrained(name).eval()
    with torch.no_grad():
        logits = model(torch.arange(3, 13)[None]).logits
    found[name] = [type(model).__module__, logits.tolist()]
found["fill"] = transformers.pipeline("fill-mask", "bert-TfmBertForMaskedLM")("the [MASK] one", top_k=3)
print(json.dumps(found))
"""
    expected = {}
    for name in AUTO_CLASSES:
        model = ours(BY_NAME[name])
        model.save_pretrained(tmp_path / "ours" / name)
        if BY_NAME[name].name != "gpt2":
            tokenizer().save_pretrained(tmp_path / "ours" / name)
        convert(tmp_path / "ours" / name, BY_NAME[name].name, tmp_path / name)
        with torch.no_grad():
            expected[name] = model(torch.arange(3, 13)[None]).logits
    found = run_python(f"CLASSES = {AUTO_CLASSES!r}\n{code}", tmp_path, without_package=True)
    for name, logits in expected.items():
        library = BY_NAME[name].name
        assert found[name][0] == f"transformers.models.{library}.modeling_{library}"
        torch.testing.assert_close(torch.tensor(found[name][1]), logits, rtol=1e-6, atol=1e-5)
    own = pipeline("fill-mask", str(tmp_path / "ours" / "bert-TfmBertForMaskedLM"))("the [MASK] one", top_k=3)
    assert [each["token"] for each in own] == [each["token"] for each in found["fill"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("bert-TfmBertForPreTraining", "base"),
        ("distilbert-TfmBertForMaskedLM", "distilbert"),
        ("tinybert-TfmBertForSequenceClassification", "tinybert4"),
        ("gpt2-TfmGPTForCausalLM", "small"),
    ],
)
def test_realistic_sizes(tmp_path, name, size):
    """Weights at the scale of trained ones, so that rounding errors are realistic."""
    conversion = BY_NAME[name]
    fields = {"pooler": "tanh_relu"} if conversion.name == "tinybert" else {}
    torch.manual_seed(0)
    model = conversion.ours(conversion.ours.config_class.of_size(size, **fields))
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", conversion.name, tmp_path / "theirs")
    assert certificate["inputs"]["dtype"] == "float32" and certificate["max_abs_difference"] < 1e-5
    shutil.rmtree(tmp_path / "ours")
    certificate = convert(tmp_path / "theirs", "tfm", tmp_path / "back")
    assert certificate["inputs"]["dtype"] == "float32" and certificate["max_abs_difference"] < 1e-5
    back = load_file(tmp_path / "back" / "model.safetensors")
    tied = {"lm_head.decoder.weight", "lm_head.weight"}
    again = type(model).from_pretrained(tmp_path / "back").state_dict()
    assert back.keys() and all(torch.equal(again[key], value) for key, value in model.state_dict().items())
    assert tied.isdisjoint(back)


def test_pooling_of_sentence_transformers(tmp_path):
    theirs(BY_NAME["bert-TfmBertModel"]).save_pretrained(tmp_path / "theirs")
    files = {
        "modules.json": [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "1_Pooling"}],
        "1_Pooling/config.json": {"pooling_mode": "mean"},
    }
    (tmp_path / "theirs" / "1_Pooling").mkdir()
    for name, content in files.items():
        (tmp_path / "theirs" / name).write_text(json.dumps(content))
    convert(tmp_path / "theirs", "tfm", tmp_path / "ours")
    for name, content in files.items():
        assert json.loads((tmp_path / "ours" / name).read_text()) == content
    (tmp_path / "theirs" / "modules.json").write_text(json.dumps([{"path": "../elsewhere"}]))
    with pytest.raises(ValueError, match=r'names "../elsewhere", which is outside of the folder'):
        convert(tmp_path / "theirs", "tfm", tmp_path / "again")
