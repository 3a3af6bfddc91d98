"""The benchmark of the engine's overhead runs on a tiny model, and both loops train it equally."""

import pytest
import torch

from benchmarks import common, engine_overhead, report
from hf_tfm import TfmTransformerConfig


def test_benchmark_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    models, copy = [], engine_overhead.deepcopy
    monkeypatch.setattr(engine_overhead, "deepcopy", lambda model: models.extend([model, copy(model)]) or models[1])
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "dropout": 0.0}
    config = TfmTransformerConfig(**sizes, num_encoder_layers=1, num_decoder_layers=1, vocab_size=40)
    monkeypatch.setattr(TfmTransformerConfig, "of_size", lambda size, **fields: config)
    engine_overhead.main(sizes=("small",), vocab_size=40, batch_size=2, length=4, steps=2, rounds=1)
    found = report.load("engine_overhead")["sizes"]["small"]
    seconds = found["seconds_per_step"]
    assert found["overhead"] == pytest.approx(seconds["engine"] / seconds["plain"] - 1, abs=0.1)
    trained, plain = (model.state_dict() for model in models)
    assert all(torch.allclose(trained[name], plain[name], atol=1e-6) for name in trained)
    assert f"| small | {found['parameters'] / 1e6:.1f} |" in report.engine_overhead(report.load("engine_overhead"))
