"""Generation: caches, search, and the computation that `hf_tfm.models.generation` saves."""

import copy

import pytest
import torch
from tiny_models import largest_difference, tiny_batch, tiny_model
from transformers import DynamicCache, EncoderDecoderCache, StaticCache
from transformers.modeling_outputs import BaseModelOutput

import hf_tfm.models.generation as generation
from hf_tfm.models.cache_names import CACHE_NAMES, cache_of
from hf_tfm.models.generation import SharedMemoryGenerationMixin

KINDS = pytest.mark.parametrize(
    "fields",
    [{}, {"norm_first": True}, {"position_embedding_type": "learned"}, {"attention_score": "additive"}],
    ids=["post-norm", "pre-norm", "learned", "additive"],
)


def source(rows: int = 5) -> dict:
    batch = tiny_batch(rows=rows, source=9)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def varied_model(**fields):
    """A model whose outputs vary and end at different lengths; with tied weights it would repeat its input."""
    model = tiny_model(tie_word_embeddings=False, **fields)
    torch.manual_seed(3)  # with some seeds all sentences end at the same length
    torch.nn.init.normal_(model.lm_head.weight)
    model.generation_config.eos_token_id = list(range(5, 48, 4))
    model.generation_config.pad_token_id = 0
    return model


def reference_greedy(model, batch: dict, max_new_tokens: int) -> torch.Tensor:
    """Minimal greedy search: no cache, one sentence at a time."""
    results = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids, row = ids[None, : mask.sum()], torch.tensor([[1]])
        while row.shape[1] <= max_new_tokens and row[0, -1] not in torch.tensor(model.generation_config.eos_token_id):
            token = model(input_ids=ids, decoder_input_ids=row).logits[:, -1].argmax(-1)
            row = torch.cat([row, token[:, None]], dim=1)
        results.append(row[0])
    return torch.nn.utils.rnn.pad_sequence(results, batch_first=True)


@KINDS
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_cached_equals_uncached(fields, static):
    """Three tokens at once, then single tokens; positions must continue after the cached ones."""
    model, batch = tiny_model(**fields), tiny_batch(target=8)
    del batch["decoder_attention_mask"]
    expected = model(**batch, use_cache=False).logits

    def cache():
        return StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache()

    past, ids = EncoderDecoderCache(cache(), cache()), batch.pop("decoder_input_ids")
    if static:  # the cross-attention cache has no unused slots, as in generate()
        past.cross_attention_cache = StaticCache(config=model.config, max_cache_len=7)
    got = []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 8)):
        output = model(**batch, decoder_input_ids=ids[:, start:stop], cache=past, use_cache=True)
        got.append(output.logits)
    assert cache_of(output) is past and past.get_seq_length() == 8
    assert largest_difference(torch.cat(got, dim=1), expected) < 1e-5


@torch.no_grad()
def test_encoder_output_is_projected_once():
    model, batch = tiny_model(), tiny_batch()
    calls = []
    model.get_decoder().layers[0].cross_attn.k_proj.register_forward_hook(lambda *_: calls.append(1))
    model.generate(**source(), max_new_tokens=6, min_new_tokens=6)
    assert len(calls) == 1
    model.generate(**source(), max_new_tokens=6, min_new_tokens=6, use_cache=False)
    assert len(calls) == 7
    assert cache_of(model(**batch, use_cache=False)) is None
    assert isinstance(cache_of(model(**batch)), EncoderDecoderCache)


@KINDS
def test_greedy_matches_the_reference(fields):
    model, batch = varied_model(**fields), source(rows=12)
    expected = reference_greedy(model, batch, 12)
    assert len({int(row.count_nonzero()) for row in expected}) > 2, "the sentences must end at different places"
    assert torch.equal(model.generate(**batch, max_new_tokens=12), expected)
    assert torch.equal(model.generate(**batch, max_new_tokens=12, use_cache=False), expected)


def test_greedy_drops_finished_sentences(monkeypatch):
    model, batch = varied_model(), source(rows=12)
    rows = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    short = model.generate(**batch, max_new_tokens=12)
    assert rows[0] == 12 and rows[-1] < 12 and rows == sorted(rows, reverse=True)
    rows.clear()
    monkeypatch.setattr(generation, "greedy_suits", lambda *_: False)
    assert torch.equal(model.generate(**batch, max_new_tokens=12), short)
    assert set(rows) == {12}, "transformers' loop computes all rows"


@pytest.mark.parametrize(
    "asked",
    [
        {"min_new_tokens": 5},
        {"min_length": 4},
        {"repetition_penalty": 2.5},
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": "those it says"},
        {"forced_eos_token_id": 9},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_logits_processors_work_with_fewer_rows(asked, monkeypatch):
    model, batch = varied_model(), source(rows=12)
    plain = model.generate(**batch, max_new_tokens=12)
    if "bad_words_ids" in asked:
        asked = {"bad_words_ids": [[plain[0, 1].item()], plain[1, 1:3].tolist()]}
    got = model.generate(**batch, max_new_tokens=12, **asked)
    assert got.shape != plain.shape or not torch.equal(got, plain)
    monkeypatch.setattr(generation, "greedy_suits", lambda *_: False)
    assert torch.equal(got, model.generate(**batch, max_new_tokens=12, **asked))


@pytest.mark.parametrize(
    "asked",
    [
        {"do_sample": True},
        {"return_dict_in_generate": True},
        {"exponential_decay_length_penalty": (2, 1.5)},
        {"logits_processor": [lambda ids, scores: scores]},
        {"stopping_criteria": [lambda ids, scores: torch.ones(len(ids), dtype=torch.bool)]},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"decoder_attention_mask": torch.ones(5, 1, dtype=torch.long)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_other_options_use_transformers_loop(asked, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("this call needs transformers' own loop")

    monkeypatch.setattr(generation, "greedy", refuse)
    varied_model().generate(**source(), max_new_tokens=4, **asked)


def test_greedy_with_a_prefix_and_up_to_the_last_token():
    model, batch = varied_model(), source(rows=3)
    prefix = torch.tensor([[1, 9, 8]]).expand(3, 3)
    arguments = {"decoder_input_ids": prefix, "max_new_tokens": 5}
    plain = model.generate(**batch, **arguments, use_cache=False)
    assert torch.equal(model.generate(**batch, **arguments), plain) and torch.equal(plain[:, :3], prefix)
    model.generation_config.eos_token_id = 3  # practically never
    assert model.generate(**batch, max_new_tokens=5).shape == (3, 6)
    assert model.generate(**batch, max_length=5).shape == (3, 5)


def repeated_memory(model):
    """The same weights with transformers' generation methods: the encoder output is repeated for each beam."""

    class Stock(type(model)):
        def _expand_inputs_for_generation(self, **inputs):
            return super(SharedMemoryGenerationMixin, self)._expand_inputs_for_generation(**inputs)

        def _reorder_cache(self, past_key_values, beam_idx):
            past_key_values.reorder_cache(beam_idx)
            return past_key_values

    stock = copy.deepcopy(model)
    stock.__class__ = Stock
    return stock


@KINDS
@pytest.mark.parametrize("length_penalty", [0.0, 0.6, 2.0])
def test_beams_share_the_encoder_output(fields, length_penalty):
    model, batch = varied_model(**fields), source(rows=6)
    arguments = {"num_beams": 4, "max_new_tokens": 10, "length_penalty": length_penalty, "num_return_sequences": 2}
    expected = repeated_memory(model).generate(**batch, **arguments)
    memory_rows = set()
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: memory_rows.add(len(kwargs["encoder_hidden_states"])), with_kwargs=True
    )
    assert torch.equal(model.generate(**batch, **arguments), expected) and expected.shape[0] == 12
    assert memory_rows == {6}


def test_beams_cached_equal_uncached_and_static():
    model, batch = varied_model(), source(rows=4)
    arguments = {"num_beams": 3, "max_new_tokens": 8}
    expected = model.generate(**batch, **arguments, use_cache=False)
    assert torch.equal(model.generate(**batch, **arguments), expected)
    assert torch.equal(model.generate(**batch, **arguments, cache_implementation="static"), expected)


def test_length_penalty_prefers_longer_sentences():
    model, batch = varied_model(), source(rows=12)
    lengths = [
        model.generate(**batch, num_beams=4, max_new_tokens=10, length_penalty=penalty).count_nonzero().item()
        for penalty in (-4.0, 4.0)
    ]
    assert lengths[0] < lengths[1]


def test_one_beam_equals_greedy_and_more_beams_score_no_worse():
    model, batch = varied_model(), source(rows=6)
    kept = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_scores": True, "length_penalty": 0.0}
    scores = model.generate(**batch, num_beams=8, **kept).sequences_scores
    greedy = model.generate(**batch, max_new_tokens=8)
    logits = model(**batch, decoder_input_ids=greedy).logits[:, :-1].log_softmax(-1)
    chosen = logits.gather(2, greedy[:, 1:, None])[..., 0].masked_fill(greedy[:, 1:] == 0, 0.0).sum(1)
    assert (scores >= chosen - 1e-4).float().mean() > 0.8


def test_static_cache_gives_the_same_tokens():
    model, batch = varied_model(), source()
    expected = model.generate(**batch, max_new_tokens=10)
    assert torch.equal(model.generate(**batch, max_new_tokens=10, cache_implementation="static"), expected)


def test_static_cache_larger_than_the_position_table():
    model, batch = tiny_model(max_position_embeddings=4), source()
    arguments = {"max_new_tokens": 9, "min_new_tokens": 9}
    assert torch.equal(
        model.generate(**batch, **arguments, cache_implementation="static"), model.generate(**batch, **arguments)
    )


def test_sampling():
    model, batch = varied_model(), source()
    arguments = {"do_sample": True, "max_new_tokens": 8, "num_return_sequences": 3, "top_k": 20}
    results = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        results.append(model.generate(**batch, **arguments))
    assert results[0].shape[0] == 15 and torch.equal(results[0], results[1])
    assert results[0].shape != results[2].shape or not torch.equal(results[0], results[2])
    assert not torch.equal(results[0][0], results[0][1]), "samples of a sentence differ"
    torch.manual_seed(0)
    assert torch.equal(repeated_memory(model).generate(**batch, **arguments), results[0])


def test_returned_cache_has_a_row_per_beam():
    model, batch = varied_model(), source(rows=2)
    output = model.generate(**batch, num_beams=3, max_new_tokens=4, return_dict_in_generate=True)
    cache = cache_of(output)
    own, cross = cache.self_attention_cache, cache.cross_attention_cache
    assert own.layers[0].keys.shape[0] == cross.layers[0].keys.shape[0] == cross.layers[1].values.shape[0] == 6


def test_generation_from_encoder_outputs():
    model, batch = varied_model(), source()
    memory = model.get_encoder()(**batch)
    expected = model.generate(**batch, max_new_tokens=8)
    given = {"encoder_outputs": BaseModelOutput(memory.last_hidden_state), "attention_mask": batch["attention_mask"]}
    assert torch.equal(model.generate(**given, max_new_tokens=8), expected)


def test_attention_maps_of_a_generation():
    model, batch = varied_model(), source(rows=2)
    output = model.generate(
        **batch, num_beams=3, max_new_tokens=4, return_dict_in_generate=True, output_attentions=True
    )
    assert output.cross_attentions[0][0].shape == (6, 4, 1, 9)
    assert output.encoder_attentions[0].shape == (2, 4, 9, 9)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_both_cache_argument_names_are_accepted():
    """transformers calls the cache ``cache`` since 5.24 and ``past_key_values`` before; a model accepts either."""
    model, batch = tiny_model(), tiny_batch()
    logits = []
    for name in CACHE_NAMES:
        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        logits.append(model(**batch, **{name: past}, use_cache=True).logits)
        assert past.get_seq_length() == batch["decoder_input_ids"].shape[1]
    assert torch.equal(*logits)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(**batch, **dict.fromkeys(CACHE_NAMES, past))
