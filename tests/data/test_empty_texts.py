"""Empty texts are counted and skipped; a run without usable texts is refused."""

import logging

import pytest
from datasets import Dataset

from hf_tfm.data import language
from hf_tfm.data.source import load_splits
from hf_tfm.data.text import text_pairs, tokenize_pairs, train_tokenizer
from hf_tfm.data.vocabulary import train_wordpiece


def pairs(sources, targets):
    return Dataset.from_dict({"en": sources, "de": targets})


def test_pairs_with_an_empty_side_are_skipped(caplog):
    found = text_pairs(pairs(["a", "", "c", "d"], ["A", "B", " ", "D"]), "en", "de")
    assert found.to_list() == [{"source": "a", "target": "A"}, {"source": "d", "target": "D"}]
    assert "2 of 4 pairs have an empty source or target and are left out" in caplog.text
    streamed = text_pairs(pairs(["a", ""], ["A", "B"]).to_iterable_dataset(), "en", "de")
    assert list(streamed) == [{"source": "a", "target": "A"}]
    with pytest.raises(ValueError, match='all 2 pairs have an empty "en" or "de"'):
        text_pairs(pairs(["a", " "], ["", "B"]), "en", "de")
    with pytest.raises(ValueError, match='source_column and target_column are the same, "en"'):
        text_pairs(pairs(["a"], ["b"]), "en", "en")


def test_too_long_pairs_are_skipped(caplog):
    rows = text_pairs(pairs(["a b c", "a " * 50], ["a", "b"]), "en", "de")
    tokenizer = train_tokenizer(["a b c"], 270)
    assert len(tokenize_pairs(rows, tokenizer, 10)) == 1
    assert "1 of 2 pairs are longer than max_length = 10 tokens and are left out" in caplog.text
    with pytest.raises(ValueError, match="all 2 pairs are longer than max_length = 2 tokens"):
        tokenize_pairs(rows, tokenizer, 2)


def test_language_modeling_texts(caplog):
    with caplog.at_level(logging.INFO):
        rows = language.text_rows(Dataset.from_dict({"text": ["one two", " ", ""]}))
    assert rows["text"][:] == ["one two"] and "2 of 3 texts are empty and are left out" in caplog.text
    with pytest.raises(ValueError, match='all 2 texts of column "text" are empty'):
        language.text_rows(Dataset.from_dict({"text": ["", " "]}))
    tokenizer = train_wordpiece(["one two"], 30)
    one = Dataset.from_dict({"text": ["one"]})
    with pytest.raises(ValueError, match="1 texts give no sequence of up to max_length = 16 tokens"):
        language.token_sequences(one, tokenizer, 16, "pairs")


def test_numbers_in_a_csv_file_are_text(tmp_path):
    file = tmp_path / "train.csv"
    file.write_text("en,de\n1,eins\n2,zwei\n")
    rows = load_splits(str(file))["train"]
    assert text_pairs(rows, "en", "de")["source"][:] == ["1", "2"]
    assert language.text_rows(rows, "en")["text"][:] == ["1", "2"]
