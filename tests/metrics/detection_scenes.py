"""Random scenes for the detection metrics, and pycocotools' results on them."""

import contextlib
import io

import numpy as np

CLASSES = 5
SIZE = (120, 160)  # height, width


def random_scene(seed, count=30, objects=8, masks=False, ties=False, crowds=True, classes=CLASSES, size=SIZE):
    """A prediction and its reference: objects of all sizes, most detections near one of them.

    Every seventh image has no objects, every fifth no detections.
    """
    random = np.random.default_rng(seed)
    objects, count = (0 if seed % 7 == 3 else objects), (0 if seed % 5 == 2 else count)
    height, width = size
    low = random.uniform(0, 0.8, (objects, 2)) * (width, height)
    high = np.minimum(low + random.uniform(2, 110, (objects, 2)), (width, height))
    boxes, labels = np.concatenate([low, high], axis=1), random.integers(0, classes, objects)
    if objects:
        near = random.integers(0, objects, count)
        found = boxes[near] + random.normal(0, 3, (count, 4))
        found_labels = np.where(random.random(count) < 0.7, labels[near], random.integers(0, classes, count))
    else:
        found, found_labels = random.uniform(0, 100, (count, 4)), random.integers(0, classes, count)
    found = np.concatenate([np.minimum(found[:, :2], found[:, 2:]), np.maximum(found[:, :2], found[:, 2:])], axis=1)
    prediction = {"boxes": found, "scores": random.random(count), "labels": found_labels}
    reference = {"image_id": seed, "boxes": boxes, "labels": labels}
    if ties:
        prediction["scores"] = prediction["scores"].round(1)
    if crowds:
        reference["iscrowd"] = (random.random(objects) < 0.2).astype(int)
        reference["area"] = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) * random.uniform(0.3, 1.0, objects)
    if masks:
        prediction["masks"], reference["masks"] = (ellipses(b, size) for b in (found, boxes))
    return prediction, reference


def ellipses(boxes, size):
    """Masks (n, H, W) of the ellipses in boxes."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    centre = (boxes[:, :2] + boxes[:, 2:])[:, :, None, None] / 2
    radius = np.maximum(boxes[:, 2:] - boxes[:, :2], 1)[:, :, None, None] / 2
    return ((x - centre[:, 0]) / radius[:, 0]) ** 2 + ((y - centre[:, 1]) / radius[:, 1]) ** 2 <= 1


def xywh(boxes):
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1).tolist()


def annotation(record, i, iou_type):
    """COCO annotation or result of the i-th region."""
    from pycocotools import mask

    box = xywh(record["boxes"])[i]
    if iou_type == "bbox":
        return {"bbox": box, "area": box[2] * box[3]}
    code = mask.encode(np.asfortranarray(record["masks"][i], np.uint8))
    return {"segmentation": code, "area": float(mask.area(code)), "bbox": box}


def pycocotools_result(scenes, iou_type="bbox", limits=(1, 10, 100), classes=CLASSES):
    """Results of pycocotools on scenes, under our names."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    annotations, results = [], []
    for prediction, reference in scenes:
        image = reference["image_id"]
        for i, label in enumerate(np.asarray(reference["labels"]).tolist()):
            region = annotation(reference, i, iou_type)
            if "area" in reference:
                region["area"] = float(reference["area"][i])
            crowd = int(reference["iscrowd"][i]) if "iscrowd" in reference else 0
            annotations.append(
                {"id": len(annotations) + 1, "image_id": image, "category_id": label, "iscrowd": crowd, **region}
            )
        for i, (label, score) in enumerate(zip(prediction["labels"], prediction["scores"], strict=True)):
            region = annotation(prediction, i, iou_type)
            results.append({"image_id": image, "category_id": int(label), "score": float(score), **region})
            if iou_type == "segm":
                results[-1].pop("bbox")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            # It reads only height and width of run-length encodings and does not use them.
            "images": [{"id": reference["image_id"], "height": 1, "width": 1} for _, reference in scenes],
            "categories": [{"id": k} for k in range(classes)],
            "annotations": annotations,
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results) if results else COCO(), iou_type)
        evaluation.params.maxDets = list(limits)
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # (T, R, K, A, M), (T, K, A, M)

    def mean(values):
        return float(values[values > -1].mean()) if (values > -1).any() else float("nan")

    sizes = ("small", "medium", "large")
    return {
        "AP": mean(precision[..., 0, -1]),
        "AP50": mean(precision[0, ..., 0, -1]),
        "AP75": mean(precision[5, ..., 0, -1]),
        **{f"AP_{size}": mean(precision[..., a, -1]) for a, size in enumerate(sizes, 1)},
        **{f"AR{limit}": mean(recall[..., 0, m]) for m, limit in enumerate(limits)},
        **{f"AR_{size}": mean(recall[..., a, -1]) for a, size in enumerate(sizes, 1)},
        "per_class": {
            str(k): {"AP": mean(precision[:, :, k, 0, -1]), "AP50": mean(precision[0, :, k, 0, -1])}
            for k in range(classes)
        },
        "images": len(scenes),
    }
