"""What every benchmark shares: interleaved timing, memory, the machine's matrix-product rate, and the results file."""

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
    """Run every variant once a round, in turn, so that a drift of the machine meets all alike.

    Args:
        variants: name -> function of the round's number; it returns how many items it worked through.
        rounds: counted rounds; one more comes first, to warm up.

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
    """Median over the rounds of ours / peer, each pair measured one after the other."""
    return statistics.median(a / b for a, b in zip(rates[ours], rates[peer], strict=True))


def in_fresh_process(work: Callable[..., Any], *args: Any) -> Any:
    """What ``work`` returns in a process that has done nothing before; both go there by pickle."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def peak_growth(work: Callable[[], Any]) -> float:
    """By how many MB this process's memory grows, at most, while ``work`` runs; Linux alone tells."""
    Path("/proc/self/clear_refs").write_text("5")  # the highest mark starts again from here
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """VmRSS (now) or VmHWM (highest) of this process, in MB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6  # the system's "kB" are 1024 bytes


def matmul_rate(dtype: torch.dtype, rows: int = 1024, width: int = 1024, seconds: float = 1.0) -> float:
    """FLOP/s of a square linear layer with all threads: what the floor is measured by."""
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
    """Write benchmarks/results/<name>.json with the command, the versions and the machine, and print it."""
    RESULTS.mkdir(exist_ok=True)
    content = {
        "command": " ".join(["python -m benchmarks", name, *sys.argv[2:]]),
        "threads": torch.get_num_threads(),
        **results,
        "versions": collect_versions(),
        "hardware": describe_hardware(),
    }
    text = json.dumps(content, indent=2)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
