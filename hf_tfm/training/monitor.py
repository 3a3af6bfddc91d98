"""Training logs: progress bar, history.jsonl and trackers.

result of a step -> sums on the device -> every logging_steps: means -> history.jsonl, trackers, terminal
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm.auto import tqdm

from ..arguments import TrainingArguments
from ..tasks.base import widest_float
from .checkpoint import Progress
from .folder import History


class Monitor:
    """Count steps, items and time, and log them.

    Sums stay on the device between log lines, because reading them synchronises with the host.

    Args:
        progress: state of the run; updated by `record` and when time is counted.
        item: name of the counted items, for example "target tokens".
        statistics: terms of the loss that are not part of it, see `tasks.base.Task`.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        args: TrainingArguments,
        max_steps: int,
        progress: Progress,
        item: str,
        statistics: Sequence[str] = (),
    ):
        self.accelerator, self.max_steps, self.progress, self.item = accelerator, max_steps, progress, item
        self.statistics = statistics
        self.history = (
            History(Path(args.output_dir), progress.step, progress.pending) if accelerator.is_main_process else None
        )
        self.window = {name: self.tensor(value) for name, value in progress.window.items()}
        self.items = self.tensor(progress.items)
        self.skipped = self.tensor(progress.skipped)
        self.streak = self.tensor(progress.streak)
        self.bar = tqdm(
            total=max_steps,
            initial=progress.step,
            desc="train",
            unit="step",
            disable=not (accelerator.is_main_process and args.progress),
            dynamic_ncols=True,
        )
        self.limit = math.inf if args.max_minutes is None else 60.0 * args.max_minutes  # seconds of training
        self.clock = time.perf_counter()

    def tensor(self, value: float | Tensor) -> Tensor:
        """Convert a number to a scalar tensor on the device, in float64 if supported."""
        device = self.accelerator.device
        return torch.as_tensor(value, dtype=widest_float(device), device=device)

    def add(self, losses: dict[str, Tensor], gradient_norm: Tensor, items: Tensor) -> None:
        """Count a step; with a non-finite gradient it counts as skipped, and its items do not count as trained on."""
        good = torch.isfinite(gradient_norm)
        numbers = {f"loss/{term}": loss for term, loss in losses.items()}
        for name, value in {**numbers, "gradient_norm": gradient_norm, "steps": good}.items():
            self.window[name] = self.window.get(name, 0) + self.tensor(value).where(good, 0.0)
        self.window["items"] = self.window.get("items", 0) + self.tensor(items)
        self.items += self.tensor(items).where(good, 0.0)
        self.skipped += ~good
        self.streak = (self.streak + 1) * ~good

    def record(self) -> None:
        """Update ``progress``; called on all ranks, because losses are averaged over ranks."""
        self.count_time()
        self.window |= self.mean_losses()
        self.progress.window = {name: value.item() for name, value in self.window.items()}
        self.progress.items = int(self.items.item())
        self.progress.skipped = int(self.skipped.item())
        self.progress.streak = int(self.streak.item())

    @property
    def seconds(self) -> float:
        """Training time until now."""
        return self.progress.seconds + time.perf_counter() - self.clock

    def count_time(self) -> None:
        """Add the time since the last call to the training time."""
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.progress.seconds += now - self.clock
        self.clock = now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time in this context from the training time."""
        self.count_time()
        try:
            yield
        finally:
            self.clock = time.perf_counter()

    def mean_losses(self) -> dict[str, Tensor]:
        """Return sums of losses since the last log line, averaged over ranks, which each hold only their share."""
        losses = {name: value for name, value in self.window.items() if name.startswith("loss/")}
        return self.accelerator.reduce(losses, "mean") if self.accelerator.num_processes > 1 else losses

    def log(self, learning_rate: float) -> None:
        """Log the means since the last log line."""
        self.count_time()
        progress = self.progress
        losses = {name: value.item() for name, value in self.mean_losses().items()}
        window = {name: value.item() for name, value in self.window.items()}
        steps = max(window["steps"], 1.0)
        names = [name for name in self.statistics if f"loss/{name}" in losses]
        statistics = {name: losses.pop(f"loss/{name}") / steps for name in names}
        seconds = max(progress.seconds - progress.logged_seconds, 1e-9)
        row = {
            "step": progress.step,
            "epoch": progress.epoch,
            "loss": sum(losses.values()) / steps,
            "learning_rate": learning_rate,
            "gradient_norm": window["gradient_norm"] / steps,
            "skipped": int(self.skipped.item()),
            "items_per_second": window["items"] / seconds,
        }
        if len(losses) > 1:
            row |= {name: value / steps for name, value in losses.items()}
        row |= statistics
        self.window, progress.logged_seconds = {}, progress.seconds
        self.write(row)
        speed = f"loss {row['loss']:.3f}, {row['items_per_second']:.0f} {self.item}/s"
        self.bar.set_postfix_str(speed)
        if self.bar.disable:  # without a bar, for example in a log file, print a line instead
            left = progress.seconds / progress.step * (self.max_steps - progress.step)
            left = max(0.0, min(left, self.limit - progress.seconds))
            self.say(f"step {progress.step} of {self.max_steps}: {speed}, {timedelta(seconds=round(left))} left")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, with the training time so far, to history.jsonl, and send it to the trackers."""
        row = {**row, "seconds": round(self.progress.seconds, 2)}
        if self.history is not None:
            self.history.add(row)
        numbers = {k: v for k, v in row.items() if isinstance(v, (int, float)) and k != "step"}
        numbers |= {f"evaluation/{k}": v for k, v in row.get("evaluation", {}).items()}
        self.accelerator.log(numbers, step=row["step"])

    def say(self, text: str) -> None:
        """Print a line above the progress bar, on the main process."""
        if self.accelerator.is_main_process:
            tqdm.write(text)
