"""Arguments and fields specific to BERT and GPT, and refused input."""

import pytest
import torch
from tiny_models import largest_difference
from tiny_text import GPT, TINY, main_output, text_batch, tiny_text
from transformers import DynamicCache

import hf_tfm
from hf_tfm.models.cross_entropy import IGNORE_INDEX


@torch.no_grad()
@pytest.mark.parametrize("name", ["causal", "post-norm"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_cache_does_not_change_the_output(name, backend):
    model, ids = tiny_text(name), text_batch(name)["input_ids"][:1].repeat(2, 1)
    model.set_attn_implementation(backend)
    expected = model(ids).logits
    cache, found = DynamicCache(), []
    for part in ids.split([4, 1, 3, 1], dim=1):
        found.append(model(part, cache=cache, use_cache=True).logits)
    assert largest_difference(torch.cat(found, dim=1), expected) < 1e-5
    assert cache.get_seq_length() == 9


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_left_padding_does_not_change_the_output(beams):
    model = tiny_text("causal")
    arguments = {"max_new_tokens": 6, "do_sample": False, "num_beams": beams}
    short, long = torch.tensor([[7, 8, 9]]), torch.tensor([[5, 6, 7, 8, 9]])
    padded = torch.tensor([[0, 0, 7, 8, 9], [5, 6, 7, 8, 9]])
    both = model.generate(padded, attention_mask=(padded > 0).long(), **arguments)
    for row, alone, start in ((0, short, 2), (1, long, 0)):
        got = model.generate(alone, attention_mask=torch.ones_like(alone), **arguments)[0]
        assert torch.equal(both[row, start : start + len(got)], got)


@torch.no_grad()
@pytest.mark.parametrize("name", ["causal", "post-norm"])
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_packed_texts(name, backend):
    """Where positions restart, tokens do not attend to earlier ones: each text has the logits it has alone."""
    model = tiny_text(name)
    model.set_attn_implementation(backend)
    texts = [torch.randint(3, 48, (1, n), generator=torch.Generator().manual_seed(n)) for n in (5, 1, 8)]
    places = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    packed = model(torch.cat(texts, dim=1), position_ids=places, use_cache=False).logits
    expected = torch.cat([model(text).logits for text in texts], dim=1)
    assert largest_difference(packed, expected) < 1e-5
    running = model(torch.cat(texts, dim=1), use_cache=False).logits
    assert largest_difference(running[:, 5:], expected[:, 5:]) > 0.01


@pytest.mark.parametrize("return_logits", [True, False])
def test_shifted_labels(return_logits):
    model, inputs = tiny_text("causal"), text_batch("causal", loss=True)
    labels = inputs.pop("labels")
    expected = model(**inputs, labels=labels, return_logits=return_logits).loss
    moved = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], IGNORE_INDEX)], dim=1)
    for given in ({"shift_labels": moved}, {"labels": torch.zeros_like(labels), "shift_labels": moved}):
        assert model(**inputs, **given, return_logits=return_logits).loss.item() == pytest.approx(expected.item())
    items = int((moved != IGNORE_INDEX).sum())
    halved = model(**inputs, labels=labels, num_items_in_batch=2 * items, return_logits=return_logits).loss
    assert halved.item() == pytest.approx(expected.item() / 2, rel=1e-5)


@pytest.mark.parametrize("name", ["masked", "pretraining"])
def test_logits_in_training(name):
    """``training_logits=False`` leaves them out in training with labels, and nowhere else."""
    model, inputs = tiny_text(name, training_logits=False), text_batch(name, loss=True)

    def logits(**options):
        output = model(**{**inputs, **options})
        return output.prediction_logits if name == "pretraining" else output.logits

    assert logits() is not None
    model.train()
    assert logits() is None and logits(return_logits=True) is not None and logits(labels=None) is not None


@torch.no_grad()
def test_logits_of_the_last_tokens_only():
    model, inputs = tiny_text("causal"), text_batch("causal")
    whole = model(**inputs).logits
    assert torch.allclose(model(**inputs, logits_to_keep=2).logits, whole[:, -2:], atol=1e-6)
    places = torch.tensor([0, 5])
    assert torch.allclose(model(**inputs, logits_to_keep=places).logits, whole[:, places], atol=1e-6)


@torch.no_grad()
def test_classifier_reads_the_last_token_with_any_padding():
    model, ids = tiny_text("causal-classifier"), torch.randint(3, 48, (1, 6))
    expected = model(ids, attention_mask=torch.ones_like(ids)).logits
    nothing = torch.zeros(1, 3, dtype=torch.long)
    right, left = torch.cat([ids, nothing], dim=1), torch.cat([nothing, ids], dim=1)
    assert largest_difference(model(right, attention_mask=(right > 0).long()).logits, expected) < 1e-5
    assert largest_difference(model(right).logits, expected) < 1e-5  # found by pad_token_id
    places = ((left > 0).cumsum(dim=1) - 1).clamp_min(0)
    found = model(left, attention_mask=(left > 0).long(), position_ids=places).logits
    assert largest_difference(found, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["pretraining", "masked"])
def test_segments_and_positions(name):
    model, inputs = tiny_text(name), text_batch(name)
    expected = main_output(model(**inputs))
    segments = inputs.pop("token_type_ids")
    felt = largest_difference(main_output(model(**inputs, token_type_ids=1 - segments)), expected)
    assert (felt > 0.01) == (name == "pretraining"), "a model without segments ignores them"
    given = {**inputs, "token_type_ids": segments}
    assert torch.equal(main_output(model(**given, position_ids=torch.arange(9)[None])), expected)
    moved = main_output(model(**given, position_ids=torch.arange(9)[None] + 3))
    assert largest_difference(moved, expected) > 0.01
    embedded = model.get_input_embeddings()(given.pop("input_ids"))
    assert torch.equal(main_output(model(inputs_embeds=embedded, **given)), expected)


@torch.no_grad()
def test_poolers():
    states = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(0))
    found = {}
    for pooler in ("tanh", "relu", "tanh_relu"):
        model = tiny_text("classifier", pooler=pooler).bert
        found[pooler] = model.pooler(states)
        dense = model.pooler.dense(states[:, 0])
        expected = {"tanh": dense.tanh(), "relu": dense.relu(), "tanh_relu": dense.tanh().relu()}[pooler]
        assert torch.equal(found[pooler], expected)
    assert found["tanh"].min() < 0 == found["relu"].min() == found["tanh_relu"].min()
    assert tiny_text("tagger", pooler="none").bert.pooler is None


@pytest.mark.parametrize(
    ("config_class", "fields", "message"),
    [
        (hf_tfm.TfmBertConfig, {"hidden_size": 30}, "hidden_size must be a multiple of 4 for num_attention_heads"),
        (hf_tfm.TfmBertConfig, {"pooler": "mean"}, 'pooler must be one of tanh, relu, tanh_relu, none, got "mean"'),
        (hf_tfm.TfmBertConfig, {"hidden_act": "glue"}, 'hidden_act must be one of .*, got "glue"'),
        (hf_tfm.TfmBertConfig, {"type_vocab_size": -1}, "type_vocab_size must be at least 0, got -1"),
        (hf_tfm.TfmBertConfig, {"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        (hf_tfm.TfmBertConfig, {"classifier_dropout": 1.0}, r"classifier_dropout must be in \[0, 1\), got 1.0"),
        (hf_tfm.TfmGPTConfig, {"classifier_dropout": 1.0}, r"classifier_dropout must be in \[0, 1\), got 1.0"),
        (hf_tfm.TfmBertConfig, {"layer_norm_eps": "small"}, "layer_norm_eps"),
        (hf_tfm.TfmGPTConfig, {"hidden_size": 30}, "hidden_size must be a multiple of 4 for num_attention_heads"),
        (hf_tfm.TfmGPTConfig, {"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        (hf_tfm.TfmGPTConfig, {"activation_dropout": -0.1}, r"activation_dropout must be in \[0, 1\), got -0.1"),
    ],
)
def test_errors_of_configurations_name_field_and_value(config_class, fields, message):
    plain = TINY if config_class is hf_tfm.TfmBertConfig else GPT
    with pytest.raises(Exception, match=message) as caught:
        config_class(**{**plain, **fields})
    assert isinstance(caught.value, ValueError) or isinstance(caught.value.__cause__, (ValueError, TypeError))


@pytest.mark.parametrize("config_class", [hf_tfm.TfmBertConfig, hf_tfm.TfmGPTConfig])
def test_unknown_size(config_class):
    with pytest.raises(ValueError, match=r'size must be one of tiny, .*, got "giant"'):
        config_class.of_size("giant")


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("masked", {}, "give exactly one of input_ids and inputs_embeds"),
        ("causal", {}, "give exactly one of input_ids and inputs_embeds"),
        (
            "masked",
            {"input_ids": torch.ones(1, 41, dtype=torch.long)},
            "has 41 tokens, but max_position_embeddings is",
        ),
        ("causal", {"input_ids": torch.ones(1, 41, dtype=torch.long)}, "reaches 41 tokens, but max_position_embed"),
        (
            "causal-classifier",
            {"inputs_embeds": torch.ones(1, 4, 32), "labels": torch.tensor([0]), "language_weight": 0.5},
            "language_weight needs input_ids",
        ),
    ],
)
def test_invalid_inputs_are_refused(name, given, message):
    with pytest.raises(ValueError, match=message):
        tiny_text(name)(**given)


@pytest.mark.parametrize(
    "model_class",
    [hf_tfm.TfmBertForPreTraining, hf_tfm.TfmBertForSequenceClassification, hf_tfm.TfmBertForMultipleChoice],
)
def test_heads_that_need_a_pooler_raise_without_one(model_class):
    with pytest.raises(ValueError, match="pooler"):
        model_class(hf_tfm.TfmBertConfig(**TINY, pooler="none"))


def test_gpt1_has_dropout_before_its_classifier():
    """Section 4.1 of Radford et al. 2018; and none of its 40,478 tokens ends a text."""
    config = hf_tfm.TfmGPTConfig.of_size("gpt1")
    assert config.classifier_dropout == 0.1 and hf_tfm.TfmGPTConfig().classifier_dropout == 0.0
    assert config.bos_token_id is None and config.eos_token_id is None
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "vocab_size": 60, "pad_token_id": 0}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf_tfm.TfmGPTConfig.of_size("gpt1", **still, **sizes)
    model = hf_tfm.TfmGPTForSequenceClassification(config).train()
    ids = torch.arange(5, 13).repeat(50, 1)  # 800 features: the chance that none is dropped is 1e-37
    first, second = (model(ids).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(model.eval()(ids).logits, model(ids).logits)
