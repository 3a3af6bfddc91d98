"""Train DETR to detect objects (Carion et al. 2020, arXiv:2005.12872).

    hf-tfm run detection_train --config quickstart                        about a minute on 2 CPU cores
    hf-tfm run detection_train --config digits                            from random weights
    hf-tfm run detection_train --config bccd --dataset_name DATA               starts from the previous run
    hf-tfm run detection_train --config finetune_small --dataset_name DATA --model_name_or_path MODEL
    accelerate launch recipes/detection_train.py --config r50_300         as many GPUs as the launcher finds

DATA is a folder in COCO's or Pascal VOC's layout, or any data set with a column of objects. Presets with their cost
and expected results: recipes/presets/detection_train/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_tfm import TfmDetrForObjectDetection
from hf_tfm.command import run_recipe
from hf_tfm.data.box_checks import BoxFormat
from hf_tfm.data.detection import scene_rows
from hf_tfm.data.files import data_roots
from hf_tfm.data.source import load_splits, take_split
from hf_tfm.tasks.splits import split_rows
from hf_tfm.training.run import Run, recipe_main
from hf_tfm.training.scene_run import SceneRunArguments, build_detr, train_scenes


@dataclass(kw_only=True)
class DetectionArguments(SceneRunArguments):
    """Knobs of detection.

    Args:
        objects_column: list of objects with a box and a category; default, the only column with boxes.
        box_format: what four numbers stand for: xywh (left, top, width, height), xyxy (left, top, right, bottom) or
            cxcywh (centre, width, height).
        relative_boxes: they are shares of the image instead of pixels.

    The others are those of `SceneRunArguments`.
    """

    objects_column: str | None = None
    box_format: Literal["xywh", "xyxy", "cxcywh"] = "xywh"
    relative_boxes: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.metric_for_best_model not in ("loss", "AP", "AP50"):
            raise ValueError(
                f'metric_for_best_model must be "loss", "AP" or "AP50", got "{self.metric_for_best_model}"'
            )


def load_rows(args: DetectionArguments) -> dict:
    """Rows of `scene_rows` by the name of their split."""
    splits = load_splits(args.dataset_name, args.dataset_config, args.dataset_revision, args.data_files)
    roots = data_roots(args.dataset_name, args.data_files)

    def rows_of(name: str, argument: str):
        rows, boxes = take_split(splits, name, argument), BoxFormat(args.box_format, args.relative_boxes)
        return scene_rows(rows, args.image_column, args.objects_column, box_format=boxes, roots=roots)[0]

    return split_rows(args, args.test_splits, rows_of)


def work(args: DetectionArguments, run: Run) -> int:
    """A whole run; the exit status."""

    def build(fields: dict[str, Any]) -> TfmDetrForObjectDetection:
        return build_detr(TfmDetrForObjectDetection, args, fields)

    return train_scenes(args, run, load_rows(args), build)


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(DetectionArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
