"""Uses of `generate` by other code: replaced methods, continuous batching, out-of-range options."""

import pytest
import torch
from every_class import inputs_of, tiny
from torch import nn
from transformers import ContinuousBatchingConfig, GenerationConfig

import hf_tfm.models.generation as generation

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [20]]


def varied_model(name: str, **fields):
    """A model whose greedy output does not repeat one token."""
    model = tiny(name, tie_word_embeddings=False, **fields)
    nn.init.normal_(model.lm_head.weight)
    return model


def source(name: str, rows: int = 3) -> dict:
    inputs = inputs_of(name, rows)
    inputs.pop("decoder_input_ids", None)
    return inputs


def replace_ids(model, name):
    """A `prepare_inputs_for_generation` that replaces the last token."""
    own = model.prepare_inputs_for_generation

    def prepare(*args, **kwargs):
        inputs = own(*args, **kwargs)
        key = "decoder_input_ids" if name in ("transformer", "rnn_seq2seq") else "input_ids"
        return {**inputs, key: torch.full_like(inputs[key], 7)}

    return prepare


def on_the_instance(model, name):
    model.prepare_inputs_for_generation = replace_ids(model, name)
    return model


def in_a_subclass(model, name):
    prepare = replace_ids(model, name)

    class Subclass(type(model)):
        def prepare_inputs_for_generation(self, *args, **kwargs):
            return prepare(*args, **kwargs)

    model.__class__ = Subclass
    return model


@pytest.mark.parametrize("replace", [on_the_instance, in_a_subclass])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["gpt", "transformer"])
def test_replaced_method_is_used(name, beams, replace, monkeypatch):
    """The output equals that of transformers' own loop, in which the encoder output is repeated for each beam."""
    model, asked = varied_model(name), {"max_new_tokens": 6, "num_beams": beams}
    plain = model.generate(**source(name), **asked)
    model = replace(model, name)
    found = model.generate(**source(name), **asked)
    assert not torch.equal(found, plain)
    monkeypatch.setattr(generation, "greedy_suits", lambda *_: False)
    assert torch.equal(model.generate(**source(name), **asked), found)


@pytest.mark.parametrize("name", ["gpt", "transformer"])
def test_positional_arguments(name):
    """In the order of transformers' `generate`."""
    model, asked = varied_model(name), GenerationConfig(max_new_tokens=4, do_sample=False, pad_token_id=0)
    given = source(name)
    ids = given.pop("input_ids")
    by_name = model.generate(input_ids=ids, generation_config=asked, **given)
    assert torch.equal(model.generate(ids, asked, None, **given), by_name)


@pytest.mark.parametrize("step", generation.STEPS)
def test_replaced_methods_disable_the_fast_path(step, monkeypatch):
    model = varied_model("gpt")
    assert generation.keeps_steps(model)
    if not hasattr(model, step):
        pytest.skip(f"the installed transformers has no {step}")
    if hasattr(getattr(model, step), "__func__"):
        setattr(model, step, getattr(model, step))
        assert generation.keeps_steps(model), "the same method"
    setattr(model, step, lambda *args, **kwargs: None)
    assert not generation.keeps_steps(model)


@pytest.mark.client(
    "continuous batching: generate_batch", "transformers", family="gpt", others="decoder-only models only"
)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_continuous_batching(implementation):
    model = varied_model("gpt")
    model.set_attn_implementation(implementation)
    asked = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    expected = [
        model.generate(torch.tensor([ids]), generation_config=asked)[0, len(ids) :].tolist() for ids in PROMPTS
    ]
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)  # by default it allocates most of the memory
    output = model.generate_batch(inputs=PROMPTS, generation_config=asked, continuous_batching_config=small)
    assert [request.generated_tokens for request in output.values()] == expected
    assert len({tuple(text) for text in expected}) == 3


def test_continuous_batching_respects_the_position_limit():
    """Like `generate`; the last token needs no position."""
    model = varied_model("gpt")
    most = model.config.max_position_embeddings
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    asked = GenerationConfig(max_new_tokens=8, do_sample=False, eos_token_id=2, pad_token_id=0)
    long = [5] * (most - 7)
    for ids, new in ((long, 8), ([5] * most, 1)):
        options = {"generation_config": asked, "max_new_tokens": new}
        expected = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
        (found,) = model.generate_batch([ids], continuous_batching_config=small, **options).values()
        assert found.generated_tokens == expected
    limit = f"max_position_embeddings is {most}"
    for prompts, new in (([[5], [*long, 5]], None), ([[5, 6]], most), ([[5] * (most + 1)], 1)):
        with pytest.raises(ValueError, match=limit):
            model.generate_batch(prompts, asked, continuous_batching_config=small, max_new_tokens=new)
        with pytest.raises(ValueError, match=limit):
            model.generate(torch.tensor(prompts[-1:]), asked, max_new_tokens=new or 8)
    with pytest.raises(ValueError, match="no tokens"):
        model.generate_batch([[5], []], asked, continuous_batching_config=small)
    with pytest.raises(ValueError, match="max_new_tokens must be"):
        model.generate_batch([[5]], asked, continuous_batching_config=small, max_new_tokens=0)


def test_manager_requests_respect_the_position_limit():
    model = varied_model("gpt")
    most = model.config.max_position_embeddings
    endless = GenerationConfig(do_sample=False, pad_token_id=0, max_new_tokens=None)
    small = ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=32)
    with model.continuous_batching_context_manager(endless, continuous_batching_config=small) as manager:
        with pytest.raises(ValueError, match=f"max_position_embeddings is {most}"):
            manager.add_request([5] * 3, max_new_tokens=most)
        with pytest.raises(ValueError, match=f"max_position_embeddings is {most}"):
            manager.add_request([5] * 3, None, most)
        manager.add_requests([[5] * (most - 3)])  # without a limit, generation stops at the last position
        found = manager.get_result(timeout=60)
    assert len(found.generated_tokens) == 4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("num_beams", 0),
        ("num_beams", -1),
        ("num_beams", 2.5),
        ("num_return_sequences", 0),
        ("max_new_tokens", 0),
        ("max_new_tokens", -3),
        ("max_length", 0),
        ("min_length", -1),
        ("min_new_tokens", -1),
        ("no_repeat_ngram_size", -1),
    ],
)
@pytest.mark.parametrize("name", ["gpt", "transformer"])
def test_out_of_range_options(name, option, value):
    with pytest.raises(ValueError, match=option):
        varied_model(name).generate(**source(name), **{option: value})


@pytest.mark.parametrize("name", ["gpt", "transformer"])
@pytest.mark.parametrize("shape", [(0, 4), (2, 0)])
def test_empty_batches_are_refused(name, shape):
    ids = torch.zeros(shape, dtype=torch.long)
    model = varied_model(name)
    for given in ({"input_ids": ids}, {"inputs": ids}):
        with pytest.raises(ValueError, match=r"must not be empty, got shape \("):
            model.generate(**given, max_new_tokens=3)


@pytest.mark.parametrize("beams", [1, 2])
def test_text_longer_than_the_positions_is_refused(beams):
    """The last token is never read, so one token more than `max_position_embeddings` = 24 is possible."""
    model, ids = varied_model("gpt"), torch.randint(5, 48, (2, 9))
    model.generation_config.eos_token_id = None
    assert model.generate(ids, max_new_tokens=16, num_beams=beams).shape == (2, 25)
    with pytest.raises(ValueError, match=r"max_new_tokens = 17 .* max_position_embeddings is 24"):
        model.generate(ids, max_new_tokens=17, num_beams=beams)
    with pytest.raises(ValueError, match=r"max_length = 26 .* max_position_embeddings is 24"):
        model.generate(ids, max_length=26, num_beams=beams)
    assert model.generate(ids, num_beams=beams).shape == (2, 24), "the default length ends there"
    with pytest.raises(ValueError, match=r"the prompt has 24 tokens.* max_position_embeddings is 24"):
        model.generate(torch.randint(5, 48, (1, 24)), num_beams=beams)


def test_left_padding_uses_no_positions():
    model, ids = varied_model("gpt"), torch.randint(5, 48, (2, 9))
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    mask[:, :3] = 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=19)
    assert padded.shape == (2, 28) and torch.equal(padded[:, 9:], model.generate(ids[:, 3:], max_new_tokens=19)[:, 6:])
    with pytest.raises(ValueError, match="max_new_tokens = 20"):
        model.generate(ids, attention_mask=mask, max_new_tokens=20)


@pytest.mark.parametrize("kind", ["learned", "sinusoidal"])
def test_translation_longer_than_the_positions_is_refused(kind):
    model = varied_model("transformer", position_embedding_type=kind)
    model.generation_config.eos_token_id = None
    assert model.generate(**source("transformer"), max_new_tokens=24).shape == (3, 25)
    if kind == "sinusoidal":
        assert model.generate(**source("transformer"), max_new_tokens=30).shape == (3, 31)
        return
    with pytest.raises(ValueError, match=r"max_new_tokens = 25 .* max_position_embeddings is 24"):
        model.generate(**source("transformer"), max_new_tokens=25)
