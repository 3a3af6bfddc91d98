"""Runs write only files listed in `hub.saved_files`, which overwriting and pushing rely on."""

import pytest
from recipe_helpers import command_line as translation_command_line
from recipe_helpers import run_recipe, write_data
from scene_recipes import scenes, train, write_hub

from hf_tfm.hub.push import files_to_push
from hf_tfm.hub.saved_files import CARD, CHECKPOINT_FILES, CURVE, HISTORY, PICTURE, RESULTS, RUN, TASK_FILE
from hf_tfm.training.run_folder import delete_run

OPTIONS = {"max_steps": 2, "eval_steps": 1, "ema_decay": 0.5, "report_to": "[tensorboard]"}
RECORD = {CARD, RESULTS, HISTORY, CURVE, RUN, "config.json", "model.safetensors"}


def translation_run(folder):
    run_recipe(*translation_command_line(write_data(folder / "data"), folder / "run", **OPTIONS))
    return RECORD | {"generation_config.json", "tokenizer.json", "tokenizer/tokenizer.json"}


def detection_run(folder):
    train(write_hub(folder / "data", scenes()), folder / "run", **OPTIONS)
    return RECORD | {PICTURE, "preprocessor_config.json", "processor/preprocessor_config.json"}


@pytest.mark.parametrize("start", [translation_run, detection_run])
def test_runs_write_only_listed_files(tmp_path, start):
    expected = start(tmp_path)
    run = tmp_path / "run"
    found = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert found >= expected
    saved = {name.split("/")[-1] for name in found if name.startswith("checkpoints/")}
    assert saved == {*CHECKPOINT_FILES} - {TASK_FILE}  # these tasks have no state
    assert any("tfevents" in name for name in found)
    pushed, left_out = files_to_push(run)
    top = {path.name for path in run.iterdir() if path.is_file()}
    assert top - set(pushed) == {RUN}, "only run.json is not pushed"
    assert not [name for name in left_out if name.startswith(".eval_results")]
    assert delete_run(run) == [] and not list(run.iterdir())
