"""Data sets of any kind: loading their splits, the commit that was loaded, and the licence the card states."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import datasets
from huggingface_hub import DatasetCard, HfApi, hf_hub_download

from .annotation_folders import annotation_reader

CARD = "README.md"
STREAM = "stream"  # instead of a fingerprint of rows that are not read beforehand
DIGIT_SCENES = {"digit-scenes": 2000, "digit-scenes-large": 6000}  # training scenes; the others are the same in both
EMBEDDED = ("number-words", "digits", *DIGIT_SCENES)
FILE_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_splits(
    dataset: str,
    name: str | None = None,
    revision: str | None = None,
    data_files: str | list[str] | dict[str, str | list[str]] | None = None,
    streaming: bool = False,
) -> datasets.DatasetDict | datasets.IterableDatasetDict:
    """Load every split of a data set.

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
        return datasets.load_dataset(dataset, name, revision=revision, data_files=data_files, streaming=streaming)
    except OSError as error:  # also what `datasets` raises where it finds nothing, or has no network
        raise ValueError(f'dataset "{dataset}" cannot be loaded: {error}') from error


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
