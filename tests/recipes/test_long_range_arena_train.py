"""The recipe of the Long Range Arena: words, bytes, pairs and pixels; generated data; refused options."""

import runpy

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Image, Value
from PIL import Image as PILImage
from recipe_helpers import ROOT, fresh_state, record

from hf_tfm.data.long_range import apply_operator, byte_tokenizer, listops, pathfinder, pixel_rows, word_tokenizer
from hf_tfm.tasks.evaluation import evaluate

RECIPE = ROOT / "recipes" / "long_range_arena_train.py"
TINY = "hidden_size: 16, intermediate_size: 32, num_attention_heads: 2, num_hidden_layers: 1"
NAMES = ClassLabel(names=["no", "yes"])


def run(*argv: str) -> int:
    fresh_state()
    return runpy.run_path(str(RECIPE))["main"](list(argv))


def words(data, output, **options) -> list[str]:
    given = {"dataset_name": data, "output_dir": output, "max_steps": 2, "batch_size": 8, "holdout": 8}
    given |= {"max_length": 64, "validation_split": "null", "progress": "false", "model": f"{{{TINY}}}", **options}
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def write(folder, columns: dict, features: Features):
    folder.mkdir()
    for split in ("train", "test"):
        Dataset.from_dict(columns, features=features).to_parquet(str(folder / f"{split}.parquet"))
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder, labels = tmp_path_factory.mktemp("sets"), [i % 2 for i in range(24)]
    grey = [PILImage.fromarray(np.full((4, 5), i, dtype=np.uint8)) for i in range(24)]
    texts = [f"text {i} of größe" for i in range(24)]
    text = {"text": Value("string"), "label": NAMES}
    return {
        "bytes": write(folder / "bytes", {"text": texts, "label": labels}, Features(text)),
        "pairs": write(
            folder / "pairs",
            {"one": texts, "two": texts[::-1], "label": labels},
            Features({"one": Value("string"), "two": Value("string"), "label": NAMES}),
        ),
        "pixels": write(
            folder / "pixels", {"image": grey, "label": labels}, Features({"image": Image(), "label": NAMES})
        ),
    }


VARIANTS = {
    "bytes": {"model": f"{{{TINY}, encoder_attention: linear}}", "micro_batch_size": 3},
    "pairs": {"model": f"{{{TINY}, matching: true, pooling: mean}}", "text_columns": "[one, two]"},
    "pixels": {"model": f"{{{TINY}, encoder_attention: performer, encoder_attention_kwargs: {{num_features: 8}}}}"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_two_steps_and_evaluation(sets, tmp_path, name):
    assert run(*words(sets[name], tmp_path / "run", test_splits="[test]", **VARIANTS[name])) == 0
    found = record(tmp_path / "run")
    assert (found.task, found.model_type) == ("text-classification", "tfm_long_range")
    assert [(row["split"], row["name"]) for row in found.metrics] == [("holdout", "accuracy"), ("test", "accuracy")]
    fresh_state()
    options = {"text_columns": ["one", "two"]} if name == "pairs" else {}
    again = evaluate(str(tmp_path / "run"), dataset_name=str(sets[name]), progress=False, **options)
    scores = {row["name"]: row["value"] for row in again["metrics"]}
    assert scores["accuracy"] == found.metrics[1]["value"]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("bytes", {"architecture": "bert"}, 'architecture must be "long_range", got "bert"'),
        ("bytes", {"model": f"{{{TINY}, matching: true}}"}, "has no pairs, but the model classifies pairs"),
        ("pairs", {"text_columns": "[one, two]"}, "has pairs of texts, but the model classifies no pairs"),
        ("pixels", {"max_length": 19}, "max_length must be at least 20, the pixels of the largest image, got 19"),
        ("bytes", {"max_length": 1025}, "max_length must be at most 1024, that of the model without its class token"),
        ("pixels", {"vocabulary": "words"}, 'vocabulary must be "bytes" for images'),
        ("pixels", {"text_columns": "[label]", "image_column": "image"}, "give text_columns or image_column"),
    ],
)
def test_bad_options_are_refused(sets, tmp_path, name, options, message, capsys):
    with pytest.raises((ValueError, SystemExit)) as error:
        run(*words(sets[name], tmp_path / "run", **options))
    assert message in f"{error.value}{capsys.readouterr().err}"


@pytest.mark.slow
def test_quickstart_learns(tmp_path):
    """Very short expressions, with exact attention; chance is 0.1, and the most frequent value has 0.16."""
    assert run("--config", "quickstart", "--output_dir", str(tmp_path / "run"), "--progress", "false") == 0
    assert record(tmp_path / "run").metrics[1]["value"] > 0.5


# --- data


def value_of(text: str) -> int:
    """Evaluate an expression with a stack, unlike the generator."""
    stack: list[list] = [[]]
    for token in text.split():
        if token.startswith("["):
            stack.append([token])
        elif token == "]":
            operator, *values = stack.pop()
            stack[-1].append(apply_operator(operator, values))
        else:
            stack[-1].append(int(token))
    return stack[0][0]


def test_listops(tmp_path):
    counts = {"train": 40, "validation": 10, "test": 10}
    splits = listops(**counts, min_length=5, max_length=60, max_depth=4)
    assert {name: len(rows) for name, rows in splits.items()} == counts
    texts = [text for rows in splits.values() for text in rows["text"]]
    assert len(set(texts)) == 60 and all(5 < len(text.split()) < 60 for text in texts)
    for rows in splits.values():
        assert [value_of(text) for text in rows["text"]] == list(rows["label"])
    assert [apply_operator("[MED", values) for values in ([5, 1, 3], [1, 2, 5, 9])] == [3, 3]
    assert listops(seed=1, **counts, min_length=5, max_length=60, max_depth=4)["train"]["text"][:] != texts[:40]


def test_pixels_are_the_grey_values_of_an_image():
    pixels = np.random.RandomState(0).randint(0, 256, (3, 5, 3), dtype=np.uint8)
    image = PILImage.fromarray(pixels)
    rows = Dataset.from_dict({"image": [image], "label": [0]}, features=Features({"image": Image(), "label": NAMES}))
    expected = np.asarray(image.convert("L"), dtype=int).ravel() + 1
    assert pixel_rows(rows, None, None)["input_ids"][0] == expected.tolist()


def test_pathfinder():
    splits = pathfinder(train=30, validation=2, test=2)
    images, labels = splits["train"]["image"][:], splits["train"]["label"][:]
    assert {image.size for image in images} == {(32, 32)} and {image.mode for image in images} == {"L"}
    assert 5 < sum(labels) < 25
    assert pathfinder(train=30, validation=2, test=2)["train"]["image"][3].tobytes() == images[3].tobytes()


def test_tokenizers():
    """A byte has its value plus 1; words are those of any form of ListOps, and unknown ones are one token."""
    tokens = byte_tokenizer()
    assert tokens("aß ").input_ids == [byte + 1 for byte in "aß ".encode()] and len(tokens) == 257
    assert tokens.decode(tokens("größe [MAX").input_ids) == "größe [MAX"
    known = word_tokenizer(iter(["[MAX 2 9 ]"]), 10)
    assert known("( ( [MAX 2 ) 9 ) ]").input_ids == known("[MAX 2 9 ]").input_ids
    assert known("[MIN 2").input_ids == [known.unk_token_id, known("2").input_ids[0]]
