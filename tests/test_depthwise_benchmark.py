"""The benchmark of depthwise backbones compares precisions of one model."""

import pytest
import torch

from benchmarks import common, depthwise_training, report


def test_benchmark_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(depthwise_training, "BACKBONES", ("mobilenetv3_small_050",))
    depthwise_training.main(batch_size=2, height=64, width=64, rounds=1)
    results = report.load("depthwise_training")
    assert list(results["backbones"]["mobilenetv3_small_050"]["milliseconds"]) == [
        *("float32 ours", "float32 default", "bfloat16 ours", "bfloat16 default")
    ]
    assert "| mobilenetv3_small_050 |" in report.depthwise_training(results)


def test_defaults_of_torch_run_in_bfloat16():
    layer = depthwise_training.GroupedConv2d(4, 4, 3, groups=4)
    found = []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(
            torch.nn.Conv2d, "forward", lambda self, x: found.append((x.dtype, torch.is_autocast_enabled("cpu"))) or x
        )
        layer(torch.zeros(1, 4, 3, 3))
        with depthwise_training.torch_defaults():
            layer(torch.zeros(1, 4, 3, 3, dtype=torch.bfloat16))
    assert found == [(torch.float32, False), (torch.bfloat16, True)]
