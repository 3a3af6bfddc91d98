"""Command errors: one line on standard error, an exit status, and a traceback on request."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_tfm import cli
from hf_tfm.command import describe, run_command, short_errors

ROOT = Path(__file__).parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.py"))


def failed(capsys, error: BaseException, words=(), code_option: bool = False) -> tuple[int, str]:
    """Exit status and standard error of a command that raises ``error``."""

    def broken(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        run_command("evaluate", broken, list(words), code_option)
    return ended.value.code, capsys.readouterr().err


def caught(function, *arguments) -> BaseException:
    """The exception of a call, with its traceback."""
    try:
        function(*arguments)
    except BaseException as error:
        return error
    raise AssertionError("no exception")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("batch_size must be at least 1, got 0"), "batch_size must be at least 1, got 0"),
        (ValueError("first line\n\nsecond line"), "first line"),
        (ValueError("announced:\n  the value"), "announced: the value"),
        (OSError(errno.EISDIR, "Is a directory", "scores.json"), "scores.json: Is a directory"),
        (MemoryError(), "out of memory"),
        (FloatingPointError("the loss is not finite"), "the loss is not finite"),
        (
            RuntimeError("alloc_cpu.cpp:127] can't allocate memory: you tried to allocate 5 bytes"),
            "out of memory: 5 bytes could not be allocated",
        ),
        (
            ValueError("Unrecognized model in x/y. Should have a `model_type` key in its config.json."),
            '"x/y" is not a model: its config.json has no known model_type',
        ),
        (
            ValueError("Caught ValueError in worker 0.\nOriginal Traceback:\n  File\nValueError: bad row"),
            "bad row",
        ),
        (SystemExit("a message"), "a message"),
    ],
)
def test_expected_error_is_one_line(error, message, capsys):
    assert failed(capsys, error) == (1, f"hf-tfm evaluate: {message}\n")


@pytest.mark.parametrize("error", [TypeError("a fault"), KeyError("key"), RuntimeError("odd"), AttributeError("a\nb")])
def test_unexpected_error_is_one_line_that_says_so(error, capsys):
    code, message = failed(capsys, error)
    assert code == 1
    assert message.startswith(f"hf-tfm evaluate: unexpected {type(error).__name__}: ")
    assert "--debug" in message and message.count("\n") == 1


def test_interruption_and_exit_statuses(capsys):
    assert failed(capsys, KeyboardInterrupt()) == (130, "hf-tfm evaluate: interrupted\n")
    assert failed(capsys, SystemExit(2)) == (2, "")
    assert run_command("evaluate", lambda words: 3, []) == 3
    assert run_command("evaluate", lambda words: None, []) == 0


def test_debug_passes_the_exception_and_is_removed_from_the_arguments(monkeypatch):
    def broken(argv):
        raise ValueError(f"got {argv}")

    with pytest.raises(ValueError, match=r"got \['a'\]"):
        run_command("push", broken, ["--debug", "a"])
    monkeypatch.setenv("HF_TFM_DEBUG", "1")
    with pytest.raises(ValueError, match="got"):
        run_command("push", broken, ["a"])
    monkeypatch.setenv("HF_TFM_DEBUG", "0")
    with pytest.raises(SystemExit):
        run_command("push", broken, ["a"])


def test_every_rank_but_the_first_names_itself(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    assert failed(capsys, ValueError("x"))[1] == "hf-tfm evaluate: x\n"
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    assert failed(capsys, ValueError("x"))[1] == "hf-tfm evaluate (rank 3): x\n"


def test_wrapped_error_shows_its_cause():
    from datasets.exceptions import DatasetGenerationError

    def generate():
        raise DatasetGenerationError("An error occurred while generating the dataset") from ValueError("row 3 is odd")

    assert describe(caught(generate)) == "row 3 is odd"


def test_file_errors_get_the_file_name(tmp_path):
    from safetensors.torch import load_file

    damaged = tmp_path / "model.safetensors"
    damaged.write_bytes(b"abc")
    assert describe(caught(load_file, damaged)).startswith(f"{damaged}: not a valid safetensors file")

    def read(path):
        return json.loads(path.read_text())

    (tmp_path / "scores.json").write_text("{")
    assert describe(caught(read, tmp_path / "scores.json")).startswith(f"{tmp_path}/scores.json: ")


def test_error_about_a_path_names_its_argument():
    error = ValueError("Repo id must be in the form 'repo_name' or 'namespace/repo_name': './no/where'. Use")
    expected = '"./no/where" is neither a local folder nor a repository name of the Hub'
    assert describe(error, ["--tokenizer", "./no/where", "--seed", "1"]) == f"tokenizer: {expected}"
    assert describe(error, ["--tokenizer=./no/where"]) == f"tokenizer: {expected}"
    assert describe(error, ["--tokenizer", "./no/where", "--model_name_or_path", "./no/where"]) == expected


def test_option_is_recommended_only_by_commands_that_have_it():
    error = ValueError(
        "The repository x contains custom code which must be executed to correctly load the model.\n"
        "Please pass the argument `trust_remote_code=True` to allow custom code to be run."
    )
    assert (
        describe(error, code_option=True)
        == '"x" brings its own code, which is not run; --trust_remote_code true runs it'
    )
    assert describe(error) == '"x" brings its own code, which is not run'


def test_progress_bars_do_not_share_the_line(capsys):
    from tqdm import tqdm

    def broken(argv):
        for _ in tqdm(range(3)):
            raise ValueError("a reason")

    with pytest.raises(SystemExit):
        run_command("evaluate", broken, [])
    assert capsys.readouterr().err.splitlines()[-1] == "hf-tfm evaluate: a reason"


def test_closed_pipe_is_silent():
    """As in `hf-tfm show ... | head -1`."""
    code = "from command import run_command\nrun_command('show', lambda argv: print('x' * 10**6), [])"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "hf_tfm")}  # imports only this file, which is fast
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, text=True
    ) as process:
        process.stdout.close()
        printed = process.stderr.read()
    assert (process.returncode, printed) == (1, "")


def test_nested_commands_print_once(capsys):
    def inner(argv):
        run_command("run translation_train", lambda words: (_ for _ in ()).throw(ValueError("a reason")), [])

    with pytest.raises(SystemExit) as ended, short_errors("quickstart"):
        inner([])
    assert ended.value.code == 1
    assert capsys.readouterr().err == "hf-tfm run translation_train: a reason\n"


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fails_in_one_line(recipe, monkeypatch, capsys):
    """`hf-tfm run RECIPE` and `python recipes/RECIPE.py` share the recipe's last line."""
    if recipe == "distill_cache":
        pytest.skip("prints its usage and runs another recipe")

    def broken(*arguments):
        raise TypeError("a fault")

    for module in ("training.trainer", "options"):  # imported before `options` is broken
        monkeypatch.setattr(f"hf_tfm.{module}.parse_arguments", broken)
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", recipe, "--output_dir", "x"])
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert printed.startswith(f"hf-tfm run {recipe}: unexpected TypeError: a fault") and printed.count("\n") == 1
    with pytest.raises(TypeError, match="a fault"):
        cli.main(["run", recipe, "--output_dir", "x", "--debug"])


def test_control_characters_are_escaped(capsys):
    from hf_tfm.command import say

    say("no file \x1b[31m a\nb\0 é")
    assert capsys.readouterr().err == "no file \\x1b[31m a\\nb\\x00 é\n"


def test_closed_standard_output_is_not_an_error(monkeypatch):
    from hf_tfm.command import run_command

    monkeypatch.setattr("sys.stdout", None)
    assert run_command("show", lambda words: None, []) == 0


def test_invalid_utf8_arguments_are_refused(capsys):
    from hf_tfm.command import run_command

    with pytest.raises(SystemExit):
        run_command("run x", lambda words: None, ["--run_name", "caf\udce9"])
    assert "caf\\\\udce9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"WORLD_SIZE": "2"}, r"WORLD_SIZE is 2, but MASTER_ADDR is not set.*unset WORLD_SIZE.*torchrun"),
        ({"LOCAL_RANK": "1"}, r"LOCAL_RANK is 1, but MASTER_ADDR"),
        ({"WORLD_SIZE": "abc"}, r'WORLD_SIZE must be an integer of at least 1, got "abc"'),
        ({"RANK": "-1"}, r'RANK must be an integer of at least 0, got "-1"'),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}, "RANK must be below WORLD_SIZE, 2, got 2"),
        ({"ACCELERATE_USE_CPU": ""}, r'ACCELERATE_USE_CPU must be true or false, got ""'),
    ],
)
def test_incomplete_launcher_variables_are_refused_first(monkeypatch, capsys, variables, told):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    ran = []
    with pytest.raises(SystemExit) as end:
        run_command("evaluate", ran.append, [])
    line = capsys.readouterr().err
    assert end.value.code == 1 and not ran and line.count("\n") == 1 and re.search(told, line), line


def test_complete_launcher_variables_are_accepted(monkeypatch):
    for variables in ({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "-1"}, {"MASTER_ADDR": "a", "WORLD_SIZE": "2"}):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert run_command("evaluate", lambda argv: 0, []) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_error_names_the_file(monkeypatch, capsys):
    from hf_tfm.writing import write_json

    assert describe(caught(lambda: write_json({}, "/dev/full"))) == "/dev/full: No space left on device"
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)

        def show(argv):
            print("a result")

        with pytest.raises(SystemExit) as end:
            run_command("evaluate", show, [])
        monkeypatch.undo()
        line = capsys.readouterr().err
        assert end.value.code == 1 and line == (
            "hf-tfm evaluate: standard output cannot be written: No space left on device\n"
        )
