"""Positions: the paper's formula, unlimited or clearly limited lengths, and offsets from a cache."""

import math

import pytest
import torch
from tiny_models import largest_difference, tiny_batch, tiny_config, tiny_model
from torch import nn
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from hf_tfm.models.positions import SinusoidTable, sinusoidal
from hf_tfm.models.sequence_positions import LearnedPositions


@pytest.mark.parametrize("dim", [8, 10, 7])
def test_formula_of_the_paper_up_to_feature_order(dim):
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)), PE(pos, 2i+1) = cos(...); ours has all sines first."""
    paper = torch.empty(50, dim, dtype=torch.float64)
    for position in range(50):
        for feature in range(dim):
            angle = position / 10000 ** (2 * (feature // 2) / dim)
            paper[position, feature] = math.cos(angle) if feature % 2 else math.sin(angle)
    order = [*range(0, dim, 2), *range(1, dim, 2)]
    torch.testing.assert_close(sinusoidal(torch.arange(50), dim).double(), paper[:, order], rtol=0, atol=1e-7)


def test_large_positions_are_exact():
    position = 20_000
    expected = [math.sin(position / 10000 ** (2 * i / 16)) for i in range(8)]
    assert sinusoidal(torch.tensor([position]), 16)[0, :8].tolist() == pytest.approx(expected, abs=1e-7)


def test_sinusoidal_positions_extend_beyond_their_table():
    short, long = SinusoidTable(10, 16), SinusoidTable(30, 16)
    positions = torch.arange(25)
    assert torch.equal(short(positions, 25), long(positions, 25))
    assert torch.equal(short(positions), long(positions))
    assert torch.equal(short(positions[:10], 10), short.table)


def test_learned_positions_refuse_larger_ones():
    positions = LearnedPositions(tiny_config(max_position_embeddings=10), 2)
    assert positions(torch.arange(10), 10).shape == (10, 32)
    with pytest.raises(ValueError, match=r"reaches position 10, .* max_position_embeddings - 1 = 9"):
        positions(torch.arange(11), 11)


def test_long_input_of_a_model():
    batch = tiny_batch(source=12)
    short = tiny_model(max_position_embeddings=5)
    assert largest_difference(short(**batch).logits, tiny_model(max_position_embeddings=50)(**batch).logits) == 0
    with pytest.raises(ValueError, match="reaches position 11"):
        tiny_model(position_embedding_type="learned", max_position_embeddings=5)(**batch)


@pytest.mark.parametrize("static", [False, True])
def test_learned_positions_refuse_a_long_cache(static):
    model = tiny_model(position_embedding_type="learned", max_position_embeddings=7)
    source = tiny_batch()["input_ids"]

    def cache():
        return StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache()

    past = EncoderDecoderCache(cache(), cache())
    step = {"input_ids": source, "cache": past, "use_cache": True}
    for _ in range(7):
        model(**step, decoder_input_ids=source[:, :1])
    with pytest.raises(ValueError, match="reaches position 7"):
        model(**step, decoder_input_ids=source[:, :1])


@pytest.mark.parametrize("kind", ["sinusoidal", "learned"])
def test_output_depends_on_position(kind):
    model = tiny_model(position_embedding_type=kind)
    ids = torch.full((1, 6), 9)
    hidden = model.get_encoder()(input_ids=ids).last_hidden_state[0]
    assert torch.pdist(hidden).min() > 1e-3


def test_both_stacks_start_at_position_0():
    model = tiny_model(scale_embedding=False)
    embedding = model.get_encoder().embedding
    ids = torch.tensor([[9, 9]])
    expected = embedding.tokens.weight[[9, 9]] + sinusoidal(torch.arange(2), 32)
    torch.testing.assert_close(embedding(ids)[0], expected)
    torch.testing.assert_close(
        embedding(ids, offset=3)[0], expected - sinusoidal(torch.arange(2), 32) + sinusoidal(torch.tensor([3, 4]), 32)
    )


def test_tables_are_not_parameters_and_not_saved():
    model = tiny_model()
    assert not any("positions" in name for name in model.state_dict())
    assert isinstance(tiny_model(position_embedding_type="learned").get_encoder().embedding.positions, nn.Embedding)
