"""CPU time until a streamed run has its first batch again, resumed at the end of an epoch.

python -m benchmarks streams

A stream of texts in files of equal size, tokenized by one process with a byte-pair encoding. For each format:
  start     first batch of an epoch: the first pool of 20,000 texts is read and tokenized
  resumed   first batch of the last pool, from its position in a checkpoint
An epoch in three parts, each resumed from the position of the one before, also counts the rows lost and repeated.
"""

import itertools
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from hf_tfm.data.language import SequenceTokenization, sequence_length, text_rows
from hf_tfm.data.number_words import LARGEST, spell
from hf_tfm.data.source import load_splits
from hf_tfm.data.stream import StreamLoader
from hf_tfm.data.text import train_tokenizer

from . import common

TOKENS = 4096  # of a batch
FORMATS = {"parquet": datasets.Dataset.to_parquet, "jsonl": datasets.Dataset.to_json}


def main(rows: int = 1_000_000, files: int = 100) -> None:
    """Measure and write benchmarks/results/streams.json.

    Args:
        rows: number of texts.
        files: number of files.
    """
    tokenizer = train_tokenizer([spell(number)["en"] for number in range(1, 2000)], 1000)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            write_files(Path(folder) / kind, kind, rows, files)
            stream = text_rows(load_splits(str(Path(folder) / kind), streaming=True)["train"], "text")
            results[kind] = measure(stream, SequenceTokenization(tokenizer, 64, "rows"), rows)
    common.write("streams", {"rows": rows, "files": files, "results": results})


def write_files(folder: Path, kind: str, rows: int, files: int) -> None:
    """Write the number words of 0 to ``rows`` - 1, each after its number."""
    folder.mkdir()
    datasets.disable_progress_bars()
    for file, numbers in enumerate(np.array_split(np.arange(rows), files)):
        texts = [f"{number} {spell(1 + int(number) % LARGEST)['en']}" for number in numbers]
        part = datasets.Dataset.from_dict({"number": numbers, "text": texts})
        FORMATS[kind](part, str(folder / f"train-{file:05d}.{kind}"))


def measure(stream: datasets.IterableDataset, tokenize: Any, rows: int) -> dict[str, Any]:
    """Return CPU seconds to the first batch, and how many rows an epoch lost and repeated."""

    def number(batch: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        """A sample of 16 tokens for a row; the pools are those of the tokenized texts."""
        return {"input_ids": [[int(text.split()[0])] * 16 for text in batch["text"]]}

    def collate(examples: list[dict], *_: Any) -> list[int]:
        return [example["input_ids"][0] for example in examples]

    def steps(prepare: Any, start: Any = 0) -> Iterator[Any]:
        return StreamLoader(stream, sequence_length, TOKENS, collate, prepare=prepare).epoch(0, start)

    def seconds(start: Any = 0) -> float:
        began = time.process_time()
        next(steps(tokenize, start))
        return round(time.process_time() - began, 2)

    seen: Counter[int] = Counter()
    position: Any = 0
    for stop in (rows // 3, rows * 2 // 3, rows + 1):  # an epoch in three parts
        for micro_batches in steps(number, position):
            seen.update(itertools.chain(*micro_batches))
            reached = micro_batches.position
            if len(seen) >= stop:
                break
        position = json.loads(json.dumps(reached))
    return {
        "rows lost": rows - len(seen),
        "rows repeated": sum(seen.values()) - len(seen),
        "start, s": seconds(),
        "resumed, s": seconds({**position, "step": position["pool_step"]}),
    }
