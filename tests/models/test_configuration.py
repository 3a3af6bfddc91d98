"""Sizes, parameter counts and validation of `TfmTransformerConfig`."""

import pytest
import torch
from tiny_models import tiny_config

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration


def closed_form(config: TfmTransformerConfig) -> int:
    """Parameters, counted by hand from figure 1 and sections 3.2 to 3.4."""
    D, F = config.hidden_size, config.intermediate_size
    attention = 4 * (D * D + D)
    feed_forward = 2 * D * F + F + D
    norm = 2 * D
    encoder_block = attention + feed_forward + 2 * norm
    decoder_block = 2 * attention + feed_forward + 3 * norm
    total = config.vocab_size * D + config.num_encoder_layers * encoder_block
    return total + config.num_decoder_layers * decoder_block


def count(config: TfmTransformerConfig) -> int:
    with torch.device("meta"):
        model = TfmTransformerForConditionalGeneration(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("size", "millions"), [("base", 65), ("big", 213)])
def test_published_parameter_counts(size, millions):
    """Table 3, within 3 %: for "about 37000 tokens"; a thousand tokens more are 0.5 M (base) and 1 M (big)."""
    config = TfmTransformerConfig.of_size(size, vocab_size=37_000)
    assert count(config) == closed_form(config)
    assert count(config) == pytest.approx(millions * 1e6, rel=0.03)


def test_tiny_parameter_count():
    """Wu et al. 2021, table 2: 2.6 M for Transformer-Tiny with their en-de vocabulary of 9,716."""
    config = TfmTransformerConfig.of_size("tiny", vocab_size=9_716)
    assert count(config) == closed_form(config) == pytest.approx(2.6e6, rel=0.03)


def test_parameters_of_options():
    D, H = 32, 4
    plain = count(tiny_config())
    assert count(tiny_config(norm_first=True)) == plain + 2 * 2 * D  # one more norm per stack
    assert count(tiny_config(position_embedding_type="learned")) == plain + 2 * 40 * D  # one table per stack
    assert count(tiny_config(tie_word_embeddings=False)) >= plain + 48 * D
    assert count(tiny_config(attention_score="additive")) == plain + 6 * D  # a vector per attention module
    assert count(tiny_config(decoding="mask_predict", max_length_offset=3)) == plain + (D + 1) * 7
    assert plain == count(tiny_config(num_attention_heads=H // 2))


def test_size_can_be_combined_with_other_fields():
    config = TfmTransformerConfig.of_size("base", dropout=0.3, vocab_size=100)
    assert (config.hidden_size, config.dropout, config.vocab_size) == (512, 0.3, 100)
    assert TfmTransformerConfig.of_size("base").dropout == 0.1


def test_unknown_size_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match='size must be one of tiny, base, big, got "huge"'):
        TfmTransformerConfig.of_size("huge")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30}, "hidden_size must be a multiple of 4 for num_attention_heads, got 30"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"dropout": 1.5}, r"dropout must be in \[0, 1\), got 1.5"),
        ({"label_smoothing": -0.1}, r"label_smoothing must be in \[0, 1\), got -0.1"),
        ({"attention_score": "cosine"}, 'attention_score must be one of dot_product, additive, got "cosine"'),
        ({"position_embedding_type": "relative"}, 'position_embedding_type must be one of .*, got "relative"'),
        ({"decoding": "diffusion"}, 'decoding must be one of .*, got "diffusion"'),
        ({"decoding": "mask_predict", "mask_token_id": None}, "needs mask_token_id, got None"),
        ({"hidden_act": "sine"}, 'hidden_act must be one of .*, got "sine"'),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"num_encoder_layers": 2.5}, "num_encoder_layers"),
        ({"num_decoder_layers": 0}, "num_decoder_layers must be at least 1, got 0"),
        (
            {"decoding": "mask_predict", "mask_token_id": 48},
            r"mask_token_id must be in \[0, vocab_size = 48\), got 48",
        ),
        ({"max_position_embeddings": 0}, "max_position_embeddings must be at least 1, got 0"),
        ({"max_length_offset": -1}, "max_length_offset must be at least 0, got -1"),
        ({"position_embedding_type": "floater", "floater_scope": "first"}, "floater_scope must be one of all, input"),
        ({"position_embedding_type": "floater", "floater_step": 0.0}, "floater_step must be a finite number above 0"),
        ({"position_embedding_type": "floater", "floater_hidden_size": 0}, "floater_hidden_size must be at least 1"),
        ({"position_embedding_type": "rotary", "hidden_size": 36}, "an even hidden_size / num_attention_heads, got 9"),
        (
            {"position_embedding_type": "rotary", "attention_score": "additive"},
            'rotary" needs attention_score="dot_product", got "additive"',
        ),
    ],
)
def test_errors_name_field_and_value(fields, message):
    with pytest.raises(Exception, match=message) as raised:
        tiny_config(**fields)
    assert isinstance(raised.value, ValueError | TypeError) or "Validation" in type(raised.value).__name__
