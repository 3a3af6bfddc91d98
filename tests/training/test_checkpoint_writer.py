"""Checkpoints are written while training goes on, and errors of their writer end the run."""

import errno
import threading

import pytest
from training_helpers import arguments, run_training

from hf_tfm.training import checkpoint, session
from hf_tfm.writing import WriteError


def files(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def test_a_checkpoint_holds_its_step_although_it_is_written_after_later_ones(tmp_path, monkeypatch):
    run_training(arguments(tmp_path / "whole", save_total_limit=9, ema_decay=0.9))
    step, save = session.train_step, checkpoint.save_file
    trained, waited, later = [], [], threading.Event()

    def training_step(*args, **kwargs):
        result = step(*args, **kwargs)
        trained.append(result)
        if len(trained) == 8:
            later.set()
        return result

    def late(tensors, path, **options):
        waited.append(later.wait(60))
        save(tensors, path, **options)

    monkeypatch.setattr(session, "train_step", training_step)
    monkeypatch.setattr(checkpoint, "save_file", late)
    run_training(arguments(tmp_path / "late", save_total_limit=9, ema_decay=0.9))
    assert all(waited)
    for name in ("step-00000005", "step-00000010", "step-00000012"):
        whole, found = (files(tmp_path / run / "checkpoints" / name) for run in ("whole", "late"))
        assert len(found) == 3 and found == whole


def test_an_error_of_the_writer_ends_the_run_at_the_next_step(tmp_path, monkeypatch):
    trained = []
    step, failed = session.train_step, threading.Event()

    def training_step(*args, **kwargs):
        trained.append(len(trained))
        if len(trained) == 7:
            failed.wait(60)
        return step(*args, **kwargs)

    def full(path):
        failed.set()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(session, "train_step", training_step)
    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(WriteError, match=r"could not write .*step-00000005 .*No space left") as caught:
        run_training(arguments(tmp_path / "run", save_total_limit=1))
    assert "\n" not in str(caught.value)
    assert len(trained) <= 8
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("checkpoints")]
