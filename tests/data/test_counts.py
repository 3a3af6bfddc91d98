"""Samplers and metrics refuse non-numbers and name the argument and index."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_tfm.data.batching import TokenBudgetSampler, part_of_rank
from hf_tfm.data.labelled_texts import LengthBatchSampler
from hf_tfm.data.shape_batches import ShapeSampler
from hf_tfm.metrics.accuracy import Accuracy
from hf_tfm.metrics.glue import Glue


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([3, math.nan], r"lengths\[1\] must be a whole number of at least 0, got nan"),
        ([3, -1], r"lengths\[1\] .* got -1"),
        ([2.5], r"lengths\[0\] .* got 2.5"),
        ([[[1]]], r"lengths must have one or two dimensions, got shape \(1, 1, 1\)"),
        (["a"], "lengths must be numbers"),
        ([], "there are no samples to batch"),
    ],
)
def test_invalid_lengths(lengths, message):
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(np.array(lengths), 100)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([4, 5], r"sizes must have shape \(N, 2\), height and width of each image, got \(2,\)"),
        ([[4, 5, 6]], r"sizes must have shape \(N, 2\).* got \(1, 3\)"),
        ([[4, -5]], r"sizes\[0\] must be .* got \[4, -5\]"),
        ([[4, math.nan]], r"sizes\[0\] must be .* got \[4.0, nan\]"),
    ],
)
def test_invalid_sizes(sizes, message):
    with pytest.raises(ValueError, match=message):
        ShapeSampler(np.array(sizes), 1)


def test_nonfinite_regression_values():
    for predictions, references, message in (
        ([1.0, math.nan], [1.0, 2.0], r"predictions\[1\] must be a finite number, got nan"),
        ([math.inf, 1.0], [1.0, 2.0], r"predictions\[0\] .* got inf"),
        ([1.0, 2.0], [1.0, -math.inf], r"references\[1\] .* got -inf"),
    ):
        with pytest.raises(ValueError, match=message):
            Glue("stsb").compute(predictions=predictions, references=references)
    assert Glue("stsb").compute(predictions=[1.0, 2.0, math.nan], references=[1.0, 2.0, None])["pearson"] == 1


def test_class_numbers_out_of_range():
    with pytest.raises(ValueError, match=r"predictions\[0\] must be below 2147483648, got 10{30}"):
        Accuracy().compute(predictions=[10**30], references=[1])


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=60),
    st.integers(30, 90),
    st.integers(0, 5),
    st.booleans(),
)
def test_every_sample_is_used_once_in_steps_within_the_budget(lengths, budget, epoch, shuffle):
    lengths = np.array(lengths)
    sampler = TokenBudgetSampler(lengths, budget, shuffle=shuffle)
    steps = sampler.steps(epoch)
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    assert all(len(step) * lengths[step].max() <= budget for step in steps)
    for step in steps:
        for world in (1, 2, 3):
            assert [i for rank in range(world) for i in part_of_rank(step, rank, world)] == list(step)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 9))
def test_equal_steps_of_texts(lengths, batch_size):
    steps = LengthBatchSampler(np.array(lengths), batch_size).steps(0)
    assert sorted(i for step in steps for i in step) == list(range(len(lengths)))
    assert sorted(map(len, steps), reverse=True)[:-1] == [batch_size] * (len(steps) - 1)
