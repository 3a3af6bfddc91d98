"""WordPiece vocabularies and word starts."""

from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from hf_tfm.data.text import train_tokenizer
from hf_tfm.data.vocabulary import (
    WORDPIECE_TOKENS,
    tell_unknown,
    tokenizer_name,
    train_bytes,
    train_wordpiece,
    word_starts,
)

TEXTS = ["The players were playing a game.", "She plays; he played Café games!", "Gaming players play."] * 5


def test_wordpiece_matches_bert(tmp_path):
    tokenizer = train_wordpiece(TEXTS, 80)
    assert tokenizer.convert_tokens_to_ids(list(WORDPIECE_TOKENS)) == [0, 1, 2, 3, 4]
    pair = tokenizer("playing", "games")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    assert tokens[0] == "[CLS]" and tokens.count("[SEP]") == 2 and "[UNK]" not in tokens
    assert pair["token_type_ids"] == sorted(pair["token_type_ids"]) and pair["token_type_ids"][-1] == 1
    assert tokenizer("CAFÉ")["input_ids"] == tokenizer("cafe")["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, BertTokenizer)
    assert loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]


@pytest.mark.parametrize("learn", [train_wordpiece, train_bytes])
def test_training_is_deterministic(learn):
    texts = [f"word{i} and wird{i % 7} of {i * i}" for i in range(50)]
    first = learn(texts, 300).get_vocab()
    assert all(learn(iter(texts), 300).get_vocab() == first for _ in range(5))


def test_bytes_match_gpt2(tmp_path):
    tokenizer = train_bytes(TEXTS, 300)
    text = "She was  playing, naïve 你好!\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids
    ids = tokenizer("players were playing")["input_ids"]  # split anywhere; nothing is lost between the parts
    assert all(
        tokenizer.decode(ids[:i]) + tokenizer.decode(ids[i:]) == "players were playing" for i in range(len(ids))
    )
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert train_bytes(TEXTS, 300, lowercase=True)("PLAYED")["input_ids"] != tokenizer("PLAYED")["input_ids"]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, GPT2Tokenizer) and loaded(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
    with pytest.raises(ValueError, match="vocab_size must be at least 258"):
        train_bytes(TEXTS, 257)


def test_cased_vocabulary():
    tokenizer = train_wordpiece(TEXTS, 90, lowercase=False)
    assert tokenizer("The")["input_ids"] != tokenizer("the")["input_ids"]


def test_too_small_vocabulary():
    with pytest.raises(ValueError, match="vocab_size must be above the 5 special tokens, got 5"):
        train_wordpiece(TEXTS, 5)


@pytest.mark.parametrize("kind", ["wordpiece", "bytes"])
def test_word_starts(kind):
    tokenizer = train_wordpiece(TEXTS, 60) if kind == "wordpiece" else train_bytes(TEXTS, 280)
    starts = word_starts(tokenizer)
    assert starts.dtype == bool and len(starts) == len(tokenizer)
    text = " playing gaming plays"
    ids = np.array(tokenizer(text, add_special_tokens=False)["input_ids"])
    assert len(ids) > 3 and starts[ids].sum() == 3 and starts[ids[0]]
    assert starts[tokenizer.all_special_ids].all()


def test_word_starts_need_markers():
    from tokenizers import Tokenizer, models

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ValueError, match="does not mark where words begin"):
        word_starts(plain)


def sentences(letters: int, count: int = 3000) -> list[str]:
    """Sentences of 20 characters of a script with many letters, common and rare ones."""
    random = np.random.default_rng(0)
    weights = 1 / (np.arange(letters) + 10)
    signs = np.array([chr(0x4E00 + 5 * i) for i in range(letters)])
    drawn = random.choice(letters, (count, 20), p=weights / weights.sum())
    return ["".join(signs[row]) for row in drawn]


def test_script_with_many_letters():
    texts = sentences(3500)
    tokenizer = train_wordpiece(texts, 8000)
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    unknown = [tokenizer.unk_token_id in row for row in ids]
    assert np.mean(unknown) < 0.03
    used = {token for row in ids for token in tokenizer.convert_ids_to_tokens(row)}
    assert set(tokenizer.get_vocab()) - used <= set(WORDPIECE_TOKENS)  # every piece is used


def test_vocabulary_too_small_for_the_letters_gives_a_warning(caplog):
    train_wordpiece(sentences(3500), 500)
    assert "vocab_size 500 has room for 495 of the" in caplog.text
    caplog.clear()
    train_wordpiece(TEXTS, 80)
    assert not caplog.text


@pytest.mark.parametrize("learn", [train_wordpiece, train_bytes, train_tokenizer])
def test_training_with_a_word_of_a_megabyte(learn):
    tokenizer = learn(["acgt" * 250_000, *TEXTS], 300)
    assert learn(TEXTS, 300)("players were playing")["input_ids"]
    assert tokenizer("players")["input_ids"]
    assert tokenizer(" acgtacgt")["input_ids"]


@pytest.mark.parametrize("learn", [train_bytes, train_tokenizer])
def test_long_words_are_split_only_for_training(learn):
    tokenizer = learn(["x" * 250, *TEXTS], 300)
    assert tokenizer.decode(tokenizer("x" * 250)["input_ids"], skip_special_tokens=True).strip() == "x" * 250
    pieces = str(tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x" * 250))
    assert "x" * 250 in pieces


def test_unknown_tokens_of_held_out_texts_are_reported(capsys, caplog):
    tokenizer = train_wordpiece(TEXTS, 80)
    rows = Dataset.from_dict({"input_ids": tokenizer(["players play", "你好 players"])["input_ids"]})
    share = tell_unknown(rows, tokenizer)
    assert 0.1 < share < 0.5 and "of 2 held-out texts" in capsys.readouterr().err
    assert "are unknown to the tokenizer" in caplog.text
    assert tell_unknown(rows, train_bytes(TEXTS, 300)) is None


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("out/.new/tokenizer", "the tokenizer"),
        ("out/tokenizer", "the tokenizer"),
        ("", "the tokenizer"),
        ("user/model", 'tokenizer "user/model"'),
    ],
)
def test_messages_contain_no_path_of_a_tokenizer_inside_a_run(path, name):
    assert tokenizer_name(SimpleNamespace(name_or_path=path)) == name
