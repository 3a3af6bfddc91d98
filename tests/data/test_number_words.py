"""The embedded number-words data set."""

import hashlib
import json
import math
import random

import pytest
from num2words import num2words

from hf_tfm.data.number_words import LARGEST, draw_numbers, number_words, spell

# For seed 0 with 300, 20 and 30 rows.
CONTENT = "959750573226f47e4674cfa410bbd5c154b9530f7a2fb655e182465d68adf383"


def content_hash(splits) -> str:
    rows = {name: split.to_list() for name, split in splits.items()}
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize(
    ("number", "english", "german"),
    [
        (1, "one", "eins"),
        (16, "sixteen", "sechzehn"),
        (21, "twenty-one", "einundzwanzig"),
        (30, "thirty", "dreißig"),
        (77, "seventy-seven", "siebenundsiebzig"),
        (101, "one hundred and one", "einhunderteins"),
        (1000, "one thousand", "eintausend"),
        (1001, "one thousand and one", "eintausendeins"),
        (6016, "six thousand and sixteen", "sechstausendsechzehn"),
        (21000, "twenty-one thousand", "einundzwanzigtausend"),
        (101_000, "one hundred and one thousand", "einhunderteintausend"),
        (
            301_101,
            "three hundred and one thousand, one hundred and one",
            "dreihunderteintausendeinhunderteins",
        ),
        (
            999_912,
            "nine hundred and ninety-nine thousand, nine hundred and twelve",
            "neunhundertneunundneunzigtausendneunhundertzwölf",
        ),
    ],
)
def test_words(number, english, german):
    assert spell(number) == {"en": english, "de": german}


def test_spelling_from_parts_matches_num2words():
    for number in random.Random(0).sample(range(1, LARGEST), 300) + list(range(1000, LARGEST, 7000)):
        german = num2words(number, lang="de").replace("einstausend", "eintausend")
        assert spell(number) == {"en": num2words(number, lang="en"), "de": german}


@pytest.mark.parametrize("number", [0, LARGEST + 1])
def test_number_out_of_range_is_refused(number):
    with pytest.raises(ValueError, match=rf"number must be in \[1, 999999\], got {number}"):
        spell(number)


def test_splits_share_no_number_and_rows_match_their_number():
    splits = number_words(seed=3, train=3000, validation=100, test=200)
    numbers = [number for split in splits.values() for number in split["number"]]
    assert {name: len(split) for name, split in splits.items()} == {"train": 3000, "validation": 100, "test": 200}
    assert len(set(numbers)) == len(numbers) == 3300
    assert all(row["translation"] == spell(row["number"]) for split in splits.values() for row in split)
    sentences = {row["translation"]["de"] for row in splits["train"]}
    assert not sentences & {row["translation"]["de"] for row in splits["test"]}


def test_content_depends_only_on_the_seed():
    first = number_words(seed=0, train=300, validation=20, test=30)
    again = number_words(seed=0, train=300, validation=20, test=30)
    other = number_words(seed=1, train=300, validation=20, test=30)
    assert content_hash(first) == content_hash(again) == CONTENT
    assert content_hash(other) != CONTENT
    # The data set's own fingerprint, which a model card states, also depends only on the content.
    assert first["train"]._fingerprint == again["train"]._fingerprint != other["train"]._fingerprint


@pytest.mark.parametrize("seed", range(3))
def test_numbers_below_100_are_training_rows(seed):
    splits = number_words(seed=seed, train=2000, validation=50, test=100)
    numbers = splits["train"]["number"][:]
    assert sum(number < 100 for number in numbers) > 85
    assert min(splits["validation"]["number"][:] + splits["test"]["number"][:]) >= 100
    # The other rows are shuffled, so every split has numbers of every size.
    later = [math.log10(number) for number in numbers if number >= 100]
    assert abs(sum(later[:900]) - sum(later[-900:])) < 0.2 * 900


def test_every_order_of_magnitude_is_present():
    numbers = draw_numbers(seed=0, count=20_000)
    counts = [((numbers >= 10**digits) & (numbers < 10 ** (digits + 1))).sum() for digits in range(6)]
    assert counts[:2] == [9, 90]
    assert counts[2] > 850
    assert min(counts[3:]) > 4000
    # Not the k smallest ones: long numbers are spread over their whole range.
    assert numbers.max() > 990_000


def test_all_numbers_can_be_drawn():
    numbers = draw_numbers(seed=0, count=LARGEST)
    assert sorted(numbers.tolist()) == list(range(1, LARGEST + 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"train": LARGEST, "validation": 1, "test": 0}, "must be at most 999999, the numbers there are, got 1000000"),
        ({"train": -2}, "train must be at least 0, got -2"),
        ({"test": -1}, "test must be at least 0, got -1"),
        ({"seed": -1}, r"seed must be in \[0, 2\^32\), got -1"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        number_words(**arguments)
