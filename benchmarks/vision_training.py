"""Vision speed: images per second of our ViT and masked autoencoder against transformers', timm's and the authors'.

python -m benchmarks vision_training [--mae_authors DIR]

Training steps (forward, backward, AdamW) and inference on random images, contestants in turn, fp32 and bf16 autocast.
Peers step as their users write it, `torch.optim.AdamW` with its defaults in a plain loop; ours is `train_step`.
"""

import statistics
import sys
from collections.abc import Callable
from functools import partial

import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining, TfmViTConfig, TfmViTForImageClassification
from hf_tfm.models.configuration_vit import SIZES
from hf_tfm.models.modeling_mae import num_visible
from hf_tfm.models.positions import sincos_2d
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.optim import build_optimizer

from . import common, peers

CLASSES = 1000


class Images:
    """The task of a batch {"x": pixels} for `train_step`: a loss that the model gives itself, or of random labels."""

    item = term = "image"

    def __init__(self, classes: bool):
        self.classes = classes

    def count(self, batch: dict[str, Tensor]) -> dict[str, int]:
        return {"image": len(batch["x"])}

    def losses(self, model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if self.classes:
            logits = model(pixel_values=batch["x"]).logits.float()
            return {"image": nn.functional.cross_entropy(logits, batch["y"], reduction="sum")}
        return {"image": model(pixel_values=batch["x"]).loss * len(batch["x"])}


def native_mae(size: str, image_size: int) -> ViTMAEForPreTraining:
    """transformers' masked autoencoder, its position tables filled (in 5.23 they start as zeros)."""
    model = ViTMAEForPreTraining(ViTMAEConfig(**SIZES[size], image_size=image_size))
    side = image_size // model.config.patch_size
    for table in (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed):
        table.data[:, 1:] = sincos_2d(side, side, table.shape[-1])
    return model


def authors_mae(folder: str, size: str) -> nn.Module:
    """The authors' model, from a copy of facebookresearch/mae made to run with today's timm and numpy."""
    sys.path.insert(0, folder)
    import models_mae

    return getattr(models_mae, f"mae_vit_{size}_patch{SIZES[size].get('patch_size', 16)}")(norm_pix_loss=False)


def classifiers(size: str, image_size: int) -> dict[str, tuple[nn.Module, Callable]]:
    """Contestants in classification: model, and (model, pixels) -> logits."""
    shape = {**SIZES[size], "image_size": image_size, "num_labels": CLASSES}
    return {
        "ours": (TfmViTForImageClassification(TfmViTConfig(**shape)), lambda m, x: m(pixel_values=x).logits),
        "transformers": (ViTForImageClassification(ViTConfig(**shape)), lambda m, x: m(pixel_values=x).logits),
        "timm": (timm.create_model(f"vit_{size}_patch16_224", img_size=image_size), lambda m, x: m(x)),
    }


def autoencoders(size: str, image_size: int, authors: str | None) -> dict[str, tuple[nn.Module, Callable]]:
    """Contestants in masked-autoencoder pretraining: model, and (model, pixels) -> mean loss."""
    config = TfmMAEConfig.of_size(size, image_size=image_size)
    found = {
        "ours": (TfmMAEForPreTraining(config), lambda m, x: m(pixel_values=x).loss),
        "transformers": (native_mae(size, image_size), lambda m, x: m(pixel_values=x).loss),
    }
    if authors:
        found["authors"] = (authors_mae(authors, size), lambda m, x: m(x, mask_ratio=0.75)[0])
    return found


def trainer(name: str, model: nn.Module, forward: Callable, batch: dict[str, Tensor], precision: str, classes: bool):
    """A function that makes one training step of a contestant."""
    accelerator = Accelerator(mixed_precision=precision)
    model.train()
    if name == "ours":
        args = TrainingArguments(output_dir=".", num_steps=1, learning_rate=1e-4, weight_decay=0.05)
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


def training_flops(config: TfmViTConfig | TfmMAEConfig, tokens: int, masked: bool) -> float:
    """Linear-layer and attention FLOPs of a training step on one image: forward, and twice that backward."""

    def blocks(depth: int, width: int, inner: int, length: int) -> float:
        return depth * length * (4 * width * width + 2 * width * inner + 2 * length * width)

    D, patch = config.hidden_size, config.patch_size**2 * config.num_channels
    if not masked:
        shape = config.num_hidden_layers, D, config.intermediate_size
        return 6 * (tokens * patch * D + blocks(*shape, tokens + 1) + D * CLASSES)
    visible, E = num_visible(tokens, config.mask_ratio), config.decoder_hidden_size
    encoder = visible * patch * D + blocks(config.num_hidden_layers, D, config.intermediate_size, visible + 1)
    decoder = blocks(config.decoder_num_hidden_layers, E, config.decoder_intermediate_size, tokens + 1)
    return 6 * (encoder + (visible + 1) * D * E + decoder + tokens * E * patch)


def main(
    vit: tuple[str, ...] = ("small", "base"),
    mae: tuple[str, ...] = ("base",),
    precisions: tuple[str, ...] = ("no", "bf16"),
    batch_size: int = 8,
    image_size: int = 224,
    steps: int = 1,
    rounds: int = 5,
    inference: bool = True,
    compile: bool = False,
    mae_authors: str | None = None,
) -> None:
    """Measure and write benchmarks/results/vision_training.json.

    Args:
        vit: sizes of the Vision Transformer, patches of 16.
        mae: sizes of the masked autoencoder, 75 % masked.
        precisions: no (float32) and bf16.
        batch_size: images in a step.
        image_size: pixels.
        steps: steps in a round.
        rounds: timed rounds; medians are reported.
        inference: also time inference of the classifiers.
        compile: compile every contestant.
        mae_authors: folder of a copy of facebookresearch/mae that runs with this torch and timm.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    images = torch.randn(batch_size, 3, image_size, image_size, device=device)
    batch = {"x": images, "y": torch.randint(CLASSES, (batch_size,), device=device)}
    tokens = (image_size // 16) ** 2
    results = {}
    plan = [("vit", size, partial(classifiers, size, image_size)) for size in vit]
    plan += [("mae", size, partial(autoencoders, size, image_size, mae_authors)) for size in mae]
    for kind, size, make in plan:
        variants: dict[str, Callable[[int], float]] = {}
        for precision in precisions:
            AcceleratorState._reset_state()  # one process may else have one precision only
            for name, (model, forward) in make().items():
                model = torch.compile(model.to(device)) if compile else model.to(device)
                step = trainer(name, model, forward, batch, precision, kind == "vit")
                label = f"{name} {'fp32' if precision == 'no' else precision}"
                variants[f"train {label}"] = partial(repeated, step, steps, batch_size)
                if inference and kind == "vit":
                    run = partial(infer, model, forward, images, precision == "bf16")
                    variants[f"infer {label}"] = partial(repeated, run, steps, batch_size)
        rates = common.interleaved(variants, rounds)
        config = (TfmViTConfig if kind == "vit" else TfmMAEConfig).of_size(size, image_size=image_size)
        results[f"{kind} {size}"] = report(rates, precisions, training_flops(config, tokens, kind == "mae"))
        print(f"{kind} {size}", results[f"{kind} {size}"], flush=True)
    common.write(
        "vision_training",
        {"batch_size": batch_size, "image_size": image_size, "rounds": rounds, "compile": compile, "models": results},
    )


def repeated(work: Callable[[], None], steps: int, batch_size: int, number: int) -> int:
    """Do ``work`` several times; returns images worked through."""
    for _ in range(steps):
        work()
    return steps * batch_size


def infer(model: nn.Module, forward: Callable, images: Tensor, bf16: bool) -> None:
    """One forward in evaluation mode."""
    model.eval()
    with torch.inference_mode(), torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        forward(model, images)
    model.train()


def report(rates: dict[str, list[float]], precisions, flops: float) -> dict:
    """Medians, our ratios to each peer, and the share of the floor our training reaches."""
    out: dict = {
        "images_per_second": {name: round(statistics.median(r), 2) for name, r in rates.items()},
        "ratios": {},
        "share_of_floor": {},
    }
    for name in rates:
        doing, who, precision = name.split()
        if who != "ours":
            out["ratios"][f"{doing}: ours / {who}, {precision}"] = round(
                common.ratio(rates, f"{doing} ours {precision}", name), 2
            )
            if precision == "fp32" and f"{doing} ours bf16" in rates:
                out["ratios"][f"{doing}: ours bf16 / {who} fp32"] = round(
                    common.ratio(rates, f"{doing} ours bf16", name), 2
                )
    for precision in precisions:
        label = "fp32" if precision == "no" else precision
        rate = common.matmul_rate(peers.dtype_of(precision))
        out["share_of_floor"][label] = {
            "matmul_gflops": round(rate / 1e9),
            "gflop_per_image": round(flops / 1e9, 1),
            "share": round(statistics.median(rates[f"train ours {label}"]) * flops / rate, 3),
        }
    return out
