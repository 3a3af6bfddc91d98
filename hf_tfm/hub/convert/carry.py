"""What goes along with a converted model: its tokenizer or image processor, and the record of its training."""

import json
import shutil
from pathlib import Path

from transformers import CONFIG_MAPPING, AutoTokenizer

from ..card import write_card
from ..results import HISTORY, RESULTS, RunRecord

# What a tokenizer is saved as, byte-pair and SentencePiece alike.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "target_vocab.json",
    "*.spm",
)

# What an image processor is saved as.
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def copy_files(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    """Copy the files that match, byte for byte."""
    for pattern in patterns:
        for path in source.glob(pattern):
            shutil.copyfile(path, target / path.name)


def copy_record(source: Path, target: Path, name: str) -> None:
    """Copy what is known of the training run, where there is a record, and write the card of the new model.

    The card shows how transformers loads the model, so there is none for a folder of another library.
    """
    if not (source / RESULTS).is_file():
        return
    for file in (RESULTS, HISTORY):
        if (source / file).is_file():
            shutil.copyfile(source / file, target / file)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") in CONFIG_MAPPING:
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
