"""Text pairs from any loadable data set, and the tokenizer trained on them."""

import json
import re
from functools import partial

import pytest
from datasets import Dataset, DatasetDict, Features, IterableDataset, Translation, Value
from huggingface_hub import HfApi
from transformers import AutoTokenizer

from hf_tfm.data import text
from hf_tfm.data.batching import fetch
from hf_tfm.data.source import describe_source

ROWS = [{"en": f"number {i}", "de": f"Nummer {i}"} for i in range(30)]
TEXTS = [
    "The quick brown fox, isn't it? 12,345.",
    "Müßige Größe: zwölf Boxkämpfer jagen Eva über den Sylter Deich.",
    "Emoji 🦊🧑‍🔬 and 日本語",
    "a",
    "",
]


def write(folder, kind, rows=ROWS):
    """Write a data set in some format; returns the path of the first file."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, part in {"train": rows[:20], "test": rows[20:]}.items():
        path = str(folder / f"{split}.{kind}")
        data = Dataset.from_list(part)
        if kind == "parquet":
            data.to_parquet(path)
        elif kind == "csv":
            data.to_csv(path)
        elif kind == "jsonl":
            data.to_json(path)
        else:
            (folder / f"{split}.json").write_text(json.dumps(part))
    return folder / f"train.{kind}"


def pairs(rows):
    return text.text_pairs(rows, "en", "de")


# --- loading


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl", "json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_folders_and_formats_give_the_same_data(tmp_path, kind, streaming):
    file = write(tmp_path / "data", kind)
    files = {split: str(tmp_path / "data" / f"{split}.{kind}") for split in ("train", "test")}
    builder = "json" if kind == "jsonl" else kind
    for splits in (
        text.load_splits(str(tmp_path / "data"), streaming=streaming),
        text.load_splits(builder, data_files=files, streaming=streaming),
    ):
        assert set(splits) == {"train", "test"}
        assert [list(pairs(splits[name])) for name in ("train", "test")] == [
            [{"source": row["en"], "target": row["de"]} for row in part] for part in (ROWS[:20], ROWS[20:])
        ]
    (one,) = text.load_splits(str(file), streaming=streaming).values()
    assert len(list(one)) == 20


def test_number_words():
    splits = text.load_splits("number-words")
    rows = pairs(splits["validation"])
    assert set(splits) == {"train", "validation", "test"}
    assert rows.column_names == ["source", "target"]
    assert len(rows) == 500


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such/folder",), '"no/such/folder" cannot be loaded'),
        (("number-words", "config"), "is embedded: it takes no dataset_config"),
        (
            ("number-words", None, None, None, True),
            "it takes no dataset_config, dataset_revision, data_files or streaming",
        ),
    ],
)
def test_loading_errors(arguments, message, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=message):
        text.load_splits(*arguments)


def test_file_with_data_files_is_refused(tmp_path):
    file = write(tmp_path, "csv")
    with pytest.raises(ValueError, match='is a file: to read several, give dataset_name "csv" and data_files'):
        text.load_splits(str(file), data_files={"test": "x.csv"})


def test_missing_split_lists_the_existing_ones():
    with pytest.raises(
        ValueError, match='validation_split "valid" is not a split of the data set; it has train, test'
    ):
        text.take_split({"train": 1, "test": 2}, "valid", "validation_split")


# --- columns


@pytest.mark.parametrize("streaming", [False, True])
def test_column_paths_and_languages(streaming):
    features = Features({"translation": Translation(["en", "de"]), "id": Value("int64")})
    rows = Dataset.from_list([{"translation": {"en": "one", "de": "eins"}, "id": 1}], features=features)
    nested = Dataset.from_list([{"meta": {"text": {"src": "one"}, "n": 3}, "target.de": "eins"}])
    for data, source, target in (
        (rows, "en", "de"),
        (rows, "translation.en", "translation.de"),
        (nested, "meta.text.src", "target.de"),
    ):
        data = data.to_iterable_dataset() if streaming else data
        found = text.text_pairs(data, source, target)
        assert isinstance(found, IterableDataset) is streaming
        assert list(found) == [{"source": "one", "target": "eins"}]


def test_missing_column_lists_the_existing_ones():
    rows = Dataset.from_list([{"translation": {"en": "one", "de": "eins"}, "id": 1}])
    there = "is not a column of the data set; it has translation.en, translation.de, id"
    with pytest.raises(ValueError, match=re.escape(f'target_column "fr" {there}')):
        text.text_pairs(rows, "en", "fr")
    with pytest.raises(ValueError, match=re.escape(f'source_column "translation.fr" {there}')):
        text.text_pairs(rows, "translation.fr", "de")


def test_non_text_value_names_its_row():
    rows = [{"en": "one", "de": "eins"} for _ in range(2000)]
    rows[1500]["de"] = None
    with pytest.raises(ValueError, match='column "de" must hold text, got None in row 1500'):
        pairs(Dataset.from_list(rows))
    with pytest.raises(ValueError, match='column "de" must hold text, got 7 in row 0'):
        pairs(Dataset.from_list([{"en": "seven", "de": 7}]))


def test_empty_split():
    with pytest.raises(ValueError, match="has no rows"):
        pairs(Dataset.from_dict({"en": [], "de": []}))


def test_stream_is_gathered():
    rows = text.gather(pairs(Dataset.from_list(ROWS).to_iterable_dataset()))
    assert isinstance(rows, Dataset)
    assert rows[29] == {"source": "number 29", "target": "Nummer 29"}
    assert list(text.sentences(rows))[:2] == ["number 0", "number 1"]
    assert len(list(text.sentences(rows))) == 60


# --- fingerprints


def test_fingerprint_does_not_depend_on_storage(tmp_path):
    prints = set()
    for kind in ("parquet", "csv", "jsonl", "json"):
        write(tmp_path / kind, kind)
        prints.add(text.fingerprint(pairs(text.load_splits(str(tmp_path / kind))["train"])))
    memory = pairs(Dataset.from_list(ROWS[:20]))
    swapped = memory.select_columns(["target", "source"])
    picked = pairs(Dataset.from_list(ROWS)).select(range(20))
    prints |= {text.fingerprint(rows) for rows in (memory, swapped, picked)}
    assert len(prints) == 1


def test_fingerprint_depends_on_the_content():
    changed = [dict(ROWS[0], de="Nummer null"), *ROWS[1:]]
    moved = [ROWS[1], ROWS[0], *ROWS[2:]]
    swapped = [{"en": row["de"], "de": row["en"]} for row in ROWS]
    variants = [ROWS, changed, moved, swapped, ROWS[:-1], [*ROWS, ROWS[0]]]
    assert len({text.fingerprint(pairs(Dataset.from_list(rows))) for rows in variants}) == len(variants)


def test_description_of_splits():
    rows = pairs(Dataset.from_list(ROWS))
    assert text.describe({"train": rows.to_iterable_dataset(), "test": rows}) == {
        "fingerprint": {"train": "stream", "test": text.fingerprint(rows)},
        "rows": {"train": None, "test": 30},
    }


def test_source_of_local_data(tmp_path):
    write(tmp_path / "data", "csv")
    unknown = {"revision": None, "license": None, "on_hub": False}
    assert describe_source(str(tmp_path / "data")) == unknown
    card = tmp_path / "data" / "README.md"
    for stated, licence in (("cc-by-4.0", "cc-by-4.0"), ("[mit, apache-2.0]", "mit, apache-2.0")):
        card.write_text(f"---\nlicense: {stated}\n---\n# Pairs\n")
        assert describe_source(str(tmp_path / "data"))["license"] == licence
    card.write_text("# Pairs, without metadata\n")
    for dataset in (str(tmp_path / "data"), "number-words", "json"):
        assert describe_source(dataset, "main") == unknown


def test_source_of_hub_data_without_network(monkeypatch):
    """The rows may be cached; the Hub's metadata is unknown."""
    monkeypatch.setattr("hf_tfm.data.source.HfApi", partial(HfApi, endpoint="http://127.0.0.1:9"))
    assert describe_source("user/pairs", "main") == {"revision": "main", "license": None, "on_hub": True}


# --- tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return text.train_tokenizer(TEXTS * 3, 400)


def test_text_survives_the_round_trip(tokenizer):
    for original in TEXTS:
        ids = tokenizer(original)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == original  # no leading space
    assert tokenizer.unk_token_id not in tokenizer("Ünbekännt ☃ \x00")["input_ids"]


def test_special_tokens_have_the_first_ids(tokenizer):
    names = ("pad", "bos", "eos", "unk", "mask")
    assert [getattr(tokenizer, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4]
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]


def test_batches_are_right_padded_without_type_ids(tokenizer):
    batch = tokenizer(["a", "The quick brown fox"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["input_ids"][0][-1] == 0
    assert batch["attention_mask"][0][:2] == [1, 1]


def test_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.is_fast
    for original in TEXTS:
        assert loaded(original)["input_ids"] == tokenizer(original)["input_ids"]
    assert loaded.decode(loaded("Größe")["input_ids"], skip_special_tokens=True) == "Größe"
    assert (loaded.pad_token, loaded.eos_token, loaded.mask_token) == ("<pad>", "</s>", "<mask>")


def test_lowercasing():
    tokenizer = text.train_tokenizer(TEXTS, 300, lowercase=True)
    assert tokenizer("ÄPFEL")["input_ids"] == tokenizer("äpfel")["input_ids"]
    assert tokenizer.decode(tokenizer("ÄPFEL")["input_ids"], skip_special_tokens=True) == "äpfel"


def test_composed_and_decomposed_letters_are_equal(tokenizer):
    assert tokenizer("Größe")["input_ids"] == tokenizer("Gro\u0308ße")["input_ids"]


def test_training_does_not_depend_on_the_order_of_texts():
    texts = [f"{row['en']} {row['de']} {i % 7}" for i, row in enumerate(ROWS)]
    vocabularies = [text.train_tokenizer(order, 330).get_vocab() for order in (texts, texts[::-1], texts)]
    assert vocabularies[0] == vocabularies[1] == vocabularies[2]
    assert 261 < len(vocabularies[0]) <= 330


def test_vocabulary_too_small_for_bytes():
    assert len(text.train_tokenizer(["a"], 261)) == 261
    with pytest.raises(ValueError, match="vocab_size must be at least 261"):
        text.train_tokenizer(["a"], 260)


def test_tokenized_pairs(tokenizer):
    rows = [
        {"source": "a", "target": "fox"},
        {"source": "brown fox " * 20, "target": "a"},
        *[{"source": "", "target": "a"}] * 2,
    ]
    tokenized = text.tokenize_pairs(Dataset.from_list(rows), tokenizer, 10)
    found = list(tokenized)
    assert found == [
        {"input_ids": tokenizer(row["source"])["input_ids"], "labels": tokenizer(row["target"])["input_ids"]}
        for row in (rows[0], rows[2], rows[3])  # the longest pair is dropped
    ]
    assert text.pair_length(found[0]) == (2, len(tokenizer("fox")["input_ids"]))
    assert text.pair_lengths(tokenized).tolist() == [list(text.pair_length(row)) for row in found]
    assert fetch(tokenized, [2, 0]) == [found[2], found[0]]


def test_data_set_saved_to_disk_can_be_loaded(tmp_path):
    DatasetDict({"train": Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    assert list(text.load_splits(str(tmp_path / "saved"))["train"]) == ROWS
