"""Run folders from the user's view: corrected commands run, and inputs and unrelated files are never deleted."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
import torch
from distill_text_recipes import run as run_text
from recipe_helpers import command_line, history, record, run_recipe, write_data
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from hf_tfm.tasks import translation
from hf_tfm.training import session
from hf_tfm.training.run_folder import InUse, Lock


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "pairs")


@pytest.fixture(scope="module")
def trained(numbers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    assert run_recipe(*command_line(numbers, folder)) == 0
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_finished_run_leaves_no_lock_or_partial_files(trained):
    names = {path.name for path in trained.iterdir()}
    assert {"run.json", "tokenizer", "checkpoints", "results.json", "README.md", "model.safetensors"} <= names
    assert not any(name.startswith((".lock", ".new", ".part")) for name in names)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"model": "{hidden_size: 18, num_attention_heads: 4}"}, "num_attention_heads"),
        ({"validation_split": "nosuch"}, "nosuch"),
        ({"target_column": "nosuch"}, "nosuch"),
        ({"vocab_size": 1}, ""),
        ({"model_name_or_path": "broken"}, ""),
    ],
)
def test_failed_start_leaves_nothing(numbers, tmp_path, monkeypatch, wrong, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{}")
    with pytest.raises((ValueError, OSError, SystemExit), match=message if "model" not in wrong else None):
        run_recipe(*command_line(numbers, tmp_path / "new" / "run", **wrong))
    assert not (tmp_path / "new").exists()


def test_late_failure_before_training_leaves_nothing(numbers, tmp_path, monkeypatch):
    """The tokenizer is trained and the model built; an earlier run in the folder is untouched."""
    run_recipe(*command_line(numbers, tmp_path / "old", seed=3))
    before = contents(tmp_path / "old")

    def fail(*_, **__):
        raise ValueError("no such batches")

    with monkeypatch.context() as patched:
        patched.setattr("hf_tfm.tasks.translation.token_loader", fail)
        for folder, options in ((tmp_path / "run", {}), (tmp_path / "old", {"overwrite_output_dir": "true"})):
            with pytest.raises(ValueError, match="no such batches"):
                run_recipe(*command_line(numbers, folder, **options))
    assert not (tmp_path / "run").exists()
    assert contents(tmp_path / "old") == before
    assert run_recipe(*command_line(numbers, tmp_path / "run", seed=1)) == 0


def test_run_that_failed_in_its_first_step_is_replaced(numbers, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(session, "train_step", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            run_recipe(*command_line(numbers, tmp_path / "run"))
    assert run_recipe(*command_line(numbers, tmp_path / "run", batch_tokens=300)) == 0
    assert record(tmp_path / "run").arguments["batch_tokens"] == 300


@pytest.mark.parametrize("overwrite", ["true", "false"])
@pytest.mark.parametrize("option", ["model_name_or_path", "tokenizer"])
def test_inputs_of_a_run_are_not_overwritten(numbers, trained, option, overwrite):
    before = contents(trained)
    path = {"model_name_or_path": trained, "tokenizer": trained / "tokenizer"}[option]
    with pytest.raises(ValueError, match=f'output_dir .* is or holds {option} "{path}", which the run reads'):
        run_recipe(*command_line(numbers, trained, **{option: path}, seed=4, overwrite_output_dir=overwrite))
    with pytest.raises(ValueError, match="is or holds dataset"):
        run_recipe(*command_line(numbers, numbers, overwrite_output_dir=overwrite))
    assert contents(trained) == before


def test_teacher_is_not_overwritten(numbers, trained, classifier, tmp_path):
    before = contents(classifier)
    for overwrite in ("true", "false"):
        with pytest.raises(ValueError, match="is or holds teacher"):
            argv = ["--teacher", str(classifier), "--output_dir", str(classifier), "--overwrite_output_dir", overwrite]
            run_text("distill_task", "--config", "quickstart", "--dataset_name", "number-parity", *argv)
    assert contents(classifier) == before


def test_cache_is_not_written_into_an_unrelated_folder(classifier, tmp_path):
    before = contents(classifier)
    with pytest.raises(ValueError, match=r"cache .* is or holds teacher"):
        run_text(
            *(
                "distill_task",
                "--config",
                "quickstart",
                "--dataset_name",
                "number-parity",
                "--teacher",
                str(classifier),
            ),
            *("--output_dir", str(tmp_path / "out"), "--write_cache", "true", "--cache", str(classifier)),
        )
    assert contents(classifier) == before
    assert not (tmp_path / "out").exists()


def test_model_without_a_run_is_not_overwritten(numbers, trained, tmp_path):
    folder = tmp_path / "model"
    AutoModelForSeq2SeqLM.from_pretrained(trained).save_pretrained(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        run_recipe(*command_line(numbers, folder, overwrite_output_dir="true"))
    assert contents(folder) == before


def test_overwriting_lists_kept_files(numbers, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    capsys.readouterr()
    run_recipe(*command_line(numbers, tmp_path / "run", seed=1, overwrite_output_dir="true"))
    assert "files that no run wrote are kept: notes.txt" in capsys.readouterr().out
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def hold(folder, taken, done):
    lock = Lock(folder)
    lock.take("hf-tfm run first")
    taken.set()
    done.wait(120)
    lock.release()


def test_second_run_in_a_folder_is_refused(numbers, trained):
    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(trained, taken, done))
    process.start()
    try:
        assert taken.wait(60)
        before = {name: value for name, value in contents(trained).items() if name != ".lock"}
        for more in ({}, {"seed": 9}, {"seed": 9, "overwrite_output_dir": "true"}):
            with pytest.raises(InUse, match=rf"in use by process {process.pid} on host .*hf-tfm run first"):
                run_recipe(*command_line(numbers, trained, **more))
        assert {name: value for name, value in contents(trained).items() if name != ".lock"} == before
    finally:
        done.set()
        process.join(60)


# --- failures after training


def test_failed_evaluation_keeps_the_model_and_is_repeated_alone(numbers, tmp_path, monkeypatch):
    argv = command_line(numbers, tmp_path / "run")

    def fail(*_, **__):
        raise ValueError("cannot be scored")

    with monkeypatch.context() as patched:
        patched.setattr(translation, "score", fail)
        with pytest.raises(ValueError, match="cannot be scored"):
            run_recipe(*argv)
    AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "run")
    AutoTokenizer.from_pretrained(tmp_path / "run")
    assert not (tmp_path / "run" / "results.json").exists()
    rows, weights = history(tmp_path / "run"), load_file(tmp_path / "run" / "model.safetensors")
    monkeypatch.setattr(session, "train_step", fail)
    assert run_recipe(*argv) == 0
    assert history(tmp_path / "run") == rows
    again = load_file(tmp_path / "run" / "model.safetensors")
    assert all(torch.equal(again[name], weights[name]) for name in weights)
    assert record(tmp_path / "run").metrics


def test_changed_test_data_is_the_same_run(tmp_path, monkeypatch):
    data = write_data(tmp_path / "pairs")
    run_recipe(*command_line(data, tmp_path / "run"))
    write_data(data, {110: {"en": "changed", "de": "geändert"}})  # a test row
    monkeypatch.setattr(session, "train_step", None)
    for more in ({}, {"test_splits": "[]"}):
        assert run_recipe(*command_line(data, tmp_path / "run", **more)) == 0


@pytest.mark.parametrize(
    "licence", ["[mit, 3]", *(pytest.param(text, marks=pytest.mark.slow) for text in ("{name: mit}", "5", "true"))]
)
def test_invalid_licence_of_the_data_is_ignored(tmp_path, licence):
    data = write_data(tmp_path / "pairs")
    (data / "README.md").write_text(f"---\nlicense: {licence}\n---\n# Number words\n")
    assert run_recipe(*command_line(data, tmp_path / "run", test_splits="[]", max_steps=1, warmup_steps=1)) == 0
    assert record(tmp_path / "run").data["license"] is None


# --- non-finite values


def test_nonfinite_initial_weights_are_refused(numbers, trained, tmp_path):
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "nan").mkdir(exist_ok=True)
        (tmp_path / "nan" / name).write_bytes((trained / name).read_bytes())
    weights = load_file(trained / "model.safetensors")
    name = sorted(weights)[3]
    weights[name].view(-1)[0] = float("nan")
    save_file(weights, tmp_path / "nan" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r'model_name_or_path ".*nan": its weight .* holds values that are not finite'
    ):
        run_recipe(*command_line(numbers, tmp_path / "run", model_name_or_path=tmp_path / "nan"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("steps", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_run_without_a_finite_gradient_fails(numbers, tmp_path, monkeypatch, steps):
    losses = translation.TranslationTask.losses

    def broken(task, model, batch):
        found = losses(task, model, batch)
        return {term: value * float("nan") for term, value in found.items()} if model.training else found

    monkeypatch.setattr(translation.TranslationTask, "losses", broken)
    with pytest.raises(FloatingPointError, match=f"nothing was learned: .* any of the {steps} steps"):
        run_recipe(*command_line(numbers, tmp_path / "run", max_steps=steps, warmup_steps=1))
    assert (tmp_path / "run" / "checkpoints").is_dir()
    for name in ("results.json", "README.md", "model.safetensors"):
        assert not (tmp_path / "run" / name).exists()


@pytest.mark.parametrize("again", [pytest.param(False, marks=pytest.mark.slow), True])
def test_nonfinite_validation_loss_fails_the_run(numbers, tmp_path, monkeypatch, again):
    """Also if the same command is repeated, which does not evaluate again."""
    losses = translation.TranslationTask.losses

    def broken(task, model, batch):
        found = losses(task, model, batch)
        return found if model.training else {term: value * float("inf") for term, value in found.items()}

    monkeypatch.setattr(translation.TranslationTask, "losses", broken)
    for _ in range(1 + again):
        with pytest.raises(FloatingPointError, match="the validation loss is inf after the last of 2 steps"):
            run_recipe(*command_line(numbers, tmp_path / "run"))
    assert not (tmp_path / "run" / "results.json").exists()


def test_nonfinite_final_weights_are_not_saved(numbers, tmp_path, monkeypatch):
    def overflow(session):
        with torch.no_grad():
            next(session.plain.parameters()).view(-1)[0] = float("inf")

    monkeypatch.setattr(session, "take_final_weights", overflow)
    with pytest.raises(FloatingPointError, match="training ended with weights that are not finite"):
        run_recipe(*command_line(numbers, tmp_path / "run"))
    assert not (tmp_path / "run" / "model.safetensors").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert os.listdir(tmp_path / "run" / "checkpoints")
