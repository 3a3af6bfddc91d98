"""Vocabularies of encoders and decoders, learned from texts, and where words begin among their tokens.

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

import datasets
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

log = logging.getLogger(__name__)

WORDPIECE_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
CONTINUES = "##"  # begins a WordPiece token that goes on with a word
FEW_LETTERS = 1000  # a WordPiece vocabulary has all letters of the texts if they are no more
COVERAGE = 0.9995  # of the letters of texts with more, as SentencePiece's character_coverage; the rarest are unknown
LONGEST_WORD = 100  # characters; BERT's tokenizer has longer words unknown, and learning from them takes for ever
UNKNOWN_SHARE = 0.01  # of the tokens of texts, above which a vocabulary is said not to fit them
BYTES_TOKENS = ("<|endoftext|>", "<|pad|>")  # ids 0 and 1
BEGINS = ("Ġ", "▁")  # begin a token that begins a word, in byte-level BPE and in SentencePiece


def train_wordpiece(texts: Iterable[str], vocab_size: int, lowercase: bool = True) -> BertTokenizer:
    """Learn a WordPiece vocabulary; the same texts give the same.

    Args:
        texts: of the corpus, read twice.
        vocab_size: tokens, special ones and letters among them; fewer come of a small corpus.
        lowercase: lower-case everything and strip accents, as BERT's "uncased" models.

    Returns:
        transformers' own tokenizer of BERT, so that a model trained with it also runs as a stock one.

    Raises:
        ValueError: ``vocab_size`` leaves no room for letters.
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
        # Among pieces equally common the first number wins, and the library would number letters inside a word in no
        # fixed order.
        special_tokens=[*WORDPIECE_TOKENS, *letters, *(CONTINUES + letter for letter in inside)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=learner.get_vocab(), do_lower_case=lowercase)


def alphabet(texts: Iterable[str], learner: Tokenizer, room: int) -> tuple[list[str], list[str]]:
    """The letters of a vocabulary, sorted; and those of them that occur inside a word, past its first letter.

    Args:
        learner: its normalizer and pre-tokenizer make words of texts.
        room: pieces that there may be, letters that begin a word and letters inside one together.
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
            "other letters are unknown; vocab_size must be above %d for words beside letters",
            room + len(WORDPIECE_TOKENS),
            fitting,
            len(common),
            known,
            int(pieces[-1]) + len(WORDPIECE_TOKENS),
        )
    letters = sorted(common[: min(fitting, wanted)])
    return letters, [letter for letter in letters if letter in inside]


def cut_words(words: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    """Words of at most `LONGEST_WORD` characters, for learning: its time grows with the square of a word's length."""
    return pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(LONGEST_WORD)])


def tell_unknown(rows: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, samples: int = 1000) -> float | None:
    """Print how many tokens of held-out texts are unknown, and warn where they are many.

    Args:
        rows: with ``input_ids``.
        samples: rows that are looked at.

    Returns:
        The share of unknown tokens; None of a tokenizer that knows everything.
    """
    unknown, name = tokenizer.unk_token_id, tokenizer.name_or_path
    if unknown is None or unknown in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        return None
    ids = [np.asarray(row) for row in rows.select(range(min(samples, len(rows))))["input_ids"]]
    share = float(np.mean(np.concatenate(ids) == unknown)) if sum(map(len, ids)) else 0.0
    if os.environ.get("RANK", "0") == "0":
        print(f"unknown tokens: {share:.2%} of {len(ids):,} held-out texts", file=sys.stderr, flush=True)
    if share > UNKNOWN_SHARE:
        log.warning(
            "%.1f %% of the tokens of held-out texts are unknown to the tokenizer%s: give a larger vocab_size, or a "
            "tokenizer of these languages",
            100 * share,
            f' "{name}"' * bool(name),
        )
    return share


def train_bytes(texts: Iterable[str], vocab_size: int, lowercase: bool = False) -> GPT2Tokenizer:
    """Learn a byte-pair encoding of bytes, so that nothing is unknown.

    Args:
        texts: of the corpus.
        vocab_size: tokens, special ones and 256 bytes among them; fewer come of a small corpus.
        lowercase: lower-case everything.

    Returns:
        transformers' own tokenizer of GPT-2. It adds no token to a text; ``<|endoftext|>`` ends a document.

    Raises:
        ValueError: ``vocab_size`` is too small for the bytes.
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
