"""The encoder-decoder, beyond what transformers' common tests cover."""

import copy

import pytest
import torch
from tiny_models import largest_difference, mask_answers, tiny_batch, tiny_config, tiny_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from hf_tfm import TfmTransformerForConditionalGeneration, TfmTransformerModel
from hf_tfm.models.cache_names import cache_of
from hf_tfm.models.cross_entropy import IGNORE_INDEX
from hf_tfm.models.seq2seq import shift_right

NORM_ORDERS = pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])


def with_labels(batch: dict, **more) -> dict:
    labels = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, IGNORE_INDEX)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"], "labels": labels, **more}


@NORM_ORDERS
@pytest.mark.parametrize(
    "fields", [{}, {"attention_score": "additive"}, {"position_embedding_type": "learned"}], ids=str
)
def test_decoder_is_causal(norm_first, fields):
    model, batch = tiny_model(norm_first=norm_first, **fields), tiny_batch(target=8)
    del batch["decoder_attention_mask"]
    changed = copy.deepcopy(batch)
    changed["decoder_input_ids"][:, 5] = (changed["decoder_input_ids"][:, 5] + 1) % 48
    before, after = model(**batch).logits, model(**changed).logits
    assert largest_difference(before[:, :5], after[:, :5]) == 0
    assert (before[:, 5:] - after[:, 5:]).abs().amax(dim=(1, 2)).min() > 1e-3, "later outputs must change"


def test_mask_predict_decoder_is_bidirectional():
    model, batch = tiny_model(decoding="mask_predict"), tiny_batch(target=8)
    changed = copy.deepcopy(batch)
    changed["decoder_input_ids"][0, 7] = 5
    assert largest_difference(model(**batch).logits[0, :7], model(**changed).logits[0, :7]) > 1e-4


@NORM_ORDERS
@pytest.mark.parametrize("decoding", ["autoregressive", "mask_predict"])
def test_padding_does_not_change_the_output(norm_first, decoding):
    model, batch = tiny_model(norm_first=norm_first, decoding=decoding), tiny_batch(rows=5, source=9, target=7)
    padded = model(**batch).logits
    for row in range(5):
        S, T = batch["attention_mask"][row].sum(), batch["decoder_attention_mask"][row].sum()
        alone = model(
            input_ids=batch["input_ids"][row, None, :S], decoder_input_ids=batch["decoder_input_ids"][row, None, :T]
        ).logits
        assert largest_difference(padded[row, None, :T], alone) < 1e-5


def test_padding_token_ids_do_not_matter():
    model, batch = tiny_model(), tiny_batch()
    other = {**batch, "input_ids": batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 33)}
    assert largest_difference(model(**batch).logits, model(**other).logits) < 1e-6
    assert largest_difference(model(**batch).logits, model(**{**other, "attention_mask": None}).logits) > 1e-3


def test_embeddings_are_scaled():
    """The token's row times sqrt(32), which dominates unscaled positions; the option disables it."""
    ids = torch.tensor([[7, 8]])
    scaled, plain = tiny_model().get_encoder().embedding, tiny_model(scale_embedding=False).get_encoder().embedding
    torch.testing.assert_close(scaled(ids) - plain(ids), scaled.tokens(ids) * (32**0.5 - 1))


def test_scaled_initial_embeddings_have_variance_1():
    torch.manual_seed(0)
    model = TfmTransformerModel(tiny_config(vocab_size=2000))
    assert (model.shared.weight * 32**0.5).std().item() == pytest.approx(1.0, abs=0.02)


def is_tied(model: TfmTransformerForConditionalGeneration) -> bool:
    weights = {
        model.model.shared.weight,
        model.get_encoder().embedding.tokens.weight,
        model.get_decoder().embedding.tokens.weight,
        model.lm_head.weight,
    }
    return len(weights) == 1


def test_weights_stay_tied(tmp_path):
    model = tiny_model()
    assert is_tied(model)
    model.save_pretrained(tmp_path / "a")
    loaded = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path / "a")
    assert is_tied(loaded) and largest_difference(loaded.lm_head.weight, model.lm_head.weight) == 0
    loaded.resize_token_embeddings(60)
    assert is_tied(loaded) and loaded.config.vocab_size == 60
    loaded.save_pretrained(tmp_path / "b")
    again = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path / "b")
    assert is_tied(again) and again.lm_head.weight.shape == (60, 32)
    batch = tiny_batch()
    assert largest_difference(again.eval()(**batch).logits[..., :48], model(**batch).logits) < 1e-6


def test_output_bias_starts_at_zero_and_gets_a_gradient(tmp_path):
    torch.manual_seed(0)
    model = TfmTransformerForConditionalGeneration(tiny_config(output_bias=True, label_smoothing=0.0))
    assert model.lm_head.bias.eq(0).all() and tiny_model().lm_head.bias is None
    batch = with_labels(tiny_batch(), return_logits=False)
    optimizer = torch.optim.SGD([model.lm_head.bias], lr=1.0)
    before = model(**batch).loss
    before.backward()
    optimizer.step()
    assert model(**batch).loss.item() < before.item() - 0.01
    model.save_pretrained(tmp_path)
    loaded = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.lm_head.bias, model.lm_head.bias) and loaded.lm_head.bias.abs().max() > 0.01
    assert is_tied(loaded)


@pytest.mark.parametrize("decoding", ["autoregressive", "mask_predict"])
def test_output_bias_is_always_applied(decoding):
    """In logits, in the loss with and without logits, and in generation: a large bias decides the output."""
    model, batch = tiny_model(output_bias=True, decoding=decoding), tiny_batch()
    labels = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, IGNORE_INDEX)
    if decoding == "mask_predict":
        batch = mask_answers(batch)
    output = model(**batch, labels=labels)
    fused = model(**batch, labels=labels, return_logits=False).loss
    assert fused.item() == pytest.approx(output.loss.item(), abs=1e-5)
    plain = output.logits - model.lm_head.bias
    nn.init.zeros_(model.lm_head.bias)
    torch.testing.assert_close(model(**batch).logits, plain)
    assert model(**batch, labels=labels).loss.item() != pytest.approx(output.loss.item(), abs=1e-3)
    with torch.no_grad():
        model.lm_head.bias[11] = 100.0
    generated = model.generate(input_ids=batch["input_ids"], max_new_tokens=4)[:, 1:]
    assert generated[generated != model.config.pad_token_id].eq(11).all() and generated.eq(11).any(dim=1).all()


def test_output_bias_is_resized_with_tied_embeddings(tmp_path):
    model, batch = tiny_model(output_bias=True), tiny_batch()
    expected, bias = model(**batch).logits, model.lm_head.bias.detach().clone()
    for size in (60, 50):
        model.resize_token_embeddings(size)
        assert is_tied(model) and model.lm_head.bias.shape == (size,) and model.lm_head.out_features == size
        assert torch.equal(model.lm_head.bias[:48], bias)
    model.save_pretrained(tmp_path)
    loaded = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path).eval()
    for one in (model, loaded):
        assert largest_difference(one(**batch).logits[..., :48], expected) < 1e-6
    assert loaded(**with_labels(batch, return_logits=False)).loss.isfinite()


def test_weights_can_be_untied(tmp_path):
    model = tiny_model(tie_word_embeddings=False)
    tables = [model.get_encoder().embedding.tokens, model.get_decoder().embedding.tokens, model.lm_head]
    assert len({table.weight for table in tables}) == 3
    nn.init.normal_(model.get_decoder().embedding.tokens.weight)
    nn.init.normal_(model.lm_head.weight)
    model.save_pretrained(tmp_path)
    loaded = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path).eval()
    assert largest_difference(loaded(**tiny_batch()).logits, model(**tiny_batch()).logits) == 0


def test_every_untied_weight_gets_a_gradient():
    """A weight without gradients has no optimizer state to resume, and other ranks wait for its gradient."""
    model = tiny_model(tie_word_embeddings=False).train()
    model(**with_labels(tiny_batch())).loss.backward()
    assert not [name for name, weight in model.named_parameters() if weight.grad is None]


def test_resized_untied_embeddings_keep_their_rows():
    model = tiny_model(tie_word_embeddings=False)
    tables = (model.get_encoder().embedding.tokens, model.get_decoder().embedding.tokens, model.lm_head)
    before = [table.weight.detach().clone() for table in tables]
    model.resize_token_embeddings(60)
    after = (model.get_encoder().embedding.tokens, model.get_decoder().embedding.tokens, model.lm_head)
    for old, table in zip(before, after, strict=True):
        assert table.weight.shape == (60, 32)
        assert torch.equal(table.weight[:48], old)
    assert model(**tiny_batch()).logits.shape[-1] == model.config.vocab_size == 60


def test_base_model_and_head_load_each_others_checkpoints(tmp_path):
    model, batch = tiny_model(), tiny_batch()
    model.save_pretrained(tmp_path / "head")
    base = TfmTransformerModel.from_pretrained(tmp_path / "head").eval()
    hidden = base(**batch).last_hidden_state
    assert largest_difference(model.lm_head(hidden), model(**batch).logits) == 0
    base.save_pretrained(tmp_path / "base")
    again = TfmTransformerForConditionalGeneration.from_pretrained(tmp_path / "base").eval()
    assert largest_difference(again(**batch).logits, model(**batch).logits) == 0


@NORM_ORDERS
def test_hidden_states(norm_first):
    model, batch = tiny_model(norm_first=norm_first), tiny_batch()
    output = model(**batch, output_hidden_states=True)
    assert [tuple(state.shape) for state in output.encoder_hidden_states] == [(4, 7, 32)] * 3
    assert [tuple(state.shape) for state in output.decoder_hidden_states] == [(4, 6, 32)] * 3
    embedded = model.get_encoder().embedding(batch["input_ids"])
    assert largest_difference(output.encoder_hidden_states[0], embedded) == 0
    assert largest_difference(output.encoder_hidden_states[-1], output.encoder_last_hidden_state) == 0
    assert largest_difference(model.lm_head(output.decoder_hidden_states[-1]), output.logits) == 0


@NORM_ORDERS
def test_final_norm_of_pre_norm_and_post_norm(norm_first):
    model = tiny_model(norm_first=norm_first)
    for stack in (model.get_encoder(), model.get_decoder()):
        assert isinstance(stack.norm, nn.LayerNorm if norm_first else nn.Identity)
    for stack in (model.get_encoder(), model.get_decoder()):
        for module in stack.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.ones_(module.weight), nn.init.zeros_(module.bias)
    memory = model.get_encoder()(input_ids=tiny_batch()["input_ids"]).last_hidden_state
    torch.testing.assert_close(memory.mean(-1), torch.zeros(4, 7), rtol=0, atol=1e-5)
    torch.testing.assert_close(memory.std(-1, unbiased=False), torch.ones(4, 7), rtol=0, atol=1e-3)


def gradients(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("decoding", ["autoregressive", "mask_predict"])
def test_gradient_checkpointing(decoding, maps, reentrant):
    batch = tiny_batch()
    found = []
    for checkpointing in (False, True):
        model = tiny_model(decoding=decoding).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        inputs = mask_answers(batch) if decoding == "mask_predict" else batch
        output = model(**inputs, labels=batch["decoder_input_ids"], output_attentions=maps)
        assert len(output.cross_attentions or ()) == (2 if maps else 0)
        output.loss.backward()
        found.append(gradients(model))
    assert found[0].abs().max() > 1e-3 and largest_difference(*found) < 1e-6


@pytest.mark.parametrize("return_logits", [True, False])
def test_loss(return_logits):
    """Teacher-forced, label-smoothed cross-entropy as torch computes it."""
    model, batch = tiny_model(label_smoothing=0.2), with_labels(tiny_batch())
    output = model(**batch, return_logits=return_logits)
    inputs = shift_right(batch["labels"], 0, 1)
    assert inputs[:, 0].eq(1).all() and torch.equal(inputs[0, 1:], batch["labels"][0, :-1]) and inputs.min() >= 0
    logits = model(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], decoder_input_ids=inputs
    ).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), label_smoothing=0.2)
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert output.token_loss is output.loss and output.length_loss is None
    assert (output.logits is None) == (not return_logits)
    assert cache_of(output) is None


def test_loss_of_micro_batches_adds_up():
    """As Trainer does with ``num_items_in_batch`` under gradient accumulation."""
    for decoding in ("autoregressive", "mask_predict"):
        model = tiny_model(decoding=decoding)
        batch = tiny_batch()
        batch["labels"] = batch["decoder_input_ids"].masked_fill(batch["decoder_attention_mask"] == 0, IGNORE_INDEX)
        items = (batch["labels"] != IGNORE_INDEX).sum()
        if decoding == "mask_predict":
            batch = mask_answers(batch)
            batch["labels"] = batch["labels"].masked_fill(batch["decoder_input_ids"] != 4, IGNORE_INDEX)
            items = (batch["labels"] != IGNORE_INDEX).sum()
        whole = model(**batch)
        parts = [
            model(**{k: v[part] for k, v in batch.items()}, num_items_in_batch=items)
            for part in (slice(0, 2), slice(2, 4))
        ]
        assert sum(part.token_loss for part in parts).item() == pytest.approx(whole.token_loss.item(), abs=1e-5)
        if decoding == "autoregressive":
            assert sum(part.loss for part in parts).item() == pytest.approx(whole.loss.item(), abs=1e-5)
        else:
            lengths = sum(part.length_loss for part in parts).item() / 4
            assert lengths == pytest.approx(whole.length_loss.item(), abs=1e-5)
            # Sentences are weighted by their tokens, also in the whole batch if it is given the number of items.
            expected = model(**batch, num_items_in_batch=items).loss.item()
            assert sum(part.loss for part in parts).item() == pytest.approx(expected, abs=1e-5)
            assert 0.5 < expected / whole.loss.item() < 1.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("decoding", ["autoregressive", "mask_predict"])
def test_half_precision(dtype, decoding):
    model, batch = tiny_model(decoding=decoding), with_labels(tiny_batch())
    torch.manual_seed(0)
    expected = model(**batch).loss
    torch.manual_seed(0)
    half = copy.deepcopy(model).to(dtype)(**batch).loss
    assert half.dtype == torch.float32 and half.item() == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("decoding", ["autoregressive", "mask_predict"])
@pytest.mark.parametrize("norm_first", [False, True])
def test_autocast(norm_first, decoding):
    model = tiny_model(decoding=decoding, norm_first=norm_first).train()
    batch = with_labels(tiny_batch(), return_logits=False)
    losses = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = model(**batch)
        output.loss.backward()
        losses.append((output.loss.item(), gradients(model)))
    (expected, exact), (got, rounded) = losses
    assert got == pytest.approx(expected, rel=0.02) and exact.dtype == rounded.dtype == torch.float32
    assert (exact - rounded).norm() < 0.1 * exact.norm()


def test_lengths_are_counted_exactly_in_bfloat16():
    """bfloat16 counts exactly only up to 256, but a source of 300 tokens must be counted as 300."""
    head = tiny_model(decoding="mask_predict").bfloat16().length_head
    _, lengths = head(torch.zeros(1, 300, 32, dtype=torch.bfloat16), None)
    assert lengths.tolist() == [300]


def test_inputs_are_checked():
    model, batch = tiny_model(), tiny_batch()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model.get_encoder()()
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(**batch, inputs_embeds=torch.zeros(4, 7, 32))
    with pytest.raises(ValueError, match="needs encoder_hidden_states"):
        model.get_decoder()(input_ids=batch["decoder_input_ids"])


def test_embeddings_and_encoder_outputs_instead_of_ids():
    model, batch = tiny_model(), tiny_batch()
    expected = model(**batch).logits
    table = model.get_input_embeddings()
    embedded = {
        "inputs_embeds": table(batch["input_ids"]),
        "decoder_inputs_embeds": table(batch["decoder_input_ids"]),
        "attention_mask": batch["attention_mask"],
        "decoder_attention_mask": batch["decoder_attention_mask"],
    }
    assert largest_difference(model(**embedded).logits, expected) == 0
    memory = model.get_encoder()(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    rest = {name: value for name, value in batch.items() if name != "input_ids"}
    for outputs in (BaseModelOutput(last_hidden_state=memory), (memory,)):
        assert largest_difference(model(**rest, encoder_outputs=outputs).logits, expected) == 0


def test_parallel_plans_name_existing_modules():
    model = tiny_model()
    modules = {name for name, _ in model.model.named_modules()}
    for plan in (type(model.config).base_model_tp_plan, type(model.config).base_model_fsdp_plan):
        assert plan and {pattern.replace("*", "1") for pattern in plan} <= modules
    assert not any("encoder.encoder" in pattern for pattern in {**model.tp_plan, **model.fsdp_plan})
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    planned = {pattern.replace("*", str(layer)) for pattern in model.tp_plan for layer in range(2)}
    assert linears <= planned
