"""Formats of exported models: the packages that they need, transformers' exporters, and their quantisation."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version

from ..values import shown
from .graphs import Graph

QUANTIZERS = ("dynamic", "static")
LEAST_TRANSFORMERS = "5.24"  # loads and runs saved exports
LEAST = 2  # torch.export fixes an axis of size 1, so it is told of sizes from 2 on; the graphs take 1 too
MOST = 2**31 - 1


@dataclass(frozen=True)
class Format:
    """A format.

    Args:
        name: of the exporter, and of the extra that installs ``packages``.
        packages: that export and run it.
        file: pattern of a graph's file.
        most: most entries along an axis without a limit of its own, for a runtime that plans its memory.
        options: of the exporter.
        running: options of what runs it.
        quantizing: packages that quantise.
    """

    name: str
    packages: tuple[str, ...]
    file: str
    most: dict[str, int] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    running: dict[str, Any] = field(default_factory=dict)
    quantizing: tuple[str, ...] = ()


FORMATS = {
    "onnx": Format("onnx", ("onnx", "onnxruntime", "onnxscript"), "{}.onnx"),
    "openvino": Format(
        "openvino",
        ("openvino",),
        "openvino_{}.xml",
        options={"stateful": False},
        running={"config": {"INFERENCE_PRECISION_HINT": "f32"}},  # some CPUs compute in bfloat16 by default
        quantizing=("nncf",),
    ),
    "executorch": Format(
        "executorch",
        ("executorch",),
        "{}.pte",
        {"batch": 8, "height": 1024, "width": 1024, "": 512},
        quantizing=("torchao",),
    ),
}


def require_installed(to: str) -> Format:
    """Return a format by name.

    Raises:
        ValueError: there is none of this name.
        ImportError: transformers is too old, or a package is missing; the message has the command that installs it.
    """
    if to not in FORMATS:
        raise ValueError(f'to must be one of {", ".join(FORMATS)}, got "{to}"')
    if Version(transformers.__version__) < Version(LEAST_TRANSFORMERS):
        raise ImportError(
            f"export needs transformers {LEAST_TRANSFORMERS} or later, got {transformers.__version__}: "
            f'pip install "transformers>={LEAST_TRANSFORMERS}"'
        )
    require_packages(f'to "{to}"', FORMATS[to].packages, to)
    return FORMATS[to]


def require_packages(what: str, packages: Sequence[str], extra: str) -> None:
    """Raise if a package is missing.

    Raises:
        ImportError: with the command that installs it.
    """
    if missing := [package for package in packages if find_spec(package) is None]:
        raise ImportError(f'{what} needs {", ".join(missing)}: pip install "hf-tfm[{extra}]"')


def quantizer_of(form: Format, quantize: str | None, calibration_data: str | Path | None) -> Any:
    """Return transformers' quantiser of a format; None without quantisation.

    Raises:
        ValueError: ``quantize`` is unknown, or ``calibration_data`` is missing, does not exist or is not used.
        ImportError: a package is missing.
    """
    if quantize not in (None, *QUANTIZERS):
        raise ValueError(f'quantize must be one of {", ".join(QUANTIZERS)}, got "{quantize}"')
    if (calibration_data is not None) != (quantize == "static"):
        wrong = "is only for" if calibration_data is not None else "is needed for"
        raise ValueError(f'calibration_data {wrong} quantize "static", got quantize {shown(quantize)}')
    if calibration_data is not None and not Path(calibration_data).exists():
        raise ValueError(f'calibration_data "{calibration_data}" does not exist')
    if quantize is None:
        return None
    require_packages(f'quantize "{quantize}" to {form.name}', form.quantizing, form.name)
    return {"onnx": of_onnx, "openvino": of_openvino, "executorch": of_executorch}[form.name](quantize == "dynamic")


def of_onnx(dynamic: bool) -> Any:
    """Return ONNX Runtime's quantiser."""
    from transformers.exporters import OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer, OnnxRuntimeStaticConfig

    return OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig() if dynamic else OnnxRuntimeStaticConfig())


def of_openvino(dynamic: bool) -> Any:
    """Return NNCF's quantiser; "dynamic" stores 8-bit weights, and the runtime decides how to multiply by them."""
    from transformers.exporters import NNCFOpenVINOQuantizer, NNCFQuantizationConfig, NNCFWeightCompressionConfig

    return NNCFOpenVINOQuantizer(NNCFWeightCompressionConfig() if dynamic else NNCFQuantizationConfig())


def of_executorch(dynamic: bool) -> Any:
    """Return the quantiser for XNNPACK."""
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from transformers.exporters import PT2EQuantizer

    config = get_symmetric_quantization_config(is_per_channel=True, is_dynamic=dynamic)
    return PT2EQuantizer(XNNPACKQuantizer().set_global(config))


def versions_of(packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # installed without metadata
            found[package] = "unknown"
    return found


def dynamic_shapes(form: Format, graph: Graph) -> dict[str, dict[int, Any]]:
    """Return the ``dynamic_shapes`` of torch.export for a graph.

    Lengths depend on one another, such as those of the mask and of the cache: torch.export finds out how.
    """
    dims: dict[str, Any] = {"batch": torch.export.Dim("batch", min=LEAST, max=most(form, graph, "batch"))}
    for axis in dict.fromkeys(axis for axes in graph.axes.values() for axis in axes.values()):
        limit = most(form, graph, axis)
        dims.setdefault(axis, torch.export.Dim.AUTO if limit is None else torch.export.Dim.AUTO(max=limit))
    return {name: {dim: dims[axis] for dim, axis in graph.axes.get(name, {}).items()} for name in graph.inputs}


def most(form: Format, graph: Graph, axis: str) -> int | None:
    """Return the most entries along an axis that a graph is planned for; None without a limit."""
    if form.most is None:
        return None
    return min(graph.limits.get(axis, MOST), form.most.get(axis, form.most[""]))
