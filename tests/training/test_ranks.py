"""Two processes train like one: same weights and counts, and each setup resumes the other's checkpoints."""

import json

import pytest
import ranks
from processes import run_ranks
from ranks import EQUAL
from safetensors.torch import load_file
from training_helpers import arguments, difference, history, run_training, tiny_model

from hf_tfm.training.checkpoint import checkpoints, full_weights, read_tensors


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output folder of two gloo processes; one of its runs was started by a single process."""
    folder = tmp_path_factory.mktemp("ranks")
    run_training(arguments(folder / "from_one"), tiny_model(dropout=0.2), {7: "SIGTERM"})
    for name, damaged in (("damaged", 1), ("lost", 2)):
        run_training(arguments(folder / name), events={7: "SIGTERM"})
        for checkpoint in checkpoints(folder / name)[-damaged:]:
            (checkpoint / "model.safetensors").write_bytes(b"")
    run_training(arguments(folder / "local0"), events={7: "SIGTERM"})
    run_training(arguments(folder / "local1", seed=1), events={5: "SIGTERM"})
    done = run_ranks(ranks.main, folder, timeout=560)
    return folder, done


def reports(folder):
    first, second = (json.loads((folder / f"report{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    return first


@pytest.mark.parametrize("name", list(EQUAL))
def test_same_weights_as_one_process(tmp_path, two, name):
    options, fields = dict(EQUAL[name][0]), EQUAL[name][1]
    rows = options.pop("rows", None)
    options = {key: value for key, value in options.items() if not key.startswith("fsdp")}
    result, model = run_training(arguments(tmp_path / "run", **options), tiny_model(**fields), rows=rows)
    assert difference(load_file(two[0] / f"{name}.safetensors"), full_weights(model)) < 1e-6
    assert reports(two[0])[name] == [result.progress.step, False, result.progress.items]
    assert difference(full_weights(model), full_weights(tiny_model(**fields))) > 1e-3
    for mine, theirs in zip(history(tmp_path / "run"), history(two[0] / name), strict=True):
        assert theirs.pop("evaluation", {}) == pytest.approx(mine.pop("evaluation", {}), rel=1e-4)
        assert theirs == pytest.approx(mine, rel=1e-4)


def test_both_ranks_resume_from_the_same_intact_checkpoint(two):
    assert reports(two[0])["damaged"][:2] == [12, False]
    assert (two[0] / "damaged" / "checkpoints" / "damaged-step-00000008").is_dir()
    assert "step-00000008/model.safetensors is damaged" in two[1].stderr


def test_sharded_run_resumes_from_shards_and_verifies_them(two):
    """Its newest checkpoint has a flipped bit in the shards of the second process."""
    folder = two[0] / "fsdp_resumed"
    assert reports(two[0])["shards"] == [f"shard-0000{i}-model-00001-of-00001.safetensors" for i in (1, 2)]
    assert reports(two[0])["fsdp_resumed"][:2] == [12, False]
    assert "step-00000008/shard-00002-model-00001-of-00001.safetensors is damaged" in two[1].stderr
    weights = [load_file(two[0] / f"{name}.safetensors") for name in ("fsdp", "fsdp_resumed")]
    assert difference(*weights) == 0
    assert history(folder) == history(two[0] / "fsdp")
    sizes = [path.stat().st_size for path in checkpoints(folder)[-1].glob("shard-*")]
    assert len(sizes) == 2 and max(sizes) < 0.6 * sum(sizes)
    weights = read_tensors(checkpoints(folder)[-1], "ema.safetensors")  # the average is the final model
    assert difference(weights, load_file(two[0] / "fsdp.safetensors")) == 0


def test_shards_are_awaited_no_longer_than_ddp_timeout(two):
    assert reports(two[0])["timeout"] == 77


def test_error_on_one_rank_ends_all(two):
    """`reports` compares the errors of both ranks."""
    lost, raised, *others = reports(two[0])["errors"]
    assert others[:2] == ["rank 0 failed", "rank 1 failed"]
    full = others[2:]
    assert "has no intact checkpoint to resume from" in lost
    assert raised == "only the main process knows"
    assert len(full) == 2  # the main process, and the second one, which writes its shards
    assert all("step-00000005 (the disk of one process is full)" in error and "\n" not in error for error in full)


def test_the_second_process_reads_what_the_main_process_has_prepared(two):
    assert reports(two[0])["prepared"] == ["made", "made by 0"]


def test_two_processes_resume_a_checkpoint_of_one(two):
    folder = two[0] / "from_one"
    assert reports(two[0])["from_one"][:2] == [12, False]
    assert checkpoints(folder)[-1].name == "step-00000012"
    losses = {row["step"]: row["loss"] for row in history(folder) if "loss" in row}
    assert list(losses) == [3, 6, 9, 12]
    assert losses[12] < losses[3]


def test_sigterm_on_one_rank_stops_all_and_one_process_resumes(tmp_path, two):
    folder = two[0] / "from_two"
    assert reports(two[0])["from_two"][:2] == [8, True]  # between two logging steps
    assert checkpoints(folder)[-1].name == "step-00000008"
    assert not (checkpoints(folder)[-1] / "model.safetensors").exists()  # shards
    result, model = run_training(arguments(folder))
    _, whole = run_training(arguments(tmp_path / "whole"))
    assert (result.progress.step, result.stopped) == (12, False)
    assert difference(full_weights(model), full_weights(whole)) < 1e-6  # the model has no dropout
    for mine, theirs in zip(history(folder), history(tmp_path / "whole"), strict=True):
        assert mine.pop("evaluation", {}) == pytest.approx(theirs.pop("evaluation", {}), rel=1e-4)
        assert mine == pytest.approx(theirs, rel=1e-4)


def test_sigterm_on_one_rank_ends_the_evaluation_of_all(tmp_path, two):
    folder = two[0] / "evaluating"
    assert reports(two[0])["evaluating"][:2] == [10, True]
    assert checkpoints(folder)[-1].name == "step-00000010"
    assert [row["step"] for row in history(folder) if "evaluation" in row] == [5]
    run_training(arguments(folder))
    assert [row["step"] for row in history(folder) if "evaluation" in row] == [5, 10, 12]


def test_only_the_main_process_needs_the_folder(tmp_path, two):
    """Its checkpoint is that of all; a stale one of another process is neither read nor changed."""
    assert reports(two[0])["local"][:2] == [12, False]
    _, model = run_training(arguments(tmp_path / "whole"))
    assert difference(load_file(two[0] / "local.safetensors"), full_weights(model)) < 1e-6
    assert [path.name for path in checkpoints(two[0] / "local1")] == ["step-00000005", "step-00000006"]
    assert len(history(two[0] / "local1")) == 3


def test_running_statistics_are_averaged(two):
    assert reports(two[0])["statistics"] == [[0.5, 0.5], [2.0, 2.0]]


def test_only_the_main_process_prints(two):
    _, done = two
    # The runs that reach their end, in addition to those of `EQUAL`: from_one, damaged, local and fsdp_resumed.
    assert done.stdout.count("step 12 of 12: loss") == len(EQUAL) + 4
    assert "train:" not in done.stdout + done.stderr
