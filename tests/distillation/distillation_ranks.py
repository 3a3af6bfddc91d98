"""Code that test_distillation_ranks.py runs on every rank: `main`."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from distillation_helpers import bert, distillation, language_task, sentences, training_samples
from safetensors.torch import save_file

from hf_tfm.data.batching import StepLoader
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.distillation.cache import CachedTeacher, CacheFormat, write_cache
from hf_tfm.distillation.resolve import signals_of
from hf_tfm.distillation.student import StudentWithProjections, freeze_unused
from hf_tfm.tasks.distillation import DistillationTask
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.checkpoint import full_weights
from hf_tfm.training.optim import build_optimizer

TERMS = {
    "pretraining": [
        {"kind": "label"},
        {"kind": "soft_target", "temperature": 2.0},
        {"kind": "cosine", "projection": "linear"},
    ],
    "layers": [{"kind": "hidden_state"}, {"kind": "embedding"}, {"kind": "attention_score"}],
}


def build(name: str) -> tuple[DistillationTask, StudentWithProjections]:
    """A distillation task and the student it trains."""
    return distillation(language_task(), bert(4), bert(2, 16, seed=1), TERMS[name])


def train_steps(
    accelerator: Accelerator, task: DistillationTask, model: StudentWithProjections, micro: int | None
) -> dict[str, Any]:
    """Weights after an epoch of three steps; the last step has one sample, fewer than there are processes."""
    rows = sentences(9)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    loader = StepLoader(rows, BatchSampler(len(rows), 4, seed=1), task.collator(), micro, **ranks)
    freeze_unused(accelerator, task, model, task.collator()(rows[:1], [0], 0))
    args = TrainingArguments(output_dir=".", max_steps=2, adam_epsilon=1e-4, warmup_steps=0)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    prepared.train()
    for step in loader.epoch(0):
        train_step(accelerator, task, prepared, optimizer, step)
    return full_weights(accelerator.unwrap_model(prepared))


def cache(accelerator: Accelerator | None, folder: Path) -> DistillationTask:
    """A task whose teacher cache is written by all processes together."""
    task, _ = build("layers")
    names = signals_of(task.terms, "teacher")
    form = CacheFormat(names, dtype="fp32", shard_samples=2)
    report = write_cache(task.source, training_samples(task, sentences(9)), folder, form, accelerator=accelerator)
    assert report.samples == 9
    return DistillationTask.around(task.task, CachedTeacher(folder), task.terms)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    cached = cache(accelerator, folder / "cache")
    for name in TERMS:
        for micro in (None, 1):
            task, model = build(name)
            weights = train_steps(accelerator, cached if micro and name == "layers" else task, model, micro)
            if accelerator.is_main_process:
                save_file(weights, folder / f"{name}-{micro}.safetensors")
    accelerator.end_training()
