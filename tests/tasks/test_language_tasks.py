"""Language modeling tasks: sequences, masks, item counts and losses."""

import datasets
import numpy as np
import pytest
import torch

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM, TfmBertForPreTraining, TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.data.language import Corpus, Texts, sequence_lengths, text_rows, token_sequences
from hf_tfm.data.number_words import number_words
from hf_tfm.data.vocabulary import train_bytes, train_wordpiece
from hf_tfm.models.cross_entropy import IGNORE_INDEX
from hf_tfm.tasks.language_modeling import LanguageModelingTask, MaskedLanguageCollator

TEXTS = [
    f"the {a} {b} jumped over the {c} and slept"
    for a in ["quick", "slow"]
    for b in ["fox", "hound"]
    for c in ["dog", "fence", "river"]
]


@pytest.fixture(scope="module")
def rows():
    return text_rows(datasets.Dataset.from_dict({"text": [*TEXTS, "  ", ""] * 3}))


@pytest.fixture(scope="module")
def wordpiece():
    return train_wordpiece(TEXTS, 60)


@pytest.fixture(scope="module")
def bytes_tokenizer():
    return train_bytes(TEXTS, 300)


def bert(tokenizer, kind=TfmBertForMaskedLM, **fields):
    torch.manual_seed(0)
    return kind(TfmBertConfig.of_size("tiny", vocab_size=len(tokenizer), max_position_embeddings=64, **fields)).eval()


def test_blank_rows_are_dropped(rows):
    assert list(Texts(rows)) == TEXTS * 3


def test_text_column_is_inferred_or_required():
    one = datasets.Dataset.from_dict({"label": [1], "sentence": ["a b"]})
    assert list(Texts(text_rows(one))) == ["a b"]
    two = datasets.Dataset.from_dict({"first": ["a"], "second": ["b"]})
    with pytest.raises(ValueError, match="text_column must be given: the columns of strings are first, second"):
        text_rows(two)
    assert list(Texts(text_rows(two, "second"))) == ["b"]
    with pytest.raises(ValueError, match='text_column "third" is not a column of the data set; it has first, second'):
        text_rows(two, "third")


def test_packed_blocks_hold_all_tokens(rows, wordpiece):
    found = token_sequences(rows, wordpiece, 16)
    plain = [i for text in Texts(rows) for i in [*wordpiece(text, add_special_tokens=False)["input_ids"], 3]]
    inner = [i for block in found["input_ids"] for i in block[1:-1]]
    assert inner == plain
    assert {block[0] for block in found["input_ids"]} == {wordpiece.cls_token_id}
    assert {block[-1] for block in found["input_ids"]} == {wordpiece.sep_token_id}
    assert (sequence_lengths(found)[:-1] == 16).all()


def test_decoder_blocks_are_cut_at_a_fixed_length(rows, bytes_tokenizer):
    found = token_sequences(rows, bytes_tokenizer, 20)
    stream = [i for block in found["input_ids"] for i in block]
    assert stream == [i for text in Texts(rows) for i in [*bytes_tokenizer(text)["input_ids"], 0]]
    running = token_sequences(rows, bytes_tokenizer, 20, documents=False)
    assert bytes_tokenizer.eos_token_id not in [i for block in running["input_ids"] for i in block]


def test_long_rows_are_truncated(rows, wordpiece):
    found = token_sequences(rows, wordpiece, 6, "rows")
    assert len(found) == len(rows) and (sequence_lengths(found) == 6).all()
    assert {row[-1] for row in found["input_ids"]} == {wordpiece.sep_token_id}


def test_sentence_pairs_are_consecutive_or_random(wordpiece):
    known = " ".join(TEXTS).split()
    words = " ".join(np.random.default_rng(0).choice(known, 2000))
    rows = text_rows(datasets.Dataset.from_dict({"text": [words, " ".join(known)]}))
    found = token_sequences(rows, wordpiece, 23, "pairs", seed=1)
    assert 0.4 < np.mean(found["random"]) < 0.6
    text = wordpiece(words, add_special_tokens=False)["input_ids"]
    following = {(tuple(text[i : i + 10]), tuple(text[i + 10 : i + 20])) for i in range(0, len(text), 20)}
    for row in found.select(range(80)):
        ids, second = row["input_ids"], row["second"]
        first = tuple(ids[1 : second - 1])
        assert ids[second - 1] == wordpiece.sep_token_id and len(ids) <= 23
        if not row["random"]:
            assert (first, tuple(ids[second:-1])) in following
    assert token_sequences(rows, wordpiece, 23, "pairs", seed=1)["input_ids"] == found["input_ids"]


def test_max_length_leaves_room(rows, wordpiece):
    with pytest.raises(ValueError, match="max_length must leave room for tokens other than the special ones, got 3"):
        token_sequences(rows, wordpiece, 3)


def test_masks_depend_only_on_the_sample(rows, wordpiece):
    found = token_sequences(rows, wordpiece, 40)
    task = LanguageModelingTask.for_model(None, wordpiece, seed=3)
    collate = task.collator()
    examples = [found[i] for i in range(4)]
    batch = collate(examples, [0, 1, 2, 3], 0)
    again = collate(examples[2:], [2, 3], 0)
    assert torch.equal(batch["labels"][2:, : again["labels"].shape[1]], again["labels"])
    assert not torch.equal(batch["labels"], collate(examples, [0, 1, 2, 3], 1)["labels"])
    where = batch["labels"] != IGNORE_INDEX
    original = torch.tensor(examples[0]["input_ids"])
    assert torch.equal(torch.where(where[0], batch["labels"][0], batch["input_ids"][0])[: len(original)], original)
    assert torch.equal(batch["masked_positions"], where.flatten().nonzero()[:, 0])
    assert task.count(batch) == {"token": int(where.sum())}
    dummy = collate(examples, [0, 1, 2, 3], 0, is_dummy=True)
    assert task.count(dummy) == {"token": 0} and (dummy["labels"] == IGNORE_INDEX).all()


def test_masking_ratios(wordpiece):
    collate = MaskedLanguageCollator(wordpiece)
    ids = np.array(wordpiece(" ".join(TEXTS))["input_ids"])
    kept = masked = drawn = total = 0
    for i in range(300):
        chosen, shown = collate.mask_tokens(ids, np.random.default_rng(i))
        assert not collate.special[ids[chosen]].any() and len(chosen) == round(0.15 * (len(ids) - 2))
        total += len(chosen)
        masked += (shown == wordpiece.mask_token_id).sum()
        kept += (shown == ids[chosen]).sum()
        drawn += ((shown != ids[chosen]) & (shown != wordpiece.mask_token_id)).sum()
    assert masked / total == pytest.approx(0.8, abs=0.02)
    assert kept / total == pytest.approx(0.1, abs=0.02) and drawn / total == pytest.approx(0.1, abs=0.02)


def test_whole_word_masking():
    tokenizer = train_wordpiece(
        ["unbelievable players were playing unbelievably"], 40
    )  # letters only, so words are long
    ids = np.array(tokenizer("unbelievable players were playing unbelievably " * 6)["input_ids"])
    starts = np.flatnonzero([not t.startswith("##") for t in tokenizer.convert_ids_to_tokens(ids)])
    collate = MaskedLanguageCollator(tokenizer, whole_words=True)
    for seed in range(20):
        chosen = set(collate.choose(ids, np.random.default_rng(seed)).tolist())
        assert 0 < len(chosen) <= max(12, round(0.15 * (len(ids) - 2)))
        for begin, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            word = set(range(begin, end))
            assert word <= chosen or not word & chosen


def test_masked_losses_equal_those_of_all_logits(rows, wordpiece):
    found = token_sequences(rows, wordpiece, 40, "rows")
    model = bert(wordpiece)
    task = LanguageModelingTask.for_model(model, wordpiece)
    collate = task.collator()
    batch = collate([found[i] for i in range(6)], list(range(6)), 2)
    sums = task.losses(model, batch)
    whole = model(**task.inputs(batch), labels=batch["labels"])
    assert sums["token"].item() == pytest.approx(whole.loss.item() * task.count(batch)["token"], rel=1e-5)
    picked = whole.logits.flatten(0, 1)[task.target_positions(batch)]
    assert task.output_losses(whole, picked, batch)["token"].item() == pytest.approx(sums["token"].item(), rel=1e-5)
    dummy = collate([found[0]], [0], 2, is_dummy=True)
    assert task.losses(model, dummy)["token"].item() == 0.0


def test_next_sentence_loss(wordpiece):
    rows = text_rows(datasets.Dataset.from_dict({"text": [" ".join(TEXTS)] * 4}))
    found = token_sequences(rows, wordpiece, 23, "pairs")
    model = bert(wordpiece, TfmBertForPreTraining)
    task = LanguageModelingTask.for_model(model, wordpiece)
    collate = task.collator()
    batch = collate([found[i] for i in range(5)], list(range(5)), 0)
    sums, counts = task.losses(model, batch), task.count(batch)
    assert counts["pair"] == 5
    whole = model(**task.inputs(batch), labels=batch["labels"], next_sentence_label=batch["next_sentence_label"])
    mean = sums["token"] / counts["token"] + sums["pair"] / counts["pair"]
    assert mean.item() == pytest.approx(whole.loss.item(), rel=1e-5)
    dummy = collate([found[0]], [0], 0, is_dummy=True)
    assert task.count(dummy) == {"token": 0, "pair": 0}
    assert all(value.item() == 0.0 for value in task.losses(model, dummy).values())


def test_causal_losses_equal_those_of_all_logits(rows, bytes_tokenizer):
    found = token_sequences(rows, bytes_tokenizer, 30, "rows")
    torch.manual_seed(0)
    model = TfmGPTForCausalLM(TfmGPTConfig.of_size("tiny", vocab_size=len(bytes_tokenizer))).eval()
    task = LanguageModelingTask.for_model(model, bytes_tokenizer, objective="causal")
    collate = task.collator()
    batch = collate([found[i] for i in range(6)], list(range(6)), 0)
    sums = task.losses(model, batch)
    whole = model(**task.inputs(batch), labels=batch["labels"])
    assert sums["token"].item() == pytest.approx(whole.loss.item() * task.count(batch)["token"], rel=1e-5)
    picked = whole.logits.flatten(0, 1)[task.target_positions(batch)]
    assert task.output_losses(whole, picked, batch)["token"].item() == pytest.approx(sums["token"].item(), rel=1e-5)
    assert task.count(collate([found[0]], [0], 0, is_dummy=True)) == {"token": 0}


def test_tokenizers_without_mask_token_are_refused():
    wordpiece = train_wordpiece(TEXTS, 60)
    wordpiece.mask_token = None
    with pytest.raises(ValueError, match="has no mask_token"):
        MaskedLanguageCollator(wordpiece)
    with pytest.raises(ValueError, match=r"mlm_probability must be in \(0, 1\), got 1"):
        MaskedLanguageCollator(train_wordpiece(TEXTS, 60), mlm_probability=1.0)


def test_corpus_is_loaded_with_its_split():
    words = number_words()
    corpus = Corpus(dataset_name="number-words", text_column="translation.en", split="validation")
    assert list(Texts(corpus.rows())) == [row["en"] for row in words["validation"]["translation"]]
