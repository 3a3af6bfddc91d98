"""A user's function, registered as an attention backend, is called by every layer of every family."""

import pytest
import torch
from every_class import FAMILIES, inputs_of, tiny
from test_called_layers import assert_same, outputs_of
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from hf_tfm.models.attention import AttentionLayer

NAME = "users_own"
# Those of rnn_seq2seq are attention scores of its own, between states of size 1 x D.
WITH_ATTENTION = [name for name in FAMILIES if name not in ("faster_rcnn", "rnn_seq2seq", "convlstm")]


@pytest.fixture
def calls():
    seen = []

    def attend(module, query, key, value, attention_mask, **kwargs):
        seen.append(module)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    yield seen
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(NAME)


@pytest.mark.client("custom AttentionInterface", "transformers")
@pytest.mark.parametrize("name", [*FAMILIES, "detr-panoptic", "vit-backbone"])
def test_function_is_called_and_the_output_is_equal(name, calls):
    model = tiny(name)
    expected = outputs_of(model, name)
    model.set_attn_implementation(NAME)
    found = outputs_of(model, name)
    layers = [module for module in model.modules() if isinstance(module, AttentionLayer)]
    assert {id(module) for module in calls} == {id(module) for module in layers} and len(calls) == len(layers)
    assert_same(found, expected)


@pytest.mark.client("custom AttentionInterface", "transformers")
@pytest.mark.parametrize("name", ["transformer", "bert", "gpt"])
def test_padding_mask_reaches_the_function(name, calls):
    model, inputs = tiny(name), inputs_of(name)
    inputs["attention_mask"][1, 6:] = 0
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation(NAME)
        found = model(**inputs).logits
    assert calls
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=1e-5)
    seen = slice(0, 6) if name == "gpt" else slice(None)  # logits at padding do not matter
    torch.testing.assert_close(found[1][seen], expected[1][seen], rtol=0, atol=1e-5)


@pytest.mark.client("custom AttentionInterface", "transformers")
@pytest.mark.parametrize("name", ["transformer", "gpt"])
def test_generation_calls_the_function(name, calls):
    model, inputs = tiny(name), inputs_of(name)
    inputs.pop("decoder_input_ids", None)
    expected = model.generate(**inputs, max_new_tokens=5)
    model.set_attn_implementation(NAME)
    assert torch.equal(model.generate(**inputs, max_new_tokens=5), expected)
    assert len(calls) >= 2 * 5


@pytest.mark.client("custom AttentionInterface", "transformers")
@pytest.mark.parametrize("name", WITH_ATTENTION)
def test_another_function_changes_the_output(name, calls):
    """The function is not ignored: attention that does not mix values changes the output."""
    model = tiny(name)
    expected = outputs_of(model, name)
    AttentionInterface.register(
        NAME, lambda module, query, *rest, **kwargs: (torch.zeros_like(query).transpose(1, 2), None)
    )
    model.set_attn_implementation(NAME)
    found = outputs_of(model, name)
    key = next(iter(found))
    assert (found[key] - expected[key]).abs().max() > 1e-4
