"""Swin speed: images per second of our Swin Transformer against transformers', timm's and torchvision's.

python -m benchmarks swin_training

As vision_training, whose functions it uses: training steps and inference on random images, in turn.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import timm
import torchvision
from torch import nn
from transformers import SwinConfig, SwinForImageClassification

from hf_tfm import TfmSwinConfig, TfmSwinForImageClassification
from hf_tfm.models.configuration_swin import SIZES

from . import common
from .vision_peers import CLASSES, Forward
from .vision_training import Setting, data_sheet_tflops, measure_memory, measure_rates, report


@dataclass(frozen=True)
class SwinSetting(Setting):
    """Classification at one size of Swin."""

    def implementations(self) -> dict[str, tuple[Callable[[], nn.Module], Forward]]:
        """How a model is made, and (model, pixels) -> logits."""
        shape = {**SIZES[self.size], "image_size": self.image_size, "num_labels": CLASSES}
        name = f"swin_{self.size}_patch4_window7_224"
        found: dict[str, tuple[Callable[[], nn.Module], Forward]] = {
            "ours": (
                lambda: TfmSwinForImageClassification(TfmSwinConfig(**shape)),
                lambda m, x: m(pixel_values=x).logits,
            ),
            "transformers": (
                lambda: SwinForImageClassification(SwinConfig(**shape)),
                lambda m, x: m(pixel_values=x).logits,
            ),
            "timm": (lambda: timm.create_model(name, img_size=self.image_size, drop_path_rate=0.1), lambda m, x: m(x)),
        }
        model = partial(torchvision.models.SwinTransformer, [4, 4], window_size=[7, 7], **SIZES[self.size])
        found["torchvision"] = (lambda: model(stochastic_depth_prob=0.1), lambda m, x: m(x))
        return found

    def flops(self) -> float:
        """Of a training step on one image, see `training_flops`."""
        return training_flops(TfmSwinConfig.of_size(self.size, image_size=self.image_size))


def training_flops(config: TfmSwinConfig) -> float:
    """Linear-layer and attention FLOPs of a training step on one image: forward, and twice that backward."""
    side, total = config.image_size // config.patch_size, 0.0
    total += side**2 * config.patch_size**2 * config.num_channels * config.embed_dim
    for stage, depth in enumerate(config.depths):
        tokens, width = (side // 2**stage) ** 2, config.width(stage)
        block = 4 * width * width + 2 * width * int(config.mlp_ratio * width) + 2 * config.window_size**2 * width
        merging = tokens / 4 * 8 * width * width if stage < len(config.depths) - 1 else 0
        total += depth * tokens * block + merging
    return 6 * (total + config.hidden_size * CLASSES)


def main(
    sizes: tuple[str, ...] = ("tiny",),
    precisions: tuple[str, ...] = ("no", "bf16"),
    batch_size: int = 8,
    image_size: int = 224,
    steps: int = 1,
    rounds: int = 5,
    memory: bool = True,
    compile: bool = False,
    peak_tflops: float | None = None,
) -> None:
    """Measure and write benchmarks/results/swin_training.json.

    Args:
        sizes: of the Swin Transformer.
        precisions: no (float32) and bf16.
        batch_size: images in a step.
        image_size: pixels.
        steps: steps in a round.
        rounds: timed rounds; medians are reported.
        memory: also measure the memory of training.
        compile: compile every implementation.
        peak_tflops: dense bf16 rate of the GPU, which MFU is a share of; default, its data sheet's where known.
    """
    peak = (peak_tflops or data_sheet_tflops()) * 1e12
    models = {}
    for size in sizes:
        setting = SwinSetting("swin", size, image_size, batch_size, compile, None)
        megabytes = measure_memory(setting, precisions) if memory else {}
        rates = measure_rates(setting, precisions, steps, rounds, inference=True)
        models[f"swin {size}"] = {**report(rates, precisions, setting.flops(), peak), "peak_megabytes": megabytes}
        print(f"swin {size}", models[f"swin {size}"], flush=True)
    common.write(
        "swin_training",
        {"batch_size": batch_size, "image_size": image_size, "rounds": rounds, "compile": compile, "models": models},
    )
