"""Attention maps are the model's own, for any model and backend."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, MarianConfig, MarianMTModel, PreTrainedTokenizerFast

from hf_tfm import (
    TfmRNNSeq2SeqConfig,
    TfmRNNSeq2SeqForConditionalGeneration,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
)
from hf_tfm.data.text import train_tokenizer
from hf_tfm.viz import attention_maps
from hf_tfm.viz.attention import plot_alignment, plot_attention
from hf_tfm.viz.tokens import token_labels

TEXT = "two dogs run"
TARGET = "zwei Hunde laufen über Wiesen"
SIZES = {"vocab_size": 320, "max_position_embeddings": 64, "pad_token_id": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT, TARGET] * 20, vocab_size=320)


def tfm(**fields) -> TfmTransformerForConditionalGeneration:
    config = TfmTransformerConfig(
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=2,
        num_encoder_layers=3,
        num_decoder_layers=2,
        **SIZES,
        **fields,
    )
    return TfmTransformerForConditionalGeneration(config)


def marian() -> MarianMTModel:
    config = MarianConfig(
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        eos_token_id=2,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
        **SIZES,
    )
    return MarianMTModel(config)


MODELS = {
    "tfm": tfm,
    "additive": lambda: tfm(attention_score="additive"),
    "mask_predict": lambda: tfm(decoding="mask_predict"),
    "marian": marian,
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    return MODELS[request.param]()


@pytest.mark.parametrize("target", [TARGET, None])
def test_shapes_and_sums(model, tokenizer, target):
    maps = attention_maps(model, tokenizer, TEXT, target)
    S, T = len(maps.source), len(maps.read)
    assert len(tokenizer(TEXT)["input_ids"]) == S
    assert (maps.encoder.shape, maps.decoder.shape, maps.cross.shape) == ((3, 2, S, S), (2, 2, T, T), (2, 2, T, S))
    assert len(maps.predicted) == T
    if target is not None:
        assert len(tokenizer(TARGET)["input_ids"]) == T
        assert maps.translation == TARGET
    for array in (maps.encoder, maps.decoder, maps.cross):
        assert array.dtype == np.float32
        np.testing.assert_allclose(array.sum(axis=-1), 1, atol=1e-6)
    future = maps.decoder[..., np.triu(np.ones((T, T), dtype=bool), 1)]
    if getattr(model.config, "decoding", "") == "mask_predict":
        assert (future > 0).all()
    else:
        assert not future.any()


@pytest.mark.parametrize("kind", ["tfm", "marian"])
def test_maps_equal_the_model_output(kind, tokenizer):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    maps = attention_maps(model, tokenizer, TEXT, TARGET)
    model.set_attn_implementation("eager")
    source, labels = (tokenizer(text, return_tensors="pt")["input_ids"] for text in (TEXT, TARGET))
    start = torch.tensor([[model.config.decoder_start_token_id]])
    read = torch.cat([start, labels[:, :-1]], dim=1)
    with torch.no_grad():
        direct = model(input_ids=source, decoder_input_ids=read, output_attentions=True)
    for mine, theirs in (
        (maps.encoder, direct.encoder_attentions),
        (maps.decoder, direct.decoder_attentions),
        (maps.cross, direct.cross_attentions),
    ):
        np.testing.assert_array_equal(mine, torch.cat(theirs).numpy())
    assert maps.read == token_labels(tokenizer, read[0].tolist())
    assert maps.predicted == token_labels(tokenizer, labels[0].tolist())


def test_recurrent_model_has_an_alignment_only(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "embedding_size": 8, "encoder_hidden_size": 8, "hidden_size": 16}
    model = TfmRNNSeq2SeqForConditionalGeneration(TfmRNNSeq2SeqConfig(**sizes))
    maps = attention_maps(model, tokenizer, TEXT, TARGET)
    S, T = len(maps.source), len(maps.read)
    assert (len(maps.encoder), len(maps.decoder), maps.cross.shape) == (0, 0, (1, 1, T, S))
    np.testing.assert_allclose(maps.cross.sum(axis=-1), 1, atol=1e-6)
    assert len(attention_maps(model, tokenizer, TEXT).predicted) > 0
    assert plot_attention(maps, tmp_path) == [tmp_path / "cross.png"]
    assert plot_alignment(maps, tmp_path / "alignment.png").is_file()
    without = TfmRNNSeq2SeqForConditionalGeneration(TfmRNNSeq2SeqConfig(**sizes, attention_score="none"))
    with pytest.raises(ValueError, match="model must have attention over the source"):
        attention_maps(without, tokenizer, TEXT, TARGET)


@pytest.mark.parametrize("kind", ["tfm", "marian"])
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention"])
def test_every_backend_gives_the_same_maps_and_is_restored(kind, backend, tokenizer):
    torch.manual_seed(0)
    model = MODELS[kind]()
    model.set_attn_implementation("eager")
    expected = attention_maps(model.eval(), tokenizer, TEXT, TARGET)
    model.set_attn_implementation(backend)
    model.train()  # dropout would change the maps
    maps = attention_maps(model, tokenizer, TEXT, TARGET)
    np.testing.assert_array_equal(maps.cross, expected.cross)
    np.testing.assert_array_equal(maps.encoder, expected.encoder)
    assert model.training
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {backend}


def test_without_a_target_the_model_translates(model, tokenizer):
    model.eval()
    maps = attention_maps(model, tokenizer, TEXT, device="cpu")
    encoded = tokenizer(TEXT, return_tensors="pt")
    limit = min(encoded["input_ids"].shape[1] + 50, 64)
    ids = model.generate(**encoded, max_length=limit)[0, 1:].tolist()
    ids = ids[: ids.index(2) + 1] if 2 in ids else ids
    assert maps.predicted == token_labels(tokenizer, ids)
    assert maps.translation == tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_tokens_after_the_end_are_dropped(tokenizer, monkeypatch):
    model = tfm()
    answer = torch.tensor([[1, 300, 301, 2, 0, 0]])
    monkeypatch.setattr(model, "generate", lambda **kwargs: answer)
    maps = attention_maps(model, tokenizer, TEXT)
    assert maps.predicted == token_labels(tokenizer, [300, 301, 2])
    assert maps.read == token_labels(tokenizer, [1, 300, 301])


def test_generation_config_sets_the_length(tokenizer):
    torch.manual_seed(0)
    model = tfm()
    model.generation_config.max_length = 6
    model.generation_config.eos_token_id = None
    assert len(attention_maps(model, tokenizer, TEXT).predicted) == 5  # the start token is the sixth


@pytest.mark.parametrize(("text", "target", "name"), [("", None, "text"), (" \n", None, "text"), ("a", "", "target")])
def test_empty_text_is_refused(text, target, name, tokenizer):
    with pytest.raises(ValueError, match=f"{name} must hold at least one word, got '"):
        attention_maps(tfm(), tokenizer, text, target)


def test_decoder_only_model_is_refused(tokenizer):
    model = GPT2LMHeadModel(GPT2Config(vocab_size=320, n_embd=8, n_layer=1, n_head=2))
    with pytest.raises(ValueError, match="model must be an encoder-decoder, got GPT2LMHeadModel"):
        attention_maps(model, tokenizer, TEXT)


def test_byte_pieces_are_shown_as_characters(tokenizer):
    ids = tokenizer("über dogs\n")["input_ids"]
    labels = token_labels(tokenizer, ids)
    assert labels[-1] == "</s>"
    assert "".join(labels[:-1]) == "·über·dogs\\n"
    # A letter unknown to the tokenizer is two bytes, neither of which is a letter.
    assert token_labels(tokenizer, tokenizer("é")["input_ids"])[-3:] == ["\\xc3", "\\xa9", "</s>"]
    assert token_labels(tokenizer, [0, 4, 319]) == ["<pad>", "<mask>", "<319>"]


def test_nested_decoders_are_unwrapped(tokenizer):
    chained = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    chained.backend_tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    ids = tokenizer("über")["input_ids"][:-1]
    assert token_labels(chained, ids) == token_labels(tokenizer, ids)


def test_sentencepiece_pieces_are_unchanged():
    # "é" is also in the byte-level alphabet; here it is the letter.
    backend = Tokenizer(models.WordLevel({"<unk>": 0, "▁cafés": 1, "▁a": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    words = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_labels(words, words("cafés a b")["input_ids"]) == ["·cafés", "·a", "<unk>"]
