"""Score a detector, with or without masks, on any split of any data set.

row -> image -> the model's own processor -> model -> boxes and segments in the original's pixels -> COCO AP and PQ
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import datasets
import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import BaseImageProcessor
from transformers.utils import ModelOutput

from ..data.box_checks import BoxFormat
from ..data.detection import category_ids, class_names, fingerprint, scene_rows
from ..data.files import data_roots
from ..data.panoptic import PANOPTIC, SEGMENTS, panoptic_categories, panoptic_rows
from ..data.scenes import require_scenes
from ..data.shape_batches import ShapeSampler
from ..data.source import load_splits, take_split
from ..hub.detectors import classes, detections, has_masks, load_detector, panoptic_maps, predict, takes_mask
from ..limits import LIMITS
from ..metrics import CocoAP, PanopticQuality
from ..tasks.images import Batch
from ..values import checked
from .detectors import WholeScenes
from .reading import EvaluationLoader, Stopwatch, first, one_process
from .results import check_options, describe, metric, write

LOWEST_SCORE = 0.05  # of a detection in the file of predictions

AP_SCORES = (
    *("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large"),
    *("AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"),
)
PQ_SCORES = ("PQ", "SQ", "RQ", "PQ_th", "SQ_th", "RQ_th", "PQ_st", "SQ_st", "RQ_st")


@checked(**LIMITS)
def evaluate_detection(
    model: str,
    dataset_name: str,
    split: str = "test",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
    image_column: str | None = None,
    objects_column: str | None = None,
    box_format: Literal["xywh", "xyxy", "cxcywh"] = "xywh",
    relative_boxes: bool = False,
    panoptic_column: str = PANOPTIC,
    segments_column: str = SEGMENTS,
    match_labels: Literal["name", "number"] = "name",
    segments: bool | None = None,
    max_samples: int | None = None,
    max_bad_images: int = 10,
    batch_size: int = 8,
    dataloader_num_workers: int = 0,
    mixed_precision: str = "no",
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Find the objects in the images of a split and score them; with segments, every pixel.

    Args:
        model: folder or Hub id of a detector, ours or any other, with its image processor.
        dataset_name: what `datasets.load_dataset` takes, a folder in COCO's or Pascal VOC's layout, or one of
            `DIGIT_SCENES`.
        split: of the data set.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch of the data set on the Hub.
        data_files: files by split, where dataset_name is a format such as "parquet".
        image_column: images, their bytes or paths; default, the only column of images.
        objects_column: list of objects with a box and a category; default, the only column with boxes.
        box_format: what four numbers of a box stand for: xywh (left, top, width, height), xyxy (left, top, right,
            bottom) or cxcywh (centre, width, height).
        relative_boxes: they are shares of the image instead of pixels.
        panoptic_column: PNGs whose colours are segment ids; segments_column: list of the segments of each.
        match_labels: categories are the model's classes of the same name, or of the same number. A model without
            names, LABEL_0 and so on, is matched by number.
        segments: score panoptic maps too, for which the data set has columns panoptic and segments_info and says which
            categories are things; boxes are then those of all segments, as in training. Default, where the model has
            masks.
        max_samples: score only the first rows.
        max_bad_images: images that cannot be read are reported and left out, up to so many.
        batch_size: images in a batch.
        dataloader_num_workers: processes that read images.
        mixed_precision: no (float32) or bf16 autocast.
        revision: commit, tag or branch of the model on the Hub.
        trust_remote_code: run the code a Hub repository brings; our own models need none where hf_tfm is installed.
        output: also write the result, with detections of a score from 0.05 on, to this JSON file.
        progress: show a progress bar.

    Returns:
        ``metrics``, rows of name, value, split and signature, see `AP_SCORES` and `PQ_SCORES`; scores of which the
        split has no object are left out; ``per_class``, {class: {score: value}}; ``images`` that were scored,
        ``left_out`` how many could not be read; ``throughput``, see `Stopwatch`; model, dataset_name and versions.

    Raises:
        ValueError: split, column or option is not known, categories and classes do not match, a number is too small,
            or ``segments`` is asked of a model without masks.
        FileNotFoundError: the folder of ``output`` does not exist.
    """
    counts = {"max_samples": max_samples, "batch_size": batch_size, "dataloader_num_workers": dataloader_num_workers}
    check_options(mixed_precision, output, max_bad_images=max_bad_images, **counts)
    accelerator = one_process()
    loaded, processor = load_detector(model, revision, trust_remote_code)
    segments = has_masks(loaded.config) if segments is None else segments
    if segments and not has_masks(loaded.config):
        raise ValueError(f'segments needs a model with masks, and "{model}" is a {type(loaded).__name__}')
    rows = take_split(load_splits(dataset_name, dataset_config, dataset_revision, data_files), split, "split")
    roots = data_roots(dataset_name, data_files)
    if segments:
        categories = panoptic_categories(dataset_name, dataset_revision)
        rows = panoptic_rows(rows, categories, image_column, panoptic_column, segments_column, roots)
    else:
        boxes = BoxFormat(box_format, relative_boxes)
        rows, _ = scene_rows(rows, image_column, objects_column, box_format=boxes, roots=roots)
    rows = first(rows, max_samples)
    require_scenes({split: rows}, max_bad_images)
    names = classes(loaded.config)
    matched, ids = match_categories(rows, names, match_labels)
    things = [i for i, category in zip(ids, categories, strict=True) if category.isthing] if segments else None
    loaded = loaded.to(accelerator.device)
    task = WholeScenes(processor, ids, segments, takes_mask(loaded) or batch_size == 1)
    sampler = ShapeSampler(np.stack([rows["height"], rows["width"]], axis=1), batch_size)
    on_gpu = accelerator.device.type == "cuda"
    loader = EvaluationLoader(
        rows, task, batch_size, dataloader_num_workers, max_bad_images, on_gpu, progress, sampler
    )
    bf16 = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed_precision == "bf16")
    found = Scores(names, things)
    with Stopwatch(loaded) as watch, bf16:
        for batch in (batch for step in loader.epoch(0) for batch in step if batch["images"]):
            found.add(predict(loaded, send_to_device(batch, accelerator.device)), processor, batch)
    whole, per_class, count = found.compute()
    rows_of_scores = [metric(name, value, split) for name, value in whole.items()]
    result = {
        **describe(model, dataset_name, split, rows, rows_of_scores, fingerprint),
        "per_class": per_class,
        "images": count,
        "left_out": {"unreadable": len(loader.bad)},
        "match_labels": matched,
        "mixed_precision": mixed_precision,
        "throughput": watch.throughput(count),
    }
    if output:
        write({**result, "unreadable": loader.bad, "predictions": found.predictions}, output)
    return result


def match_categories(rows: datasets.Dataset, names: Sequence[str], match_labels: str) -> tuple[str, list[int]]:
    """From categories of rows to classes of a model; and whether by name or number.

    Args:
        names: of the model's classes.
        match_labels: "name" or "number".

    Raises:
        ValueError: a category is no class of the model.
    """
    if match_labels == "name" and list(names) != [f"LABEL_{i}" for i in range(len(names))]:
        return "name", category_ids(rows, names)
    if len(own := class_names(rows)) > len(names):
        raise ValueError(
            f"the data set has {len(own)} categories and the model {len(names)} classes: matched by number, it can "
            "have no more"
        )
    return "number", list(range(len(own)))


class Scores:
    """Average precision and, where it is told which classes are things, panoptic quality; and what was found.

    Args:
        names: of the model's classes.
        things: numbers of those that are things; None scores no segments.
    """

    def __init__(self, names: Sequence[str], things: Sequence[int] | None):
        self.names = names
        self.boxes = CocoAP(class_names=names)
        self.segments = None if things is None else PanopticQuality(class_names=names, thing_ids=things)
        self.predictions: list[dict[str, Any]] = []

    def add(self, output: ModelOutput, processor: BaseImageProcessor, batch: Batch) -> None:
        """Add a model's output for a batch of `WholeScenes`."""
        found = detections(processor, output, batch)
        self.boxes.add_batch(predictions=found, references=batch["references"])
        if self.segments is not None:
            maps = panoptic_maps(processor, output, batch)
            self.segments.add_batch(predictions=maps, references=batch["references"])
        for reference, objects in zip(batch["references"], found, strict=True):
            self.predictions.append({"image_id": reference["image_id"], "objects": self.listed(objects)})

    def listed(self, found: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """The objects of an image in COCO's form, the best first."""
        scores, order = found["scores"].sort(descending=True)
        order = order[scores >= LOWEST_SCORE]
        corners = found["boxes"][order]
        boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1)
        columns = (found["labels"][order].tolist(), boxes.tolist(), scores[: len(order)].tolist())
        return [
            {"category": self.names[label], "bbox": [round(side, 2) for side in box], "score": round(score, 5)}
            for label, box, score in zip(*columns, strict=True)
        ]

    def compute(self) -> tuple[dict[str, float], dict[str, dict[str, float]], int]:
        """The scores of all classes, those of each, and the number of images; scores that are NaN are left out."""
        found = [metric.compute() for metric in (self.boxes, self.segments) if metric is not None]
        per_class = {
            name: scores
            for name in self.names
            if (scores := known({key: v for part in found for key, v in part["per_class"][name].items()}))
        }
        whole = {name: value for part in found for name, value in part.items() if name in (*AP_SCORES, *PQ_SCORES)}
        return known(whole), per_class, found[0]["images"]


def known(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores without those that are NaN."""
    return {name: value for name, value in scores.items() if not np.isnan(value)}
