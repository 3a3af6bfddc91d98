"""Built-in text classification data set: is a number written in English words even or odd?

number words -> "nine hundred and eighty-four" -> even

A small but real classification task that needs no download: one of up to ten words decides, and finding it requires
attention to position ("sixty thousand and one" is odd, "one thousand and sixty" is even).
"""

from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

from .number_words import number_words

FEATURES = Features({"number": Value("int64"), "text": Value("string"), "label": ClassLabel(names=["even", "odd"])})


def number_parity(seed: int = 0, train: int = 5_000, validation: int = 500, test: int = 1_000) -> DatasetDict:
    """Return the numbers of `number_words` with their parity.

    Args:
        seed, train, validation, test: see `number_words`.

    Returns:
        Splits "train", "validation" and "test" with ``number``, ``text`` (English words) and ``label`` (even, odd).
    """
    splits = DatasetDict()
    for name, rows in number_words(seed, train, validation, test).items():
        numbers, words = rows["number"][:], [row["en"] for row in rows["translation"]]
        columns = {"number": numbers, "text": words, "label": [number % 2 for number in numbers]}
        splits[name] = Dataset.from_dict(columns, features=FEATURES)
    return splits
