"""Convert a trained model to another library's class and back, and verify that both compute the same function.

source folder -> configuration and weights under the other names -> saved, loaded again, compared -> output folder
"""

import copy
import importlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..command import cause, raised_by_us, reworded
from ..families import FAMILIES
from ..hub.loading import UNCLEAR, check_config_file, check_revision, check_size, mismatch, others, read_json
from ..hub.saved_files import CERTIFICATE, PROCESSOR_FILES, TOKENIZER_FILES
from ..models.travel import TravellingConfig
from ..writing import output_folder
from .authors_files import unpack
from .bert import whole_head
from .carry import copy_files, copy_record, copy_sentence_modules, same_tokenizer
from .conversion import Conversion, WeightsFile, require_fixed
from .parity import compare, provenance, weight_hashes
from .tinybert import is_authors_tinybert, unpack_tinybert
from .weight_files import WEIGHTS, saved_dtype

OURS = "tfm"
# Messages for the fields of transformers' loading report.
PROBLEMS = {
    "missing_keys": "it lacks the weight",
    "unexpected_keys": "the class has no weight",
    "mismatched_keys": "",  # see `mismatch`
}
# Fields of ours that other libraries cannot express, and their only value there. Feed-forward layers that keep equally
# many neurons in all blocks are no such field, but a smaller intermediate_size.
ONLY_OURS = {
    **dict.fromkeys(("encoder_attention", "decoder_attention"), "full"),
    **dict.fromkeys(("layer_num_attention_heads", "layer_intermediate_sizes", "low_rank", "int8")),
}
# Weights missing from a model without a pooler, which its configuration does not record.
POOLER = {"pooler.dense.weight", "pooler.dense.bias"}


def conversions() -> list[Conversion]:
    """Return the conversions of all model families."""
    modules = [name for family in FAMILIES for name in family.conversions]
    return [one for name in modules for one in importlib.import_module(name, __package__).CONVERSIONS]


def weights_files() -> list[WeightsFile]:
    """Return the kinds of weights files that `convert` reads."""
    return [conversion.file for conversion in conversions() if conversion.file is not None]


def targets() -> list[str]:
    """Return the names of the classes that `convert` can write."""
    return [*dict.fromkeys(conversion.name for conversion in conversions()), OURS]


def convert(source: str | Path, to: str, output_dir: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Write ``source`` as a model of another class, with a parity certificate next to it.

    Both models run in float32 on the same inputs, the new one as loaded from disk. Nothing is written unless they
    agree. Tokenizer and image processor files are copied, and so is the record of the training run; its model card is
    rewritten.

    Args:
        source: folder of a saved model (also one of TinyBERT's authors), a Hub id, or a ``*.pth`` file of weights of
            the authors of the masked autoencoder, DETR or Swin, or of torchvision's Swin.
        to: name of a class that loads without this package or remote code, one of `targets`: "vit" for transformers'
            `ViTForImageClassification` or `ViTModel`, "timm" for the class of that library, "detr_authors" for a file
            with the weight names of DETR's authors, and so on; docs/conversion.md lists all. "tfm" for this package's
            class.
        output_dir: folder to create; it may exist if it is empty.
        revision: branch, tag or commit of a model on the Hub.

    Returns:
        The certificate, as in ``parity_certificate.json``: ``source`` and ``target`` (class, and sha256 of each weight
        file), the results of `compare`, ``tokenizer_equal`` (None without a tokenizer), ``remarks`` on differences
        that the compared inputs do not show, ``versions``, ``date``.

    Raises:
        ValueError: ``to`` is unknown or already the class of the source; the target cannot express the source; or the
            two models differ.
        FileExistsError: ``output_dir`` is a file or a non-empty folder.
    """
    output_dir = Path(output_dir)
    with output_folder(output_dir, ".converting-") as temporary, explained_source(source, temporary, output_dir):
        work = temporary / "model"
        check_revision(str(source), revision)
        files = Path(source) if Path(source).is_file() else local_folder(source, revision)
        folder = unpack(files, temporary / "source", weights_files()) if files.is_file() else files
        if (folder / "config.json").is_file():
            check_config_file(folder / "config.json")
        if is_authors_tinybert(folder):
            folder = unpack_tinybert(folder, temporary / "source")
        conversion = find_conversion(folder, to)
        # Convert in float32 to avoid rounding, then store in the original dtype.
        origin = load(conversion, to != OURS, folder)
        target = converted(conversion, origin, to, saved_dtype(folder))
        save(conversion, target, work)
        copy_files(folder, work, TOKENIZER_FILES)
        copy_sentence_modules(folder, work)
        carry_processor(conversion, folder, work, to == OURS)
        certificate = {
            "source": {
                # Only the name of a local folder: certificates are published, and paths reveal details of the machine.
                "model": files.resolve().name if Path(source).exists() else str(source),
                "revision": None if Path(source).exists() else folder.name,
                "class": type(origin).__name__,
                "weights": weight_hashes(files),
            },
            "target": {"class": type(target).__name__, "weights": weight_hashes(work)},
            **compare(origin, load(conversion, to == OURS, work), (target if to == OURS else origin).config),
            "tokenizer_equal": same_tokenizer(folder, work),
            "remarks": conversion.remarks(origin.config) if conversion.remarks and to != OURS else [],
            **provenance(),
        }
        copy_record(folder, work, output_dir.absolute().name)
        (work / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
    return certificate


@contextmanager
def explained_source(source: str | Path, temporary: Path, output_dir: Path) -> Iterator[None]:
    """Convert library errors to a ValueError that names the source and no temporary path."""
    try:
        yield
    except Exception as error:
        text = cause(error)
        for path, name in ((temporary / "source", source), (temporary / "model", output_dir), (temporary, output_dir)):
            text = text.replace(str(path), str(name))
        own = isinstance(error, (ValueError, OSError)) and raised_by_us(error)
        if own and str(temporary) not in str(error):
            raise
        if isinstance(error, UNCLEAR):
            text = f"its files cannot be read ({type(error).__name__}: {text})"
        raise ValueError(text if own else f'model "{source}": {text}') from error


def local_folder(source: str | Path, revision: str | None) -> Path:
    """Return the folder of a saved model, downloading it if ``source`` is a Hub id.

    Raises:
        ValueError: it is neither.
    """
    if Path(source).is_dir():
        return Path(source)
    ignored = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.py"]
    try:
        return Path(snapshot_download(str(source), revision=revision, ignore_patterns=ignored))
    except HFValidationError as error:
        raise ValueError(f'model "{source}" is neither a local folder nor a model on the Hub') from error
    except Exception as error:  # including errors of the network libraries
        reason = reworded(error)
        raise ValueError(f'model "{source}" is neither a local folder nor found on the Hub: {reason}') from error


def find_conversion(folder: Path, to: str) -> Conversion:
    """Return the conversion of the model in ``folder`` to the class named ``to``."""
    if to not in targets():
        raise ValueError(f'to must be one of {", ".join(targets())}, got "{to}"')
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f'model "{folder}" is not a saved model: it has no config.json')
    check_config_file(path)
    config = read_json(path)
    # A timm folder has no model type, only an architecture.
    model_type = config.get("model_type", "timm" if "architecture" in config else None)
    class_name = whole_head(folder, (config.get("architectures") or [None])[0])
    found = [
        conversion
        for conversion in conversions()
        if to in (conversion.name, OURS) and source_type(conversion, to) == model_type
    ]
    if to == OURS:
        claiming = [conversion for conversion in found if conversion.claims and conversion.claims(config)]
        found = claiming or [conversion for conversion in found if not conversion.claims]
    fitting = {source_class(conversion, to).__name__: conversion for conversion in found}
    if not fitting:
        raise ValueError(f'no conversion of a model of type "{model_type}" to "{to}"')
    if class_name in fitting:
        return fitting[class_name]
    if len(fitting) > 1 and class_name is not None:
        raise ValueError(f'no conversion of a {class_name} to "{to}", only of {", ".join(fitting)}')
    return next(iter(fitting.values()))


def source_class(conversion: Conversion, to: str) -> type[nn.Module]:
    """Return the class that a conversion to ``to`` starts from."""
    return conversion.theirs if to == OURS else conversion.ours


def source_type(conversion: Conversion, to: str) -> str:
    """Return the model type in config.json of the class that a conversion to ``to`` starts from."""
    config_class = getattr(source_class(conversion, to), "config_class", None)
    return config_class.model_type if config_class else conversion.name


def load(conversion: Conversion, ours: bool, folder: Path) -> Any:
    """Load the model in ``folder``, of our class or of theirs, in float32."""
    if not ours and conversion.read:
        return conversion.read(folder)
    model_class = conversion.ours if ours else conversion.theirs
    may_hold = () if ours else conversion.unread_by_theirs
    return load_whole(model_class, folder, conversion.computed_in_theirs, may_hold)


def load_whole(
    model_class: Any,
    folder: Path,
    may_lack: tuple[str, ...] = (),
    may_hold: tuple[str, ...] = (),
    **options: Any,
) -> PreTrainedModel:
    """Load the model in ``folder`` in float32, and require that no weight is missing or unused.

    Args:
        model_class: a class of transformers' models.
        may_lack: weights that may be missing because the class computes them.
        may_hold: weights that the file may contain although the class does not use them.
        options: passed to `from_pretrained`.
    """
    if "config" not in options:
        check_size(model_class, model_class.config_class.from_pretrained(folder))
    # Shape mismatches are reported below, by name.
    report_all = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model, report = model_class.from_pretrained(folder, dtype=torch.float32, **report_all, **options)
    if set(report["missing_keys"]) == POOLER:
        return load_whole(model_class, folder, may_lack, may_hold, add_pooling_layer=False, **options)
    report["missing_keys"] = set(report["missing_keys"]) - set(may_lack)
    report["unexpected_keys"] = set(report["unexpected_keys"]) - set(may_hold)
    for problem, said in PROBLEMS.items():
        if found := sorted(report.get(problem) or ()):
            reason = mismatch(found) if problem == "mismatched_keys" else f"{said} {found[0]}{others(found)}"
            raise ValueError(f'model "{folder}" is not a complete {model_class.__name__}: {reason}')
    return model


def save(conversion: Conversion, model: nn.Module, folder: Path) -> None:
    """Save ``model``, of our class or of theirs."""
    if isinstance(model, PreTrainedModel):
        model.save_pretrained(folder)
    elif conversion.write is not None:
        conversion.write(model, folder)
    else:
        raise ValueError(f'the conversion "{conversion.name}" cannot write a {type(model).__name__}')


def carry_processor(conversion: Conversion, source: Path, target: Path, to_ours: bool) -> None:
    """Write the image preprocessing of the converted model, if the source specifies it."""
    copy_files(source, target, PROCESSOR_FILES)
    if conversion.carry_processor:
        conversion.carry_processor(source, target, to_ours)


def converted(conversion: Conversion, origin: Any, to: str, dtype: torch.dtype | None = None) -> Any:
    """Convert the model ``origin`` to the class named ``to``, with bit-identical weights and the same generation
    config.

    Args:
        origin: model of our class or of theirs.
        dtype: dtype for the weights that it represents exactly; by default that of ``origin``.
    """
    dtype = dtype or next(origin.parameters()).dtype
    to_ours = to == OURS
    if conversion.prepare and not to_ours:
        origin = conversion.prepare(origin)
    if not to_ours and isinstance(origin.config, TravellingConfig):
        require_fixed(conversion.name, origin.config, ONLY_OURS)
    config = conversion.to_ours(origin) if to_ours else conversion.to_theirs(origin.config)
    if conversion.names is None:
        target_class = conversion.ours if to_ours else conversion.theirs
        changed = conversion.file_to_ours if to_ours else conversion.file_to_theirs
        return round_without_loss(reread(origin, target_class, config, changed), dtype)
    target: Any
    if to_ours:
        weights, target = conversion.weights_to_ours(origin, config), conversion.ours(config)
    else:
        weights, target = conversion.weights_to_theirs(origin), (conversion.build or conversion.theirs)(config)
    own = target.state_dict()
    only_theirs = {*conversion.zero_in_theirs, *conversion.computed_in_theirs} - weights.keys()
    if weights.keys() != own.keys() - only_theirs:
        raise ValueError(
            f"the name table does not fit the target: {sorted(weights.keys() ^ (own.keys() - only_theirs))}"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            # Some classes store a vector as a matrix with one row.
            own[name].copy_(weight.reshape(own[name].shape))
    if getattr(origin, "generation_config", None) is not None:
        target.generation_config = copy.deepcopy(origin.generation_config)
    return round_without_loss(target, dtype)


def reread(
    origin: Any,
    target_class: Any,
    config: PreTrainedConfig,
    changed: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> PreTrainedModel:
    """Load the model ``origin`` in float32 as another class that reads the same file, or the ``changed`` file."""
    origin._weight_conversions = None  # would restore the names of an older file that the model was read from
    with tempfile.TemporaryDirectory() as folder:
        own = other = Path(folder) / "own"
        origin.save_pretrained(own, save_original_format=True)
        if changed:
            other = Path(folder) / "other"
            other.mkdir()
            save_file(changed(load_file(own / WEIGHTS)), other / WEIGHTS, {"format": "pt"})
        return load_whole(target_class, other, config=config)


@torch.no_grad()
def round_without_loss(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Convert ``model`` to ``dtype``, except tensors that it cannot represent exactly, such as position tables."""
    for tensor in (*model.parameters(), *model.buffers()):
        rounded = tensor.to(dtype)
        if tensor.is_floating_point() and torch.equal(rounded.to(tensor.dtype), tensor):
            tensor.data = rounded
    return model
