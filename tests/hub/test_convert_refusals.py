"""Models that cannot be converted are refused with the reason, and no output is left."""

import dataclasses

import pytest
from safetensors.torch import load_file, save_file
from test_convert import BOTH, ours, stock

import hf_tfm.conversion as convert_module
from hf_tfm.conversion import convert, targets
from hf_tfm.conversion.marian_pegasus import MARIAN


@BOTH
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"position_embedding_type": "learned"}, "position_embedding_type='learned'"),
        ({"position_embedding_type": "floater", "floater_scope": "input"}, "position_embedding_type='floater'"),
        ({"attention_score": "additive"}, "attention_score='additive'"),
        ({"decoding": "mask_predict"}, "decoding='mask_predict'"),
        ({"layer_norm_eps": 1e-6}, "layer_norm_eps=1e-06"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ({"decoder_start_token_id": None}, "decoder_start_token_id=None"),
    ],
)
def test_fields_without_a_native_equivalent_are_refused(tmp_path, fields, message, to):
    ours(to, **fields).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"{to} cannot express {message}"):
        convert(tmp_path / "ours", to, tmp_path / to)
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


@pytest.mark.parametrize(("norm_first", "to", "other"), [(True, "marian", "pegasus"), (False, "pegasus", "marian")])
def test_other_norm_order_is_refused_with_the_right_class(tmp_path, norm_first, to, other):
    ours(norm_first=norm_first).save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f"{to} cannot express norm_first={norm_first}: convert to {other}"):
        convert(tmp_path / "ours", to, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]
    convert(tmp_path / "ours", other, tmp_path / "out")


@pytest.mark.parametrize(
    ("to", "fields", "message"),
    [
        ("marian", {"decoder_ffn_dim": 16}, "decoder_ffn_dim=16"),
        ("pegasus", {"decoder_attention_heads": 2}, "decoder_attention_heads=2"),
        (
            "marian",
            {"decoder_vocab_size": 400, "share_encoder_decoder_embeddings": False},
            "share_encoder_decoder_embeddings",
        ),
        ("pegasus", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
        ("marian", {"encoder_layerdrop": 0.1}, "encoder_layerdrop=0.1"),
    ],
)
def test_native_fields_without_an_equivalent_here_are_refused(tmp_path, to, fields, message):
    stock(to, **fields).save_pretrained(tmp_path / to)
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / to, "tfm", tmp_path / "ours")
    assert [path.name for path in tmp_path.iterdir()] == [to]


def test_different_outputs_are_refused_and_no_output_is_left(tmp_path, monkeypatch):
    def swapped(config):
        """Swap encoder queries and keys of the first layer, which have the same shapes."""
        table = MARIAN.names(config)
        query, key = (f"model.encoder.layers.0.self_attn.{part}_proj.bias" for part in "qk")
        table[query], table[key] = table[key], table[query]
        return table

    monkeypatch.setattr(convert_module, "conversions", lambda: [dataclasses.replace(MARIAN, names=swapped)])
    ours().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="logits differ by"):
        convert(tmp_path / "ours", "marian", tmp_path / "deep" / "marian")
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_incomplete_checkpoint_is_refused(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    path = tmp_path / "ours" / "model.safetensors"
    weights = load_file(path)
    weights.pop("model.encoder.layers.1.feed_forward.up_proj.bias")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks the weight .*layers\.1\.feed_forward\.up_proj\.bias"):
        convert(tmp_path / "ours", "marian", tmp_path / "marian")


def test_arguments_are_checked(tmp_path):
    ours().save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match=f'to must be one of marian, .*, {", ".join(targets()[-3:])}, got "bart"'):
        convert(tmp_path / "ours", "bart", tmp_path / "out")
    with pytest.raises(ValueError, match='no conversion of a model of type "tfm_transformer" to "tfm"'):
        convert(tmp_path / "ours", "tfm", tmp_path / "out")
    stock("pegasus").save_pretrained(tmp_path / "pegasus")
    with pytest.raises(ValueError, match='no conversion of a model of type "pegasus" to "marian"'):
        convert(tmp_path / "pegasus", "marian", tmp_path / "out")
    with pytest.raises(ValueError, match=r"no config\.json"):
        convert(tmp_path, "marian", tmp_path / "out")
    with pytest.raises(ValueError, match="neither a local folder nor a model on the Hub"):
        convert(tmp_path / "missing", "marian", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert(tmp_path / "ours", "marian", tmp_path / "full")
    (tmp_path / "empty").mkdir()
    convert(tmp_path / "ours", "marian", tmp_path / "empty")
    assert (tmp_path / "empty" / "parity_certificate.json").is_file()
