"""What a model costs to use: the table of a distilled student beside its teacher.

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
    """A row of the table.

    ``gflops`` of one sample's forward pass, in 10^9 operations, a multiplication and an addition being two;
    ``milliseconds_1``, ``milliseconds_32``: median time of a forward pass of so many samples on the CPU in float32,
    with ``threads`` threads; ``samples_per_second`` of the larger; ``megabytes`` of the weights on disk, in 10^6
    bytes; ``score``; and ``kept``, the share of the teacher's score. ``metric`` is what the score is, ``sample`` what
    one reads, in words.
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
    """Measure what a forward pass costs.

    Args:
        name: of the model, for the table.
        model: moved to the CPU meanwhile.
        sample: keyword arguments of one sample, (1, ...) each.
        score: of the model, to stand beside its cost.
    """
    device, training = next(model.parameters()).device, model.training
    model.cpu().eval()
    sample = {key: value.cpu() for key, value in sample.items()}
    # The fused attention kernels of a CPU are not counted; the plain one computes the same with the same products.
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(**sample)
    times = {count: milliseconds(model, repeated(sample, count)) for count in BATCHES}
    cost = Cost(
        model=name,
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=counter.get_total_flops() / 1e9,
        milliseconds_1=times[1],
        milliseconds_32=times[32],
        samples_per_second=32_000 / times[32],
        threads=torch.get_num_threads(),
        megabytes=sum(t.numel() * t.element_size() for t in own_weights(model)) / 1e6,
        sample=", ".join(f"{name} of {' x '.join(map(str, value.shape[1:]))}" for name, value in sample.items()),
    )
    model.to(device).train(training)
    return cost if score is None else Cost(**cost, score=score)


def beside_teacher(teacher: Cost, *students: Cost) -> list[Cost]:
    """The rows of a table, each student's with the share of the teacher's score that it keeps."""
    rows = [teacher]
    for student in students:
        both = "score" in teacher and "score" in student and teacher["score"]
        rows.append(Cost(**student, kept=student["score"] / teacher["score"]) if both else student)
    return rows


def repeated(sample: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """A batch of ``count`` times the same sample."""
    return {key: value.expand(count, *value.shape[1:]).contiguous() for key, value in sample.items()}


def own_weights(model: nn.Module) -> list[Tensor]:
    """Parameters and saved buffers, those that are shared once."""
    return list({id(value): value for value in model.state_dict(keep_vars=True).values()}.values())


@torch.inference_mode()
def milliseconds(model: Callable, batch: Mapping[str, Tensor]) -> float:
    """Median time of a forward pass, after one that does not count."""
    model(**batch)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        model(**batch)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)
