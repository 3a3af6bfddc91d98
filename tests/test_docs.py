"""Commands and examples in README.md and docs/ are valid: options, presets, make targets, code and data formats.

Commands are parsed by the programs' own parsers but not executed, except those that only print. The commands in
docs/add_a_family.md and docs/add_a_task.md are executed by test_extension.py.
"""

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
import types
from dataclasses import dataclass, fields
from pathlib import Path

import pytest
import torch.distributed.run
import yaml
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from jsonargparse import ArgumentParser
from PIL import Image

from hf_tfm import cli
from hf_tfm.conversion import targets
from hf_tfm.data.panoptic import panoptic_categories
from hf_tfm.data.source import load_splits
from hf_tfm.distillation.terms import read_terms
from hf_tfm.doctor import detection
from hf_tfm.doctor import launch as doctor_launch
from hf_tfm.export.formats import FORMATS
from hf_tfm.launch import options as launch_options
from hf_tfm.models import encoder_attention
from hf_tfm.options import parse_arguments
from hf_tfm.tasks.registry import evaluated_tasks

ROOT = Path(__file__).parents[1]
GENERATE = runpy.run_path(str(ROOT / "docs" / "generate.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*/README.md")])
EXECUTED = ("add_a_family", "add_a_task")  # run by test_extension.py
FENCE = re.compile(r'^(<!-- test: run -->\n)?```(\w*)(?: title="([^"]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PRINTING = ("--help", "-h", "--print_config")
EXTRAS = re.findall(r'^(\w+) = \["', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Args:
        page, line: position of the block.
        language, title, text: its content.
        runs: whether it is executed.
    """

    page: Path
    line: int
    language: str
    title: str | None
    text: str
    runs: bool

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text[: found.start()].count("\n") + 1, found[2], found[3], found[4], bool(found[1]))
        for found in FENCE.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
COMMANDS = [
    pytest.param(words, id=f"{block}: {' '.join(words)[:80]}")
    for block in BLOCKS
    if block.language == "bash" and block.page.stem not in EXECUTED
    for line in block.text.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]
PYTHON = [pytest.param(block, id=str(block)) for block in BLOCKS if block.language == "python"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def load(recipe: str):
    file = ROOT / "recipes" / f"{recipe}.py"
    assert file.is_file(), f"there is no recipe {recipe}"
    return file, runpy.run_path(str(file))


def check_recipe(recipe: str, words: list[str]) -> None:
    file, content = load(recipe)
    if recipe == "distill_cache":
        assert words[0].startswith("distill_")
        check_recipe(words[0], [*words[1:], "--write_cache", "true"])
        return
    kind = content.get("AugmentArguments") or content["main"].task_class.Arguments
    parse_arguments(kind, file, words)


def check_hf_tfm(words: list[str]) -> None:
    if words[0] == "run":
        check_recipe(words[1], words[2:])
        return
    parsers = {"doctor detection": detection.parse, "doctor launch": doctor_launch.parse}
    if parse := launch_options.parse if words[0] == "launch" else parsers.get(" ".join(words[:2])):
        parse(words[1 if words[0] == "launch" else 2 :])
        return
    path, _, given = cli.parse(words)
    if path == ["evaluate"]:
        given.pop("model")
        fitting = [
            task.EvaluationArguments
            for task in evaluated_tasks()
            if given.keys() <= {one.name for one in fields(task.EvaluationArguments)}
        ]
        assert fitting, f"no task has all of {', '.join(given)}"
        fitting[0](model="model", **given)
    if path in (["convert"], ["export"]):
        assert given["to"] in (targets() if path == ["convert"] else FORMATS)


def check_python(words: list[str]) -> None:
    if words[0] != "-m":
        file = ROOT / words[0]
        assert file.is_file()
        if file.parent.name == "recipes":
            check_recipe(file.stem, words[1:])
    elif words[1] == "torch.distributed.run":
        args = torch.distributed.run.get_args_parser().parse_args(words[2:])
        check_python([args.training_script, *args.training_script_args])
    elif words[1] == "benchmarks":
        parser = ArgumentParser()
        module = importlib.import_module(f"benchmarks.{words[2]}")
        parser.add_function_arguments(module.main, as_positional=True)
        parser.parse_args(words[3:])
    elif words[1] == "pytest":
        assert all((ROOT / word).exists() for word in words[2:] if "/" in word)
    else:
        raise AssertionError(f"python -m {words[1]} is not known to this test")


def check(words: list[str]) -> None:
    program, *rest = words
    if program == "hf-tfm":
        check_hf_tfm([word for word in rest if word != "--debug"])
    elif program == "python":
        check_python(rest)
    elif words[:2] == ["accelerate", "launch"]:
        args = launch_command_parser().parse_args(words[2:])
        assert args.config_file is None or (ROOT / args.config_file).is_file()
        check_python([args.training_script, *args.training_script_args])
    elif program == "make":
        assert rest[0] in TARGETS
    elif words[:2] == ["pip", "install"]:
        assert rest[1].split("[")[0] == "."
        extras = re.search(r"\[(.*)\]", rest[1])
        assert not extras or set(extras[1].split(",")) <= set(EXTRAS)
    else:
        raise AssertionError(f"{program} is not known to this test")


def test_pages_contain_blocks():
    assert len(COMMANDS) > 100 and len(PYTHON) > 10
    assert {block.page for block in BLOCKS} > {ROOT / "README.md", ROOT / "docs" / "tasks" / "translation.md"}


@pytest.mark.parametrize("words", COMMANDS)
def test_command_is_valid(words, monkeypatch):
    rewards = types.ModuleType("my_rewards")  # a module of the reader
    rewards.right = lambda prompts, completions, **columns: [1.0] * len(prompts)
    monkeypatch.setitem(sys.modules, "my_rewards", rewards)
    printed = io.StringIO()
    if not set(words) & set(PRINTING):
        if "--batch_tokens 0" in " ".join(words):  # an example of an error
            with pytest.raises(SystemExit, match="2"):
                check(words)
            return
        check(words)
        return
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        check(words)
    assert not end.value.code and len(printed.getvalue()) > 500


@pytest.mark.parametrize(
    "words", [["hf-tfm", "run", "mae_pretrain", "--masks", "2"], ["make", "coffee"], ["hf-tfm", "x"]]
)
def test_wrong_command_is_detected(words):
    with pytest.raises((SystemExit, AssertionError)):
        check(words)


@pytest.mark.parametrize("block", PYTHON)
def test_python(block, monkeypatch):
    monkeypatch.setattr(encoder_attention, "METHODS", dict(encoder_attention.METHODS))  # of `register_method`
    code = compile(block.text, str(block), "exec")
    if block.runs:
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            exec(code, {"__name__": "example"})
        finally:
            AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    "block", [pytest.param(one, id=str(one)) for one in BLOCKS if one.language in ("json", "yaml")]
)
def test_data_is_valid(block):
    if block.language == "yaml":
        content = yaml.safe_load(block.text)
        read_terms(content.get("terms", []))
    elif block.title and block.title.endswith(".jsonl"):
        assert all(isinstance(json.loads(line), dict) for line in block.text.splitlines())
    else:
        json.loads(block.text)


def written(page: str) -> Path:
    """Write the titled blocks of a page; returns the folder of the data set."""
    for block in BLOCKS:
        if block.page == ROOT / "docs" / "tasks" / page and block.title:
            file = Path(block.title)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    (folder,) = [path for path in Path().iterdir() if path.name.startswith("my-")]
    return folder


@pytest.mark.parametrize(
    "page", ["translation.md", "language_modeling.md", "text_classification.md", "instruction_tuning.md"]
)
def test_doctor_accepts_the_example(page, capsys):
    folder = written(page)
    text = (ROOT / "docs" / "tasks" / page).read_text(encoding="utf-8")
    (command,) = re.findall(rf"^hf-tfm (doctor data {folder}.*)$", text, re.MULTILINE)
    words = shlex.split(re.sub("--tokenizer [^ ]+", "", command))
    with contextlib.suppress(SystemExit):
        cli.main(words)
    output = capsys.readouterr().out
    assert "failed: nothing" in output, output


def test_coco_example_loads():
    folder = written("object_detection.md")
    (folder / "train").mkdir()
    Image.new("RGB", (64, 48)).save(folder / "train" / "a.jpg")
    (row,) = load_splits(str(folder))["train"]
    assert row["objects"][0]["bbox"] == [8, 6, 20, 16]


def test_panoptic_example_loads():
    folder = written("panoptic_segmentation.md")
    assert [category.name for category in panoptic_categories(str(folder))] == ["car", "road"]


@pytest.mark.parametrize("page", GENERATE["PAGES"], ids=lambda page: str(page.relative_to(ROOT)))
def test_generated_parts_are_current(page):
    assert GENERATE["generated"](page) == page.read_text(encoding="utf-8"), "run python docs/generate.py"


def test_table_of_students(tmp_path, monkeypatch):
    """Scores and shares are means over the seeds of a cell; costs are those of the first task."""
    (tmp_path / "minilm").mkdir()
    for run, score, kept in (
        ("small_sst2-seed0", 0.8, 0.9),
        ("small_sst2-seed1", 0.9, 1.0),
        ("small_rte-seed0", 0.6, 1),
    ):
        task = run.split("_")[1].split("-")[0]
        common = {
            "milliseconds_32": 9,
            "megabytes": 4.4,
            "threads": 1,
            "sample": "ids",
            "metric": "accuracy, validation",
        }
        teacher = {**common, "gflops": 0.4, "milliseconds_1": 3, "score": 0.9}
        student = {**common, "gflops": 0.1, "milliseconds_1": 1, "score": score, "kept": kept}
        content = {"distillation": {"teacher": f"runs/minilm_{task}-seed0"}, "costs": [teacher, student]}
        (tmp_path / "minilm" / f"{run}.json").write_text(json.dumps(content))
    monkeypatch.setitem(GENERATE["students"].__globals__, "CARDS", tmp_path)
    found = GENERATE["students"](tmp_path / "page.md", "minilm")
    assert "| teacher | 400 | 3.0 | 9.0 | 4 | 1 | 90.0 | 90.0 |" in found
    assert (
        "| [`small`](minilm/small_sst2-seed0.md) | 100 | 1.0 | 9.0 | 4 | 4.0 | 85.0 (95 %) | 60.0 (100 %) |" in found
    )
    assert "Seeds per cell: 1 to 2" in found


def test_every_preset_has_a_description():
    for preset in ROOT.glob("recipes/presets/*/*.yaml"):
        about, cost, expected = GENERATE["header"](preset)
        assert len(about) > 30 or expected, preset
        assert not any("#" in text for text in (about, cost, expected)), preset


def test_numbers_have_a_source():
    """Measured numbers may only be in generated parts, which come from results files and headers of presets."""
    for page in ROOT.glob("docs/**/*.md"):
        text = FENCE.sub("", GENERATE["PART"].sub("", page.read_text(encoding="utf-8")))
        found = re.findall(
            r"\d[\d.,]* (?:%|BLEU|points?|PQ|AP|min|minutes?|hours?|times|images/s|tokens/s|GB)\b", text
        )
        assert not found, f"{page.name}: {found}"


def test_images_in_docs_are_small():
    for image in ROOT.glob("docs/images/*.png"):
        assert image.stat().st_size <= 200 * 1024, image


def test_site_lists_every_page():
    listed = re.findall(r"([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert {path.relative_to(ROOT / "docs").as_posix() for path in ROOT.glob("docs/**/*.md")} - {"index.md"} <= set(
        listed
    )


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="needs the packages of the extra docs",
)
def test_site_builds_without_warnings(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "site" / "tasks" / "translation" / "index.html").is_file()


def test_tables_of_published_scores_have_a_source_in_every_row():
    text = (ROOT / "docs" / "comparisons.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith(("| ViT", "| BiT", "| Noisy", "| DETR", "| Faster"))]
    assert len(rows) > 30 and all("](https://" in row for row in rows)
    assert "| 87.54 |" in text and "| 42.0 |" in text
