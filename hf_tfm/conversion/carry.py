"""Copy tokenizer, image processor and pooling files and the training record to a converted model."""

import glob
import json
import shutil
from pathlib import Path

from transformers import CONFIG_MAPPING

from ..hub.card import write_card
from ..hub.loading import load_tokenizer, read_json
from ..hub.results import RunRecord
from ..hub.saved_files import CODE_FIELDS, HISTORY, RESULTS, SENTENCE_FILES, SENTENCE_MODULES, inside


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the matching files unchanged, except for references to remote code, which is not copied.

    Args:
        patterns: relative to ``source``; files keep their folders.

    Raises:
        ValueError: a file is a symbolic link to outside of the folder, or a damaged JSON file.
    """
    for pattern in patterns:
        for path in source.glob(pattern):
            # A snapshot in the Hub's cache consists of links to its blobs.
            if path.is_symlink() and not is_cached(source) and not inside(path, source):
                raise ValueError(f"{path} is a link to a file outside the folder, so it is not copied")
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            content = read_json(path) if path.suffix == ".json" else None
            if isinstance(content, dict) and not content.keys().isdisjoint(CODE_FIELDS):
                kept = {name: value for name, value in content.items() if name not in CODE_FIELDS}
                text = json.dumps(kept, indent=2, ensure_ascii=False) + "\n"
                copy.write_text(text, encoding="utf-8")
            else:
                shutil.copyfile(path, copy)


def copy_sentence_modules(source: Path, target: Path) -> None:
    """Copy pooling and further modules of a sentence-transformers model, which follow the encoder.

    Raises:
        ValueError: modules.json is damaged, or names a folder outside of the source; see also `copy_files`.
    """
    if not (source / SENTENCE_MODULES).is_file():
        return
    modules = read_json(source / SENTENCE_MODULES)
    if not isinstance(modules, list) or not all(
        isinstance(m, dict) and isinstance(m.get("path"), str) for m in modules
    ):
        raise ValueError(f'{source / SENTENCE_MODULES} must be a list of modules, each with its "path"')
    folders = [module["path"] for module in modules if module["path"]]
    for folder in folders:
        if not inside(source / folder, source):
            raise ValueError(f'{source / SENTENCE_MODULES} names "{folder}", which is outside of the folder')
    of_modules = [
        f"{glob.escape(folder)}/{kind}" for folder in folders for kind in ("*.json", "*.safetensors", "*.bin")
    ]
    copy_files(source, target, (*SENTENCE_FILES, *of_modules))


def is_cached(folder: Path) -> bool:
    """Return True if a folder is a snapshot in the Hub's cache."""
    return folder.parent.name == "snapshots" and (folder.parents[1] / "blobs").is_dir()


def copy_record(source: Path, target: Path, name: str) -> None:
    """Copy the record of the training run, if there is one, and write the card of the new model.

    The card shows how to load the model with transformers, so a folder of another library gets none.
    """
    if not (source / RESULTS).is_file():
        return
    record = RunRecord.load(source)
    record.save(target)
    copy_files(source, target, (HISTORY,))
    config = read_json(target / "config.json")
    if config.get("model_type") in CONFIG_MAPPING:
        write_card(target, record, model_id=name)


def same_tokenizer(source: Path, target: Path) -> bool | None:
    """Check that both folders load as the same tokenizer; return None if there is no tokenizer.

    Raises:
        ValueError: they differ, for instance because the target's model type implies its own tokenizer class.
    """
    if not (source / "tokenizer_config.json").is_file():
        return None
    before, after = load_tokenizer(source, "model", None, None), load_tokenizer(target, "output_dir", None, None)
    if type(before) is not type(after) or before.get_vocab() != after.get_vocab():
        raise ValueError(
            f"the tokenizer of {source} is a {type(before).__name__}, but with the converted model it loads as a "
            f"{type(after).__name__} with {len(after)} tokens"
        )
    return True
