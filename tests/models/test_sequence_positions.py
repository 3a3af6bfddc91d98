"""Sequence positions: exact warm start of FLOATER, the papers' formulas, caches, padding, any length."""

import pytest
import torch
from test_learning import accuracy, trained
from tiny_models import TINY, largest_difference, tiny_batch, tiny_config, tiny_model
from tiny_text import tiny_text
from torch import Tensor
from transformers import EncoderDecoderCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_tfm import TfmBertForMaskedLM, TfmTransformerForConditionalGeneration
from hf_tfm.models.attention import MultiHeadAttention
from hf_tfm.models.cross_entropy import IGNORE_INDEX
from hf_tfm.models.ode import Dynamics
from hf_tfm.models.sequence_positions import (
    AlibiPositions,
    Flow,
    RotaryPositions,
    alibi_slopes,
    prepare_positions,
)

KINDS = ("floater", "alibi", "rotary")
FLOATER = {"position_embedding_type": "floater"}
BERT = {"max_position_embeddings": 5}


def varied(model: PreTrainedModel) -> PreTrainedModel:
    """The model with random weights of FLOATER, which are 0 in a new one."""
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "flow" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return model


def bert(**fields) -> PreTrainedModel:
    return varied(tiny_text("masked", **fields))


def ids(rows: int = 2, length: int = 9, seed: int = 0) -> Tensor:
    return torch.randint(5, 48, (rows, length), generator=torch.Generator().manual_seed(seed))


# --- FLOATER


@pytest.mark.parametrize("scope", ["all", "input"])
@pytest.mark.parametrize("kind", [TfmTransformerForConditionalGeneration, TfmBertForMaskedLM])
def test_warm_start_from_sinusoidal_positions_is_exact(tmp_path, kind, scope):
    """Bit-equal outputs and gradients of all old weights; and the new weights receive gradients."""
    if kind is TfmBertForMaskedLM:
        first, batch = bert(position_embedding_type="sinusoidal"), {"input_ids": ids()}
        labels = batch["input_ids"]
    else:
        first, batch = tiny_model(), tiny_batch()
        labels = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, IGNORE_INDEX)
    first.save_pretrained(tmp_path)
    second = kind.from_pretrained(tmp_path, **FLOATER, floater_scope=scope).eval()
    expected, found = (model(**batch, labels=labels) for model in (first, second))
    assert torch.equal(found.logits, expected.logits) and torch.equal(found.loss, expected.loss)
    expected.loss.backward(), found.loss.backward()
    new = dict(second.named_parameters())
    assert all(torch.equal(p.grad, new.pop(name).grad) for name, p in first.named_parameters())
    assert new and all("flow" in name for name in new)
    assert all(p.grad.any() for name, p in new.items() if name.endswith(("start", "down_weight")))
    with torch.no_grad():
        assert torch.equal(second(**batch).logits, expected.logits)  # by the table


def test_both_gradients_of_a_model_are_equal():
    batch, found = tiny_batch(), []
    for adjoint in (True, False):
        model = varied(tiny_model(**FLOATER, floater_adjoint=adjoint)).train()
        model(**batch, labels=batch["decoder_input_ids"]).loss.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_every_attention_has_its_own_biases():
    """They are what the blocks receive: one ODE for a stack, another one for keys and values of cross-attention."""
    model = varied(tiny_model(**FLOATER))
    positions = model.get_decoder().embedding.positions
    placements = positions.placements(torch.arange(6), 6, 7)
    own = positions.flow.dynamics.integrate(positions.flow.start.flatten(0, 1), 6, 0.1).unflatten(1, (2, 4))
    other = positions.memory_flow
    memory = other.dynamics.integrate(other.start.flatten(0, 1), 7, 0.1).unflatten(1, (2, 2))
    for layer, placement in enumerate(placements):
        assert all(torch.equal(bias, own[:, layer, i]) for i, bias in enumerate(placement.own))
        assert torch.equal(placement.memory.of_query, own[:, layer, 3])
        assert torch.equal(placement.memory.of_key, memory[:, layer, 0])
        assert torch.equal(placement.memory.of_value, memory[:, layer, 1])


def test_table_is_integrated_once_extended_and_recomputed_after_a_change(monkeypatch):
    model = varied(tiny_model(**FLOATER)).eval()
    counts, original = [], Dynamics.integrate
    monkeypatch.setattr(
        Dynamics,
        "integrate",
        lambda self, start, count, *args: counts.append(count) or original(self, start, count, *args),
    )
    encoder = model.get_encoder()
    with torch.no_grad():
        short = encoder(ids(length=9)).last_hidden_state
        assert torch.equal(encoder(ids(length=9)).last_hidden_state, short) and counts == [64]
        long = encoder(ids(length=70)).last_hidden_state
        assert counts == [64, 65]  # the last known state, and 64 more
        fresh = varied(tiny_model(**FLOATER)).eval().get_encoder()
        torch.testing.assert_close(fresh(ids(length=70)).last_hidden_state, long, rtol=0, atol=1e-6)
        encoder.embedding.positions.flow.start.add_(1.0)
        assert not torch.equal(encoder(ids(length=9)).last_hidden_state, short)
        encoder.embedding.positions.flow.start.sub_(1.0)
        torch.testing.assert_close(encoder(ids(length=9)).last_hidden_state, short, rtol=0, atol=1e-6)
    model.train()
    assert all(module.table is None for module in model.modules() if isinstance(module, Flow))


def test_table_of_inference_mode_can_be_used_in_training_of_other_weights():
    model = varied(tiny_model(**FLOATER)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("flow" not in name)
    with torch.inference_mode():
        model(**tiny_batch())
    model(**tiny_batch(), labels=tiny_batch()["decoder_input_ids"]).loss.backward()


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_export_holds_the_table(kind):
    """One graph for any lengths up to that of the table."""
    model, batch = varied(tiny_model(position_embedding_type=kind)).eval(), tiny_batch(rows=3, source=7, target=6)
    S, T = torch.export.Dim("S", min=2, max=30), torch.export.Dim("T", min=2, max=30)
    shapes = {name: {1: T if name.startswith("decoder") else S} for name in batch}
    inputs, shapes = {**batch, "use_cache": False}, {**shapes, "use_cache": None}
    if kind == "floater":
        with pytest.raises(ValueError, match=r"call prepare_positions\(model, 7\) before the export"):
            torch.export.export(model, (), inputs, strict=False)
    prepare_positions(model, 30)
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    other = tiny_batch(rows=3, source=11, target=4, seed=1)
    assert largest_difference(program.module()(**other, use_cache=False).logits, model(**other).logits) < 1e-5


@torch.no_grad()
def test_onnx(tmp_path):
    pytest.importorskip("onnxscript", reason="needs pip install hf-tfm[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install hf-tfm[onnx]")
    encoder = varied(tiny_model(**FLOATER)).eval().get_encoder()
    expected = encoder(ids()).last_hidden_state

    class Memory(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder

        def forward(self, input_ids):
            return self.encoder(input_ids).last_hidden_state

    torch.onnx.export(Memory().eval(), (ids(),), dynamo=True, verbose=False).save(tmp_path / "encoder.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "encoder.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {session.get_inputs()[0].name: ids().numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=1e-5)


# --- rotary and ALiBi


def test_rotation_is_that_of_transformers():
    kind = RotaryPositions(tiny_config(), 1)
    rotation = kind.placements(torch.arange(9), 9)[0].own
    query, key = torch.randn(2, 9, 32), torch.randn(2, 9, 32)
    cos, sin = (part[:, 0].expand(2, -1, -1) for part in rotation)
    expected = apply_rotary_pos_emb(*(x.view(2, 9, 4, 8).transpose(1, 2) for x in (query, key)), cos, sin)
    for found, states in ((rotation.query(query), expected[0]), (rotation.key(key), expected[1])):
        torch.testing.assert_close(found, states.transpose(1, 2).flatten(2))
    angles = torch.arange(9.0)[:, None] / 10000.0 ** (torch.arange(0, 8, 2) / 8)
    torch.testing.assert_close(cos[0, :, :4], angles.cos())
    assert torch.equal(rotation.value(query), query)


def test_slopes_of_the_paper():
    assert alibi_slopes(8).tolist() == [2.0**-i for i in range(1, 9)]
    torch.testing.assert_close(alibi_slopes(16), torch.tensor([2.0 ** (-i / 2) for i in range(1, 17)]))
    # 12 heads, by the authors' code: those of 8, then every second one of 16.
    torch.testing.assert_close(
        alibi_slopes(12), torch.tensor([2.0**-i for i in range(1, 9)] + [2.0 ** (-i / 2) for i in (1, 3, 5, 7)])
    )


@torch.no_grad()
@pytest.mark.parametrize("causal", [True, False])
def test_alibi_lowers_scores_by_the_distance(causal):
    config = tiny_config(position_embedding_type="alibi", attn_implementation="eager")
    torch.manual_seed(0)
    attention, states = MultiHeadAttention(config), torch.randn(1, 6, 32)
    visible = torch.ones(1, 1, 6, 6).tril().bool() if causal else None
    kind, positions = AlibiPositions(config, 1), torch.arange(6)
    mask = kind.mask(visible, positions, positions, torch.float32)
    found = attention(states, attention_mask=mask, output_attentions=True)[1][0]
    query, key = (layer(states).view(6, 4, 8).transpose(0, 1) for layer in (attention.q_proj, attention.k_proj))
    scores = query @ key.mT / 8**0.5
    for i in range(6):
        for j in range(6):
            scores[:, i, j] -= alibi_slopes(4) * abs(i - j)
            if causal and j > i:
                scores[:, i, j] = -torch.inf
    torch.testing.assert_close(found, scores.softmax(dim=-1))


@pytest.mark.parametrize("attention", ["flash_attention_2", "flex_attention"])
def test_alibi_refuses_other_attention(attention):
    kind = AlibiPositions(tiny_config(position_embedding_type="alibi"), 1)
    kind.config._attn_implementation = attention
    with pytest.raises(ValueError, match=f'alibi" runs with attn_implementation="sdpa" or "eager", got "{attention}"'):
        kind.mask(None, torch.arange(3), torch.arange(3), torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["alibi", "rotary"])
def test_outputs_depend_on_distances_only(kind):
    model = bert(position_embedding_type=kind)
    positions = torch.arange(9)[None]
    expected = model(ids()).logits
    torch.testing.assert_close(model(ids(), position_ids=positions + 7).logits, expected, rtol=0, atol=1e-4)
    assert largest_difference(model(ids(), position_ids=positions * 2).logits, expected) > 1e-2


# --- all kinds


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("static", [False, True])
def test_step_by_step_with_a_cache_is_the_same_as_all_at_once(kind, static):
    model, batch = varied(tiny_model(position_embedding_type=kind)).eval(), tiny_batch(target=8)
    source = {name: batch[name] for name in ("input_ids", "attention_mask")}
    expected = model(**source, decoder_input_ids=batch["decoder_input_ids"]).logits

    def cache():
        return StaticCache(config=model.config, max_cache_len=12) if static else DynamicCache()

    past = EncoderDecoderCache(cache(), DynamicCache())
    parts = batch["decoder_input_ids"].split([3, 1, 1, 2, 1], dim=1)
    found = [model(**source, decoder_input_ids=part, cache=past, use_cache=True).logits for part in parts]
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_beams_share_a_memory(kind):
    """With cache, without, and with a static one."""
    model, batch = varied(tiny_model(position_embedding_type=kind)).eval(), tiny_batch()
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    options = {"num_beams": 3, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = model.generate(**inputs, **options)
    for other in ({"use_cache": False}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**inputs, **options, **other), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_padding_changes_nothing(kind):
    """0.0, whatever the padded ids are; and longer padding only rounding."""
    model, batch = varied(tiny_model(position_embedding_type=kind)).eval(), tiny_batch()
    expected = model(**batch).logits
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] == 1, 9)}
    assert largest_difference(model(**other).logits, expected) == 0
    padded = {name: torch.nn.functional.pad(value, (0, 5 * ("decoder" not in name))) for name, value in batch.items()}
    assert largest_difference(model(**padded).logits, expected) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", [*KINDS, "sinusoidal"])
def test_any_length(kind):
    """Above max_position_embeddings, in both families: the same as with a larger one."""
    batch = tiny_batch(source=12)
    models = [varied(tiny_model(position_embedding_type=kind, max_position_embeddings=n)).eval() for n in (5, 50)]
    assert largest_difference(*(model(**batch).logits for model in models)) == 0
    models = [bert(position_embedding_type=kind, max_position_embeddings=n) for n in (5, 50)]
    assert largest_difference(*(model(ids()).logits for model in models)) == 0
    assert (
        largest_difference(models[0](ids()).logits, models[0](ids(), position_ids=torch.arange(9)[None]).logits) < 1e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_eager_and_bfloat16(kind):
    batch = tiny_batch()
    model = varied(tiny_model(position_embedding_type=kind)).eval()
    expected = model(**batch)
    asked = model(**batch, output_attentions=True)
    assert largest_difference(asked.logits, expected.logits) < 1e-5 and asked.encoder_attentions[0].shape[-1] == 7
    model.set_attn_implementation("eager")
    assert largest_difference(model(**batch).logits, expected.logits) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert largest_difference(model(**batch).logits.float(), expected.logits) < 0.2
    model.to(torch.bfloat16)
    assert largest_difference(model(**batch).logits.float(), expected.logits) < 0.2


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_and_gradient_checkpointing(tmp_path, kind):
    model, batch = varied(tiny_model(position_embedding_type=kind)), tiny_batch()
    model.save_pretrained(tmp_path)
    again = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path).train()
    again.gradient_checkpointing_enable()
    for one in (model, again):
        one(**batch, labels=batch["decoder_input_ids"]).loss.backward()
    for own, other in zip(model.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("floater", 250), ("rotary", 500)])
def test_it_learns(kind, steps):
    """To reverse digits; positions are all that tells the digits apart."""
    model = trained(steps, position_embedding_type=kind)
    assert accuracy(model) > 0.93
    if kind == "floater":
        assert all(parameter.any() for name, parameter in model.named_parameters() if "flow" in name)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "same"), [("alibi", True), ("rotary", False), ("floater", False)])
def test_alibi_does_not_tell_an_encoder_the_direction(kind, same):
    """A source read backwards has the same states, in reverse: its distances are the same."""
    encoder, source = varied(tiny_model(position_embedding_type=kind)).eval().get_encoder(), ids()
    states, reverse = (encoder(given).last_hidden_state for given in (source, source.flip(1)))
    assert (largest_difference(reverse.flip(1), states) < 1e-5) == same


def test_the_base_is_called_with_the_sizes_of_its_stack():
    """FLOATER's parameters: an ODE of 2 D (D + 1) + 2 D weights, 526,336 at D 512, and the starts of each block."""
    assert sum(parameter.numel() for parameter in Dynamics(512, 512).parameters()) == 526_336

    def count(**fields) -> int:
        return sum(parameter.numel() for parameter in tiny_model(**fields).parameters())

    ode, D, N = 2 * 32 * 33 + 2 * 32, TINY["hidden_size"], TINY["num_encoder_layers"]
    assert count(**FLOATER) - count() == 3 * ode + (3 + 4 + 2) * N * D
    assert count(**FLOATER, floater_scope="input") - count() == 2 * (ode + D)
