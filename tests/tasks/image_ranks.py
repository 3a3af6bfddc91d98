"""Code that test_image_ranks.py runs on every rank: `main`."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from image_tasks import CASES, classification, evaluation_loader, examples, tiny_vit, training_loader
from safetensors.torch import save_file

from hf_tfm.data.images import WatchedLoader
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.checkpoint import full_weights
from hf_tfm.training.optim import build_optimizer

BAD = (4, 9)


def train_steps(accelerator: Accelerator, name: str, micro: int | None) -> dict[str, torch.Tensor]:
    """Weights after an epoch of two steps."""
    make, build = CASES[name]
    task = make()
    # A large epsilon keeps the rounding noise of zero gradients small.
    args = TrainingArguments(output_dir=".", max_steps=2, adam_epsilon=1e-4, warmup_steps=0)
    model = build()
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    prepared.train()
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    for step in WatchedLoader(training_loader(task, examples(bad=BAD), micro=micro, **ranks)).epoch(0):
        train_step(accelerator, task, prepared, optimizer, step)
    return full_weights(model)


def prediction(accelerator: Accelerator, count: int) -> list:
    """Results of `predict` for some images, as lists."""
    task = classification()
    task.accelerator = accelerator
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = WatchedLoader(evaluation_loader(task, examples(count, bad=BAD), **ranks))
    found = task.predict(tiny_vit(), loader)
    return [found.indices.tolist(), found.labels.tolist(), found.top.tolist(), found.loss]


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for name in CASES:
        for micro in (None, 2):
            weights = train_steps(accelerator, name, micro)
            if accelerator.is_main_process:
                save_file(weights, folder / f"{name}-{micro}.safetensors")
    report = [prediction(accelerator, count) for count in (11, 1)]  # with one image, the second process has none
    (folder / f"report{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()
