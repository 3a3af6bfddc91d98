"""Average precision of detections: time and memory against pycocotools and torchmetrics.

python -m benchmarks detection_evaluation   (pip install .[bench]; missing packages are skipped)

  ours                           CocoAP, batch by batch
  pycocotools                    results collected as COCO's dictionaries, COCOeval at the end
  torchmetrics                   MeanAveragePrecision, batch by batch, with pycocotools, without scores per class
  torchmetrics, faster backend   the same with faster-coco-eval, which ours also uses

torchmetrics is given COCO's thresholds: its own are in single precision, which changes AP where a recall or an IoU
equals a threshold.

Every implementation runs in a separate process, on the same boxes: tensors of random scenes, with as many objects as
in COCO images and a fixed number of detections. Measured are the CPU time of one thread from the first batch to the
scores, and the growth of the process's memory above inputs and libraries.
"""

import contextlib
import io
import statistics
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec

import torch

from hf_tfm.metrics import CocoAP
from hf_tfm.metrics.coco_matching import IOU_THRESHOLDS, RECALL_THRESHOLDS

from . import common

CLASSES, OBJECTS = 80, 7  # COCO has 7.3 objects per image (Lin et al. 2014, section 5)
WIDTH, HEIGHT = 640, 480
Scene = tuple[dict, dict]


def scene(image: int, detections: int) -> Scene:
    """A prediction and its reference: a third of the detections are near an object and have its class."""
    random = torch.Generator().manual_seed(image)
    size = torch.tensor([WIDTH, HEIGHT])
    extent = torch.rand(OBJECTS, 2, generator=random).square() * size * 0.8 + 4
    low = torch.rand(OBJECTS, 2, generator=random) * (size - extent)
    boxes, labels = torch.cat([low, low + extent], dim=1), torch.randint(CLASSES, (OBJECTS,), generator=random)
    near = torch.randint(OBJECTS, (detections,), generator=random)
    noise = 0.08 * torch.randn(detections, 4, generator=random) * extent[near].repeat(1, 2)
    first, second = (boxes[near] + noise).split(2, dim=1)
    right = torch.rand(detections, generator=random) < 1 / 3
    prediction = {
        "boxes": torch.cat([first.minimum(second), first.maximum(second)], dim=1),
        "scores": torch.rand(detections, generator=random),
        "labels": torch.where(right, labels[near], torch.randint(CLASSES, (detections,), generator=random)),
    }
    return prediction, {"image_id": image, "boxes": boxes, "labels": labels}


def batches(scenes: list[Scene], size: int = 8) -> Iterator[tuple[list[dict], list[dict]]]:
    """Predictions and references in batches of images."""
    for start in range(0, len(scenes), size):
        predictions, references = zip(*scenes[start : start + size], strict=True)
        yield list(predictions), list(references)


def ours(scenes: list[Scene]) -> float:
    metric = CocoAP(class_names=[str(k) for k in range(CLASSES)])
    for predictions, references in batches(scenes):
        metric.add_batch(predictions=predictions, references=references)
    return metric.compute()["AP"]


def xywh(boxes: torch.Tensor) -> list[list[float]]:
    """Boxes as in COCO, in double precision as in the other variants."""
    boxes = boxes.double()
    return torch.cat([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], dim=1).tolist()


def pycocotools(scenes: list[Scene]) -> float:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results, annotations = [], []
    for predictions, references in batches(scenes):
        for prediction, reference in zip(predictions, references, strict=True):
            image = reference["image_id"]
            columns = (xywh(prediction["boxes"]), prediction["scores"].tolist(), prediction["labels"].tolist())
            for box, score, label in zip(*columns, strict=True):
                results.append({"image_id": image, "category_id": label, "bbox": box, "score": score})
            for box, label in zip(xywh(reference["boxes"]), reference["labels"].tolist(), strict=True):
                about = {"id": len(annotations) + 1, "image_id": image, "category_id": label, "iscrowd": 0}
                annotations.append({**about, "bbox": box, "area": box[2] * box[3]})
    truth = COCO()
    truth.dataset = {
        "images": [{"id": reference["image_id"]} for _, reference in scenes],
        "categories": [{"id": k} for k in range(CLASSES)],
        "annotations": annotations,
    }
    truth.createIndex()
    evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return float(evaluation.stats[0])


def torchmetrics(scenes: list[Scene], backend: str = "pycocotools") -> float:
    from torchmetrics.detection import MeanAveragePrecision

    thresholds = {"iou_thresholds": IOU_THRESHOLDS.tolist(), "rec_thresholds": RECALL_THRESHOLDS.tolist()}
    metric = MeanAveragePrecision(backend=backend, **thresholds)
    for predictions, references in batches(scenes):
        metric.update(predictions, references)
    return float(metric.compute()["map"])


def torchmetrics_faster(scenes: list[Scene]) -> float:
    return torchmetrics(scenes, "faster_coco_eval")


LIBRARIES = ("pycocotools", "torchmetrics", "faster-coco-eval")
IMPLEMENTATIONS: dict[str, Callable[[list[Scene]], float]] = {
    "ours": ours,
    "pycocotools": pycocotools,
    "torchmetrics": torchmetrics,
    "torchmetrics, faster backend": torchmetrics_faster,
}


def measure(name: str, images: int, detections: int) -> tuple[float, float, float]:
    """AP, CPU seconds, and the growth of memory in MB, of one variant in this process."""
    torch.set_num_threads(1)
    score, found = IMPLEMENTATIONS[name], {}
    scenes = [scene(image, detections) for image in range(images)]

    def work() -> None:
        start = time.process_time()
        found["ap"] = score(scenes)
        found["seconds"] = time.process_time() - start

    with contextlib.redirect_stdout(io.StringIO()):
        score(scenes[:16])  # buffers allocated on first use are not counted
        megabytes = common.peak_growth(work)
    return found["ap"], found["seconds"], megabytes


def main(images: int = 5000, detections: int = 100, rounds: int = 1) -> None:
    """Measure and write benchmarks/results/detection_evaluation.json.

    Args:
        images: number of images.
        detections: predicted boxes per image.
        rounds: runs of each implementation, interleaved.
    """
    torch.set_num_threads(1)
    there = [name for name in LIBRARIES if find_spec(name.replace("-", "_"))]
    missing = set(LIBRARIES) - set(there)
    names = [name for name in IMPLEMENTATIONS if not missing & set(name.split(", "))]
    runs: dict[str, list[tuple[float, float, float]]] = {name: [] for name in names}
    for _ in range(rounds):
        for name, found in runs.items():
            found.append(common.in_fresh_process(measure, name, images, detections))
    ap = {name: found[0][0] for name, found in runs.items()}
    common.write(
        "detection_evaluation",
        {
            "images": images,
            "detections": detections,
            "objects": OBJECTS,
            "ap": ap,
            "max_abs_ap_difference": max(abs(value - ap["ours"]) for value in ap.values()),
            "seconds": {name: round(statistics.median(r[1] for r in found), 1) for name, found in runs.items()},
            "megabytes": {name: round(max(r[2] for r in found), 1) for name, found in runs.items()},
            "libraries": {name: version(name) for name in there},
        },
    )
