"""Inference cost of models, for comparing a distilled student with its teacher.

model, inputs of one sample -> parameters, operations, time, size on disk
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCHES = (1, 32)
REPEATS = 9


class _Cost(TypedDict):
    model: str
    parameters: int
    gflops: float


class Cost(_Cost, total=False):
    """Row of the cost table.

    ``gflops``: 10^9 floating-point operations of a forward pass of one sample; a multiply-add counts as two.
    ``milliseconds_1``, ``milliseconds_32``: median time of a forward pass of 1 and 32 samples on the CPU in float32
    with ``threads`` threads; ``samples_per_second`` at 32 samples. ``megabytes``: size of the weights on disk in 10^6
    bytes. ``score``, and ``kept``, its ratio to the teacher's score. ``metric`` and ``sample`` describe the score and
    the measured sample.
    """

    milliseconds_1: float
    milliseconds_32: float
    samples_per_second: float
    threads: int
    megabytes: float
    score: float
    kept: float
    metric: str
    sample: str


def measure_cost(name: str, model: nn.Module, sample: Mapping[str, Tensor], score: float | None = None) -> Cost:
    """Measure the cost of a forward pass.

    Args:
        name: name of the model in the table.
        model: moved to the CPU during the measurement.
        sample: keyword arguments of one sample, (1, ...) each.
        score: score of the model, for the same row.
    """
    device, training = next(model.parameters()).device, model.training
    model.cpu().eval()
    sample = {key: value.cpu() for key, value in sample.items()}
    flops = count_flops(model, sample)
    times = {count: milliseconds(model, repeated(sample, count)) for count in BATCHES}
    cost = Cost(
        model=name,
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=flops / 1e9,
        milliseconds_1=times[1],
        milliseconds_32=times[32],
        samples_per_second=32_000 / times[32],
        threads=torch.get_num_threads(),
        megabytes=sum(t.numel() * t.element_size() for t in own_weights(model)) / 1e6,
        sample=", ".join(f"{name} of {' x '.join(map(str, value.shape[1:]))}" for name, value in sample.items()),
    )
    model.to(device).train(training)
    return cost if score is None else Cost(**cost, score=score)


def count_flops(model: nn.Module, sample: Mapping[str, Tensor]) -> int:
    """Return the floating-point operations of a forward pass; a multiply-add counts as two."""
    # The counter registers hooks on arguments of modules that require a gradient, which fails without autograd.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        # It does not see fused CPU attention kernels either; the plain one has the same matrix products.
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(**sample)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return counter.get_total_flops()


def beside_teacher(teacher: Cost, *students: Cost) -> list[Cost]:
    """Return the rows of a table, adding to each student its share of the teacher's score."""
    rows = [teacher]
    for student in students:
        both = "score" in teacher and "score" in student and teacher["score"]
        rows.append(Cost(**student, kept=student["score"] / teacher["score"]) if both else student)
    return rows


def repeated(sample: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Return a batch that repeats one sample ``count`` times."""
    return {key: value.expand(count, *value.shape[1:]).contiguous() for key, value in sample.items()}


def own_weights(model: nn.Module) -> list[Tensor]:
    """Return parameters and persistent buffers, shared ones once."""
    return list({id(value): value for value in model.state_dict(keep_vars=True).values()}.values())


@torch.inference_mode()
def milliseconds(model: Callable, batch: Mapping[str, Tensor]) -> float:
    """Return the median time of a forward pass after one warm-up pass."""
    model(**batch)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        model(**batch)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
