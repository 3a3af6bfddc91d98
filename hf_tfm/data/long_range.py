"""Data of the Long Range Arena (Tay et al. 2021, arXiv:2011.04006): vocabularies, pixels, and generated data sets.

    ListOps: seed -> random trees -> "[MAX 4 [SM 2 9 ] 1 ]" -> value 0 to 9
    Pathfinder: seed -> dashed paths and two discs -> grey image -> do the discs lie on the same path?

ListOps follows the authors' generator: see `listops`. Pathfinder is a generator of our own with the design of the task
(Linsley et al. 2018, arXiv:1805.08315, section 2), so its numbers are not comparable with published ones.
"""

import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from PIL import Image as PILImage
from PIL import ImageDraw
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .images import BadImage, decode, image_rows
from .progress import show_progress_of
from .source import generated_splits

PAD, UNKNOWN = "<pad>", "<unk>"
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
END = "]"
OPERATOR_SHARE = 0.25  # probability that a node above the deepest level is an operator
LISTOPS = Features({"text": Value("string"), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
PATHFINDER = Features({"image": Image(), "label": ClassLabel(names=["different", "same"])})
OVERSAMPLING = 4  # images are drawn at this many times their size
TURN = 0.25  # standard deviation of the turn from dash to dash, in radians


def listops_tree(draw: Callable[[], float], max_depth: int, max_arguments: int, most: int) -> tuple[list[str], int]:
    """Draw an expression and its value; its root is an operator.

    Args:
        draw: returns numbers in [0, 1).
        max_depth: depth at which all nodes are digits; the root has depth 1.
        max_arguments: largest number of arguments of an operator; the smallest is 2.
        most: number of tokens from which on all nodes are digits.

    Returns:
        tokens and the value of the expression.
    """
    tokens: list[str] = []

    def node(depth: int) -> int:
        if depth > 1 and (len(tokens) >= most or depth >= max_depth or draw() >= OPERATOR_SHARE):
            digit = int(10 * draw())
            tokens.append(str(digit))
            return digit
        operator = OPERATORS[int(len(OPERATORS) * draw())]
        tokens.append(operator)
        values = [node(depth + 1) for _ in range(2 + int((max_arguments - 1) * draw()))]
        tokens.append(END)
        return apply_operator(operator, values)

    value = node(1)
    return tokens, value


def apply_operator(operator: str, values: list[int]) -> int:
    """Compute a ListOps operator: minimum, maximum, median (of an even number the mean of the middle two, truncated),
    or sum modulo 10."""
    if operator == "[MED":
        ordered, middle = sorted(values), len(values) // 2
        return ordered[middle] if len(values) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    return {"[MIN": min, "[MAX": max, "[SM": lambda terms: sum(terms) % 10}[operator](values)


def listops_rows(
    seed: int, split: int, count: int, min_length: int, max_length: int, max_depth: int, max_arguments: int
) -> Iterator[dict[str, Any]]:
    """Yield expressions with more than ``min_length`` and fewer than ``max_length`` tokens, none of them twice."""
    # Python guarantees the stream of `random`, but not that of its other methods.
    draw, seen = random.Random(f"{seed} {split}").random, set()
    while len(seen) < count:
        tokens, value = listops_tree(draw, max_depth, max_arguments, max_length)
        text = " ".join(tokens)
        if min_length < len(tokens) < max_length and text not in seen:
            seen.add(text)
            yield {"text": text, "label": value}


def listops(
    seed: int = 0,
    train: int = 96_000,
    validation: int = 2_000,
    test: int = 2_000,
    min_length: int = 500,
    max_length: int = 2_000,
    max_depth: int = 10,
    max_arguments: int = 10,
) -> DatasetDict:
    """Generate ListOps (Nangia and Bowman 2018, arXiv:1804.06028) as in the Long Range Arena.

    Args:
        seed: 0 to 2^32 - 1.
        train, validation, test: number of expressions in each split.
        min_length, max_length: exclusive limits of the number of tokens: operators, digits and closing brackets.
        max_depth: depth of the tree.
        max_arguments: largest number of arguments of an operator.

    Returns:
        Splits with ``text``, tokens separated by spaces, and ``label``, the value. Cached on the disk by `datasets`.
    """
    options = {"min_length": min_length, "max_length": max_length}
    options |= {"max_depth": max_depth, "max_arguments": max_arguments}
    counts = {"train": train, "validation": validation, "test": test}
    return generated_splits(listops_rows, LISTOPS, seed, counts, options)


def path_points(generator: np.random.RandomState, dashes: int, step: float) -> np.ndarray | None:
    """Draw a smooth path in the unit square: (2 dashes, 2), the ends of its dashes; None if it leaves the square."""
    heading = generator.uniform(0, 2 * np.pi) + np.cumsum(generator.normal(0, TURN, dashes))
    steps = step * np.stack([np.cos(heading), np.sin(heading)], axis=1)
    starts = np.cumsum(steps, axis=0) - steps + generator.uniform(0.1, 0.9, 2)
    points = np.stack([starts, starts + 0.6 * steps], axis=1).reshape(-1, 2)  # 60 % dash, 40 % gap
    inside = points.min() > 0.06 and points.max() < 0.94
    return points if inside else None


def apart(points: np.ndarray, others: list[np.ndarray], margin: float) -> bool:
    """Return whether all points keep a distance from all points of other paths."""
    return all(np.linalg.norm(points[:, None] - other, axis=2).min() > margin for other in others)


def pathfinder_image(generator: np.random.RandomState, size: int, dashes: int, distractors: int) -> tuple[Any, int]:
    """Draw an image and its label; see `pathfinder`."""
    step = (3 if size <= 64 else 6) / size
    paths: list[np.ndarray] = []
    wanted = [dashes, dashes, *[max(dashes // 3, 2)] * distractors]
    while len(paths) < len(wanted):
        for _ in range(200):
            points = path_points(generator, wanted[len(paths)], step)
            if points is not None and apart(points, paths, 0.8 * step):
                paths.append(points)
                break
        else:  # no room: begin again
            paths = []
    label = generator.randint(2)
    discs = paths[0][0], paths[0][-1] if label else paths[1][-generator.randint(2)]
    side = size * OVERSAMPLING
    image = PILImage.new("L", (side, side))
    draw = ImageDraw.Draw(image)
    for points in paths:
        for start, end in points.reshape(-1, 2, 2) * side:
            draw.line([*start, *end], fill=255, width=OVERSAMPLING)
    radius = 1.5 * OVERSAMPLING * (1 if size <= 64 else 2)
    for x, y in (disc * side for disc in discs):
        draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=255)
    return image.resize((size, size), PILImage.Resampling.BOX), label


def pathfinder_rows(
    seed: int, split: int, count: int, size: int, dashes: int, distractors: int
) -> Iterator[dict[str, Any]]:
    """Yield images with their labels."""
    # NumPy guarantees the stream of this generator.
    generator = np.random.RandomState([seed, split])
    for _ in range(count):
        image, label = pathfinder_image(generator, size, dashes, distractors)
        yield {"image": image, "label": label}


def pathfinder(
    seed: int = 0,
    train: int = 160_000,
    validation: int = 20_000,
    test: int = 20_000,
    size: int = 32,
    dashes: int = 7,
    distractors: int = 3,
) -> DatasetDict:
    """Generate Pathfinder: two dashed paths, shorter distractors, and two discs at ends of the same path or of both.

    Args:
        seed: 0 to 2^32 - 1.
        train, validation, test: number of images in each split.
        size: height and width in pixels.
        dashes: number of dashes of each of the two paths; more are harder.
        distractors: number of further paths, with a third of the dashes.

    Returns:
        Splits with ``image`` (grey, PNG) and ``label`` (different, same). Cached on the disk by `datasets`.
    """
    options = {"size": size, "dashes": dashes, "distractors": distractors}
    counts = {"train": train, "validation": validation, "test": test}
    return generated_splits(pathfinder_rows, PATHFINDER, seed, counts, options)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes of UTF-8: id 0 is padding, and byte b has id b + 1."""
    vocabulary = {PAD: 0} | {letter: byte + 1 for byte, letter in sorted(bytes_to_unicode().items())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return fast_tokenizer(tokenizer)


def word_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of words between spaces, the most frequent ones of some texts.

    Parentheses are deleted, as in the Long Range Arena: the files of ListOps write all trees as binary ones.

    Args:
        vocab_size: maximum number of tokens, with those of padding (id 0) and of unknown words (id 1).
    """
    counts = Counter(word for text in texts for word in re.sub(r"[()]", " ", text).split())
    words = sorted(sorted(counts), key=counts.__getitem__, reverse=True)[: max(vocab_size - 2, 0)]
    vocabulary = {word: number for number, word in enumerate([PAD, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[()]"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return fast_tokenizer(tokenizer, unk_token=UNKNOWN)


def fast_tokenizer(tokenizer: Tokenizer, **tokens: str) -> PreTrainedTokenizerFast:
    """Return transformers' tokenizer, without segments."""
    names = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, model_input_names=names, **tokens)


def pixel_rows(rows: Dataset, image_column: str | None, label_column: str | None) -> Dataset:
    """Return rows with ``input_ids``, the grey values of an image row by row as tokens of `byte_tokenizer`, and
    ``label``.

    Args:
        rows: a split.
        image_column, label_column: see `image_rows`.

    Raises:
        ValueError: an image cannot be read, or see `image_rows`.
    """
    rows = image_rows(rows, image_column, label_column)

    def read(batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[np.ndarray]]:
        found = []
        for image, index in zip(batch["image"], indices, strict=True):
            try:
                pixels = decode(image).numpy().astype(np.int32)  # (3, height, width)
            except BadImage as error:
                raise ValueError(f"image {index} cannot be read: {error}") from error
            # The grey values of PIL, with the weights of ITU-R 601-2.
            grey = (19595 * pixels[0] + 38470 * pixels[1] + 7471 * pixels[2] + 2**15) >> 16
            found.append((grey + 1).astype(np.int16).ravel())
        return {"input_ids": found}

    show_progress_of(rows)
    features = Features({"label": rows.features["label"], "input_ids": List(Value("int16"))})
    return rows.map(read, batched=True, with_indices=True, remove_columns=["image"], features=features)


# "-small" is for two CPU cores: fewer and shorter sequences, which are easier too.
GENERATED: dict[str, Callable[[], DatasetDict]] = {
    "listops": listops,
    "listops-tiny": partial(
        listops, train=4_000, validation=500, test=500, min_length=3, max_length=12, max_depth=2, max_arguments=6
    ),
    "listops-small": partial(
        listops, train=20_000, validation=1_000, test=1_000, min_length=50, max_length=200, max_depth=6
    ),
    "pathfinder": pathfinder,
    "pathfinder-small": partial(pathfinder, train=20_000, validation=1_000, test=1_000, dashes=5, distractors=1),
    "pathfinder-128": partial(pathfinder, size=128, dashes=14, distractors=6),
}
