"""Convert a trained model into another library's class and back, with proof that both compute the same.

source folder -> configuration and weights under the other names -> saved, loaded again, compared -> output folder
"""

import copy
import json
import shutil
import tempfile
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError
from transformers import AutoTokenizer, PreTrainedModel

from ..card import write_card
from ..results import HISTORY, RESULTS, RunRecord
from .conversion import Conversion
from .marian_pegasus import MARIAN, PEGASUS
from .parity import CERTIFICATE, compare, provenance, weight_hashes

CONVERSIONS = (MARIAN, PEGASUS)
OURS = "tfm"
TARGETS = (*(conversion.name for conversion in CONVERSIONS), OURS)

# What a tokenizer is saved as, byte-pair and SentencePiece alike.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "target_vocab.json",
    "*.spm",
)


def convert(source: str | Path, to: str, output_dir: str | Path, revision: str | None = None) -> dict:
    """Write ``source`` as a model of another class, with a parity certificate beside it.

    Both models are run in float32 on the same inputs, the new one as loaded from disk. Nothing is written unless they
    agree. Tokenizer files are copied; the record of the run that trained the model too, and its card written anew.

    Args:
        source: folder of a saved model, or its id on the Hub.
        to: "marian" for transformers' `MarianMTModel` (post-norm) or "pegasus" for its
            `PegasusForConditionalGeneration` (pre-norm), which load without this package or remote code; "tfm" for
            our own class.
        output_dir: folder to make; it may exist if it is empty.
        revision: branch, tag or commit of a model on the Hub.

    Returns:
        The certificate, as in ``parity_certificate.json``: ``source`` and ``target`` (class and sha256 of each weight
        file), ``max_abs_difference``, ``max_abs_logit``, ``tolerance``, ``greedy_tokens_equal``, ``tokenizer_equal``
        (None without a tokenizer), ``inputs``, ``versions``, ``date``.

    Raises:
        ValueError: ``to`` is unknown or already the class of the source; the target cannot express the source; or the
            two models differ.
        FileExistsError: ``output_dir`` is a file, or a folder that is not empty.
    """
    output_dir = Path(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise FileExistsError(f"output_dir {output_dir} is not an empty folder: choose another one")
    folder = local_folder(source, revision)
    conversion = find_conversion(folder, to)
    origin = load(source_class(conversion, to), folder, may_lack=conversion.computed_in_theirs)
    target = converted(conversion, origin, to)

    # The nearest folder that exists is on the same disk, so the finished model moves into place in one step.
    nearest = next(parent for parent in output_dir.absolute().parents if parent.exists())
    with tempfile.TemporaryDirectory(dir=nearest, prefix=".converting-") as temporary:
        work = Path(temporary) / "model"
        save(target, work, conversion.computed_in_theirs)
        copy_tokenizer(folder, work)
        certificate = {
            "source": {
                # Of a local folder the name only: certificates travel, and paths say things about their machine.
                "model": folder.resolve().name if Path(source).is_dir() else str(source),
                "revision": None if Path(source).is_dir() else folder.name,
                "class": type(origin).__name__,
                "weights": weight_hashes(folder),
            },
            "target": {"class": type(target).__name__, "weights": weight_hashes(work)},
            # Both loaded anew: a bfloat16 model has rounded its position table, and `.float()` would not undo that.
            **compare(
                load(type(origin), folder, torch.float32, may_lack=conversion.computed_in_theirs),
                load(type(target), work, torch.float32),
            ),
            "tokenizer_equal": same_tokenizer(folder, work),
            **provenance(),
        }
        copy_record(folder, work, output_dir.absolute().name)
        (work / CERTIFICATE).write_text(json.dumps(certificate, indent=2) + "\n", encoding="utf-8")
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        if output_dir.exists():
            output_dir.rmdir()
        work.rename(output_dir)
    return certificate


def local_folder(source: str | Path, revision: str | None) -> Path:
    """The folder of a saved model, downloaded where ``source`` is an id on the Hub."""
    if Path(source).is_dir():
        return Path(source)
    ignored = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.py"]
    try:
        return Path(snapshot_download(str(source), revision=revision, ignore_patterns=ignored))
    except HFValidationError as error:
        raise ValueError(f"source {source} is neither a folder nor an id on the Hub") from error


def find_conversion(folder: Path, to: str) -> Conversion:
    """The conversion of the model in ``folder`` to the class named ``to``."""
    if to not in TARGETS:
        raise ValueError(f'to must be one of {", ".join(TARGETS)}, got "{to}"')
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"source {folder} is not a saved model: it has no config.json")
    model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    for conversion in CONVERSIONS:
        wanted = source_class(conversion, to).config_class.model_type
        if to in (conversion.name, OURS) and model_type == wanted:
            return conversion
    raise ValueError(f'no conversion of a model of type "{model_type}" to "{to}"')


def source_class(conversion: Conversion, to: str) -> type[PreTrainedModel]:
    """The class that a conversion to ``to`` starts from."""
    return conversion.theirs if to == OURS else conversion.ours


def load(
    model_class: type[PreTrainedModel],
    folder: Path,
    dtype: torch.dtype | str = "auto",
    may_lack: tuple[str, ...] = (),
) -> PreTrainedModel:
    """The model in ``folder``, by default in the dtype it is saved in, with every weight accounted for.

    Args:
        may_lack: weights that the class computes where the file does not hold them.
    """
    model, report = model_class.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    report["missing_keys"] = set(report["missing_keys"]) - set(may_lack)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(problem):
            raise ValueError(f"{folder} is not a whole {model_class.__name__}: {problem} {sorted(report[problem])}")
    return model


def save(model: PreTrainedModel, folder: Path, computed: tuple[str, ...]) -> None:
    """Save ``model``; the weights that its class computes in float32, so that loading it in any dtype is exact."""
    weights = model.state_dict()
    if model.dtype != torch.float32 and weights.keys() >= set(computed):
        fresh = type(model)(model.config).state_dict()
        weights.update({name: fresh[name] for name in computed})
    model.save_pretrained(folder, state_dict=weights)


def converted(conversion: Conversion, origin: PreTrainedModel, to: str) -> PreTrainedModel:
    """The model ``origin`` as the class named ``to``: same weights in the same dtype, same generation settings."""
    if to == OURS:
        config = conversion.to_ours(origin)
        weights = conversion.weights_to_ours(origin, config)
        target = conversion.ours(config)
    else:
        config = conversion.to_theirs(origin.config)
        weights = conversion.weights_to_theirs(origin)
        target = conversion.theirs(config)
    target = target.to(origin.dtype)
    own = target.state_dict()
    only_theirs = {*conversion.zero_in_theirs, *conversion.computed_in_theirs} - weights.keys()
    if weights.keys() != own.keys() - only_theirs:
        raise ValueError(
            f"the name table does not fit the target: {sorted(weights.keys() ^ (own.keys() - only_theirs))}"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            # Some classes keep a vector as a matrix of one row.
            own[name].copy_(weight.reshape(own[name].shape))
    target.generation_config = copy.deepcopy(origin.generation_config)
    return target


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files, byte for byte."""
    for pattern in TOKENIZER_FILES:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def copy_record(source: Path, target: Path, name: str) -> None:
    """Copy what is known of the training run, where there is a record, and write the card of the new model."""
    if not (source / RESULTS).is_file():
        return
    for file in (RESULTS, HISTORY):
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    write_card(target, RunRecord.load(source), model_id=name)


def same_tokenizer(source: Path, target: Path) -> bool | None:
    """Whether both folders load as the same tokenizer; None where there is none.

    Raises:
        ValueError: they differ, for instance because the target's model type brings a tokenizer class of its own.
    """
    if not (source / "tokenizer_config.json").is_file():
        return None
    before, after = AutoTokenizer.from_pretrained(source), AutoTokenizer.from_pretrained(target)
    if type(before) is not type(after) or before.get_vocab() != after.get_vocab():
        raise ValueError(
            f"the tokenizer of {source} is a {type(before).__name__}, but beside the converted model it loads as a "
            f"{type(after).__name__} with {len(after)} tokens"
        )
    return True
