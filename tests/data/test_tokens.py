"""Tokens are cached by content: a second run, in another folder, tokenizes nothing."""

import pytest
from datasets import Dataset
from transformers import AutoTokenizer

from hf_tfm.data import text
from hf_tfm.data.language import SequenceTokenization, text_rows, token_sequences
from hf_tfm.data.number_words import spell
from hf_tfm.data.text import PairTokenization, load_splits, text_pairs, tokenize_pairs

KINDS = {"pairs": (PairTokenization, tokenize_pairs), "sequences": (SequenceTokenization, token_sequences)}


@pytest.mark.parametrize("kind", KINDS)
def test_a_second_run_reads_the_tokens_of_the_first(tmp_path, monkeypatch, kind):
    tokenization, tokens_of = KINDS[kind]
    pairs = [spell(37 * i + 1) for i in range(80)]
    Dataset.from_list(pairs).to_parquet(tmp_path / "train.parquet")
    tokenizer = text.train_tokenizer([row["en"] for row in pairs], 300)
    for run in ("one", "two"):
        tokenizer.save_pretrained(tmp_path / run)
    called = []
    call = tokenization.__call__
    monkeypatch.setattr(tokenization, "__call__", lambda self, *batch: called.append(1) or call(self, *batch))

    def tokens(run, length=12):
        rows = load_splits(str(tmp_path / "train.parquet"))["train"]
        rows = text_pairs(rows, "en", "de") if kind == "pairs" else text_rows(rows, "en")
        loaded = AutoTokenizer.from_pretrained(tmp_path / run)
        found = tokens_of(rows, loaded, length)
        loaded("a text", truncation=True, max_length=3)  # a call sets options of the tokenizer
        assert tokens_of(rows, loaded, length).cache_files == found.cache_files
        return found

    first = tokens("one")
    assert len(called) == 1
    again = tokens("two")
    assert again[:] == first[:] and again.cache_files == first.cache_files and len(called) == 1
    assert tokens("two", 9)[:] != first[:] and len(called) == 2
