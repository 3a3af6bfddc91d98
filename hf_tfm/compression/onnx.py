"""ONNX Runtime: export of a compressed model through transformers.exporters, and the exported model as a module.

model, calibration inputs -> ONNX graph with dynamic batch and length, float32 or int8 -> folder -> `OnnxModel`
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..models.patches import sides
from .methods import Method, OnnxDynamic, OnnxStatic

MANIFEST = "export.json"


def require_packages() -> None:
    """Check that the packages of the extra "onnx" and a transformers with exporters are installed.

    Raises:
        ImportError: names what to install.
    """
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"ONNX needs pip install hf-tfm[onnx]: {error}") from error
    try:
        import transformers.exporters  # noqa: F401
    except ImportError as error:
        raise ImportError("ONNX needs transformers 5.24 or later, which has transformers.exporters") from error


def traced_inputs(model: PreTrainedModel) -> dict[str, Tensor]:
    """Return inputs for tracing a model: two texts or images.

    Raises:
        ValueError: the model reads something else.
    """
    config = model.config
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.zeros(2, config.num_channels, *sides(config.image_size))}
    if model.main_input_name != "input_ids" or getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"only encoders of texts or images are exported, but {type(model).__name__} is none")
    ids = torch.arange(24).view(2, 12) % config.vocab_size
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    segments = getattr(config, "type_vocab_size", 0) > 1
    return inputs | ({"token_type_ids": torch.zeros_like(ids)} if segments else {})


def completed(inputs: dict[str, Any], names: Sequence[str]) -> dict[str, Tensor]:
    """Return those inputs that a graph reads; masks of ones and segments of zeros replace missing ones."""
    found = {name: inputs[name] for name in names if inputs.get(name) is not None}
    for name, make in (("attention_mask", torch.ones_like), ("token_type_ids", torch.zeros_like)):
        if name in names and name not in found:
            found[name] = make(found["input_ids"])
    return found


def export_onnx(
    model: PreTrainedModel, method: Method, folder: Path, calibration: Sequence[dict[str, Tensor]] = ()
) -> None:
    """Export a model to a folder.

    Args:
        calibration: inputs of batches, for static quantisation.
    """
    from onnxruntime.quantization import CalibrationMethod
    from transformers.exporters import (
        OnnxConfig,
        OnnxExporter,
        OnnxRuntimeDynamicConfig,
        OnnxRuntimeQuantizer,
        OnnxRuntimeStaticConfig,
    )

    sample = traced_inputs(model)
    axes = torch.export.Dim.AUTO
    shapes = {name: {0: axes, 1: axes} if value.ndim == 2 else {0: axes} for name, value in sample.items()}
    quantizer = None
    if isinstance(method, OnnxDynamic):
        quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True))
    elif isinstance(method, OnnxStatic):
        kinds = {"minmax": "MinMax", "entropy": "Entropy", "percentile": "Percentile"}
        config = OnnxRuntimeStaticConfig(
            per_channel=True, calibrate_method=getattr(CalibrationMethod, kinds[method.method])
        )
        quantizer = OnnxRuntimeQuantizer(config, [completed(batch, list(sample)) for batch in calibration])
    config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, quantizer=quantizer)
    OnnxExporter().export(model.eval(), sample, config).save_pretrained(folder)


class OnnxModel(nn.Module):
    """An exported model on the CPU, called like the model that it was exported from.

    Args:
        folder: see `export_onnx`.
    """

    def __init__(self, folder: str | Path):
        super().__init__()
        import onnxruntime
        from transformers.exporters import ExportedModel

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.exported = ExportedModel.from_pretrained(folder, device="cpu", session_options=options)
        self.config = self.exported.config
        self.names = list(self.exported.components["model"].metadata.kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **_: Any,
    ) -> Any:
        """Run the graph; other arguments, such as labels, are ignored."""
        given = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
        return self.exported(**completed({**given, "pixel_values": pixel_values}, self.names))
