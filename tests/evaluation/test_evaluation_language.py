"""Our language models and transformers' are scored in the same way."""

import math

import datasets
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM
from hf_tfm.data.vocabulary import train_bytes, train_wordpiece
from hf_tfm.tasks.evaluation import evaluate

TEXTS = [f"the {a} fox jumped over the {b} dog" for a in ("quick", "slow") for b in ("lazy", "loud", "old")] * 4
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    datasets.Dataset.from_dict({"text": TEXTS}).to_parquet(str(folder / "test.parquet"))
    return str(folder)


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    tokenizer = train_bytes(TEXTS, 300)
    tokenizer.pad_token = None  # as in GPT-2
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    ).eval()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def test_perplexity_of_next_tokens(gpt2, texts):
    folder, model, tokenizer = gpt2
    result = evaluate(str(folder), dataset_name=texts, sequences="rows")
    assert result["max_length"] == 64
    total = count = 0
    for text in TEXTS:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        total += model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
        count += ids.shape[1] - 1
    scores = {row["name"]: row["value"] for row in result["metrics"]}
    assert scores["token_loss"] == pytest.approx(total / count, rel=1e-5)
    assert scores["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)


def test_our_model_and_the_native_one_have_the_same_score(texts, tmp_path):
    torch.manual_seed(0)
    tokenizer = train_wordpiece(TEXTS, 80)
    native = BertForMaskedLM(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **SMALL))
    native.save_pretrained(tmp_path / "native")
    ours = TfmBertForMaskedLM.from_pretrained(
        tmp_path / "native",
        config=TfmBertConfig(vocab_size=len(tokenizer), max_position_embeddings=32, **SMALL),
    )
    ours.save_pretrained(tmp_path / "ours")
    for name in ("native", "ours"):
        tokenizer.save_pretrained(tmp_path / name)
    scores = [
        evaluate(str(tmp_path / name), dataset_name=texts, max_length=16, output=str(tmp_path / f"{name}.json"))[
            "metrics"
        ]
        for name in ("native", "ours")
    ]
    assert scores[0][0]["signature"] == "masked: 0.15, seed: 0"
    for native_row, our_row in zip(*scores, strict=True):
        assert our_row["value"] == pytest.approx(native_row["value"], rel=1e-5)
    assert (tmp_path / "ours.json").is_file()


def test_invalid_options_are_refused(gpt2, texts):
    folder = str(gpt2[0])
    with pytest.raises(ValueError, match="at most the model's max_position_embeddings = 64, got 65"):
        evaluate(folder, dataset_name=texts, max_length=65)
    with pytest.raises(ValueError, match='sequences must be one of packed, rows, got "pairs"'):
        evaluate(folder, dataset_name=texts, sequences="pairs")
    with pytest.raises(ValueError, match="num_beams is for translation models"):
        evaluate(folder, dataset_name=texts, num_beams=2)
