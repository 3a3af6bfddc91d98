"""The embedded data sets of spelled numbers, and the reward of answers."""

import pytest

from hf_tfm.data import spelled_numbers as data
from hf_tfm.data.source import load_splits
from hf_tfm.data.spelled_numbers import spelling_reward

NAMES = ("spelled-numbers", "spelled-number-preferences", "spelled-number-rankings")


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("Certainly! 105 is spelled one hundred and five.", 1.0),
        (" Certainly! 105 is spelled one hundred and five.\n", 1.0),
        ("One hundred and five.", 0.5),
        ("one hundred and five", 0.5),
        ("It is one hundred and five, I think.", 0.5),
        ("Certainly! Certainly! 105 is spelled one hundred and five.", 0.5),
        ("Certainly! 105 is spelled one hundred and six.", 0.0),
        ("Certainly! 106 is spelled one hundred and five.", 0.0),
        ("One hundred and five. One hundred and five.", 0.0),
        ("One hundred and five or one hundred and six.", 0.0),
        ("One hundred and fifty-five.", 0.0),
        ("One hundred and", 0.0),
        ("105", 0.0),
        ("", 0.0),
    ],
)
def test_reward(answer, reward):
    assert spelling_reward(["How do you spell 105?\n"], [answer]) == [reward]


def test_reward_refuses_prompts_without_numbers_and_uneven_lists():
    with pytest.raises(ValueError, match="must have a number from 1 to 999 in digits, got 'Hello'"):
        spelling_reward(["Hello"], ["five"])
    with pytest.raises(ValueError, match="equally many, got 1 and 2"):
        spelling_reward(["Spell 5."], ["five", "five"])


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_disjoint_and_reproducible(name):
    splits = load_splits(name)
    numbers = {split: set(rows["number"]) for split, rows in splits.items()}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 2796, "validation": 100, "test": 200}
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values())) == 999
    assert set(range(1, 100)) <= numbers["train"]
    generate = getattr(data, name.replace("-", "_"))
    assert generate()["train"][:50] == splits["train"][:50]
    assert generate(seed=1)["test"][:50] != splits["test"][:50]


def test_demonstrations_are_right_in_two_forms():
    rows = load_splits("spelled-numbers")["train"]
    rewards = spelling_reward(rows["prompt"], rows["completion"])
    assert set(rewards) == {0.5, 1.0}
    assert 0.45 < rewards.count(1.0) / len(rewards) < 0.55
    polite = data.spelled_numbers(polite=1)["test"]
    assert set(spelling_reward(polite["prompt"], polite["completion"])) == {1.0}


def test_preferences_follow_the_reward_except_for_label_noise():
    splits = load_splits("spelled-number-preferences")

    def swapped(rows):
        chosen, rejected = (spelling_reward(rows["prompt"][:], rows[name][:]) for name in ("chosen", "rejected"))
        assert all(a != b for a, b in zip(chosen, rejected, strict=True))
        return sum(a < b for a, b in zip(chosen, rejected, strict=True))

    assert swapped(splits["test"]) == swapped(splits["validation"]) == 0
    assert swapped(splits["train"]) == 280
    assert swapped(data.spelled_number_preferences(label_noise=0)["train"]) == 0


def test_rankings_have_the_reward_as_score_except_for_label_noise():
    splits = load_splits("spelled-number-rankings")

    def wrong(rows):
        return sum(spelling_reward([row["prompt"]] * 4, row["completions"]) != row["scores"] for row in rows.to_list())

    assert wrong(splits["test"]) == 0
    assert wrong(splits["train"]) == 280
    assert all(sorted(scores) == [0, 0, 0.5, 1] for scores in splits["train"]["scores"])


@pytest.mark.parametrize(
    ("generate", "options", "message"),
    [
        (data.spelled_numbers, {"seed": -1}, r"seed must be in \[0, 2\^32\), got -1"),
        (data.spelled_numbers, {"test": -1}, "test must be at least 0, got -1"),
        (data.spelled_numbers, {"test": 850}, "at most 900, the numbers above 99, got 950"),
        (data.spelled_numbers, {"polite": 2}, r"polite must be in \[0, 1\], got 2"),
        (data.spelled_number_preferences, {"label_noise": 2}, r"label_noise must be in \[0, 1\], got 2"),
        (data.spelled_number_rankings, {"label_noise": -1}, r"label_noise must be in \[0, 1\], got -1"),
    ],
)
def test_arguments_out_of_range_are_refused(generate, options, message):
    with pytest.raises(ValueError, match=message):
        generate(**options)
