"""The benchmark of attention methods measures every method, at a small size."""

from benchmarks import attention_methods, common
from hf_tfm.models.encoder_attention import METHODS


def test_every_method_is_measured(monkeypatch):
    written = {}
    monkeypatch.setattr(common, "write", lambda name, results: written.update({name: results}))
    monkeypatch.setattr(common, "in_fresh_process", lambda work, *args: work(*args))
    attention_methods.main(lengths=(80,), num_heads=2, head_dim=4, rounds=1)
    row = written["attention_methods"]["results"]["80 tokens"]
    assert set(row["forward, ms"]) == {"full", *METHODS} == set(row["memory, MB"])
    assert all(ratio > 0 for ratio in row["forward and backward, speedup"].values())
