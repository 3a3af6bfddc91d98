"""The benchmark page says what the results files say, and the benchmarks run."""

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import common, peers, report, vision_training
from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
    TfmViTConfig,
    TfmViTForImageClassification,
)


def test_page_is_made_from_the_results():
    assert report.README.read_text() == report.text()


@pytest.mark.parametrize("path", sorted(common.RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_how_they_were_made(path: Path):
    results = json.loads(path.read_text())
    assert results["command"].startswith("python -m benchmarks ")
    assert {"torch", "transformers", "hf-tfm"} <= results["versions"].keys()
    assert results["hardware"]


def test_contestants_take_turns():
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
    """Of a small model, by torch's own count of its forward; the patch embedding and the head are in it."""
    shape = {"image_size": 32, "patch_size": 8, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 48}
    if masked:
        decoder = {"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 24}
        config = TfmMAEConfig(**shape, **decoder, num_hidden_layers=2, decoder_num_hidden_layers=1)
        model = TfmMAEForPreTraining(config)
    else:
        config = TfmViTConfig(**shape, num_hidden_layers=2, num_labels=vision_training.CLASSES)
        model = TfmViTForImageClassification(config)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model.eval()(pixel_values=torch.zeros(1, 3, 32, 32))
    assert 3 * counter.get_total_flops() == vision_training.training_flops(config, 16, masked)
