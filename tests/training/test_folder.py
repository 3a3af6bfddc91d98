"""The run folder: claimed by one run at a time, and consistent after any failure while it is written."""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import threading
import time
from dataclasses import dataclass, field

import pytest
import torch
from training_helpers import arguments, history, run_training, start

from hf_tfm.training import checkpoint as states
from hf_tfm.training import folder as folders
from hf_tfm.training import run, run_folder
from hf_tfm.training.checkpoint import checkpoints
from hf_tfm.training.folder import History, require_room
from hf_tfm.training.run_folder import InUse, Lock, RunFolder, check_inputs, check_location
from hf_tfm.training.session import checkpoints_to_come
from hf_tfm.writing import WriteError, explain_write_errors

RUN = {"task": "translation", "seed": 0, "adam_betas": (0.9, 0.98), "data": {"train": "abc"}}


def contents(folder):
    """File contents by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def claim(folder, identity=RUN, overwrite=False):
    """Claim a folder for a run that is ready to train; returns whether it resumes and which unrelated files remain."""
    lock = Lock(folder)
    lock.take("a command")
    try:
        found = RunFolder(folder, identity, overwrite)
        holds_run = found.holds_run
        return holds_run, found.claim()
    finally:
        lock.release()


def saved_run(folder):
    """A run with a checkpoint, a model, a tokenizer and plots."""
    claim(folder)
    for name in (
        *("checkpoints/step-00000005/model.safetensors", "checkpoints/step-00000005/state.json", "history.jsonl"),
        *("model.safetensors", "config.json", "README.md", "results.json", "tokenizer/tokenizer.json"),
        *("predictions/step-00000005.png", ".eval_results/numbers.yaml", "modeling_bert.py"),
    ):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("precious")
    return contents(folder)


def test_same_run_can_claim_twice(tmp_path):
    assert claim(tmp_path / "new" / "run") == (False, [])
    assert claim(tmp_path / "new" / "run") == (True, [])
    assert claim(tmp_path / "new" / "run", overwrite=True) == (True, [])  # overwriting applies only to another run


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"data": {"train": "xyz"}}, "data: .*'abc'.* there, .*'xyz'.* now"),
        ({"new_option": True}, "new_option: None there, True now"),
    ],
)
def test_another_run_is_refused(tmp_path, change, message):
    before = saved_run(tmp_path / "run")
    with pytest.raises(ValueError, match=message):
        claim(tmp_path / "run", {**RUN, **change})
    assert contents(tmp_path / "run") == before


def test_run_without_checkpoints_is_replaced(tmp_path):
    """A run that failed in its first steps holds nothing of value; the corrected command needs no overwrite option."""
    claim(tmp_path / "run")
    (tmp_path / "run" / "history.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "run" / "notes.txt").write_text("precious")
    assert claim(tmp_path / "run", {**RUN, "seed": 1}) == (False, ["notes.txt"])
    assert sorted(contents(tmp_path / "run")) == ["notes.txt", "run.json"]


def test_evaluation_data_is_not_part_of_the_identity(tmp_path):
    """Also for run.json files of older versions, which had more fields."""
    saved_run(tmp_path / "run")
    held = {"identity": {**RUN, "max_bad_images": 10, "data": {"train": "abc", "test": "xyz"}}}
    (tmp_path / "run" / "run.json").write_text(json.dumps(held))
    assert RunFolder(tmp_path / "run", RUN, ignored=["max_bad_images"]).holds_run
    with pytest.raises(ValueError, match="max_bad_images: 10 there, None now"):
        RunFolder(tmp_path / "run", RUN)


def test_overwrite_deletes_another_run(tmp_path):
    saved_run(tmp_path / "run")
    assert claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True) == (False, [])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]
    assert claim(tmp_path / "run", {**RUN, "seed": 1})[0]


def test_overwrite_keeps_unrelated_files(tmp_path):
    run = tmp_path / "run"
    saved_run(run)
    mine = ("thesis.tex", "checkpoints/mine/model.safetensors", "checkpoints/step-00000005/notes", "mine.py", ".env")
    for name in mine:
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text("mine")
    _, left = claim(run, {**RUN, "seed": 1}, overwrite=True)
    assert left == [".env", "checkpoints", "mine.py", "thesis.tex"]
    assert contents(run).keys() == {*mine, "run.json"}
    states.clean(run)
    assert contents(run).keys() == {*mine, "run.json"}


@pytest.mark.parametrize("name", ["link", "checkpoints", "config.json", "checkpoints/step-00000009"])
def test_overwrite_does_not_follow_links(tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "state.json").write_text("precious")
    saved_run(tmp_path / "run")
    if name == "checkpoints":
        (tmp_path / "run" / name).rename(tmp_path / "run" / "mine")
    (tmp_path / "run" / name).unlink(missing_ok=True)
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True)
    assert (tmp_path / "mine" / "state.json").read_text() == "precious"
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_folder_without_a_run_is_never_deleted(tmp_path, overwrite):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match=r"is not empty and holds no run \(thesis.tex\)"):
        claim(tmp_path / "home", overwrite=overwrite)
    assert contents(tmp_path) == {"home/thesis.tex": b"precious"}


def test_interrupted_deletion_leaves_a_run(tmp_path, monkeypatch):
    saved_run(tmp_path / "run")
    unlink, calls = type(tmp_path).unlink, itertools.count()

    def interrupted(path, *args, **options):
        if path.name != ".lock" and next(calls) == 4:
            raise KeyboardInterrupt
        unlink(path, *args, **options)

    monkeypatch.setattr(type(tmp_path), "unlink", interrupted)
    with pytest.raises(KeyboardInterrupt):
        claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True)
    monkeypatch.undo()
    assert claim(tmp_path / "run", {**RUN, "seed": 1}, overwrite=True) == (False, [])


def test_empty_folder_can_be_claimed(tmp_path):
    assert claim(tmp_path) == (False, [])


@pytest.mark.parametrize("text", [b"", b"{}", b"[1]", b'{"identity": 3}', b"\xff\xfe"])
def test_invalid_run_description(tmp_path, text):
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(ValueError, match=r"run\.json does not describe a run"):
        claim(tmp_path, overwrite=True)
    assert contents(tmp_path) == {"run.json": text}


def test_run_description_with_a_list(tmp_path):
    (tmp_path / "run.json").write_text("[1]")
    with pytest.raises(ValueError, match=r'is damaged: a mapping "identity" is expected, got \[1\]'):
        claim(tmp_path)


def test_folder_below_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r'output_dir ".*file/a/b" lies below ".*file", which is a file'):
        check_location(str(tmp_path / "file" / "a" / "b"))


def test_unwritable_caches_are_reported_before_the_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.delenv("HF_DATASETS_CACHE", raising=False)
    run.check_caches()
    monkeypatch.setattr(run, "HF_DATASETS_CACHE", str(tmp_path / "file" / "hf" / "datasets"))
    with pytest.raises(ValueError, match=r"file/hf/datasets cannot be written .*Not a directory.* HF_HOME to"):
        run.check_caches()
    monkeypatch.setenv("HF_DATASETS_CACHE", "x")
    with pytest.raises(ValueError, match="HF_DATASETS_CACHE to"):
        run.check_caches()


def test_checkpoint_count_is_limited_by_the_run_length(tmp_path):
    def count(**options):
        return checkpoints_to_come(arguments(tmp_path, save_total_limit=10**9, **options), 10, 5)

    assert count(save_steps=None) == 2
    assert count(save_steps=3) == 2 + 4
    args = arguments(tmp_path, save_total_limit=1, save_steps=None)
    assert checkpoints_to_come(args, 1000, 5) == 3


def test_unclaimed_run_leaves_no_files(tmp_path):
    lock = Lock(tmp_path / "new" / "run")
    lock.take()
    found = RunFolder(tmp_path / "new" / "run", RUN)
    found.part("tokenizer").mkdir(parents=True)
    (found.part("tokenizer") / "tokenizer.json").write_text("{}")
    found.give_up()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_parts_prepared_before_the_claim_are_moved(tmp_path):
    found = RunFolder(tmp_path, RUN)
    found.part("tokenizer").mkdir(parents=True)
    (found.part("tokenizer") / "tokenizer.json").write_text("{}")
    assert "tokenizer/tokenizer.json" not in contents(tmp_path)
    found.claim()
    assert contents(tmp_path).keys() == {"run.json", "tokenizer/tokenizer.json"}
    assert RunFolder(tmp_path, RUN).part("tokenizer") == tmp_path / "tokenizer"


# --- folders that cannot hold a run, and inputs inside the run folder


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("", "must name a folder"),
        ("  ", "must name a folder"),
        ("/", "is the root|contains the"),
        ("work/inner", "is the working directory"),
        ("work", "contains the working directory"),
        (".", "is the working directory"),
        ("~", "is the home directory"),
        ("file", "is a file"),
        ("loop", "is a symbolic link to"),
        ("dangling", "is a symbolic link to nowhere, which does not exist"),
        ("link", "is the working directory"),
    ],
)
def test_invalid_output_folders_are_refused(tmp_path, monkeypatch, path, message):
    (tmp_path / "work" / "inner").mkdir(parents=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "file").write_text("precious")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("work/inner")
    monkeypatch.chdir(tmp_path / "work" / "inner")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    given = path if path.strip() in ("", "/", ".") else str(tmp_path / {"~": "home"}.get(path, path))
    with pytest.raises(ValueError, match=f"output_dir .*({message})"):
        check_location(given)
    check_location(str(tmp_path / "work" / "run"))
    assert (tmp_path / "file").read_text() == "precious"


@dataclass
class Inputs:
    output_dir: str
    model_name_or_path: str | None = None
    teacher: str | None = None
    tokenizer: str | None = None
    dataset_name: str | None = None
    data_files: dict | None = None
    cache: str | None = None
    more_texts: list = field(default_factory=list)


@pytest.mark.parametrize(
    "name", ["model_name_or_path", "teacher", "tokenizer", "dataset_name", "cache", "data_files", "more_texts"]
)
@pytest.mark.parametrize("path", ["run", "run/part", "run/../run/part", "link", "alias/part", "snapshot"])
def test_inputs_in_the_output_folder_are_refused(tmp_path, name, path):
    (tmp_path / "run" / "part").mkdir(parents=True)
    (tmp_path / "run" / "part" / "weights").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "run" / "part")
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    (tmp_path / "snapshot").mkdir()  # as the Hub's cache: a folder of links
    (tmp_path / "snapshot" / "weights").symlink_to(tmp_path / "run" / "part" / "weights")
    value = str(tmp_path / path)
    given = {"data_files": {"train": [value]}, "more_texts": [Inputs("", dataset_name=value)]}.get(name, value)
    with pytest.raises(ValueError, match=rf'output_dir ".*run" is or holds {name}.* ".*{path}", which the run reads'):
        check_inputs(Inputs(str(tmp_path / "run"), **{name: given}))
    check_inputs(Inputs(str(tmp_path / "other"), **{name: given}))


def test_file_patterns_and_configs_in_the_output_folder_are_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "rows.csv").write_text("a")
    (tmp_path / "run" / "my.yaml").write_text("seed: 1")
    with pytest.raises(ValueError, match="data_files"):
        check_inputs(Inputs(str(tmp_path / "run"), data_files={"train": str(tmp_path / "*" / "*.csv")}))
    for words in (["--config", str(tmp_path / "run/my.yaml")], [f"--config={tmp_path / 'run/my.yaml'}"]):
        with pytest.raises(ValueError, match="--config"):
            check_inputs(Inputs(str(tmp_path / "run")), words)


def test_preset_and_embedded_data_names_are_not_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "digits", "number-parity"):
        (tmp_path / name).mkdir()
        check_inputs(Inputs(name, dataset_name=name if name != "quickstart" else "digits"), ["--config", "quickstart"])


def test_output_folder_inside_the_data_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(ValueError, match=r'lies inside dataset_name ".*data"'):
        check_inputs(Inputs(str(tmp_path / "data" / "run"), dataset_name=str(tmp_path / "data")))
    check_inputs(Inputs(str(tmp_path / "data" / "run"), model_name_or_path=str(tmp_path / "data")))  # no loss


# --- one process at a time


def hold(folder, taken, done):
    lock = Lock(folder)
    lock.take("hf-tfm run first")
    taken.set()
    done.wait(60)
    os.kill(os.getpid(), signal.SIGKILL)


def test_second_process_is_refused_until_the_first_exits(tmp_path):
    context = multiprocessing.get_context("fork")
    taken, done = context.Event(), context.Event()
    process = context.Process(target=hold, args=(tmp_path / "run", taken, done))
    process.start()
    assert taken.wait(60)
    words = rf'output_dir ".*run" is in use by process {process.pid} on host .* \(hf-tfm run first\)'
    for _ in range(2):
        with pytest.raises(InUse, match=words):
            claim(tmp_path / "run")
    done.set()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert claim(tmp_path / "run") == (False, [])  # the lock of a killed process is released
    assert sorted(contents(tmp_path / "run")) == ["run.json"]


def test_lock_is_not_reentrant(tmp_path):
    first = Lock(tmp_path)
    first.take()
    with pytest.raises(InUse, match=f"in use by process {os.getpid()}"):
        Lock(tmp_path).take()
    first.release()
    claim(tmp_path)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(run_folder, "BEAT", 0.02)
    monkeypatch.setattr(run_folder, "SILENCE", 0.6)


def test_lock_of_another_host_is_respected_while_it_lives(tmp_path, impatient):
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 7, "command": "hf-tfm run x"}))
    holder = threading.Timer(0.1, (tmp_path / ".lock").touch)
    holder.start()
    with pytest.raises(InUse, match=r"process 7 on host elsewhere .*if it no longer runs, delete .*\.lock"):
        claim(tmp_path)
    claim(tmp_path)  # it is silent now


def lose(folder, taken) -> None:
    """A holder whose lock is taken over by another host."""
    Lock(folder).take()
    taken.set()
    time.sleep(60)


def test_holder_of_a_lock_lives_and_ends_when_the_lock_is_taken_over(tmp_path, impatient, capfd):
    context = multiprocessing.get_context("fork")
    taken = context.Event()
    process = context.Process(target=lose, args=(tmp_path, taken))
    process.start()
    assert taken.wait(60)
    path = tmp_path / ".lock"
    before = path.stat().st_mtime_ns
    deadline = time.monotonic() + 60
    while path.stat().st_mtime_ns == before:
        assert time.monotonic() < deadline
    with pytest.raises(InUse):
        claim(tmp_path)
    path.write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    process.join(60)
    assert process.exitcode == 1
    assert "was taken over by process 7 on host elsewhere" in capfd.readouterr().err


@pytest.mark.parametrize("text", ["", "junk", "[1]", '{"pid": 1}'])
def test_damaged_lock_file_is_taken_over(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    claim(tmp_path)


def test_without_record_locks_the_process_id_decides(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "fcntl", None)
    for pid, free in ((os.getppid(), False), (2**22 + 1, True)):
        (tmp_path / ".lock").write_text(json.dumps({"host": socket.gethostname(), "pid": pid}))
        if free:
            claim(tmp_path)
        else:
            with pytest.raises(InUse, match=f"process {pid} on host"):
                claim(tmp_path)


# --- writing


def test_model_is_moved_file_by_file(tmp_path):
    part, folder = tmp_path / "part", tmp_path / "folder"
    for target, names in (
        (part, ("config.json", "model.safetensors")),
        (folder, ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "mine.txt")),
    ):
        target.mkdir()
        for name in names:
            (target / name).write_text(target.name)
    run_folder.place_new(part, folder)
    assert contents(folder) == {"config.json": b"part", "model.safetensors": b"part", "mine.txt": b"folder"}
    assert not part.exists()


@pytest.mark.parametrize("target", ["file/run", "/proc/hf-tfm/run"])
def test_unwritable_folder(tmp_path, target):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(WriteError, match=r"could not write .*run .*MB are free"):
        claim(tmp_path / target)
    with pytest.raises(WriteError, match="could not write"):
        run_training(arguments(tmp_path / target))


def test_write_errors_are_explained_once(tmp_path):
    with pytest.raises(WriteError) as caught, explain_write_errors(tmp_path), explain_write_errors(tmp_path / "inner"):
        raise OSError(28, "No space left on device")
    assert str(caught.value).count("could not write") == 1
    assert "No space left on device" in str(caught.value)
    with pytest.raises(ZeroDivisionError), explain_write_errors(tmp_path):
        raise ZeroDivisionError  # other errors are passed through


@pytest.mark.parametrize("limit", [pytest.param(20_000, marks=pytest.mark.slow), 45_000])
def test_full_disk_keeps_the_last_checkpoint(tmp_path, limit):
    """A file-size limit below the size of the weights, or of the optimizer state, which is twice as large."""
    args = arguments(tmp_path / "run", max_steps=12, save_total_limit=1)
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
    code, report = start(args)  # space is available again
    assert (code, report["step"]) == (0, 12)


def test_free_space_is_checked_before_the_run(tmp_path, monkeypatch):
    class Disk:
        free = 3_000

    model = torch.nn.Linear(10, 10, bias=False)  # 400 bytes; 1,200 with Adam's two moments
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: Disk)
    require_room(tmp_path, model, 2, ema=False)
    for count, ema in ((3, False), (2, True)):
        with pytest.raises(OSError, match=f"{count} checkpoints take about 0 MB, but only 0 MB are free"):
            require_room(tmp_path, model, count, ema)


def test_history_drops_rows_after_the_resumed_step(tmp_path):
    rows = History(tmp_path)
    for step in (1, 2, 3):
        rows.add({"step": step, "loss": step / 10})
    with (tmp_path / "history.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    History(tmp_path, 2)
    assert [row["step"] for row in history(tmp_path)] == [1, 2]
    History(tmp_path, 0)
    assert history(tmp_path) == []


def test_run_json_is_plain_json(tmp_path):
    claim(tmp_path)
    assert json.loads((tmp_path / "run.json").read_text())["identity"]["adam_betas"] == [0.9, 0.98]
    assert checkpoints(tmp_path) == []
