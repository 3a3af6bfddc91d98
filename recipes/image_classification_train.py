"""Train a Vision Transformer to classify images: from scratch, fine-tuned, or a linear probe of its features.

    hf-tfm run image_classification_train --config quickstart                     about 1 minute on 2 CPU cores
    hf-tfm run image_classification_train --config cifar10 --dataset DATA --output_dir runs/cifar10
    hf-tfm run image_classification_train --config cifar10_finetune --dataset DATA --init_from runs/cifar10-mae
    accelerate launch recipes/image_classification_train.py --config deit_small   as many GPUs as the launcher finds

Presets with their cost and expected numbers: recipes/presets/image_classification_train/.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoConfig, AutoImageProcessor, set_seed

from hf_tfm import TfmViTConfig, TfmViTForImageClassification
from hf_tfm.data.augment import Mixing
from hf_tfm.data.images import label_ids, label_names
from hf_tfm.models.configuration_vit import SHARES
from hf_tfm.tasks.classification import ClassificationTask, predict, score
from hf_tfm.tasks.linear_probe import prepare_probe
from hf_tfm.training import train
from hf_tfm.training.arguments import parse_arguments
from hf_tfm.training.image_run import (
    IMAGE_FIELDS,
    ImageRunArguments,
    describe,
    fresh_head,
    image_loader,
    load_rows,
    new_processor,
)
from hf_tfm.training.model_fields import check_fields, new_config
from hf_tfm.training.run import finish, open_run, start_accelerator


@dataclass(kw_only=True)
class ClassificationArguments(ImageRunArguments):
    """Knobs of image classification.

    Args:
        test_splits: splits that are only scored, in the end.
        label_smoothing: share of the target that is spread over all classes.
        mixing: mixup and CutMix, see `Mixing`.
        linear_probe: train a linear classifier on the frozen features of init_from, behind a batch norm; dropout and
            drop path are off.

    The others are those of `ImageRunArguments`; ``model`` takes, among others, patch_size, pooling, drop_path_rate.
    """

    test_splits: list[str] = field(default_factory=list)
    label_smoothing: float = 0.0
    mixing: Mixing = field(default_factory=Mixing)
    linear_probe: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be in [0, 1), got {self.label_smoothing}")
        if self.best_metric not in ("loss", "accuracy"):
            raise ValueError(f'best_metric must be "loss" or "accuracy", got "{self.best_metric}"')
        if self.linear_probe and not self.init_from:
            raise ValueError("linear_probe needs init_from: features of random weights say nothing")
        if self.linear_probe and self.layer_decay != 1.0:
            raise ValueError(f"linear_probe trains one layer alone: layer_decay must be 1, got {self.layer_decay}")
        check_fields(TfmViTConfig, self.model, IMAGE_FIELDS)
        if not self.init_from:
            new_config(TfmViTConfig, self, image_size=self.image_size)


def build_model(args: ClassificationArguments, names: list[str]) -> TfmViTForImageClassification:
    """The model to train, with weights drawn from the seed or taken from ``init_from``."""
    set_seed(args.seed)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if not args.init_from:
        return TfmViTForImageClassification(new_config(TfmViTConfig, args, image_size=args.image_size, **labels))
    still = dict.fromkeys(SHARES, 0.0) if args.linear_probe else {}  # a frozen encoder has nothing to regularise
    fields = {**labels, **still, **args.model}
    earlier = AutoConfig.from_pretrained(args.init_from)
    model, report = TfmViTForImageClassification.from_pretrained(
        args.init_from, ignore_mismatched_sizes=True, output_loading_info=True, **fields
    )
    if odd := sorted(name for name, *_ in report["mismatched_keys"] if not name.startswith("classifier.")):
        raise ValueError(f"model: the weights of init_from {args.init_from} do not fit it: {', '.join(odd)}")
    if len(names) == earlier.num_labels and earlier.id2label != labels["id2label"] and not report["missing_keys"]:
        fresh_head(model, "classifier")  # as many classes, but others
    model.vit.set_image_size(args.image_size)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(ClassificationArguments, Path(__file__), argv)
    accelerator = start_accelerator(args)
    rows = load_rows(args, args.test_splits, labelled=True)
    run = open_run(accelerator, args, "image-classification", describe(args, rows), Path(__file__).stem, argv)
    processor = run.once("processor", lambda: new_processor(args), AutoImageProcessor.from_pretrained)
    names = label_names(rows[args.train_split])
    model = build_model(args, names)

    def task_of(split: str) -> ClassificationTask:
        ids = label_ids(rows[split], names)
        return ClassificationTask(processor, ids, args.augmentation, args.mixing, args.label_smoothing, args.seed)

    task = task_of(args.train_split)
    unit = 1 if task.mixing is None else 2
    learning = image_loader(args, accelerator, task, rows[args.train_split], learning=True, unit=unit)
    if args.linear_probe:
        prepare_probe(accelerator, task, model, learning, args.batch_size)
    tests = {s: image_loader(args, accelerator, task_of(s), rows[s], learning=False) for s in args.test_splits}
    validation = image_loader(args, accelerator, task_of(args.held_out), rows[args.held_out], learning=False)
    per_epoch = learning.steps_per_epoch()
    num_steps = args.num_steps or math.ceil(args.num_epochs * per_epoch)
    settled, line = args.settle(per_epoch)
    accelerator.print(line)

    def score_validation(trained) -> dict[str, float]:
        found = predict(accelerator, task, trained, validation)
        return {"loss": found.loss, "accuracy": score(found)[0]["value"]}

    eval_steps = args.eval_steps or per_epoch or num_steps
    result = train(accelerator, task, model, learning, settled, num_steps, eval_steps, score_validation)
    if result.stopped:
        return run.stopped(result)
    if args.linear_probe:
        model.classifier = model.classifier.fold()
    metrics = []
    for split, loader in {args.held_out: validation, **tests}.items():
        metrics += [{**row, "split": split} for row in score(predict(accelerator, task, model, loader))]
    finish(run, model.eval(), processor, task, result, metrics)
    return 0


if __name__ == "__main__":
    sys.exit(main())
