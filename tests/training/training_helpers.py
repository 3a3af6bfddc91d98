"""Shared helpers of the training tests: a tiny model, tiny data, and processes that may be killed."""

import hashlib
import importlib
import itertools
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import processes
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import Tensor

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration
from hf_tfm.data.batching import StepLoader, TokenBudgetSampler
from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training import TokenBatchArguments, evaluate, train
from hf_tfm.training.checkpoint import full_weights
from hf_tfm.training.run import start_accelerator

VOCABULARY = 40
# A key bias shifts all scores of a query equally, so it has no effect and its gradient is rounding noise. Adam
# divides that noise by its own magnitude; a large epsilon keeps it small, so all weights can be compared.
OPTIONS = {"max_steps": 12, "batch_tokens": 60, "warmup_steps": 4, "logging_steps": 3, "adam_epsilon": 1e-4}


def tiny_model(seed: int = 0, **fields) -> TfmTransformerForConditionalGeneration:
    """One block per stack, random weights, no dropout unless requested."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    depth = {"num_encoder_layers": 1, "num_decoder_layers": 1, "dropout": 0.0}
    return TfmTransformerForConditionalGeneration(
        TfmTransformerConfig(**{**sizes, **depth, "vocab_size": VOCABULARY, **fields})
    )


def pairs(count: int = 50, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random sentences of 3 to 12 tokens; the target is the source, reversed and slightly shorter."""
    random = np.random.default_rng(seed)
    rows = []
    for length in random.integers(3, 13, count):
        source = random.integers(5, VOCABULARY, length).tolist()
        rows.append({"input_ids": [*source, 2], "labels": [*source[: max(2, length - 2)][::-1], 2]})
    return rows


def tiny_loader(rows: list, task: TranslationTask, args: TokenBatchArguments, accelerator: Accelerator) -> StepLoader:
    """Shuffled steps of ``rows`` for this rank."""
    lengths = np.array([[len(row["input_ids"]), len(row["labels"])] for row in rows])
    sampler = TokenBudgetSampler(lengths, args.batch_tokens, args.seed)
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return StepLoader(
        rows,
        sampler,
        task.collator(),
        args.micro_batch_tokens,
        num_workers=args.dataloader_num_workers,
        **ranks,
    )


def fresh_accelerator(args: TokenBatchArguments | None = None) -> Accelerator:
    """An accelerator as in a new process."""
    if not torch.distributed.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return start_accelerator(args or arguments("."))


def arguments(folder: Path | str, **overrides) -> TokenBatchArguments:
    """Options of a short run."""
    return TokenBatchArguments(output_dir=str(folder), progress=False, **{**OPTIONS, **overrides})


def await_checkpoints(folder: Path | str) -> None:
    """Wait until the checkpoints that a run in this process has begun are in place."""
    while any(Path(folder).glob("checkpoints/.part-*")):
        time.sleep(0.001)


class FaultyLoader:
    """A loader that sends this process a signal before given steps, after the checkpoints of earlier steps are in
    place: {step number: signal name}."""

    def __init__(self, loader: StepLoader, events: dict[int, str], folder: Path | str):
        self.loader, self.events, self.folder = loader, events, folder
        self.steps_per_epoch = loader.steps_per_epoch

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Any]]:
        first = sum(map(self.loader.steps_per_epoch, range(epoch))) + start
        for number, step in enumerate(self.loader.epoch(epoch, start), start=first):
            if event := self.events.get(number):
                await_checkpoints(self.folder)
                if event == "SIGINT":  # background jobs of a script ignore SIGINT
                    signal.signal(signal.SIGINT, signal.default_int_handler)
                if event == "SIGTERM" and os.getpgrp() == os.getpid():
                    # A cluster sends SIGTERM to all processes of a job, including the data loader workers; it comes
                    # from another process, because workers treat a signal from their parent differently.
                    subprocess.run(["kill", "-TERM", "--", f"-{os.getpid()}"], start_new_session=True, check=True)
                else:
                    os.kill(os.getpid(), getattr(signal, event))
                if event == "SIGTERM":  # the kernel may give it to another thread, which is later than this step
                    request = signal.getsignal(signal.SIGTERM).__self__
                    while not request.set:
                        time.sleep(0.001)
            yield step


class FaultyTask(TranslationTask):
    """A task with non-finite losses at the given training steps (counted by `losses`)."""

    bad: dict[int, float]
    done = 0

    def losses(self, model: torch.nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        losses = super().losses(model, batch)
        if model.training:
            if self.done in self.bad:
                losses["token"] = losses["token"] * self.bad[self.done]
            self.done += 1
        return losses


def run_training(
    args: TokenBatchArguments,
    model: TfmTransformerForConditionalGeneration | None = None,
    events: dict[int, str] | None = None,
    bad: dict[int, float] | None = None,
    rows: list | None = None,
    eval_steps: int = 5,
    accelerator: Accelerator | None = None,
    stop_evaluation: int | None = None,
    stop_signal: str = "SIGTERM",
) -> tuple[Any, TfmTransformerForConditionalGeneration]:
    """Train a tiny model with the real `train`; returns its result and the model.

    Args:
        stop_evaluation: send ``stop_signal`` during this evaluation, counted from 1, after its checkpoint is in place.
    """
    accelerator = accelerator or fresh_accelerator(args)
    model = model or tiny_model(args.seed)
    task = (FaultyTask if bad else TranslationTask).for_model(model, seed=args.seed)
    if bad:
        task.bad = bad
    rows = rows or pairs()
    held_out = tiny_loader(pairs(20, seed=1), task, arguments(args.output_dir), accelerator)

    evaluations = itertools.count(1)

    def score(trained) -> dict[str, float]:
        if next(evaluations) == stop_evaluation:
            await_checkpoints(args.output_dir)
            os.kill(os.getpid(), getattr(signal, stop_signal))
        return evaluate(accelerator, task, trained, held_out)

    loader = FaultyLoader(tiny_loader(rows, task, args, accelerator), events or {}, args.output_dir)
    return train(accelerator, task, model, loader, args, args.max_steps, args.eval_steps or eval_steps, score), model


def digest(weights: dict[str, Tensor]) -> str:
    """SHA-256 of the exact values of some tensors."""
    total = hashlib.sha256()
    for name in sorted(weights):
        total.update(name.encode() + weights[name].detach().contiguous().numpy().tobytes())
    return total.hexdigest()


def history(folder: Path) -> list[dict[str, Any]]:
    """The rows of history.jsonl without timing values."""
    rows = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in ("items_per_second", "seconds")} for row in rows]


def difference(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """The largest absolute difference of two sets of weights."""
    assert first.keys() == second.keys()
    return max((first[name] - second[name]).abs().max().item() for name in first)


def kill_at_call(path: str, number: int) -> None:
    """Kill this process at the ``number``-th call of a function, given as "module.function"."""
    module, name = path.rsplit(".", 1)
    owner = importlib.import_module(module)
    function, calls = getattr(owner, name), itertools.count(1)

    def killing(*args, **kwargs):
        if next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    setattr(owner, name, killing)


def child(report: str, overrides: dict[str, Any], fields: dict[str, Any], options: dict[str, Any]) -> None:
    """Entry point of the processes of `start`."""
    torch.set_num_threads(1)
    if kill_at := options.pop("kill_at", None):
        kill_at_call(*kill_at)
    if limit := options.pop("file_limit", None):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    args = TokenBatchArguments(**overrides)
    try:
        result, model = run_training(args, tiny_model(args.seed, **fields), **options)
    except OSError as error:
        Path(report).write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
        sys.exit(3)
    content = {"weights": digest(full_weights(model)), "stopped": result.stopped, "step": result.progress.step}
    Path(report).write_text(json.dumps(content))


def start(
    args: TokenBatchArguments, fields: dict[str, Any] | None = None, timeout: float = 200, **options
) -> tuple[int, dict[str, Any] | None]:
    """Train in a new process.

    Args:
        fields: configuration fields of the model.
        options: see `run_training`; also ``kill_at``, arguments of `kill_at_call`, and ``file_limit``, the maximum
            file size in bytes, which simulates a full disk.

    Returns:
        The exit code, negative for a signal, and the report of a run that finished.
    """
    report = Path(args.output_dir).with_suffix(".json")
    report.unlink(missing_ok=True)
    process = processes.start(child, str(report), asdict(args), fields or {}, options)
    return process.wait(timeout), json.loads(report.read_text()) if report.is_file() else None
