"""Cost of streams: start and resume, images per second, dealing to many ranks, and memory.

python -m benchmarks streams

Start and resume. CPU time until a streamed run has its first batch again. A stream of texts in files of equal size,
tokenized by one process with a byte-pair encoding. For each format:
  start     first batch of an epoch: the first pool of 20,000 texts is read and tokenized
  resumed   first batch of the last pool, from its position in a checkpoint
An epoch in three parts, each resumed from the position of the one before, also counts the rows lost and repeated.

Images. JPEGs per second that one process decodes from a stream of Parquet or WebDataset files, beside the limit:
torchvision's decoder (libjpeg-turbo) in a loop over the same files in memory.

Dealing. One process plays all ranks of a stream with many files of very different sizes, whose rows are numbers that
are not stored anywhere: how many rows each rank reads and trains on.

Memory. Growth of the peak memory of one process that reads a tenth of a stream of short texts, and all of it.
"""

import io
import itertools
import json
import os
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import Features, Image, Value

from hf_tfm.data.batching import TokenBudgetSampler, part_of_rank, place_step
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.images import IMAGE, decode, image_rows
from hf_tfm.data.language import SequenceTokenization, sequence_length, text_rows
from hf_tfm.data.number_words import LARGEST, spell
from hf_tfm.data.source import load_splits
from hf_tfm.data.stream import Lane, StreamLoader, pool_seed, shard_order
from hf_tfm.data.text import train_tokenizer

from . import common
from .image_loading import photo

TOKENS = 4096  # of a batch
FORMATS = {"parquet": datasets.Dataset.to_parquet, "jsonl": datasets.Dataset.to_json}


def token_steps(lengths: np.ndarray, first: int) -> TokenBudgetSampler:
    """The steps of a pool of texts."""
    return TokenBudgetSampler(lengths, TOKENS, pool_seed(0, first))


def equal_steps(size: int, sizes: np.ndarray, first: int) -> BatchSampler:
    """The steps of a pool, of ``size`` samples each."""
    return BatchSampler(len(sizes), size, pool_seed(0, first))


def main(
    rows: int = 1_000_000,
    files: int = 100,
    images: int = 1000,
    shards: int = 10_000,
    ranks: int = 1000,
    many_rows: int = 10_000_000,
) -> None:
    """Measure and write benchmarks/results/streams.json.

    Args:
        rows: number of texts.
        files: number of files.
        images: number of JPEGs.
        shards: number of files that are dealt.
        ranks: number of processes that they are dealt to.
        many_rows: number of texts of which memory is measured.
    """
    tokenizer = train_tokenizer([spell(number)["en"] for number in range(1, 2000)], 1000)
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in FORMATS:
            write_files(Path(folder) / kind, kind, rows, files)
            stream = text_rows(load_splits(str(Path(folder) / kind), streaming=True)["train"], "text")
            results[kind] = measure(stream, SequenceTokenization(tokenizer, 64, "rows"), rows)
    measured = {"images": decoding(images), "dealing": dealing(shards, ranks), "memory": memory(many_rows)}
    common.write("streams", {"rows": rows, "files": files, "results": results, **measured})


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
        return StreamLoader(stream, token_steps, collate, sequence_length, prepare=prepare).epoch(0, start)

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


def decoding(count: int, rounds: int = 3) -> dict[str, Any]:
    """Return decoded images per second of one process, and their ratio to the limit."""
    files = [photo(seed) for seed in range(min(count, 100))] * -(-count // 100)
    files = files[:count]
    with tempfile.TemporaryDirectory() as folder:
        streams = {kind: Path(folder) / kind for kind in ("parquet", "tar")}
        for path in streams.values():
            path.mkdir()
        for shard, part in enumerate(np.array_split(np.arange(count), 4)):
            own = [files[i] for i in part]
            features = Features({"image": Image(), "label": Value("int64")})
            table = {"image": [{"bytes": file, "path": None} for file in own], "label": part.tolist()}
            datasets.Dataset.from_dict(table, features=features).to_parquet(
                streams["parquet"] / f"train-{shard}.parquet", batch_size=100
            )
            write_tar(streams["tar"] / f"train-{shard}.tar", dict(zip(part.tolist(), own, strict=True)))

        def limit(_: int) -> int:
            for file in files:
                decode(file)
            return count

        def epoch(rows: datasets.IterableDataset, number: int) -> int:
            steps = StreamLoader(rows, partial(equal_steps, 32), decoded, pool_samples=512).epoch(number)
            return sum(itertools.chain(*steps))

        variants = {"decoder alone": limit}
        for kind, path in streams.items():
            rows = image_rows(load_splits(str(path), streaming=True)["train"], labelled=False)
            variants[kind] = partial(epoch, rows)
        rates = common.interleaved(variants, rounds)
    return {
        "count": count,
        "images per second": {name: round(float(np.median(found)), 1) for name, found in rates.items()},
        "share of the limit": {name: round(common.ratio(rates, name, "decoder alone"), 3) for name in streams},
    }


def decoded(examples: list[dict], *_: Any) -> int:
    """Decode the images of a batch; return their number."""
    return sum(decode(example[IMAGE]).shape[0] == 3 for example in examples)


def write_tar(path: Path, images: Mapping[int, bytes]) -> None:
    """Write a WebDataset file of JPEGs and their numbers."""
    with tarfile.open(path, "w") as archive:
        for number, image in images.items():
            for kind, content in (("jpg", image), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"{number:06}.{kind}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def dealing(shards: int, ranks: int) -> dict[str, Any]:
    """Deal shards to ranks; their sizes differ by up to a factor of about 40. See the head of this file."""
    sizes = np.random.default_rng(0).lognormal(3, 0.5, shards).astype(int) + 1
    bounds = list(itertools.pairwise([0, *np.cumsum(sizes).tolist()]))
    batch, rows = 8 * ranks, int(sizes.sum())
    steps_of = partial(equal_steps, batch)
    with tempfile.TemporaryDirectory() as folder:
        links(Path(folder), shards, 20)
        grown = common.peak_growth(partial(start_rank, folder, ranks // 2, ranks))
        began = time.process_time()
        start_rank(folder, ranks // 2, ranks)
        start = time.process_time() - began
    began = time.process_time()
    loader = StreamLoader(Shards(bounds), steps_of, decoded, pool_samples=4 * batch, max_lanes=ranks)  # type: ignore[arg-type]
    read, trained, seen = np.zeros(ranks, int), np.zeros(ranks, int), Counter[int]()
    lane_owner = [rank for rank in range(ranks) for _ in part_of_rank(range(loader.lanes), rank, ranks)]
    for place, shard in enumerate(shard_order(loader.seed, 0, shards)):
        read[lane_owner[place % loader.lanes]] += sizes[shard]
    difference = 0
    for pool, begin in loader.pools(0):
        sampler = steps_of(np.zeros(len(pool)), begin["sample"])
        seen.update(held.example["row"] for held in pool)
        for step in sampler.steps(0):
            placed = place_step(step, sampler, None, ranks)
            counts = np.array([sum(len(run) for run, is_dummy in own if not is_dummy) for own in placed])
            trained += counts
            difference = max(difference, int(counts.max() - counts.min()))
    return {
        "files": shards,
        "ranks": ranks,
        "rows": rows,
        "rows lost": rows - len(seen),
        "rows repeated": sum(seen.values()) - len(seen),
        "CPU time until a rank has its first rows, s": round(start, 2),
        "memory of a rank until then, MB": round(grown, 1),
        "CPU time to deal all rows to all ranks, s": round(time.process_time() - began, 1),
        "rows that a rank trains on, largest / mean": round(float(trained.max() / trained.mean()), 3),
        "largest difference between ranks in a step": difference,
        "rows that a rank reads, largest / mean": round(float(read.max() / read.mean()), 3),
    }


def links(folder: Path, files: int, rows: int) -> None:
    """Write a Parquet file of short texts, linked under several names."""
    first = folder / "train-00000.parquet"
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict({"text": [f"number {i} of a file" for i in range(rows)]}).to_parquet(
        first, batch_size=1000
    )
    for file in range(1, files):
        os.link(first, folder / f"train-{file:05d}.parquet")


def start_rank(folder: str, rank: int, ranks: int) -> None:
    """Find the files, and read the first row of each lane of a rank."""
    files = {"train": f"{folder}/*.parquet"}  # in a folder, `datasets` would look for each name of a split
    stream = text_rows(load_splits("parquet", data_files=files, streaming=True)["train"], "text")
    order = shard_order(0, 0, stream.num_shards)
    for lane in part_of_rank(range(ranks), rank, ranks):
        Lane(stream, order[lane::ranks], 1).read()


class Shards:
    """A stream of numbers with the methods that `Lane` calls."""

    def __init__(self, bounds: list[tuple[int, int]]):
        self.bounds, self.num_shards = bounds, len(bounds)

    def shard(self, num_shards: int, index: int) -> "Shards":
        """One shard."""
        return Shards([self.bounds[index]])

    def reshard(self) -> "Shards":
        """The shard has no parts."""
        return self

    def state_dict(self) -> dict[str, int]:
        """Not used: nothing is resumed."""
        return {}

    def iter(self, size: int) -> Iterator[dict[str, list[int]]]:
        """Batches of rows."""
        ((first, end),) = self.bounds
        for start in range(first, end, size):
            yield {"row": list(range(start, min(start + size, end)))}


def memory(rows: int) -> dict[str, Any]:
    """Return how much the peak memory grows, in MB, while a tenth of a stream is read, and then all of it."""
    own = min(rows, 100_000)  # of a file
    with tempfile.TemporaryDirectory() as folder:
        links(Path(folder), rows // own, own)
        stream = text_rows(load_splits(folder, streaming=True)["train"], "text")

        def read(count: int) -> None:
            loader = StreamLoader(stream, partial(equal_steps, 1000), len_of)
            for _ in itertools.islice(loader.epoch(0), count // 1000):
                pass

        counts = {"a tenth": rows // 10, "all": rows}
        grown = {name: round(common.peak_growth(partial(read, count)), 1) for name, count in counts.items()}
    return {"rows": rows, "growth, MB": grown}


def len_of(examples: list[dict], *_: Any) -> int:
    """The number of examples."""
    return len(examples)
