"""Distil a masked autoencoder into a smaller one, from features of the visible patches; images need no labels.

    hf-tfm run mae_pretrain --config quickstart                                   the teacher, about 1 minute
    hf-tfm run distill_mae --config quickstart                                    seconds on 2 CPU cores
    hf-tfm run distill_mae --config cifar10_small --dataset_name DATA --teacher TEACHER

Student and teacher read the same visible patches, so the teacher costs a quarter of a pass over whole images. With a
term of kind "label", the student also reconstructs masked patches (Bai et al. 2022, "Masked Autoencoders Enable
Efficient Knowledge Distillers", arXiv:2208.12256). Fine-tune the student with image_classification_train
--model_name_or_path. --cache DIR --write_cache true writes the teacher's activations and exits; --cache DIR alone
reads them, without the teacher in memory. Presets with their cost: recipes/presets/distill_mae/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForPreTraining, PreTrainedConfig, set_seed

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining
from hf_tfm.command import run_recipe
from hf_tfm.distillation.student import Distilled
from hf_tfm.hub.pretrained import IMAGE_PATCHES
from hf_tfm.memory import new_model
from hf_tfm.tasks.masked_image import MaskedImageTask, load_autoencoder
from hf_tfm.tasks.model_fields import check_fields, new_config
from hf_tfm.training import evaluate
from hf_tfm.training.distill_cache import Yardstick, table_of_costs, wrote_cache
from hf_tfm.training.distill_images import DistillImageArguments, settle, shared_processor
from hf_tfm.training.distill_run import begin_with_layers, check_teacher, learn, prepare
from hf_tfm.training.image_run import IMAGE_FIELDS, describe, image_loader, image_size_of, load_rows
from hf_tfm.training.run import Run, finish, recipe_main


@dataclass(kw_only=True)
class DistillMAEArguments(DistillImageArguments):
    """Knobs of distilling a masked autoencoder: those of `DistillImageArguments`.

    ``model`` takes, among others, patch_size and mask_ratio, which have to be the teacher's.
    """

    fitting: ClassVar = IMAGE_PATCHES

    def __post_init__(self):
        super().__post_init__()
        if self.metric_for_best_model != "loss":
            raise ValueError(f'metric_for_best_model must be "loss", got "{self.metric_for_best_model}"')
        if unfit := sorted({term.kind for term in self.terms} & {"soft_target", "hard_target", "logit", "query"}):
            raise ValueError(f"terms must not have {unfit[0]}: a masked autoencoder gives pixels, not classes")
        check_fields(TfmMAEConfig, self.model, IMAGE_FIELDS)


def check_patches(student: TfmMAEConfig, teacher: PreTrainedConfig) -> None:
    """Refuse a teacher that would see other patches than its student.

    Raises:
        ValueError: with the field that differs.
    """
    for name in ("patch_size", "mask_ratio"):
        ours, theirs = getattr(student, name), getattr(teacher, name)
        if ours != theirs:
            raise ValueError(f"model.{name} must be the teacher's, {theirs}, got {ours}")


def build_student(args: DistillMAEArguments, size: int | tuple[int, int]) -> TfmMAEForPreTraining:
    """A new student, or that of ``model_name_or_path``, for images of a size."""
    set_seed(args.seed)
    if not args.model_name_or_path:
        return new_model(TfmMAEForPreTraining, new_config(TfmMAEConfig, args, image_size=size))
    student = load_autoencoder(args.model_name_or_path, args.model)
    student.set_image_size(size)
    return student


def work(args: DistillMAEArguments, run: Run) -> int:
    """A whole run; the exit status."""
    accelerator = run.accelerator
    processor = shared_processor(args)
    rows = load_rows(args, [], labelled=False)
    data = describe(args, rows)
    run.open(args, "image-feature-extraction", data, args.held_out)
    student = build_student(args, image_size_of(processor))
    teacher_config = AutoConfig.from_pretrained(args.teacher, trust_remote_code=args.trust_remote_code)
    check_patches(student.config, teacher_config)
    begin_with_layers(args, student)
    task = MaskedImageTask(student.config, processor, args.augmentation, args.seed)
    lessons = prepare(args, accelerator, task, student, AutoModelForPreTraining)
    learning = image_loader(args, accelerator, lessons.task, rows[args.train_split], learning=True)
    validation = image_loader(args, accelerator, lessons.compared(task), rows[args.held_out], learning=False)

    def reconstruction(model: Any) -> float:
        return evaluate(accelerator, task, model, validation)["loss"]

    sample = {"pixel_values": torch.zeros(1, 3, *task.pixels.size)}
    held = data["fingerprint"][args.held_out]
    metric = f"reconstruction loss, {args.held_out}"
    yardstick = Yardstick(sample, reconstruction, metric, held, higher_is_better=False)
    fingerprint = data["fingerprint"][args.train_split]
    if wrote_cache(args, accelerator, lessons, rows[args.train_split], fingerprint, yardstick):
        return 0
    check_teacher(args, lessons, lambda teacher: {"loss": reconstruction(teacher)})

    def validate(trained: Distilled) -> dict[str, float]:
        own = reconstruction(trained.student)
        # Without the teacher, whose cache holds the training images alone, there is nothing else to go by.
        terms = {"loss": own} if args.cached else evaluate(accelerator, lessons.task, trained, validation)
        return {**terms, "reconstruction": own}

    result = learn(args, run, lessons, learning, validate, partial(settle, args, accelerator))
    if result.stopped:
        return run.stopped(result)
    run.save(student.eval(), processor)
    metrics = [{"name": "reconstruction_loss", "value": reconstruction(student), "split": args.held_out}]
    costs = table_of_costs(args, accelerator, lessons, yardstick)
    finish(run, student, task, result, metrics, costs, lessons.described(args))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(DistillMAEArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
