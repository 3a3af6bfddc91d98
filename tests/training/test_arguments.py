"""Options: parsing from YAML and the command line, validation, and printing."""

from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import yaml

from hf_tfm.options import parse_arguments
from hf_tfm.tasks.distillation import DistillationArguments
from hf_tfm.tasks.object_detection import DetectionTask
from hf_tfm.tasks.rlhf import RLHFTask
from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training import ImageBatchArguments, TokenBatchArguments
from hf_tfm.training.run import FREE, repeat_command

RECIPE = Path(__file__).parents[2] / "recipes" / "translation_train.py"


@dataclass(kw_only=True)
class RecipeArguments(TokenBatchArguments):
    """Arguments of a recipe.

    Args:
        model: configuration fields.
    """

    model: dict[str, int | float | bool | str] | None = None


def parse(*argv):
    return parse_arguments(RecipeArguments, RECIPE, argv)


def refused(capsys, *argv):
    """The error message of a rejected command line."""
    with pytest.raises(SystemExit) as caught:
        parse("--output_dir", "o", *argv)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_yaml_and_overrides(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: there\nmax_steps: 5\nadam_betas: [0.8, 0.9]\nmodel: {dropout: 0.1}\n")
    args = parse("--config", str(file), "--max_steps", "7", "--model.hidden_size", "64")
    assert (args.output_dir, args.max_steps, args.adam_betas) == ("there", 7, (0.8, 0.9))
    assert args.model == {"dropout": 0.1, "hidden_size": 64}
    assert parse(f"--config={file}", "--seed=3").seed == 3


def test_null_overrides_a_config_value(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("output_dir: there\nnum_train_epochs: 5\n")
    args = parse("--config", str(file), "--num_train_epochs", "null", "--max_steps", "7")
    assert (args.num_train_epochs, args.max_steps) == (None, 7)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--learning_rat", "1"], "learning_rat"),  # an abbreviation of learning_rate is not accepted
        (["--learning_rate", "fast"], "learning_rate"),
        (["--batch_tokens", "1.5"], "batch_tokens"),
        (["--lr_scheduler_type", "cosin"], "schedule"),
        (["--report_to", "[mlflow]"], "report_to"),
        (["--adam_betas", "[0.9]"], "adam_betas"),
        (
            ["--max_steps", "3", "--num_train_epochs", "3"],
            "exactly one of num_train_epochs and max_steps, got 3.0 and 3",
        ),
        ([], "exactly one of num_train_epochs and max_steps, got None and None"),
        (["--max_steps", "3", "--config", "nope"], "neither a file nor a preset; presets: multi30k_gru, "),
    ],
)
def test_errors_name_the_key(capsys, words, named):
    message = refused(capsys, *words)
    assert named in message and message.startswith("hf-tfm run translation_train: ")
    assert len(message.splitlines()) == 1 and len(message) < 400


@pytest.mark.parametrize(
    ("text", "named"),
    [("learning_rat: 1", "learning_rat"), ("learning_rate: fast", "learning_rate"), ("model: 3", "model")],
)
def test_errors_in_a_file_name_the_key(tmp_path, capsys, text, named):
    file = tmp_path / "run.yaml"
    file.write_text(f"max_steps: 4\n{text}\n")
    assert named in refused(capsys, "--config", str(file))


@pytest.mark.parametrize(
    "overrides",
    [
        {"seed": -1},
        {"dataloader_num_workers": -1},
        {"batch_tokens": 0},
        {"micro_batch_tokens": 0},
        {"max_steps": 0},
        {"eval_steps": 0},
        {"save_steps": 0},
        {"logging_steps": 0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"max_grad_norm": -1.0},
        {"average_checkpoints": -1},
        {"save_total_limit": 0},
        {"early_stopping_patience": -1},
        {"max_nonfinite_steps": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("nan")},
        {"adam_epsilon": 0.0},
        {"ema_decay": 1.0},
        {"adam_betas": (0.9, 1.0)},
        {"final_weights": "ema"},
        {"final_weights": "average"},
    ],
)
def test_out_of_range_values(overrides):
    (name,) = overrides
    with pytest.raises(ValueError, match=name):
        TokenBatchArguments(output_dir="o", **{"max_steps": 1, **overrides})


def test_out_of_range_epochs():
    with pytest.raises(ValueError, match="num_train_epochs must be above 0, got 0"):
        TokenBatchArguments(output_dir="o", num_train_epochs=0)


def test_printed_config_parses_to_itself(tmp_path, capsys):
    words = ["--output_dir", "o", "--max_steps", "3", "--learning_rate", "1e-4", "--model.dropout", "0.2"]
    with pytest.raises(SystemExit) as caught:
        parse(*words, "--print_config")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert {field.name for field in fields(RecipeArguments)} == set(yaml.safe_load(printed))
    file = tmp_path / "printed.yaml"
    file.write_text(printed)
    assert parse("--config", str(file)) == parse(*words)


def test_help_lists_every_option(capsys):
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "Train a Transformer" in printed
    for field in fields(TokenBatchArguments):
        assert f"--{field.name}" in printed


def test_options_that_may_change_on_resume_exist():
    kinds = (TranslationTask.Arguments, DetectionTask.Arguments, RLHFTask.Arguments, DistillationArguments)
    assert {field.name for kind in kinds for field in fields(kind)} >= FREE


def test_command_repeats_a_run(monkeypatch):
    argv = ["--config", "my file.yaml", "--seed", "1"]
    assert repeat_command(1, "r", argv) == "hf-tfm run r --config 'my file.yaml' --seed 1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    launcher = "python -m torch.distributed.run"
    assert repeat_command(4, "r", []) == f"{launcher} --nproc_per_node 4 -m hf_tfm.cli run r"
    assert repeat_command(8, "r", []) == f"{launcher} --nnodes 2 --nproc_per_node 4 -m hf_tfm.cli run r"


def image_arguments(**options) -> ImageBatchArguments:
    return ImageBatchArguments(output_dir="o", max_steps=10_000, **options)


def test_learning_rate_of_images_scales_with_the_batch():
    """MAE fine-tuning: base rate 5e-4 at 1024 images, 5 epochs of warm-up."""
    args = image_arguments(base_learning_rate=5e-4, batch_size=1024, warmup_epochs=5)
    settled, line = args.resolve(steps_per_epoch=1251, max_steps=12510)
    assert settled.learning_rate == pytest.approx(2e-3) and settled.warmup_steps == 6255
    assert line == "learning rate 0.002 = 0.0005 x 1024 images / 256; warm-up 6255 steps of 1251 an epoch"
    assert args == image_arguments(base_learning_rate=5e-4, batch_size=1024, warmup_epochs=5), "as it was given"
    args = image_arguments(learning_rate=0.1, warmup_steps=7)
    assert args.resolve(100, 1000) == (args, "learning rate 0.1; warm-up 7 steps of 100 an epoch")
    assert args.resolve(None, 1000) == (args, "learning rate 0.1; warm-up 7 steps"), "of a stream"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, "exactly one of learning_rate and base_learning_rate, got None and None"),
        ({"learning_rate": 0.1, "base_learning_rate": 0.1}, "exactly one of learning_rate and base_learning_rate"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0, got 0.0"),
        ({"base_learning_rate": -1.0}, "base_learning_rate must be above 0, got -1.0"),
        ({"learning_rate": 0.1, "batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.1, "micro_batch_size": 0}, "micro_batch_size must be at least 1, got 0"),
        ({"learning_rate": 0.1, "warmup_epochs": -1}, "warmup_epochs must be at least 0, got -1"),
        ({"learning_rate": 0.1, "layer_wise_lr_decay": 0.0}, "layer_wise_lr_decay must be above 0, got 0.0"),
        ({"learning_rate": 0.1, "momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
    ],
)
def test_out_of_range_image_arguments(overrides, message):
    with pytest.raises(ValueError, match=message):
        image_arguments(**overrides)


def test_command_line_overrides_a_preset_in_any_order(tmp_path):
    file = tmp_path / "options.yaml"
    file.write_text("output_dir: there\nseed: 5\nmax_steps: 9\n")
    for words in (["--seed", "3", "--config", str(file)], ["--seed=3", f"--config={file}"]):
        args = parse(*words)
        assert (args.seed, args.max_steps) == (3, 9)
