"""bf16 on a CPU without bf16 instructions is emulated, and the run warns before it starts."""

import pytest
from training_helpers import arguments, fresh_accelerator

from hf_tfm.training import run


@pytest.mark.parametrize(
    ("precision", "fast", "warns"), [("bf16", False, True), ("bf16", True, False), ("no", False, False)]
)
def test_emulated_bf16_warns(precision, fast, warns, monkeypatch, capsys):
    monkeypatch.setattr(run, "has_fast_bf16", lambda: fast)
    fresh_accelerator(arguments(".", mixed_precision=precision))
    assert ('mixed_precision="bf16" is emulated on this CPU' in capsys.readouterr().out) is warns


def test_bf16_support_is_read_from_the_cpu_flags(tmp_path, monkeypatch):
    known = {"flags : fpu avx2": False, "flags : fpu avx512_bf16": True, "Features : asimd bf16": True}
    for flags, expected in known.items():
        (tmp_path / "cpuinfo").write_text(flags)
        monkeypatch.setattr(run, "CPU_FLAGS", tmp_path / "cpuinfo")
        assert run.has_fast_bf16() is expected
    monkeypatch.setattr(run, "CPU_FLAGS", tmp_path / "none")
    assert run.has_fast_bf16()
