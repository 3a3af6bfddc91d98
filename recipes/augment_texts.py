"""Augment a text data set: replace words with the predictions of a masked language model, as in TinyBERT.

    hf-tfm run augment_texts --dataset_name nyu-mll/glue --task sst2 --model runs/bert --output_dir data/augmented
    hf-tfm run distill_task --dataset_name data/augmented --task sst2 ...

The training split is augmented, the others are copied. `load_dataset` reads the resulting folder.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import torch
from accelerate import PartialState
from transformers import AutoModelForMaskedLM

from hf_tfm.arguments import DatasetArguments
from hf_tfm.command import run_recipe
from hf_tfm.data import glue
from hf_tfm.data.labelled_texts import check_empty, load_texts
from hf_tfm.data.source import take_split
from hf_tfm.data.text import column_path, texts_at
from hf_tfm.distillation.substitution import Substituter, Substitution, with_copies
from hf_tfm.hub.loading import load_model, load_tokenizer
from hf_tfm.hub.pretrained import MASKED_WORDS, check_kind
from hf_tfm.options import parse_arguments
from hf_tfm.writing import explain_write_errors


@dataclass(kw_only=True)
class AugmentArguments(DatasetArguments):
    """Arguments of the augmentation.

    Args:
        task: GLUE task, which determines text_columns.
        text_columns: columns to augment; default, those of the task, or the only string column.
        train_split: split to augment.
        model: folder or Hub id of a masked language model, with its tokenizer.
        trust_remote_code: run the code in the model's repository.
        substitution: how words are replaced, see `Substitution`: copies, probability, candidates, max_length, seed.
        batch_tokens: padded tokens that the model reads at once.
        mixed_precision: no (float32) or bf16 autocast.
        output_dir: folder to create.
        progress: show a progress bar.
    """

    model: str
    output_dir: str
    task: str | None = None
    text_columns: list[str] = field(default_factory=list)
    train_split: str = "train"
    trust_remote_code: bool = False
    substitution: Substitution = field(default_factory=Substitution)
    batch_tokens: int = 8192
    mixed_precision: Literal["no", "bf16"] = "no"
    progress: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="batch_tokens")
        if Path(self.output_dir).exists():
            raise ValueError(f"output_dir {self.output_dir} already exists; choose another folder")
        if self.task:
            glue.find_task(self.task)


def columns_of(args: AugmentArguments, row: dict) -> list[str]:
    """Return the columns to augment."""
    strings = [name for name, value in row.items() if isinstance(value, str)]
    columns = args.text_columns or (list(glue.find_task(args.task).text_columns) if args.task else strings)
    if not args.text_columns and not args.task and len(strings) != 1:
        raise ValueError(f"text_columns must be given: the columns of strings are {', '.join(strings) or 'none'}")
    for name in columns:
        column_path(row, name, "text_columns")
    return columns


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_arguments(AugmentArguments, Path(__file__), argv)
    splits = glue.load_task(glue.find_task(args.task), *args.source) if args.task else load_texts(*args.source)
    rows = take_split(splits, args.train_split, "train_split")
    columns = columns_of(args, rows[0])
    for name in columns:
        path = column_path(rows[0], name, "text_columns")
        for start in range(0, len(rows), 1000):  # check that all are text
            texts_at(rows[start : start + 1000], list(range(start, min(start + 1000, len(rows)))), path)
        if name in rows.column_names:
            check_empty(rows, name, name)
    device = PartialState().device
    check_kind("model", args.model, MASKED_WORDS["model"], args.trust_remote_code)
    tokenizer = load_tokenizer(args.model, "model", None, args.trust_remote_code)
    model = load_model(AutoModelForMaskedLM, args.model, "model", None, args.trust_remote_code).to(device)
    substituter = Substituter(model, tokenizer, args.substitution)
    with torch.autocast(device.type, torch.bfloat16, enabled=args.mixed_precision == "bf16"):
        grown = with_copies(rows, columns, substituter, args.batch_tokens, args.progress)
    folder = Path(args.output_dir)
    part = folder.with_name(f".part-{folder.name}")
    with explain_write_errors(folder):
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, split in {**splits, args.train_split: grown}.items():
            split.to_parquet(str(part / f"{name}.parquet"))
        content = {**asdict(args), "text_columns": columns, "rows": {args.train_split: [len(rows), len(grown)]}}
        (part / "augmentation.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        part.rename(folder)
    print(f"{folder}: {args.train_split} has {len(grown):,} texts, augmented from {len(rows):,}")
    return 0


if __name__ == "__main__":
    run_recipe(__file__, main)
