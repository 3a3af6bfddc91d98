"""Text augmentation: replace words with others that a masked language model considers likely.

    text -> each word masked in turn -> the model's k most probable words -> copies with some words replaced

TinyBERT's augmentation (Jiao et al. 2020, arXiv:1909.10351, section 3.2 and algorithm 1) without word vectors: words
of several pieces, for which the paper uses GloVe, are masked like all others and replaced by single-piece words.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..data.batching import cut, rng
from ..data.vocabulary import tokenizer_name, word_starts
from ..values import check_bounds, conform_fields
from .signals import only_rows


@dataclass(frozen=True, kw_only=True)
class Substitution:
    """Options of the augmentation.

    Args:
        copies: number of augmented copies of each text.
        probability: probability that a word of a copy is replaced (threshold p_t).
        candidates: number of most probable words to sample a replacement from (K).
        max_length: maximum number of tokens of a text that the model reads; later words stay unchanged.
        seed: random seed.

    Raises:
        ValueError: a value is out of range.
    """

    copies: int = 20
    probability: float = 0.4
    candidates: int = 15
    max_length: int = 128
    seed: int = 0

    def __post_init__(self):
        conform_fields(self)
        check_bounds("copies", self.copies, 1, 1000)
        check_bounds("candidates", self.candidates, 1, 10_000)
        check_bounds("max_length", self.max_length, 4, 1_000_000)
        check_bounds("seed", self.seed, 0, 2**32 - 1)
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(f"probability must be in (0, 1], got {self.probability}")


@dataclass
class Word:
    """A word of a text: its character span and its possible replacements."""

    start: int
    end: int
    others: list[str]


def substituted(text: str, words: Sequence[Word], chances: np.random.Generator, probability: float) -> str:
    """Return a copy of a text with some words replaced."""
    parts, end = [], 0
    for word in words:
        replaced = chances.random() < probability
        drawn = int(chances.integers(len(word.others))) if word.others else 0
        new = word.others[drawn] if replaced and word.others else text[word.start : word.end]
        parts += [text[end : word.start], new]
        end = word.end
    return "".join([*parts, text[end:]])


class Substituter:
    """Find possible replacements of words with a masked language model.

    Args:
        model: a masked language model, of this package or of transformers.
        tokenizer: fast tokenizer of the model, with a mask token and a vocabulary that marks word boundaries.
        options: see `Substitution`.

    Raises:
        ValueError: the tokenizer has no mask token, or does not mark word boundaries.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, options: Substitution):
        if tokenizer.mask_token_id is None:
            raise ValueError(f"{tokenizer_name(tokenizer)} has no mask_token")
        self.model, self.tokenizer, self.options = model.eval(), tokenizer, options
        tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        starts = word_starts(tokenizer)
        self.names = [token.lstrip("Ġ▁") for token in tokens]
        whole = [bool(starts[i]) and name.isalpha() for i, name in enumerate(self.names)]
        self.unwanted = torch.tensor([not w for w in whole], device=model.device)

    def words(self, texts: Sequence[str], batch_tokens: int = 4096, progress: bool = False) -> list[list[Word]]:
        """Return the words of each text that contain a letter, with their most probable replacements.

        Args:
            texts: texts to augment.
            batch_tokens: tokens per forward pass, including padding.
        """
        encoded = self.tokenizer(list(texts), truncation=True, max_length=self.options.max_length)
        found: list[list[Word]] = [[] for _ in texts]
        masked: list[tuple[int, list[int], int]] = []  # text number, ids, mask position
        for number, text in enumerate(texts):
            ids, of_word = encoded["input_ids"][number], encoded.word_ids(number)
            for word in dict.fromkeys(w for w in of_word if w is not None):
                place, count = of_word.index(word), of_word.count(word)
                span = encoded.word_to_chars(number, word)
                if any(letter.isalpha() for letter in text[span.start : span.end]):
                    found[number].append(Word(span.start, span.end, []))
                    left_out = [*ids[:place], self.tokenizer.mask_token_id, *ids[place + count :]]
                    masked.append((number, left_out, place))
        lengths = np.array([len(ids) for _, ids, _ in masked])
        seen = [0] * len(texts)
        slots = []  # the word that each masked text predicts
        for number, _, _ in masked:
            slots.append(found[number][seen[number]])
            seen[number] += 1
        if not masked:
            return found
        order = np.argsort(lengths, kind="stable")
        for batch in tqdm(cut(order, lengths, max(batch_tokens, int(lengths.max()))), "words", disable=not progress):
            answers = self.likeliest([masked[i][1] for i in batch], [masked[i][2] for i in batch])
            for i, others in zip(batch, answers, strict=True):
                own = texts[masked[i][0]][slots[i].start : slots[i].end]
                slots[i].others = [word for word in others if word.lower() != own.lower()][: self.options.candidates]
        return found

    @torch.inference_mode()
    def likeliest(self, rows: Sequence[Sequence[int]], positions: Sequence[int]) -> list[list[str]]:
        """Return the most probable words at one position per row of ids, one more than `candidates`."""
        longest = max(map(len, rows))
        ids = np.full((len(rows), longest), self.tokenizer.pad_token_id, dtype=np.int64)
        seen = np.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)], seen[i, : len(row)] = row, 1
        device = self.model.device
        inputs = {"input_ids": torch.from_numpy(ids).to(device), "attention_mask": torch.from_numpy(seen).to(device)}
        at_masks = torch.arange(len(rows), device=device) * longest + torch.tensor(positions, device=device)
        with only_rows(self.model, at_masks):
            logits = self.model(**inputs).logits.float()
        if logits.ndim == 3:  # no output embedding to restrict: all rows were computed
            logits = logits.flatten(0, 1)[at_masks]
        logits = logits[:, : len(self.names)].masked_fill(self.unwanted, -torch.inf)
        best = logits.topk(min(self.options.candidates + 1, logits.shape[1])).indices.tolist()
        return [[self.names[i] for i in row] for row in best]


def with_copies(
    rows: datasets.Dataset, columns: Sequence[str], substituter: Substituter, batch_tokens: int = 4096, progress=False
) -> datasets.Dataset:
    """Insert after each row its augmented copies, dropping copies equal to the row or to each other.

    A copy depends only on (seed, row number, copy number). For a row with two texts, both are augmented.

    Args:
        columns: text columns to augment; all other columns are repeated.
    """
    options = substituter.options
    words = {name: substituter.words(rows[name][:], batch_tokens, progress) for name in columns}

    def grow(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        grown: dict[str, list] = {name: [] for name in batch}
        for place, index in enumerate(indices):
            row = {name: values[place] for name, values in batch.items()}
            variants = [row]
            for copy in range(options.copies):
                chances = rng(options.seed, index, copy)
                new = {
                    name: substituted(row[name], words[name][index], chances, options.probability) for name in columns
                }
                if all(any(new[name] != other[name] for name in columns) for other in variants):
                    variants.append({**row, **new})
            for variant in variants:
                for name, value in variant.items():
                    grown[name].append(value)
        return grown

    return rows.map(grow, batched=True, with_indices=True, features=rows.features, load_from_cache_file=False)
