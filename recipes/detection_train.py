"""Train DETR to detect objects (Carion et al. 2020, arXiv:2005.12872).

    hf-tfm run detection_train --config quickstart                        a few minutes on 2 CPU cores
    hf-tfm run detection_train --config bccd --dataset DATA --output_dir runs/bccd
    hf-tfm run detection_train --config finetune_small --dataset DATA --init_from MODEL
    accelerate launch recipes/detection_train.py --config r50_300         as many GPUs as the launcher finds

DATA is a folder in COCO's or Pascal VOC's layout, or whatever `load_dataset` reads with a column of objects. Presets
with their cost and expected numbers: recipes/presets/detection_train/.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoImageProcessor, set_seed

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection
from hf_tfm.data.detection import scene_rows
from hf_tfm.data.source import load_splits, take_split
from hf_tfm.tasks.detection import score
from hf_tfm.training import train
from hf_tfm.training.arguments import parse_arguments
from hf_tfm.training.image_run import new_config, split_rows
from hf_tfm.training.run import finish, open_run, start_accelerator
from hf_tfm.training.scene_run import (
    SceneRunArguments,
    describe,
    labels_of,
    load_detr,
    new_processor,
    scene_loader,
    scene_task,
    score_rows,
)


@dataclass(kw_only=True)
class DetectionArguments(SceneRunArguments):
    """Knobs of detection.

    Args:
        objects_column: list of objects with a box and a category; default, the only column with boxes.

    The others are those of `SceneRunArguments`.
    """

    objects_column: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.best_metric not in ("loss", "AP", "AP50"):
            raise ValueError(f'best_metric must be "loss", "AP" or "AP50", got "{self.best_metric}"')


def load_rows(args: DetectionArguments) -> dict:
    """Rows of `scene_rows` by the name of their split."""
    splits = load_splits(args.dataset, args.dataset_name, args.dataset_revision, args.data_files)

    def rows_of(name: str, argument: str):
        return scene_rows(take_split(splits, name, argument), args.image_column, args.objects_column)[0]

    return split_rows(args, args.test_splits, rows_of)


def build_model(args: DetectionArguments, labels: dict) -> TfmDetrForObjectDetection:
    """The model to train, with weights drawn from the seed or taken from ``init_from``."""
    set_seed(args.seed)
    if args.init_from:
        return load_detr(TfmDetrForObjectDetection, args, labels)
    model = TfmDetrForObjectDetection(new_config(TfmDetrConfig, args, **labels))
    if args.pretrained_backbone:
        model.model.backbone.load_pretrained()
    return model


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(DetectionArguments, Path(__file__), argv)
    accelerator = start_accelerator(args)
    rows = load_rows(args)
    run = open_run(accelerator, args, "object-detection", describe(args, rows), Path(__file__).stem, argv)
    processor = run.once("processor", lambda: new_processor(args), AutoImageProcessor.from_pretrained)
    model = build_model(args, labels_of(rows[args.train_split]))
    tasks = {split: scene_task(args, model, processor, part) for split, part in rows.items()}
    task = tasks[args.train_split]
    learning = scene_loader(args, accelerator, task, rows[args.train_split], learning=True)
    held_out = {
        split: scene_loader(args, accelerator, tasks[split], rows[split], learning=False)
        for split in (args.held_out, *args.test_splits)
    }
    per_epoch = learning.steps_per_epoch()
    num_steps = args.num_steps or math.ceil(args.num_epochs * per_epoch)
    settled, line = args.settle(per_epoch)
    accelerator.print(line)

    def score_validation(trained) -> dict[str, float]:
        found = score(accelerator, tasks[args.held_out], trained, held_out[args.held_out])
        return {name: found[name] for name in ("loss", "class", "box", "giou", "AP", "AP50")}

    eval_steps = args.eval_steps or per_epoch
    result = train(accelerator, task, model, learning, settled, num_steps, eval_steps, score_validation)
    if result.stopped:
        return run.stopped(result)
    metrics = []
    for split, loader in held_out.items():
        metrics += score_rows(score(accelerator, tasks[split], model, loader), split)
    finish(run, model.eval(), processor, task, result, metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
