"""Built-in instruction data sets: spell a number, "Spell 21." -> "Certainly! 21 is spelled twenty-one."

seed -> numbers by split -> prompts -> demonstrations | preference pairs | rankings, by a reward that can be checked

Three data sets for supervised fine-tuning, reward models and reinforcement learning that need no download. Whether an
answer is right is known, so a learned reward can be compared with the true one. A right answer in the form of a polite
sentence is better than the number's words alone, and any right answer is better than a wrong one.

    "Certainly! 21 is spelled twenty-one."   1.0
    "Twenty-one."                            0.5
    "Certainly! 21 is spelled twelve."       0.0

The numbers of the splits are disjoint, and so are their prompts. All numbers below 100 belong to the training split:
the others are composed of their words.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, List, Value

from .number_words import spell

LARGEST = 999
TEMPLATES = ("Spell {}.\n", "Write {} in words.\n", "How do you spell {}?\n", "Please spell the number {}.\n")
POLITE, TERSE, WRONG = 1.0, 0.5, 0.0  # rewards
NUMBER = re.compile(r"\d+")

TEXT = Value("string")
PROMPT = {"number": Value("int64"), "prompt": TEXT}
DEMONSTRATIONS = Features({**PROMPT, "completion": TEXT})
PREFERENCES = Features({**PROMPT, "chosen": TEXT, "rejected": TEXT})
RANKINGS = Features({**PROMPT, "completions": List(TEXT), "scores": List(Value("float32"))})


@cache
def words_of(number: int) -> str:
    """Return a number from 1 to 999,999 in English words: "twenty-one"."""
    return spell(number)["en"]


@cache
def number_words() -> frozenset[str]:
    """Return the words that the numbers up to `LARGEST` are made of."""
    return frozenset(word for number in range(1, LARGEST + 1) for word in re.split("[ -]", words_of(number)))


def polite_answer(number: int, spelled: int | None = None) -> str:
    """Return an answer as a polite sentence.

    Args:
        number: of the prompt.
        spelled: the number whose words it gives; default, the right ones.
    """
    return f"Certainly! {number} is spelled {words_of(number if spelled is None else spelled)}."


def terse_answer(spelled: int) -> str:
    """Return an answer of the number's words alone."""
    return f"{words_of(spelled).capitalize()}."


def spelled_in(text: str) -> list[str]:
    """Return the numbers that a text spells, as lower-case words separated by single spaces, hyphens included."""
    runs: list[list[str]] = [[]]
    for word in re.findall(r"[a-z]+|[^a-z\s-]", text.lower()):
        if word in number_words():
            runs[-1].append(word)
        elif runs[-1]:
            runs.append([])
    joined = [" ".join(run).removeprefix("and ").removesuffix(" and") for run in runs]
    return [words for words in joined if words not in ("", "and")]


def spelling_reward(prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Return the true reward of answers: 1 if right and a polite sentence, 0.5 if right, 0 if wrong.

    An answer is right if it spells the number of its prompt, once, and mentions no other number. The signature is that
    of the reward functions of trl.

    Args:
        prompts: each with a number of at most `LARGEST` in digits, such as those of `spelled_numbers`.
        completions: generated answers, without special tokens.
        columns: ignored.

    Raises:
        ValueError: there are not as many prompts as completions, or a prompt has no such number.
    """
    if len(prompts) != len(completions):
        raise ValueError(f"prompts and completions must be equally many, got {len(prompts)} and {len(completions)}")
    rewards = []
    for prompt, completion in zip(prompts, completions, strict=True):
        found = NUMBER.search(prompt)
        number, answer = int(found.group()) if found else 0, completion.strip()
        if not 1 <= number <= LARGEST:
            raise ValueError(f"a prompt must have a number from 1 to {LARGEST} in digits, got {prompt!r}")
        right = spelled_in(answer) == [words_of(number).replace("-", " ")]
        right = right and set(NUMBER.findall(answer)) <= {str(number)}
        rewards.append((POLITE if answer == polite_answer(number) else TERSE) if right else WRONG)
    return rewards


def wrong_number(number: int, random: np.random.RandomState) -> int:
    """Draw a number that differs from another one in one digit, from 1 to `LARGEST`."""
    while True:
        digits = list(str(number))
        digits[random.randint(len(digits))] = str(random.randint(10))
        if (drawn := int("".join(digits))) not in (0, number):
            return drawn


def draw_prompts(seed: int = 0, validation: int = 100, test: int = 200) -> dict[str, list[tuple[int, str]]]:
    """Draw numbers of each split, with their prompts.

    Args:
        seed: 0 to 2^32 - 1; the same on every machine.
        validation: prompts of the validation split.
        test: prompts of the test split.

    Returns:
        {"train", "validation", "test": (number, prompt) pairs in random order}. The training split has a prompt for
        each of its numbers and each of `TEMPLATES`; the others have one for each number.

    Raises:
        ValueError: the seed or a size is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    for name, size in {"validation": validation, "test": test}.items():
        if size < 0:
            raise ValueError(f"{name} must be at least 0, got {size}")
    if validation + test > (most := LARGEST - 99):
        raise ValueError(f"validation + test must be at most {most}, the numbers above 99, got {validation + test}")
    random = np.random.RandomState(seed)  # NumPy guarantees the stream of this legacy generator across versions
    drawn = random.permutation(np.arange(100, LARGEST + 1)).tolist()
    held_out = {"validation": drawn[:validation], "test": drawn[validation : validation + test]}
    train = [(n, t.format(n)) for n in [*range(1, 100), *drawn[validation + test :]] for t in TEMPLATES]
    prompts = {"train": [train[i] for i in random.permutation(len(train))]}
    for name, numbers in held_out.items():
        prompts[name] = [(n, TEMPLATES[random.randint(len(TEMPLATES))].format(n)) for n in numbers]
    return prompts


def spelled_numbers(seed: int = 0, validation: int = 100, test: int = 200, polite: float = 0.5) -> DatasetDict:
    """Generate demonstrations, all right, for supervised fine-tuning.

    Args:
        seed, validation, test: see `draw_prompts`.
        polite: fraction of polite sentences among the answers.

    Returns:
        Splits "train", "validation" and "test" with ``number``, ``prompt`` and ``completion``. A prompt ends with a
        line break, and a completion follows it directly.

    Raises:
        ValueError: an argument is out of range.
    """
    if not 0 <= polite <= 1:
        raise ValueError(f"polite must be in [0, 1], got {polite}")
    prompts, random = draw_prompts(seed, validation, test), np.random.RandomState(seed)

    def answer(number: int) -> dict[str, Any]:
        return {"completion": polite_answer(number) if random.rand() < polite else terse_answer(number)}

    return _splits(prompts, answer, DEMONSTRATIONS)


def spelled_number_preferences(
    seed: int = 0, validation: int = 100, test: int = 200, label_noise: float = 0.1
) -> DatasetDict:
    """Generate pairs of answers to the prompts of `spelled_numbers`, of which the first is better.

    A pair has two of three answers: a polite sentence, the words alone, or a wrong answer in one of these forms whose
    number differs in one digit.

    Args:
        seed, validation, test: see `draw_prompts`.
        label_noise: fraction of the training pairs that are swapped; the other splits have none.

    Returns:
        Splits with ``number``, ``prompt``, ``chosen`` and ``rejected``.

    Raises:
        ValueError: an argument is out of range.
    """
    prompts, random = draw_prompts(seed, validation, test), np.random.RandomState(seed)

    def pair(number: int) -> dict[str, Any]:
        chosen, rejected = (candidates(number, random)[i] for i in ((0, 1), (0, 2), (1, 2))[random.randint(3)])
        return {"chosen": chosen, "rejected": rejected}

    splits = _splits(prompts, pair, PREFERENCES)
    flips = _flips(len(splits["train"]), seed, label_noise)
    chosen, rejected = splits["train"]["chosen"][:], splits["train"]["rejected"][:]
    both = [(r, c) if flip else (c, r) for c, r, flip in zip(chosen, rejected, flips, strict=True)]
    columns = {**splits["train"].to_dict(), "chosen": [c for c, _ in both], "rejected": [r for _, r in both]}
    splits["train"] = Dataset.from_dict(columns, features=PREFERENCES)
    return splits


def spelled_number_rankings(
    seed: int = 0, validation: int = 100, test: int = 200, label_noise: float = 0.1
) -> DatasetDict:
    """Generate rankings of four answers to the prompts of `spelled_numbers`: a polite sentence, the words alone, and
    two wrong answers, which are equally bad.

    Args:
        seed, validation, test: see `draw_prompts`.
        label_noise: fraction of the training rankings in which two answers of different reward have changed places.

    Returns:
        Splits with ``number``, ``prompt``, ``completions`` in random order, and ``scores``, the reward of each.

    Raises:
        ValueError: an argument is out of range.
    """
    prompts, random = draw_prompts(seed, validation, test), np.random.RandomState(seed)

    def ranking(number: int) -> dict[str, Any]:
        answers = [*candidates(number, random), candidates(number, random)[2]]
        order = random.permutation(len(answers))
        scores = (POLITE, TERSE, WRONG, WRONG)
        return {"completions": [answers[i] for i in order], "scores": [scores[i] for i in order]}

    splits = _splits(prompts, ranking, RANKINGS)
    columns = splits["train"].to_dict()
    for scores, flip in zip(columns["scores"], _flips(len(splits["train"]), seed, label_noise), strict=True):
        if flip:
            first = random.randint(len(scores))
            others = [i for i, score in enumerate(scores) if score != scores[first]]
            second = others[random.randint(len(others))]
            scores[first], scores[second] = scores[second], scores[first]
    splits["train"] = Dataset.from_dict(columns, features=RANKINGS)
    return splits


def candidates(number: int, random: np.random.RandomState) -> list[str]:
    """Return three answers, best first: a polite sentence, the words alone, and a wrong answer of either form."""
    wrong = wrong_number(number, random)
    wrong_answer = polite_answer(number, wrong) if random.randint(2) else terse_answer(wrong)
    return [polite_answer(number), terse_answer(number), wrong_answer]


def _flips(count: int, seed: int, label_noise: float) -> np.ndarray:
    """Return which of the training rows have a wrong label, bool (count,)."""
    if not 0 <= label_noise <= 1:
        raise ValueError(f"label_noise must be in [0, 1], got {label_noise}")
    return np.random.RandomState(seed).permutation(count) < round(label_noise * count)


def _splits(prompts: dict[str, list[tuple[int, str]]], columns: Any, features: Features) -> DatasetDict:
    """Return rows of number, prompt and ``columns(number)`` by split."""
    splits = DatasetDict()
    for name, pairs in prompts.items():
        rows = [{"number": number, "prompt": prompt, **columns(number)} for number, prompt in pairs]
        splits[name] = Dataset.from_list(rows, features=features)
    return splits
