"""A run's folder: claimed by one run alone, and whole whatever goes wrong while it is written."""

import json

import pytest
import torch
from training_helpers import arguments, history, run_training, start

from hf_tfm.training import folder as folders
from hf_tfm.training.folder import History, WriteError, claim, explain_write_errors, require_room
from hf_tfm.training.state import checkpoints

RUN = {"task": "translation", "seed": 0, "adam_betas": (0.9, 0.98), "data": {"train": "abc"}}


def contents(folder):
    """Every file with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def a_run(folder):
    claim(folder, RUN, overwrite=False)
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "weights").write_text("precious")
    return contents(folder)


def test_claim_twice_is_the_same_run(tmp_path):
    assert claim(tmp_path / "new" / "run", RUN, overwrite=False) is False
    assert claim(tmp_path / "new" / "run", RUN, overwrite=False) is True
    assert claim(tmp_path / "new" / "run", RUN, overwrite=True) is True  # overwriting is for another run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"data": {"train": "xyz"}}, "data: .*'abc'.* there, .*'xyz'.* now"),
        ({"new_knob": True}, "new_knob: None there, True now"),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    before = a_run(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "run", {**RUN, **change}, overwrite=False)
    assert contents(tmp_path / "run") == before


def test_another_run_is_deleted_when_told_so(tmp_path):
    a_run(tmp_path / "run")
    assert claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True) is False
    assert list(contents(tmp_path / "run")) == ["run.json"]
    assert claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=False) is True


def test_overwriting_follows_no_links(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis").write_text("precious")
    a_run(tmp_path / "run")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "mine")
    claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True)
    assert (tmp_path / "mine" / "thesis").read_text() == "precious"


@pytest.mark.parametrize("overwrite", [False, True])
def test_other_files_are_never_deleted(tmp_path, overwrite):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        claim(tmp_path / "home", RUN, overwrite)
    with pytest.raises(ValueError, match="is not empty and holds no run"):
        claim(tmp_path / "home" / "thesis.tex", RUN, overwrite)
    assert contents(tmp_path) == {"home/thesis.tex": b"precious"}


def test_the_working_directory_is_never_deleted(tmp_path, monkeypatch):
    before = a_run(tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run" / "checkpoints")
    with pytest.raises(ValueError, match="would delete the working directory"):
        claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True)
    assert contents(tmp_path / "run") == before


def test_deleting_that_is_cut_off_leaves_a_run(tmp_path, monkeypatch):
    a_run(tmp_path / "run")

    def interrupt(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(folders.shutil, "rmtree", interrupt)
    with pytest.raises(KeyboardInterrupt):
        claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True)
    monkeypatch.undo()
    assert claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True) is False


def test_an_empty_folder_is_free(tmp_path):
    assert claim(tmp_path, RUN, overwrite=False) is False


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"identity": 3}'])
def test_a_description_that_is_none(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ValueError, match="does not describe a run"):
        claim(tmp_path, RUN, overwrite=True)
    assert contents(tmp_path) == {"run.json": text.encode()}


@pytest.mark.parametrize("place", ["file/run", "/proc/hf-tfm/run"])
def test_a_folder_that_cannot_be_written(tmp_path, place):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(WriteError, match=r"could not write .*run .*MB are free"):
        claim(tmp_path / place, RUN, overwrite=False)
    with pytest.raises(WriteError, match="could not write"):
        run_training(arguments(tmp_path / place))


def test_write_errors_are_explained_once(tmp_path):
    with pytest.raises(WriteError) as caught, explain_write_errors(tmp_path), explain_write_errors(tmp_path / "inner"):
        raise OSError(28, "No space left on device")
    assert str(caught.value).count("could not write") == 1
    assert "No space left on device" in str(caught.value)
    with pytest.raises(ZeroDivisionError), explain_write_errors(tmp_path):
        raise ZeroDivisionError  # other errors pass


@pytest.mark.parametrize("limit", [20_000, 45_000])
def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, limit):
    """Writing a file stops at a size: that of the weights, or that of the moments, which are twice as large."""
    args = arguments(tmp_path / "run", num_steps=12, keep_checkpoints=1)
    code, report = start(args, events={6: "SIGTERM"})
    assert code == 0
    before = contents(tmp_path / "run" / "checkpoints")
    sizes = {name.split("/")[-1]: len(content) for name, content in before.items()}
    assert 20_000 < sizes["model.safetensors"] < 45_000 < sizes["optimizer.safetensors"]
    code, report = start(args, file_limit=limit)
    assert code == 3
    assert report["error"].startswith("WriteError: could not write")
    assert "step-00000010" in report["error"] and "MB are free there" in report["error"]
    assert contents(tmp_path / "run" / "checkpoints") == before
    code, report = start(args)  # there is room again
    assert (code, report["step"]) == (0, 12)


def test_room_is_asked_for_before_the_run(tmp_path, monkeypatch):
    class Disk:
        free = 3_000

    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes; 1,200 with two moments
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: Disk)
    require_room(tmp_path, model, 2, ema=False)
    for count, ema in ((3, False), (2, True)):
        with pytest.raises(OSError, match=f"{count} checkpoints take about 0 MB, but only 0 MB are free"):
            require_room(tmp_path, model, count, ema)


def test_history_forgets_what_came_after(tmp_path):
    rows = History(tmp_path)
    for step in (1, 2, 3):
        rows.add({"step": step, "loss": step / 10})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    History(tmp_path, 2)
    assert [row["step"] for row in history(tmp_path)] == [1, 2]
    History(tmp_path, 0)
    assert history(tmp_path) == []


def test_run_file_is_json(tmp_path):
    claim(tmp_path, RUN, overwrite=False)
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["adam_betas"] == [0.9, 0.98]
    assert checkpoints(tmp_path) == []
