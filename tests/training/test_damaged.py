"""Damaged checkpoints are reported and set aside, and the run resumes from the previous one."""

import json
import logging
import shutil

import pytest
import torch
from training_helpers import arguments, fresh_accelerator, history, run_training, tiny_model

from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training.checkpoint import checkpoints, damage, resume, sealed
from hf_tfm.training.folder import History
from hf_tfm.training.optim import average_weights, build_ema, build_optimizer, build_schedule
from hf_tfm.training.session import Session

STEPS = 24


def run_args(folder, **options):
    return arguments(folder, max_steps=STEPS, ema_decay=0.9, **options)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run stopped after step 13 with checkpoints at steps 5, 10 and 13, the last one unscheduled."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    result, _ = run_training(run_args(folder, save_total_limit=3), events={12: "SIGTERM"})
    assert result.stopped
    assert [path.name[-2:] for path in checkpoints(folder)] == ["05", "10", "13"]
    return folder


@pytest.fixture
def run(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "run")


def resume_run(folder, max_steps=STEPS, **fields):
    """Resume without training further."""
    args = run_args(folder)
    accelerator, model = fresh_accelerator(args), tiny_model(**fields)
    optimizer = build_optimizer(model, args)
    schedule = build_schedule(optimizer, args, STEPS)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    return resume(accelerator, folder, max_steps, prepared, optimizer, schedule, build_ema(model, 0.9))


def change(file, **values):
    """Change the progress in a state.json; None deletes a value."""
    state = json.loads(file.read_text())
    for name, value in values.items():
        state["progress"][name] = value
        if value is None:
            del state["progress"][name]
    file.write_text(sealed(state))


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)


STATES = {
    "flipped bit": flip,
    "empty": lambda file: file.write_bytes(b""),
    "zeros": lambda file: file.write_bytes(bytes(file.stat().st_size)),
    "cut": truncate,
    "missing": lambda file: file.unlink(),
    "folder": lambda file: (file.unlink(), file.mkdir()),
    "junk": lambda file: file.write_bytes(b"\xff\xfe\x80"),
}
CONTENTS = {
    "list": lambda file: file.write_text("[]"),
    "null": lambda file: file.write_text("null"),
    "no progress": lambda file: file.write_text("{}"),
    "step as text": lambda file: change(file, step="13"),
    "step as a fraction": lambda file: change(file, step=13.5),
    "step missing": lambda file: change(file, step=None),
    "step true": lambda file: change(file, step=True),
    "step negative": lambda file: change(file, step=-1),
    "step huge": lambda file: change(file, step=10**9),
    "epoch negative": lambda file: change(file, epoch=-1),
    "epoch as a list": lambda file: change(file, epoch=[]),
    "window as a list": lambda file: change(file, window=[]),
    "best as text": lambda file: change(file, best="good"),
}
CASES = [
    *((name, kind, damage) for name in ("state.json",) for kind, damage in {**STATES, **CONTENTS}.items()),
    *(
        (f"{name}.safetensors", kind, damage)
        for name in ("model", "optimizer", "ema")
        for kind, damage in STATES.items()
    ),
]


@pytest.mark.parametrize(
    ("name", "kind", "damage"),
    [
        pytest.param(
            name, kind, damage, id=f"{name}-{kind}", marks=pytest.mark.slow if name[:3] in ("opt", "ema") else ()
        )
        for name, kind, damage in CASES
    ],
)
def test_a_damaged_checkpoint_is_set_aside(run, name, kind, damage, caplog):
    damage(run / "checkpoints" / "step-00000013" / name)
    with caplog.at_level(logging.WARNING):
        progress = resume_run(run)
    assert progress.step == 10
    (message,) = [record.getMessage() for record in caplog.records if "the run resumes" in record.getMessage()]
    assert f"step-00000013/{name} is" in message and "damaged-step-00000013" in message and "\n" not in message
    folders = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert folders == ["damaged-step-00000013", "step-00000005", "step-00000010"]


def test_all_damaged_checkpoints_are_set_aside(run):
    for step in ("10", "13"):
        truncate(run / "checkpoints" / f"step-000000{step}" / "model.safetensors")
    assert resume_run(run).step == 5
    assert [path.name for path in checkpoints(run)] == ["step-00000005"]
    assert len(list((run / "checkpoints").glob("damaged-*"))) == 2


def test_an_older_damaged_checkpoint_is_set_aside_too(run):
    """Otherwise it would be read later, when checkpoints are averaged or the best one is loaded."""
    truncate(run / "checkpoints" / "step-00000010" / "model.safetensors")
    assert resume_run(run).step == 13
    assert (run / "checkpoints" / "damaged-step-00000010").is_dir()


def test_step_beyond_the_run_counts_as_damage(run):
    (run / "checkpoints" / "step-00000013").rename(run / "checkpoints" / "step-00000099")
    change(run / "checkpoints" / "step-00000099" / "state.json", step=99)
    assert resume_run(run).step == 10


def test_without_an_intact_checkpoint_the_run_is_refused(run):
    for folder in checkpoints(run):
        (folder / "state.json").write_text("")
    before = sorted(run.rglob("*"))
    with pytest.raises(
        ValueError, match=r"has no intact checkpoint to resume from: .*step-00000005/state\.json.*delete"
    ):
        resume_run(run)
    assert sorted(run.rglob("*")) == before  # nothing is set aside


def test_checkpoint_of_another_model_is_set_aside(run, tmp_path):
    run_training(run_args(tmp_path / "other"), tiny_model(hidden_size=32), events={12: "SIGTERM"})
    shutil.rmtree(run / "checkpoints" / "step-00000013")
    shutil.copytree(tmp_path / "other" / "checkpoints" / "step-00000013", run / "checkpoints" / "step-00000013")
    assert resume_run(run).step == 10
    with pytest.raises(ValueError, match="does not match the model"):
        resume_run(run, hidden_size=8)


def test_unknown_state_fields_are_ignored(run, caplog):
    change(run / "checkpoints" / "step-00000013" / "state.json", foo=1, bar="x")
    with caplog.at_level(logging.WARNING):
        assert resume_run(run).step == 13
    assert "fields of a newer version are ignored: bar, foo" in caplog.text


def test_run_with_a_damaged_checkpoint_equals_uninterrupted_run(run, tmp_path):
    whole, expected = run_training(run_args(tmp_path / "whole"))
    truncate(run / "checkpoints" / "step-00000013" / "optimizer.safetensors")
    result, model = run_training(run_args(run))
    assert (result.progress.step, whole.progress.step) == (STEPS, STEPS)
    weights, others = model.state_dict(), expected.state_dict()
    assert all(torch.equal(weights[name], others[name]) for name in others)
    assert history(run) == history(tmp_path / "whole")


def test_checkpoint_of_an_earlier_version_has_no_checksums(run):
    for names, step in ((["files"], 10), (["files", "checksum"], 13)):
        file = run / "checkpoints" / "step-00000013" / "state.json"
        before = file.read_text()
        file.write_text(json.dumps({name: value for name, value in json.loads(before).items() if name not in names}))
        if step == 10:
            assert "has no files" in damage(file.parent, STEPS, tiny_model(), None)
            file.write_text(before)
    assert resume_run(run).step == 13


def test_damaged_weights_are_not_averaged_or_chosen(run):
    folder = run / "checkpoints" / "step-00000010"
    flip(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"step-00000010/model.safetensors is damaged: .* checksum in state.json"):
        average_weights(checkpoints(run))


def test_missing_best_weights_are_reported(run, capsys):
    args = run_args(run)
    best = json.loads((run / "checkpoints" / "step-00000013" / "state.json").read_text())["progress"]["best_step"]
    truncate(run / "checkpoints" / f"step-{best:08d}" / "model.safetensors")
    model = tiny_model()
    task = TranslationTask.for_model(model)
    session = Session(fresh_accelerator(args), task, model, args, STEPS, lambda _: {}, 5)
    assert (session.progress.step, session.progress.best, session.progress.best_step) == (13, None, None)
    assert f"the best weights, of step {best}, are lost" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["junk", "[1]", "null", "{}", '{"step": "x"}', '{"step": null}', '"text"'])
def test_damaged_history_lines_are_ignored(tmp_path, line, caplog):
    rows = [json.dumps({"step": step, "loss": 1.0}) for step in (1, 2)]
    (tmp_path / "history.jsonl").write_text("\n".join([rows[0], line, rows[1]]) + "\n")
    with caplog.at_level(logging.WARNING):
        History(tmp_path, 2)
    assert [row["step"] for row in history(tmp_path)] == [1, 2]
    assert "history.jsonl: damaged lines are ignored: 2" in caplog.text


def test_binary_history_is_ignored(tmp_path):
    (tmp_path / "history.jsonl").write_bytes(b"\xff\xfe\n\x80")
    History(tmp_path, 2)
    assert history(tmp_path) == []
