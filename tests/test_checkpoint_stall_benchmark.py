"""The benchmark of checkpoints runs on a tiny model."""

import pytest

from benchmarks import checkpoint_stall, common, report


def test_benchmark_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    checkpoint_stall.main(hidden_size=32, layers=1, vocab_size=40, length=8, rounds=1, folder=str(tmp_path))
    found = report.load("checkpoint_stall")
    parameters = 32 * (40 + 8) + 12 * 32**2 + 13 * 32 + 2 * 32  # embeddings, one block, last norm
    assert found["parameters"] == parameters
    assert found["megabytes"] == pytest.approx(3 * 4 * parameters / 1e6, abs=0.1)  # and two moments
    for name, seconds in found["seconds"].items():
        assert found["share_of_a_minute"][name] == pytest.approx(seconds / 60, abs=1e-5)
    assert "| at once |" in report.checkpoint_stall(found)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_stall.json"]  # no checkpoints are left
