"""Built-in translation data set: English number words and their German translation, "twenty-one" -> "einundzwanzig".

    seed -> numbers drawn without replacement -> shuffle -> train | validation | test -> words of both languages

A small but real translation task that needs no download: tens and units swap places, and words merge into one. The
words come from num2words. Numbers below 100 are assigned to the training split first: all other numbers are composed
of their words.
"""

from functools import cache

import numpy as np
from datasets import Dataset, DatasetDict, Features, Translation, Value
from num2words import num2words

# Below a million, German writes a number as one lower-case word. Zero is excluded: its word occurs in no other number,
# so it could not be learned from one row among thousands.
LARGEST = 999_999
FEATURES = Features({"number": Value("int64"), "translation": Translation(languages=["en", "de"])})


@cache
def _spell(number: int, language: str) -> str:
    words = num2words(number, lang=language)
    # num2words 0.5.14 keeps the "s" of "eins" here (101,000: "einhunderteinstausend"); German drops it.
    return words.replace("einstausend", "eintausend") if language == "de" else words


def spell(number: int) -> dict[str, str]:
    """Return the words of a number, ``{"en": ..., "de": ...}``, in num2words' British English and in German.

    Thousands and remainder are spelled separately and cached, which is 10 times faster for a data set than num2words
    alone.

    Args:
        number: 1 to 999,999.

    Raises:
        ValueError: if the number is outside this range.
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
    """Draw numbers without replacement, with every order of magnitude about equally likely.

    A number n is drawn with weight 1 / n by taking the ``count`` smallest values of E * n, E exponential (Efraimidis
    and Spirakis 2006, doi:10.1016/j.ipl.2005.11.003). 6,500 numbers drawn this way include all 99 below 100 and 800
    below 1,000; a uniform draw would include 7 below 1,000.

    Args:
        seed: 0 to 2^32 - 1; gives the same numbers on every machine.
        count: at most 999,999.

    Returns:
        (count,) int64; numbers below 100 first, then the others, both in random order.
    """
    # NumPy guarantees a stable stream across versions for this legacy generator, but not for default_rng.
    random = np.random.RandomState(seed)
    numbers = np.arange(1, LARGEST + 1)
    keys = random.standard_exponential(LARGEST) * numbers
    drawn = random.permutation(numbers[np.argsort(keys, kind="stable")[:count]])
    return drawn[np.argsort(drawn >= 100, kind="stable")]


def number_words(seed: int = 0, train: int = 5_000, validation: int = 500, test: int = 1_000) -> DatasetDict:
    """Generate the data set; the splits are disjoint.

    Args:
        seed: 0 to 2^32 - 1; determines the numbers and their split.
        train: rows of the training split.
        validation: rows of the validation split.
        test: rows of the test split.

    Returns:
        Splits "train", "validation" and "test" with the columns ``number`` (int64) and ``translation`` ({"en": words,
        "de": words}).

    Raises:
        ValueError: if a size or the seed is out of range, or more than 999,999 rows are requested.
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
