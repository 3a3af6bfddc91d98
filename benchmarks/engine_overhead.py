"""Overhead of the training engine over a plain loop with the same model.

python -m benchmarks engine_overhead

Both compute the same loss of the same batch, clip the gradient, and step a fused Adam and its schedule. The engine, a
`training.session.Session`, also counts items over micro-batches and ranks, seeds dropout, skips steps that are not
finite, looks for signals, and logs. On a CPU, seconds are those of the process, which other work on the machine does
not change much.
"""

import statistics
import tempfile
import time
from copy import deepcopy

import torch
from accelerate import Accelerator

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration
from hf_tfm.arguments import TrainingArguments
from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training.optim import build_optimizer, build_schedule
from hf_tfm.training.session import Session
from hf_tfm.training.sigterm import StopRequest

from . import common

NEVER = 1_000_000  # a step that is not reached


def main(
    sizes: tuple[str, ...] = ("tiny", "base"),
    vocab_size: int = 10_000,
    batch_size: int = 32,
    length: int = 32,
    steps: int = 4,
    rounds: int = 7,
) -> None:
    """Measure and write benchmarks/results/engine_overhead.json.

    Args:
        sizes: of TfmTransformerConfig.
        vocab_size: of the model.
        batch_size, length: pairs of a step, and tokens of each side.
        steps: steps of both in each round.
        rounds: timed rounds, after one warm-up round; medians are reported.
    """
    results = {}
    for size in sizes:
        config = TfmTransformerConfig.of_size(size, vocab_size=vocab_size)
        results[size] = measure(config, batch_size, length, steps, rounds)
    common.write(
        "engine_overhead",
        {"batch_size": batch_size, "length": length, "steps": steps, "rounds": rounds, "sizes": results},
    )


def measure(config: TfmTransformerConfig, batch_size: int, length: int, steps: int, rounds: int) -> dict:
    """Return seconds of a step of both, and the share that the engine adds."""
    accelerator = Accelerator()
    torch.manual_seed(0)
    model = TfmTransformerForConditionalGeneration(config).to(accelerator.device).train()
    plain = deepcopy(model)
    task = TranslationTask.for_model(model)
    tokens = torch.randint(5, config.vocab_size, (batch_size, 2, length)).tolist()
    rows = [{"input_ids": source, "labels": target} for source, target in tokens]
    batch = {name: value.to(accelerator.device) for name, value in task.collator()(rows, range(batch_size), 0).items()}
    on_gpu = accelerator.device.type == "cuda"
    clock = time.perf_counter if on_gpu else time.process_time
    seconds: dict[str, list[float]] = {"plain": [], "engine": []}
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, max_steps=NEVER, warmup_steps=0, max_grad_norm=1.0, progress=False, logging_steps=steps
        )
        session = Session(accelerator, task, model, args, NEVER, lambda trained: {}, NEVER)
        optimizer = build_optimizer(plain, args)
        schedule = build_schedule(optimizer, args, NEVER)
        request = StopRequest()

        def plain_step() -> None:
            loss = task.losses(plain, batch)["token"] / task.count(batch)["token"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(plain.parameters(), args.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

        def engine_step() -> None:
            session.step([batch], False)
            session.end_of_step(request)

        for number in range(-1, rounds):
            for name, step in (("plain", plain_step), ("engine", engine_step)):
                start = clock()
                for _ in range(steps):
                    step()
                if on_gpu:
                    torch.cuda.synchronize()
                if number >= 0:
                    seconds[name].append((clock() - start) / steps)
        session.writer.thread.shutdown()
    shares = [engine / alone - 1 for engine, alone in zip(seconds["engine"], seconds["plain"], strict=True)]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds_per_step": {name: round(statistics.median(values), 5) for name, values in seconds.items()},
        "overhead": round(statistics.median(shares), 4),
    }
