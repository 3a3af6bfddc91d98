"""The benchmark of the parts of a training step counts every second once."""

import time

import pytest
from recipe_helpers import fresh_state
from scene_recipes import scenes, write_hub

from benchmarks import common, detection_step, report


def test_parts_within_a_part_are_counted_once():
    parts = detection_step.Parts()
    inner = parts.timed("inner", lambda: time.sleep(0.02))
    outer = parts.timed("outer", lambda: (inner(), inner(), time.sleep(0.01)))
    start = time.perf_counter()
    outer()
    assert sum(parts.seconds.values()) <= time.perf_counter() - start
    assert parts.seconds["inner"] >= 0.04 and parts.seconds["outer"] >= 0.01


def test_summary():
    found = detection_step.summary([{"forward": 3.0, "matching": 1.0}, {"forward": 5.0, "matching": 1.0}])
    assert found["share"] == {"forward": 0.8, "matching": 0.2}
    assert found["share_not_model"] == 0.2 and found["median_milliseconds"] == 5000.0


def test_benchmark_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    small = "--shortest_side 64 --longest_side 64 --augmentation.scales [64] --test_splits [] --num_pictures 0"
    data = write_hub(tmp_path / "hub", scenes())
    fresh_state()
    detection_step.main(str(data), max_steps=3, warm_up=1, options=small)
    fresh_state()
    found = report.load("detection_step")
    assert set(found["share"]) == {
        *("forward", "backward", "optimizer", "matching", "loss without matching", "average of weights"),
        *("decoding and augmentation", "loop and logging"),
    }
    assert all(share > 0 for share in found["share"].values())
    assert sum(found["share"].values()) == pytest.approx(1, abs=1e-3)
    assert "| matching |" in report.detection_step(found)
