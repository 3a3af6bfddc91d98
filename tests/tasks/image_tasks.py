"""Shared helpers of the image task tests: a few images, some of them broken, tiny models and loaders."""

import io
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining, TfmViTConfig, TfmViTForImageClassification
from hf_tfm.data.augment import Augmentation, Mixing
from hf_tfm.data.batching import StepLoader
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.pixels import image_processor
from hf_tfm.tasks.image_classification import ImageClassificationTask
from hf_tfm.tasks.masked_image import MaskedImageTask

TINY = {
    "image_size": 16,
    "patch_size": 4,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_intermediate_size": 24,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
}
CLASSES = 5
PROCESSOR = image_processor(16, resize=20)
AUGMENTATION = Augmentation(scale=(0.3, 1.0), rand_augment=1, erasing=0.3)
MIXING = Mixing(mixup=0.8, cutmix=1.0, probability=0.9)


def photo(index: int) -> bytes:
    """A blurry JPEG of 28 x 24 pixels."""
    small = np.random.default_rng(index).integers(0, 256, (5, 6, 3)).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(small).resize((28, 24), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def examples(count: int = 12, bad: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """Images with labels 0 to 4, stored as "a" to "e"; the files of images in ``bad`` are truncated."""
    rows = []
    for index in range(count):
        data = photo(index)
        data = data[:100] if index in bad else data
        rows.append({"image": {"bytes": data, "path": f"{index}.jpg"}, "label": "abcde"[index % CLASSES]})
    return rows


LABELS = {"id2label": dict(enumerate("abcde")), "label2id": {name: i for i, name in enumerate("abcde")}}


def classification(
    augmentation=AUGMENTATION, mixing=MIXING, label_smoothing=0.1, seed=0, model=None
) -> ImageClassificationTask:
    options = {"augmentation": augmentation, "mixing": mixing or Mixing(), "label_smoothing": label_smoothing}
    return ImageClassificationTask.for_model(model or tiny_vit(), PROCESSOR, seed=seed, **options)


def masked(augmentation=AUGMENTATION, seed=0, **fields) -> MaskedImageTask:
    return MaskedImageTask.for_model(tiny_mae(**fields), PROCESSOR, augmentation=augmentation, seed=seed)


def mae_config(**fields) -> TfmMAEConfig:
    return TfmMAEConfig(**{**TINY, **DECODER, **fields})


def scramble(model: torch.nn.Module) -> torch.nn.Module:
    """Draw larger weights than the default initialization, which leaves a model almost linear."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model


def tiny_vit(seed: int = 0, **fields) -> TfmViTForImageClassification:
    torch.manual_seed(seed)
    return scramble(TfmViTForImageClassification(TfmViTConfig(**TINY, **LABELS, **fields)))


def tiny_mae(seed: int = 0, **fields) -> TfmMAEForPreTraining:
    torch.manual_seed(seed)
    return scramble(TfmMAEForPreTraining(mae_config(**fields)))


CASES = {"classification": (classification, tiny_vit), "masked": (masked, tiny_mae)}


def training_loader(
    task, rows, batch_size=6, micro=None, rank=0, world_size=1, num_workers=0, **options
) -> StepLoader:
    """Shuffled steps with augmentation that keep pairs together."""
    sampler = BatchSampler(len(rows), batch_size, seed=1, unit=2, **options)
    return StepLoader(rows, sampler, task.collator(training=True), micro, rank, world_size, num_workers)


def evaluation_loader(task, rows, batch_size=4, rank=0, world_size=1) -> StepLoader:
    sampler = BatchSampler(len(rows), batch_size, shuffle=False)
    return StepLoader(rows, sampler, task.collator(), rank=rank, world_size=world_size)


def equal(first: Any, second: Any) -> bool:
    """Whether two batches, or lists of batches, are bit-equal."""
    if isinstance(first, Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[key], second[key]) for key in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(equal, first, second))
    return first == second
