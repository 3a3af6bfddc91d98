"""Distil an image classifier into a smaller Vision Transformer: soft or hard targets, inner layers, DeiT's token.

    hf-tfm run image_classification_train --config quickstart                     the teacher, about 1 minute
    hf-tfm run distill_vision --config quickstart                                 seconds on 2 CPU cores
    hf-tfm run distill_vision --config cifar10_small --dataset_name DATA --teacher TEACHER
    accelerate launch recipes/distill_vision.py --config deit_base                as many GPUs as the launcher finds

The teacher is any image classifier that transformers loads, including timm's. --cache DIR --write_cache true writes
the teacher's activations and exits; --cache DIR alone reads them, without the teacher in memory. Presets with their
cost and expected results: recipes/presets/distill_vision/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageClassification, set_seed

from hf_tfm import TfmViTConfig, TfmViTForImageClassification
from hf_tfm.command import run_recipe
from hf_tfm.data.images import label_names
from hf_tfm.distillation.student import Distilled
from hf_tfm.memory import new_model
from hf_tfm.tasks.classification import predict, score
from hf_tfm.tasks.model_fields import check_fields, new_config
from hf_tfm.training.distill_cache import Yardstick, table_of_costs, wrote_cache
from hf_tfm.training.distill_images import DistillImageArguments, settle, shared_processor
from hf_tfm.training.distill_run import begin_with_layers, check_teacher, learn, prepare
from hf_tfm.training.image_run import (
    IMAGE_FIELDS,
    LabelledImageArguments,
    describe,
    image_loader,
    image_size_of,
    label_fields,
    label_tasks,
    load_classifier,
    load_rows,
)
from hf_tfm.training.run import Run, finish, recipe_main

CLASSIFIER = AutoModelForImageClassification


@dataclass(kw_only=True)
class DistillVisionArguments(DistillImageArguments, LabelledImageArguments):
    """Knobs of distilling a classifier of images: those of `DistillImageArguments` and `LabelledImageArguments`.

    The teacher sees the mixed images; what it says of them is not smoothed.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.cache and self.mixing.on:
            raise ValueError("cache keeps one view of each image in an epoch: turn mixing off")
        check_fields(TfmViTConfig, self.model, IMAGE_FIELDS)


def build_student(
    args: DistillVisionArguments, size: int | tuple[int, int], names: list[str]
) -> TfmViTForImageClassification:
    """A new student, or that of ``model_name_or_path``, for images of a size and classes of these names."""
    set_seed(args.seed)
    if args.model_name_or_path:
        return load_classifier(args.model_name_or_path, names, size, **args.model)
    return new_model(
        TfmViTForImageClassification, new_config(TfmViTConfig, args, image_size=size, **label_fields(names))
    )


def work(args: DistillVisionArguments, run: Run) -> int:
    """A whole run; the exit status."""
    accelerator = run.accelerator
    processor = shared_processor(args)
    rows = load_rows(args, args.test_splits, labelled=True)
    data, names = describe(args, rows), label_names(rows[args.train_split])
    run.open(args, "image-classification", data, args.held_out)
    tasks = label_tasks(args, processor, rows, names)
    task = tasks[args.train_split]
    student = build_student(args, image_size_of(processor), names)
    begin_with_layers(args, student)
    lessons = prepare(args, accelerator, task, student, CLASSIFIER)

    def loader_of(split: str, task: Any, learning: bool = False) -> Any:
        unit = 2 if learning and args.mixing.on else 1
        return image_loader(args, accelerator, task, rows[split], learning, unit)

    learning = loader_of(args.train_split, lessons.task, learning=True)
    scored = {split: loader_of(split, lessons.compared(tasks[split])) for split in (args.held_out, *args.test_splits)}
    validation = scored[args.held_out]

    def scores_of(model: Any) -> dict[str, float]:
        found = predict(accelerator, task, model, validation)
        return {"loss": found.loss, **{row["name"]: row["value"] for row in score(found)}}

    sample = {"pixel_values": torch.zeros(1, 3, *task.pixels.size)}
    held = data["fingerprint"][args.held_out]
    yardstick = Yardstick(sample, lambda model: scores_of(model)["accuracy"], f"accuracy, {args.held_out}", held)
    fingerprint = data["fingerprint"][args.train_split]
    if wrote_cache(args, accelerator, lessons, rows[args.train_split], fingerprint, yardstick):
        return 0
    check_teacher(args, lessons, scores_of)

    def validate(trained: Distilled) -> dict[str, float]:
        return scores_of(trained.student) | lessons.distance(accelerator, trained, validation)

    result = learn(args, run, lessons, learning, validate, partial(settle, args, accelerator))
    if result.stopped:
        return run.stopped(result)
    run.save(student.eval(), processor)
    metrics = []
    for split, loader in scored.items():
        metrics += [{**row, "split": split} for row in score(predict(accelerator, task, student, loader))]
    costs = table_of_costs(args, accelerator, lessons, yardstick)
    finish(run, student, task, result, metrics, costs, lessons.described(args))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(DistillVisionArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
