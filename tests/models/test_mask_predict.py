"""Mask-predict: training masks, length prediction, and parallel decoding."""

import pytest
import torch
from tiny_models import largest_difference, tiny_batch, tiny_config, tiny_model

from hf_tfm.models.cross_entropy import IGNORE_INDEX
from hf_tfm.models.mask_predict import LengthHead, mask_targets, refine

PAD, START, MASK = 0, 1, 4
LABELS = torch.tensor([[10, 11, 12, 13, 14, 2], [20, 21, 2, -100, -100, -100], [2, -100, -100, -100, -100, -100]])


def masked_model(**fields):
    return tiny_model(decoding="mask_predict", max_length_offset=4, **fields)


def source(rows: int = 4) -> dict:
    batch = tiny_batch(rows=rows)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


@pytest.mark.parametrize(("share", "counts"), [(0.0, [1, 1, 1]), (0.5, [4, 2, 1]), (0.999, [6, 3, 1])])
def test_noise_determines_number_and_positions_of_masks(share, counts):
    noise = torch.rand(3, 7, generator=torch.Generator().manual_seed(0))
    noise[:, 0] = share
    inputs, labels, real = mask_targets(LABELS, tiny_config(decoding="mask_predict"), noise)
    masked = inputs == MASK
    assert masked.sum(1).tolist() == counts
    for row in range(3):
        length = int(real[row].sum())
        smallest = noise[row, 1 : 1 + length].argsort()[: counts[row]]
        assert set(masked[row].nonzero()[:, 0].tolist()) == set(smallest.tolist())
    assert torch.equal(real, (LABELS != IGNORE_INDEX).long())
    assert torch.equal(labels, LABELS.masked_fill(~masked, IGNORE_INDEX))
    assert torch.equal(inputs, LABELS.masked_fill(LABELS == IGNORE_INDEX, PAD).masked_fill(masked, MASK))


def test_number_of_masks_is_uniform():
    torch.manual_seed(0)
    inputs, _, _ = mask_targets(torch.full((6000, 6), 9), tiny_config(decoding="mask_predict"))
    counts = (inputs == MASK).sum(1).bincount(minlength=7)[1:].float() / 6000
    assert len(counts) == 6 and (counts - 1 / 6).abs().max() < 0.02


def test_all_positions_are_masked_equally_often():
    torch.manual_seed(0)
    inputs, _, _ = mask_targets(torch.full((6000, 6), 9), tiny_config(decoding="mask_predict"))
    share = (inputs == MASK).float().mean(0)
    assert (share - 3.5 / 6).abs().max() < 0.03


def test_seed_reproduces_the_loss():
    model, batch = masked_model(), {**source(3), "labels": LABELS}
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(model(**batch).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_loss_parts():
    model, batch = masked_model(), {**source(3), "labels": LABELS}
    torch.manual_seed(0)
    mean = model(**batch)
    torch.manual_seed(0)
    total = model(**batch, num_items_in_batch=1)
    assert mean.loss.item() == pytest.approx((mean.token_loss + mean.length_loss).item())
    assert total.length_loss.item() == pytest.approx(3 * mean.length_loss.item(), rel=1e-6)
    torch.manual_seed(0)
    masked = (mask_targets(LABELS, model.config)[0] == MASK).sum().item()
    assert total.token_loss.item() == pytest.approx(masked * mean.token_loss.item(), rel=1e-5)


def test_length_loss_is_the_cross_entropy_of_the_offset():
    torch.manual_seed(0)
    head = LengthHead(tiny_config(decoding="mask_predict", max_length_offset=2))
    memory, mask = torch.randn(4, 5, 32), (torch.arange(5) < torch.tensor([[5], [3], [2], [4]])).long()
    target_lengths = torch.tensor([4, 5, 1, 0])
    target = (torch.arange(5) < target_lengths[:, None]).long()
    logits, source_lengths = head(memory, mask)
    assert source_lengths.tolist() == [5, 3, 2, 4]
    means = torch.stack([memory[row, : source_lengths[row]].mean(0) for row in range(4)])
    torch.testing.assert_close(logits, head.output(means))
    log_p = logits.log_softmax(-1)
    expected = -(log_p[0, 1] + log_p[1, 4] + log_p[2, 1])  # offsets -1, +2, -1; one sentence has no target
    torch.testing.assert_close(head.loss(memory, mask, torch.zeros(4, 5, 32), target).sum(), expected)


def test_length_candidates():
    head = LengthHead(tiny_config(decoding="mask_predict", max_length_offset=2))
    with torch.no_grad():
        head.output.weight.zero_()
        head.output.bias.copy_(torch.tensor([0.0, 3.0, 9.0, 5.0, 7.0]))  # offsets -2 to 2; most likely 0, 2, 1
    memory, mask = torch.zeros(2, 4, 32), torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    lengths, log_p = head.candidates(memory, mask, 3, 100)
    assert lengths.tolist() == [[4, 6, 5], [1, 3, 2]]
    torch.testing.assert_close(log_p[0], head.output.bias.log_softmax(0)[[2, 4, 3]])
    assert head.candidates(memory, mask, 99, 100)[0].shape == (2, 5)
    lengths, _ = head.candidates(memory, mask, 5, 4)
    assert lengths.tolist() == [[4, 4, 4, 3, 2], [1, 3, 2, 1, 1]], "in [1, longest]"


@pytest.mark.parametrize("iterations", [1, 4, 10])
@pytest.mark.parametrize("candidates", [1, 3])
def test_decoding(iterations, candidates):
    model, batch = masked_model(), source()
    calls = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: calls.append(kwargs["input_ids"].clone()), with_kwargs=True
    )
    ids = model.generate(**batch, iterations=iterations, length_candidates=candidates)
    assert len(calls) == iterations and len(calls[0]) == 4 * candidates
    assert ids[:, 0].eq(START).all() and not ids.eq(MASK).any()
    lengths = (ids[:, 1:] != PAD).sum(1)
    memory = model.get_encoder()(**batch).last_hidden_state
    allowed, _ = model.length_head.candidates(memory, batch["attention_mask"], candidates, 39)
    assert all(length in row for length, row in zip(lengths, allowed, strict=True))
    for row, length in zip(ids[:, 1:], lengths, strict=True):
        assert row[:length].ne(PAD).all() and row[length:].eq(PAD).all()
    assert torch.equal(ids, model.generate(**batch, iterations=iterations, length_candidates=candidates))
    full = calls[0] != PAD
    for step, call in enumerate(calls[:iterations]):  # n / n, (n - 1) / n ... of the tokens are masked
        expected = full.sum(1) * (iterations - step) // iterations
        assert torch.equal((call == MASK).sum(1), expected)


def test_lengths_are_weighted_by_probability():
    """If the length is certain, other candidates do not matter; if uncertain, the token probabilities decide."""
    model, batch = masked_model(), source()
    found = []
    for offset in range(1, 5):
        with torch.no_grad():
            model.length_head.output.bias.fill_(0.0)[4 + offset] = 1e4
        found.append((model.generate(**batch, length_candidates=9) != PAD).sum(1) - 1)
    expected = batch["attention_mask"].sum(1) + torch.arange(1, 5)[:, None]
    assert torch.equal(torch.stack(found), expected)
    with torch.no_grad():
        model.length_head.output.weight.zero_(), model.length_head.output.bias.zero_()
    assert not torch.equal((model.generate(**batch, length_candidates=9) != PAD).sum(1) - 1, expected[-1])


@torch.no_grad()
def test_refinement_matches_the_reference():
    """The algorithm of section 3.3 for one sentence, in minimal form."""
    model, batch = masked_model(), source(1)
    memory = model.get_encoder()(**batch).last_hidden_state
    T, iterations = 6, 3
    tokens, sure = torch.full((T,), MASK), torch.zeros(T)
    masked = list(range(T))
    for step in range(iterations):
        decoded = model.get_decoder()(input_ids=tokens[None], encoder_hidden_states=memory).last_hidden_state
        logits = model.lm_head(decoded)[0]
        logits[:, [PAD, MASK]] = -torch.inf
        best, likeliest = logits.log_softmax(-1).max(-1)
        for position in masked:
            tokens[position], sure[position] = likeliest[position], best[position]
        masked = sure.argsort()[: T * (iterations - 1 - step) // iterations].tolist()
        if step + 1 < iterations:
            tokens[masked] = MASK
    got, log_p = refine(model, memory, batch["attention_mask"], torch.tensor([T]), iterations)
    assert torch.equal(got[0], tokens) and largest_difference(log_p[0], sure) < 1e-5


def test_batch_decoding_equals_single_sentences():
    model, batch = masked_model(), source()
    together = model.generate(**batch, length_candidates=2)
    for row in range(4):
        S = batch["attention_mask"][row].sum()
        alone = model.generate(batch["input_ids"][row, None, :S], length_candidates=2)[0]
        assert torch.equal(together[row, : len(alone)], alone) and together[row, len(alone) :].eq(PAD).all()


def test_padding_is_inferred_without_a_mask():
    model, batch = masked_model(), source()
    assert torch.equal(model.generate(batch["input_ids"]), model.generate(**batch))


def test_length_limits():
    model, batch = masked_model(), source()
    for limit in ({"max_length": 4}, {"max_new_tokens": 3}, {"max_new_tokens": 3, "max_length": 30}):
        assert model.generate(**batch, **limit).shape[1] <= 4
    model.generation_config.max_length = 3
    assert model.generate(**batch).shape[1] <= 3
    assert model.generate(**batch, max_length=20).shape[1] > 3
    model.generation_config.max_length = None
    model.generation_config.max_new_tokens = 2
    assert model.generate(**batch).shape[1] <= 3


@pytest.mark.parametrize(
    "option",
    [
        {"num_beams": 4},
        {"do_sample": True},
        {"length_penalty": 0.6},
        {"temperature": 0.5},
        {"cache_implementation": "static"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_unsupported_options_are_refused(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))}: not an option of decoding"):
        masked_model().generate(**source(), **option)


def test_options_without_effect_are_accepted():
    model, batch = masked_model(), source()
    plain = model.generate(**batch)
    assert torch.equal(model.generate(**batch, num_beams=1, do_sample=False, use_cache=True, synced_gpus=None), plain)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1, got 0"),
        ({"length_candidates": 0}, "length_candidates must be at least 1, got 0"),
        ({"max_length": 1}, "max_length - 1.* must be at least 1, got 0"),
    ],
)
def test_numeric_options_are_checked(option, message):
    with pytest.raises(ValueError, match=message):
        masked_model().generate(**source(), **option)


def test_source_is_required():
    with pytest.raises(ValueError, match="needs inputs or input_ids"):
        masked_model().generate()


def test_learned_positions_limit_the_length():
    model = masked_model(position_embedding_type="learned", max_position_embeddings=8)
    assert model.generate(**source(), max_length=8).shape[1] <= 8
