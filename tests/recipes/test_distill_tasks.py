"""Several GLUE tasks distilled by one command, each from its own teacher."""

import json
import shutil

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from distill_text_recipes import WIDE, command_line, run, save, train_tokenizer, write_texts
from recipe_helpers import record

from hf_tfm import TfmBertConfig, TfmBertForSequenceClassification

TASKS = {"mrpc": ClassLabel(names=["not_equivalent", "equivalent"]), "stsb": Value("float32")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data and teachers of two tasks, one a classification and one a regression."""
    folder = tmp_path_factory.mktemp("tasks")
    torch.manual_seed(0)
    tokenizer = train_tokenizer(write_texts(folder / "texts"))
    for task, label in TASKS.items():
        sides = {
            f"sentence{i}": [f"the {animal} number {n}" for n in range(16)] for i, animal in ((1, "cat"), (2, "dog"))
        }
        features = Features({**dict.fromkeys(sides, Value("string")), "label": label})
        rows = Dataset.from_dict({**sides, "label": [n % 2 for n in range(16)]}, features=features)
        for split in ("train", "validation"):
            rows.to_parquet(str(folder / f"glue-{task}" / f"{split}.parquet"))
        names = dict(enumerate(label.names)) if task == "mrpc" else {0: "LABEL_0"}
        config = TfmBertConfig(vocab_size=len(tokenizer), num_hidden_layers=4, id2label=names, **WIDE)
        save(folder / f"teacher-{task}", TfmBertForSequenceClassification(config), tokenizer)
    shutil.copytree(folder / "teacher-mrpc", folder / "teacher-rte")  # a task without data
    return folder


def given(folder, output_dir, **options):
    data, teacher = (f"{folder}/{name}-{{task}}" for name in ("glue", "teacher"))
    return command_line(
        data, output_dir, teacher=teacher, terms="[{kind: soft_target}]", tasks="mrpc,stsb,rte", **options
    )


def test_each_task_has_its_teacher_and_all_have_a_score(folder, tmp_path, capsys):
    assert run("distill_task", *given(folder, tmp_path / "run", costs="false")) == 0
    result = json.loads((tmp_path / "run" / "results.json").read_text())
    assert {(row["task"], row["name"]) for row in result["metrics"]} == {
        *(("mrpc", "accuracy"), ("mrpc", "f1"), ("stsb", "pearson"), ("stsb", "spearman"))
    }
    assert set(result["missing"]) == {"rte"} and "macro average of 2 of GLUE's 9 tasks" in capsys.readouterr().out
    for task in TASKS:
        alone = record(tmp_path / "run" / task)
        assert alone.distillation["teacher"] == f"teacher-{task}"
        assert f"--tasks null --task {task}" in alone.command


@pytest.mark.slow  # test_distill_text_cache.py writes and reads one
def test_each_task_has_its_cache(folder, tmp_path):
    cache = f"{tmp_path}/cache-{{task}}"
    assert run("distill_task", *given(folder, tmp_path / "none", cache=cache, write_cache="true")) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cache-mrpc", "cache-stsb"}
    assert run("distill_task", *given(folder, tmp_path / "run", cache=cache, costs="false")) == 0
    assert all(record(tmp_path / "run" / task).distillation["cached"] for task in TASKS)


def test_tasks_option_conflicts_with_task(folder, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run("distill_task", *given(folder, tmp_path / "run", task="mrpc"))
    assert "tasks determines task: set it to null, got mrpc" in capsys.readouterr().err
