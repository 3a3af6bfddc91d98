"""BERT and GPT models that cannot be converted are refused with field and value, and no output is left."""

import pytest
from convert_helpers import config_of
from safetensors.torch import load_file, save_file
from text_helpers import BY_NAME, ours, theirs
from transformers import BertForNextSentencePrediction, BertLMHeadModel

import hf_tfm.conversion.distilbert as table
from hf_tfm.conversion import convert
from hf_tfm.conversion.gpt2 import THEIRS_FIXED


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert-TfmBertModel", {"type_vocab_size": 0}, "type_vocab_size=0: it needs 'segments; distilbert has none'"),
        *(
            (
                f"{name}-TfmBertModel",
                {"position_embedding_type": kind},
                f"{name} cannot express .*type='{kind}': it needs",
            )
            for name, kind in (("bert", "alibi"), ("bert", "floater"), ("distilbert", "rotary"))
        ),
        ("bert-TfmBertModel", {"pooler": "relu"}, "bert cannot express pooler='relu': it needs 'tanh'"),
        ("bert-TfmBertForSequenceClassification", {"pooler": "relu"}, "bert cannot express pooler='relu'"),
        ("bert-TfmBertForMaskedLM", {"tie_word_embeddings": False}, "bert cannot express tie_word_embeddings=False"),
        ("bert-TfmBertForQuestionAnswering", {"num_labels": 3}, "bert cannot express num_labels=3: it needs 2"),
        ("distilbert-TfmBertModel", {"type_vocab_size": 2}, "type_vocab_size=2: it needs '0; bert has segments'"),
        ("distilbert-TfmBertModel", {"pooler": "tanh"}, "distilbert cannot express pooler='tanh': it needs 'none'"),
        ("distilbert-TfmBertModel", {"layer_norm_eps": 1e-5}, "distilbert cannot express layer_norm_eps=1e-05"),
        ("distilbert-TfmBertForSequenceClassification", {"pooler": "tanh"}, "pooler='tanh': it needs 'relu'"),
        ("distilbert-TfmBertForQuestionAnswering", {"num_labels": 3}, "distilbert cannot express num_labels=3"),
        ("tinybert-TfmBertForSequenceClassification", {"pooler": "tanh"}, "pooler='tanh': it needs 'tanh_relu'"),
        ("tinybert-TfmBertForPreTraining", {"hidden_act": "silu"}, "tinybert cannot express hidden_act='silu'"),
        ("tinybert-TfmBertForPreTraining", {"layer_norm_eps": 1e-5}, "tinybert cannot express layer_norm_eps=1e-05"),
        ("gpt2-TfmGPTModel", {"norm_first": False}, "gpt2 cannot express norm_first=False: it needs True"),
    ],
)
def test_fields_without_a_native_equivalent_are_refused(tmp_path, name, fields, message):
    ours(BY_NAME[name], **fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", BY_NAME[name].name, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("bert-TfmBertModel", {"is_decoder": True}, "TfmBertConfig cannot express is_decoder=True"),
        ("bert-TfmBertForPreTraining", {"tie_word_embeddings": False}, "cannot express tie_word_embeddings=False"),
        ("gpt2-TfmGPTModel", {"embd_pdrop": 0.0}, "TfmGPTConfig cannot express embd_pdrop=0.0"),
        *(
            ("gpt2-TfmGPTModel", {field: not value}, f"cannot express {field}=")
            for field, value in THEIRS_FIXED.items()
        ),
    ],
)
def test_native_fields_without_an_equivalent_here_are_refused(tmp_path, name, fields, message):
    theirs(BY_NAME[name], **fields).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "theirs", "tfm", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


@pytest.mark.parametrize("head", [BertForNextSentencePrediction, BertLMHeadModel])
def test_unsupported_heads_are_refused(tmp_path, head):
    head(theirs(BY_NAME["bert-TfmBertModel"]).config).save_pretrained(tmp_path / "bert")
    with pytest.raises(ValueError, match=f'no conversion of a {head.__name__} to "tfm", only of BertModel, '):
        convert(tmp_path / "bert", "tfm", tmp_path / "out")
    with pytest.raises(ValueError, match='no conversion of a model of type "bert" to "gpt2"'):
        convert(tmp_path / "bert", "gpt2", tmp_path / "out")


def test_heads_unsupported_by_tinybert_are_refused(tmp_path):
    ours(BY_NAME["bert-TfmBertForTokenClassification"]).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match='no conversion of a TfmBertForTokenClassification to "tinybert", only of'):
        convert(tmp_path / "ours", "tinybert", tmp_path / "out")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name.endswith("SequenceClassification") else pytest.mark.slow)
        for name in BY_NAME
    ],
)
@pytest.mark.parametrize("back", [False, True])
def test_incomplete_file_is_refused(tmp_path, name, back):
    conversion = BY_NAME[name]
    model = theirs(conversion) if back else ours(conversion)
    model.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    lost = max(weights)
    save_file({key: value for key, value in weights.items() if key != lost}, path, {"format": "pt"})
    with pytest.raises(ValueError, match="is not a complete"):
        convert(tmp_path / "model", "tfm" if back else conversion.name, tmp_path / "out")


def test_different_outputs_are_refused(tmp_path, monkeypatch):
    """Swapped queries and keys have the same shapes."""
    swapped = ((r"self_attn\.q_proj\.", "attention.k_lin."), (r"self_attn\.k_proj\.", "attention.q_lin."))
    monkeypatch.setattr(table, "RENAMES", (*swapped, *table.RENAMES))
    ours(BY_NAME["distilbert-TfmBertForMaskedLM"]).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="logits differ by"):
        convert(tmp_path / "ours", "distilbert", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_check_covers_token_types(tmp_path, monkeypatch):
    """The check uses several segments and padded texts, so a model that treats them differently fails."""
    import hf_tfm.conversion as conversions

    name = "bert-TfmBertForSequenceClassification"
    ours(BY_NAME[name]).save_pretrained(tmp_path / "ours")
    whole = conversions.reread

    def forgetful(*arguments):
        model = whole(*arguments)
        table = model.bert.embeddings.token_type_embeddings.weight.data
        table[1] = table[0]
        return model

    monkeypatch.setattr(conversions, "reread", forgetful)
    with pytest.raises(ValueError, match="logits differ by"):
        convert(tmp_path / "ours", "bert", tmp_path / "out")
    assert config_of(tmp_path / "ours")["type_vocab_size"] == 2
