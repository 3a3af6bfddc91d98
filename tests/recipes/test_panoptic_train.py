"""The panoptic recipe: boxes, then masks on the frozen detector, or both jointly; the saved model segments images."""

import json

import pytest
import torch
from PIL import Image
from recipe_helpers import record
from safetensors.torch import load_file
from scene_recipes import png, scenes, train, write_hub
from transformers import AutoImageProcessor, AutoModelForObjectDetection, AutoModelForUniversalSegmentation, pipeline

MODEL = (
    "{backbone: test_resnet, dilation: false, num_queries: 9, d_model: 32, encoder_layers: 1, decoder_layers: 2, "
    "encoder_ffn_dim: 32, decoder_ffn_dim: 32}"
)


@pytest.fixture(scope="module")
def splits():
    return scenes()


@pytest.fixture(scope="module")
def data(splits, tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("data") / "hub", splits)


@pytest.fixture(scope="module")
def boxes(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("runs") / "boxes", "panoptic_train", stage="boxes", model=MODEL)


@pytest.fixture(scope="module")
def joint(data, tmp_path_factory):
    return train(data, tmp_path_factory.mktemp("runs") / "joint", "panoptic_train", model=MODEL)


def names(folder) -> set[str]:
    return {metric["name"] for metric in record(folder).metrics}


def test_boxes_of_things_and_stuff(boxes):
    assert isinstance(AutoModelForObjectDetection.from_pretrained(boxes, trust_remote_code=True), torch.nn.Module)
    config = json.loads((boxes / "config.json").read_text())
    assert len(config["id2label"]) == 13 and config["thing_ids"] == list(range(10))
    assert "AP" in names(boxes) and "PQ" not in names(boxes)
    assert record(boxes).task == "object-detection"


def test_masks_train_on_a_frozen_detector(boxes, data, tmp_path):
    run = train(data, tmp_path / "masks", "panoptic_train", stage="masks", model_name_or_path=boxes)
    before, after = (load_file(folder / "model.safetensors") for folder in (boxes, run))
    assert all(torch.equal(value, after[f"detr.{name}"]) for name, value in before.items())
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    assert {"mask", "dice", "PQ"} <= history[-1]["evaluation"].keys()
    assert "PQ" in names(run) and record(run).task == "image-segmentation"


def test_joint_training(joint, splits):
    assert {"AP", "PQ", "SQ", "RQ", "PQ_th", "PQ_st"} <= names(joint)
    model = AutoModelForUniversalSegmentation.from_pretrained(joint, trust_remote_code=True).eval()
    processor = AutoImageProcessor.from_pretrained(joint)
    image = splits["test"][0]["image"]
    output = model(**processor(images=image, return_tensors="pt"))
    (found,) = processor.post_process_panoptic_segmentation(
        output, threshold=0.0, label_ids_to_fuse=set(), target_sizes=[(64, 64)]
    )
    assert found["segmentation"].shape == (64, 64)
    assert output.pred_masks.shape == (1, 9, 16, 16)
    # Semantic: each pixel gets the class with the largest sum of mask probabilities over its queries.
    (classes,) = processor.post_process_semantic_segmentation(output, target_sizes=[(64, 64)])
    votes = torch.einsum("qc,qhw->chw", output.logits[0].softmax(-1)[:, :-1], output.pred_masks[0].sigmoid())
    enlarged = torch.nn.functional.interpolate(votes[None], size=(64, 64), mode="bilinear", align_corners=False)
    assert torch.equal(classes, enlarged[0].argmax(0))
    (things,) = processor.post_process_instance_segmentation(output, threshold=0.0, target_sizes=[(64, 64)])
    assert things["segmentation"].shape == (64, 64)
    assert {segment["label_id"] for segment in things["segments_info"]} <= set(range(13))


@pytest.mark.parametrize("subtask", ["panoptic", "instance", "semantic"])
def test_pipeline_runs(joint, splits, subtask, tmp_path):
    (tmp_path / "scene.png").write_bytes(png(splits["test"][0]["image"]))
    segment = pipeline("image-segmentation", model=str(joint), trust_remote_code=True)
    found = segment(str(tmp_path / "scene.png"), subtask=subtask, threshold=0.0)
    assert all(isinstance(segment["mask"], Image.Image) and segment["mask"].size == (64, 64) for segment in found)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stage": "masks"}, 'stage "masks" needs model_name_or_path'),
        (
            {"stage": "boxes", "metric_for_best_model": "PQ"},
            'metric_for_best_model must be one of loss, AP, AP50, got "PQ"',
        ),
        ({"model": "{d_model: 36, encoder_attention_heads: 4, decoder_attention_heads: 4}"}, "multiple of 16"),
    ],
)
def test_incompatible_options_are_refused(options, message, data, tmp_path, capsys):
    with pytest.raises((SystemExit, ValueError)) as error:
        train(data, tmp_path / "run", "panoptic_train", **{"model": MODEL, **options})
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_data_without_panoptic_maps_is_refused(splits, tmp_path):
    plain = write_hub(tmp_path / "plain", type(splits)({k: v.remove_columns("panoptic") for k, v in splits.items()}))
    with pytest.raises(ValueError, match='panoptic_column "panoptic" is not a column of the data set; it has image'):
        train(plain, tmp_path / "run", "panoptic_train", model=MODEL)
