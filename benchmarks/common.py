"""Shared by all benchmarks: interleaved timing, memory, the machine's matrix-product rate, and the results file."""

import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from hf_tfm.hub.results import collect_versions, describe_hardware

RESULTS = Path(__file__).parent / "results"


def interleaved(variants: dict[str, Callable[[int], float]], rounds: int) -> dict[str, list[float]]:
    """Run every variant once per round, in turn, so that changes of the machine's speed affect all alike.

    Args:
        variants: name -> function of the round number that returns the number of items it processed.
        rounds: timed rounds, after one warm-up round.

    Returns:
        Items per second of each round, by variant.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-1, rounds):
        for name, work in variants.items():
            start = time.perf_counter()
            items = work(max(number, 0))
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if number >= 0:
                rates[name].append(items / (time.perf_counter() - start))
    return rates


def ratio(rates: dict[str, list[float]], ours: str, peer: str) -> float:
    """Median of ours / peer over the rounds; both are measured in immediate succession."""
    return statistics.median(a / b for a, b in zip(rates[ours], rates[peer], strict=True))


def in_fresh_process(work: Callable[..., Any], *args: Any) -> Any:
    """Result of ``work`` in a newly spawned process; function and result must be picklable."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def peak_growth(work: Callable[[], Any]) -> float:
    """Peak growth of this process's memory in MB while ``work`` runs; Linux only."""
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (highest) of this process, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6  # a "kB" in /proc is 1024 bytes


def matmul_rate(dtype: torch.dtype, rows: int = 1024, width: int = 1024, seconds: float = 1.0) -> float:
    """FLOP/s of a square linear layer with all threads, to which efficiency is relative."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(rows, width, dtype=dtype, device=device)
    w = torch.randn(width, width, dtype=dtype, device=device)
    best = 0.0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        for _ in range(10):
            torch.nn.functional.linear(x, w)
        if device == "cuda":
            torch.cuda.synchronize()
        best = max(best, 10 * 2 * rows * width * width / (time.perf_counter() - start))
    return best


def write(name: str, results: dict) -> None:
    """Write benchmarks/results/<name>.json with command, versions and machine, and print it."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "command": " ".join(["python -m benchmarks", *(sys.argv[1:] or [name])]),
        "threads": torch.get_num_threads(),
        **results,
        "versions": collect_versions(),
        "hardware": describe_hardware(),
    }
    text = json.dumps(content, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
