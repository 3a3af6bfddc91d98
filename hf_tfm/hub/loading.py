"""Load models, tokenizers and image processors safely: no remote code by default, no missing weights.

folder or Hub id -> config.json checked -> memory estimated -> loaded, every weight accounted for -> eval mode

Every error is a single line that names the argument and the model. Remote code runs only with
``trust_remote_code=True``; by default, transformers would ask for confirmation on standard input.
"""

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoTokenizer,
    AutoVideoProcessor,
    BaseImageProcessor,
    BaseVideoProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file

from ..command import REMOTE_CODE, cause
from ..finite import first_not_finite
from ..memory import check_saved_size

# Exceptions that libraries raise when files have an unexpected structure.
UNCLEAR = (AttributeError, IndexError, KeyError, TypeError)
# Weights that some classes of a family do not read: poolers, norms of the other pooling mode, buffers.
UNREAD = re.compile(
    r"pooler|position_ids|num_batches_tracked|masked_bias|attn\.bias|inv_freq|vit\.(layernorm|fc_norm)\.|mask_token"
)
PROCESSOR, VIDEO_PROCESSOR = "preprocessor_config.json", "video_preprocessor_config.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# Fields of an image processor: name -> description of valid values, and a check of a single number.
IMAGE_FIELDS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "image_mean": ("finite numbers", math.isfinite),
    "image_std": ("finite numbers above 0", lambda number: 0 < number < math.inf),
    "rescale_factor": ("a finite number above 0", lambda number: 0 < number < math.inf),
    **dict.fromkeys(("size", "crop_size"), ("pixels, at least 1", lambda number: 1 <= number < math.inf)),
    "resample": ("a filter of PIL, 0 to 5", lambda number: number in range(6)),
}
HAS_CLASSES = re.compile("Classification|Detection|Segmentation|TimmWrapper")  # in names of classes of models
MOST_CLASSES = 10**6
MOST_LAYERS = 10**4
# Loggers of transformers. The last one lists the layers that a plan of tensor parallelism leaves out, parallel or not.
REPORTING = tuple(
    f"transformers.{name}" for name in ("modeling_utils", "utils.loading_report", "distributed.tensor_parallel")
)
ATTENTION_FIELDS = ("_attn_implementation", "attn_implementation", "_attn_implementation_internal")


class LoadingError(ValueError):
    """A model, tokenizer or image processor cannot be loaded; the message names the argument and the cause."""


@contextmanager
def quiet_reports() -> Iterator[None]:
    """Suppress transformers' report of missing and unexpected weights, which the caller checks itself."""
    before = [(logger, logger.level) for logger in map(logging.getLogger, REPORTING)]
    for logger, _ in before:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in before:
            logger.setLevel(level)


@contextmanager
def explained(argument: str, model: str, code_option: bool = True) -> Iterator[None]:
    """Convert any loading error to a `LoadingError`.

    Args:
        argument: name of the argument that specifies the model.
        code_option: True if the caller has an argument ``trust_remote_code`` that the message may recommend.
    """
    try:
        with quiet_reports():
            yield
    except LoadingError:
        raise
    except Exception as error:  # libraries raise arbitrary exceptions for unreadable files
        if REMOTE_CODE.search(str(error)):
            remedy = ", which runs only with trust_remote_code true" if code_option else ", which is not run"
            reason = f"it brings its own code{remedy}"
        else:
            reason = cause(error, code_option).removeprefix(f"{model}: ")
            if isinstance(error, UNCLEAR):
                reason = f"its files cannot be read ({type(error).__name__}: {reason})"
        raise LoadingError(f'{argument} "{model}": {reason}') from error


def load_config(
    model: str, argument: str = "model", revision: str | None = None, trust_remote_code: bool | None = False
) -> PreTrainedConfig:
    """Load the configuration of a folder or Hub id.

    Args:
        argument: name of the caller's argument, for errors.
        trust_remote_code: run the model's own code; None if the caller has no such option.

    Raises:
        LoadingError: there is none, or it has invalid values.
    """
    with explained(argument, model, trust_remote_code is not None):
        check_revision(model, revision)
        path = cached_file(model, CONFIG_NAME, revision=revision)
        if path is None:
            raise ValueError(f"it is not a saved model: it has no {CONFIG_NAME}")
        check_config_file(Path(path), named=argument != "model_name_or_path")
        return AutoConfig.from_pretrained(model, revision=revision, trust_remote_code=bool(trust_remote_code))


def require_model(
    argument: str, source: str, revision: str | None = None, files: Sequence[str] = (CONFIG_NAME,)
) -> None:
    """Check that a model or tokenizer exists, as a local folder or a Hub id.

    Args:
        argument: name of the argument, for the error.
        files: files of which at least one must exist on the Hub.

    Raises:
        ValueError: it does not exist.
    """
    if Path(source).is_dir():
        return
    for file in files:
        try:
            cached_file(source, file, revision=revision)
            return
        except OSError as error:
            missing = error
    reason = str(missing).splitlines()[0]
    raise ValueError(f'{argument} "{source}" is neither a local folder nor found on the Hub: {reason}') from missing


def check_config_file(path: Path, named: bool = True) -> None:
    """Refuse a config.json that would use up the memory, or run code, while it is read.

    Raises:
        ValueError: names the field.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} must be a mapping, got {type(content).__name__}")
    for field, value in content.items():
        if field == "num_labels" or field.endswith(("_layers", "_depth")):
            most = MOST_CLASSES if field == "num_labels" else MOST_LAYERS
            if isinstance(value, int) and value > most:
                raise ValueError(f"{field} of its {path.name} must be at most {most:,}, got {value:,}")
        if field in ATTENTION_FIELDS and "/" in str(value):
            raise ValueError(f'{field} of its {path.name} refers to code of "{value}", which is not run')
    check_config_types(content, path.name)
    if named:
        check_class_names(content, path.name)


def check_config_types(content: dict[str, Any], file: str) -> None:
    """Refuse standard fields of a wrong type, for which transformers would raise unclear errors.

    Raises:
        ValueError: names the field.
    """
    kinds = {**dict.fromkeys(("id2label", "label2id", "quantization_config", "auto_map"), dict), "model_type": str}
    names = {dict: "a mapping", str: "text"}
    for field, kind in kinds.items():
        if (value := content.get(field)) is not None and not isinstance(value, kind):
            raise ValueError(f"{field} of its {file} must be {names[kind]}, got {value!r:.60}")
    classes = content.get("architectures")
    if classes is not None and not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
        raise ValueError(f"architectures of its {file} must be a list of names of classes, got {classes!r:.60}")
    for field in ("dtype", "torch_dtype"):
        name = content.get(field)
        if not isinstance(name, str) or name == "auto":
            continue
        if not isinstance(getattr(torch, name.removeprefix("torch."), None), torch.dtype):
            raise ValueError(f'{field} of its {file} must be a torch dtype such as "float32", got "{name}"')


def check_class_names(content: dict[str, Any], file: str) -> None:
    """Refuse names of classes that are not numbered 0 to n - 1, of a model that has classes.

    Encoders, language models and translation models have such a table too, which nobody reads.

    Raises:
        ValueError: with the first other number.
    """
    labels = content.get("id2label")
    if not any(HAS_CLASSES.search(name) for name in content.get("architectures") or ()):
        return
    if labels and {str(number) for number in labels} != {str(number) for number in range(len(labels))}:
        odd = next(number for number in labels if str(number) not in map(str, range(len(labels))))
        raise ValueError(f'id2label of its {file} must number {len(labels)} names from 0 on, got "{odd}"')


def check_revision(model: str, revision: str | None) -> None:
    """Refuse a revision for a local folder or file.

    Raises:
        ValueError: names the revision.
    """
    if revision is not None and Path(model).exists():
        raise ValueError(f'revision "{revision}" applies only to a model on the Hub, but this is a local path')


def check_json_files(model: str, *names: str) -> None:
    """Refuse a local folder in which one of the named files is not a JSON object.

    Raises:
        ValueError: names the file.
    """
    for name in names:
        if (path := Path(model) / name).is_file() and not isinstance(content := read_json(path), dict):
            raise ValueError(f"its {name} must be a mapping, got {content!r:.60}")


def check_image_fields(model: str) -> None:
    """Refuse a local image processor with settings that make pixels infinite or images empty.

    Raises:
        ValueError: names the field.
    """
    path = Path(model) / PROCESSOR
    for field, value in (read_json(path) if path.is_file() else {}).items():
        if field not in IMAGE_FIELDS or value is None:
            continue
        wanted, fits = IMAGE_FIELDS[field]
        values = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else [value]
        if not all(number is None or (type(number) in (int, float) and fits(number)) for number in values):
            raise ValueError(f"{field} of its {PROCESSOR} must be {wanted}, got {value!r:.60}")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        ValueError: it is not valid JSON; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # includes UnicodeDecodeError
        raise ValueError(f"{path} is not a valid JSON file: {error}") from error


def load_tokenizer(
    model: str, argument: str = "model", revision: str | None = None, trust_remote_code: bool | None = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or Hub id; arguments as in `load_config`.

    Raises:
        LoadingError: there is none, or it cannot be read.
    """
    with explained(argument, model, trust_remote_code is not None):
        check_revision(model, revision)
        check_json_files(model, *TOKENIZER_FILES)
        if (file := Path(model) / TOKENIZER_FILES[0]).is_file() and not isinstance(read_json(file).get("model"), dict):
            raise ValueError(f'its {file.name} has no mapping "model", so it is not a saved tokenizer')
        return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=bool(trust_remote_code))


def load_image_processor(
    model: str, argument: str = "model", revision: str | None = None, trust_remote_code: bool | None = False
) -> BaseImageProcessor:
    """Load the image processor of a folder or Hub id; arguments as in `load_config`.

    Raises:
        LoadingError: there is none, or it cannot be read.
    """
    return load_processor(AutoImageProcessor, "image", PROCESSOR, model, argument, revision, trust_remote_code)


def load_video_processor(
    model: str, argument: str = "model", revision: str | None = None, trust_remote_code: bool | None = False
) -> BaseVideoProcessor:
    """Load the video processor of a folder or Hub id; arguments as in `load_config`.

    Raises:
        LoadingError: there is none, or it cannot be read.
    """
    return load_processor(AutoVideoProcessor, "video", VIDEO_PROCESSOR, model, argument, revision, trust_remote_code)


def load_processor(
    auto_class: Any,
    kind: str,
    file: str,
    model: str,
    argument: str,
    revision: str | None,
    trust_remote_code: bool | None,
) -> Any:
    """Load the processor of a folder or Hub id; other arguments as in `load_config`.

    Args:
        auto_class: its Auto class.
        kind: "image" or "video".
        file: its usual file.

    Raises:
        LoadingError: there is none, or it cannot be read.
    """
    with explained(argument, model, trust_remote_code is not None):
        check_revision(model, revision)
        check_json_files(model, file, "processor_config.json")
        if kind == "image":
            check_image_fields(model)
        try:
            return auto_class.from_pretrained(model, revision=revision, trust_remote_code=bool(trust_remote_code))
        except OSError as error:
            raise LoadingError(f'{argument} "{model}" has no {kind} processor ({file}): save it there too') from error


def load_model(
    kind: Any,
    model: str,
    argument: str = "model",
    revision: str | None = None,
    trust_remote_code: bool | None = False,
    may_lack: Callable[[str], bool] = lambda name: False,
    **options: Any,
) -> PreTrainedModel:
    """Load a model in float32 and eval mode, with all its weights.

    Args:
        kind: an Auto class or a model class.
        argument, revision, trust_remote_code: see `load_config`.
        may_lack: weight name -> True if the weight may be missing, and is then random.
        options: further arguments of ``from_pretrained``.

    Raises:
        LoadingError: weights are missing, have another shape than in config.json, are not finite, or exceed the memory
            of this machine; or files cannot be read.
    """
    where = {"revision": revision, "trust_remote_code": bool(trust_remote_code)}
    config = load_config(model, argument, revision, trust_remote_code)
    with explained(argument, model, trust_remote_code is not None):
        check_index(Path(model))
        check_json_files(model, "generation_config.json")
        check_size(kind, config, bool(trust_remote_code))
        # Weights may be stored in half precision, but only the mixed_precision argument selects the compute precision.
        # Shape mismatches are reported below, by name.
        loaded, report = kind.from_pretrained(
            model, output_loading_info=True, ignore_mismatched_sizes=True, dtype=torch.float32, **where, **options
        )
        check_weights(loaded, report, may_lack)
    return loaded.eval()


def load_with_processor(
    auto_class: Any, model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load an image model, in float32, and its image processor from a folder or the Hub.

    Raises:
        ValueError: some weights or the processor were not saved, or images have other channels than RGB.
    """
    loaded = load_model(auto_class, model, revision=revision, trust_remote_code=trust_remote_code)
    if (channels := getattr(loaded.config, "num_channels", 3)) != 3:
        raise ValueError(f'num_channels of "{model}" must be 3, as images are read as RGB, got {channels}')
    return loaded, load_image_processor(model, revision=revision, trust_remote_code=trust_remote_code)


def check_index(folder: Path) -> None:
    """Refuse a weights index that names files missing from the folder; without an index, do nothing.

    Raises:
        ValueError: names the file.
    """
    path = folder / SAFE_WEIGHTS_INDEX_NAME
    if not path.is_file():
        return
    content = read_json(path)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"its {path.name} has no weight_map")
    for name in dict.fromkeys(weight_map.values()):
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file():
            raise ValueError(f"its {path.name} names {name!r}, which is not a file of the folder")


def check_weights(
    model: PreTrainedModel, report: dict[str, Any], may_lack: Callable[[str], bool] = lambda name: False
) -> None:
    """Refuse a model with weights that were not saved, do not fit, or are not finite.

    Args:
        report: loading info of ``from_pretrained`` with ``ignore_mismatched_sizes``.
        may_lack: see `load_model`.

    Raises:
        ValueError: names up to three weights.
    """
    if wrong := sorted(report.get("mismatched_keys") or ()):
        raise ValueError(mismatch(wrong))
    if missing := sorted(name for name in report["missing_keys"] if not may_lack(name)):
        raise ValueError(f"it has no weights for {', '.join(missing[:3])}{others(missing, 3)}: they would be random")
    if left := sorted(unread(model, report)):
        raise ValueError(no_place(left))
    if name := first_not_finite(model):
        raise ValueError(f"its weight {name} holds values that are not finite")


def unread(model: PreTrainedModel, report: dict[str, Any]) -> list[str]:
    """Return saved weights, below any head, that the model does not have."""
    base = f"{model.base_model_prefix}."
    return [name for name in report["unexpected_keys"] if f".{base}" in f".{name}" and not UNREAD.search(name)]


def no_place(names: Sequence[str]) -> str:
    """Describe saved weights that the model of config.json does not have."""
    return f"the model of its config.json lacks the weights {', '.join(names[:3])}{others(names, 3)} of its files"


def mismatch(found: Sequence[tuple[str, Sequence[int], Sequence[int]]]) -> str:
    """Describe weights whose shape differs from that in config.json.

    Args:
        found: name, shape in the file, and shape according to config.json.
    """
    name, saved, expected = found[0]
    more = f"; so do {len(found) - 1} others" if len(found) > 1 else ""
    return f"the shape of its weight {name}, {tuple(saved)}, differs from {tuple(expected)} in its config.json{more}"


def others(names: Sequence[Any], shown: int = 1) -> str:
    """Return the end of a truncated list, " and N more"."""
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def check_size(kind: Any, config: PreTrainedConfig, trust_remote_code: bool = False) -> None:
    """Refuse a model that is larger than the memory, before allocating any of it.

    Args:
        kind: an Auto class or a model class.

    Raises:
        TooLarge: reports the bytes of its weights in float32 and the bytes available.
    """
    build = getattr(kind, "_from_config", None) or kind.from_config
    options = {"trust_remote_code": trust_remote_code} if hasattr(kind, "from_config") else {}
    check_saved_size(partial(build, **options), config)


def check_vocabulary(
    model: str, config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, argument: str = "model"
) -> None:
    """Refuse a tokenizer with ids for which the model has no embedding.

    Raises:
        LoadingError: reports both sizes.
    """
    size = getattr(config, "vocab_size", None)
    if size is not None and len(tokenizer) > size:
        raise LoadingError(
            f'{argument} "{model}": its tokenizer has {len(tokenizer)} tokens, but the model only '
            f"{size} embeddings: they do not match"
        )
