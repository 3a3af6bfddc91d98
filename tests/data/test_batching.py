"""Batches stay within the budget, use every sample once, and do not depend on the number of ranks and workers."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_tfm.data import text
from hf_tfm.data.batching import (
    StepLoader,
    TokenBudgetSampler,
    cut,
    padding_waste,
    part_of_rank,
    rng,
    two_sided_order,
)

MULTI30K = Path(__file__).parents[3] / "shared" / "data" / "multi30k-en-de"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "padding_waste.json"


def random_lengths(count=500, seed=0):
    """Correlated source and target lengths, as in real text."""
    random = np.random.default_rng(seed)
    source = random.integers(2, 40, count)
    return np.stack([source, np.clip(source + random.integers(-5, 6, count), 1, None)], axis=1)


def examples(lengths):
    return [{"source": [i] * int(row[0]), "target": [i] * int(row[1])} for i, row in enumerate(lengths)]


def collate(rows, indices, epoch, hidden):
    """A batch that records its content."""
    return {
        "sources": [row["source"][0] for row in rows],
        "longest": max(max(len(row["source"]), len(row["target"])) for row in rows),
        "indices": indices,
        "epoch": epoch,
        "hidden": hidden,
        "noise": [rng(0, epoch, index).random() for index in indices],
    }


def visible(micro_batches):
    return [index for batch in micro_batches if not batch["hidden"] for index in batch["indices"]]


# --- the sampler


@pytest.mark.parametrize("max_tokens", [45, 200, 5000])
def test_budget_is_respected_and_every_sample_used_once(max_tokens):
    lengths = random_lengths()
    for epoch in range(3):
        steps = TokenBudgetSampler(lengths, max_tokens).steps(epoch)
        assert all(len(step) * lengths[step].max() <= max_tokens for step in steps)
        assert sorted(itertools.chain(*steps)) == list(range(len(lengths)))


def test_budget_is_filled():
    """No two consecutive samples by length would have fit into the same step."""
    lengths = random_lengths()
    steps = TokenBudgetSampler(lengths, 200, shuffle=False).steps(0)
    for one, two in itertools.pairwise(steps):
        assert (len(one) + 1) * lengths[[*one, two[0]]].max() > 200


def test_one_sided_lengths_and_a_sample_limit():
    steps = TokenBudgetSampler(np.full(10, 3), 30, max_samples=4).steps(0)
    assert sorted(map(len, steps)) == [2, 4, 4]


def test_order_depends_only_on_seed_and_epoch():
    lengths = random_lengths()
    sampler = TokenBudgetSampler(lengths, 200, seed=1)
    first = sampler.steps(3)
    np.random.seed(7)
    torch.manual_seed(7)
    sampler.steps(0)
    assert sampler.steps(3) == first
    assert TokenBudgetSampler(lengths, 200, seed=1).steps(3) == first
    assert sampler.steps(4) != first
    assert TokenBudgetSampler(lengths, 200, seed=2).steps(3) != first


def test_epochs_group_samples_differently():
    """If many samples have the same size, as in a large data set, steps combine them at random."""
    sampler = TokenBudgetSampler(random_lengths(2000) // 8 + 1, 60)
    sets = [{frozenset(step) for step in sampler.steps(epoch)} for epoch in (0, 1)]
    assert len(sets[0] & sets[1]) < len(sets[0]) / 10


def test_without_shuffling_steps_are_in_order_of_length():
    lengths = random_lengths()
    sampler = TokenBudgetSampler(lengths, 200, shuffle=False)
    steps = sampler.steps(0)
    assert steps == sampler.steps(1)
    longest = [int(lengths[i].max()) for step in steps for i in step]
    assert longest == sorted(longest)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        (
            [[3, 4], [5, 20], [2, 2]],
            "batch_tokens must be at least the length of the longest sample, got 10 for sample 1 of 20 tokens",
        ),
        (np.zeros((0, 2), dtype=int), "there are no samples"),
    ],
)
def test_sampler_errors(lengths, message):
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(np.array(lengths), 10)


def test_two_sided_order_alternates_direction():
    lengths = np.array([[5, 3], [5, 5], [3, 5], [6, 6], [6, 4], [4, 6], [7, 5], [5, 7]])
    order = two_sided_order(lengths, np.random.default_rng(0).permutation(8))
    assert lengths[order].tolist() == [[3, 5], [5, 5], [5, 3], [6, 4], [6, 6], [4, 6], [5, 7], [7, 5]]


def test_padding_waste_by_hand():
    lengths = np.array([[2, 4], [4, 4], [1, 1]])
    assert padding_waste([[0, 1], [2]], lengths) == pytest.approx(1 - 16 / 18)
    assert padding_waste([[0], [1], [2]], lengths) == 0.0


def test_cut_keeps_order():
    longest = np.array([3, 1, 2, 5])
    assert cut([2, 0, 1, 3], longest, 6) == [[2, 0], [1], [3]]
    assert cut([], longest, 6) == []


# --- ranks, micro-batches and workers


@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_rank_parts_make_up_the_step(size):
    step = list(range(100, 107))
    parts = [part_of_rank(step, rank, size) for rank in range(size)]
    assert list(itertools.chain(*parts)) == step
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize("micro", [None, 45, 90])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_steps_do_not_depend_on_the_number_of_ranks(micro, ranks):
    lengths = random_lengths(120)
    sampler = TokenBudgetSampler(lengths, 130, seed=5)
    loaders = [StepLoader(examples(lengths), sampler, collate, micro, rank, ranks) for rank in range(ranks)]
    assert loaders[0].steps_per_epoch(2) == len(sampler.steps(2))
    per_rank = [list(loader.epoch(2)) for loader in loaders]
    for number, step in enumerate(sampler.steps(2)):
        shares = [per_rank[rank][number] for rank in range(ranks)]
        assert list(itertools.chain(*map(visible, shares))) == step
        assert len({len(share) for share in shares}) == 1  # the same number of micro-batches on every rank
        assert all(len(share) > 0 for share in shares)
        for batch in itertools.chain(*shares):
            assert batch["sources"] == batch["indices"]
            assert micro is None or batch["hidden"] or len(batch["indices"]) * batch["longest"] <= micro


def test_ranks_without_samples_get_dummy_batches():
    lengths = np.array([[5, 5], [9, 9]])
    sampler = TokenBudgetSampler(lengths, 9)
    batches = [list(StepLoader(examples(lengths), sampler, collate, None, r, 3).epoch(0)) for r in range(3)]
    for shares in zip(*batches, strict=True):
        assert sorted(batch["hidden"] for (batch,) in shares) == [False, True, True]


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches(workers):
    lengths = random_lengths(80)
    sampler = TokenBudgetSampler(lengths, 90)
    alone = StepLoader(examples(lengths), sampler, collate, 50, 0, 2)
    helped = StepLoader(examples(lengths), sampler, collate, 50, 0, 2, num_workers=workers)
    torch.manual_seed(3)
    for epoch, start in ((0, 0), (1, 4)):
        assert list(helped.epoch(epoch, start)) == list(alone.epoch(epoch, start))
        assert list(alone.epoch(epoch, start)) == list(alone.epoch(epoch))[start:]


def test_loading_does_not_use_the_global_random_state():
    lengths = random_lengths(30)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    list(StepLoader(examples(lengths), TokenBudgetSampler(lengths, 90), collate).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_micro_batch_budget_below_the_longest_sample():
    sampler = TokenBudgetSampler(np.array([[3, 4], [5, 20]]), 40)
    with pytest.raises(
        ValueError, match="micro_batch_tokens must be at least the length of the longest sample, got 10 for sample 1"
    ):
        StepLoader([], sampler, collate, micro_batch_tokens=10)


# --- real text


def test_waste_on_multi30k():
    """An epoch of Multi30k: our batches against random ones and transformers' grouping by length."""
    if not MULTI30K.is_dir():
        pytest.skip("Multi30k is not here")
    from transformers.trainer_pt_utils import LengthGroupedSampler

    pairs = text.text_pairs(text.load_splits(str(MULTI30K))["train"], "en", "de")
    lengths = np.array([[len(row["source"].split()), len(row["target"].split())] for row in pairs]) + 1
    grouped = list(
        LengthGroupedSampler(64, lengths=lengths[:, 0].tolist(), generator=torch.Generator().manual_seed(0))
    )
    random = rng(0).permutation(len(lengths)).tolist()
    waste = {
        "random": padding_waste([random[i : i + 64] for i in range(0, len(random), 64)], lengths),
        "grouped": padding_waste([grouped[i : i + 64] for i in range(0, len(grouped), 64)], lengths),
        "ours": padding_waste(TokenBudgetSampler(lengths, 10**6, max_samples=64).steps(0), lengths),
        "budget": padding_waste(TokenBudgetSampler(lengths, 4096).steps(0), lengths),
    }
    assert waste["ours"] < 0.02
    assert waste["budget"] < 0.04
    assert waste["grouped"] > 0.15
    assert waste["random"] > 0.4


def test_published_padding_waste():
    """The results file of `python -m benchmarks padding_waste`, with byte-pair tokens."""
    waste = json.loads(RESULTS.read_text())["waste"]
    ours = [share for name, share in waste.items() if name.startswith("both sides")]
    theirs = [share for name, share in waste.items() if not name.startswith("both sides")]
    assert len(ours) == len(theirs) == 2
    assert max(ours) <= 0.04
    assert min(theirs) > 0.2
