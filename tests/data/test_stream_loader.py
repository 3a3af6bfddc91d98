"""A stream loses and repeats no row, in one order for any number of ranks and workers, and continues at any step."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import IterableDataset
from datasets.packaged_modules.parquet.parquet import Parquet
from thread_ranks import run_on_ranks

from hf_tfm.data.batching import TokenBudgetSampler, rng
from hf_tfm.data.source import load_splits
from hf_tfm.data.stream import StreamLoader, pool_seed

SHARDS = (7, 1, 0, 40, 13, 3, 25, 9, 31, 2, 11)  # rows
ROWS = sum(SHARDS)
POOL = 32
read: list[int] = []  # rows that were read since a test cleared it
prepared: list[int] = []


def rows_of_shards(shards):
    for shard in shards:
        for row in range(SHARDS[shard]):
            read.append(row)
            yield {"row": sum(SHARDS[:shard]) + row}


def prepare(batch, indices):
    """A row is one sample, or two if its number is a multiple of three."""
    prepared.extend(batch["row"])
    found = [[row] * (1 + 5 * (row % 4)) for row in batch["row"] for _ in range(1 + (row % 3 == 0))]
    return {"tokens": found, "key": [indices[0]] * len(found)}


SAMPLES = sorted(row for row in range(ROWS) for _ in range(1 + (row % 3 == 0)))


def collate(rows, samples, epoch, is_dummy):
    noise = [rng(0, epoch, sample).random() for sample in samples]
    return {"tokens": [row["tokens"] for row in rows], "noise": noise, "dummy": is_dummy, "keys": rows[0]["key"]}


ALL = range(len(SHARDS))


def stream(shards=ALL):
    return IterableDataset.from_generator(rows_of_shards, gen_kwargs={"shards": list(shards)})


def loader_of(rows=None, pool=POOL, **options):
    rows = stream() if rows is None else rows

    def sampler(lengths, first):
        return TokenBudgetSampler(lengths, pool + 8, pool_seed(1, first))

    return StreamLoader(rows, sampler, collate, lambda row: [len(row["tokens"])], 1, prepare, pool, **options)


def seen(steps):
    return [row[0] for step in steps for batch in step if not batch["dummy"] for row in batch["tokens"]]


def on_ranks(world, epoch=0, start=0, count=None, **options):
    """The first ``count`` steps of each rank."""
    return [steps for steps, _ in run_on_ranks(world, loader_of, epoch, start, count, **options)]


@pytest.mark.parametrize("shards", [ALL, (3,)], ids=["uneven shards", "one shard"])
def test_no_row_is_lost_or_repeated_whatever_the_ranks_and_workers(shards):
    whole = list(loader_of(stream(shards)).epoch(1))
    rows = [sum(SHARDS[:shard]) + row for shard in shards for row in range(SHARDS[shard])]
    assert sorted(seen(whole)) == [row for row in SAMPLES if row in rows]
    assert seen(whole) != sorted(seen(whole))
    assert all(sum(map(len, batch["tokens"])) <= 40 for step in whole for batch in step)
    noise = [number for step in whole for batch in step for number in batch["noise"]]
    assert len(set(noise)) == len(noise), "each sample has its own random numbers"
    for readers in (1, 2):
        assert list(loader_of(stream(shards), num_readers=readers, num_workers=1).epoch(1)) == whole
    for world in (2, 3):  # ranks with workers: tests/recipes/test_stream_runs.py
        ranks = on_ranks(world, epoch=1, rows=stream(shards))
        assert [seen(step) for step in zip(*ranks, strict=True)] == [seen([step]) for step in whole]


def test_ranks_share_the_preparation_and_hold_their_own_samples_alone():
    prepared.clear(), read.clear()
    ranks = run_on_ranks(3, loader_of)
    assert sorted(prepared) == list(range(ROWS))
    assert len(read) <= ROWS + sum(sorted(SHARDS)[-2:]), "at most two lanes have pieces of two ranks"
    for steps, dealt in ranks:
        fillings = sum(batch["dummy"] for step in steps for batch in step)
        assert len(seen(steps)) <= dealt <= len(seen(steps)) + fillings


def test_epochs_differ_in_the_order_of_the_shards():
    orders = [list(loader_of().epoch(epoch)) for epoch in range(3)]
    assert all(sorted(seen(steps)) == SAMPLES for steps in orders)
    begun = {tuple(sorted(seen(steps)[: POOL // 2])) for steps in orders}
    assert len(begun) == 3


def test_resumes_at_every_step_with_any_number_of_ranks():
    whole = list(loader_of().epoch(2))
    for number, step in enumerate(whole, start=1):
        position = json.loads(json.dumps(step.position))
        assert position["step"] == number
        assert list(loader_of().epoch(2, position)) == whole[number:]
    middle = json.loads(json.dumps(whole[len(whole) // 2].position))
    rest = whole[middle["step"] :]
    assert list(loader_of().epoch(2, middle["step"])) == rest, "a checkpoint of an earlier version"
    assert list(loader_of(num_readers=2).epoch(2, middle)) == rest
    for world in (2, 3):
        ranks = on_ranks(world, 2, middle)
        assert [seen(step) for step in zip(*ranks, strict=True)] == [seen([step]) for step in rest]
        # ... and the position after several ranks is the same.
        assert ranks[-1][3].position == rest[3].position


def test_an_epoch_keeps_its_number_of_lanes():
    whole = list(loader_of(max_lanes=4).epoch(2))
    assert [seen([step]) for step in whole] != [seen([step]) for step in loader_of().epoch(2)]
    assert list(loader_of().epoch(2, json.loads(json.dumps(whole[5].position)))) == whole[6:]


def test_changed_data_is_refused():
    position = next(loader_of().epoch(0)).position
    with pytest.raises(ValueError, match="the stream has 4 shards, but the run to be resumed was reading 11"):
        next(loader_of(stream(range(4))).epoch(0, position))


@pytest.mark.parametrize("files", [40, 1])
def test_resume_reads_only_the_rows_it_needs(tmp_path, monkeypatch, files):
    """3,200 rows of Parquet in groups of 10: a resumed run reads its pool, not the rows before it."""
    each = 3200 // files
    for file in range(files):
        table = pa.table({"row": list(range(file * each, (file + 1) * each))})
        pq.write_table(table, tmp_path / f"train-{file:03d}.parquet", row_group_size=10)
    generate = Parquet._generate_tables

    def counted(self, *args, **options):
        for key, table in generate(self, *args, **options):
            read.extend(table["row"].to_pylist())
            yield key, table

    monkeypatch.setattr(Parquet, "_generate_tables", counted)
    rows = load_splits(str(tmp_path), streaming=True)["train"]
    whole = list(loader_of(rows).epoch(0))
    assert sorted(seen(whole)) == sorted(row for row in range(3200) for _ in range(1 + (row % 3 == 0)))
    number = len(whole) * 3 // 4
    read.clear(), prepared.clear()
    assert next(loader_of(rows).epoch(0, whole[number - 1].position)) == whole[number]
    assert len(prepared) <= 2 * 64
    # Of each file that is being read, the group of the next row, one before it, and one after it.
    assert len(read) <= 3 * 10 * files + 2 * 64


def test_every_rank_raises_the_error_of_one():
    def broken(shards):
        for shard in shards:
            yield {"row": shard}
            if shard == 5:
                raise ValueError("row 1 of shard 5 is damaged")

    rows = IterableDataset.from_generator(broken, gen_kwargs={"shards": list(range(8))})
    with pytest.raises(ValueError, match=r"^row 1 of shard 5 is damaged$"):
        on_ranks(3, rows=rows)
    with pytest.raises(ValueError, match=r"^row 1 of shard 5 is damaged$"):
        list(loader_of(rows, num_readers=2).epoch(0))


@pytest.mark.slow
def test_a_thousand_uneven_files_and_a_changing_number_of_ranks():
    """100,000 rows, stopped twice: none is lost or repeated."""
    sizes = rng(5).integers(0, 200, 1000).tolist()

    def numbers(files):
        for file in files:
            yield from ({"row": row} for row in range(sum(sizes[:file]), sum(sizes[: file + 1])))

    rows = IterableDataset.from_generator(numbers, gen_kwargs={"files": list(range(1000))})
    found, position = [], 0
    for world, count in ((3, 100), (2, 60), (1, None)):
        ranks = on_ranks(world, 0, position, count, rows=rows, pool=2000)
        found += [row for steps in ranks for row in seen(steps)]
        position = json.loads(json.dumps(ranks[0][-1].position))
    assert sorted(found) == [row for row in range(sum(sizes)) for _ in range(1 + (row % 3 == 0))]
