"""Invalid input and options of the detection and panoptic segmentation metrics, and their error messages."""

import numpy as np
import pytest

from hf_tfm.metrics import CocoAP, PanopticQuality

NAMES = [f"class {k}" for k in range(6)]


DETECTIONS = {"boxes": [[0, 0, 5, 5]], "scores": [0.5], "labels": [1]}
OBJECTS = {"image_id": 1, "boxes": [[0, 0, 5, 5]], "labels": [1]}


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({"boxes": [0, 0, 5, 5]}, {}, r'predictions\[0\]\["boxes"\] must have shape \(1, 4\).* got \(4,\)'),
        ({"boxes": [[0, 0, 5]]}, {}, r"must have shape \(1, 4\), one box per label, got \(1, 3\)"),
        ({"boxes": [[0, 0, 5, 5]] * 2}, {}, r"must have shape \(1, 4\), one box per label, got \(2, 4\)"),
        ({"boxes": [[0, 0, 5, 5], [1]]}, {}, "must be a regular array of numbers"),
        ({"boxes": [[5, 0, 0, 5]]}, {}, r"x1 <= x2 and y1 <= y2, got \[5.0, 0.0, 0.0, 5.0\]"),
        ({}, {"boxes": [[0, 5, 5, 0]]}, r'references\[0\]\["boxes"\] must be x1, y1, x2, y2'),
        ({"boxes": [[0, 0, float("nan"), 5]]}, {}, "must be finite, got nan"),
        ({"scores": [float("inf")]}, {}, r'predictions\[0\]\["scores"\] must be finite, got inf'),
        ({"scores": [0.5, 0.5]}, {}, r"must have shape \(1,\), got \(2,\)"),
        ({"scores": None}, {}, r'predictions\[0\] needs "scores"; it has boxes, scores, labels'),
        ({"labels": [3]}, {}, r'predictions\[0\]\["labels"\] must be between 0 and 2, got 3'),
        ({}, {"labels": [-1]}, r'references\[0\]\["labels"\] must be between 0 and 2, got -1'),
        ({"labels": [1.0]}, {}, "must hold integers, got float64"),
        ({"labels": ["cat"]}, {}, "must be a regular array of numbers"),
        ({}, {"image_id": None}, r'references\[0\] needs "image_id"'),
        ({}, {"image_id": "000042"}, 'must be an integer, got "000042"'),
        ({}, {"image_id": 1.5}, "must hold integers"),
        ({}, {"iscrowd": [2]}, "must be between 0 and 1, got 2"),
        ({}, {"area": [1.0, 2.0]}, r'references\[0\]\["area"\] must have shape \(1,\)'),
    ],
)
def test_invalid_detections_are_refused(prediction, reference, message):
    metric = CocoAP(class_names=["a", "b", "c"])
    with pytest.raises(ValueError, match=message):
        metric.add(prediction={**DETECTIONS, **prediction}, reference={**OBJECTS, **reference})
    assert not metric.images


@pytest.mark.parametrize(
    ("masks", "message"),
    [
        (np.ones((1, 4, 4), bool), r'predictions\[0\]\["masks"\] must be \(4, 5\) pixels.* got \(4, 4\)'),
        (np.ones((4, 5), bool), r"must have shape \(1, H, W\), one mask per label, got \(4, 5\)"),
        (np.ones((2, 4, 5), bool), r"must have shape \(1, H, W\), one mask per label, got \(2, 4, 5\)"),
        (np.full((1, 4, 5), 0.5), "must be bool, or 0 and 1"),
        (None, 'needs "masks"'),
    ],
)
def test_invalid_masks_are_refused(masks, message):
    reference = {"image_id": 1, "masks": np.ones((1, 4, 5), bool), "labels": [0]}
    with pytest.raises(ValueError, match=message):
        CocoAP(iou_type="segm").add(prediction={"masks": masks, "scores": [1], "labels": [0]}, reference=reference)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "predictions is empty and nothing was added"),
        ({"predictions": [], "references": []}, "predictions is empty and nothing was added"),
        ({"predictions": [DETECTIONS], "references": []}, "must have equal lengths, got 1 and 0"),
        ({"predictions": DETECTIONS, "references": [OBJECTS]}, "must be a list of dictionaries, got dict"),
        ({"predictions": [DETECTIONS], "references": [[1]]}, r"references\[0\] must be a dictionary, got list"),
        ({"predictions": [DETECTIONS]}, "references must be a list of dictionaries, got NoneType"),
        ({"iou_type": "segm"}, r"iou_type: give options to CocoAP\(...\)"),
    ],
)
def test_invalid_calls_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CocoAP().compute(**arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iou_type": "keypoints"}, 'iou_type must be "bbox" or "segm", got "keypoints"'),
        ({"max_detections": (10, 1)}, "max_detections must be ascending"),
        ({"max_detections": (0, 1)}, "max_detections must be ascending"),
        ({"class_names": ["a", "a"]}, "class_names must be distinct, got a more than once"),
        ({"class_names": {1: "a"}}, r"class_names must be of the classes 0 to 0, got \[1\]"),
        ({"class_names": []}, "class_names must be a list of names"),
        ({"iou": "bbox"}, "iou: not an option of CocoAP"),
        ({"num_process": 2, "experiment_id": "a"}, "num_process must be 1, got 2"),
    ],
)
def test_invalid_options_of_coco_ap_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CocoAP(**options)


SEGMENTS = {"segmentation": [[0, 1], [2, 2]], "segments_info": [{"id": 1, "label_id": 0}, {"id": 2, "label_id": 1}]}
TRUTH = {"image_id": 1, "segmentation": [[4, 4], [4, 4]], "segments_info": [{"id": 4, "category_id": 1}]}


@pytest.mark.parametrize(
    ("prediction", "reference", "message"),
    [
        ({"segmentation": [[0, 1], [2, 3]]}, {}, r'predictions\[0\]\["segmentation"\] has the id 3, which'),
        ({"segmentation": [[0, 1], [2, 255]]}, {}, 'has the id 255, which "segments_info" does not list'),
        ({}, {"segmentation": [[4, 4], [-2, 4]]}, r'references\[0\]\["segmentation"\] has the id -2'),
        ({"segmentation": [[0, 1, 2]]}, {}, r"must be \(2, 2\) pixels as the reference's, got \(1, 3\)"),
        ({"segmentation": [0, 1, 2]}, {}, r"must have shape \(H, W\), got \(3,\)"),
        ({"segmentation": [[0.5, 1], [2, 2]]}, {}, "must hold integers, got 0.5"),
        ({"segmentation": [[float("nan"), 1], [2, 2]]}, {}, "must hold integers, got nan"),
        ({"segmentation": None}, {}, r'predictions\[0\] needs "segmentation"'),
        ({"segments_info": None}, {}, r'predictions\[0\] needs "segments_info"'),
        ({"segments_info": [{"id": 1}]}, {}, r'\["segments_info"\]\[0\] needs "label_id"; it has id'),
        ({"segments_info": [1]}, {}, r'predictions\[0\]\["segments_info"\]\[0\] must be a dictionary, got int'),
        (
            {"segments_info": [{"id": 2, "label_id": 1}, {"id": 1, "label_id": 0}, {"id": 2, "label_id": 2}]},
            {},
            "gives id 2 to segments of the classes 1 and 2",
        ),
        ({"segments_info": [{"id": 1, "label_id": 6}]}, {}, "label_id must be between 0 and 5, got 6"),
        ({}, {"segments_info": [{"id": 4, "category_id": 1, "iscrowd": 3}]}, "iscrowd must be between 0 and 1, got 3"),
        ({}, {"image_id": None}, r'references\[0\] needs "image_id"'),
    ],
)
def test_invalid_segments_are_refused(prediction, reference, message):
    metric = PanopticQuality(class_names=NAMES)
    with pytest.raises(ValueError, match=message):
        metric.add(prediction={**SEGMENTS, **prediction}, reference={**TRUTH, **reference})
    assert not metric.images


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thing_ids": [6]}, "thing_ids must be between 0 and 5, got 6"),
        ({"thing_ids": ["cat"]}, "thing_ids must be a regular array of numbers"),
        ({"things": [1]}, "things: not an option of PanopticQuality"),
    ],
)
def test_invalid_options_of_panoptic_quality_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PanopticQuality(**{"class_names": NAMES, **options})
