"""Distil a DETR into a smaller one: fewer decoder layers, fewer queries, narrower.

    hf-tfm run detection_train --config quickstart                                the teacher, a minute or two
    hf-tfm run distill_detection --config quickstart                              about a minute on 2 CPU cores
    hf-tfm run distill_detection --config digits --teacher TEACHER --output_dir runs/small-detr

The teacher is a DETR of this package or of transformers. The student learns from the teacher's best queries (kind
"query"), annotated objects (kind "label") and hidden states. --cache DIR --write_cache true writes the teacher's
activations and exits; --cache DIR alone reads them, without the teacher in memory. Presets with their cost and
expected results: recipes/presets/distill_detection/.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import datasets
import torch
from transformers import AutoImageProcessor, BaseImageProcessor, set_seed

from hf_tfm import TfmDetrForObjectDetection
from hf_tfm.command import run_recipe
from hf_tfm.data.batching import COPY
from hf_tfm.data.box_checks import BoxFormat
from hf_tfm.data.detection import check_order, scene_rows
from hf_tfm.data.files import data_roots
from hf_tfm.data.pixels import Scale
from hf_tfm.data.scenes import require_scenes
from hf_tfm.data.shape_batches import ShapeSampler
from hf_tfm.data.source import load_splits, take_split
from hf_tfm.distillation.model_spec import check_processors
from hf_tfm.distillation.student import StudentWithProjections
from hf_tfm.tasks.base import Loader
from hf_tfm.tasks.detection import score
from hf_tfm.tasks.distill import Source
from hf_tfm.tasks.scenes import scene_processor
from hf_tfm.tasks.splits import split_rows
from hf_tfm.training.distill_cache import Yardstick, table_of_costs, wrote_cache
from hf_tfm.training.distill_run import DistillationKnobs, begin_with_layers, check_teacher, learn, prepare
from hf_tfm.training.run import Run, finish, recipe_main
from hf_tfm.training.scene_pictures import PredictionPictures
from hf_tfm.training.scene_run import (
    SceneRunArguments,
    build_detr,
    describe,
    labels_of,
    scene_loader,
    scene_task,
    score_rows,
    warn_of_batch_norm,
)

DETECTOR = TfmDetrForObjectDetection  # transformers' DETR loads as one of ours, and computes the same


@dataclass(kw_only=True)
class DistillDetectionArguments(DistillationKnobs, SceneRunArguments):
    """Knobs of distilling a DETR.

    Args:
        teacher_dtype: of the teacher's weights and what it computes; half precision rounds its boxes to 1/256.
        student_layers: blocks of the teacher, counted from 0, with whose weights a new student begins: those of the
            decoder, or {encoder: [...], decoder: [...]}; a stack that is not named begins with the teacher's first.
        objects_column: list of objects with a box and a category; default, the only column with boxes.
        box_format: what four numbers stand for: xywh (left, top, width, height), xyxy (left, top, right, bottom) or
            cxcywh (centre, width, height).
        relative_boxes: they are shares of the image instead of pixels.

    The others are those of `DistillationKnobs` and `SceneRunArguments`; mean and std are the teacher's by default. A
    cache needs images that all have one size after augmentation, and the run's own batch_size.
    """

    teacher_dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    student_layers: list[int] | dict[Literal["encoder", "decoder"], list[int]] | None = None
    objects_column: str | None = None
    box_format: Literal["xywh", "xyxy", "cxcywh"] = "xywh"
    relative_boxes: bool = False

    def __post_init__(self):
        super().__post_init__()
        if isinstance(self.student_layers, list):
            self.student_layers = {"decoder": self.student_layers}
        if self.metric_for_best_model not in ("loss", "AP", "AP50"):
            raise ValueError(
                f'metric_for_best_model must be "loss", "AP" or "AP50", got "{self.metric_for_best_model}"'
            )


@dataclass
class KnownEpochs:
    """A loader of the epochs that a teacher knows: those of a cache begin anew after its last, steps and all."""

    loader: Loader
    teacher: Source

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """See `StepLoader`."""
        return self.loader.steps_per_epoch(self.teacher.epoch(epoch))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Any]]:
        """See `StepLoader`."""
        return self.loader.epoch(self.teacher.epoch(epoch), start)


def numbers_of(sampler: ShapeSampler, epoch: int) -> list[int]:
    """The numbers of an epoch's samples, see `write_cache`.

    Raises:
        ValueError: they are on several canvases, and the cache's writer puts samples of all steps together.
    """
    found = [number for step in sampler.steps(epoch) for number in step]
    if len({number // COPY for number in found}) > 1:
        raise ValueError("a cache needs images of one size: give augmentation one scale and crop 0, or no cache")
    return found


def load_rows(args: DistillDetectionArguments) -> dict[str, datasets.Dataset]:
    """Rows of `scene_rows` by the name of their split."""
    splits = load_splits(args.dataset_name, args.dataset_config, args.dataset_revision, args.data_files)
    roots = data_roots(args.dataset_name, args.data_files)

    def rows_of(name: str, argument: str) -> datasets.Dataset:
        rows, boxes = take_split(splits, name, argument), BoxFormat(args.box_format, args.relative_boxes)
        return scene_rows(rows, args.image_column, args.objects_column, box_format=boxes, roots=roots)[0]

    return split_rows(args, args.test_splits, rows_of)


def shared_processor(args: DistillDetectionArguments) -> BaseImageProcessor:
    """The student's image processor, on the teacher's scale of pixels; sizes are those of the knobs.

    Raises:
        ValueError: a knob, or ``model_name_or_path``, has another scale; or a model has no image processor.
    """

    def as_read(source: str) -> BaseImageProcessor:
        try:
            scale = Scale(AutoImageProcessor.from_pretrained(source, trust_remote_code=args.trust_remote_code))
        except OSError as error:
            raise ValueError(f'"{source}" has no image processor: save the one it was trained with') from error
        mean, std = (tuple(value / 255.0 for value in values) for values in (scale.mean, scale.std))
        return scene_processor(args.shortest_side, args.longest_side, mean, std)

    teacher = as_read(args.teacher)
    mean, std = args.mean or tuple(teacher.image_mean), args.std or tuple(teacher.image_std)
    processor = scene_processor(args.shortest_side, args.longest_side, mean, std)
    for other in (processor, *([as_read(args.model_name_or_path)] if args.model_name_or_path else [])):
        check_processors(other, teacher)
    return processor


def work(args: DistillDetectionArguments, run: Run) -> int:
    """A whole run; the exit status."""
    accelerator = run.accelerator
    processor = shared_processor(args)
    rows = load_rows(args)
    check_order(rows, args.train_split)
    require_scenes(rows, args.max_bad_images)
    data = describe(args, rows)
    run.open(args, "object-detection", data, args.held_out)
    set_seed(args.seed)
    student = build_detr(DETECTOR, args, labels_of(rows[args.train_split]))
    warn_of_batch_norm(args, accelerator, student)
    begin_with_layers(args, student)
    own = {split: scene_task(args, student, processor, part) for split, part in rows.items()}
    lessons = prepare(args, accelerator, own[args.train_split], student, DETECTOR)
    learning_rows, fingerprint = rows[args.train_split], data["fingerprint"][args.train_split]
    batches = scene_loader(args, accelerator, lessons.task, learning_rows, learning=True)
    held_out = {
        split: scene_loader(args, accelerator, lessons.compared(own[split]), rows[split], learning=False)
        for split in (args.held_out, *args.test_splits)
    }

    def scores_of(model: Any, split: str = args.held_out) -> dict[str, Any]:
        return score(accelerator, own[split], model, held_out[split])

    sample = {"pixel_values": torch.zeros(1, 3, args.shortest_side, args.shortest_side)}
    held = data["fingerprint"][args.held_out]
    yardstick = Yardstick(sample, lambda model: scores_of(model)["AP"], f"AP, {args.held_out}", held)
    numbers = partial(numbers_of, batches.loader.sampler)
    if wrote_cache(args, accelerator, lessons, learning_rows, fingerprint, yardstick, numbers):
        return 0
    learning = KnownEpochs(batches, lessons.task.teacher)
    check_teacher(args, lessons, scores_of)

    def score_validation(trained: StudentWithProjections) -> dict[str, float]:
        found = scores_of(trained.student)
        names = ("loss", *own[args.held_out].term_names, "AP", "AP50")
        return {name: found[name] for name in names} | lessons.distance(accelerator, trained, held_out[args.held_out])

    def settle(per_epoch: int, max_steps: int) -> SceneRunArguments:
        settled, line = args.resolve(per_epoch, max_steps)
        accelerator.print(line)
        return settled

    pictures = PredictionPictures(
        accelerator, own[args.held_out], rows[args.held_out], args.output_dir, args.num_pictures
    )

    def show(trained: StudentWithProjections, step: int) -> None:
        pictures(trained.student, step)

    result = learn(args, run, lessons, learning, score_validation, settle, show)
    if result.stopped:
        return run.stopped(result)
    run.save(student.eval(), processor)
    metrics = [row for split in held_out for row in score_rows(scores_of(student, split), split)]
    costs = table_of_costs(args, accelerator, lessons, yardstick)
    finish(run, student, own[args.train_split], result, metrics, costs, lessons.described(args))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(DistillDetectionArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
