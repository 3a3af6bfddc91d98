"""Text augmentation: words are replaced by likely words of a masked language model."""

import json
import runpy
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM
from hf_tfm.data.vocabulary import train_wordpiece
from hf_tfm.distillation.substitution import Substituter, Substitution, Word, substituted, with_copies

ROOT = Path(__file__).parents[2]
TEXTS = ["The dog barks, loudly!", "A cat sleeps in 2019.", "Unbelievable players..."]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece([*TEXTS[:2], "dog cat barks sleeps loudly"] * 4, 120)


@pytest.fixture(params=[(TfmBertForMaskedLM, TfmBertConfig), (BertForMaskedLM, BertConfig)], ids=["ours", "native"])
def model(request, tokenizer):
    kind, config = request.param
    torch.manual_seed(0)
    return kind(config(vocab_size=len(tokenizer), max_position_embeddings=64, **SMALL)).eval()


def test_word_positions_are_kept(model, tokenizer):
    found = Substituter(model, tokenizer, Substitution(candidates=4)).words(TEXTS, batch_tokens=40)
    assert [[text[w.start : w.end] for w in words] for text, words in zip(TEXTS, found, strict=True)] == [
        ["The", "dog", "barks", "loudly"],
        ["A", "cat", "sleeps", "in"],
        ["Unbelievable", "players"],
    ]
    for text, words in zip(TEXTS, found, strict=True):
        for word in words:
            assert len(word.others) == 4 == len(set(word.others))
            assert all(other.isalpha() and other in tokenizer.get_vocab() for other in word.others)
            assert text[word.start : word.end].lower() not in word.others


def test_candidates_are_the_most_likely_words_at_the_mask(model, tokenizer):
    (words,) = Substituter(model, tokenizer, Substitution(candidates=3)).words(TEXTS[:1])
    masked = TEXTS[0].replace("barks", "[MASK]")
    inputs = tokenizer(masked, return_tensors="pt")
    position = inputs["input_ids"][0].tolist().index(tokenizer.mask_token_id)
    scores = model(**inputs).logits[0, position]
    names = tokenizer.convert_ids_to_tokens(scores.argsort(descending=True).tolist())
    expected = [n for n in names if n.isalpha() and n != "barks"][:3]
    assert words[2].others == expected


def test_a_copy_replaces_some_words():
    words = [Word(0, 3, ["one"]), Word(4, 7, []), Word(8, 11, ["two", "three"])]
    chances = np.random.default_rng(0)
    copies = {substituted("The big dog.", words, chances, 0.5) for _ in range(100)}
    heads, tails = ("The", "one"), ("dog", "two", "three")
    assert copies == {f"{a} big {b}." for a in heads for b in tails}
    assert substituted("The big dog.", words, chances, 1.0) in {"one big two.", "one big three."}


def test_rows_grow_by_their_copies(model, tokenizer):
    rows = datasets.Dataset.from_dict({"text": TEXTS, "label": [1, 0, 1]})
    substituter = Substituter(model, tokenizer, Substitution(copies=5, probability=0.6, candidates=3, seed=4))
    grown = with_copies(rows, ["text"], substituter)
    assert grown.features == rows.features
    assert len(rows) < len(grown) <= 6 * len(rows)
    pairs = set(zip(grown["text"], grown["label"], strict=True))
    assert len(pairs) == len(grown)  # all copies differ
    assert {(text, label) for text, label in zip(TEXTS, [1, 0, 1], strict=True)} <= pairs
    assert with_copies(rows, ["text"], substituter)["text"] == grown["text"]


def test_recipe_writes_a_data_set(tokenizer, tmp_path, capsys):
    torch.manual_seed(0)
    model = TfmBertForMaskedLM(TfmBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SMALL))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    for split, texts in {"train": TEXTS, "validation": TEXTS[:1]}.items():
        rows = datasets.Dataset.from_dict({"sentence": texts, "label": [0] * len(texts)})
        (tmp_path / "data").mkdir(exist_ok=True)
        rows.to_parquet(str(tmp_path / "data" / f"{split}.parquet"))
    argv = ["--dataset_name", str(tmp_path / "data"), "--model", str(tmp_path / "model"), "--progress", "false"]
    argv += ["--output_dir", str(tmp_path / "grown"), "--substitution.copies", "3"]
    main = runpy.run_path(str(ROOT / "recipes" / "augment_texts.py"))["main"]
    assert main(argv) == 0
    grown = datasets.load_dataset(str(tmp_path / "grown"))
    assert len(grown["validation"]) == 1 and len(grown["train"]) > 3
    assert f"train has {len(grown['train'])} texts, augmented from 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "grown" / "augmentation.json").read_text())["text_columns"] == ["sentence"]
    with pytest.raises(SystemExit):
        main(argv)
    assert "already exists" in capsys.readouterr().err


def test_options_out_of_range_are_refused():
    with pytest.raises(ValueError, match=r"probability must be in \(0, 1\], got 0"):
        Substitution(probability=0.0)
    with pytest.raises(ValueError, match="copies must be at least 1, got 0"):
        Substitution(copies=0)
