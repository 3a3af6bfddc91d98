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

from hf_tfm.command import run_recipe
from hf_tfm.data import glue
from hf_tfm.data.labelled_texts import check_empty, load_texts
from hf_tfm.data.source import take_split
from hf_tfm.data.text import column_path, texts_at
from hf_tfm.distillation.substitution import Substituter, Substitution, with_copies
from hf_tfm.hub.loading import load_model, load_tokenizer
from hf_tfm.hub.pretrained import MASKED_WORDS, check_kind
from hf_tfm.options import parse_arguments
from hf_tfm.values import check_bounds, conform_fields
from hf_tfm.writing import explain_write_errors


@dataclass(kw_only=True)
class AugmentArguments:
    """Knobs of the augmentation.

    Args:
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, or "number-parity".
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        data_files: files by split, where dataset_name is a format such as "parquet".
        task: of GLUE; it knows text_columns.
        text_columns: columns of texts that change; default, the task's, or the only column of strings.
        train_split: split that grows.
        model: folder or Hub id of a masked language model, ours or transformers', with its tokenizer.
        trust_remote_code: run the code that its repository brings.
        substitution: how words are replaced, see `Substitution`: copies, probability, candidates, max_length, seed.
        batch_tokens: padded tokens the model reads at once.
        mixed_precision: no (float32) or bf16 autocast.
        output_dir: folder to make.
        progress: show a progress bar.
    """

    dataset_name: str
    model: str
    output_dir: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    data_files: dict[str, str | list[str]] | None = None
    task: str | None = None
    text_columns: list[str] = field(default_factory=list)
    train_split: str = "train"
    trust_remote_code: bool = False
    substitution: Substitution = field(default_factory=Substitution)
    batch_tokens: int = 8192
    mixed_precision: Literal["no", "bf16"] = "no"
    progress: bool = True

    def __post_init__(self):
        conform_fields(self)
        check_bounds("batch_tokens", self.batch_tokens, 1)
        if Path(self.output_dir).exists():
            raise ValueError(f"output_dir {self.output_dir} exists already: choose another folder")
        if self.task:
            glue.find_task(self.task)


def columns_of(args: AugmentArguments, row: dict) -> list[str]:
    """The columns that change."""
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
    where = (args.dataset_name, args.dataset_config, args.dataset_revision, args.data_files)
    splits = glue.load_task(glue.find_task(args.task), *where) if args.task else load_texts(*where)
    rows = take_split(splits, args.train_split, "train_split")
    columns = columns_of(args, rows[0])
    for name in columns:
        path = column_path(rows[0], name, "text_columns")
        for start in range(0, len(rows), 1000):  # all are text
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
        knobs = {**asdict(args), "text_columns": columns, "rows": {args.train_split: [len(rows), len(grown)]}}
        (part / "augmentation.json").write_text(json.dumps(knobs, indent=2) + "\n", encoding="utf-8")
        part.rename(folder)
    print(f"{folder}: {args.train_split} has {len(grown):,} texts, made of {len(rows):,}")
    return 0


if __name__ == "__main__":
    run_recipe(__file__, main)
