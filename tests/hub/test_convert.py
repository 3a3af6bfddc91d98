"""A model trained here ships as a stock class, and comes back unchanged."""

import dataclasses
import hashlib
import json

import pytest
import torch
from hub_helpers import randomize, run_python, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_card import RECORD, write_history
from transformers import AutoTokenizer, MarianConfig, MarianMTModel, PreTrainedConfig

import hf_tfm.hub.convert as convert_module
import hf_tfm.hub.convert.marian as tables
from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration
from hf_tfm.hub.convert import MARIAN, convert
from hf_tfm.hub.results import RunRecord

TINY = {
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_encoder_layers": 2,
    "num_decoder_layers": 1,
    "max_position_embeddings": 64,
    "dropout": 0.2,
    "attention_dropout": 0.15,
    "activation_dropout": 0.05,
    "pad_token_id": 3,
    "bos_token_id": 4,
    "eos_token_id": 5,
    "decoder_start_token_id": 6,
}
SIZES = [
    TINY,
    {**TINY, "num_encoder_layers": 1, "num_decoder_layers": 3, "hidden_act": "gelu", "scale_embedding": False},
    {**TINY, "hidden_size": 40, "intermediate_size": 16, "num_attention_heads": 2, "hidden_act": "swish"},
]


def own_fields(config_class) -> set[str]:
    """The fields that a configuration class adds to `PreTrainedConfig`."""
    return {field.name for field in dataclasses.fields(config_class)} - {
        field.name for field in dataclasses.fields(PreTrainedConfig)
    }


def ours(**fields) -> TfmTransformerForConditionalGeneration:
    return randomize(TfmTransformerForConditionalGeneration(TfmTransformerConfig(**{**TINY, **fields})))


def marian(**fields) -> MarianMTModel:
    config = MarianConfig(
        **{
            "vocab_size": 300,
            "d_model": 16,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_layers": 1,
            "decoder_layers": 2,
            "max_position_embeddings": 64,
            "pad_token_id": 299,
            "decoder_start_token_id": 299,
            **fields,
        }
    )
    return randomize(MarianMTModel(config))


@torch.no_grad()
def logits(model, seed: int = 7) -> torch.Tensor:
    """Logits on inputs that the conversion's own check does not use: (3, 9, V)."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(5, 290, (3, 12), generator=generator)
    target = torch.randint(5, 290, (3, 9), generator=generator)
    mask = torch.ones_like(source)
    mask[1, 4:] = 0
    return model.eval()(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits


def assert_same_weights(first, second):
    """Both folders hold the same tensors, bit for bit."""
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


@pytest.mark.parametrize("fields", SIZES)
def test_the_name_table_leaves_no_key_over(fields):
    config = TfmTransformerConfig(**fields)
    table = MARIAN.names(config)
    assert table.keys() == TfmTransformerForConditionalGeneration(config).state_dict().keys()
    theirs = MarianMTModel(MARIAN.to_theirs(config)).state_dict().keys()
    assert {*table.values(), *MARIAN.zero_in_theirs, *MARIAN.computed_in_theirs} == theirs
    assert len(set(table.values())) == len(table)


def test_every_field_of_both_configurations_is_accounted_for():
    """A field added to either class must be given a place in the tables, or be refused."""
    settled = {*tables.FIELDS, *tables.OURS_FIXED, *tables.OURS_CARRIED}
    assert own_fields(TfmTransformerConfig) - settled == set()
    settled = {name for pair in tables.FIELDS.values() for name in pair}
    settled |= {*tables.THEIRS_FIXED, *tables.THEIRS_CARRIED, "forced_eos_token_id"}  # the last: see to_marian
    assert own_fields(MarianConfig) - settled == set()


@pytest.mark.parametrize("fields", SIZES)
def test_ours_to_marian_and_back(tmp_path, fields):
    model = ours(**fields, label_smoothing=0.05, mask_token_id=3)
    model.generation_config.update(num_beams=2, length_penalty=0.6)
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", "marian", tmp_path / "marian")
    stock = MarianMTModel.from_pretrained(tmp_path / "marian")
    expected = logits(model)
    assert expected.abs().max() > 1, "logits too small for the comparison to mean much"
    torch.testing.assert_close(logits(stock), expected, rtol=0, atol=1e-5)
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    assert certificate["greedy_tokens_equal"] is True
    assert stock.generation_config.length_penalty == 0.6

    convert(tmp_path / "marian", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((tmp_path / folder / name).read_text()) for folder in ("ours", "back"))
        after.pop("init_std", None)  # Marian's, and without effect here
        assert before == after


@pytest.mark.parametrize(
    "fields",
    [{}, {"scale_embedding": True, "activation_function": "relu"}, {"eos_token_id": 5, "forced_eos_token_id": 5}],
)
def test_marian_to_ours_and_back(tmp_path, fields):
    model = marian(**fields)
    model.save_pretrained(tmp_path / "marian")
    convert(str(tmp_path / "marian"), "tfm", str(tmp_path / "ours"))
    converted = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(converted), logits(model), rtol=0, atol=1e-5)
    convert(tmp_path / "ours", "marian", tmp_path / "back")
    assert_same_weights(tmp_path / "marian", tmp_path / "back")


def test_half_precision_weights_keep_their_bits(tmp_path):
    ours().to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", "marian", tmp_path / "marian")
    assert certificate["inputs"]["dtype"] == "float32"
    convert(tmp_path / "marian", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")


def test_it_loads_as_a_stock_class_without_the_package(tmp_path):
    model, tokenizer = ours(), tiny_tokenizer()
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", "marian", tmp_path / "marian")
    assert certificate["tokenizer_equal"] is True
    assert not list((tmp_path / "marian").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "marian" / "config.json").read_text())
    text = ["one two", "drei vier fünf"]
    inputs = tokenizer(text, padding=True, return_tensors="pt", return_token_type_ids=False)
    expected = model.generate(**inputs, max_new_tokens=12).tolist()
    code = f"""
import json
import transformers
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

try:
    import hf_tfm
    raise SystemExit("the package is importable")
except ModuleNotFoundError:
    pass
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained("marian"), AutoTokenizer.from_pretrained("marian")
inputs = tokenizer({text!r}, padding=True, return_tensors="pt", return_token_type_ids=False)
print(json.dumps({{
    "model": type(model).__module__ + "." + type(model).__name__,
    "tokenizer": type(tokenizer).__name__,
    "is_fast": isinstance(tokenizer, transformers.PreTrainedTokenizerFast),
    "input_ids": inputs["input_ids"].tolist(),
    "generated": model.generate(**inputs, max_new_tokens=12).tolist(),
}}))
"""
    found = run_python(
        code, tmp_path, {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}, without_package=True
    )
    assert found == {
        "model": "transformers.models.marian.modeling_marian.MarianMTModel",
        "tokenizer": type(AutoTokenizer.from_pretrained(tmp_path / "ours")).__name__,
        "is_fast": True,
        "input_ids": inputs["input_ids"].tolist(),
        "generated": expected,
    }


def test_certificate(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", "marian", tmp_path / "marian")
    assert certificate == json.loads((tmp_path / "marian" / "parity_certificate.json").read_text())
    for side, folder in (("source", "ours"), ("target", "marian")):
        content = (tmp_path / folder / "model.safetensors").read_bytes()
        assert certificate[side]["weights"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert certificate["source"]["model"] == "ours"
    assert certificate["source"]["class"] == "TfmTransformerForConditionalGeneration"
    assert certificate["target"]["class"] == "MarianMTModel"
    assert certificate["tokenizer_equal"] is None
    assert len(set(certificate["inputs"]["source_lengths"])) > 2, "several lengths, so padding is in the check"
    assert certificate["versions"]["torch"] == torch.__version__.split("+")[0]
    assert str(tmp_path) not in json.dumps(certificate), "a certificate travels: no paths of this machine"


def test_the_card_of_a_converted_model_is_true_for_it(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    RunRecord.from_dict(RECORD).save(tmp_path / "ours")
    write_history(tmp_path / "ours")
    convert(tmp_path / "ours", "marian", tmp_path / "shipped")
    card = (tmp_path / "shipped" / "README.md").read_text()
    assert "It was then converted to transformers' `marian`" in card
    assert 'model_id = "shipped"' in card
    assert "trust_remote_code" not in card and "hf_tfm" not in card
    assert "| test | bleu_lowercase | 41.02 |" in card
    assert (tmp_path / "shipped" / "training_curve.png").is_file()
    assert RunRecord.load(tmp_path / "shipped").to_dict() == RECORD


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm_first": True}, "norm_first=True"),
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned'"),
        ({"attention_score": "additive"}, "attention_score='additive'"),
        ({"decoding": "mask_predict"}, "decoding='mask_predict'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id=None"),
    ],
)
def test_what_marian_cannot_express_is_refused(tmp_path, fields, message):
    TfmTransformerForConditionalGeneration(TfmTransformerConfig(**{**TINY, **fields})).save_pretrained(
        tmp_path / "ours"
    )
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "ours", "marian", tmp_path / "marian")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_ffn_dim": 16}, "decoder_ffn_dim=16"),
        ({"decoder_attention_heads": 2}, "decoder_attention_heads=2"),
        ({"decoder_vocab_size": 400, "share_encoder_decoder_embeddings": False}, "share_encoder_decoder_embeddings"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
    ],
)
def test_what_we_cannot_express_is_refused(tmp_path, fields, message):
    marian(**fields).save_pretrained(tmp_path / "marian")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "marian", "tfm", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == ["marian"]


def test_a_bias_on_the_logits_is_refused(tmp_path):
    model = marian()
    model.final_logits_bias[0, 7] = 0.5
    model.save_pretrained(tmp_path / "marian")
    with pytest.raises(ValueError, match="no final_logits_bias"):
        convert(tmp_path / "marian", "tfm", tmp_path / "ours")


def test_a_difference_is_refused_and_nothing_is_left(tmp_path, monkeypatch):
    def swapped(config):
        """Encoder queries as keys and keys as queries of the first layer: same shapes, another function."""
        table = MARIAN.names(config)
        query, key = (f"model.encoder.layers.0.self_attn.{part}_proj.bias" for part in "qk")
        table[query], table[key] = table[key], table[query]
        return table

    monkeypatch.setattr(convert_module, "CONVERSIONS", (dataclasses.replace(MARIAN, names=swapped),))
    ours().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="logits differ by"):
        convert(tmp_path / "ours", "marian", tmp_path / "deep" / "marian")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_an_incomplete_checkpoint_is_refused(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.encoder.layers.1.feed_forward.up_proj.bias")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*layers\.1\.feed_forward\.up_proj\.bias"):
        convert(tmp_path / "ours", "marian", tmp_path / "marian")


def test_arguments_are_checked(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match='to must be one of marian, tfm, got "bart"'):
        convert(tmp_path / "ours", "bart", tmp_path / "out")
    with pytest.raises(ValueError, match='no conversion of a model of type "tfm_transformer" to "tfm"'):
        convert(tmp_path / "ours", "tfm", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no config\.json"):
        convert(tmp_path, "marian", tmp_path / "out")
    with pytest.raises(ValueError, match="neither a folder nor an id on the Hub"):
        convert(tmp_path / "missing", "marian", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert(tmp_path / "ours", "marian", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "ours", "marian", tmp_path / "empty")
    assert (tmp_path / "empty" / "parity_certificate.json").is_file()
