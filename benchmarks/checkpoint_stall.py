"""How long training stands still for a checkpoint, if it is written at once and if a thread writes it.

python -m benchmarks checkpoint_stall

Trains a GPT with random weights on random tokens, by default of about 100 million parameters, and writes checkpoints
of weights and two moments. At once: training waits until the files are complete. With a thread: it waits for the copy
in host memory. Steps beside the write may be slower; the delay is the time until the write ends, less that of as many
steps without one.
"""

import statistics
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.arguments import TrainingArguments
from hf_tfm.training.checkpoint import Progress, checkpoints, discard
from hf_tfm.training.checkpoint_writer import CheckpointWriter
from hf_tfm.training.optim import build_optimizer, build_schedule

from . import common

MINUTE = 60.0  # seconds between checkpoints to which shares are relative


def main(
    hidden_size: int = 768,
    layers: int = 11,
    vocab_size: int = 32_000,
    batch_size: int = 1,
    length: int = 64,
    steps: int = 5,
    rounds: int = 3,
    folder: str | None = None,
) -> None:
    """Measure and write benchmarks/results/checkpoint_stall.json.

    Args:
        hidden_size, layers, vocab_size: of the model.
        batch_size, length: sequences of a step, and their tokens.
        steps: steps without a checkpoint that are timed in each round.
        rounds: timed rounds, after one warm-up round; medians are reported.
        folder: existing folder on the disk to measure; default, that of temporary files.
    """
    accelerator = Accelerator()
    torch.manual_seed(0)
    config = TfmGPTConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 32,
        max_position_embeddings=length,
        bos_token_id=None,
        eos_token_id=None,
    )
    args = TrainingArguments(output_dir="run", max_steps=1_000_000, warmup_steps=0)
    model = TfmGPTForCausalLM(config)
    model, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    schedule = build_schedule(optimizer, args, args.max_steps)
    progress = Progress()

    def step() -> float:
        start = time.perf_counter()
        tokens = torch.randint(vocab_size, (batch_size, length), device=accelerator.device)
        accelerator.backward(model(input_ids=tokens, labels=tokens).loss)
        optimizer.step()
        optimizer.zero_grad()
        progress.step += 1
        if accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    found: dict[str, list[float]] = {name: [] for name in ("at once", "with a thread", "delay with a thread")}
    with tempfile.TemporaryDirectory(dir=folder) as output, CheckpointWriter(accelerator, Path(output)) as writer:
        for number in range(-1, rounds):
            plain = [step() for _ in range(steps)]
            start = time.perf_counter()
            writer.save(progress, model, optimizer, schedule)
            copied = time.perf_counter()
            beside = 0
            while not writer.jobs[0].done():
                step()
                beside += 1
            delay = time.perf_counter() - start - beside * statistics.median(plain)
            size = finish(writer)
            step()
            again = time.perf_counter()
            writer.save(progress, model, optimizer, schedule)
            writer.wait()
            whole = time.perf_counter() - again
            finish(writer)
            if number >= 0:
                for name, value in zip(found, (whole, copied - start, delay), strict=True):
                    found[name].append(value)
    seconds = {name: statistics.median(values) for name, values in found.items()}
    common.write(
        "checkpoint_stall",
        {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "megabytes": round(size / 1e6, 1),
            "rounds": rounds,
            "seconds": {name: round(value, 4) for name, value in seconds.items()},
            "share_of_a_minute": {name: round(value / MINUTE, 5) for name, value in seconds.items()},
        },
    )


def finish(writer: CheckpointWriter) -> int:
    """Wait for a checkpoint, delete it and return its size in bytes."""
    writer.wait()
    (saved,) = checkpoints(writer.output_dir)
    size = sum(path.stat().st_size for path in saved.iterdir())
    discard(saved)
    return size
