"""The benchmark page matches the results files, and the benchmarks run."""

import json
import operator
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, peers, report, vision_peers, vision_training
from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
    TfmViTConfig,
    TfmViTForImageClassification,
)


def test_page_is_generated_from_the_results():
    assert report.README.read_text() == report.text()


@pytest.mark.parametrize("path", sorted(common.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_contain_their_command(path: Path):
    results = json.loads(path.read_text())
    assert results["command"].startswith("python -m benchmarks ")
    assert {"torch", "transformers", "hf-tfm"} <= results["versions"].keys()
    assert results["hardware"]


def test_variants_are_interleaved():
    order = []

    def work(name):
        return lambda number: order.append((name, number)) or 1

    rates = common.interleaved({"a": work("a"), "b": work("b")}, rounds=2)
    assert order == [("a", 0), ("b", 0), ("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert {name: len(values) for name, values in rates.items()} == {"a": 2, "b": 2}


def test_flops_count_every_linear_layer():
    config = TfmTransformerConfig.of_size("tiny", vocab_size=64, attn_implementation="eager")
    model = TfmTransformerForConditionalGeneration(config).eval()
    ids = torch.ones(1, 1, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, decoder_input_ids=ids)
    products = counter.get_flop_counts()["Global"]
    linear = sum(value for op, value in products.items() if "mm" in str(op) and "bmm" not in str(op))
    assert 3 * linear == peers.training_flops(config, 1, 1)


@pytest.mark.parametrize("masked", [False, True])
def test_vision_flops_count_every_product(masked):
    """For a small model, torch's own count of its forward pass, including patch embedding and head."""
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    if masked:
        decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24}
        config = TfmMAEConfig(**shape, **decoder, num_hidden_layers=2, decoder_num_hidden_layers=1)
        model = TfmMAEForPreTraining(config)
    else:
        config = TfmViTConfig(**shape, num_hidden_layers=2, num_labels=vision_peers.CLASSES)
        model = TfmViTForImageClassification(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.eval()(pixel_values=torch.zeros(1, 3, 32, 32))
    assert 3 * counter.get_total_flops() == vision_peers.training_flops(config, 16, masked)


def tiny_setting(kind: str) -> vision_training.Setting:
    return vision_training.Setting(kind, "tiny", image_size=32, batch_size=2, compile=False, mae_authors=None)


@pytest.mark.parametrize(
    ("kind", "names"), [("vit", ["ours", "transformers", "timm"]), ("mae", ["ours", "transformers"])]
)
def test_every_vision_variant_trains(kind, names):
    setting = tiny_setting(kind)
    assert list(setting.implementations()) == names
    for name in names:
        model, step = setting.prepare(name, setting.batch(), "no")
        before = [parameter.clone() for parameter in model.parameters() if parameter.requires_grad]
        step()
        after = [parameter for parameter in model.parameters() if parameter.requires_grad]
        assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True) if old.ndim > 1)
        assert all(parameter.isfinite().all() for parameter in after)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux alone tells how far a process grew")
@pytest.mark.slow
def test_memory_is_the_peak_growth_of_a_fresh_process():
    """In this process the allocation could reuse freed memory."""
    size = 256 * 2**20
    grown = common.in_fresh_process(common.peak_growth, partial(operator.mul, b"x", size))
    assert grown == pytest.approx(size / 1e6, rel=0.02)


def test_model_flops_utilization(monkeypatch):
    """4 images per second with 5 TFLOP each on a device with 40 TFLOP/s."""
    rates = {f"train {who} {p}": [3.0, 4.0, 5.0] for p in ("fp32", "bf16") for who in ("ours", "timm")}
    monkeypatch.setattr(common, "matmul_rate", lambda *_: 80e12)
    found = vision_training.report(rates, ("no", "bf16"), flops=5e12, peak=40e12)
    assert found["mfu"] == {"train ours bf16": 0.5, "train timm bf16": 0.5}
    assert found["share_of_floor"]["bf16"]["share"] == 0.25
    assert not vision_training.report(rates, ("bf16",), flops=5e12, peak=0.0)["mfu"]


@pytest.mark.parametrize(
    ("name", "peak"),
    [("NVIDIA H200", 989), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("Tesla T4", 0)],
)
def test_peak_rate_of_a_device(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert vision_training.data_sheet_tflops() == peak


def test_page_shows_memory_and_model_flops_utilization():
    model = {"images_per_second": {"train ours bf16": 4.0}, "ratios": {}, "share_of_floor": {}}
    results = {"batch_size": 8, "image_size": 224, "compile": False, "models": {"vit base": model}, "threads": 1}
    results |= {
        "command": "python",
        "versions": {"torch": "2", "transformers": "5"},
        "hardware": {"gpu": "NVIDIA H200"},
    }
    assert "MFU" not in report.vision(results) and "memory" not in report.vision(results)
    model |= {"mfu": {"train ours bf16": 0.456}, "peak_megabytes": {"train ours bf16": 12345}}
    page = report.vision(results)
    assert "| vit base | train ours bf16 | 46% |" in page and "| vit base | train ours bf16 | 12,345 |" in page
    assert "NVIDIA H200" in page
