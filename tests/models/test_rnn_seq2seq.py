"""Recurrent encoder-decoder: parity with torch and the papers' formulas, padding, caches, search, learning."""

import itertools

import pytest
import torch
from test_learning import accuracy, words
from tiny_models import largest_difference, tiny_batch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers import DynamicCache, EncoderDecoderCache

from hf_tfm import TfmRNNSeq2SeqConfig, TfmRNNSeq2SeqForConditionalGeneration
from hf_tfm.models.cache_names import CACHE_NAME, cache_of
from hf_tfm.models.cross_entropy import IGNORE_INDEX

TINY = {
    "vocab_size": 48,
    "embedding_size": 12,
    "encoder_hidden_size": 8,
    "hidden_size": 16,
    "num_encoder_layers": 2,
    "num_decoder_layers": 2,
    "dropout": 0.0,
}
CASES = {
    "additive": {},
    "lstm": {"cell": "lstm", "readout": "maxout", "output_bias": True},
    "dot": {"attention_score": "dot"},
    "general": {"attention_score": "general", "tie_word_embeddings": False, "hidden_size": 10},
    "concat-lstm": {"attention_score": "concat", "cell": "lstm"},
    "none": {"attention_score": "none"},
    "none-lstm": {"attention_score": "none", "cell": "lstm"},
}
EVERY = pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
ENDS = list(range(5, 48, 6))


def model_of(seed: int = 0, noise: float = 0.2, **fields) -> TfmRNNSeq2SeqForConditionalGeneration:
    """A model in evaluation mode whose weights, also biases, are random and large enough for varied outputs."""
    torch.manual_seed(seed)
    model = TfmRNNSeq2SeqForConditionalGeneration(TfmRNNSeq2SeqConfig(**{**TINY, **fields})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return model


def reference_attention(model, decoder, state, memory, real):
    """Probabilities (B, S) of a state (B, D), written as in the papers."""
    score, kind = decoder.score, model.config.attention_score
    if kind in ("additive", "concat"):
        joint = torch.tanh(score.query_proj(state)[:, None] + score.key_proj(memory))
        scores = (joint * score.score_vector).sum(-1)
    else:
        keys = memory if kind == "dot" else memory @ score.key_proj.weight.T
        scores = torch.einsum("bd,bsd->bs", state, keys)
    return scores.masked_fill(real == 0, -torch.inf).softmax(dim=-1)


def cell_of(layer, config) -> nn.Module:
    """torch's cell with the weights of a decoder layer; the inputs of an attentive layer are [embedding; context]."""
    kind = nn.GRUCell if config.cell == "gru" else nn.LSTMCell
    if hasattr(layer, "state_proj"):
        weights = (
            torch.cat([layer.input_proj.weight, layer.context_proj.weight], dim=1),
            layer.state_proj.weight,
            layer.input_proj.bias,
            layer.state_proj.bias,
        )
    else:
        weights = tuple(layer.parameters())
    cell = kind(weights[0].shape[1], config.hidden_size)
    for own, given in zip((cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh), weights, strict=True):
        own.data.copy_(given)
    return cell


@torch.no_grad()
def reference_logits(model, input_ids, attention_mask, decoder_input_ids, **_) -> torch.Tensor:
    """The model with torch's bidirectional layers on packed sequences, torch's cells and the papers' formulas."""
    config, encoder, decoder = model.config, model.get_encoder(), model.get_decoder()
    kind = nn.GRU if config.cell == "gru" else nn.LSTM
    stack = kind(
        config.embedding_size, config.encoder_hidden_size, config.num_encoder_layers, bidirectional=True,
        batch_first=True,
    )  # fmt: skip
    weights = [
        p for layer in encoder.layers for rnn in (layer.forward_rnn, layer.backward_rnn) for p in rnn.parameters()
    ]
    for own, given in zip(stack.parameters(), weights, strict=True):
        own.data.copy_(given)
    embedded = encoder.embedding(input_ids)
    lengths = attention_mask.sum(1)
    packed = pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)
    outputs, last = stack(packed)
    memory, _ = pad_packed_sequence(outputs, batch_first=True, total_length=input_ids.shape[1])
    final = (last[0] if config.cell == "lstm" else last)[-2:]  # (2, B, E) of the last layer
    layers, size = config.num_decoder_layers, config.hidden_size
    parts = 2 if config.cell == "lstm" else 1
    states = torch.tanh(decoder.bridge(final[1])).view(-1, layers, parts, size).unbind(1)
    states = [tuple(state.unbind(1)) for state in states]
    cells = [cell_of(layer, config) for layer in decoder.layers]
    logits = []
    for token in decoder_input_ids.unbind(1):
        given = decoder.embedding(token[:, None])[:, 0]
        if config.attention_score == "none":
            context = torch.cat([final[0], final[1]], dim=-1)
        elif config.attention_score == "additive":
            probabilities = reference_attention(model, decoder, states[0][0], memory, attention_mask)
            context = torch.einsum("bs,bse->be", probabilities, memory)
        feeds = config.attention_score in ("none", "additive")
        value = torch.cat([given, context], dim=-1) if feeds else given
        for i, cell in enumerate(cells):
            new = cell(value, states[i] if config.cell == "lstm" else states[i][0])
            states[i] = new if config.cell == "lstm" else (new,)
            value = states[i][0]
        if not feeds:
            probabilities = reference_attention(model, decoder, value, memory, attention_mask)
            context = torch.einsum("bs,bse->be", probabilities, memory)
        readout = decoder.readout(torch.cat([value, context, given], dim=-1))
        readout = readout.view(len(given), -1, 2).amax(-1) if config.readout == "maxout" else readout.tanh()
        logits.append(model.lm_head(readout))
    return torch.stack(logits, dim=1)


def pairs(**shape) -> dict[str, torch.Tensor]:
    batch = tiny_batch(**shape)
    del batch["decoder_attention_mask"]
    return batch


@EVERY
@torch.no_grad()
def test_equals_torch_and_the_formulas(fields):
    model, batch = model_of(**fields), pairs(target=8)
    torch.testing.assert_close(model(**batch).logits, reference_logits(model, **batch), rtol=1e-5, atol=1e-5)


@EVERY
@torch.no_grad()
def test_cached_equals_uncached(fields):
    """Several tokens at once, then single ones, from transformers' empty cache."""
    model, batch = model_of(**fields), pairs(target=8)
    expected = model(**batch, use_cache=False).logits
    cache, ids = EncoderDecoderCache(DynamicCache(), DynamicCache()), batch.pop("decoder_input_ids")
    got = []
    for start, stop in ((0, 3), (3, 4), (4, 5), (5, 8)):
        output = model(**batch, decoder_input_ids=ids[:, start:stop], **{CACHE_NAME: cache}, use_cache=True)
        got.append(output.logits)
    assert cache_of(output) is cache and cache.get_seq_length() == 8
    assert largest_difference(torch.cat(got, dim=1), expected) < 1e-5
    with pytest.raises(ValueError, match="cache must be an EncoderDecoderCache, got DynamicCache"):
        model(**batch, decoder_input_ids=ids, **{CACHE_NAME: DynamicCache()})


@EVERY
@torch.no_grad()
def test_padding_changes_nothing(fields):
    """Other ids at padding: exactly nothing. More padding, and padding before the tokens: rounding errors."""
    model, batch = model_of(**fields), pairs(rows=6, source=9)
    expected = model(**batch).logits
    mask = batch["attention_mask"]
    other = {**batch, "input_ids": batch["input_ids"].where(mask == 1, 7)}
    assert torch.equal(model(**other).logits, expected)
    for name, sides in (("after", (0, 4)), ("before", (4, 0))):
        given = dict(batch)
        for key in ("input_ids", "attention_mask"):
            rows = [nn.functional.pad(row[: n], (9 - n, 0)) if name == "before" else row for row, n in
                    zip(batch[key], mask.sum(1).tolist(), strict=True)]  # fmt: skip
            given[key] = nn.functional.pad(torch.stack(rows), sides)
        assert largest_difference(model(**given).logits, expected) < 1e-6, name


@EVERY
@torch.no_grad()
def test_batch_equals_single_sentences(fields):
    model, batch = model_of(**fields), pairs(rows=5, source=9)
    together = model(**batch).logits
    for i, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        alone = {
            "input_ids": batch["input_ids"][i : i + 1, :length],
            "decoder_input_ids": batch["decoder_input_ids"][i : i + 1],
        }
        assert largest_difference(model(**alone).logits[0], together[i]) < 1e-5


@torch.no_grad()
def test_target_padding():
    model, batch = model_of(), pairs(target=5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]])
    other = batch["decoder_input_ids"].where(mask == 1, 9)
    one, two = (model(**{**batch, "decoder_input_ids": ids}).logits for ids in (batch["decoder_input_ids"], other))
    assert torch.equal(one[mask == 1], two[mask == 1])
    with pytest.raises(ValueError, match="decoder_attention_mask must have padding after the tokens only"):
        model(**batch, decoder_attention_mask=mask.flip(1))


@torch.no_grad()
def test_attention_maps_and_hidden_states():
    model, batch = model_of(), pairs(rows=3, source=9, target=5)
    output = model(**batch, output_attentions=True, output_hidden_states=True)
    (maps,) = output.cross_attentions
    assert maps.shape == (3, 1, 5, 9)
    torch.testing.assert_close(maps.sum(-1), torch.ones(3, 1, 5))
    assert not maps.where(batch["attention_mask"][:, None, None] == 0, 0.0).any()
    assert [each.shape[2] for each in output.encoder_hidden_states] == [12, 16, 16]
    assert [each.shape[2] for each in output.decoder_hidden_states] == [12, 16, 16]
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    assert model_of(attention_score="none")(**batch, output_attentions=True).cross_attentions is None


# --- generation


def varied(**fields) -> TfmRNNSeq2SeqForConditionalGeneration:
    """A model whose outputs end at different lengths."""
    model = model_of(4, **{**fields, "tie_word_embeddings": False}, noise=0.5)
    nn.init.normal_(model.lm_head.weight)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = ENDS, 0
    return model


def source(rows: int) -> dict[str, torch.Tensor]:
    batch = tiny_batch(rows=rows, source=9)
    return {key: batch[key] for key in ("input_ids", "attention_mask")}


@torch.no_grad()
def reference_greedy(model, batch: dict, new_tokens: int) -> torch.Tensor:
    """No cache, one sentence at a time."""
    rows = []
    for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        ids, row = ids[None, : mask.sum()], torch.tensor([[1]])
        while row.shape[1] <= new_tokens and row[0, -1] not in torch.tensor(ENDS):
            token = model(input_ids=ids, decoder_input_ids=row, use_cache=False).logits[:, -1].argmax(-1)
            row = torch.cat([row, token[:, None]], dim=1)
        rows.append(row[0])
    return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@EVERY
def test_greedy_search(fields):
    model, batch = varied(**fields), source(12)
    expected = reference_greedy(model, batch, 12)
    assert len({int(row.count_nonzero()) for row in expected}) > 1, "the sentences must end at different places"
    for options in ({}, {"use_cache": False}, {"encoder_outputs": model.get_encoder()(**batch)}):
        assert torch.equal(model.generate(**batch, max_new_tokens=12, **options), expected), options


@torch.no_grad()
def best_of_all(model, ids: torch.Tensor, vocabulary: int, new_tokens: int, end: int) -> list[int]:
    """The sequence with the best mean log-probability of all that end, or have ``new_tokens`` tokens."""
    rows = torch.tensor([(1, *tokens) for tokens in itertools.product(range(vocabulary), repeat=new_tokens)])
    logits = model(input_ids=ids.repeat(len(rows), 1), decoder_input_ids=rows[:, :-1], use_cache=False).logits
    log_p = logits.log_softmax(-1).gather(2, rows[:, 1:, None])[..., 0]
    ended = rows[:, 1:] == end
    lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, new_tokens)
    real = torch.arange(new_tokens) < lengths[:, None]
    best = ((log_p * real).sum(1) / lengths).argmax()
    return rows[best, : lengths[best] + 1].tolist()


@pytest.mark.parametrize("name", ["additive", "lstm", "dot", "none-lstm"])
def test_beam_search(name):
    """With a beam for every prefix it finds the best sequence; with few it is the same with and without a cache."""
    model = model_of(seed=1, **{**CASES[name], "vocab_size": 5, "tie_word_embeddings": False})
    nn.init.normal_(model.lm_head.weight)
    model.generation_config.eos_token_id = 2
    ids = torch.tensor([[3, 4, 1, 0], [4, 4, 3, 1]])
    options = {"num_beams": 25, "length_penalty": 1.0, "max_new_tokens": 3, "early_stopping": "never"}
    got = model.generate(ids, **options)
    for row, one in zip(got.tolist(), ids, strict=True):
        expected = best_of_all(model, one[None], 5, 3, 2)
        assert row[: len(expected)] == expected
    model, batch = varied(**CASES[name]), source(6)
    options = {"num_beams": 4, "num_return_sequences": 3, "max_new_tokens": 10}
    expected = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(model.generate(**batch, **options), expected)
    assert len({tuple(row) for row in expected.tolist()}) > 6
    torch.manual_seed(0)
    sampled = model.generate(**batch, do_sample=True, max_new_tokens=10)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**batch, do_sample=True, max_new_tokens=10, use_cache=False), sampled)


def test_keys_are_computed_once_a_sentence():
    model, batch, rows = varied(), source(5), []
    model.get_decoder().score.key_proj.register_forward_hook(lambda _, args, __: rows.append(len(args[0])))
    model.generate(**batch, max_new_tokens=6, min_new_tokens=6)
    model.generate(**batch, max_new_tokens=6, min_new_tokens=6, num_beams=3)
    assert rows == [5, 5], "also the beams of a sentence share its keys"


def test_a_state_continues_a_text():
    model, batch = varied(), source(4)
    options = {"min_new_tokens": 4, "return_dict_in_generate": True}
    first = model.generate(**batch, max_new_tokens=4, num_beams=3, **options)
    cache = first[CACHE_NAME]
    assert cache.get_seq_length() == 4 and len(cache.cross_attention_cache.layers[0].keys) == 12
    whole = model.generate(**batch, max_new_tokens=8, min_new_tokens=8)
    begun = model.generate(**batch, max_new_tokens=4, **options)
    again = model.generate(
        **batch,
        decoder_input_ids=begun.sequences,
        max_new_tokens=4,
        min_new_tokens=4,
        **{CACHE_NAME: begun[CACHE_NAME]},
    )
    assert torch.equal(again[:, :4], whole[:, :4]) and again.shape == whole.shape
    with pytest.raises(ValueError, match="cache_implementation must be dynamic for a recurrent model"):
        model.generate(**batch, max_new_tokens=4, cache_implementation="static")


# --- losses


@pytest.mark.parametrize("name", ["additive", "concat-lstm"])
def test_micro_batches_and_the_loss_without_logits(name):
    batch = pairs(rows=6, source=9, target=7)
    labels = batch["decoder_input_ids"].masked_fill(batch["decoder_input_ids"] == 0, IGNORE_INDEX)
    del batch["decoder_input_ids"]
    batch["labels"] = labels
    items = int((labels != IGNORE_INDEX).sum())
    found = []
    for parts, options in ((1, {}), (3, {}), (3, {"return_logits": False})):
        model, total = model_of(**CASES[name]), 0.0
        for start in range(0, 6, 6 // parts):
            part = {key: value[start : start + 6 // parts] for key, value in batch.items()}
            output = model(**part, num_items_in_batch=items, **options)
            assert (output.logits is None) == bool(options) and output.token_loss is output.loss
            output.loss.backward()
            total += output.loss.item()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        found.append((torch.tensor(total), grads))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-6)
    assert found[0][0].item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


# --- configuration, initial weights, learning


def test_sizes():
    def count(config) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in TfmRNNSeq2SeqForConditionalGeneration(config).parameters())

    assert count(TfmRNNSeq2SeqConfig.of_size("tiny", vocab_size=10_000)) == 2_652_672
    base = TfmRNNSeq2SeqConfig.of_size("base")
    assert (base.embedding_size, base.hidden_size, base.readout, base.cell) == (620, 1000, "maxout", "gru")
    with pytest.raises(ValueError, match='size must be one of tiny, tutorial, base, got "huge"'):
        TfmRNNSeq2SeqConfig.of_size("huge")
    with pytest.raises(ValueError, match=r"hidden_size must be 2 \* encoder_hidden_size = 2000 for attention_score"):
        TfmRNNSeq2SeqConfig.of_size("base", attention_score="dot")


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_initial_weights(cell, tmp_path):
    model = TfmRNNSeq2SeqForConditionalGeneration(TfmRNNSeq2SeqConfig(**TINY, cell=cell))
    first, above = model.get_decoder().layers
    for matrix in (first.state_proj.weight, above.weight_hh_l0):
        for gate in matrix.split(16):
            torch.testing.assert_close(gate @ gate.T, torch.eye(16), rtol=0, atol=1e-5)
    forget = above.bias_ih_l0.view(-1, 16)
    expected = torch.zeros_like(forget)
    if cell == "lstm":
        expected[1] = 1.0
    assert torch.equal(forget, expected)
    model.save_pretrained(tmp_path)
    loaded = TfmRNNSeq2SeqForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 90),
        pytest.param({"cell": "lstm", "attention_score": "general"}, 150, marks=pytest.mark.slow),
        pytest.param({"attention_score": "concat"}, 150, marks=pytest.mark.slow),
        pytest.param({"attention_score": "none"}, 400, marks=pytest.mark.slow),
    ],
)
def test_model_learns(fields, steps):
    """It learns to reverse a sequence of digits."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "embedding_size": 16, "encoder_hidden_size": 24, "hidden_size": 48}
    model = TfmRNNSeq2SeqForConditionalGeneration(
        TfmRNNSeq2SeqConfig(**sizes, dropout=0.0, label_smoothing=0.0, **fields)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(steps):
        optimizer.zero_grad()
        model(**words(64, seed=1000 + step)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    assert accuracy(model.eval()) > 0.9
