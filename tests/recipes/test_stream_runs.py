"""A streamed run that two processes start and one resumes equals that of one undisturbed process."""

import itertools
import json

import scene_recipes
import torch
from processes import run_ranks
from recipe_helpers import ROOT, TINY, command_line, record, run_recipe
from safetensors.torch import load_file

from hf_tfm.data.number_words import spell


def test_resuming_with_another_number_of_processes_changes_nothing(tmp_path):
    data = tmp_path / "pairs"
    data.mkdir()
    rows = [spell(37 * i + 1) for i in range(160)]
    bounds = [0, 3, 60, 61, 100, 150]  # uneven files
    files = {f"train-{i}": rows[start:end] for i, (start, end) in enumerate(itertools.pairwise(bounds))}
    for name, part in {**files, "validation": rows[150:155], "test": rows[155:]}.items():
        (data / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    options = {
        "streaming": "true",
        "lr_scheduler_type": "constant",
        "adam_epsilon": 1e-3,
        "model": TINY[:-1] + ", dropout: 0.0}",
        "logging_steps": 1,
        "save_steps": 1,
        "save_total_limit": 99,
        "metrics": "[chrf]",
        "test_splits": "[]",
    }

    def words(name, steps, workers=0):
        given = {**options, "max_steps": steps, "dataloader_num_workers": workers}
        return command_line(data, tmp_path / name, **given)

    def losses(name):
        rows = map(json.loads, (tmp_path / name / "history.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    assert run_recipe(*words("whole", 9)) == 0
    run_ranks("-m", "hf_tfm.cli", "run", "translation_train", *words("cut", 3, workers=2), cwd=ROOT)
    state = json.loads((tmp_path / "cut" / "checkpoints" / "step-00000003" / "state.json").read_text())
    assert state["progress"]["stream"]["step"] == 3 and state["progress"]["epoch"] == 0
    assert run_recipe(*words("cut", 9)) == 0  # until the second epoch
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5
    assert torch.allclose(torch.tensor(losses("whole")), torch.tensor(losses("cut")), atol=1e-5)
    state = json.loads((tmp_path / "cut" / "checkpoints" / "step-00000009" / "state.json").read_text())
    assert state["progress"]["epoch"] == 1 and len(losses("whole")) == 9


def test_resuming_detection_with_another_number_of_processes_changes_nothing(tmp_path):
    """Images of several sizes, whose numbers of boxes differ; normalised by the boxes of the whole step."""
    splits = scene_recipes.scenes()
    data = scene_recipes.write_hub(tmp_path / "data", splits)
    (data / "train.parquet").unlink()
    for file, (start, end) in enumerate(itertools.pairwise((0, 1, 9, 9, 12, 14))):
        splits["train"].select(range(start, end)).to_parquet(str(data / f"train-{file}.parquet"))
    options = {"streaming": "true", "lr_scheduler_type": "constant", "adam_epsilon": 1e-3, "shuffle_buffer": 8}
    options |= {"logging_steps": 1, "save_steps": 1, "eval_steps": 99, "test_splits": "[]", "num_pictures": 0}

    def words(name, steps, workers=0):
        given = {**options, "max_steps": steps, "dataloader_num_workers": workers}
        return scene_recipes.command_line(data, tmp_path / name, **given)

    def losses(name):
        rows = map(json.loads, (tmp_path / name / "history.jsonl").read_text().splitlines())
        return [row["loss"] for row in rows if "loss" in row]

    scene_recipes.train(data, tmp_path / "whole", **options, max_steps=6)
    run_ranks("-m", "hf_tfm.cli", "run", "detection_train", *words("cut", 3, workers=1), cwd=ROOT)
    scene_recipes.train(data, tmp_path / "cut", **options, max_steps=6)  # until the second epoch
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert max((one[name] - other[name]).abs().max() for name in one) < 1e-5
    assert len(losses("cut")) == 6
    assert torch.allclose(torch.tensor(losses("whole")), torch.tensor(losses("cut")), atol=1e-5)
    assert record(tmp_path / "whole").data["fingerprint"]["train"] == "stream"
