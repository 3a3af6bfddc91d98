"""Clustered attention in a trained detector: time against SDPA, and what the clusters cost in average precision.

python -m benchmarks clustered_attention --model runs/digit-scenes-stride8

The detector is that of recipes/presets/detection_train/digits_stride8.yaml: 384 pixels are 2,304 cells. Queries, keys
and values for 4,608 and 9,216 cells are those of two and of four scenes side by side. K-means with as many clusters in
each head is the control: the same attention with clusters that take longer to find.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hf_tfm.hub.detectors import load_detector
from hf_tfm.models.clustered_attention import ClusteredAttention, cluster_means
from hf_tfm.models.encoder_attention import encoder_layers
from hf_tfm.tasks.evaluation import one_process
from hf_tfm.tasks.object_detection import DetectionEvaluationArguments, DetectionTask

from . import common

ITERATIONS = 5  # of k-means
QUERIES, KEYS, VALUES = range(3)


@dataclass(frozen=True)
class KMeansAttention(ClusteredAttention):
    """Attention with the clusters of Lloyd's algorithm, in each head as many as the hashes have; without padding."""

    def clusters(self, query: Tensor, scaling: float, mask: Tensor | None = None) -> tuple[Tensor, int]:
        """See `ClusteredAttention.clusters`."""
        hashed, count = super().clusters(query, scaling)
        own = hashed.amax(dim=-1) + 1  # (B, H)
        generator = torch.Generator().manual_seed(self.seed)
        first = torch.rand(query.shape[:3], generator=generator).argsort(dim=-1)[..., :count, None]
        centres = query.gather(2, first.expand(*first.shape[:3], query.shape[-1]))  # (B, H, C, Dh)
        absent = torch.arange(count) >= own[..., None]
        for _ in range(ITERATIONS):
            distances = centres.square().sum(dim=-1)[:, :, None] - 2 * query @ centres.transpose(2, 3)
            nearest = distances.masked_fill(absent[:, :, None], torch.inf).argmin(dim=-1)  # (B, H, T)
            centres = cluster_means(query, nearest, count)
        return nearest, count


@dataclass
class Probe:
    """A method of one layer that records its time and its clusters.

    Args:
        method: clustered attention; None for SDPA.
        seconds: time of each call.
        counts: mean and largest number of clusters of a head in each call.
        seen: queries, keys and values of the last call, if they are kept.
    """

    method: ClusteredAttention | None
    seconds: list[float] = field(default_factory=list)
    counts: list[tuple[float, int]] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)

    def __call__(self, module: nn.Module, *tensors: Tensor, scaling: float, **kwargs: Any) -> tuple[Tensor, None]:
        self.seen = list(tensors[:3])
        start = time.perf_counter()
        output = attend(self.method, tensors, scaling)
        self.seconds.append(time.perf_counter() - start)
        if self.method is not None:
            numbers = ClusteredAttention.clusters(self.method, tensors[QUERIES], scaling)[0].amax(dim=-1) + 1.0
            self.counts.append((numbers.mean().item(), int(numbers.max())))
        return output, None


def attend(method: ClusteredAttention | None, tensors: Sequence[Any], scaling: float) -> Tensor:
    """Attention by a method, or by SDPA: (B, H, T, Dh) each -> (B, T, H, Dh)."""
    if method is None:
        return scaled_dot_product_attention(*tensors[:3], scale=scaling).transpose(1, 2)
    return method(nn.Identity(), *tensors[:3], None, scaling=scaling)[0]


def probes(model: Any, method: ClusteredAttention | None) -> list[Probe]:
    """Set a method in every layer of the encoder; return the probes."""
    made = [Probe(method) for _ in encoder_layers(model)]
    for layer, probe in zip(encoder_layers(model), made, strict=True):
        layer.attention_method = probe
    return made


def inputs_of_layers(model: Any, images: Tensor) -> list[list[Tensor]]:
    """Queries, keys and values of every layer of the encoder for images."""
    made = probes(model, None)
    model(pixel_values=images)
    return [[tensor.contiguous() for tensor in probe.seen] for probe in made]


def mosaics(images: Tensor, rows: int, columns: int) -> Tensor:
    """Join scenes (n, 3, S, S) to one image (1, 3, rows S, columns S)."""
    chosen = images[: rows * columns].unflatten(0, (rows, columns))
    return torch.cat([torch.cat(list(row), dim=-1) for row in chosen], dim=-2)[None]


def measure_speed(
    layers: list[list[Tensor]], methods: dict[str, ClusteredAttention], dtype: torch.dtype, rounds: int
) -> dict[str, Any]:
    """Milliseconds of the encoder's attention over all layers, and speedups over SDPA."""
    given = [[tensor.to(dtype) for tensor in tensors] for tensors in layers]
    scaling = given[0][0].shape[-1] ** -0.5

    def work(method: ClusteredAttention | None, number: int) -> int:
        for tensors in given:
            attend(method, tensors, scaling)
        return 1

    variants: dict[str, Callable[[int], float]] = {"sdpa": partial(work, None)}
    rates = common.interleaved(variants | {name: partial(work, one) for name, one in methods.items()}, rounds)
    clusters = {
        name: [
            round((one.clusters(tensors[QUERIES], scaling)[0].amax(dim=-1) + 1.0).mean().item()) for tensors in given
        ]
        for name, one in methods.items()
    }
    largest = {name: max(one.clusters(t[QUERIES], scaling)[1] for t in given) for name, one in methods.items()}
    return {
        "milliseconds": {name: round(1e3 / statistics.median(rate), 1) for name, rate in rates.items()},
        "speedup": {name: round(common.ratio(rates, name, "sdpa"), 2) for name in methods},
        "clusters_per_layer": clusters,
        "largest": largest,
    }


class Accuracy:
    """Average precision of a detector with several methods; the backbone runs once for each batch.

    Args:
        model: folder of the detector.
        dataset: name of the data set.
        split: split to score.
        samples: number of its images; None for all.
        size: shortest and longest side of the images in pixels; None for that of the detector.
    """

    def __init__(self, model: str, dataset: str, split: str, samples: int | None, size: int | None):
        arguments = DetectionEvaluationArguments(
            model=model, dataset_name=dataset, split=split, max_samples=samples, batch_size=8, progress=False
        )
        self.split, self.task = split, DetectionTask(arguments, one_process())
        self.task.splits = self.task.load_splits()
        self.task.load_pretrained()
        if size is not None:
            self.task.processor.size = {"shortest_edge": size, "longest_edge": size}
        self.base = self.task.model.model
        self.compute, self.features = self.base.features, []
        self.base.features = self.next_features

    def next_features(self, *inputs: Any) -> Any:
        """Features of the next batch, from an earlier evaluation if there was one."""
        if self.position == len(self.features):
            self.features.append(self.compute(*inputs))
        self.position += 1
        return self.features[self.position - 1]

    @torch.inference_mode()
    def measure(self, method: ClusteredAttention | None) -> dict[str, Any]:
        """Scores, clusters per layer (mean of a head, largest of a batch) and milliseconds per image and layer."""
        made, self.position = probes(self.task.model, method), 0
        scores = self.task.evaluate(self.task.model, self.split)
        found = {name: round(100 * scores.values[name], 2) for name in ("AP", "AP_small")}
        if method is not None:
            found["clusters"] = [round(statistics.mean(mean for mean, _ in probe.counts)) for probe in made]
            found["largest"] = [max(most for _, most in probe.counts) for probe in made]
        found["milliseconds"] = round(1e3 * sum(sum(probe.seconds) for probe in made) / scores.samples, 2)
        return found


def main(
    model: str = "runs/digit-scenes-stride8",
    dataset: str = "digit-scenes",
    split: str = "test",
    samples: int | None = None,
    sizes: tuple[int, ...] = (384,),
    rounds_of_hashes: tuple[int, ...] = (8, 12, 16, 20, 24, 32),
    widths: tuple[float, ...] = (2.0, 4.0, 8.0),
    speed_width: float = 8.0,
    control: tuple[int, ...] = (16, 32),
    precisions: tuple[str, ...] = ("no", "bf16"),
    grids: tuple[tuple[int, int], ...] = ((1, 1), (1, 2), (2, 2)),
    rounds: int = 5,
) -> None:
    """Measure and write benchmarks/results/clustered_attention.json.

    Args:
        model: folder of a DETR of this package with a stride of 8.
        dataset: data set to score on.
        split: split to score.
        samples: number of images to score; default, all.
        sizes: sides of the scored images in pixels; none for the measurements of time alone.
        rounds_of_hashes: numbers of hashes, L.
        widths: widths of a bucket, r.
        speed_width: width for the measurements of time.
        control: numbers of hashes whose numbers of clusters k-means gets, too, at speed_width.
        precisions: no (float32) and bf16, of the measurements of time; the first one for all grids, the others for the
            first grid.
        grids: rows and columns of scenes in an image, for the measurements of time.
        rounds: timed rounds; medians are reported.
    """
    if not Path(model).is_dir():
        print(f"clustered_attention needs a detector in {model}: recipes/presets/detection_train/digits_stride8.yaml")
        return
    accuracy = {}
    for size in sizes:
        scored = Accuracy(model, dataset, split, samples, size)
        rows = accuracy[f"{size} px"] = {"exact": scored.measure(None)}
        for width in widths:
            for number in rounds_of_hashes:
                rows[f"L {number}, r {width:g}"] = scored.measure(ClusteredAttention(number, width))
                print(f"L {number}, r {width:g}", rows[f"L {number}, r {width:g}"], flush=True)
        for number in control:
            rows[f"k-means as L {number}, r {speed_width:g}"] = scored.measure(KMeansAttention(number, speed_width))
            print("k-means", rows[f"k-means as L {number}, r {speed_width:g}"], flush=True)
    speed = {}
    detector, processor = load_detector(model)
    images = scenes(dataset, split, processor)
    methods = {f"L {number}": ClusteredAttention(number, speed_width) for number in rounds_of_hashes}
    with torch.inference_mode():
        for grid in grids:
            layers = inputs_of_layers(detector, mosaics(images, *grid))
            cells = layers[0][QUERIES].shape[2]
            for precision in precisions if grid == grids[0] else precisions[:1]:
                dtype = torch.bfloat16 if precision == "bf16" else torch.float32
                name = f"{cells} cells, {'bf16' if precision == 'bf16' else 'fp32'}"
                speed[name] = measure_speed(layers, methods, dtype, rounds)
                print(name, speed[name], flush=True)
    common.write(
        "clustered_attention",
        {
            "layers": len(layers),
            "heads": layers[0][QUERIES].shape[1],
            "head_dim": layers[0][QUERIES].shape[3],
            "split": split,
            "width": speed_width,
            "rounds": rounds,
            "accuracy": accuracy,
            "speed": speed,
        },
    )


def scenes(dataset: str, split: str, processor: Any, count: int = 4) -> Tensor:
    """The first images of a data set as a detector reads them: (count, 3, S, S)."""
    from hf_tfm.data.source import load_splits

    rows = load_splits(dataset)[split].select(range(count))
    return processor(images=[row["image"] for row in rows], return_tensors="pt")["pixel_values"]
