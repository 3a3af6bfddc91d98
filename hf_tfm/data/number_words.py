"""The embedded data set: English number words and their German, "twenty-one" -> "einundzwanzig".

    seed -> numbers drawn without replacement -> shuffle -> train | validation | test -> words of both languages

A small but real translation task that needs no download: tens and units change places, words merge into one.
The words are num2words'. Numbers drawn below 100 are training rows: their words make up all others.
"""

from functools import cache

import numpy as np
from datasets import Dataset, DatasetDict, Features, Translation, Value
from num2words import num2words

# Below a million, German writes a number as one lower-case word. Zero is left out: its word occurs in no other number,
# and one row among thousands does not teach it.
LARGEST = 999_999
FEATURES = Features({"number": Value("int64"), "translation": Translation(languages=["en", "de"])})


@cache
def _spell(number: int, language: str) -> str:
    words = num2words(number, lang=language)
    # num2words 0.5.14 keeps the "s" of "eins" here (101,000: "einhunderteinstausend"); German drops it.
    return words.replace("einstausend", "eintausend") if language == "de" else words


def spell(number: int) -> dict[str, str]:
    """The words of a number: ``{"en": ..., "de": ...}``, in num2words' British English and in German.

    Thousands and rest are spelled apart and remembered, which makes a data set 10 times faster than num2words alone.

    Args:
        number: 1 to 999,999.

    Raises:
        ValueError: the number is outside this range.
    """
    if not 1 <= number <= LARGEST:
        raise ValueError(f"number must be in [1, {LARGEST}], got {number}")
    rest = number % 1000
    thousands = number - rest
    if not thousands or not rest:
        return {language: _spell(number, language) for language in ("en", "de")}
    joint = ", " if rest >= 100 else " and "
    return {
        "en": _spell(thousands, "en") + joint + _spell(rest, "en"),
        "de": _spell(thousands, "de") + _spell(rest, "de"),
    }


def draw_numbers(seed: int, count: int) -> np.ndarray:
    """Draw numbers without replacement, every order of magnitude about as likely as the next.

    A number n is drawn with weight 1 / n: the ``count`` smallest of E * n are taken, E exponential (Efraimidis and
    Spirakis 2006, doi:10.1016/j.ipl.2005.11.003). Of 6,500 drawn this way all 99 below 100 are there, and 800 below
    1,000, where as many uniform draws would have 7.

    Args:
        seed: 0 to 2^32 - 1; a seed gives the same numbers on every machine.
        count: at most 999,999.

    Returns:
        (count,) int64; first those below 100, then the others, both in random order.
    """
    # numpy keeps the stream of this generator frozen between versions, which it does not promise for default_rng.
    random = np.random.RandomState(seed)
    numbers = np.arange(1, LARGEST + 1)
    keys = random.standard_exponential(LARGEST) * numbers
    drawn = random.permutation(numbers[np.argsort(keys, kind="stable")[:count]])
    return drawn[np.argsort(drawn >= 100, kind="stable")]


def number_words(seed: int = 0, train: int = 5_000, validation: int = 500, test: int = 1_000) -> DatasetDict:
    """Generate the data set; no number stands in two splits.

    Args:
        seed: 0 to 2^32 - 1; draws and splits the numbers.
        train: rows of the training split.
        validation: rows of the validation split.
        test: rows of the test split.

    Returns:
        splits "train", "validation" and "test" with the columns ``number`` (int64) and ``translation``
        ({"en": words, "de": words}).

    Raises:
        ValueError: a size or the seed is out of range, or there are more rows than the 999,999 numbers.
    """
    sizes = {"train": train, "validation": validation, "test": test}
    for name, size in sizes.items():
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
    total = sum(sizes.values())
    if total > LARGEST:
        raise ValueError(f"train + validation + test must be at most {LARGEST}, the numbers there are, got {total}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    numbers = draw_numbers(seed, total)
    splits, start = DatasetDict(), 0
    for name, size in sizes.items():
        chosen = numbers[start : start + size].tolist()
        rows = {"number": chosen, "translation": [spell(number) for number in chosen]}
        splits[name] = Dataset.from_dict(rows, features=FEATURES)
        start += size
    return splits
