"""Export a model to ONNX, OpenVINO or ExecuTorch with transformers' exporters, and verify what was exported.

folder or Hub id -> graphs -> exported, saved, loaded again, compared with the model -> output folder
"""

import io
import json
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from ..conversion import explained_source, local_folder
from ..conversion.carry import copy_files
from ..conversion.parity import file_hash, provenance, weight_hashes
from ..hub.loading import check_revision, load_config, load_model, load_tokenizer, read_json
from ..hub.saved_files import CARD, CERTIFICATE, PROCESSOR_FILES, TOKENIZER_FILES
from ..hub.usage import loading_class
from ..writing import output_folder
from .calibration import calibration_inputs
from .certificate import check
from .formats import Format, dynamic_shapes, quantizer_of, require_installed, versions_of
from .graphs import Graph, graphs_of
from .recurrent import recurrent_nodes
from .usage import card

COPIED = ("config.json", "generation_config.json", *TOKENIZER_FILES, *PROCESSOR_FILES)


def export(
    source: str | Path,
    to: str,
    output_dir: str | Path,
    quantize: str | None = None,
    calibration_data: str | Path | None = None,
    revision: str | None = None,
) -> dict[str, Any]:
    """Write ``source`` as graphs of another runtime, with a certificate that they compute the same.

    A model that generates text becomes a decoder that takes and returns its cache, with an encoder before it if it has
    one; every other model is one graph, "model". The number of rows may vary, and so may lengths of text and the sides
    of images of models without a fixed size. Model and graphs, as loaded from disk, run in float32 on the same inputs;
    nothing is written unless they agree. Tokenizer and image processor files are copied.

    Args:
        source: folder of a saved model, or a Hub id.
        to: a name of `formats.FORMATS`: "onnx", "openvino" or "executorch".
        output_dir: folder to create; it may exist if it is empty.
        quantize: "dynamic" or "static" for 8-bit weights and activations, whose ranges are found while the model runs
            or from ``calibration_data``.
        calibration_data: for static quantisation, a text file with an example a line, or a folder of images.
        revision: branch, tag or commit of a model on the Hub.

    Returns:
        The certificate, as in ``parity_certificate.json``: ``source`` and ``target`` (classes and sha256 of files),
        ``graphs`` (inputs and outputs with their axes), the results of `certificate.check`, ``versions``, ``date``.

    Raises:
        ValueError: an argument has a wrong value, the model cannot be exported, or the graphs compute something else.
        ImportError: transformers is too old for exports, or a package of the format is missing.
        FileExistsError: ``output_dir`` is a file or a non-empty folder.
    """
    form = require_installed(to)
    quantizer = quantizer_of(form, quantize, calibration_data)
    output_dir = Path(output_dir)
    with output_folder(output_dir, ".exporting-") as temporary, explained_source(source, temporary, output_dir):
        check_revision(str(source), revision)
        folder = local_folder(source, revision)
        model = load(folder)
        graphs = graphs_of(model, to, has_segments(folder))
        if quantize == "static":
            quantizer = quantizer.with_calibration(calibration_inputs(model, graphs, folder, Path(calibration_data)))
        work = temporary / "model"
        work.mkdir()
        runners = write(form, graphs, work, quantizer)
        certificate = {
            "source": {
                # Only the name of a local folder: certificates are published, and paths reveal details of the machine.
                "model": folder.resolve().name if Path(source).exists() else str(source),
                "revision": None if Path(source).exists() else folder.name,
                "class": type(model).__name__,
                "weights": weight_hashes(folder),
            },
            "target": {
                "format": to,
                "quantize": quantize,
                "files": {path.name: file_hash(path) for path in sorted(work.iterdir())},
            },
            "graphs": {graph.name: described(form, graph) for graph in graphs},
            **check(model, graphs, runners, exact=quantize is None),
            **provenance(),
        }
        certificate["versions"] |= versions_of(form.packages)
        del runners  # before the files move
        copy_files(folder, work, COPIED)
        (work / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
        text = card(read_json(work / "config.json"), certificate, output_dir.absolute().name)
        (work / CARD).write_text(text, encoding="utf-8")
    return certificate


def load(folder: Path) -> PreTrainedModel:
    """Load the model in a folder, of the class that saved it.

    Raises:
        ValueError: it has no class that is known here.
    """
    config = load_config(str(folder), trust_remote_code=None)
    name = (config.architectures or [""])[0]
    auto_class = loading_class(read_json(folder / "config.json"))
    kind = getattr(transformers, auto_class)
    model = load_model(kind, str(folder), trust_remote_code=None)
    if type(model).__name__ != name:
        raise ValueError(f'model "{folder}" was saved as {name or "no class"}, which cannot be exported')
    model.requires_grad_(False)
    return model


def has_segments(folder: Path) -> bool:
    """Return False if the tokenizer in a folder gives no segments of a pair of texts."""
    if not (folder / "tokenizer_config.json").is_file():
        return True
    return "token_type_ids" in load_tokenizer(str(folder), trust_remote_code=None).model_input_names


def write(form: Format, graphs: Sequence[Graph], work: Path, quantizer: Any) -> dict[str, Any]:
    """Export graphs into a folder, and return what runs them, as loaded from there, by name."""
    from transformers.exporters import ExportedModel
    from transformers.exporters.auto import get_exporter_class
    from transformers.utils import logging

    exporter_class, components = get_exporter_class(form.name), {}
    verbosity = logging.get_verbosity()
    with ExitStack() as stack:
        stack.callback(logging.set_verbosity, verbosity)
        logging.set_verbosity_error()
        stack.enter_context(redirect_stdout(io.StringIO()))  # torch.onnx prints its progress
        stack.enter_context(recurrent_nodes())
        exporter = exporter_class()
        for graph in graphs:
            config = exporter.config_class(
                dynamic_shapes=dynamic_shapes(form, graph),
                prefer_deferred_runtime_asserts_over_guards=True,
                quantizer=quantizer,
                **form.options,
            )
            inputs = {name: value.clone() for name, value in graph.inputs.items()}
            components[graph.name] = exporter.export(graph.module, inputs, config).components["model"]
        ExportedModel(components, form.name).save_pretrained(work)
        loaded = ExportedModel.from_pretrained(work, device="cpu", **form.running)
    return loaded.runners


def described(form: Format, graph: Graph) -> dict[str, Any]:
    """Describe a graph for the certificate: its file, and the shape of every input with names for variable axes."""
    with torch.inference_mode():
        outputs = list(graph.module(**graph.inputs))
    return {
        "file": form.file.format(graph.name),
        "inputs": {
            name: [graph.axes.get(name, {}).get(dim, size) for dim, size in enumerate(value.shape)]
            for name, value in graph.inputs.items()
        },
        "outputs": outputs,
    }
