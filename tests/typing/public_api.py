"""Static types of the public API. mypy checks this file in `make lint`; it is never run."""

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from huggingface_hub import CommitInfo
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import BaseImageProcessor, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from typing_extensions import assert_type  # of typing from Python 3.11 on

import hf_tfm
from hf_tfm.arguments import TrainingArguments
from hf_tfm.conversion import convert
from hf_tfm.data.batching import SampleRef, StepLoader, TokenBudgetSampler
from hf_tfm.data.source import load_splits
from hf_tfm.families import Family, register_family
from hf_tfm.hub.loading import load_config, load_image_processor, load_model, load_tokenizer
from hf_tfm.hub.push import push
from hf_tfm.hub.results import RunRecord
from hf_tfm.metrics import Accuracy, CocoAP
from hf_tfm.tasks.base import Loader, Scores, Task, mean_losses
from hf_tfm.tasks.distillation import DistillationTask, Source, distill
from hf_tfm.tasks.evaluation import evaluate
from hf_tfm.tasks.image_classification import (
    ClassificationCollator,
    ImageClassificationArguments,
    ImageClassificationTask,
)
from hf_tfm.tasks.registry import register_task
from hf_tfm.tasks.translation import TranslationTask, translate
from hf_tfm.training import train_step
from hf_tfm.training.loop import StepResult
from hf_tfm.training.run import Run
from hf_tfm.training.trainer import Recipe, Trainer, recipe

# --- models

config = hf_tfm.TfmViTConfig.of_size("small", image_size=32, num_labels=10)
assert_type(config, hf_tfm.TfmViTConfig)
assert_type(config.num_attention_heads, int)
assert_type(hf_tfm.TfmMAEConfig.of_size("base"), hf_tfm.TfmMAEConfig)
assert_type(hf_tfm.TfmTransformerConfig.of_size("base"), hf_tfm.TfmTransformerConfig)
assert_type(hf_tfm.TfmDetrConfig.of_size("base"), hf_tfm.TfmDetrConfig)
assert_type(hf_tfm.TfmBertConfig.of_size("base"), hf_tfm.TfmBertConfig)
assert_type(hf_tfm.TfmGPTConfig.of_size("gpt2"), hf_tfm.TfmGPTConfig)

model = hf_tfm.TfmViTForImageClassification(config)
assert_type(model, hf_tfm.TfmViTForImageClassification)
assert_type(hf_tfm.TfmViTForImageClassification.from_pretrained("folder"), hf_tfm.TfmViTForImageClassification)
assert_type(hf_tfm.TfmViTConfig.from_pretrained("folder"), hf_tfm.TfmViTConfig)
assert_type(hf_tfm.__version__, str)
hf_tfm.carry_code(False)

assert_type(load_config("folder"), PreTrainedConfig)
assert_type(load_model(hf_tfm.TfmViTForImageClassification, "folder"), PreTrainedModel)
assert_type(load_tokenizer("folder"), PreTrainedTokenizerBase)
assert_type(load_image_processor("folder"), BaseImageProcessor)

# --- a task for a model, for a custom training loop

task = ImageClassificationTask.for_model(model, load_image_processor("folder"), label_smoothing=0.1)
assert_type(task, ImageClassificationTask)
assert_type(task.model, PreTrainedModel)
assert_type(task.item, str)
assert_type(task.hub_task, str)

collate = task.collator("train", training=True)
assert_type(collate, ClassificationCollator)
batch = collate([{"image": b"", "label": 0}], [SampleRef(0)], 0)
assert_type(batch, dict[str, Any])
assert_type(task.losses(model, batch), dict[str, Tensor])


def custom_loop(any_task: Task, accelerator: Accelerator, module: nn.Module, optimizer: Optimizer) -> None:
    loader = any_task.dataloader("train", training=True)
    assert_type(loader, Loader)
    for micro_batches in loader.epoch(0):
        result = train_step(accelerator, any_task, module, optimizer, micro_batches)
        assert_type(result, StepResult)
        assert_type(result.losses, dict[str, Tensor])
    assert_type(mean_losses(accelerator, any_task, module, loader), dict[str, float])
    assert_type(any_task.evaluate(module, "test"), Scores)


def loaders(examples: list[dict[str, Any]], lengths: Any) -> None:
    loader = StepLoader(examples, TokenBudgetSampler(lengths, max_tokens=4096), collate)
    assert_type(loader.steps_per_epoch(), int)
    custom: Loader = loader
    assert_type(custom.steps_per_epoch(), int | None)


# --- evaluation

scores = Scores({"accuracy": 0.5}, samples=10)
assert_type(scores.values, dict[str, float])
assert_type(scores.samples, int | None)
assert_type(scores.rows("test", ["accuracy"]), list[dict[str, Any]])
assert_type(evaluate("folder", dataset_name="digits"), dict[str, Any])
assert_type(Accuracy().compute(predictions=[0], references=[0]), dict[str, Any] | None)
assert_type(CocoAP().compute(), dict[str, Any])
assert_type(translate(model, load_tokenizer("folder"), ["Hallo"]), list[str])

# --- runs

args = ImageClassificationArguments(output_dir="run", dataset_name="digits", max_steps=10, learning_rate=1e-3)
assert_type(args.learning_rate, float | None)
assert_type(args.resolve(None, 10)[1], str | None)
main = recipe(ImageClassificationTask, __file__)
assert_type(main, Recipe)
assert_type(main(["--max_steps", "10"]), int)
assert_type(main.task_class, type[Task])


def fit(run: Run, arguments: TrainingArguments) -> None:
    trainer = Trainer(TranslationTask(arguments, run.accelerator), run)
    assert_type(trainer.fit(), RunRecord | None)


# --- distillation

assert_type(distill(ImageClassificationTask), type[DistillationTask])
distil = recipe(distill(ImageClassificationTask), __file__)
assert_type(distil, Recipe)


def teach(source: Source) -> None:
    assert_type(DistillationTask.around(task, source, []), DistillationTask)


# --- conversion, the Hub, data and plug-ins

assert_type(convert("folder", "vit", Path("other")), dict[str, Any])
assert_type(push("folder", "user/name"), CommitInfo)
assert_type(load_splits("digits")["train"], Any)
register_family(Family("vit", hf_tfm.TfmViTConfig))
register_task("classification", ImageClassificationTask)
