"""Train DETR for panoptic segmentation (Carion et al. 2020, arXiv:2005.12872, section 4.4): boxes first, then masks.

    hf-tfm run panoptic_train --config quickstart                       a few minutes on 2 CPU cores
    hf-tfm run panoptic_train --config coco_boxes --dataset_name COCO        boxes of things and stuff
    hf-tfm run panoptic_train --config coco_masks --dataset_name COCO --model_name_or_path runs/coco-panoptic-boxes
    accelerate launch recipes/panoptic_train.py --config coco_boxes     as many GPUs as the launcher finds

The data set must have panoptic maps and their segments, in COCO's folders or in columns ``panoptic`` and
``segments_info``, and state which categories are things. Presets with their cost and expected results:
recipes/presets/panoptic_train/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from transformers import PreTrainedModel

from hf_tfm import TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation
from hf_tfm.command import run_recipe
from hf_tfm.data.files import data_roots
from hf_tfm.data.panoptic import panoptic_categories, panoptic_rows
from hf_tfm.data.source import load_splits, take_split
from hf_tfm.tasks.splits import split_rows
from hf_tfm.training.run import Run, recipe_main
from hf_tfm.training.scene_run import SceneRunArguments, build_detr, train_scenes


@dataclass(kw_only=True)
class PanopticArguments(SceneRunArguments):
    """Knobs of panoptic segmentation.

    Args:
        stage: "boxes" trains a detector of things and stuff, "masks" the mask head alone on the detector of
            model_name_or_path, "joint" both at once.
        panoptic_column: PNGs whose colours are segment ids, R + 256 G + 65536 B.
        segments_column: list of the segments of each.

    The others are those of `SceneRunArguments`.
    """

    stage: Literal["boxes", "masks", "joint"] = "joint"
    panoptic_column: str = "panoptic"
    segments_column: str = "segments_info"

    def __post_init__(self):
        super().__post_init__()
        scores = ("loss", "AP", "AP50") if self.stage == "boxes" else ("loss", "AP", "AP50", "PQ")
        if self.metric_for_best_model not in scores:
            raise ValueError(
                f'metric_for_best_model must be one of {", ".join(scores)}, got "{self.metric_for_best_model}"'
            )
        if self.stage == "masks" and not self.model_name_or_path:
            raise ValueError(
                'stage "masks" needs model_name_or_path, a detector trained with stage "boxes" or "joint"'
            )


def work(args: PanopticArguments, run: Run) -> int:
    """A whole run; the exit status."""
    splits = load_splits(args.dataset_name, args.dataset_config, args.dataset_revision, args.data_files)
    categories = panoptic_categories(args.dataset_name, args.dataset_revision)
    roots = data_roots(args.dataset_name, args.data_files)

    def rows_of(name: str, argument: str):
        rows = take_split(splits, name, argument)
        return panoptic_rows(rows, categories, args.image_column, args.panoptic_column, args.segments_column, roots)

    def build(fields: dict[str, Any]) -> PreTrainedModel:
        fields["thing_ids"] = [i for i, category in enumerate(categories) if category.isthing]
        if args.stage == "boxes":
            return build_detr(TfmDetrForObjectDetection, args, fields)
        model = build_detr(TfmDetrForPanopticSegmentation, args, fields)
        if args.stage == "masks":
            model.freeze_detector()
        return model

    rows = split_rows(args, args.test_splits, rows_of)
    return train_scenes(args, run, rows, build, masks=args.stage != "boxes")


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(PanopticArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
