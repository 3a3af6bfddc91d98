"""Properties of samplers and label maps for arbitrary sizes, seeds and names (hypothesis)."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Value
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tfm.data.batching import StepLoader, TokenBudgetSampler, part_of_rank, sample_ref
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.images import is_label, label_ids, label_names
from hf_tfm.data.labelled_texts import LengthBatchSampler

counts = st.integers(1, 60)
epochs, seeds = st.integers(0, 5), st.integers(0, 2**31)
lengths = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=60).map(np.array)
few = settings(max_examples=60, deadline=None)
# A number as text names the same class as the number, so it would be a duplicate.
words = st.text(min_size=1, max_size=8).filter(lambda name: name.strip() and not name.lstrip("-").isdecimal())
names = st.lists(words)


def flat(steps: list[list[int]]) -> list[int]:
    return [index for step in steps for index in step]


@few
@given(lengths, seeds, epochs, st.booleans(), st.integers(0, 90), st.none() | st.integers(1, 9))
def test_budget_is_respected_and_every_sample_used_once(sizes, seed, epoch, shuffle, room, most):
    budget = int(sizes.max()) + room
    steps = TokenBudgetSampler(sizes, budget, seed, shuffle, most).steps(epoch)
    assert sorted(flat(steps)) == list(range(len(sizes)))
    for step in steps:
        assert len(step) * sizes[step].max() <= budget
        assert most is None or len(step) <= most
    assert TokenBudgetSampler(sizes, budget, seed, shuffle, most).steps(epoch) == steps, "the same key, the same steps"


@few
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60).map(np.array), st.integers(1, 20), seeds, epochs)
def test_texts_of_similar_length_fill_equal_steps(sizes, batch_size, seed, epoch):
    steps = LengthBatchSampler(sizes, batch_size, seed).steps(epoch)
    assert sorted(flat(steps)) == list(range(len(sizes)))
    assert sorted(map(len, steps))[1:] == [batch_size] * (len(steps) - 1), "only one step may have fewer"


@few
@given(counts, st.integers(1, 20), seeds, epochs, st.booleans())
def test_equal_batches_drop_less_than_one_step(count, batch_size, seed, epoch, shuffle):
    drop_last = count >= batch_size
    steps = BatchSampler(count, batch_size, seed, shuffle, drop_last).steps(epoch)
    seen = flat(steps)
    assert len(set(seen)) == len(seen) and set(seen) <= set(range(count))
    assert count - len(seen) < batch_size
    if drop_last:
        assert {len(step) for step in steps} == {batch_size}
    if not shuffle:
        assert seen == list(range(len(seen)))


@few
@given(st.integers(6, 60), st.integers(2, 3), seeds, epochs)
def test_copies_of_a_sample_are_in_one_step(count, repeats, seed, epoch):
    batch_size = 2 * repeats
    for step in BatchSampler(count, batch_size, seed, repeats=repeats, drop_last=True).steps(epoch):
        samples, copies = np.unique([sample_ref(sample).index for sample in step], return_counts=True)
        assert len(set(step)) == batch_size and (copies == repeats).all() and (samples < count).all()


@few
@given(st.integers(0, 40), st.integers(1, 7), st.integers(1, 4))
def test_ranks_partition_a_step(size, world_size, unit):
    step = list(range(size * unit))
    parts = [part_of_rank(step, rank, world_size, unit) for rank in range(world_size)]
    assert [index for part in parts for index in part] == step
    assert all(len(part) % unit == 0 for part in parts)
    assert max(map(len, parts)) - min(map(len, parts)) <= unit


@few
@given(lengths, seeds, st.integers(1, 3), st.integers(0, 6))
def test_resumed_epoch_is_the_rest_of_the_full_one(sizes, seed, world_size, start):
    def collate(examples, indices, epoch, is_dummy=False):
        return [] if is_dummy else list(indices)

    sampler = TokenBudgetSampler(sizes, int(sizes.max()) + 20, seed)
    for rank in range(world_size):
        loader = StepLoader(list(range(len(sizes))), sampler, collate, rank=rank, world_size=world_size)
        whole = list(loader.epoch(1))
        assert list(loader.epoch(1, start)) == whole[start:]


@few
@given(names.filter(lambda found: len(set(found)) > 1), st.data())
def test_every_text_label_is_its_own_class(classes, data):
    values = data.draw(st.lists(st.sampled_from(classes), min_size=1))
    rows = Dataset.from_dict({"label": values + classes}, features=Features({"label": Value("string")}))
    found = label_names(rows)
    assert found == sorted(set(classes))
    ids = label_ids(rows, found)
    assert [found[ids[value]] for value in values] == values


@few
@given(st.lists(st.integers(0, 2**40), min_size=2, unique=True), st.booleans())
def test_every_integer_label_is_its_own_class(classes, missing):
    """An empty cell converts a table's integers to floats."""
    values = [float(value) for value in classes] + [None] if missing else classes
    rows = Dataset.from_dict({"label": values})
    found = label_names(rows)
    assert found == [str(value) for value in sorted(classes)]
    ids = label_ids(rows, found)
    assert [found[ids[value]] for value in values if is_label(value)] == [str(value) for value in classes]


@few
@given(names.filter(lambda found: len(set(found)) == len(found) > 1), st.permutations(range(6)))
def test_declared_classes_are_matched_by_name_in_any_order(classes, order):
    other = [classes[index] for index in order if index < len(classes)]
    classes = [name for name in classes if name in other]
    rows = Dataset.from_dict(
        {"label": list(range(len(classes)))}, features=Features({"label": ClassLabel(names=classes)})
    )
    ids = label_ids(rows, other)
    assert [other[ids[number]] for number in range(len(classes))] == classes
