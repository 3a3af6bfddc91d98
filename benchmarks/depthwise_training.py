"""Training step of DETR on backbones with depthwise convolutions, by precision and memory format, on a CPU.

python -m benchmarks depthwise_training

Two forms are ours: float32, and bfloat16 with grouped convolutions in float32, both with images in channels-last
format. Beside them stands torch's default for each precision: the same model with images in channels-first format and,
under autocast, every convolution in bfloat16.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import torch

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection
from hf_tfm.models.backbones import Backbone, GroupedConv2d

from . import common

BACKBONES = ("tf_efficientnet_lite0", "mobilenetv3_large_100", "convnext_femto", "mambaout_femto")
OURS, PLAIN = "ours", "default"
VARIANTS = tuple((dtype, form) for dtype in ("float32", "bfloat16") for form in (OURS, PLAIN))


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Run all convolutions in the dtype of autocast and leave images in the format that they have."""
    with (
        patch.object(GroupedConv2d, "forward", lambda self, features: self.convolve(features)),
        patch.object(Backbone, "arrange", lambda self, pixel_values: pixel_values),
    ):
        yield


def main(batch_size: int = 8, height: int = 224, width: int = 288, rounds: int = 5) -> None:
    """Measure and write benchmarks/results/depthwise_training.json.

    Args:
        rounds: timed rounds; medians are reported.
    """
    shape = (batch_size, 3, height, width)
    backbones = {name: measure(name, shape, rounds) for name in BACKBONES}
    common.write("depthwise_training", {"shape": list(shape), "backbones": backbones})


def measure(backbone: str, shape: tuple[int, ...], rounds: int) -> dict:
    """Milliseconds of a forward and a backward pass by variant, and the speedups of bfloat16 over float32."""
    torch.manual_seed(0)
    model = TfmDetrForObjectDetection(TfmDetrConfig.of_size("tiny", backbone=backbone, dilation=False)).train()
    images = torch.randn(shape)
    boxes = [
        {"class_labels": torch.tensor([0, 1]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2], [0.6, 0.5, 0.4, 0.3]])}
    ] * shape[0]

    def step(dtype: str, number: int) -> int:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            loss = model(images, labels=boxes).loss
        loss.backward()
        return 1

    def default_step(dtype: str, number: int) -> int:
        with torch_defaults():
            return step(dtype, number)

    works = {f"{dtype} {form}": partial(step if form == OURS else default_step, dtype) for dtype, form in VARIANTS}
    rates = common.interleaved(works, rounds)
    return {
        "milliseconds": {name: round(1e3 / sorted(found)[len(found) // 2], 1) for name, found in rates.items()},
        "speedup": {
            form: round(common.ratio(rates, f"bfloat16 {form}", f"float32 {form}"), 2) for form in (OURS, PLAIN)
        },
        "speedup_over_default": round(common.ratio(rates, f"bfloat16 {OURS}", f"float32 {PLAIN}"), 2),
    }
