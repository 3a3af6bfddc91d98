"""Shared helpers of the scene recipe tests: digit scenes on disk in several layouts, and short runs."""

import io
import json
import runpy
from pathlib import Path

from datasets import DatasetDict
from PIL import Image
from recipe_helpers import ROOT, fresh_state

from hf_tfm.data.digit_scenes import STUFF, THINGS, digit_scenes

SCENES = {"train": 14, "validation": 5, "test": 4}
# Random weights, so that nothing is downloaded; no dropout, because each process draws its own masks; and no batch
# norm, because it makes a step depend on micro-batching.
MODEL = (
    "backbone: test_resnet, backbone_norm: group, dilation: false, num_queries: 9, d_model: 32, encoder_layers: 1, "
    "decoder_layers: 2, encoder_ffn_dim: 32, decoder_ffn_dim: 32"
)


def scenes() -> DatasetDict:
    return digit_scenes(seed=1, size=64, **SCENES)


def png(value: dict | Image.Image) -> bytes:
    if isinstance(value, dict):
        return value["bytes"]
    file = io.BytesIO()
    value.save(file, "PNG")
    return file.getvalue()


def write_hub(folder: Path, splits: DatasetDict) -> Path:
    """Write parquet with the columns of Hub data sets, including panoptic maps and their categories."""
    folder.mkdir(parents=True)
    for split, rows in splits.items():
        rows.to_parquet(str(folder / f"{split}.parquet"))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Digit scenes\n")
    categories = [{"id": i, "name": name, "isthing": name not in STUFF} for i, name in enumerate(THINGS + STUFF)]
    (folder / "panoptic_categories.json").write_text(json.dumps(categories))
    return folder


def write_coco(folder: Path, splits: DatasetDict) -> Path:
    """Write COCO's layout; category ids have gaps."""
    for split, rows in splits.items():
        name = {"validation": "val"}.get(split, split) + "2017"
        (folder / name).mkdir(parents=True)
        images, annotations = [], []
        for number, row in enumerate(rows):
            (folder / name / f"{number:03}.png").write_bytes(png(row["image"]))
            images.append({"id": 5 * number, "file_name": f"{number:03}.png", "height": 64, "width": 64})
            for found in row["objects"]:
                category = {"category_id": 3 * found["category"] + 1, "image_id": 5 * number}
                shape = {"bbox": found["bbox"], "area": found["area"], "iscrowd": 0}
                annotations.append({"id": len(annotations), **category, **shape})
        categories = [{"id": 3 * i + 1, "name": thing} for i, thing in enumerate(THINGS)]
        file = folder / "annotations" / f"instances_{name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return folder


def write_voc(folder: Path, splits: DatasetDict) -> Path:
    """Write Pascal VOC's layout: pixel coordinates start at 1 and include the last pixel."""
    for name in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (folder / name).mkdir(parents=True)
    for split, rows in splits.items():
        stems = [f"{split}{number:03}" for number in range(len(rows))]
        (folder / "ImageSets" / "Main" / f"{split.removesuffix('idation')}.txt").write_text("\n".join(stems))
        for stem, row in zip(stems, rows, strict=True):
            (folder / "JPEGImages" / f"{stem}.png").write_bytes(png(row["image"]))
            objects = ""
            for found in row["objects"]:
                x, y, w, h = found["bbox"]
                sides = {"xmin": x + 1, "ymin": y + 1, "xmax": x + w, "ymax": y + h}
                box = "".join(f"<{side}>{value:.0f}</{side}>" for side, value in sides.items())
                objects += f"<object><name>{found['category']}</name><bndbox>{box}</bndbox></object>"
            size = "<size><width>64</width><height>64</height></size>"
            (folder / "Annotations" / f"{stem}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
    return folder


LAYOUTS = {"hub": write_hub, "coco": write_coco, "voc": write_voc}


def command_line(data: Path, output_dir: Path, **options) -> list[str]:
    """Command-line arguments of a short run; options that are None are omitted."""
    given = {
        "dataset_name": data,
        "output_dir": output_dir,
        "max_steps": 2,
        "warmup_steps": 1,
        "lr_scheduler_type": "cosine",
        "batch_size": 4,
        "learning_rate": 0.001,
        "shortest_side": 64,
        "longest_side": 96,
        "augmentation": "{scales: [56, 64, 72], max_size: 90, crop: 0.5, flip: 0.5}",
        "test_splits": "[test]",
        "progress": "false",
        "final_weights": "last",
        "num_pictures": 2,
        **({} if "model_name_or_path" in options else {"size": "tiny", "model": f"{{{MODEL}}}"}),
        **options,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def train(data: Path, output_dir: Path, recipe: str = "detection_train", **options) -> Path:
    """Run a recipe in this process; returns its folder."""
    fresh_state()
    assert (
        runpy.run_path(str(ROOT / "recipes" / f"{recipe}.py"))["main"](command_line(data, output_dir, **options)) == 0
    )
    return output_dir
