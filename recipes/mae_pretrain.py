"""Pretrain a masked autoencoder on images alone (He et al. 2021, arXiv:2111.06377).

    hf-tfm run mae_pretrain --config quickstart                         1 to 3 minutes on a CPU core
    hf-tfm run mae_pretrain --config cifar10 --dataset_name DATA --output_dir runs/cifar10-mae
    accelerate launch recipes/mae_pretrain.py --config imagenet_base    as many GPUs as the launcher finds

Fine-tune the encoder with image_classification_train --model_name_or_path. Presets with their cost and expected
results: recipes/presets/mae_pretrain/.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from transformers import AutoImageProcessor, set_seed

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining
from hf_tfm.command import run_recipe
from hf_tfm.hub.pretrained import IMAGE_PATCHES
from hf_tfm.memory import new_model
from hf_tfm.tasks.masked_image import MaskedImageTask, load_autoencoder
from hf_tfm.tasks.model_fields import check_fields, new_config
from hf_tfm.training import evaluate
from hf_tfm.training.image_run import (
    IMAGE_FIELDS,
    IMAGE_SIZE,
    ImageRunArguments,
    describe,
    image_loader,
    image_size_of,
    load_rows,
    new_processor,
)
from hf_tfm.training.run import Run, finish, recipe_main


@dataclass(kw_only=True)
class PretrainArguments(ImageRunArguments):
    """Knobs of masked-autoencoder pretraining: those of `ImageRunArguments`.

    ``model`` takes, among others, patch_size, mask_ratio, norm_pix_loss and the decoder's sizes.
    """

    fitting: ClassVar = IMAGE_PATCHES

    def __post_init__(self):
        super().__post_init__()
        if self.metric_for_best_model != "loss":
            raise ValueError(f'metric_for_best_model must be "loss", got "{self.metric_for_best_model}"')
        check_fields(TfmMAEConfig, self.model, IMAGE_FIELDS)
        if not self.model_name_or_path:
            new_config(TfmMAEConfig, self, image_size=self.image_size or IMAGE_SIZE)


def build_model(args: PretrainArguments, size: int | tuple[int, int]) -> TfmMAEForPreTraining:
    """The model to train, with weights drawn from the seed or taken from ``model_name_or_path``, for images of a
    size."""
    set_seed(args.seed)
    if not args.model_name_or_path:
        return new_model(TfmMAEForPreTraining, new_config(TfmMAEConfig, args, image_size=size))
    model = load_autoencoder(args.model_name_or_path, args.model)
    model.set_image_size(size)
    return model


def work(args: PretrainArguments, run: Run) -> int:
    """A whole run; the exit status."""
    accelerator = run.accelerator
    rows = load_rows(args, [], labelled=False)
    run.open(args, "image-feature-extraction", describe(args, rows), args.held_out)
    processor = run.load_or_create("processor", lambda: new_processor(args), AutoImageProcessor.from_pretrained)
    model = build_model(args, image_size_of(processor))
    task = MaskedImageTask(model.config, processor, args.augmentation, args.seed)
    learning = image_loader(args, accelerator, task, rows[args.train_split], learning=True)
    validation = image_loader(args, accelerator, task, rows[args.held_out], learning=False)
    per_epoch = learning.steps_per_epoch()
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * per_epoch)
    settled, line = args.resolve(per_epoch, max_steps)
    accelerator.print(line)

    def score(trained) -> dict[str, float]:
        return evaluate(accelerator, task, trained, validation)

    eval_steps = args.eval_steps or per_epoch or max_steps
    result = run.train(task, model, learning, settled, max_steps, eval_steps, score)
    if result.stopped:
        return run.stopped(result)
    run.save(model.eval(), processor)
    metrics = [{"name": "reconstruction_loss", "value": score(model)["loss"], "split": args.held_out}]
    finish(run, model, task, result, metrics)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(PretrainArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
