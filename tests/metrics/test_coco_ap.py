"""COCO average precision: against pycocotools, by hand, in batches, invalid input, loading by path."""

from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from detection_scenes import CLASSES, ellipses, pycocotools_result, random_scene
from safetensors.numpy import load, save

from hf_tfm.metrics import CocoAP, path

DATA = Path(__file__).parents[3] / "shared" / "data"
NAMES = [str(k) for k in range(CLASSES)]


@pytest.fixture
def pycocotools():
    return pytest.importorskip("pycocotools", reason="pycocotools, the judge of this test, is not installed")


def scored(scenes, batch=4, **options):
    metric = CocoAP(**{"class_names": NAMES, **options})
    for start in range(0, len(scenes), batch):
        predictions, references = zip(*scenes[start : start + batch], strict=True)
        metric.add_batch(predictions=predictions, references=references)
    return metric


def check_equal(found, expected):
    """Results agree to rounding; NaN equals NaN."""
    per_class, expected_classes = found.pop("per_class"), expected.pop("per_class")
    assert found == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert list(per_class) == list(expected_classes)
    for name, scores in per_class.items():
        assert scores == pytest.approx(expected_classes[name], abs=1e-12, nan_ok=True)


SCENES = {
    "plain": {"crowds": False},
    "crowds": {},
    "ties": {"ties": True, "count": 60},
    "one class, over the limit": {"classes": 1, "count": 130},
    "many classes": {"classes": 40, "count": 80},
    "large": {"size": (500, 600)},
    "nothing found": {"count": 0},
    "nothing there": {"objects": 0},
}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
@pytest.mark.parametrize("name", list(SCENES))
def test_boxes_match_pycocotools(pycocotools, name, seed):
    options = SCENES[name]
    scenes = [random_scene(100 * seed + i, **options) for i in range(12)]
    names = [str(k) for k in range(options.get("classes", CLASSES))]
    result = scored(scenes, class_names=names).compute()
    if name in ("plain", "crowds", "ties"):
        assert 0.05 < result["AP"] < 0.95
    check_equal(result, pycocotools_result(scenes, classes=len(names)))


@pytest.mark.parametrize("seed", range(4))
def test_masks_match_pycocotools(pycocotools, seed):
    scenes = [random_scene(100 * seed + i, masks=True, ties=seed % 2, crowds=seed > 1) for i in range(10)]
    result = scored(scenes, iou_type="segm").compute()
    assert 0.05 < result["AP"] < 0.95
    check_equal(result, pycocotools_result(scenes, "segm"))


@pytest.mark.parametrize("limits", [(1, 3, 7), (5,), (1, 10, 300)])
def test_other_limits_match_pycocotools(pycocotools, limits):
    scenes = [random_scene(i, classes=1, count=150, ties=True) for i in range(6)]
    result = scored(scenes, class_names=["0"], max_detections=limits).compute()
    check_equal(result, pycocotools_result(scenes, limits=limits, classes=1))


@pytest.mark.parametrize(("data", "split", "classes"), [("coco128", "train", 80), ("bccd", "test", 3)])
def test_real_boxes_match_pycocotools(pycocotools, data, split, classes):
    """Annotations of real images, with crowds; detections are the annotations with moved, dropped and added boxes."""
    file = DATA / data / f"{split}.parquet"
    if not file.is_file():
        pytest.skip(f"{file.parent.name} is not in ../shared/data")
    import pyarrow.parquet

    random, scenes = np.random.default_rng(0), []
    for row in pyarrow.parquet.read_table(file, columns=["image_id", "objects"]).to_pylist():
        objects = row["objects"]
        boxes = np.array([o["bbox"] for o in objects], np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = np.array([o["category"] for o in objects], np.int64)
        reference = {"image_id": row["image_id"], "boxes": boxes, "labels": labels}
        reference["area"] = [o["area"] for o in objects]
        reference["iscrowd"] = [int(o.get("iscrowd", False)) for o in objects]
        moved = boxes + random.normal(0, 0.05, boxes.shape) * np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        moved[:, 2:] = np.maximum(moved[:, 2:], moved[:, :2])
        kept = np.repeat(np.arange(len(boxes)), random.integers(0, 3, len(boxes)))
        prediction = {"boxes": moved[kept], "scores": random.random(len(kept)).astype(np.float32)}
        prediction["labels"] = np.where(random.random(len(kept)) < 0.8, labels[kept], random.integers(0, classes))
        scenes.append((prediction, reference))
    result = scored(scenes, class_names=[str(k) for k in range(classes)]).compute()
    assert 0.1 < result["AP"] < 0.9 and result["images"] == len(scenes)
    check_equal(result, pycocotools_result(scenes, classes=classes))


def test_real_masks_match_pycocotools(pycocotools):
    """Segments of real panoptic maps; detections are the map moved by some pixels."""
    file = DATA / "coco128" / "train.parquet"
    if not file.is_file():
        pytest.skip("coco128 is not in ../shared/data")
    import io

    import pyarrow.parquet
    from PIL import Image

    random, scenes = np.random.default_rng(0), []
    rows = pyarrow.parquet.read_table(file, columns=["image_id", "panoptic", "segments_info"]).slice(0, 12).to_pylist()
    for row in rows:
        if row["panoptic"] is None:
            continue
        pixels = np.asarray(Image.open(io.BytesIO(row["panoptic"]["bytes"])), np.int64) @ (1, 256, 65536)
        masks = np.stack([pixels == segment["id"] for segment in row["segments_info"]])
        labels = [segment["category_id"] % CLASSES for segment in row["segments_info"]]
        none = np.zeros((len(labels), 4))
        reference = {"image_id": row["image_id"], "masks": masks, "labels": labels, "boxes": none}
        reference["iscrowd"] = [int(segment["iscrowd"]) for segment in row["segments_info"]]
        moved = np.stack([np.roll(mask, random.integers(-6, 7, 2), (0, 1)) for mask in masks])
        scenes.append(
            ({"masks": moved, "labels": labels, "scores": random.random(len(labels)), "boxes": none}, reference)
        )
    assert len(scenes) >= 5
    result = scored(scenes, iou_type="segm").compute()
    assert 0.1 < result["AP"] < 0.9
    check_equal(result, pycocotools_result(scenes, "segm"))


def test_by_hand():
    """Two of three cats are found, the second-best detection is wrong; the dog is found with half of its area."""
    prediction = {
        "boxes": [[0, 0, 10, 10], [50, 50, 60, 60], [20, 0, 30, 10], [0, 40, 10, 48]],
        "scores": [0.9, 0.8, 0.7, 0.6],
        "labels": [0, 0, 0, 1],
    }
    reference = {
        "image_id": 1,
        "boxes": [[0, 0, 10, 10], [20, 0, 30, 10], [80, 0, 90, 10], [0, 40, 10, 50]],
        "labels": [0, 0, 0, 1],
    }
    result = CocoAP(class_names={0: "cat", 1: "dog", 2: "bird"}).compute(
        predictions=[prediction], references=[reference]
    )
    # Cats: precision 1 up to recall 1/3 (34 of the 101 points 0, 0.01, ...), 2/3 up to recall 2/3 (33 more), then 0.
    cat = (34 + 33 * 2 / 3) / 101
    # The dog's IoU of 0.8 passes the 7 thresholds from 0.5 to 0.8.
    assert result["per_class"]["cat"] == {"AP": pytest.approx(cat), "AP50": pytest.approx(cat)}
    assert result["per_class"]["dog"] == {"AP": pytest.approx(0.7), "AP50": 1.0}
    assert np.isnan(list(result["per_class"]["bird"].values())).all()
    assert result["AP"] == pytest.approx((cat + 0.7) / 2)
    assert result["AP50"] == result["AP75"] == pytest.approx((cat + 1) / 2)
    assert result["AR1"] == pytest.approx((1 / 3 + 0.7) / 2)
    assert result["AR100"] == result["AR_small"] == pytest.approx((2 / 3 + 0.7) / 2)
    assert np.isnan(result["AP_medium"]) and np.isnan(result["AR_large"])
    assert result["images"] == 1


def test_a_crowd_matches_any_number_of_detections():
    prediction = {"boxes": [[0, 0, 10, 10], [20, 20, 30, 30]], "scores": [0.9, 0.8], "labels": [0, 0]}
    crowd = {"image_id": 1, "boxes": [[0, 0, 50, 50], [60, 60, 70, 70]], "labels": [0, 0], "iscrowd": [True, False]}
    another = {"boxes": [[60, 60, 70, 70]], "scores": [0.1], "labels": [0]}
    both = {key: prediction[key] + another[key] for key in another}
    assert CocoAP().compute(predictions=[both], references=[crowd])["AP"] == 1.0
    alone = {**crowd, "iscrowd": [0, 0]}
    assert CocoAP().compute(predictions=[both], references=[alone])["AP"] < 0.5


def as_tensors(record):
    types = {"boxes": torch.float64, "scores": torch.float64, "area": torch.float64, "masks": torch.bool}
    return {
        key: torch.tensor([value]) if key == "image_id" else torch.as_tensor(value, dtype=types.get(key, torch.int64))
        for key, value in record.items()
    }


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_tensors_and_lists_give_the_same_result(iou_type):
    scenes = [random_scene(i, masks=True, objects=3, count=5, size=(20, 30)) for i in range(10)]
    listed = [
        tuple({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in r.items()} for r in scene)
        for scene in scenes
    ]
    tensors = [tuple(as_tensors(record) for record in scene) for scene in scenes]
    expected = scored(scenes, iou_type=iou_type).compute()
    for same in (listed, tensors):
        check_equal(scored(same, iou_type=iou_type).compute(), {**expected, "per_class": {**expected["per_class"]}})


def test_half_precision_is_accepted():
    prediction = {
        "boxes": torch.tensor([[0, 0, 8, 8.0]], dtype=torch.bfloat16),
        "scores": torch.tensor([0.5], dtype=torch.bfloat16, requires_grad=True),
        "labels": torch.tensor([2]),
    }
    reference = {"image_id": 4, "boxes": torch.tensor([[0, 0, 8, 8]]), "labels": torch.tensor([2])}
    result = CocoAP().compute(predictions=[prediction], references=[reference])
    assert result["AP"] == 1.0 and list(result["per_class"]) == ["2"]


def test_image_processor_output_is_accepted():
    from transformers import DetrImageProcessor
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput

    logits = torch.tensor([[[9.0, 0, 0], [0, 9, 0], [0, 0, 9]]]).repeat(2, 1, 1)
    boxes = torch.tensor([[[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.5, 0.5], [0.5, 0.5, 1, 1]]]).repeat(2, 1, 1)
    outputs = DetrObjectDetectionOutput(logits=logits, pred_boxes=boxes)
    found = DetrImageProcessor().post_process_object_detection(outputs, 0.0, target_sizes=[(100, 200), (40, 40)])
    references = [
        {"image_id": 1, "boxes": [[50, 25, 150, 75], [0, 0, 100, 50]], "labels": [0, 1]},
        {"image_id": 2, "boxes": [[10, 10, 30, 30], [0, 0, 20, 20]], "labels": [0, 1]},
    ]
    result = CocoAP(class_names=["a", "b"]).compute(predictions=found, references=references)
    assert result["AP"] == result["AR100"] == 1.0 and result["images"] == 2


@pytest.mark.parametrize("iou_type", ["bbox", "segm"])
def test_result_does_not_depend_on_order_batches_or_processes(iou_type):
    """Unequal shares, one of them empty, with repeated images: bit-equal to a single metric."""
    scenes = [random_scene(i, masks=True, ties=True, objects=4, count=12, size=(40, 50)) for i in range(17)]
    whole = scored(scenes, iou_type=iou_type).compute()
    assert repr(scored(scenes[::-1], batch=3, iou_type=iou_type).compute()) == repr(whole)
    shares = [scored(part, iou_type=iou_type) for part in (scenes[9:] + scenes[:2], [], scenes[:5], scenes[4:9])]
    assert [len(share.images) for share in shares] == [10, 0, 5, 5]
    states = [share.state() for share in shares]
    for share in shares:
        share.merge(load(save(state)) for state in states)
        assert repr(share.compute()) == repr(whole)


def test_merging_twice_changes_nothing():
    scenes = [random_scene(i) for i in range(6)]
    metric, other = scored(scenes[:4]), scored(scenes[2:])
    for _ in range(2):
        metric.merge([other.state(), metric.state()])
    assert repr(metric.compute()) == repr(scored(scenes).compute())


def test_a_repeated_image_counts_once():
    scenes = [random_scene(i) for i in range(4)]
    assert repr(scored([*scenes, scenes[0], scenes[3]], batch=5).compute()) == repr(scored(scenes).compute())


def test_one_id_for_two_images_is_refused():
    prediction, reference = random_scene(1)
    other = {**random_scene(4)[1], "image_id": 1}
    metric = CocoAP(class_names=NAMES)
    with pytest.raises(ValueError, match="image_id 1 belongs to two references with different objects"):
        metric.add_batch(predictions=[prediction] * 2, references=[reference, other])
    assert not metric.images  # the batch was rejected as a whole
    metric.add(prediction=prediction, reference=reference)
    with pytest.raises(ValueError, match="image_id 1 belongs to two references"):
        metric.add(prediction=prediction, reference=other)
    with pytest.raises(ValueError, match="image_id 1 belongs to two references"):
        metric.merge([scored([(prediction, other)]).state()])


@pytest.mark.parametrize("options", [{"iou_type": "segm"}, {"max_detections": (1, 10)}, {"class_names": None}])
def test_states_with_other_options_are_refused(options):
    metric = CocoAP(class_names=NAMES)
    with pytest.raises(ValueError, match="states must be of CocoAP with the same options"):
        metric.merge([CocoAP(**{"class_names": NAMES, **options}).state()])


def test_state_size_does_not_depend_on_mask_size():
    def kept(size):
        boxes = np.array([[2.0, 2, 20, 20], [5, 5, 30, 30]])
        prediction = {"masks": ellipses(boxes, size), "labels": [0, 1], "scores": [0.5, 0.6]}
        metric = CocoAP(iou_type="segm")
        metric.add(prediction=prediction, reference={"image_id": 0, "masks": prediction["masks"], "labels": [0, 1]})
        return metric.state()

    small, large = kept((40, 40)), kept((400, 400))
    assert all((small[name] == large[name]).all() for name in small)
    sizes = {table: sum(v.nbytes for k, v in small.items() if k.startswith(table)) for table in ("objects", "det")}
    assert sizes == {"objects": 2 * 16, "det": 2 * 30}  # as documented in the class


def test_loaded_by_path():
    prediction, reference = random_scene(1)
    loaded = evaluate.load(path("coco_ap"), class_names=NAMES, max_detections=(1, 10))
    loaded.add(prediction=prediction, reference=reference)
    assert repr(loaded.compute()) == repr(scored([(prediction, reference)], max_detections=(1, 10)).compute())
    with pytest.raises(ValueError, match="nothing was added"):  # the metric was reset
        loaded.compute()


def test_metrics_do_not_share_samples():
    first, second = CocoAP(), CocoAP()
    first.add(prediction=random_scene(1)[0], reference=random_scene(1)[1])
    assert first.images and not second.images
