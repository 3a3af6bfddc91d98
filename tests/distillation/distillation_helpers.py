"""Shared helpers of the distillation tests: tiny teachers and students of every family, and tasks with a few
samples.
"""

import io
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertTokenizer,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_tfm import (
    TfmBertConfig,
    TfmBertForMaskedLM,
    TfmBertForSequenceClassification,
    TfmDetrConfig,
    TfmDetrForObjectDetection,
    TfmTransformerConfig,
    TfmTransformerForConditionalGeneration,
    TfmViTConfig,
    TfmViTForImageClassification,
)
from hf_tfm.data.detection import scene_rows
from hf_tfm.data.digit_scenes import digit_scenes
from hf_tfm.data.pixels import image_processor, scene_processor
from hf_tfm.distillation.model_spec import spec_of
from hf_tfm.distillation.resolve import resolve_terms
from hf_tfm.distillation.samples import TrainingSamples
from hf_tfm.distillation.student import StudentWithProjections
from hf_tfm.distillation.teacher import Teacher
from hf_tfm.distillation.terms import Term
from hf_tfm.tasks.base import Task
from hf_tfm.tasks.distillation import AllEpochs, DistillationCollator, DistillationTask
from hf_tfm.tasks.image_classification import ImageClassificationTask
from hf_tfm.tasks.language_modeling import LanguageModelingTask
from hf_tfm.tasks.object_detection import DetectionTask
from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.checkpoint import full_weights
from hf_tfm.training.optim import build_optimizer

WORDS = [f"w{i}" for i in range(55)]
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
BERT = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 24, **STILL}
VIT = {"image_size": 16, "patch_size": 4, "num_attention_heads": 4, "intermediate_size": 48}
DETR = {
    "backbone": "test_resnet",
    "num_queries": 6,
    "d_model": 32,
    "encoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "num_labels": 10,
}
LABELS = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}


def tokenizer() -> BertTokenizer:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: i for i, word in enumerate([*special, *WORDS])})


def sentences(count: int = 10, seed: int = 0) -> list[dict[str, Any]]:
    """Sequences of 5 to 14 tokens; the label is whether the first token is in the first half of the vocabulary."""
    random = np.random.default_rng(seed)
    rows = []
    for length in random.integers(5, 15, count):
        ids = random.integers(5, 60, length - 2).tolist()
        rows.append({"input_ids": [2, *ids, 3], "label": int(ids[0] < 32)})
    return rows


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw larger weights than the default initialization, which leaves a model almost linear, and nonzero biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if "backbone" in name or "query_position" in name:
                continue
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            else:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def bert(layers: int = 4, width: int = 32, native: bool = False, seed: int = 0, **fields) -> nn.Module:
    """A masked language model over `tokenizer`."""
    torch.manual_seed(seed)
    kind, config = (BertForMaskedLM, BertConfig) if native else (TfmBertForMaskedLM, TfmBertConfig)
    sizes = {**BERT, "hidden_size": width, "num_hidden_layers": layers, "vocab_size": 60, **fields}
    return randomize(kind(config(**sizes)), seed)


def translator(layers: int = 4, width: int = 32, seed: int = 0, **fields) -> nn.Module:
    """A translation model of 60 tokens with equally many layers in both stacks."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 48, "num_attention_heads": 4, "dropout": 0.0, "vocab_size": 60}
    depth = {"num_encoder_layers": layers, "num_decoder_layers": layers, **fields}
    return randomize(TfmTransformerForConditionalGeneration(TfmTransformerConfig(**sizes, **depth)), seed)


def sentence_pairs(count: int = 10) -> list[dict[str, Any]]:
    """Pairs of sequences of 5 to 14 tokens."""
    sides = zip(sentences(count), sentences(count, seed=1), strict=True)
    return [{"input_ids": source["input_ids"], "labels": target["input_ids"]} for source, target in sides]


def classifier(layers: int = 4, width: int = 32, seed: int = 0, **fields) -> nn.Module:
    """A text classifier."""
    torch.manual_seed(seed)
    sizes = {**BERT, "hidden_size": width, "num_hidden_layers": layers, "vocab_size": 60, "num_labels": 2, **fields}
    return randomize(TfmBertForSequenceClassification(TfmBertConfig(**sizes)), seed)


def vit(layers: int = 4, width: int = 32, kind: str = "ours", seed: int = 0) -> nn.Module:
    """An image classifier of 5 classes."""
    torch.manual_seed(seed)
    if kind == "timm":
        args = {"img_size": 16, "patch_size": 4, "embed_dim": width, "depth": layers, "num_heads": 4}
        config = TimmWrapperConfig(architecture="vit_tiny_patch16_224", model_args=args, num_labels=5)
        return randomize(TimmWrapperForImageClassification(config), seed)
    sizes = {**VIT, "hidden_size": width, "num_hidden_layers": layers, **LABELS}
    if kind == "native":
        return randomize(ViTForImageClassification(ViTConfig(**sizes)), seed)
    return randomize(TfmViTForImageClassification(TfmViTConfig(**sizes)), seed)


def detr(layers: int = 3, seed: int = 0, **fields) -> TfmDetrForObjectDetection:
    """A detector of ten digit classes."""
    torch.manual_seed(seed)
    return randomize(TfmDetrForObjectDetection(TfmDetrConfig(**{**DETR, "decoder_layers": layers, **fields})), seed)


class PlainTask(Task):
    """Base class for tasks without data; subclasses define the methods a training step needs."""

    Arguments = TrainingArguments
    reported_metrics = ("loss",)

    def __init__(self, args: Any = None, accelerator: Any = None):
        super().__init__(args, accelerator)

    def load_splits(self) -> dict[str, Any]:
        raise NotImplementedError

    build_processor = build_model = load_pretrained = dataloader = evaluate = fingerprint = load_splits


def text_batch(examples: list, indices: list[int], epoch: int, is_dummy: bool = False) -> dict[str, Tensor]:
    longest = max(len(example["input_ids"]) for example in examples)
    ids = torch.zeros(len(examples), longest, dtype=torch.int64)
    for row, example in zip(ids, examples, strict=True):
        row[: len(example["input_ids"])] = torch.tensor(example["input_ids"])
    labels = torch.tensor([-100 if is_dummy else example["label"] for example in examples])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": labels}


class TextTask(PlainTask):
    """Text classification with the minimal interface that distillation requires."""

    item, term = "texts", "label"

    def collator(self, split: str = "", training: bool = False):
        return text_batch

    def count(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return {"label": int((batch["labels"] >= 0).sum())}

    def inputs(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def output_losses(self, output, logits, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"label": cross_entropy(logits.float(), batch["labels"], reduction="sum", ignore_index=-100)}


def image_rows(count: int = 10) -> list[dict[str, Any]]:
    """JPEGs of blurry blobs with labels "a" to "e"."""
    rows = []
    for index in range(count):
        small = np.random.default_rng(index).integers(0, 256, (5, 6, 3)).astype(np.uint8)
        file = io.BytesIO()
        Image.fromarray(small).resize((28, 24), Image.Resampling.BICUBIC).save(file, "JPEG")
        rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": "abcde"[index % 5]})
    return rows


def scenes(count: int = 6) -> Any:
    """Scenes of digits."""
    return scene_rows(digit_scenes(train=count, validation=0, test=0, size=64)["train"])[0]


def image_task(**options) -> ImageClassificationTask:
    return ImageClassificationTask.for_model(vit(), image_processor(16, resize=20), **options)


def detection_task(model: TfmDetrForObjectDetection) -> Task:
    return DetectionTask.for_model(model, scene_processor(64, 96), augmentation=None)


def language_task(seed: int = 0) -> LanguageModelingTask:
    return LanguageModelingTask.for_model(None, tokenizer(), mlm_probability=0.3, seed=seed)


def translation_task() -> TranslationTask:
    return TranslationTask.for_model(translator(1))


def distillation(
    task: Any, teacher: Any, student: nn.Module, terms: list[dict[str, Any]]
) -> tuple[DistillationTask, StudentWithProjections]:
    """A distillation task and the student it trains.

    Args:
        teacher: a model, or a cached teacher.
        terms: fields of each loss term.
    """
    teacher = Teacher(teacher) if isinstance(teacher, nn.Module) else teacher
    resolved = resolve_terms([Term(**term) for term in terms], spec_of(student), teacher.spec)
    torch.manual_seed(5)
    return DistillationTask.around(task, teacher, resolved), StudentWithProjections(student, resolved)


def training_samples(task: Any, rows: Any, data: str = "abc", refs: Any = None) -> TrainingSamples:
    """The training data of a task in the form a teacher reads."""
    task = task if isinstance(task, DistillationTask) else DistillationTask.around(task, AllEpochs(), ())
    collate = DistillationCollator(
        task.task.collator(training=True), AllEpochs(), (), type(task.task).target_positions, task.all_tokens
    )
    return TrainingSamples(rows, collate, task.task.inputs, task.positions, data, refs=refs)


def batches(task: Any, rows: Any, cuts: list[list[int]], epoch: int = 0) -> list[dict[str, Any]]:
    """Micro-batches of the given row indices."""
    collate = task.collator(training=True)
    return [collate([rows[i] for i in cut], cut, epoch) for cut in cuts]


def losses(task: DistillationTask, model: nn.Module, batch: dict[str, Any]) -> dict[str, float]:
    """Loss terms of a batch, each divided by its number of items."""
    counts = task.count(batch)
    return {name: value.item() / counts[name] for name, value in task.losses(model, batch).items()}


def trained(
    task: DistillationTask, model: nn.Module, steps: list[list[dict[str, Any]]], **overrides
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights after some steps of several micro-batches each, and the loss of each step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    args = TrainingArguments(output_dir=".", **{"max_steps": 1, "warmup_steps": 0, "adam_epsilon": 1e-4, **overrides})
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    prepared.train()
    found = []
    for step in steps:
        result = train_step(accelerator, task, prepared, optimizer, step)
        found.append(sum(value.item() for value in result.losses.values()))
    return {name: value.clone() for name, value in full_weights(model).items()}, found
