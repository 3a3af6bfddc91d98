"""Objects that a detector finds twice: dropped in scores and pictures, kept by conversion, told in the card."""

import pytest
import torch
from transformers import DeformableDetrImageProcessor, DetrImageProcessor
from transformers.utils import ModelOutput

from hf_tfm import TfmDeformableDetrConfig, TfmDetrConfig
from hf_tfm.conversion.deformable_detr import to_deformable_detr
from hf_tfm.hub.detectors import detections
from hf_tfm.hub.usage import usage
from hf_tfm.tasks.object_detection import DetectionArguments

# Queries 0 and 1 are the same object, query 2 is of another class, query 3 elsewhere.
BOXES = torch.tensor([[[0.5, 0.5, 0.4, 0.4], [0.51, 0.5, 0.4, 0.4], [0.5, 0.5, 0.4, 0.4], [0.2, 0.2, 0.1, 0.1]]])
LOGITS = torch.tensor([[[2.0, -9.0], [3.0, -9.0], [-9.0, 1.0], [0.5, -9.0]]])
BATCH = {"labels": [{"orig_size": torch.tensor([100, 200])}]}


@pytest.mark.parametrize(("threshold", "count"), [(None, 4), (0.99, 4), (0.7, 3)])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_the_better_of_two_detections_stays(kind, threshold, count):
    nothing = torch.zeros(1, 4, 1)
    logits, processor = LOGITS, DeformableDetrImageProcessor()
    if kind == "softmax":
        logits, processor = torch.cat([LOGITS, nothing], dim=-1), DetrImageProcessor()
    config = TfmDeformableDetrConfig(nms_threshold=threshold, num_labels=2)
    (found,) = detections(config, processor, ModelOutput(logits=logits, pred_boxes=BOXES), BATCH)
    good = found["scores"] > 0.1
    assert good.sum() == count
    expected = [0.5, 0.51] if count == 4 else [0.51]
    left = found["boxes"][good & (found["labels"] == 0) & (found["boxes"][:, 2] > 100)][:, 0]
    assert torch.allclose(left.sort().values, torch.tensor([200 * (centre - 0.2) for centre in expected]), atol=1e-3)


def test_conversion_carries_the_threshold():
    assert to_deformable_detr(TfmDeformableDetrConfig(nms_threshold=0.7)).nms_threshold == 0.7


def test_a_saved_detector_gets_the_threshold_of_a_preset():
    assert "nms_threshold" in DetectionArguments.data_fields


def test_the_card_shows_how_to_drop_them():
    config = TfmDetrConfig(nms_threshold=0.7).to_dict() | {"architectures": ["TfmDetrForObjectDetection"]}
    assert "batched_nms(" in usage(config, "x")
    assert "batched_nms(" not in usage({**config, "nms_threshold": None}, "x")
