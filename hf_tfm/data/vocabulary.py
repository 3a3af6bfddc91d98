"""The vocabulary of an encoder: WordPiece tokens learned from texts, and where words begin among them.

texts -> words -> pieces, "playing" -> "play", "##ing" (Schuster and Nakajima 2012; Devlin et al. 2019, section 3.1)

A decoder's vocabulary, byte-pair encoding, is in `data.text`.
"""

from collections.abc import Iterable

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, PreTrainedTokenizerBase

WORDPIECE_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
CONTINUES = "##"  # begins a WordPiece token that goes on with a word
BEGINS = ("Ġ", "▁")  # begin a token that begins a word, in byte-level BPE and in SentencePiece


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> BertTokenizer:
    """Learn a WordPiece vocabulary.

    Args:
        texts: of the corpus.
        vocab_size: tokens, special ones and letters among them; fewer come of a small corpus.
        lowercase: lower-case everything and strip accents, as BERT's "uncased" models.

    Returns:
        transformers' own tokenizer of BERT, so that a model trained with it also runs as a stock one.

    Raises:
        ValueError: ``vocab_size`` leaves no room for letters.
    """
    if vocab_size <= len(WORDPIECE_TOKENS):
        raise ValueError(f"vocab_size must be above the {len(WORDPIECE_TOKENS)} special tokens, got {vocab_size}")
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=list(WORDPIECE_TOKENS),
        continuing_subword_prefix=CONTINUES,
        limit_alphabet=min(1000, vocab_size - len(WORDPIECE_TOKENS)),  # rare signs of other scripts are unknown
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=learner.get_vocab(), do_lower_case=lowercase)


def word_starts(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Which tokens begin a word: bool (V,); special tokens do.

    Raises:
        ValueError: the vocabulary does not mark words.
    """
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    continues, begins = (
        {i for token, i in vocabulary.items() if token.startswith(marks)} for marks in (CONTINUES, BEGINS)
    )
    starts = np.ones(max(vocabulary.values()) + 1, dtype=bool)
    if len(begins) > len(continues):
        starts[:] = False
        starts[[*begins, *(vocabulary[token] for token in special)]] = True
    elif continues:
        starts[list(continues)] = False
    else:
        raise ValueError(
            f'tokenizer "{tokenizer.name_or_path}" does not mark where words begin: no token starts with '
            f"{', '.join((CONTINUES, *BEGINS))}"
        )
    return starts
