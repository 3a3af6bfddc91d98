"""A model trained here converts to a native class and back unchanged."""

import dataclasses
import hashlib
import json

import pytest
import torch
from hub_helpers import randomize, run_python, tiny_tokenizer
from safetensors.torch import load_file, save_file
from test_card import RECORD, write_history
from transformers import (
    AutoTokenizer,
    MarianConfig,
    MarianMTModel,
    PegasusConfig,
    PegasusForConditionalGeneration,
    PreTrainedConfig,
)

import hf_tfm.conversion.marian_pegasus as tables
from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration
from hf_tfm.conversion import convert
from hf_tfm.conversion.marian_pegasus import MARIAN, PEGASUS
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
    {**TINY, "output_bias": True},
]
STOCK = {
    "marian": (MARIAN, tables.MARIAN_CLASS, MarianMTModel, MarianConfig),
    "pegasus": (PEGASUS, tables.PEGASUS_CLASS, PegasusForConditionalGeneration, PegasusConfig),
}
BOTH = pytest.mark.parametrize("to", STOCK)
# Both classes are converted by the same code with two tables.
ONE = pytest.mark.parametrize("to", ["marian", pytest.param("pegasus", marks=pytest.mark.slow)])


def own_fields(config_class) -> set[str]:
    """Fields that a configuration class adds to `PreTrainedConfig`."""
    return {field.name for field in dataclasses.fields(config_class)} - {
        field.name for field in dataclasses.fields(PreTrainedConfig)
    }


def ours(to: str = "marian", **fields) -> TfmTransformerForConditionalGeneration:
    """A random model with the norm order of class ``to``."""
    fields = {**TINY, "norm_first": to == "pegasus", **fields}
    return randomize(TfmTransformerForConditionalGeneration(TfmTransformerConfig(**fields)))


def stock(to: str = "marian", **fields) -> MarianMTModel | PegasusForConditionalGeneration:
    _, _, model_class, config_class = STOCK[to]
    config = config_class(
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
    return randomize(model_class(config))


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
    """Both folders hold bit-equal tensors."""
    first, second = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first)


@BOTH
@pytest.mark.parametrize("fields", SIZES)
def test_name_table_covers_every_key(fields, to):
    conversion, _, model_class, _ = STOCK[to]
    config = TfmTransformerConfig(**fields, norm_first=to == "pegasus")
    table = conversion.names(config)
    assert table.keys() == TfmTransformerForConditionalGeneration(config).state_dict().keys()
    theirs = model_class(conversion.to_theirs(config)).state_dict().keys()
    assert {*table.values(), *conversion.zero_in_theirs, *conversion.computed_in_theirs} == theirs
    assert len(set(table.values())) == len(table)


@BOTH
def test_every_field_of_both_configurations_is_covered(to):
    """A field added to either class must be added to the tables or be refused."""
    _, side, _, config_class = STOCK[to]
    # The last two are set by the class and by the weights: see to_theirs and to_ours.
    handled = {*side.fields, *tables.OURS_FIXED, *tables.OURS_CARRIED, "norm_first", "output_bias"}
    own = {name for name in own_fields(TfmTransformerConfig) if not name.startswith("floater_")}  # of other positions
    # Every conversion refuses other attention methods.
    assert own - handled == {"encoder_attention", "encoder_attention_kwargs"}
    handled = {name for pair in side.fields.values() for name in pair}
    handled |= {*side.fixed, *tables.THEIRS_CARRIED, "forced_eos_token_id"}  # the last: see to_theirs
    assert own_fields(config_class) - handled == set()


@pytest.mark.parametrize(
    ("to", "fields"),
    [
        pytest.param(to, fields, marks=pytest.mark.slow if to == "pegasus" and fields is not SIZES[1] else ())
        for to in STOCK
        for fields in SIZES
    ],
)
def test_ours_to_native_and_back(tmp_path, fields, to):
    model = ours(to, **fields, label_smoothing=0.05, mask_token_id=3)
    model.generation_config.update(num_beams=2, length_penalty=0.6)
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", to, tmp_path / to)
    converted = STOCK[to][2].from_pretrained(tmp_path / to)
    expected = logits(model)
    assert expected.abs().max() > 1, "logits too small for a meaningful comparison"
    torch.testing.assert_close(logits(converted), expected, rtol=0, atol=1e-5)
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    assert certificate["greedy_tokens_equal"] is True
    assert converted.generation_config.length_penalty == 0.6
    # The classes' own defaults would force a token at the maximum length.
    assert converted.config.forced_eos_token_id is converted.generation_config.forced_eos_token_id is None

    convert(tmp_path / to, "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    for name in ("config.json", "generation_config.json"):
        before, after = (json.loads((tmp_path / folder / name).read_text()) for folder in ("ours", "back"))
        after.pop("init_std", None)  # native fields without effect here
        assert before == after


@pytest.mark.parametrize(
    ("to", "fields"),
    [
        ("marian", {}),
        ("pegasus", {"scale_embedding": True, "activation_function": "relu"}),
        ("marian", {"eos_token_id": 5, "forced_eos_token_id": 5}),
        pytest.param("pegasus", {}, marks=pytest.mark.slow),
        pytest.param("marian", {"scale_embedding": True, "activation_function": "relu"}, marks=pytest.mark.slow),
        pytest.param("pegasus", {"eos_token_id": 5, "forced_eos_token_id": 5}, marks=pytest.mark.slow),
    ],
)
def test_native_to_ours_and_back(tmp_path, fields, to):
    model = stock(to, **fields)
    model.save_pretrained(tmp_path / to)
    convert(str(tmp_path / to), "tfm", str(tmp_path / "ours"))
    converted = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(converted), logits(model), rtol=0, atol=1e-5)
    assert converted.config.output_bias is False and converted.config.bos_token_id is None
    convert(tmp_path / "ours", to, tmp_path / "back")
    assert_same_weights(tmp_path / to, tmp_path / "back")
    before, after = (STOCK[to][2].from_pretrained(tmp_path / folder).generation_config for folder in (to, "back"))
    assert before.to_dict() == after.to_dict()


@ONE
def test_logits_bias_is_converted(tmp_path, to):
    """OPUS-MT models have one, and special settings: the padding token, the last one, starts the target."""
    fields = {"activation_function": "swish", "scale_embedding": True, "static_position_embeddings": True}
    model = stock(to, **fields, max_position_embeddings=512, eos_token_id=0, forced_eos_token_id=0)
    model.generation_config.bad_words_ids = [[299]]
    model.final_logits_bias.normal_(std=2.0, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path / to)
    convert(tmp_path / to, "tfm", tmp_path / "ours")
    converted = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert converted.config.output_bias is True
    assert torch.equal(converted.lm_head.bias, model.final_logits_bias[0])
    expected = logits(model)
    torch.testing.assert_close(logits(converted), expected, rtol=0, atol=1e-5)
    converted.lm_head.bias.data.zero_()
    assert (logits(converted) - expected).abs().max() > 1, "the bias must affect the comparison above"

    convert(tmp_path / "ours", to, tmp_path / "back")
    assert_same_weights(tmp_path / to, tmp_path / "back")
    again = STOCK[to][2].from_pretrained(tmp_path / "back")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=1e-5)
    ids = torch.tensor([[7, 8, 9, 0]])
    assert torch.equal(again.generate(ids, max_length=9), model.generate(ids, max_length=9))


@ONE
def test_half_precision_weights_are_bit_equal(tmp_path, to):
    ours(to).to(torch.bfloat16).save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", to, tmp_path / to)
    assert certificate["inputs"]["dtype"] == "float32"
    assert STOCK[to][2].from_pretrained(tmp_path / to, dtype="auto").dtype == torch.bfloat16
    convert(tmp_path / to, "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")


@ONE
def test_position_tables_may_be_missing(tmp_path, to):
    """Older files of Pegasus, and all of Marian, leave them to the class."""
    model = stock(to)
    model.save_pretrained(tmp_path / to)
    path = tmp_path / to / "model.safetensors"
    weights = {name: weight for name, weight in load_file(path).items() if "embed_positions" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    convert(tmp_path / to, "tfm", tmp_path / "ours")
    converted = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path / "ours")
    torch.testing.assert_close(logits(converted), logits(model), rtol=0, atol=1e-5)


@BOTH
def test_it_loads_as_a_native_class_without_the_package(tmp_path, to):
    model, tokenizer = ours(to, output_bias=True), tiny_tokenizer()
    model.save_pretrained(tmp_path / "ours")
    tokenizer.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", to, tmp_path / to)
    assert certificate["tokenizer_equal"] is True
    assert not list((tmp_path / to).glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / to / "config.json").read_text())
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
model, tokenizer = AutoModelForSeq2SeqLM.from_pretrained({to!r}), AutoTokenizer.from_pretrained({to!r})
inputs = tokenizer({text!r}, padding=True, return_tensors="pt", return_token_type_ids=False)
print(json.dumps({{
    "model": type(model).__module__ + "." + type(model).__name__,
    "tokenizer": type(tokenizer).__name__,
    "is_fast": isinstance(tokenizer, transformers.PreTrainedTokenizerFast),
    "input_ids": inputs["input_ids"].tolist(),
    "generated": model.generate(**inputs, max_new_tokens=12).tolist(),
}}))
"""
    found = run_python(code, tmp_path, without_package=True)
    assert found == {
        "model": f"transformers.models.{to}.modeling_{to}.{STOCK[to][2].__name__}",
        "tokenizer": type(AutoTokenizer.from_pretrained(tmp_path / "ours")).__name__,
        "is_fast": True,
        "input_ids": inputs["input_ids"].tolist(),
        "generated": expected,
    }


@ONE
def test_certificate(tmp_path, to):
    ours(to).save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", to, tmp_path / to)
    assert certificate == json.loads((tmp_path / to / "parity_certificate.json").read_text())
    for side, folder in (("source", "ours"), ("target", to)):
        content = (tmp_path / folder / "model.safetensors").read_bytes()
        assert certificate[side]["weights"] == {"model.safetensors": hashlib.sha256(content).hexdigest()}
    assert certificate["source"]["model"] == "ours"
    assert certificate["source"]["class"] == "TfmTransformerForConditionalGeneration"
    assert certificate["target"]["class"] == STOCK[to][2].__name__
    assert certificate["tokenizer_equal"] is None
    assert len(set(certificate["inputs"]["source_lengths"])) > 2, "several lengths, so padding is in the check"
    assert certificate["versions"]["torch"] == torch.__version__.split("+")[0]
    assert str(tmp_path) not in json.dumps(certificate), "certificates must not contain local paths"


def test_card_of_a_converted_model(tmp_path):
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
    assert RunRecord.load(tmp_path / "shipped").to_dict() == {
        **RECORD,
        "costs": None,
        "distillation": None,
        "compression": None,
        "evaluations": None,
    }
