"""Loading of data sets of any kind, and lookup of their commit and licence."""

import dataclasses
import functools
import gzip
import hashlib
import itertools
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pandas
import PIL
import pyarrow as pa
import yaml
from datasets.data_files import DataFilesDict, EmptyDatasetError, get_data_patterns
from datasets.exceptions import DataFilesNotFoundError, DatasetGenerationError
from datasets.packaged_modules.cache.cache import Cache
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.folder_based_builder.folder_based_builder import FolderBasedBuilder
from datasets.packaged_modules.json.json import FullReadDisallowed, Json
from datasets.packaged_modules.webdataset.webdataset import WebDataset
from huggingface_hub import DatasetCard, HfApi, hf_hub_download

from ..command import raised_by_us
from .annotation_readers import annotation_reader
from .csv_files import CsvFiles
from .embedded import DIGIT_SCENES, EMBEDDED, SPELLED_NUMBERS
from .file_kinds import ARRAY, KINDS, READ, first_line, kind_of, problem, usual_name
from .json_files import JsonFiles, with_text
from .local_files import cache_entry, package_key, state_key
from .rebuilt import Rebuilt
from .tar_files import TarFiles

log = logging.getLogger(__name__)

CARD = "README.md"
CARDS = (CARD, ".huggingface.yaml", "dataset_infos.json")  # files in which a folder declares its splits and columns
STREAM = "stream"  # instead of a fingerprint of rows that are not read beforehand
FORMATS = {*KINDS.values(), "imagefolder", "webdataset", "xml", "hdf5", "pandas"}
RETRY_SECONDS = (1, 4, 16)  # pauses before a shard of a stream is read again after a failed connection
CLIENTS = ("aiohttp", "httpcore", "httpx", "huggingface_hub", "requests", "urllib3")  # whose errors may pass
LASTING = (FileNotFoundError, IsADirectoryError, PermissionError, gzip.BadGzipFile, PIL.UnidentifiedImageError)
OWN_READERS: dict[type[datasets.DatasetBuilder], type[Rebuilt]] = {
    Csv: CsvFiles,
    Json: JsonFiles,
    WebDataset: TarFiles,
}


Splits: TypeAlias = datasets.DatasetDict | datasets.IterableDatasetDict
DataFiles: TypeAlias = str | list[str] | dict[str, str | list[str]]


def load_splits(
    dataset: str,
    name: str | None = None,
    revision: str | None = None,
    data_files: DataFiles | None = None,
    streaming: bool = False,
) -> Splits:
    """Load every split of a data set, and print how many rows each has.

    All data sets are loaded here. The rows always match the current files: rows prepared earlier by `datasets` are
    reused only if path, size and times of every file are unchanged, see `local_files`.

    Args:
        dataset: anything `datasets.load_dataset` accepts (Hub id, local folder, "json", "parquet" ...), the path of a
            single file of `file_kinds.KINDS`, compressed or not, a folder with COCO, Roboflow or Pascal VOC
            annotations (see `coco` and `voc`), or one of the built-in data sets `EMBEDDED`.
        name: configuration of the data set.
        revision: commit, tag or branch on the Hub.
        data_files: files by split, for a builder name such as "parquet".
        streaming: stream rows instead of preparing the whole data set first.

    Raises:
        ValueError: if the data set cannot be found, or does not fit the options.
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
            raise ValueError(
                f'dataset_name "{dataset}" is embedded: it takes no dataset_config, dataset_revision, data_files or '
                "streaming"
            )
        return embedded(dataset)
    if Path(dataset).suffix == ARRAY:
        if streaming or name or revision or data_files:
            raise ValueError(
                f'dataset_name "{dataset}" is a file of frames: it takes no dataset_config, dataset_revision, '
                "data_files or streaming"
            )
        from .videos import array_rows  # imports torchvision, which the other data sets do not need

        return array_rows(dataset)
    if reader := annotation_reader(Path(dataset)):
        if streaming or name or revision or data_files:
            raise ValueError(
                f"dataset_name {dataset} is a folder of images with annotations: it takes no "
                "dataset_config, dataset_revision, data_files or streaming"
            )
        return reader(Path(dataset))
    if dataset in FORMATS and not data_files:
        raise ValueError(f'dataset_name "{dataset}" is the name of a format: give data_files, the files to read')
    if revision and (Path(dataset).exists() or dataset in FORMATS):
        raise ValueError(
            f'dataset_revision "{revision}" applies only to a data set on the Hub, but dataset_name "{dataset}" '
            "is read from local files"
        )
    if is_local_file(dataset):
        if (kind := kind_of(dataset)) is None:
            raise ValueError(f'dataset_name "{dataset}" is not a supported kind of file: {READ}')
        if data_files:
            raise ValueError(
                f'dataset_name "{dataset}" is a file: to read several, give dataset_name "{kind}" and data_files'
            )
        return load_local(kind, name, {"train": dataset}, streaming, dataset)
    try:
        if Path(dataset).is_dir() or (data_files and "/" not in dataset):
            return load_local(dataset, name, data_files, streaming, dataset)
        return load_remote(dataset, name, revision, data_files, streaming)
    except yaml.YAMLError as error:
        card = Path(dataset) / CARD
        named = card if card.is_file() else f'the {CARD} of dataset_name "{dataset}"'
        raise ValueError(f"{named} has invalid YAML between its --- lines: {' '.join(str(error).split())}") from error
    except ValueError as error:
        if "dataset_name" in str(error) or raised_by_us(error):
            raise
        raise ValueError(f'dataset_name "{dataset}" cannot be loaded: {first_line(error)}') from error
    except Exception as error:  # `datasets` raises many kinds of errors if it finds nothing or there is no network
        files = [str(path) for path in sorted(Path(dataset).rglob("*")) if path.is_file()]
        raise ValueError(reason_of(error, dataset, files)) from error


def is_local_file(dataset: str) -> bool:
    """Return whether a path is a file.

    Raises:
        ValueError: if it is a device, a pipe or similar, or looks like a local path but does not exist.
    """
    path = Path(dataset)
    if path.exists() and not path.is_dir() and not path.is_file():
        raise ValueError(f'dataset_name "{dataset}" is neither a regular file nor a folder')
    if not path.exists() and (path.is_absolute() or dataset.startswith((".", "~")) or kind_of(dataset)):
        raise ValueError(f'dataset_name "{dataset}" cannot be loaded: it does not exist')
    return path.is_file()


def cause(error: BaseException) -> str:
    """Return the first line of the underlying cause of an error of `datasets`."""
    while isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    line = first_line(error)
    if line.startswith("Couldn't cast"):  # the types are on the following lines
        return f"files of the splits differ in the type of a column: {' '.join(str(error).split())[:300]}"
    return line if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {line}"


def load_local(
    dataset: str, name: str | None, data_files: DataFiles | None, streaming: bool, given: str | None = None
) -> Splits:
    """Load a local folder, or files by format name, preparing rows again unless every file is unchanged.

    Args:
        given: the user's name for the data set, for error messages.

    Raises:
        ValueError: see `load_splits`; or if a file changed while it was read.
    """
    given = given or dataset
    if Path(dataset, datasets.config.DATASET_STATE_JSON_FILENAME).is_file():
        raise ValueError(
            f"dataset_name {dataset} was written by save_to_disk: write it with to_parquet or to_json instead"
        )
    with tempfile.TemporaryDirectory(prefix="hf-tfm-") as empty:
        # In the usual cache folder, a builder would reuse columns and types of other files with the same name.
        builder = local_builder(dataset, name, data_files, empty)
        files = source_files(dataset, builder)
        if not data_files:
            check_regular(Path(dataset))
        if not data_files and not isinstance(builder, FolderBasedBuilder):
            tell_unread(Path(dataset), files)
        try:
            if streaming:
                return stream_of(builder, given, files)
            config = {field.name: getattr(builder.config, field.name) for field in dataclasses.fields(builder.config)}
            about = (builder.name, builder.hash, str(config), builder.info.features, remote_states(builder))
            key = state_key(files, about, package_key())
            entry = cache_entry(f"{os.path.realpath(dataset)} {name} {data_files}", key)
            fresh = not (entry / "rows").is_dir()
            builder.download_and_prepare(
                str(entry / "rows"),
                # Otherwise an extracted archive is looked up in the cache by its path alone.
                download_config=datasets.DownloadConfig(cache_dir=str(entry / "files")),
                verification_mode="no_checks",  # a card may state an outdated number of rows
            )
        except Exception as error:  # can be any type, often without the name of the file
            raise ValueError(reason_of(error, given, files)) from error
        if state_key(files, about, package_key()) != key:
            shutil.rmtree(entry / "rows", ignore_errors=True)
            raise ValueError(f'the files of dataset_name "{given}" changed while they were read')
        splits = {
            split: builder.as_dataset(split) if info.num_examples else no_rows(builder, split)
            for split, info in builder.info.splits.items()
        }
        if fresh:
            try:
                for rows in splits.values():
                    rows.data.validate(full=True)  # the JSON reader accepts bytes that are not UTF-8
            except pa.ArrowInvalid as error:
                shutil.rmtree(entry / "rows", ignore_errors=True)
                raise ValueError(
                    problem(files) or f'dataset_name "{given}" is damaged: {first_line(error)}'
                ) from error
    return datasets.DatasetDict({split: with_fingerprint(rows, f"{key}{split}") for split, rows in splits.items()})


def reason_of(error: BaseException, dataset: str, files: Iterable[str]) -> str:
    """Return in one line why a data set cannot be read: a problem of its local files, or else the reader's message."""
    return problem(files) or f'dataset_name "{dataset}" cannot be loaded: {cause(error)}'


def stream_of(
    builder: datasets.DatasetBuilder, dataset: str, files: Sequence[str] = ()
) -> datasets.IterableDatasetDict:
    """Return the splits of a builder as streams that report read errors on one line.

    Args:
        dataset: the user's name for the data set.
        files: the local ones among its files.
    """
    for name in ("_generate_tables", "_generate_examples", "_generate_more_gen_kwargs"):
        if read := getattr(type(builder), name, None):
            setattr(builder, name, functools.partial(read_explained, (dataset, files), read, builder))
    return builder.as_streaming_dataset()


def read_explained(
    source: tuple[str, Sequence[str]], read: Callable[..., Iterator[Any]], /, *args: Any, **options: Any
) -> Iterator[Any]:
    """Yield what a builder's method yields. If a connection fails, the method is called again, see `RETRY_SECONDS`.

    Args:
        source: the user's name for the data set, and its local files.
        read: method of the builder, called with the remaining arguments.

    Raises:
        ValueError: if reading fails, with the name of the shard; see `reason_of`.
    """
    dataset, files = source
    shard = shard_name(options)
    given = 0
    for attempt, pause in enumerate((*RETRY_SECONDS, None), start=1):
        try:
            for item in itertools.islice(read(*args, **options), given, None):
                given += 1
                yield item
            return
        except FullReadDisallowed:  # the JSON builder handles this one itself
            raise
        except Exception as error:  # can be any type, often without the name of the file
            passing = may_pass(error)
            if passing and pause is not None:
                log.warning("%s cannot be read, next attempt in %d s: %s", shard or dataset, pause, cause(error))
                time.sleep(pause)
                continue
            reason = reason_of(error, dataset, [shard] if shard and shard in files else files)
            tried = f", in {attempt} attempts" if passing else ""
            named = f" (shard {shard}{tried})" if shard and (tried or Path(shard).name not in reason) else ""
            raise ValueError(reason + named) from error


def shard_name(options: Mapping[str, Any]) -> str | None:
    """Return the file or URL that the method of a builder is to read, None if unknown."""
    for value in options.values():
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], str):
            return value[0]
    return None


def may_pass(error: BaseException | None) -> bool:
    """Return whether an error, or one that caused it, is one of a connection or a disk, not of the content."""
    while error is not None:
        if isinstance(error, LASTING):
            return False
        if isinstance(error, OSError) or type(error).__module__.split(".")[0] in CLIENTS:
            return True
        error = error.__cause__ or error.__context__
    return False


def check_regular(folder: Path) -> None:
    """Raise if what has the name of a data file is a broken link, a pipe or the like, or a folder without data.

    Raises:
        ValueError: with the path and its kind.
    """
    if any((folder / card).is_file() for card in CARDS):
        return  # a card may choose among the files
    for path in sorted(folder.rglob("*")):
        if not kind_of(path) or path.is_file():
            continue
        if path.is_dir():
            if any(path.iterdir()):  # Spark writes folders of such names, and a class may have one
                continue
            kind = "an empty folder"
        elif path.is_symlink():
            kind = f"a link to {os.readlink(path)}, which does not exist"
        else:
            kind = "not a regular file"
        raise ValueError(f"{path} is named like a data file but is {kind}: replace or delete it")


def tell_unread(folder: Path, files: list[str]) -> None:
    """Warn about data files in a folder that are not read: of a less common type, or named after no split."""
    if any((folder / card).is_file() for card in CARDS):
        return  # a card may select files
    read = {os.path.realpath(file) for file in files}
    unread = [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if kind_of(path) and path.is_file() and os.path.realpath(path) not in read
    ]
    if unread:
        log.warning(
            "dataset %s: %d files are not read, since only one kind is read and names determine the splits: %s",
            *(folder, len(unread), ", ".join(unread[:5]) + ", ..." * (len(unread) > 5)),
        )


def local_builder(
    dataset: str, name: str | None, data_files: DataFiles | None, cache_dir: str
) -> datasets.DatasetBuilder:
    """Return the `datasets` builder for a folder or files, with the CSV and JSON readers of this package.

    Raises:
        ValueError: if there are no files, or none of a supported kind.
    """
    try:
        files = None if data_files or not Path(dataset).is_dir() else files_by_kind(Path(dataset))
        if files is not None:
            dataset, data_files = files
        builder = datasets.load_dataset_builder(dataset, name, data_files=data_files, cache_dir=cache_dir)
    except (DataFilesNotFoundError, EmptyDatasetError) as error:
        if Path(dataset).is_dir():
            there = sorted(path.name for path in Path(dataset).iterdir())
            found = f"it has {', '.join(there[:5])}{' ...' * (len(there) > 5)}" if there else "it is empty"
            raise ValueError(f"dataset_name {dataset} has no file of a supported kind ({READ}): {found}") from error
        raise ValueError(f'dataset_name "{dataset}" cannot be loaded: {first_line(error)}') from error
    except FileNotFoundError as error:
        raise ValueError(f'data_files of dataset_name "{dataset}" not found: {first_line(error)}') from error
    if empty := [str(split) for split, found in (builder.config.data_files or {}).items() if not found]:
        raise ValueError(f'data_files of dataset_name "{dataset}" match no file for split {", ".join(empty)}')
    if isinstance(builder, FolderBasedBuilder):
        keep_words(builder)
    if (own := own_reader(builder)) is not None:
        return own.like(builder, cache_dir=cache_dir, hash=builder.hash)
    return builder


def own_reader(builder: datasets.DatasetBuilder) -> type[Rebuilt] | None:
    """Return this package's builder class for the files of a builder; None if `datasets`' own class is used."""
    return next((own for kind, own in OWN_READERS.items() if isinstance(builder, kind)), None)


def keep_words(builder: FolderBasedBuilder) -> None:
    """Make an image folder builder read text in its metadata as text.

    pandas treats "NA", "None" and similar words in metadata.csv as missing values, so a class of that name would
    disappear; Arrow converts dates in metadata.jsonl to timestamps, see `json_files`.
    """
    read = builder._read_metadata

    def read_metadata(metadata_file: str, metadata_ext: str = "") -> Iterator[pa.Table]:
        if metadata_ext != ".csv" or builder.config.filters is not None:
            yield from with_text(read(metadata_file, metadata_ext))
            return
        for frame in pandas.read_csv(metadata_file, chunksize=10_000, keep_default_na=False, na_values=[""]):
            yield pa.Table.from_pandas(frame, preserve_index=False)

    builder._read_metadata = read_metadata


def files_by_kind(folder: Path) -> tuple[str, DataFiles] | None:
    """Return kind and files by split of a folder with upper-case extensions; None if `datasets` knows all files."""
    named = [path for path in folder.rglob("*") if kind_of(path) and not usual_name(path) and path.is_file()]
    if not named or any((folder / card).is_file() for card in CARDS):
        return None
    patterns = get_data_patterns(str(folder.resolve()))
    found = DataFilesDict.from_patterns(patterns, base_path=str(folder.resolve()))
    kinds = Counter(kind for files in found.values() for file in files if (kind := kind_of(file)))
    kind = kinds.most_common(1)[0][0]
    return kind, {
        str(split): chosen for split, files in found.items() if (chosen := [f for f in files if kind_of(f) == kind])
    }


def no_rows(builder: datasets.DatasetBuilder, split: str) -> datasets.Dataset:
    """Return an empty split, which builders do not provide."""
    columns = builder.info.features or {}
    return datasets.Dataset.from_dict({name: [] for name in columns}, features=builder.info.features, split=split)


def source_files(dataset: str, builder: datasets.DatasetBuilder) -> list[str]:
    """Return all local files that determine what a builder reads."""
    cards = [str(Path(dataset) / name) for name in CARDS if Path(dataset, name).is_file()]
    named = [file for files in (builder.config.data_files or {}).values() for file in files if "://" not in file]
    return cards + named


def remote_states(builder: datasets.DatasetBuilder) -> list[Any]:
    """Return, by split, the URLs of remote files and the metadata that servers report for them."""
    return [
        [str(split), [file if "://" in file else len(file) for file in files], getattr(files, "origin_metadata", None)]
        for split, files in (builder.config.data_files or {}).items()
    ]


def with_fingerprint(rows: datasets.Dataset, key: str) -> datasets.Dataset:
    """Return rows whose fingerprint, by which `datasets` caches transforms, depends on the state of their files."""
    fingerprint = hashlib.sha256(key.encode()).hexdigest()[:32]
    return datasets.Dataset(rows.data, rows.info, rows.split, fingerprint=fingerprint)


def load_remote(
    dataset: str, name: str | None, revision: str | None, data_files: DataFiles | None, streaming: bool
) -> Splits:
    """Load a data set from the Hub; its commit is part of the name under which `datasets` caches the rows.

    Raises:
        ValueError: if there is no network and the cached rows come from local files or another revision.
    """
    builder = datasets.load_dataset_builder(dataset, name, revision=revision, data_files=data_files)
    if (own := own_reader(builder)) is not None:
        # Rows read by `datasets`' own readers are cached under the commit itself.
        commit = f"{str(builder.hash)[:32]}{package_key()[:8]}"
        builder = own.like(builder, hash=commit, config_id=builder.config_id)
    if isinstance(builder, Cache):  # the latest rows ever loaded under this name, from any source
        commit = str(builder.hash)
        if not re.fullmatch("[0-9a-f]{40}", commit):
            raise ValueError(
                f'dataset_name "{dataset}" is neither a local file or folder nor available from the Hub; '
                "rows of local files of that name in the cache of datasets are not used"
            )
        if revision and commit[:32] != revision[:32]:
            raise ValueError(
                f'dataset_revision "{revision}" of "{dataset}" is not available from the Hub; the cache holds {commit}'
            )
    if streaming:
        return stream_of(builder, dataset)
    builder.download_and_prepare()
    return builder.as_dataset()


def generated_splits(
    rows: Callable[..., Iterator[dict[str, Any]]],
    features: datasets.Features,
    seed: int,
    counts: Mapping[str, int],
    options: Mapping[str, Any],
) -> datasets.DatasetDict:
    """Return the splits of a generated data set, which `datasets` caches on the disk by their generator and its
    arguments.

    Args:
        rows: generator of the rows of a split, called with ``seed``, ``split`` (a number), ``count`` and ``options``.
        features: of the rows.
        counts: number of rows of each split.

    Raises:
        ValueError: the seed is out of range.
    """
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed must be in [0, 2^32), got {seed}")
    splits = datasets.DatasetDict()
    for number, (name, count) in enumerate(counts.items()):
        given = {"seed": seed, "split": number, "count": count, **options}
        splits[name] = datasets.Dataset.from_generator(rows, features=features, gen_kwargs=given, split=name)
    return splits


def announce(splits: Mapping[str, Any], dataset: str, data_files: DataFiles | None = None) -> None:
    """Print the number of rows of each split to standard error, in the first process of a run only."""
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
    """Load one of the built-in data sets `EMBEDDED`; each needs its own library but no download."""
    return datasets.DatasetDict(generated(dataset, DIGIT_SCENES.get(dataset)))


@functools.lru_cache(maxsize=2)  # scenes take seconds, and one process may train, distil and evaluate on the same
def generated(dataset: str, scenes: int | None) -> datasets.DatasetDict:
    """Generate a data set for `embedded`, with this number of training scenes."""
    if dataset == "digits":
        from .digits import digits

        return digits()
    if scenes is not None:
        from .digit_scenes import digit_scenes

        return digit_scenes(train=scenes)
    if dataset in SPELLED_NUMBERS:
        from . import spelled_numbers

        return getattr(spelled_numbers, dataset.replace("-", "_"))()
    from .number_words import number_words

    return number_words()


def take_split(splits: dict, split: str, argument: str):
    """Return one split by name.

    Raises:
        ValueError: if the split does not exist or has no rows; the message lists the available splits.
    """
    if split not in splits:
        raise ValueError(f'{argument} "{split}" is not a split of the data set; it has {", ".join(splits)}')
    rows = splits[split]
    if isinstance(rows, datasets.Dataset) and not len(rows):
        raise ValueError(f'{argument} "{split}" has no rows')
    return rows


def gather(rows: datasets.IterableDataset) -> datasets.Dataset:
    """Read all rows of a stream into memory, with the features of the stream; images stay encoded."""
    stored = rows.decode(False) if rows.features else rows
    return datasets.Dataset.from_list(list(stored), features=rows.features)


def first(rows: datasets.Dataset, max_samples: int | None) -> datasets.Dataset:
    """Return the first ``max_samples`` rows, or all rows if it is None."""
    return rows if max_samples is None else rows.select(range(min(max_samples, len(rows))))


def describe_rows(
    splits: Mapping[str, Any], fingerprint: Callable[[datasets.Dataset], str]
) -> dict[str, dict[str, Any]]:
    """Return ``fingerprint`` and number of ``rows`` by split; `STREAM` and None for a stream, which is not read."""
    streams = {name for name, rows in splits.items() if isinstance(rows, datasets.IterableDataset)}
    return {
        "fingerprint": {name: STREAM if name in streams else fingerprint(rows) for name, rows in splits.items()},
        "rows": {name: None if name in streams else len(rows) for name, rows in splits.items()},
    }


def describe_source(dataset: str, revision: str | None = None) -> dict[str, Any]:
    """Look up commit and licence of a data set; None if it does not exist or, offline, is unknown.

    Args:
        dataset: as for `load_splits`.
        revision: commit, tag or branch on the Hub.

    Returns:
        ``revision``, the commit that ``revision`` or the latest version resolves to, ``license``, its short name, and
        ``on_hub``, whether the data set is on the Hub.
    """
    if dataset in EMBEDDED or Path(dataset).exists() or "/" not in dataset:  # embedded, local, or a format name
        local = Path(dataset) / CARD
        return {"revision": None, "license": licence(local) if local.is_file() else None, "on_hub": False}
    try:
        revision = HfApi().dataset_info(dataset, revision=revision).sha
        card = hf_hub_download(dataset, CARD, repo_type="dataset", revision=revision)
    # No network, for which every client raises its own error, or no card; the rows are already loaded.
    except Exception:
        return {"revision": revision, "license": None, "on_hub": True}
    return {"revision": revision, "license": licence(Path(card)), "on_hub": True}


def licence(card: Path) -> str | None:
    """Return the licence stated in a card's metadata; None, with a warning, if it is not text."""
    try:
        text = card.read_text(encoding="utf-8", errors="replace")
        stated = DatasetCard(text, ignore_metadata_errors=True).data.get("license")
    except Exception as error:  # YAML errors of several kinds; a broken card must not prevent training
        log.warning("%s: the licence cannot be read: %s", card, str(error).splitlines()[0])
        return None
    names = stated if isinstance(stated, list) else [] if stated is None else [stated]
    if odd := [name for name in names if not isinstance(name, str)]:
        log.warning("%s: license must be a text or a list of texts, got %r: left out", card, odd[0])
        return None
    return ", ".join(names) or None
