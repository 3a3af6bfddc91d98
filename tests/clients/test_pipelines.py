"""transformers' pipelines support every class, and batching does not change results."""

import json
import logging

import numpy as np
import pytest
import torch
from every_class import tiny
from PIL import Image
from torch import nn
from transformers import (
    DetrImageProcessor,
    ViTImageProcessor,
    pipeline,
)
from transformers.pipelines import PIPELINE_REGISTRY
from words import TEXTS, tokenizer

MASKED = ["w1 [MASK] w3 w4", "w5 [MASK]", "w7 w8 [MASK] w10 w11 w12", "[MASK]"]
CASES = [
    ("text-classification", "bert", TEXTS, {"top_k": None}),
    ("text-classification", "gpt-classifier", TEXTS, {"top_k": None}),
    ("token-classification", "bert-tagger", TEXTS, {}),
    ("fill-mask", "bert-masked", MASKED, {"top_k": 3}),
    ("feature-extraction", "bert-base", TEXTS, {}),
    ("feature-extraction", "gpt-base", TEXTS, {}),
    ("text-generation", "gpt", TEXTS, {"max_new_tokens": 5, "do_sample": False}),
    ("image-classification", "vit", None, {}),
    ("image-classification", "vit-mean", None, {}),
    ("image-feature-extraction", "vit-base", None, {}),
    ("image-classification", "swin", None, {}),
    ("image-feature-extraction", "swin-AutoModel", None, {}),
    ("object-detection", "detr", None, {"threshold": 0.0}),
    ("image-segmentation", "detr-panoptic", None, {"subtask": "semantic"}),
    ("image-segmentation", "detr-panoptic", None, {"subtask": "panoptic", "threshold": 0.0}),
]
IDS = [f"{task}-{name}-{options.get('subtask', '')}" for task, name, _, options in CASES]


def images() -> list[Image.Image]:
    """Square images of 16 pixels in random colors."""
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 255, (4, 4, 4, 3), dtype=np.uint8)
    return [Image.fromarray(each.repeat(16, axis=0).repeat(16, axis=1)) for each in colours]


def plain(found):
    """Results as nested lists of numbers and strings."""
    if isinstance(found, Image.Image):
        return np.asarray(found).tolist()
    if isinstance(found, torch.Tensor | np.ndarray | np.generic):
        return found.tolist()
    if isinstance(found, dict):
        return {key: plain(value) for key, value in found.items()}
    return [plain(value) for value in found] if isinstance(found, list | tuple) else found


def assert_close(found, expected, path="") -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected:
            if key == "mask":  # a pixel on an edge may differ
                assert np.mean(np.asarray(found[key]) != np.asarray(expected[key])) < 0.01, path
            else:
                assert_close(found[key], expected[key], f"{path}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for i, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, f"{path}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), path
    else:
        assert found == expected, path


@pytest.mark.client("pipelines: batches", "transformers")
@pytest.mark.parametrize(("task", "name", "texts", "options"), CASES, ids=IDS)
def test_batching_does_not_change_results(task, name, texts, options, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = tiny(name)
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.out_features in (3, 4, 48):
            nn.init.normal_(module.weight)  # makes scores distinct
    if task in ("image-classification", "image-feature-extraction"):
        size = {"height": 16, "width": 16}
        kit = {"image_processor": ViTImageProcessor(size=size)}
    elif name.startswith("detr"):
        kit = {"image_processor": DetrImageProcessor(size={"height": 64, "width": 64})}
    else:
        kit = {"tokenizer": tokenizer("left" if task == "text-generation" else "right")}
    run = pipeline(task, model=model, device="cpu", **kit)
    given = images() if texts is None else texts
    alone = [plain(run(each, **options)) for each in given]
    found = [plain(each) for each in run(given, batch_size=2, **options)]
    if task == "feature-extraction":  # padded rows are included
        found = [[each[0][: len(own[0])]] for each, own in zip(found, alone, strict=True)]
    assert_close(found, alone)
    assert name == "detr-panoptic" or json.dumps(alone[0]) != json.dumps(alone[1])
    assert "not supported" not in caplog.text and "is not initialized" not in caplog.text


@pytest.mark.client("pipelines: batches", "transformers", family="mae")
def test_features_of_a_masked_autoencoder():
    """It masks at random, so a batch cannot be compared with its members."""
    kit = {"device": "cpu", "image_processor": ViTImageProcessor(size={"height": 16, "width": 16})}
    run = pipeline("image-feature-extraction", model=tiny("mae-base"), **kit)
    shapes = {np.asarray(found).shape for found in run(images(), batch_size=2)}
    assert len(shapes) == 1 and shapes.pop()[2] == 16


@pytest.mark.client("pipelines: batches", "transformers", family="transformer")
def test_encoder_decoder_has_no_pipeline():
    assert not {"translation", "text2text-generation", "summarization"} & set(PIPELINE_REGISTRY.get_supported_tasks())
    pytest.skip("transformers 5 has no pipeline for text encoder-decoders")
