"""Train a Vision Transformer to classify images: from scratch, by fine-tuning, or as a linear probe.

    hf-tfm run image_classification_train --config quickstart                     about 1 minute on 2 CPU cores
    hf-tfm run image_classification_train --config cifar10 --dataset_name DATA --output_dir runs/cifar10
    hf-tfm run image_classification_train --config cifar10_finetune --dataset_name DATA --model_name_or_path MODEL
    accelerate launch recipes/image_classification_train.py --config deit_small   as many GPUs as the launcher finds

Presets with their cost and expected results: recipes/presets/image_classification_train/.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoImageProcessor, set_seed

from hf_tfm import TfmViTConfig, TfmViTForImageClassification
from hf_tfm.command import run_recipe
from hf_tfm.data.images import label_names
from hf_tfm.memory import new_model
from hf_tfm.models.configuration_vit import SHARES
from hf_tfm.tasks.classification import predict, score
from hf_tfm.tasks.linear_probe import fold_probe, prepare_probe
from hf_tfm.tasks.model_fields import check_fields, new_config
from hf_tfm.training.image_run import (
    IMAGE_FIELDS,
    IMAGE_SIZE,
    LabelledImageArguments,
    describe,
    image_loader,
    image_size_of,
    label_fields,
    label_tasks,
    load_classifier,
    load_rows,
    new_processor,
)
from hf_tfm.training.run import Run, finish, recipe_main


@dataclass(kw_only=True)
class ClassificationArguments(LabelledImageArguments):
    """Knobs of image classification.

    Args:
        linear_probe: train a linear classifier on the frozen features of model_name_or_path, behind a batch norm;
            dropout and drop path are off.

    The others are those of `LabelledImageArguments`; ``model`` takes, among others, patch_size, pooling and
    drop_path_rate.
    """

    linear_probe: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.linear_probe and not self.model_name_or_path:
            raise ValueError("linear_probe needs model_name_or_path: features of random weights say nothing")
        if self.linear_probe and self.layer_wise_lr_decay != 1.0:
            raise ValueError(
                f"linear_probe trains one layer alone: layer_wise_lr_decay must be 1, got {self.layer_wise_lr_decay}"
            )
        check_fields(TfmViTConfig, self.model, IMAGE_FIELDS)
        if not self.model_name_or_path:
            new_config(TfmViTConfig, self, image_size=self.image_size or IMAGE_SIZE)


def build_model(
    args: ClassificationArguments, size: int | tuple[int, int], names: list[str]
) -> TfmViTForImageClassification:
    """The model to train, with weights drawn from the seed or taken from ``model_name_or_path``, for images of a
    size."""
    set_seed(args.seed)
    if not args.model_name_or_path:
        return new_model(
            TfmViTForImageClassification, new_config(TfmViTConfig, args, image_size=size, **label_fields(names))
        )
    still = dict.fromkeys(SHARES, 0.0) if args.linear_probe else {}  # a frozen encoder has nothing to regularise
    return load_classifier(args.model_name_or_path, names, size, **{**still, **args.model})


def work(args: ClassificationArguments, run: Run) -> int:
    """A whole run; the exit status."""
    accelerator = run.accelerator
    rows = load_rows(args, args.test_splits, labelled=True)
    run.open(args, "image-classification", describe(args, rows), args.held_out)
    processor = run.load_or_create("processor", lambda: new_processor(args), AutoImageProcessor.from_pretrained)
    names = label_names(rows[args.train_split])
    model = build_model(args, image_size_of(processor), names)
    tasks = label_tasks(args, processor, rows, names)
    task = tasks[args.train_split]
    unit = 1 if task.mixing is None else 2
    learning = image_loader(args, accelerator, task, rows[args.train_split], learning=True, unit=unit)
    if args.linear_probe:
        prepare_probe(accelerator, task, model, learning, args.batch_size)
    tests = {s: image_loader(args, accelerator, tasks[s], rows[s], learning=False) for s in args.test_splits}
    validation = image_loader(args, accelerator, tasks[args.held_out], rows[args.held_out], learning=False)
    per_epoch = learning.steps_per_epoch()
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * per_epoch)
    settled, line = args.resolve(per_epoch, max_steps)
    accelerator.print(line)

    def score_validation(trained) -> dict[str, float]:
        found = predict(accelerator, task, trained, validation)
        return {"loss": found.loss, "accuracy": score(found)[0]["value"]}

    eval_steps = args.eval_steps or per_epoch or max_steps
    result = run.train(task, model, learning, settled, max_steps, eval_steps, score_validation)
    if result.stopped:
        return run.stopped(result)
    if args.linear_probe:
        fold_probe(model)
    run.save(model.eval(), processor)
    metrics = []
    for split, loader in {args.held_out: validation, **tests}.items():
        metrics += [{**row, "split": split} for row in score(predict(accelerator, task, model, loader))]
    finish(run, model, task, result, metrics)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(ClassificationArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
