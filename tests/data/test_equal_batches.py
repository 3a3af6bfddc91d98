"""Batches of equal sample counts: every sample once, pairs and copies kept together, any number of ranks."""

import itertools

import numpy as np
import pytest
from datasets import Dataset
from thread_ranks import run_on_ranks

from hf_tfm.data.batching import StepLoader, sample_ref
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.stream import StreamLoader, pool_seed


def collate(rows, indices, epoch, hidden):
    return {"rows": rows, "indices": indices, "epoch": epoch, "hidden": hidden}


def steps_of(count, batch_size, micro=None, rank=0, world_size=1, **options):
    """The micro-batches of an epoch, by step."""
    sampler = BatchSampler(count, batch_size, **options)
    return list(StepLoader(list(range(count)), sampler, collate, micro, rank, world_size).epoch(1))


def visible(micro_batches):
    return [index for batch in micro_batches if not batch["hidden"] for index in batch["indices"]]


@pytest.mark.parametrize("shuffle", [True, False])
def test_every_sample_is_used_once_in_steps_of_equal_size(shuffle):
    sampler = BatchSampler(23, 5, shuffle=shuffle)
    for epoch in range(3):
        steps = sampler.steps(epoch)
        assert list(map(len, steps)) == [5, 5, 5, 5, 3]
        assert sorted(itertools.chain(*steps)) == list(range(23))
        assert (list(itertools.chain(*steps)) == list(range(23))) == (not shuffle)
    assert list(map(len, BatchSampler(23, 5, drop_last=True).steps(0))) == [5, 5, 5, 5]


def test_order_depends_only_on_seed_and_epoch():
    sampler = BatchSampler(50, 8, seed=1)
    first = sampler.steps(3)
    np.random.seed(7)
    sampler.steps(0)
    assert sampler.steps(3) == first == BatchSampler(50, 8, seed=1).steps(3)
    assert first not in (sampler.steps(4), BatchSampler(50, 8, seed=2).steps(3))


@pytest.mark.parametrize("unit", [1, 2])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("micro", [None, 2, 4])
def test_ranks_and_micro_batches_only_split_steps(world_size, micro, unit):
    """Every sample once over all ranks, in the same order, with equal numbers of micro-batches and intact pairs."""
    whole = [visible(step) for step in steps_of(23, 6, unit=unit)]
    ranks = [steps_of(23, 6, micro, rank, world_size, unit=unit) for rank in range(world_size)]
    for number, expected in enumerate(whole):
        parts = [steps[number] for steps in ranks]
        assert list(itertools.chain(*map(visible, parts))) == expected
        assert len({len(part) for part in parts}) == 1
        for batch in itertools.chain(*parts):
            if not batch["hidden"]:
                assert micro is None or len(batch["indices"]) <= micro
                assert expected.index(batch["indices"][0]) % unit == 0


def test_copies_are_the_same_rows_with_other_keys():
    steps = steps_of(40, 8, repeats=3, unit=2)
    assert list(map(len, (visible(step) for step in steps))) == [8] * 5  # as many steps as without copies
    seen = []
    for (batch,) in steps:
        assert batch["rows"] == [sample_ref(i).index for i in batch["indices"]]
        assert len(set(batch["indices"])) == 8
        rows = batch["rows"]
        assert sorted(rows.count(row) for row in set(rows)) == [2, 3, 3]
        assert all(a != b for a, b in zip(rows[::2], rows[1::2], strict=True))  # no two copies in a pair
        seen += set(rows)
    assert len(seen) == len(set(seen)) == 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"count": 0}, "there are no samples"),
        ({"batch_size": 11, "drop_last": True}, "batch_size must be at most the 10 samples with drop_last, got 11"),
        ({"batch_size": 5, "unit": 2}, "batch_size must be a multiple of 2, .*, got 5"),
        ({"repeats": 3, "shuffle": False}, "repeats=3 leaves samples out"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        BatchSampler(**{"count": 10, "batch_size": 4, **options})


def test_micro_batch_must_not_split_a_pair():
    with pytest.raises(ValueError, match=r"micro_batch_size must be a multiple of 2, .*, got 3"):
        StepLoader(list(range(8)), BatchSampler(8, 4, unit=2), collate, micro_batch_tokens=3)


# --- streams


def loader_of(rows, batch_size, seed=0, repeats=1, unit=1, collate=collate, **options):
    def sampler(sizes, first):
        return BatchSampler(len(sizes), batch_size, pool_seed(seed, first), repeats=repeats, unit=unit)

    return StreamLoader(rows, sampler, collate, seed=seed, **options)


def stream_of(count, batch_size, epoch=0, start=0, world=1, **options):
    """The micro-batches of a stream of the numbers below ``count``, by step; of several ranks, of each of them."""
    rows = Dataset.from_dict({"row": list(range(count))}).to_iterable_dataset()
    ranks = run_on_ranks(world, loader_of, epoch, start, rows=rows, batch_size=batch_size, **options)
    return ranks[0][0] if world == 1 else [steps for steps, _ in ranks]


def numbers_of(batch):
    return [row["row"] for row in batch["rows"]]


def test_stream_uses_every_sample_once_in_equal_steps():
    first = stream_of(23, 4, pool_samples=8)
    assert [len(visible(step)) for step in first] == [4, 4, 4, 4, 4, 3]
    numbers = [visible(step) for step in first]
    assert sorted(itertools.chain(*numbers)) == list(range(23)) != list(itertools.chain(*numbers))
    for pool in (0, 1):  # two steps each
        assert sorted(numbers[2 * pool] + numbers[2 * pool + 1]) == list(range(8 * pool, 8 * pool + 8))
    assert all(numbers_of(batch) == batch["indices"] for step in first for batch in step)
    assert stream_of(23, 4, pool_samples=8, start=2) == first[2:]
    assert stream_of(23, 4, pool_samples=8, num_workers=1) == first
    assert stream_of(23, 4, epoch=1, pool_samples=8) != first


def test_ranks_of_a_stream_share_its_steps():
    whole = [visible(step) for step in stream_of(23, 6, unit=2)]
    ranks = stream_of(23, 6, unit=2, world=2, micro_batch_tokens=2)
    for number, expected in enumerate(whole):
        assert list(itertools.chain(*(visible(steps[number]) for steps in ranks))) == expected


def test_copies_in_a_stream_have_distinct_keys():
    for (batch,) in stream_of(16, 4, pool_samples=8, repeats=2):
        assert numbers_of(batch) == [sample_ref(i).index for i in batch["indices"]]
        assert len(set(numbers_of(batch))) == 2 and len(set(batch["indices"])) == 4


def shuffled_steps(buffer, epoch=0, start=0, files=3, **options):
    """A stream of 240 rows sorted by class, 24 classes; steps of 8."""
    rows = Dataset.from_dict({"row": list(range(240)), "label": [row // 10 for row in range(240)]})
    loader = loader_of(rows.to_iterable_dataset(num_shards=files), 8, 1, pool_samples=-(-buffer // 8) * 8, **options)
    return list(loader.epoch(epoch, start))


def rows_of(steps):
    """The rows of each step, in order."""
    return [[row["row"] for batch in step if not batch["hidden"] for row in batch["rows"]] for step in steps]


def test_stream_sorted_by_class_is_shuffled():
    def classes(steps):
        return np.mean([len({row // 10 for row in step}) for step in rows_of(steps)])

    assert classes(shuffled_steps(16, files=1)) < 3, "a step of a small buffer has two classes or three"
    for files, buffer in ((1, 16), (1, 120), (3, 16), (3, 120)):
        steps = shuffled_steps(buffer, files=files)
        assert sorted(itertools.chain(*rows_of(steps))) == list(range(240)), "every row once"
        assert all(row["label"] == row["row"] // 10 for step in steps for batch in step for row in batch["rows"])
        assert buffer == 16 or classes(steps) > 5
    first = itertools.chain(*rows_of(shuffled_steps(64))[:8])
    assert {row // 80 for row in first} == {0, 1, 2}, "files are read in turn"
    files = {tuple(row // 12 for row in rows_of(shuffled_steps(8, epoch, files=20))[0]) for epoch in range(5)}
    assert len(files) == 5, "files come in another order"


def test_shuffled_stream_order_depends_only_on_seed_and_epoch():
    first = shuffled_steps(50)
    assert shuffled_steps(50) == first
    begun = [sorted(itertools.chain(*rows_of(shuffled_steps(50, epoch, files=12))[:2])) for epoch in (0, 1)]
    assert begun[0] != begun[1], "another epoch begins with other rows"
    for epoch in (0, 1):
        whole = shuffled_steps(50, epoch)
        assert shuffled_steps(50, epoch, start=7) == whole[7:], "resuming"
        assert shuffled_steps(50, epoch, num_workers=1) == whole
        assert shuffled_steps(50, epoch, start=3, num_workers=2) == whole[3:]


def test_concurrent_epochs_of_one_loader_are_independent():
    rows = Dataset.from_dict({"row": list(range(60))}).to_iterable_dataset(num_shards=3)
    loader = loader_of(rows, 4, pool_samples=8)
    expected = [list(loader.epoch(epoch)) for epoch in range(3)]
    next(loader.epoch(2))
    assert [list(loader.epoch(epoch)) for epoch in (1, 0, 2)] == [expected[1], expected[0], expected[2]]
