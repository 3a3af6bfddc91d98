"""Inference cost of models, for comparing a distilled student with its teacher.

model, inputs of one sample -> parameters, operations, time, size on disk
"""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

BATCHES = {1: 25, 32: 9}  # batch size: number of timed passes


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
    cost = measure_costs({name: model}, sample)[0]
    return cost if score is None else Cost(**cost, score=score)


class Size(TypedDict):
    """Size of a model that is no module of torch; units as in `Cost`."""

    parameters: int
    gflops: float
    megabytes: float


def measure_costs(
    models: Mapping[str, nn.Module], sample: Mapping[str, Tensor], sizes: Mapping[str, Size] | None = None
) -> list[Cost]:
    """Measure the costs of a forward pass of several models in turn, so that all meet the same load of the machine.

    Args:
        models: by name; moved to the CPU during the measurement.
        sample: keyword arguments of one sample, (1, ...) each.
        sizes: known sizes of models by name, which are then only timed.
    """
    sizes, measured = dict(sizes or {}), {name: model for name, model in models.items() if name not in (sizes or {})}
    before = {name: (next(model.parameters()).device, model.training) for name, model in measured.items()}
    sample = {key: value.cpu() for key, value in sample.items()}
    for name, model in measured.items():
        sizes[name] = Size(
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            gflops=count_flops(model.cpu().eval(), sample) / 1e9,
            megabytes=sum(t.numel() * t.element_size() for t in own_weights(model)) / 1e6,
        )
    times = {count: interleaved(models, repeated(sample, count), repeats) for count, repeats in BATCHES.items()}
    shape = ", ".join(f"{name} of {' x '.join(map(str, value.shape[1:]))}" for name, value in sample.items())
    costs = [
        Cost(
            model=name,
            **sizes[name],
            milliseconds_1=times[1][name],
            milliseconds_32=times[32][name],
            samples_per_second=32_000 / times[32][name],
            threads=torch.get_num_threads(),
            sample=shape,
        )
        for name in models
    ]
    for name, (device, training) in before.items():
        models[name].to(device).train(training)
    return costs


def quantized_flops() -> dict[Any, Any]:
    """Return formulas for kernels of int8 layers, whose integer operations count like floating-point ones."""
    if not hasattr(torch.ops.quantized, "linear_dynamic"):
        return {}

    def linear(x: torch.Size, *_: Any, out_shape: torch.Size, **__: Any) -> int:
        return 2 * x.numel() * out_shape[-1]

    return {torch.ops.quantized.linear_dynamic: linear}


def count_flops(model: nn.Module, sample: Mapping[str, Tensor]) -> int:
    """Return the floating-point operations of a forward pass; a multiply-add counts as two."""
    # The counter registers hooks on arguments of modules that require a gradient, which fails without autograd.
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        # It does not see fused CPU attention kernels either; the plain one has the same matrix products.
        counting = FlopCounterMode(display=False, custom_mapping=quantized_flops())
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counting as counter:
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
def interleaved(models: Mapping[str, Callable], batch: Mapping[str, Tensor], repeats: int) -> dict[str, float]:
    """Return the median times of forward passes of several models, in milliseconds; each round runs all of them.

    Args:
        repeats: number of rounds after one to warm up.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats + 1):
        for name, model in models.items():
            start = time.perf_counter()
            model(**batch)
            times[name].append(time.perf_counter() - start)
    return {name: 1000 * statistics.median(own[1:]) for name, own in times.items()}
