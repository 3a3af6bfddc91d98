"""Attention: backends, attention maps, masks and the additive score."""

import pytest
import torch
from tiny_models import largest_difference, tiny_batch, tiny_config, tiny_model
from torch import nn

from hf_tfm import TfmTransformerForConditionalGeneration
from hf_tfm.models.attention import MultiHeadAttention

BACKENDS = ["eager", "sdpa", "flex_attention"]


@pytest.fixture(scope="module")
def batch():
    return tiny_batch()


def with_backend(name: str, **fields) -> TfmTransformerForConditionalGeneration:
    model = tiny_model(**fields)
    model.set_attn_implementation(name)
    return model


@pytest.mark.parametrize("decoding", ["autoregressive", "mask_predict"])
@pytest.mark.parametrize("backend", ["sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
@torch.no_grad()  # flex attention has no backward on a CPU
def test_backends_agree(backend, decoding, batch):
    expected = with_backend("eager", decoding=decoding)(**batch).logits
    got = with_backend(backend, decoding=decoding)(**batch).logits
    real = batch["decoder_attention_mask"].bool()
    assert largest_difference(got[real], expected[real]) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_with_every_backend(backend, batch):
    """With output_attentions a model returns maps and the same logits, and keeps its backend afterwards."""
    model = with_backend(backend)
    plain = with_backend("eager")(**batch)
    output = model(**batch, output_attentions=True)
    real = batch["decoder_attention_mask"].bool()
    assert largest_difference(output.logits[real], plain.logits[real]) < 1e-5
    B, S, T, H = 4, 7, 6, 4
    for maps, shape, mask in (
        (output.encoder_attentions, (B, H, S, S), batch["attention_mask"]),
        (output.decoder_attentions, (B, H, T, T), batch["decoder_attention_mask"]),
        (output.cross_attentions, (B, H, T, S), batch["attention_mask"]),
    ):
        assert len(maps) == 2
        for probabilities in maps:
            assert probabilities.shape == shape
            torch.testing.assert_close(probabilities.sum(dim=-1), torch.ones(shape[:-1]))
            hidden = probabilities.masked_select((mask == 0)[:, None, None])
            assert hidden.max() == 0, "padding is looked at"
    future = torch.ones(T, T, dtype=torch.bool).triu(1)
    assert output.decoder_attentions[0].masked_select(future).max() == 0
    assert model.config._attn_implementation == backend
    assert plain.cross_attentions is None


def test_maps_requested_by_the_configuration(batch):
    model = tiny_model(attn_implementation="eager")
    model.config.output_attentions = True
    assert len(model(**batch).cross_attentions) == 2
    assert model(**batch, output_attentions=False).cross_attentions is None


def test_failing_call_restores_the_backend(batch):
    model = with_backend("sdpa")

    def fail(*args):
        raise RuntimeError("stop")

    handle = model.get_decoder().layers[0].register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(**batch, output_attentions=True)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    assert model(**batch).cross_attentions is None


def test_returned_maps_are_the_applied_ones(batch):
    """Mixing the values by the returned maps gives the sublayer's output."""
    model = tiny_model()
    attention = model.get_decoder().layers[1].cross_attn
    seen = {}

    def keep(module, args, kwargs, output):
        seen["memory"], seen["output"] = args[1], output

    attention.register_forward_hook(keep, with_kwargs=True)
    model(**batch, output_attentions=True)
    mixed, maps = seen["output"]
    value = attention.v_proj(seen["memory"]).view(4, 7, 4, 8).transpose(1, 2)
    expected = attention.out_proj((maps @ value).transpose(1, 2).reshape(4, 6, 32))
    torch.testing.assert_close(mixed, expected, rtol=0, atol=1e-6)


def test_scores_are_scaled():
    """Equation 1 by hand; with head width 8, omitting the scale changes the maps."""
    torch.manual_seed(0)
    attention = MultiHeadAttention(tiny_config(attn_implementation="eager"))
    hidden = torch.randn(2, 5, 32)
    query, key = (
        projection(hidden).view(2, 5, 4, 8).transpose(1, 2) for projection in (attention.q_proj, attention.k_proj)
    )
    _, maps = attention(hidden, output_attentions=True)
    torch.testing.assert_close(maps, (query @ key.transpose(2, 3) / 8**0.5).softmax(-1), rtol=0, atol=1e-6)
    assert largest_difference(maps, (query @ key.transpose(2, 3)).softmax(-1)) > 1e-2


def additive_by_loops(attention: MultiHeadAttention, hidden, memory, mask):
    """Bahdanau et al. 2015, A.1.2: v . tanh(W q + U k), one pair at a time."""
    B, T, D = hidden.shape
    S, H, Dh = memory.shape[1], 4, D // 4
    output = torch.zeros(B, T, D)
    for b in range(B):
        for h in range(H):
            part = slice(h * Dh, (h + 1) * Dh)
            for t in range(T):
                query = attention.q_proj(hidden[b, t])[part]
                scores = torch.stack(
                    [
                        attention.score_vector[h] @ torch.tanh(query + attention.k_proj(memory[b, s])[part])
                        if mask[b, s]
                        else torch.tensor(-torch.inf)
                        for s in range(S)
                    ]
                )
                values = torch.stack([attention.v_proj(memory[b, s])[part] for s in range(S)])
                output[b, t, part] = scores.softmax(0) @ values
    return attention.out_proj(output)


@torch.no_grad()
def test_additive_score_matches_loops(batch):
    model = tiny_model(attention_score="additive")
    attention = model.get_decoder().layers[0].cross_attn
    hidden, memory, mask = torch.randn(2, 3, 32), torch.randn(2, 4, 32), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    got, _ = attention(hidden, memory, attention_mask=mask[:, None, None].bool())
    torch.testing.assert_close(got, additive_by_loops(attention, hidden, memory, mask), rtol=0, atol=1e-5)
    assert largest_difference(model(**batch).logits, tiny_model()(**batch).logits) > 1e-3


@pytest.mark.parametrize("backend", ["flex_attention", "flash_attention_2"])
def test_additive_score_refuses_fused_backends(backend):
    attention = MultiHeadAttention(tiny_config(attention_score="additive"))
    attention.config._attn_implementation = backend
    with pytest.raises(ValueError, match=rf'attention_score="additive" runs with .*"eager", got "{backend}"'):
        attention(torch.randn(1, 3, 32))


def test_missing_additive_parameters_are_initialized(tmp_path):
    """A score vector of zeros would attend uniformly forever, because only its own gradient could move it."""
    model = tiny_model(attention_score="additive")
    vectors = [parameter for name, parameter in model.named_parameters() if name.endswith("score_vector")]
    assert len(vectors) == 6 and all(vector.abs().min() > 0 for vector in vectors)
    tiny_model().save_pretrained(tmp_path)
    loaded, info = TfmTransformerForConditionalGeneration.from_pretrained(
        tmp_path, attention_score="additive", output_loading_info=True
    )
    assert len(info["missing_keys"]) == 6
    for module in loaded.modules():
        if isinstance(module, MultiHeadAttention):
            assert module.score_vector.isfinite().all() and module.score_vector.abs().min() > 0


@torch.no_grad()
def test_rows_sharing_a_memory_equal_rows_with_copies():
    model, batch = tiny_model(), tiny_batch(rows=2)
    memory = model.get_encoder()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    ids = torch.randint(5, 48, (6, 5))
    for backend in ("eager", "sdpa"):
        model.set_attn_implementation(backend)
        shared = model(
            encoder_outputs=memory,
            attention_mask=batch["attention_mask"],
            decoder_input_ids=ids,
            output_attentions=True,
        )
        own = model(
            input_ids=batch["input_ids"].repeat_interleave(3, dim=0),
            attention_mask=batch["attention_mask"].repeat_interleave(3, dim=0),
            decoder_input_ids=ids,
            output_attentions=True,
        )
        assert largest_difference(shared.logits, own.logits) < 1e-5
        assert largest_difference(shared.cross_attentions[1], own.cross_attentions[1]) < 1e-5


def test_attention_dropout_applies_in_training_only():
    attention = MultiHeadAttention(tiny_config(attention_dropout=0.5, attn_implementation="eager"))
    hidden = torch.randn(1, 6, 32)
    assert largest_difference(attention.eval()(hidden)[0], attention(hidden)[0]) == 0
    assert largest_difference(attention.train()(hidden)[0], attention(hidden)[0]) > 1e-3
    assert isinstance(attention.q_proj, nn.Linear)
