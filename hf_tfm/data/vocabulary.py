"""Vocabularies of encoders and decoders, trained on texts, and which of their tokens begin a word.

WordPiece: words -> pieces, "playing" -> "play", "##ing" (Schuster and Nakajima 2012; Devlin et al. 2019, section 3.1)
bytes: words with the space before them -> pieces of bytes (Radford et al. 2019, section 2.2)

The joint vocabulary of two languages is in `data.text`.
"""

import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WORDPIECE_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
CONTINUES = "##"  # prefix of a WordPiece token that continues a word
FEW_LETTERS = 1000  # up to this number, a WordPiece vocabulary includes all characters of the texts
COVERAGE = 0.9995  # character coverage beyond FEW_LETTERS, like SentencePiece's; the rarest characters are unknown
LONGEST_WORD = 100  # characters; BERT's tokenizer maps longer words to [UNK], and training on them is extremely slow
UNKNOWN_SHARE = 0.01  # fraction of unknown tokens above which a warning is logged
BYTES_TOKENS = ("<|endoftext|>", "<|pad|>")  # ids 0 and 1
BEGINS = ("Ġ", "▁")  # prefixes of tokens that begin a word, in byte-level BPE and in SentencePiece


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> BertTokenizer:
    """Train a WordPiece vocabulary; the result is deterministic.

    Args:
        texts: texts of the corpus, read twice.
        vocab_size: maximum vocabulary size, including special tokens and single characters; a small corpus yields
            fewer tokens.
        lowercase: lower-case all text and strip accents, as in BERT's "uncased" models.

    Returns:
        transformers' own BERT tokenizer, so that a model trained with it also runs as a stock BERT.

    Raises:
        ValueError: if ``vocab_size`` leaves no room for characters.
    """
    if vocab_size <= len(WORDPIECE_TOKENS):
        raise ValueError(f"vocab_size must be above the {len(WORDPIECE_TOKENS)} special tokens, got {vocab_size}")
    texts = list(texts) if isinstance(texts, Iterator) else texts
    learner = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    learner.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    learner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    letters, inside = alphabet(texts, learner, vocab_size - len(WORDPIECE_TOKENS))
    learner.pre_tokenizer = cut_words(learner.pre_tokenizer)
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # Ties between equally frequent pieces are broken by id, and the library would number the characters inside
        # words in no fixed order.
        special_tokens=[*WORDPIECE_TOKENS, *letters, *(CONTINUES + letter for letter in inside)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=learner.get_vocab(), do_lower_case=lowercase)


def alphabet(texts: Iterable[str], learner: Tokenizer, room: int) -> tuple[list[str], list[str]]:
    """Return the sorted characters of a vocabulary, and those that occur inside a word, after its first character.

    Args:
        learner: its normalizer and pre-tokenizer split texts into words.
        room: maximum number of pieces, counting word-initial and word-internal characters separately.
    """
    counts: Counter[str] = Counter()
    words: set[str] = set()
    for text in texts:
        parts = learner.normalizer.normalize_str(text).split()
        words.update(parts)
        counts.update("".join(parts))
    inside = {
        letter for part in words for word, _ in learner.pre_tokenizer.pre_tokenize_str(part) for letter in word[1:]
    }
    common = sorted(counts, key=lambda letter: (-counts[letter], letter))
    seen = np.cumsum([counts[letter] for letter in common])
    wanted = len(common)
    if wanted > FEW_LETTERS:
        wanted = max(FEW_LETTERS, int(np.searchsorted(seen, COVERAGE * seen[-1])) + 1)
    pieces = np.cumsum([1 + (letter in inside) for letter in common[:wanted]])
    fitting = int(np.searchsorted(pieces, room, side="right"))
    if fitting < wanted:
        known = 100 * (seen[fitting - 1] if fitting else 0) / seen[-1]
        log.warning(
            "vocab_size %d has room for %d of the %d letters of the texts, %.2f %% of their characters: words with "
            "other letters are unknown; vocab_size must be above %d for words in addition to letters",
            room + len(WORDPIECE_TOKENS),
            fitting,
            len(common),
            known,
            int(pieces[-1]) + len(WORDPIECE_TOKENS),
        )
    letters = sorted(common[: min(fitting, wanted)])
    return letters, [letter for letter in letters if letter in inside]


def cut_words(words: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Limit words to `LONGEST_WORD` characters for training, whose time grows quadratically with word length."""
    return pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])


def tokenizer_name(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a tokenizer as messages name it: without a path if it is one that a run made or keeps in its folder."""
    name = str(tokenizer.name_or_path or "")
    parts = Path(name).parts
    return "the tokenizer" if not name or ".new" in parts or parts[-1:] == ("tokenizer",) else f'tokenizer "{name}"'


def require_tokens(tokenizer: PreTrainedTokenizerBase, *names: str) -> None:
    """Refuse a tokenizer that lacks a special token.

    Raises:
        ValueError: with the token.
    """
    for name in names:
        if getattr(tokenizer, f"{name}_id") is None:
            raise ValueError(f"{tokenizer_name(tokenizer)} has no {name}")


def tell_unknown(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, samples: int = 1000) -> float | None:
    """Print the fraction of unknown tokens in held-out texts, and warn if it is large.

    Args:
        rows: rows with ``input_ids``.
        samples: number of rows examined.

    Returns:
        The fraction of unknown tokens; None if the tokenizer has no unknown token.
    """
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return None
    ids = [np.asarray(row) for row in rows.select(range(min(samples, len(rows))))["input_ids"]]
    share = float(np.mean(np.concatenate(ids) == unknown)) if sum(map(len, ids)) else 0.0
    if os.environ.get("RANK", "0") == "0":
        print(f"unknown tokens: {share:.2%} of {len(ids):,} held-out texts", file=sys.stderr, flush=True)
    if share > UNKNOWN_SHARE:
        log.warning(
            "%.1f %% of the tokens of held-out texts are unknown to %s: give a larger vocab_size, or a tokenizer of "
            "these languages",
            100 * share,
            tokenizer_name(tokenizer),
        )
    return share


def train_bytes(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> GPT2Tokenizer:
    """Train a byte-level byte-pair encoding without unknown tokens.

    Args:
        texts: texts of the corpus.
        vocab_size: maximum vocabulary size, including special tokens and 256 bytes; a small corpus yields fewer
            tokens.
        lowercase: lower-case all text.

    Returns:
        transformers' own GPT-2 tokenizer. It adds no special token to a text; ``<|endoftext|>`` ends a document.

    Raises:
        ValueError: if ``vocab_size`` is too small for the bytes.
    """
    smallest = 256 + len(BYTES_TOKENS)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size must be at least {smallest} (256 bytes and special tokens), got {vocab_size}")
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = cut_words(pre_tokenizers.ByteLevel(add_prefix_space=False))
    if lowercase:
        learner.normalizer = normalizers.Lowercase()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(BYTES_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"]
    end, pad = BYTES_TOKENS
    tokenizer = GPT2Tokenizer(
        vocab=learner.get_vocab(),
        merges=[tuple(merge) for merge in merges],
        unk_token=end,
        bos_token=end,
        eos_token=end,
        pad_token=pad,
    )
    tokenizer.backend_tokenizer.normalizer = learner.normalizer
    return tokenizer


def word_starts(tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return which tokens begin a word, bool (V,); special tokens do.

    Raises:
        ValueError: if the vocabulary does not mark words.
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
            f"{tokenizer_name(tokenizer)} does not mark where words begin: no token starts with "
            f"{', '.join((CONTINUES, *BEGINS))}"
        )
    return starts
