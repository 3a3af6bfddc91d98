"""Language modelling: masked tokens (BERT), with or without next sentences, or next tokens (GPT).

{"text"} -> {"input_ids"} -> padded batch, some tokens masked -> sums of token losses -> perplexity

Shapes: B sequences; T tokens; V vocabulary; n tokens with a target.
"""

import logging
import math
from collections.abc import Collection
from dataclasses import InitVar, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import ModelOutput

from ..arguments import (
    Arguments,
    DatasetArguments,
    EvaluationArguments,
    ModelArguments,
)
from ..data.batching import StepLoader, TokenBudgetSampler, pad_tokens, rng
from ..data.language import (
    Corpus,
    SequenceTokenization,
    Texts,
    sequence_length,
    sequence_lengths,
    text_rows,
    token_sequences,
)
from ..data.stream import StreamLoader
from ..data.text import fingerprint
from ..data.vocabulary import require_tokens, tell_unknown, train_bytes, train_wordpiece, word_starts
from ..distillation.model_spec import check_tokenizers
from ..families import CAUSAL_LM, MASKED_LM, NEXT_SENTENCE_LM
from ..hub.loading import load_config, load_model, load_tokenizer
from ..hub.pretrained import MASKED_WORDS, NEXT_WORDS, SENTENCE_PAIRS, Suitable, load_to_train
from ..limits import LARGEST_VOCABULARY, LONGEST, SEEDS
from ..models.cross_entropy import IGNORE_INDEX
from .base import Batch, Collator, Scores, Task
from .distillation import DistillationArguments, check_texts
from .loaders import token_loader
from .model_fields import build_new, check_fields, head_of, new_config, sums_losses
from .splits import load_rows
from .streams import TokenStreamArguments, check_longest, stream_loader

log = logging.getLogger(__name__)

INPUTS = ("input_ids", "attention_mask", "token_type_ids")
NEXT_SENTENCE = "next_sentence_label"
ARCHITECTURES = {"masked": "bert", "causal": "gpt"}  # default family of a new model, by objective
TOKEN_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")  # of a configuration: the tokenizer's


@dataclass(kw_only=True)
class TextArguments(Arguments):
    """Texts, and which of their tokens are masked.

    Args:
        text_column: text column, or a dotted path into one; default, "text" or the only string column.
        documents: whether each row is a document; if false, rows are pieces of a running text.
        mlm_probability: fraction of the tokens that are masked.
        whole_words: mask whole words.
    """

    text_column: str | None = None
    documents: bool = True
    mlm_probability: float = 0.15
    whole_words: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not 0.0 < self.mlm_probability < 1.0:
            raise ValueError(f"mlm_probability must be in (0, 1), got {self.mlm_probability}")


@dataclass(kw_only=True)
class LanguageModelingArguments(TextArguments, DatasetArguments, ModelArguments, TokenStreamArguments):
    """Arguments of language-model pretraining.

    Args:
        more_texts: further training data, each {dataset_name, split, text_column, ...}.
        objective: masked tokens (BERT) or next tokens (GPT).
        sequences: packed blocks of running text, rows (one truncated text each), or pairs of segments, which adds next
            sentence prediction.
        max_length: maximum number of tokens of a sequence.
        tokenizer: folder or Hub id of a tokenizer; default, one is trained on the training texts: WordPiece for masked
            tokens, byte-pair encoding for next tokens.
        tokenizer_rows: number of training rows that the tokenizer is trained on; default, all.
        vocab_size: vocabulary size of the trained tokenizer.
        lowercase: the trained tokenizer lower-cases all text.
        architecture: model family of a new model; default, bert for masked tokens and gpt for next tokens.
    """

    more_texts: list[Corpus] = field(default_factory=list)
    objective: Literal["masked", "causal"] = "masked"
    sequences: Literal["packed", "rows", "pairs"] = "packed"
    max_length: int = 128
    tokenizer: str | None = None
    tokenizer_rows: int | None = None
    vocab_size: int = 30_522
    lowercase: bool = True
    architecture: str | None = None
    size: str = "small"

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_1="max_length vocab_size tokenizer_rows",
            at_most={"max_length": LONGEST, "vocab_size": LARGEST_VOCABULARY},
        )
        if self.metric_for_best_model != "loss":
            raise ValueError(f'metric_for_best_model must be "loss", got "{self.metric_for_best_model}"')
        if self.objective == "causal" and (self.sequences == "pairs" or self.whole_words):
            raise ValueError('sequences="pairs" and whole_words are for objective="masked"')
        if self.streaming:
            check_longest(self, self.max_length)
            if self.more_texts:
                raise ValueError("streaming reads one split: give no more_texts")
        if self.model_name_or_path and (self.model or self.tokenizer):
            raise ValueError("model_name_or_path has its own model and tokenizer: give neither model nor tokenizer")
        check_fields(self.config_class, self.model, TOKEN_FIELDS)
        if not self.model_name_or_path:
            config = new_config(self.config_class, self)
            if self.max_length > (longest := longest_input(config, self.max_length)):
                raise ValueError(
                    f"max_length must be at most model.max_position_embeddings = {longest}, got {self.max_length}"
                )

    @property
    def accepted_models(self) -> dict[str, Suitable]:  # type: ignore[override]  # an option chooses them
        """Models that are valid for ``model_name_or_path`` and ``teacher``."""
        if self.objective == "causal":
            return NEXT_WORDS
        return SENTENCE_PAIRS if self.sequences == "pairs" else MASKED_WORDS

    @classmethod
    def choices(cls) -> dict[str, list[str]]:
        """See `ModelArguments`."""
        return {"architecture": [*MASKED_LM.families(), *CAUSAL_LM.families()]}

    @property
    def config_class(self) -> type[PreTrainedConfig]:
        """See `ModelArguments`."""
        return self.head.config_class(self.architecture or ARCHITECTURES[self.objective])


@dataclass(kw_only=True)
class LanguageDistillationArguments(DistillationArguments, LanguageModelingArguments):
    """Distillation of a language model; the student has the teacher's tokenizer."""

    size: str = "distilbert"

    def __post_init__(self):
        super().__post_init__()
        if self.sequences == "pairs":
            raise ValueError('sequences must be "packed" or "rows": next sentences are not distilled, got "pairs"')
        check_texts(self)


@dataclass(kw_only=True)
class LanguageEvaluationArguments(TextArguments, EvaluationArguments):
    """Scoring a language model.

    Args:
        sequences: packed blocks of running text, or rows, one truncated text each.
        max_length: tokens of a sequence; default, the maximum of the model and its tokenizer.
        seed: of the masks.
        batch_tokens: padded tokens in a batch.
    """

    sequences: Literal["packed", "rows"] = "packed"
    max_length: int | None = None
    seed: int = 0
    batch_tokens: int = 4096

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="seed",
            at_least_1="max_length batch_tokens",
            at_most={"seed": SEEDS - 1, "batch_tokens": 2**24},
        )


@dataclass
class CausalLanguageCollator:
    """Sequences of `data.language.token_sequences` -> a batch for next-token prediction.

    ``input_ids`` (B, T); ``attention_mask`` (B, T) if there is padding; ``labels`` (B, T), the same ids, or
    `IGNORE_INDEX` for padding and in a dummy batch.

    Args:
        tokenizer: needs a padding token.

    Raises:
        ValueError: it has none.
    """

    tokenizer: InitVar[Tokenizer]

    def __post_init__(self, tokenizer: Tokenizer):
        require_tokens(tokenizer, "pad_token")
        self.pad = tokenizer.pad_token_id

    def __call__(self, examples: list[dict], indices: list[int], epoch: int, is_dummy: bool = False) -> Batch:
        batch = pad_tokens(examples, self.pad)
        labels = batch["input_ids"].clone()
        if "attention_mask" in batch:
            labels[batch["attention_mask"] == 0] = IGNORE_INDEX
        return {**batch, "labels": torch.full_like(labels, IGNORE_INDEX) if is_dummy else labels}


@dataclass
class MaskedLanguageCollator:
    """Sequences of `data.language.token_sequences` -> a batch for masked-token prediction.

    ``input_ids`` (B, T) with masks; ``attention_mask`` (B, T) if there is padding; ``labels`` (B, T), `IGNORE_INDEX`
    where nothing is predicted; ``masked_positions`` (n,) int64, flat positions of the labels; for pairs,
    ``token_type_ids`` (B, T) and ``next_sentence_label`` (B,), 1 if the second segment is a random one. A dummy batch
    has no labels.

    15 % of the tokens of a sequence are chosen; 80 % of them become the mask token, 10 % a random token and 10 % stay
    (Devlin et al. 2019, section 3.1). The choice is a function of (seed, epoch, index) alone.

    Args:
        tokenizer: needs a mask and a padding token.
        mlm_probability: fraction of the tokens that are chosen, at least one per sequence.
        whole_words: choose whole words, as many as fit in the fraction.
        seed: of the choice.

    Raises:
        ValueError: the tokenizer lacks a token, or with ``whole_words`` does not mark words; or ``mlm_probability`` is
            out of range.
    """

    tokenizer: InitVar[Tokenizer]
    mlm_probability: float = 0.15
    whole_words: bool = False
    seed: int = 0

    def __post_init__(self, tokenizer: Tokenizer):
        require_tokens(tokenizer, "pad_token", "mask_token")
        if not 0.0 < self.mlm_probability < 1.0:
            raise ValueError(f"mlm_probability must be in (0, 1), got {self.mlm_probability}")
        self.pad, self.mask = tokenizer.pad_token_id, tokenizer.mask_token_id
        self.vocab_size = len(tokenizer)
        self.special = np.zeros(self.vocab_size, dtype=bool)
        self.special[tokenizer.all_special_ids] = True
        if tokenizer.unk_token_id is not None:
            self.special[tokenizer.unk_token_id] = False  # an unknown word is a word
        self.starts = word_starts(tokenizer) if self.whole_words else np.ones(self.vocab_size, dtype=bool)

    def __call__(self, examples: list[dict], indices: list[int], epoch: int, is_dummy: bool = False) -> Batch:
        batch = pad_tokens(examples, self.pad)
        ids, labels = batch["input_ids"].numpy(), np.full(batch["input_ids"].shape, IGNORE_INDEX, dtype=np.int64)
        for row, (example, index) in enumerate(zip(examples, indices, strict=True)):
            if not is_dummy:
                length = len(example["input_ids"])
                chosen, replacements = self.mask_tokens(ids[row, :length], rng(self.seed, epoch, index))
                labels[row, chosen] = ids[row, chosen]
                ids[row, chosen] = replacements
        batch["labels"] = torch.from_numpy(labels)
        batch["masked_positions"] = torch.from_numpy(np.flatnonzero(labels != IGNORE_INDEX))
        if "second" in examples[0]:
            second = torch.tensor([example["second"] for example in examples])
            batch["token_type_ids"] = (torch.arange(ids.shape[1]) >= second[:, None]).long()
            batch[NEXT_SENTENCE] = torch.tensor(
                [IGNORE_INDEX if is_dummy else int(example["random"]) for example in examples]
            )
        return batch

    def mask_tokens(self, ids: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Return the positions (n,) of a sequence (T,) that are predicted, and the tokens (n,) that replace them."""
        chosen = self.choose(ids, random)
        draw = random.random(len(chosen))
        others = random.integers(self.vocab_size, size=len(chosen))
        return chosen, np.where(draw < 0.8, self.mask, np.where(draw < 0.9, others, ids[chosen]))

    def choose(self, ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Return the positions (n,) of a sequence (T,) that are predicted, in order."""
        positions = np.flatnonzero(~self.special[ids])
        if not len(positions):
            return positions
        # Special tokens separate words: any token after one begins a word.
        word = np.cumsum(self.starts[ids[positions]] | np.r_[True, np.diff(positions) > 1]) - 1  # of each position
        order = random.permutation(word[-1] + 1)
        lengths = np.bincount(word)[order]
        wanted = max(1, round(self.mlm_probability * len(positions)))
        fit = np.cumsum(lengths) <= wanted
        fit[0] = True  # at least one word, even if it is longer than the fraction
        return positions[np.isin(word, order[fit])]


class LanguageModelingTask(Task):
    """Cross-entropy of masked tokens, and for pairs of next sentences; or of next tokens (Radford et al. 2018)."""

    Arguments = LanguageModelingArguments
    EvaluationArguments = LanguageEvaluationArguments
    DistillationArguments = LanguageDistillationArguments
    kind, term = "language models", "token"
    processor_class, processor_folder = AutoTokenizer, "tokenizer"
    described_columns = ("text_column",)
    reported_metrics = ("perplexity", "token_loss", "next_sentence_loss")
    validation_metrics = ("loss", "token", "pair")
    cache_options = ("max_length", "sequences", "documents", "objective", "mlm_probability", "whole_words")

    @cached_property
    def causal(self) -> bool:
        """True for next tokens, False for masked tokens."""
        if self.evaluating:
            return is_causal(load_config(self.args.model, **self.args.pretrained))
        return self.args.objective == "causal"

    @property
    def hub_task(self) -> str:
        """See `Task`."""
        return "text-generation" if self.causal else "fill-mask"

    @property
    def item(self) -> str:
        """See `Task`."""
        return "tokens" if self.causal else "masked tokens"

    @property
    def auto_class(self) -> Any:
        """See `Task`."""
        return AutoModelForCausalLM if self.causal else AutoModelForMaskedLM

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """True for a model saved with an output layer over tokens that is not a translation model."""
        saved = ", ".join(config.architectures or ())
        return any(name in saved for name in ("ForMaskedLM", "ForCausalLM", "LMHeadModel")) or (
            config.model_type in NEXT_SENTENCE_LM.model_types() and "ForPreTraining" in saved
        )

    def load_splits(self) -> dict[str, Any]:
        """Rows of `text_rows` by split; those of ``more_texts`` as "DATASET, SPLIT"."""
        args = self.args
        rows = load_rows(args, lambda rows: text_rows(rows, args.text_column))
        for i, more in enumerate([] if self.evaluating else args.more_texts):
            try:
                rows[f"{Path(more.dataset_name).name}, {more.split}"] = more.rows()
            except ValueError as error:
                raise ValueError(f"more_texts[{i}]: {error}") from error
        return rows

    def fingerprint(self, rows: datasets.Dataset) -> str:
        """See `Task`."""
        return fingerprint(rows)

    @property
    def training_splits(self) -> dict[str, Any]:
        """The training split and ``more_texts``, by name."""
        return {
            name: rows
            for name, rows in self.splits.items()
            if name == self.args.train_split or name not in self.scored_splits
        }

    @property
    def training_rows(self) -> Any:
        """All training texts."""
        parts = list(self.training_splits.values())
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]

    def build_processor(self) -> Tokenizer:
        """The tokenizer given by the arguments, or one trained on the training texts."""
        args = self.args
        if pretrained := args.tokenizer or args.model_name_or_path:
            return load_tokenizer(
                pretrained, "tokenizer" if args.tokenizer else "model_name_or_path", None, args.trust_remote_code
            )
        rows = self.training_rows
        train = train_bytes if self.causal else train_wordpiece
        return train(
            Texts(rows if args.tokenizer_rows is None else rows.take(args.tokenizer_rows)),
            args.vocab_size,
            args.lowercase,
        )

    def build_model(self, vocab_size: int | None = None) -> PreTrainedModel:
        """See `Task`.

        Args:
            vocab_size: of a new model, at least that of the tokenizer, which is the default.

        Raises:
            ValueError: the model does not fit the tokenizer or ``max_length``, or lacks weights; see `load_to_train`.
        """
        args, tokenizer = self.args, self.processor
        tokenizer.model_max_length = args.max_length
        set_seed(args.seed)
        if args.model_name_or_path:
            model, new = load_to_train(args.head, args.model_name_or_path, head_of)
            if new:
                log.warning(
                    "weights that model_name_or_path does not have are initialised randomly: %s",
                    ", ".join(sorted(new)),
                )
            check_fit(model.config, tokenizer, args.max_length)
            return model
        ids = {name: getattr(tokenizer, name) for name in TOKEN_FIELDS[1:]}
        config = new_config(args.config_class, args, vocab_size=vocab_size or len(tokenizer), **ids)
        check_fit(config, tokenizer, args.max_length)
        return build_new(config, args.head)

    def load_pretrained(self) -> None:
        """See `Task`; any masked or causal language model will do."""
        args = self.args
        tokenizer = load_tokenizer(args.model, **args.pretrained)
        self.model, self.processor = load_model(self.auto_class, args.model, **args.pretrained), tokenizer
        if self.causal and tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token  # padding counts for nothing
        longest = longest_input(self.model.config, tokenizer.model_max_length)
        self.args = replace(args, max_length=args.max_length or longest)
        check_fit(self.model.config, tokenizer, self.args.max_length)

    def collator(self, split: str = "", training: bool = False) -> CausalLanguageCollator | MaskedLanguageCollator:
        """See `Task`; masks for evaluation are those of epoch 0."""
        args = self.args
        if self.causal:
            return CausalLanguageCollator(self.processor)
        return MaskedLanguageCollator(self.processor, args.mlm_probability, args.whole_words, args.seed)

    def dataloader(
        self, split: str, training: bool = False, collate: Collator | None = None
    ) -> StepLoader | StreamLoader:
        """See `Task`; training batches are of all training texts."""
        args, rows = self.args, self.training_rows if training else self.splits[split]
        options = self.processor, args.max_length, args.sequences, args.documents, args.seed
        collate = collate or self.collator(split, training)
        if isinstance(rows, datasets.IterableDataset):
            tokenize = SequenceTokenization(*options)
            return stream_loader(args, self.accelerator, collate, rows, tokenize, sequence_length)
        rows = token_sequences(rows, *options)
        if self.evaluating:
            budget = max(args.batch_tokens, args.max_length)
            return StepLoader(rows, TokenBudgetSampler(sequence_lengths(rows), budget, shuffle=False), collate)
        return token_loader(args, self.accelerator, collate, rows, sequence_lengths, training)

    def begin_training(self, loader: Any) -> None:
        """Tokenize the splits that are scored, so that errors in them are raised before training."""
        for split in self.scored_splits:
            tell_unknown(self.evaluation_loader(split).examples, self.processor)

    def count(self, batch: Batch) -> dict[str, int]:
        """Tokens with a target, and pairs if next sentences are predicted."""
        counts = {"token": len(self.target_positions(batch))}
        if NEXT_SENTENCE in batch:
            counts["pair"] = int((batch[NEXT_SENTENCE] != IGNORE_INDEX).sum())
        return counts

    def inputs(self, batch: Batch) -> Batch:
        """See `Task`."""
        return {name: batch[name] for name in INPUTS if name in batch}

    @staticmethod
    def target_positions(batch: Batch) -> Tensor:
        """(n,) flat positions of the masked tokens, or of the tokens with a next token."""
        if "masked_positions" in batch:
            return batch["masked_positions"]
        following = nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORE_INDEX)
        return (following != IGNORE_INDEX).flatten().nonzero()[:, 0]

    def output_losses(self, output: ModelOutput, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Token loss of the logits (n, V) at `target_positions`."""
        offset = 0 if "masked_positions" in batch else 1
        labels = batch["labels"].flatten()[self.target_positions(batch) + offset]
        return {"token": cross_entropy(logits.float(), labels, reduction="sum")}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `Task`; a model that sums losses itself computes logits of the predicted tokens only, and keeps none."""
        if not sums_losses(model):
            output = model(**self.inputs(batch))
            return self.output_losses(output, output.logits.flatten(0, 1)[self.target_positions(batch)], batch)
        masked = "masked_positions" in batch
        own = {"masked_positions": batch["masked_positions"]} if masked else {"use_cache": False}
        output = model(**self.inputs(batch), labels=batch["labels"], num_items_in_batch=1, return_logits=False, **own)
        losses = {"token": output.loss}
        if NEXT_SENTENCE in batch:
            losses["pair"] = cross_entropy(
                output.seq_relationship_logits.float(),
                batch[NEXT_SENTENCE],
                ignore_index=IGNORE_INDEX,
                reduction="sum",
            )
        return losses

    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean losses, and perplexity: the exponential of the mean loss of a token."""
        args = self.args
        values = self.mean_losses(model, self.evaluation_loader(split))
        values["token_loss"] = values.get("token", values["loss"])
        if "pair" in values:
            values["next_sentence_loss"] = values["pair"]
        if metrics is None or "perplexity" in metrics:
            values["perplexity"] = math.exp(values["token_loss"])
        signature = None if self.causal else f"masked: {args.mlm_probability:g}, seed: {args.seed}"
        return Scores(values, dict.fromkeys(self.reported_metrics, signature), details={"max_length": args.max_length})

    # --- hooks of distillation

    def build_student_processor(self) -> Tokenizer:
        """See `Task`."""
        tokenizer = super().build_student_processor()
        if self.args.model_name_or_path:
            own = AutoTokenizer.from_pretrained(self.args.model_name_or_path, trust_remote_code=False)
            check_tokenizers(own, tokenizer)
        return tokenizer

    def build_student(self, teacher: PreTrainedConfig) -> PreTrainedModel:
        """See `Task`; the student has as many logits as the teacher, whose tokenizer may have fewer tokens."""
        return self.build_model(teacher.get_text_config().vocab_size)

    def training_fingerprint(self) -> str:
        """See `Task`."""
        return str({name: self.fingerprint(rows) for name, rows in self.training_splits.items()})

    def sample_inputs(self) -> dict[str, Tensor]:
        """See `Task`."""
        return {"input_ids": torch.ones(1, self.args.max_length, dtype=torch.long)}


def is_causal(config: PreTrainedConfig) -> bool:
    """Return True if a saved language model predicts next tokens, False if it predicts masked ones."""
    saved = ", ".join(config.architectures or ())
    remote = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
    return known and "ForMaskedLM" not in saved and "ForPreTraining" not in saved


def longest_input(config: PreTrainedConfig, limit: int) -> int:
    """Return the largest number of tokens that a model reads, at most ``limit``."""
    return min(getattr(config, "max_position_embeddings", None) or limit, limit)


def check_fit(config: PreTrainedConfig, tokenizer: Tokenizer, max_length: int) -> None:
    """Refuse a tokenizer with more tokens than the model, or sequences that are too long for the model.

    Raises:
        ValueError: with both numbers.
    """
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"the model has {config.vocab_size} tokens, fewer than the {len(tokenizer)} of its tokenizer")
    if max_length > (longest := longest_input(config, max_length)):
        raise ValueError(
            f"max_length must be at most the model's max_position_embeddings = {longest}, got {max_length}"
        )
