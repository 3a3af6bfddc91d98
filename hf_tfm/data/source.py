"""Data sets of any kind: loading their splits, the commit that was loaded, and the licence the card states."""

import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from datasets.packaged_modules.cache.cache import Cache
from huggingface_hub import DatasetCard, HfApi, hf_hub_download

from .annotation_folders import annotation_reader
from .local_files import cache_entry, package_key, state_key

CARD = "README.md"
CARDS = (CARD, ".huggingface.yaml", "dataset_infos.json")  # files in which a folder states its splits and columns
STREAM = "stream"  # instead of a fingerprint of rows that are not read beforehand
DIGIT_SCENES = {"digit-scenes": 2000, "digit-scenes-large": 6000}  # training scenes; the others are the same in both
EMBEDDED = ("number-words", "digits", *DIGIT_SCENES)
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


Splits = datasets.DatasetDict | datasets.IterableDatasetDict
DataFiles = str | list[str] | dict[str, str | list[str]]


def load_splits(
    dataset: str,
    name: str | None = None,
    revision: str | None = None,
    data_files: DataFiles | None = None,
    streaming: bool = False,
) -> Splits:
    """Load every split of a data set, and print how many rows each has.

    All data are loaded here. The rows are those of the files as they are now: rows that `datasets` prepared earlier
    are used again only where path, size and times of every file are the same, see `local_files`.

    Args:
        dataset: whatever `datasets.load_dataset` takes (Hub id, local folder, "json", "parquet" ...), the path of one
            json, jsonl, csv or parquet file, a folder with annotations as COCO, Roboflow or Pascal VOC have them (see
            `coco` and `voc`), or one of the embedded sets, `EMBEDDED`.
        name: configuration of the data set.
        revision: commit, tag or branch on the Hub.
        data_files: files by split, for a builder name such as "parquet".
        streaming: read rows as they come instead of the whole set first.

    Raises:
        ValueError: the data set cannot be found, or does not fit the options.
    """
    splits = read_splits(dataset, name, revision, data_files, streaming)
    announce(splits, dataset, data_files)
    return splits


def read_splits(
    dataset: str, name: str | None, revision: str | None, data_files: DataFiles | None, streaming: bool
) -> Splits:
    """See `load_splits`."""
    if dataset in EMBEDDED:
        if streaming or name or revision or data_files:
            raise ValueError(f'dataset "{dataset}" is embedded: it takes no name, revision, data_files or streaming')
        return embedded(dataset)
    if reader := annotation_reader(Path(dataset)):
        if streaming or name or revision or data_files:
            raise ValueError(
                f"dataset {dataset} is a folder of images with annotations: it takes no name, revision, data_files or "
                "streaming"
            )
        return reader(Path(dataset))
    if (builder := FILE_BUILDERS.get(Path(dataset).suffix)) and Path(dataset).is_file():
        if data_files:
            raise ValueError(f'dataset "{dataset}" is a file: name others with dataset "{builder}" and data_files')
        dataset, data_files = builder, dataset
    try:
        if Path(dataset).is_dir() or (data_files and "/" not in dataset):
            return load_local(dataset, name, data_files, streaming)
        return load_remote(dataset, name, revision, data_files, streaming)
    except OSError as error:  # also what `datasets` raises where it finds nothing, or has no network
        raise ValueError(f'dataset "{dataset}" cannot be loaded: {error}') from error


def load_local(dataset: str, name: str | None, data_files: DataFiles | None, streaming: bool) -> Splits:
    """A local folder, or files by the name of their format, prepared anew unless every file is as it was.

    Raises:
        ValueError: see `load_splits`; or a file changed while it was read.
    """
    if Path(dataset, datasets.config.DATASET_STATE_JSON_FILENAME).is_file():
        raise ValueError(f"dataset {dataset} was written by save_to_disk: write it with to_parquet or to_json instead")
    with tempfile.TemporaryDirectory(prefix="hf-tfm-") as empty:
        # In the usual cache folder, a builder would take over columns and types of other files of the same name.
        builder = datasets.load_dataset_builder(dataset, name, data_files=data_files, cache_dir=empty)
        if streaming:
            return builder.as_streaming_dataset()
        files = source_files(dataset, builder)
        about = (builder.name, builder.hash, builder.config_id, builder.info.features, remote_states(builder))
        key = state_key(files, about, package_key())
        entry = cache_entry(f"{os.path.realpath(dataset)} {name} {data_files}", key)
        builder.download_and_prepare(
            str(entry / "rows"),
            # An extracted archive is otherwise found again by its path alone.
            download_config=datasets.DownloadConfig(cache_dir=str(entry / "files")),
            verification_mode="no_checks",  # a card may state how many rows there once were
        )
        if state_key(files, about, package_key()) != key:
            shutil.rmtree(entry / "rows", ignore_errors=True)
            raise ValueError(f'the files of dataset "{dataset}" changed while they were read')
        splits = builder.as_dataset()
    return datasets.DatasetDict({split: with_fingerprint(rows, f"{key}{split}") for split, rows in splits.items()})


def source_files(dataset: str, builder: datasets.DatasetBuilder) -> list[str]:
    """All local files that decide what a builder reads."""
    cards = [str(Path(dataset) / name) for name in CARDS if Path(dataset, name).is_file()]
    named = [file for files in (builder.config.data_files or {}).values() for file in files if "://" not in file]
    return cards + named


def remote_states(builder: datasets.DatasetBuilder) -> list[Any]:
    """Splits with the addresses of their files, and what servers say of the state of those that are not local."""
    return [
        [str(split), [file if "://" in file else len(file) for file in files], getattr(files, "origin_metadata", None)]
        for split, files in (builder.config.data_files or {}).items()
    ]


def with_fingerprint(rows: datasets.Dataset, key: str) -> datasets.Dataset:
    """Rows whose fingerprint, by which `datasets` finds what was made of them, tells their files' state."""
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    return datasets.Dataset(rows.data, rows.info, rows.split, fingerprint=fingerprint)


def load_remote(
    dataset: str, name: str | None, revision: str | None, data_files: DataFiles | None, streaming: bool
) -> Splits:
    """A data set of the Hub, whose commit is part of the name under which `datasets` keeps its rows.

    Raises:
        ValueError: there is no network, and the rows in the cache are of local files or of another revision.
    """
    options = {"revision": revision, "data_files": data_files}
    builder = datasets.load_dataset_builder(dataset, name, **options)
    if isinstance(builder, Cache):  # the newest rows that were ever loaded under this name, whatever their source
        commit = str(builder.hash)
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError(
                f'dataset "{dataset}" is neither a local file or folder nor to be had from the Hub; '
                "rows of local files of that name in the cache of datasets are not used"
            )
        if revision and not commit.startswith(revision):
            raise ValueError(
                f'dataset_revision "{revision}" of "{dataset}" is not to be had from the Hub; the cache holds {commit}'
            )
    if streaming:
        return builder.as_streaming_dataset()
    builder.download_and_prepare()
    return builder.as_dataset()


def announce(splits: Mapping[str, Any], dataset: str, data_files: DataFiles | None = None) -> None:
    """Print the number of rows of each split, on standard error of the first process of a run."""
    if os.environ.get("RANK", "0") != "0":
        return
    for name, rows in splits.items():
        files = data_files
        if isinstance(files, Mapping):
            files = files.get(name)
        source = dataset if files is None else f"{dataset} {files if isinstance(files, str) else ', '.join(files)}"
        count = f"{len(rows):,} rows" if isinstance(rows, datasets.Dataset) else "a stream, rows not counted"
        print(f"data {source}, split {name}: {count}", file=sys.stderr, flush=True)


def embedded(dataset: str) -> datasets.DatasetDict:
    """One of the data sets `EMBEDDED` names; each needs a library of its own, and no download."""
    if dataset == "digits":
        from .digits import digits

        return digits()
    if dataset in DIGIT_SCENES:
        from .digit_scenes import digit_scenes

        return digit_scenes(train=DIGIT_SCENES[dataset])
    from .number_words import number_words

    return number_words()


def take_split(splits: dict, split: str, argument: str):
    """One split by name.

    Raises:
        ValueError: there is no such split; the error names those there are.
    """
    if split not in splits:
        raise ValueError(f'{argument} "{split}" is not a split of the data set; it has {", ".join(splits)}')
    return splits[split]


def gather(rows: datasets.IterableDataset) -> datasets.Dataset:
    """All rows of a stream, in memory, with the features the stream states."""
    return datasets.Dataset.from_list(list(rows), features=rows.features)


def show_progress_of(rows) -> None:
    """Show `datasets`' progress bars for large data alone."""
    if isinstance(rows, datasets.Dataset) and len(rows) >= 100_000:
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()


def describe_rows(
    splits: Mapping[str, Any], fingerprint: Callable[[datasets.Dataset], str]
) -> dict[str, dict[str, Any]]:
    """``fingerprint`` of the content and ``rows`` by split; of a stream, which is not read, `STREAM` and None."""
    streams = {name for name, rows in splits.items() if isinstance(rows, datasets.IterableDataset)}
    return {
        "fingerprint": {name: STREAM if name in streams else fingerprint(rows) for name, rows in splits.items()},
        "rows": {name: None if name in streams else len(rows) for name, rows in splits.items()},
    }


def describe_source(dataset: str, revision: str | None = None) -> dict[str, Any]:
    """Commit and licence of a data set; None for what does not exist or, without a network, is not known.

    Args:
        dataset: as for `load_splits`.
        revision: commit, tag or branch on the Hub.

    Returns:
        ``revision``, the commit that ``revision`` or the newest version stands for, ``license`` by its short name, and
        ``on_hub``, whether it is a data set of the Hub.
    """
    if dataset in EMBEDDED or Path(dataset).exists() or "/" not in dataset:  # embedded, local, or a format's name
        card = Path(dataset) / CARD
        return {"revision": None, "license": licence(card) if card.is_file() else None, "on_hub": False}
    try:
        revision = HfApi().dataset_info(dataset, revision=revision).sha
        card = hf_hub_download(dataset, CARD, repo_type="dataset", revision=revision)
    except Exception:  # no network, which every client says in its own words, or no card: the rows are loaded already
        return {"revision": revision, "license": None, "on_hub": True}
    return {"revision": revision, "license": licence(Path(card)), "on_hub": True}


def licence(card: Path) -> str | None:
    """The licence in a card's metadata."""
    stated = DatasetCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.license
    return ", ".join(stated) if isinstance(stated, list) else stated
