"""Configurations of all families: out-of-range and misspelt fields, and saving and loading."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hf_tfm
from hf_tfm.families import FAMILIES
from hf_tfm.models.checks import refuse_misspelt

KINDS = [family.config for family in FAMILIES]
# Field names with the same meaning; a configuration has one of each group.
SCALES = ("initializer_range", "initializer_factor", "init_xavier_std")
COUNTS = ("num_attention_heads", "encoder_attention_heads", "num_channels", "num_encoder_layers")
WIDTHS = ("hidden_size", "d_model", "embed_dim")
every_kind = pytest.mark.parametrize("kind", KINDS)
of_text = [kind for kind in KINDS if "vocab_size" in kind.__dataclass_fields__]
every_text_kind = pytest.mark.parametrize("kind", of_text)


def field_of(kind: type, names: tuple[str, ...]) -> str:
    """The first of some names that is a field of a configuration."""
    return next(name for name in names if name in kind.__dataclass_fields__)


def test_every_kind_is_checked():
    assert {hf_tfm.TfmBertConfig, hf_tfm.TfmViTConfig, hf_tfm.TfmDetrConfig} <= set(KINDS)
    for kind in (hf_tfm.TfmBertConfig, hf_tfm.TfmGPTConfig, hf_tfm.TfmViTConfig, hf_tfm.TfmMAEConfig):
        assert field_of(kind, SCALES) == "initializer_range" and field_of(kind, COUNTS) == "num_attention_heads"
    assert field_of(hf_tfm.TfmTransformerConfig, SCALES) == "initializer_factor"
    assert field_of(hf_tfm.TfmDetrConfig, SCALES) == "init_xavier_std"
    assert field_of(hf_tfm.TfmDetrConfig, COUNTS) == "encoder_attention_heads"


@every_kind
@pytest.mark.parametrize("value", [-1e-5, 0.0, math.nan, math.inf])
def test_layer_norm_epsilon(kind, value):
    with pytest.raises(ValueError, match=rf"^layer_norm_eps must be a finite number above 0, got {value}$"):
        kind(layer_norm_eps=value)


@every_kind
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_initializer_range(kind, value):
    name = field_of(kind, SCALES)
    with pytest.raises(ValueError, match=f"^{name} must be a finite number .*{value}$"):
        kind(**{name: value})


@every_kind
@pytest.mark.parametrize("value", [0, -2, 2**40])
def test_sizes(kind, value):
    name = field_of(kind, COUNTS)
    with pytest.raises(ValueError, match=f"^{name} must be at (least 1|most .*), got {value}$"):
        kind(**{name: value})


@every_kind
@pytest.mark.parametrize("value", [2.5, "many"])
def test_types(kind, value):
    with pytest.raises(Exception, match="expected int, got") as raised:
        kind(**{field_of(kind, COUNTS): value})
    assert "Validation" in type(raised.value).__name__


@every_text_kind
@pytest.mark.parametrize("value", [0, -5, 10**9])
def test_vocabulary_size(kind, value):
    with pytest.raises(ValueError, match=rf"^vocab_size must be at (least 1|most 16777216), got {value}$"):
        kind(vocab_size=value)


@every_text_kind
@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id", "eos_token_id"])
@pytest.mark.parametrize("value", [-1, 20])
def test_special_tokens(kind, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be in \[0, vocab_size = 20\), got {value}$"):
        kind(vocab_size=20, **{name: value})


@every_text_kind
def test_small_vocabulary_needs_no_special_tokens(kind):
    assert kind(vocab_size=3).vocab_size == 3
    with pytest.raises(ValueError, match=r"eos_token_id must be in .* got 21"):
        kind(vocab_size=20, eos_token_id=[1, 21])


@every_kind
@pytest.mark.parametrize(
    ("field", "meant"), [("layernorm_eps", "layer_norm_eps"), ("num_label", "num_labels"), ("id2lable", "id2label")]
)
def test_misspelt_fields_are_refused(kind, field, meant):
    if meant == "layer_norm_eps" and meant not in kind.__dataclass_fields__:
        pytest.skip("it has no layer norms")
    with pytest.raises(ValueError, match=f'"{field}" is not a field of {kind.__name__}: did you mean "{meant}"'):
        kind(**{field: None})


@every_kind
def test_unrelated_fields_are_kept(kind):
    """transformers keeps unknown fields; files written by other tools may contain some."""
    assert kind(my_own_note="kept", torch_dtype="float16").my_own_note == "kept"


def test_similar_field_names():
    refuse_misspelt("field", ["encoder_layerdrop", "_private"], {"encoder_layers"})
    with pytest.raises(ValueError, match='"dropuot" is not a field: did you mean "dropout"'):
        refuse_misspelt("field", ["dropuot"], {"dropout", "hidden_size"})


@every_kind
@pytest.mark.parametrize("value", [-1, 2.5, "three", True])
def test_number_of_labels(kind, value):
    with pytest.raises(ValueError, match=r"num_labels must be an integer in \[0, 1048576\], got"):
        kind(num_labels=value)


@every_kind
def test_number_of_labels_must_match_the_labels(kind, tmp_path):
    with pytest.raises(ValueError, match="num_labels must be 2, the number of labels in id2label, got 3"):
        kind(num_labels=3, id2label={0: "a", 1: "b"})
    kind(num_labels=3).save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, num_labels=5)
    assert again.num_labels == len(again.id2label) == len(again.label2id) == 5


def choices(kind) -> dict:
    """Valid values for those of the fields that a configuration has."""
    shares, positive = st.floats(0, 0.99), st.floats(1e-12, 10)
    fields = {
        "layer_norm_eps": positive,
        "vocab_size": st.integers(5, 10**5),
        "max_position_embeddings": st.integers(1, 4096),
        "image_size": st.sampled_from([32, (32, 64), [64, 32]]),
        "patch_size": st.sampled_from([8, (8, 16)]),
        "num_attention_heads": st.integers(1, 4),
        "hidden_dropout_prob": shares,
        "initializer_range": st.floats(0, 1),
        "pooler": st.sampled_from(["tanh", "relu", "none"]),
        "norm_first": st.booleans(),
        "distillation_token": st.booleans(),
        "mask_ratio": shares,
        "norm_pix_loss": st.booleans(),
        "num_queries": st.integers(1, 300),
        "eos_coefficient": st.floats(1e-3, 1.0),
        "decoding": st.sampled_from(["autoregressive", "mask_predict"]),
        "label_smoothing": shares,
    }
    known = {name: values for name, values in fields.items() if name in kind.__dataclass_fields__}
    return {**known, "num_labels": st.integers(1, 5)}


def plain(config) -> dict:
    """The fields with tuples as lists, as in JSON, and without those added by saving."""
    added = ("architectures", "auto_map", "transformers_version")
    fields = {key: value for key, value in config.to_dict().items() if key not in added}
    return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


@every_kind
@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_saved_configuration_is_loaded_unchanged(kind, data, tmp_path_factory):
    fields = data.draw(st.fixed_dictionaries({}, optional=choices(kind)))
    width = math.lcm(*range(1, 5)) * 16
    config = kind(**fields, **{field_of(kind, WIDTHS): width})
    assert plain(kind.from_dict(config.to_dict())) == plain(config)
    folder = tmp_path_factory.mktemp("config")
    config.save_pretrained(folder)
    loaded = kind.from_pretrained(folder)
    assert plain(loaded) == plain(config)
    for name, value in fields.items():
        found = getattr(loaded, name)
        assert (list(found) == list(value)) if isinstance(value, tuple | list) else (found == value), name


def test_file_may_have_fields_of_other_versions(tmp_path):
    """Only arguments are checked for misspelling; files of other versions may have additional fields."""
    saved = hf_tfm.TfmDetrConfig.of_size("tiny").to_dict() | {"tfm_auxiliary_loss": True, "encoder_layer": 2}
    assert hf_tfm.TfmDetrConfig.from_dict(saved).tfm_auxiliary_loss is True
    (tmp_path / "config.json").write_text(json.dumps(saved))
    assert hf_tfm.TfmDetrConfig.from_pretrained(tmp_path).encoder_layer == 2
    with pytest.raises(ValueError, match='"encoder_layer" is not a field of TfmDetrConfig: did you mean'):
        hf_tfm.TfmDetrConfig.of_size("tiny", encoder_layer=2)
