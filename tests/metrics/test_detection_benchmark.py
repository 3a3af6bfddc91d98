"""The average-precision benchmark compares implementations that agree."""

import contextlib
import io

import pytest

from benchmarks import detection_evaluation, report


def test_implementations_agree():
    pytest.importorskip("pycocotools", reason="a implementation, pycocotools, is not installed")
    pytest.importorskip("torchmetrics", reason="a implementation, torchmetrics, is not installed")
    scenes = [detection_evaluation.scene(image, 40) for image in range(24)]
    with contextlib.redirect_stdout(io.StringIO()):
        found = {name: implementation(scenes) for name, implementation in detection_evaluation.IMPLEMENTATIONS.items()}
    assert 0.1 < found["ours"] < 0.9
    assert found["ours"] == pytest.approx(found["pycocotools"], abs=1e-12)
    # torchmetrics computes in single precision.
    assert list(found.values()) == pytest.approx([found["ours"]] * len(found), abs=1e-7)


def test_page_shows_ratios_to_ours():
    results = {"images": 5000, "detections": 100, "objects": 7, "max_abs_ap_difference": 1e-16, "threads": 1}
    results |= {"command": "python", "versions": {"torch": "2", "transformers": "5"}, "hardware": {"cpu": "A"}}
    results |= {"seconds": {"ours": 4.0, "peer": 10.0}, "megabytes": {"ours": 20.0, "peer": 500.0}}
    assert "| peer | 10.0 | 500.0 | 2.5 | 25.0 |" in report.detection_evaluation(results)


def test_missing_packages_are_skipped(monkeypatch):
    written = {}
    monkeypatch.setattr(detection_evaluation, "find_spec", lambda name: name == "faster_coco_eval")
    monkeypatch.setattr(detection_evaluation.common, "in_fresh_process", lambda work, name, *_: (0.5, 2.0, 10.0))
    monkeypatch.setattr(detection_evaluation.common, "write", lambda name, results: written.update(results))
    detection_evaluation.main(images=8, detections=4)
    assert written["seconds"] == {"ours": 2.0} and list(written["libraries"]) == ["faster-coco-eval"]
