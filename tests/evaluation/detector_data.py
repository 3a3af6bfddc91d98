"""Shared helpers of the detector evaluation tests: random detectors, their detections, and data sets.

Detections are computed one image at a time. The data sets are derived from them, so that scores are neither 0 nor 1.
"""

import io
import json
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from PIL import Image
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    AutoModelForUniversalSegmentation,
    DetrConfig,
    DetrForObjectDetection,
    DetrForSegmentation,
    DetrImageProcessor,
    TimmBackboneConfig,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)
from transformers.utils import ModelOutput

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation

NAMES = ["apple", "boat", "cow", "dune", "elm"]
THINGS = [0, 1, 2]
SIZES = [(48, 64), (64, 48), (50, 50), (60, 80), (64, 64), (33, 44)]  # height, width; multiples of 32 after resizing
EDGES = {"shortest_edge": 96, "longest_edge": 144}
LABELS = {"id2label": dict(enumerate(NAMES)), "label2id": {name: i for i, name in enumerate(NAMES)}}
TINY = {
    **{"num_queries": 9, "d_model": 32, "encoder_layers": 1, "decoder_layers": 2},
    **{"encoder_attention_heads": 8, "decoder_attention_heads": 4, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
}
# A dict in some transformers versions and an object in others; from_dict reads both.
NATIVE = {
    **TINY,
    "use_timm_backbone": False,
    "backbone_config": TimmBackboneConfig(backbone="test_resnet", out_indices=[1, 2, 3, 4]),
}
YOLOS = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32},
    **{"image_size": [96, 144], "patch_size": 16, "num_detection_tokens": 9, "use_mid_position_embeddings": False},
}
DETECTORS = {
    "tfm": (TfmDetrForObjectDetection, TfmDetrConfig, {**TINY, "backbone": "test_resnet"}),
    "detr": (DetrForObjectDetection, DetrConfig, NATIVE),
    "yolos": (YolosForObjectDetection, YolosConfig, YOLOS),
}
PANOPTIC = {
    "tfm_panoptic": (TfmDetrForPanopticSegmentation, TfmDetrConfig, {**DETECTORS["tfm"][2], "thing_ids": THINGS}),
    "detr_panoptic": (DetrForSegmentation, DetrConfig, NATIVE),
}


@torch.no_grad()
def save_detector(folder: Path, kind: str, **fields) -> str:
    """Save a detector with random weights and confident predictions, with its processor."""
    model_class, config, sizes = {**DETECTORS, **PANOPTIC}[kind]
    torch.manual_seed(0)
    model = model_class(config(**{**sizes, **LABELS, **fields}))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            sharp = name.endswith(
                ("q_proj", "k_proj", "query", "key")
            )  # queries that attend elsewhere find other objects
            module.weight.normal_(std=(4 if sharp else 1) * module.weight[0].numel() ** -0.5)
    for name, parameter in model.named_parameters():
        if "query_position" in name or "detection_tokens" in name:
            parameter.normal_(std=2.0)
    processor = YolosImageProcessor(size=EDGES) if kind == "yolos" else DetrImageProcessor(size=EDGES)
    level_heads(model.eval(), processor)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def level_heads(model: nn.Module, processor: DetrImageProcessor) -> None:
    """Shift and scale the head outputs so that queries differ in class and position and half of them are confident."""
    seen = [model(processor(images=photo, return_tensors="pt")["pixel_values"]) for photo in photos()]
    heads = {module.out_features: module for module in model.modules() if isinstance(module, nn.Linear)}
    for head, values, width in (
        (heads[len(NAMES) + 1], torch.cat([o.logits[0] for o in seen]), 4.0),
        (heads[4], torch.cat([o.pred_boxes[0] for o in seen]).logit(), 1.0),
    ):
        middle, spread = values.mean(dim=0), values.std(dim=0).clamp_min(1e-3)
        head.bias.copy_((head.bias - middle) * width / spread)
        head.weight.mul_(width / spread[:, None])
    for head in (m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == 1):  # mask logits
        masks = torch.cat([o.pred_masks.flatten() for o in seen])
        head.bias.copy_((head.bias - masks.mean()) * 6.0 / masks.std())
        head.weight.mul_(6.0 / masks.std())


def photos() -> list[Image.Image]:
    draw = np.random.RandomState(0)
    small = [draw.randint(0, 256, (6, 7, 3), dtype=np.uint8) for _ in SIZES]
    return [
        Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
        for pixels, (height, width) in zip(small, SIZES, strict=True)
    ]


@torch.inference_mode()
def found_by_hand(model: str, together: bool = False) -> tuple[list[dict], list[dict] | None]:
    """Expected detections, computed with transformers only: boxes of all queries and, with masks, panoptic maps.

    Args:
        together: run all images as one padded batch. Padding affects the convolutions next to it, and so the
            detections of a random model.
    """
    config = json.loads((Path(model) / "config.json").read_text())
    masks = "Segmentation" in config["architectures"][0]
    auto = AutoModelForUniversalSegmentation if masks else AutoModelForObjectDetection
    loaded, processor = auto.from_pretrained(model).eval(), AutoImageProcessor.from_pretrained(model)
    boxes, maps = [], [] if masks else None
    for batch in [photos()] if together else [[photo] for photo in photos()]:
        inputs = processor(images=batch, return_tensors="pt")
        output = loaded(**inputs) if together else loaded(pixel_values=inputs["pixel_values"])
        sizes = [(photo.height, photo.width) for photo in batch]
        boxes += processor.post_process_object_detection(output, threshold=-1.0, target_sizes=sizes)
        for i in range(len(batch) * masks):
            height, width = (inputs["pixel_mask"][i].any(dim=dim).sum() // 4 for dim in (1, 0))  # no masks
            own = {"logits": output.logits[i : i + 1], "pred_masks": output.pred_masks[i : i + 1, :, :height, :width]}
            maps += processor.post_process_panoptic_segmentation(
                ModelOutput(own), threshold=0.85, label_ids_to_fuse=set(), target_sizes=sizes[i : i + 1]
            )
    return boxes, maps


def encoded(image: Image.Image) -> dict:
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


def objects_in(boxes: list[dict], names: list[str] = NAMES) -> tuple[list[list[dict]], list[dict]]:
    """Three of the boxes found in each image, slightly moved, as rows of a data set and as `CocoAP` references."""
    rows, references = [], []
    for number, (found, (height, width)) in enumerate(zip(boxes, SIZES, strict=True)):
        objects = []
        for query in range(3):
            left, top, right, bottom = (found["boxes"][query] + query).tolist()
            left, right = (min(max(x, 0.0), width) for x in (left, right))
            top, bottom = (min(max(y, 0.0), height) for y in (top, bottom))
            if right - left > 2 and bottom - top > 2:
                label = found["labels"][query].item()
                objects.append({"bbox": [left, top, right - left, bottom - top], "category": label})
        rows.append(objects)
        corners = [[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in objects)]
        labels = [o["category"] for o in objects]
        boxes_of_image = np.array(corners, np.float32).reshape(-1, 4)
        references.append({"image_id": number, "boxes": boxes_of_image, "labels": np.array(labels, np.int64)})
    return rows, references


def write_objects(folder: Path, rows: list[list[dict]], names: list[str] = NAMES, bad: tuple[int, ...] = ()) -> str:
    """Write a data set with one split, test; images in ``bad`` are unreadable."""
    features = Features(
        {
            "image": datasets.Image(),
            "width": Value("int32"),
            "height": Value("int32"),
            "objects": List({"bbox": List(Value("float32"), length=4), "category": ClassLabel(names=names)}),
        }
    )
    images = [{"bytes": b"none", "path": None} if i in bad else encoded(photo) for i, photo in enumerate(photos())]
    table = [
        {"image": image, "width": width, "height": height, "objects": objects}
        for image, (height, width), objects in zip(images, SIZES, rows, strict=True)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(table, features).to_parquet(folder / "test.parquet")
    return str(folder)


def segments_in(maps: list[dict]) -> list[dict]:
    """The predicted maps moved by two pixels, as `PanopticQuality` references; category ids are classes + 10."""
    references = []
    for number, found in enumerate(maps):
        ids = np.roll(found["segmentation"].numpy().astype(np.int64), 2, axis=1).clip(0)
        there = [s for s in found["segments_info"] if (ids == s["id"]).any()]
        info = [{"id": s["id"], "category_id": s["label_id"], "iscrowd": 0} for s in there]
        references.append({"image_id": number, "segmentation": ids, "segments_info": info})
    return references


def write_panoptic(folder: Path, references: list[dict]) -> str:
    """Write a data set with one split, test, and its categories file."""
    segment = {"id": Value("int64"), "category_id": Value("int64"), "iscrowd": Value("int64")}
    features = {"image": datasets.Image(), "panoptic": datasets.Image(), "segments_info": List(segment)}
    table = []
    for photo, reference in zip(photos(), references, strict=True):
        ids = reference["segmentation"]
        colours = np.stack([ids % 256, ids // 256 % 256, ids // 65536], axis=-1).astype(np.uint8)
        info = [{**s, "category_id": s["category_id"] + 10} for s in reference["segments_info"]]
        panoptic = encoded(Image.fromarray(colours))
        table.append({"image": encoded(photo), "panoptic": panoptic, "segments_info": info})
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(table, Features(features)).to_parquet(folder / "test.parquet")
    categories = [{"id": i + 10, "name": name, "isthing": i in THINGS} for i, name in enumerate(NAMES)]
    (folder / "panoptic_categories.json").write_text(json.dumps(categories))
    return str(folder)
