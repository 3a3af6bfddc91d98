"""WordPiece vocabularies, and where words begin."""

import numpy as np
import pytest
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from hf_tfm.data.vocabulary import WORDPIECE_TOKENS, train_bytes, train_wordpiece, word_starts

TEXTS = ["The players were playing a game.", "She plays; he played Café games!", "Gaming players play."] * 5


def test_wordpiece_is_berts_own(tmp_path):
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
def test_the_same_texts_give_the_same_vocabulary(learn):
    texts = [f"word{i} and wird{i % 7} of {i * i}" for i in range(50)]
    first = learn(texts, 300).get_vocab()
    assert all(learn(iter(texts), 300).get_vocab() == first for _ in range(5))


def test_bytes_are_gpt2s_own(tmp_path):
    tokenizer = train_bytes(TEXTS, 300)
    text = "She was  playing, naïve 你好!\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id not in ids
    ids = tokenizer("players were playing")["input_ids"]  # cut anywhere, nothing is lost between the parts
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


def test_cased_keeps_case():
    tokenizer = train_wordpiece(TEXTS, 90, lowercase=False)
    assert tokenizer("The")["input_ids"] != tokenizer("the")["input_ids"]


def test_vocabulary_too_small():
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


def test_word_starts_needs_marks():
    from tokenizers import Tokenizer, models

    plain = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")))
    with pytest.raises(ValueError, match="does not mark where words begin"):
        word_starts(plain)
