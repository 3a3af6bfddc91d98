"""A family added only to the table can be trained, fine-tuned, evaluated and distilled.

One toy family for each head, see `toy_families`; no task refers to any of them.
"""

import json
import re
from dataclasses import dataclass, field

import pytest
import toy_families
from accelerate.state import AcceleratorState, GradientState
from transformers import AutoTokenizer

from hf_tfm import families
from hf_tfm.cli import main
from hf_tfm.data.digit_scenes import digit_scenes
from hf_tfm.data.number_words import number_words
from hf_tfm.families import register_family

STEPS = [
    *("--max_steps", "2", "--num_train_epochs", "null", "--eval_steps", "2", "--warmup_steps", "1"),
    *("--size", "tiny", "--progress", "false"),
]
IMAGES = ["--warmup_epochs", "null", "--batch_size", "8", "--test_splits", "[]"]
SCENES = ["--batch_size", "2", "--num_pictures", "0", "--max_train_samples", "null"]
TEXTS = ["--vocab_size", "100", "--max_length", "32"]
CAUSAL = ["--objective", "causal"]


@dataclass(frozen=True)
class Case:
    """The runs of a family.

    Args:
        recipe, options: recipe and options of training.
        data: the data set, and further options of ``hf-tfm evaluate``.
        again: further options for continued training of the saved model.
        score: name of a metric of the evaluation.
        distil, own: recipe and options of self-distillation; None if the task has no such recipe.
    """

    recipe: str
    options: list[str]
    data: list[str]
    again: list[str]
    score: str
    distil: str | None
    own: list[str] = field(default_factory=list)


CASES = {
    "toy_swin": Case(
        "image_classification_train",
        [*IMAGES, "--model", "{depths: [1, 1]}"],
        ["digits"],
        ["--model", "{drop_path_rate: 0.1}", "--image_size", "null"],
        "accuracy",
        "distill_vision",
        [*IMAGES, "--model", "{}", "--image_size", "null"],
    ),
    "toy_mae": Case(
        "mae_pretrain",
        [*IMAGES[:-2], "--model", "{}"],
        ["digits"],
        ["--model", "{mask_ratio: 0.5}", "--image_size", "null"],
        "reconstruction_loss",
        "distill_mae",
        [*IMAGES[:-2], "--model", "{}", "--image_size", "null"],
    ),
    "toy_roberta": Case(
        "language_pretrain",
        [*TEXTS, "--model", "{}"],
        ["words", "--text_column", "translation.en"],
        [],
        "perplexity",
        "distill_pretrain",
        ["--model", "{}", "--student_layers", "[0]"],
    ),
    "toy_gpt2": Case(
        "language_pretrain",
        [*TEXTS, *CAUSAL, "--vocab_size", "300", "--model", "{}"],
        ["words", "--text_column", "translation.en"],
        [],
        "perplexity",
        "distill_pretrain",
        [*CAUSAL, "--model", "{}", "--student_layers", "[]"],
    ),
    "toy_bart": Case(
        "translation_train",
        ["--metric_for_best_model", "loss", "--model", "{}", "--test_splits", "[]"],
        ["number-words", "--split", "validation"],
        [],
        "bleu",
        None,
    ),
    "toy_detector": Case(
        "detection_train",
        [*SCENES, "--model", "{}"],
        ["scenes", "--split", "validation"],
        ["--model", "{num_queries: 9}"],
        "AP",
        "distill_detection",
        [*SCENES, "--model", "{}", "--student_layers", "null", "--terms", "[{kind: query}, {kind: label}]"],
    ),
}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    AcceleratorState._reset_state(reset_partial_state=True)  # its precision is that of the test before
    GradientState._reset_state()
    monkeypatch.setattr(families, "FAMILIES", list(families.FAMILIES))
    for family in toy_families.FAMILIES:
        register_family(family)


def run(*words) -> None:
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        assert not end.code


def record(folder) -> dict:
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in ("toy_mae", "toy_bart", "toy_gpt2") else ())
        for name in CASES
    ],
)
def test_family_works_in_its_task(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for split, rows in digit_scenes(train=6, validation=2, test=0, size=64).items():
        rows.to_parquet(f"scenes/{split}.parquet")
    for split, rows in number_words().items():
        rows.select(range(500)).to_parquet(f"words/{split}.parquet")
    case, new, again, student = CASES[name], tmp_path / "new", tmp_path / "again", tmp_path / "student"
    steps = [*STEPS, "--dataset_name", case.data[0]]
    start = ["run", case.recipe, "--config", "quickstart", *steps, *case.options]
    run(*start, "--architecture", name, "--output_dir", new)
    # Neither recipe is given the family: it is that of the saved model.
    run(*start, *case.again, "--model_name_or_path", new, "--output_dir", again)
    assert record(new)["model_type"] == record(again)["model_type"] == name
    run("evaluate", again, "--dataset_name", *case.data, "--max_samples", "8", "--output", tmp_path / "scores.json")
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert case.score in {row["name"] for row in scores["metrics"]}
    if case.distil:
        own = ["--config", "quickstart", *steps, *case.own, "--architecture", name]
        run("run", case.distil, *own, "--teacher", new, "--output_dir", student)
        assert record(student)["model_type"] == name
        assert record(student)["distillation"]["teacher"].endswith("new")


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("toy_roberta", "text_classification_train"),
        pytest.param("toy_gpt2", "text_classification_train", marks=pytest.mark.slow),
    ],
)
def test_text_family_classifies(name, recipe, tmp_path):
    options = ["--model", "{}", "--vocab_size", "300", "--batch_size", "8", "--warmup_steps", "null"]
    weight = ["--language_weight", "0.5"] if name == "toy_gpt2" else []
    words = ["run", recipe, "--config", "quickstart", *STEPS, *options, "--test_splits", "[]"]
    run(*words, *weight, "--architecture", name, "--output_dir", tmp_path / "new")
    assert record(tmp_path / "new")["model_type"] == name
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "new")
    assert (tokenizer.cls_token is None) == (name == "toy_gpt2")  # byte-pair encoding for decoders


@pytest.mark.parametrize("name", CASES)
def test_unknown_family_is_answered_with_the_known_ones(name, tmp_path, capsys):
    words = [
        "run",
        CASES[name].recipe,
        "--config",
        "quickstart",
        *CASES[name].options,
        "--output_dir",
        str(tmp_path / "run"),
    ]
    for other in ("swan", *(CASES.keys() - {name})):
        with pytest.raises(SystemExit) as end:
            main([*words, "--architecture", other])
        error = capsys.readouterr().err
        assert end.value.code == 2 and error.count("\n") == 1 and not (tmp_path / "run").exists()
        known = re.search(rf'architecture must be one of (.*), got "{other}"', error)[1].split(", ")
        assert [one for one in known if one in CASES] == [name]
