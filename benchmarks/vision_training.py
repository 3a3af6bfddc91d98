"""Vision speed: images per second of our ViT and masked autoencoder against transformers', timm's and the authors'.

python -m benchmarks vision_training [--mae_authors DIR]

Training steps (forward, backward, AdamW) and inference on random images, interleaved, in fp32 and bf16 autocast.
The peers use a plain loop and `torch.optim.AdamW` with its defaults; ours uses `train_step`. Memory is measured over
two training steps, each implementation in a separate process.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

from hf_tfm import TfmMAEConfig, TfmViTConfig
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.optim import build_optimizer

from . import common, peers
from .vision_peers import CLASSES, Forward, Images, autoencoders, classifiers, training_flops

# Dense bf16 TFLOP/s from NVIDIA's data sheets by part of the device name; the first match counts.
PEAK_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H200 NVL": 835, "H100": 989, "H200": 989, "A100": 312}


@dataclass(frozen=True)
class Setting:
    """The task: classification ("vit") or pretraining ("mae") at one size, on the same random images."""

    kind: str
    size: str
    image_size: int
    batch_size: int
    compile: bool
    mae_authors: str | None

    def implementations(self) -> dict[str, tuple[Callable[[], nn.Module], Forward]]:
        """See `classifiers` and `autoencoders`."""
        if self.kind == "vit":
            return classifiers(self.size, self.image_size)
        return autoencoders(self.size, self.image_size, self.mae_authors)

    def batch(self) -> dict[str, Tensor]:
        """Pixels ``x`` (B, 3, H, W) and labels ``y`` (B,)."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        images = torch.randn(self.batch_size, 3, self.image_size, self.image_size, device=device)
        return {"x": images, "y": torch.randint(CLASSES, (self.batch_size,), device=device)}

    def prepare(self, name: str, batch: dict[str, Tensor], precision: str) -> tuple[nn.Module, Callable[[], None]]:
        """The model of a variant, and a function that performs one training step."""
        make, forward = self.implementations()[name]
        model = make().to(batch["x"].device).train()
        model = torch.compile(model) if self.compile else model
        return model, trainer(name, model, forward, batch, precision, self.kind != "mae")

    def flops(self) -> float:
        """See `training_flops`."""
        config = (TfmViTConfig if self.kind == "vit" else TfmMAEConfig).of_size(self.size, image_size=self.image_size)
        return training_flops(config, (self.image_size // config.patch_size) ** 2, self.kind == "mae")


def trainer(
    name: str, model: nn.Module, forward: Forward, batch: dict[str, Tensor], precision: str, classes: bool
) -> Callable[[], None]:
    """A function that performs one training step of a variant."""
    if name == "ours":
        AcceleratorState._reset_state()  # otherwise one process may have only one precision
        accelerator = Accelerator(mixed_precision=precision)
        args = TrainingArguments(output_dir=".", max_steps=1, learning_rate=1e-4, weight_decay=0.05)
        prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
        return lambda: train_step(accelerator, Images(classes), prepared, optimizer, [batch])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05)
    device = batch["x"].device.type

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=precision == "bf16"):
            out = forward(model, batch["x"])
            loss = nn.functional.cross_entropy(out, batch["y"]) if classes else out
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def peak_megabytes(setting: Setting, name: str, precision: str) -> float:
    """Training memory of a variant in MB: weights, gradients, moments and activations.

    The first step creates the moments; the second has them from its start. On a GPU this is torch's peak
    allocation, on a CPU the growth of the process.
    """

    def work() -> None:
        _, step = setting.prepare(name, setting.batch(), precision)
        step()
        step()

    if not torch.cuda.is_available():
        return common.peak_growth(work)
    work()
    return torch.cuda.max_memory_allocated() / 1e6


def main(
    vit: tuple[str, ...] = ("small", "base"),
    mae: tuple[str, ...] = ("base",),
    precisions: tuple[str, ...] = ("no", "bf16"),
    batch_size: int = 8,
    image_size: int = 224,
    steps: int = 1,
    rounds: int = 5,
    inference: bool = True,
    memory: bool = True,
    compile: bool = False,
    mae_authors: str | None = None,
    peak_tflops: float | None = None,
) -> None:
    """Measure and write benchmarks/results/vision_training.json.

    Args:
        vit: sizes of the Vision Transformer.
        mae: sizes of the masked autoencoder, 75 % masked.
        precisions: no (float32) and bf16.
        batch_size: images per step.
        image_size: side in pixels.
        steps: steps per round.
        rounds: timed rounds; medians are reported.
        inference: also measure inference of the classifiers.
        memory: also measure training memory.
        compile: use torch.compile for every implementation.
        mae_authors: folder of a copy of facebookresearch/mae that works with the installed torch and timm.
        peak_tflops: dense bf16 rate of the GPU for MFU; default, the known data-sheet value.
    """
    peak = (peak_tflops or data_sheet_tflops()) * 1e12
    models = {}
    for kind, size in [("vit", size) for size in vit] + [("mae", size) for size in mae]:
        setting = Setting(kind, size, image_size, batch_size, compile, mae_authors)
        megabytes = measure_memory(setting, precisions) if memory else {}
        rates = measure_rates(setting, precisions, steps, rounds, inference and kind == "vit")
        models[f"{kind} {size}"] = {**report(rates, precisions, setting.flops(), peak), "peak_megabytes": megabytes}
        print(f"{kind} {size}", models[f"{kind} {size}"], flush=True)
    common.write(
        "vision_training",
        {"batch_size": batch_size, "image_size": image_size, "rounds": rounds, "compile": compile, "models": models},
    )


def data_sheet_tflops() -> float:
    """Dense bf16 TFLOP/s of the GPU in use; 0 without a known GPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return next((peak for part, peak in PEAK_TFLOPS.items() if part in name), 0.0)


def label(precision: str) -> str:
    return "fp32" if precision == "no" else precision


def measure_memory(setting: Setting, precisions: tuple[str, ...]) -> dict[str, int]:
    """Peak memory of every variant, each in a separate process."""
    return {
        f"train {name} {label(precision)}": round(common.in_fresh_process(peak_megabytes, setting, name, precision))
        for precision in precisions
        for name in setting.implementations()
    }


def measure_rates(
    setting: Setting, precisions: tuple[str, ...], steps: int, rounds: int, inference: bool
) -> dict[str, list[float]]:
    """Images per second of every variant in each round."""
    variants: dict[str, Callable[[int], float]] = {}
    batch = setting.batch()
    for precision in precisions:
        for name, (_, forward) in setting.implementations().items():
            model, step = setting.prepare(name, batch, precision)
            variants[f"train {name} {label(precision)}"] = partial(repeated, step, steps, setting.batch_size)
            if inference:
                run = partial(infer, model, forward, batch["x"], precision == "bf16")
                variants[f"infer {name} {label(precision)}"] = partial(repeated, run, steps, setting.batch_size)
    return common.interleaved(variants, rounds)


def repeated(work: Callable[[], None], steps: int, batch_size: int, number: int) -> int:
    """Call ``work`` several times; returns the number of images processed."""
    for _ in range(steps):
        work()
    return steps * batch_size


def infer(model: nn.Module, forward: Callable, images: Tensor, bf16: bool) -> None:
    """One forward pass in evaluation mode."""
    model.eval()
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        forward(model, images)
    model.train()


def report(rates: dict[str, list[float]], precisions: tuple[str, ...], flops: float, peak: float) -> dict:
    """Medians, our ratios to each peer, and the efficiency of our training.

    Args:
        flops: FLOPs of a training step per image.
        peak: bf16 FLOP/s of the device for ``mfu`` (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); 0 omits it.
    """
    out: dict = {
        "images_per_second": {name: round(statistics.median(r), 2) for name, r in rates.items()},
        "ratios": {},
        "share_of_floor": {},
        "mfu": {},
    }
    for name in rates:
        doing, who, precision = name.split()
        if peak and (doing, precision) == ("train", "bf16"):
            out["mfu"][name] = round(statistics.median(rates[name]) * flops / peak, 3)
        if who != "ours":
            out["ratios"][f"{doing}: ours / {who}, {precision}"] = round(
                common.ratio(rates, f"{doing} ours {precision}", name), 2
            )
            if precision == "fp32" and f"{doing} ours bf16" in rates:
                out["ratios"][f"{doing}: ours bf16 / {who} fp32"] = round(
                    common.ratio(rates, f"{doing} ours bf16", name), 2
                )
    side = 8192 if torch.cuda.is_available() else 1024  # a GPU is mostly idle during small products
    for precision in precisions:
        rate = common.matmul_rate(peers.dtype_of(precision), side, side)
        out["share_of_floor"][label(precision)] = {
            "matmul_gflops": round(rate / 1e9),
            "gflop_per_image": round(flops / 1e9, 1),
            "share": round(statistics.median(rates[f"train ours {label(precision)}"]) * flops / rate, 3),
        }
    return out
