"""Vocabularies of encoders and decoders, learned from texts, and where words begin among their tokens.

WordPiece: words -> pieces, "playing" -> "play", "##ing" (Schuster and Nakajima 2012; Devlin et al. 2019, section 3.1)
bytes: words with the space before them -> pieces of bytes (Radford et al. 2019, section 2.2)

The joint vocabulary of two languages is in `data.text`.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerBase

WORDPIECE_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # ids 0 to 4
CONTINUES = "##"  # begins a WordPiece token that goes on with a word
MOST_LETTERS = 1000  # of a WordPiece vocabulary; rarer signs of other scripts are unknown
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
    counts = Counter(letter for text in texts for letter in learner.normalizer.normalize_str(text))
    room = min(MOST_LETTERS, (vocab_size - len(WORDPIECE_TOKENS)) // 2)
    letters = sorted(sorted(counts, key=lambda letter: (-counts[letter], letter))[:room])
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # Among pieces equally common the first number wins, and the library would number letters inside a word in no
        # fixed order.
        special_tokens=[*WORDPIECE_TOKENS, *letters, *(CONTINUES + letter for letter in letters)],
        initial_alphabet=letters,
        limit_alphabet=len(letters),
        continuing_subword_prefix=CONTINUES,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=learner.get_vocab(), do_lower_case=lowercase)


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
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
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
