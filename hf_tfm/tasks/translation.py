"""Translation with an encoder-decoder: a Transformer (Vaswani et al. 2017, arXiv:1706.03762), GRU or LSTM.

{"source", "target"} texts -> {"input_ids", "labels"} lists -> padded batch -> sums of token losses -> BLEU, chrF

Shapes: B sentences; S source, T target positions.
"""

from bisect import bisect_right
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import (
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GenerationConfig,
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
from ..data import text
from ..data.batching import StepLoader, TokenBudgetSampler, pad, part_of_rank, rng
from ..data.stream import StreamLoader
from ..data.text import EXTRA_LENGTH
from ..data.vocabulary import tokenizer_name
from ..distillation.model_spec import check_tokenizers
from ..families import SEQ2SEQ
from ..hub.loading import check_vocabulary, load_config, load_model, load_tokenizer
from ..hub.pretrained import TRANSLATIONS, load_to_train
from ..limits import LARGEST_VOCABULARY, LONGEST, MOST_BEAMS
from ..metrics import Bleu, Chrf, ExactMatch
from ..metrics.text import TextMetric
from ..models.cross_entropy import IGNORE_INDEX, label_smoothed_cross_entropy
from ..models.mask_predict import mask_targets
from ..models.seq2seq import shift_right
from ..values import check_bounds
from .base import Batch, Collator, Scores, Task
from .distillation import EncoderDecoderArguments, check_texts
from .loaders import token_loader
from .model_fields import build_new, check_fields, sums_losses
from .splits import load_rows
from .streams import TokenStreamArguments, check_longest, stream_loader

Metric = Literal["bleu", "bleu_lowercase", "chrf", "chrf_lowercase", "exact_match"]
DEFAULT_METRICS: tuple[Metric, ...] = ("bleu", "bleu_lowercase", "chrf", "chrf_lowercase")
INPUTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
TYPICAL_LENGTH = 32  # tokens of both sides of the sentence for which costs are measured
LONG = "long"  # split of the training pairs that max_words excludes
TRANSLATED_TOKENS = 4096  # padded source tokens times beams that are translated at once


@dataclass(kw_only=True)
class PairArguments(Arguments):
    """Columns of text pairs.

    Args:
        source_column: column of the source text, a dotted path, or a language in a column "translation".
        target_column: column of the target text.
    """

    source_column: str = "en"
    target_column: str = "de"

    def __post_init__(self):
        super().__post_init__()
        if self.source_column == self.target_column:
            raise ValueError(
                f"source_column and target_column must be different columns, got {self.source_column} for both"
            )


@dataclass(kw_only=True)
class LengthArguments(Arguments):
    """Lengths in words, which white space separates.

    Args:
        length_bins: edges of bins of the source length: final translations are also scored by bin. [12, 15] makes the
            bins of sources of up to 11, of 12 to 14, and of 15 and more words.
    """

    length_bins: list[int] = field(default_factory=list)

    def __post_init__(self):
        super().__post_init__()
        edges = self.length_bins
        if any(edge < 1 for edge in edges) or sorted(set(edges)) != edges:
            raise ValueError(f"length_bins must be increasing numbers of words, at least 1, got {edges}")


@dataclass(kw_only=True)
class TranslationArguments(LengthArguments, PairArguments, DatasetArguments, ModelArguments, TokenStreamArguments):
    """Arguments of translation training.

    Args:
        model: configuration fields that differ from those of the size, or of model_name_or_path, for instance
            {position_embedding_type: floater}.
        max_words: training and validation pairs with a side of more words are left out; those of the training split
            are the split "long", which test_splits may name.
        max_length: training pairs with a side of more tokens are dropped; also the limit of translations.
        tokenizer: folder or Hub id of a tokenizer; default, a byte-pair encoding is trained on the training data.
        vocab_size: vocabulary size of the trained tokenizer.
        lowercase: the trained tokenizer lower-cases all text.
        num_beams: beams of the final translations; 1 is greedy decoding.
        length_penalty: exponent of the length by which beam scores are divided.
        iterations: refinement passes of a mask-predict model.
        metrics: metrics of the final translations.
    """

    accepted_models: ClassVar = TRANSLATIONS
    new_model_options: ClassVar = ("architecture", "size", "model", "tokenizer", "vocab_size", "lowercase")

    max_words: int | None = None
    max_length: int = 256
    tokenizer: str | None = None
    vocab_size: int = 10_000
    lowercase: bool = False
    architecture: str = "transformer"
    size: str = "tiny"
    num_beams: int = 5
    length_penalty: float = 1.0
    iterations: int = 10
    metrics: list[Metric] = field(default_factory=lambda: list(DEFAULT_METRICS))

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_1="max_words max_length vocab_size num_beams iterations",
            at_most={
                "max_length": LONGEST,
                "vocab_size": LARGEST_VOCABULARY,
                "num_beams": MOST_BEAMS,
                "iterations": 1000,
            },
        )
        check_bounds("length_penalty", self.length_penalty, -100, 100)
        self.check_distinct("metrics")
        if self.metric_for_best_model not in ("loss", *METRICS):
            raise ValueError(
                f"metric_for_best_model must be loss or one of {', '.join(METRICS)}, got "
                f'"{self.metric_for_best_model}"'
            )
        if self.streaming:
            check_longest(self, self.max_length)
            if self.max_words is not None and LONG in self.test_splits:
                raise ValueError(f'test_splits "{LONG}" is a part of train_split, which streaming reads only once')
        if self.model_name_or_path and self.tokenizer:
            raise ValueError("model_name_or_path has its own tokenizer: give no tokenizer")
        if self.lowercase and (self.model_name_or_path or self.tokenizer):
            raise ValueError("lowercase applies to a trained tokenizer: give neither tokenizer nor model_name_or_path")
        if not self.model_name_or_path:
            check_positions(build_config(self), self.max_length)

    def check_saved(self, config: PreTrainedConfig) -> None:
        """See `ModelArguments`."""
        kind = self.head.model_class(config.model_type).config_class
        check_fields(kind, self.model, ["vocab_size", *token_fields(kind)])


@dataclass(kw_only=True)
class TranslationDistillationArguments(EncoderDecoderArguments, TranslationArguments):
    """Distillation of a translation model, whose tokenizer the student has."""

    def __post_init__(self):
        super().__post_init__()
        check_texts(self)
        if self.lowercase:
            raise ValueError("lowercase applies to a trained tokenizer, and the student has the teacher's tokenizer")


@dataclass(kw_only=True)
class TranslationEvaluationArguments(LengthArguments, PairArguments, EvaluationArguments):
    """Scoring a translation model.

    Args:
        min_words: score only pairs whose longer side has at least this many words.
        max_words: score only pairs whose longer side has at most this many words.
        metrics: bleu, bleu_lowercase, chrf, chrf_lowercase, exact_match.
        num_beams: number of beams; default, as saved with the model.
        length_penalty: exponent of the length by which beam scores are divided; default, as saved with the model.
        iterations: refinement passes of a mask-predict model.
        batch_tokens: padded source tokens times beams in a batch.
    """

    min_words: int | None = None
    max_words: int | None = None
    metrics: list[Metric] = field(default_factory=lambda: list(DEFAULT_METRICS))
    num_beams: int | None = None
    length_penalty: float | None = None
    iterations: int | None = None
    batch_tokens: int = TRANSLATED_TOKENS

    def __post_init__(self):
        super().__post_init__()
        if not self.metrics:
            raise ValueError("metrics must contain at least one metric")
        self.check_range(
            at_least_1="min_words max_words num_beams iterations batch_tokens",
            at_most={"num_beams": MOST_BEAMS, "iterations": 1000, "batch_tokens": 2**24},
        )
        check_bounds("length_penalty", self.length_penalty, -100, 100)


@dataclass
class TranslationCollator:
    """Examples -> ``input_ids``, ``attention_mask`` (B, S), ``decoder_input_ids``, ``labels`` (B, T).

    A dummy batch has no labels, so it counts for nothing.

    Args:
        config: of the model, such as a `TfmTransformerConfig`.
        seed: of the masks that a mask-predict model is trained on.
    """

    config: Any
    seed: int = 0

    def __call__(self, examples: list[dict], indices: list[int], epoch: int, is_dummy: bool = False) -> Batch:
        source = pad([example["input_ids"] for example in examples], self.config.pad_token_id)
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        labels = pad([example["labels"] for example in examples], IGNORE_INDEX)
        batch = {"input_ids": source, "attention_mask": (torch.arange(source.shape[1]) < lengths[:, None]).long()}
        if is_mask_predict(self.config):
            noise = [rng(self.seed, epoch, index).random(labels.shape[1] + 1, dtype=np.float32) for index in indices]
            inputs, labels, real = mask_targets(labels, self.config, torch.from_numpy(np.stack(noise)))
            batch |= {"decoder_input_ids": inputs, "decoder_attention_mask": real}
        else:
            batch["decoder_input_ids"] = shift_right(
                labels, self.config.pad_token_id, self.config.decoder_start_token_id
            )
        batch["labels"] = torch.full_like(labels, IGNORE_INDEX) if is_dummy else labels
        return batch


class TranslationTask(Task):
    """Token cross-entropy, and for a mask-predict model the cross-entropy of the target's length."""

    Arguments = TranslationArguments
    EvaluationArguments = TranslationEvaluationArguments
    DistillationArguments = TranslationDistillationArguments
    cache_options = ("max_length", "max_words")
    kind, hub_task = "translation models", "translation"
    item, term = "target tokens", "token"
    auto_class = AutoModelForSeq2SeqLM
    processor_class, processor_folder = AutoTokenizer, "tokenizer"
    described_columns = ("source_column", "target_column")

    def load_splits(self) -> dict[str, Any]:
        """Rows of `text_pairs` by split."""
        args = self.args

        def read(rows: Any) -> Any:
            return text.text_pairs(rows, args.source_column, args.target_column)

        def select(rows: Any, split: str) -> Any:
            if self.evaluating:
                return text.pairs_of_length(rows, args.min_words, args.max_words, split)
            if split == LONG and args.max_words is not None:
                return text.pairs_of_length(rows, args.max_words + 1, None, split)
            short = split in (args.train_split, args.validation_split)
            return text.pairs_of_length(rows, None, args.max_words if short else None, split)

        excluded = not self.evaluating and args.max_words is not None and LONG in args.test_splits
        return load_rows(args, read, select, {LONG: args.train_split} if excluded else None)

    def fingerprint(self, rows: datasets.Dataset) -> str:
        """See `Task`."""
        return text.fingerprint(rows)

    def build_processor(self) -> Tokenizer:
        """The tokenizer given by the arguments, or one trained on the training split."""
        args = self.args
        if pretrained := args.tokenizer or args.model_name_or_path:
            return load_tokenizer(
                pretrained, "tokenizer" if args.tokenizer else "model_name_or_path", None, args.trust_remote_code
            )
        return text.train_tokenizer(text.sentences(self.splits[args.train_split]), args.vocab_size, args.lowercase)

    def build_model(self, vocab_size: int | None = None) -> PreTrainedModel:
        """See `Task`; the model's generation config has the beams of the arguments.

        Args:
            vocab_size: of a new model, at least that of the tokenizer, which is the default.
        """
        args, tokenizer = self.args, self.processor
        set_seed(args.seed)
        if args.model_name_or_path:
            model = load_translator(args.model_name_or_path, tokenizer, args.model)
        else:
            model = build_new(build_config(args, tokenizer, vocab_size), args.head)
        check_positions(model.config, args.max_length)
        if has_learned_positions(model.config):
            tokenizer.model_max_length = model.config.max_position_embeddings  # longer sources are truncated
        model.generation_config = generation_config(model.config, args.num_beams, args.length_penalty, args.max_length)
        return model

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """See `Task`."""
        remote = getattr(config, "auto_map", None) or {}
        # is_encoder_decoder does not decide: it is True in DETR's configuration.
        return type(config) in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING or "AutoModelForSeq2SeqLM" in remote

    def load_pretrained(self) -> None:
        """See `Task`; any sequence-to-sequence model is accepted."""
        self.model, self.processor = load_seq2seq(self.args.model, **self.args.pretrained)
        check_decoding(self.model, self.args)

    def collator(self, split: str = "", training: bool = False) -> TranslationCollator:
        """See `Task`."""
        return TranslationCollator(self.model.config, self.args.seed)

    def dataloader(
        self, split: str, training: bool = False, collate: Collator | None = None
    ) -> StepLoader | StreamLoader:
        """See `Task`."""
        args, rows, collate = self.args, self.splits[split], collate or self.collator(split, training)
        if isinstance(rows, datasets.IterableDataset):
            tokenize = text.PairTokenization(self.processor, args.max_length)
            return stream_loader(args, self.accelerator, collate, rows, tokenize, text.pair_length)
        tokens = text.tokenize_pairs(rows, self.processor, args.max_length)
        return token_loader(args, self.accelerator, collate, tokens, text.pair_lengths, training)

    def count(self, batch: Batch) -> dict[str, int]:
        """Target tokens, and for a mask-predict model sentences."""
        real = batch["labels"] != IGNORE_INDEX
        counts = {"token": int(real.sum())}
        return counts | ({"length": int(real.any(dim=1).sum())} if "decoder_attention_mask" in batch else {})

    def inputs(self, batch: Batch) -> Batch:
        """See `Task`."""
        return {name: batch[name] for name in INPUTS if name in batch}

    @staticmethod
    def target_positions(batch: Batch) -> Tensor:
        """(n,) flat positions of the target tokens among the B T of the decoder."""
        return (batch["labels"] != IGNORE_INDEX).flatten().nonzero()[:, 0]

    def output_losses(self, output: ModelOutput, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Token loss of the logits (n, V) at `target_positions`, with the label smoothing of the configuration."""
        labels = batch["labels"].flatten()[self.target_positions(batch)]
        smoothing = getattr(self.model.config, "label_smoothing", 0.0)
        return {"token": label_smoothed_cross_entropy(logits, labels, smoothing)}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `Task`."""
        if not sums_losses(model):
            output = model(**self.inputs(batch))
            return self.output_losses(output, output.logits.flatten(0, 1)[self.target_positions(batch)], batch)
        output = model(**batch, num_items_in_batch=1, return_logits=False)
        losses = {"token": output.token_loss}
        if "decoder_attention_mask" in batch:
            # A dummy batch still has lengths: without its target mask, attention would have nothing to attend to.
            losses["length"] = output.length_loss * (batch["labels"] != IGNORE_INDEX).any()
        return losses

    @property
    def scored_splits(self) -> list[str]:
        """The test splits: validation data is translated only if they name it."""
        return self.args.test_splits

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """The loss and its terms, and the metric that decides which weights are best."""
        return tuple(dict.fromkeys(["loss", "token", "length", self.args.metric_for_best_model]))

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`; with ``length_bins`` also the ratio of lengths and the number of sentences."""
        return (*self.args.metrics, *(("length_ratio", "sentences") if self.args.length_bins else ()))

    def evaluate(self, model: Any, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean losses, if asked for, and the metrics of translations.

        Args:
            metrics: "loss" and keys of `METRICS`.
        """
        args, rows = self.args, self.splits[split]
        names = [name for name in METRICS if name in (self.reported_metrics if metrics is None else metrics)]
        values = self.mean_losses(model, self.evaluation_loader(split)) if metrics and "loss" in metrics else {}
        if not names:
            return Scores(values)
        if self.evaluating:
            given = {name: getattr(args, name) for name in ("num_beams", "length_penalty", "iterations")}
            options = {name: value for name, value in given.items() if value is not None}
        else:
            options = {"iterations": args.iterations} if is_mask_predict(model.config) else {}
        translations = translate(
            model,
            self.processor,
            rows["source"],
            self.accelerator,
            options,
            args.batch_tokens if self.evaluating else TRANSLATED_TOKENS,
            progress=args.progress and metrics is None,
        )
        scores, parts = score_texts(translations, rows["target"], names), {}
        if args.length_bins and metrics is None:
            scores.values.update(length_scores(translations, rows["target"]))
            for part, indices in bins_of(rows["source"], args.length_bins).items():
                ours, theirs = ([side[i] for i in indices] for side in (translations, rows["target"]))
                parts[part] = score_texts(ours, theirs, names)
                parts[part].values.update(length_scores(ours, theirs))
        predictions = [
            {"source": source, "target": target, "translation": translation}
            for source, target, translation in zip(rows["source"], rows["target"], translations, strict=True)
        ]
        return Scores(
            values | scores.values,
            scores.signatures,
            details={"generation": options},
            listing={"predictions": predictions},
            parts=parts,
        )

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
        student = self.build_model(teacher.vocab_size)
        for side, config in {"teacher": teacher, "student": student.config}.items():
            if is_mask_predict(config):
                raise ValueError(
                    f"the {side} is a mask-predict model, which cannot be distilled token by token: train a student "
                    "on the translations of its teacher"
                )
        return student

    def sample_inputs(self) -> dict[str, Tensor]:
        """See `Task`."""
        tokens = torch.ones(1, min(self.args.max_length, TYPICAL_LENGTH), dtype=torch.long)
        return {"input_ids": tokens, "attention_mask": tokens, "decoder_input_ids": tokens}


def load_seq2seq(
    model: str, revision: str | None = None, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, Tokenizer]:
    """Model and tokenizer from a folder or the Hub, on the best available device."""
    code = trust_remote_code
    tokenizer = load_tokenizer(model, revision=revision, trust_remote_code=code)
    loaded = load_model(AutoModelForSeq2SeqLM, model, revision=revision, trust_remote_code=code)
    check_vocabulary(model, loaded.config, tokenizer)
    if tokenizer.pad_token is None:
        raise ValueError(f'model "{model}": its tokenizer has no pad_token, which shorter texts are padded with')
    return loaded.to(PartialState().device), tokenizer


def check_decoding(model: PreTrainedModel, args: TranslationEvaluationArguments) -> None:
    """Refuse decoding options that the model does not support.

    Raises:
        ValueError: with the option.
    """
    masked = is_mask_predict(model.config)
    if args.iterations is not None and not masked:
        raise ValueError(f'iterations is for mask-predict models, and "{args.model}" is not one')
    if masked and (args.num_beams or args.length_penalty is not None):
        name = "num_beams" if args.num_beams else "length_penalty"
        raise ValueError(
            f'{name} is for autoregressive models, and "{args.model}" is a mask-predict model, got '
            f"{getattr(args, name)}"
        )
    size = getattr(model.config, "vocab_size", None)
    if args.num_beams is not None and size is not None and args.num_beams > size:
        raise ValueError(f"num_beams must be at most the vocabulary size {size}, got {args.num_beams}")


def is_mask_predict(config: PreTrainedConfig) -> bool:
    """True for a model that predicts masked target tokens, all at once: those with ``decoding`` "mask_predict"."""
    return getattr(config, "decoding", "autoregressive") == "mask_predict"


def has_learned_positions(config: PreTrainedConfig) -> bool:
    """True for a model with a table of learned positions."""
    return getattr(config, "position_embedding_type", None) == "learned"


def build_config(
    args: TranslationArguments, tokenizer: Tokenizer | None = None, vocab_size: int | None = None
) -> PreTrainedConfig:
    """The configuration of a new translation model.

    Args:
        tokenizer: gives the vocabulary and its special tokens; None to check the rest before there is one.
        vocab_size: default, the number of tokens of the tokenizer.

    Raises:
        ValueError: a field is unknown or has no such value, or the tokenizer lacks a token.
    """
    kind, fields = args.config_class, args.model
    check_fields(kind, fields, token_fields(kind))
    given = {}
    if tokenizer is not None:
        check_tokenizer(tokenizer)
        names = [f"{name}_token_id" for name in ("pad", "bos", "eos", "mask")]
        ids = {name: getattr(tokenizer, name) for name in names if name in kind.__dataclass_fields__}
        start = tokenizer.pad_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        given = {"vocab_size": vocab_size or len(tokenizer), **ids, "decoder_start_token_id": start}
    try:
        config = kind.of_size(args.size, **{**given, **fields})
    except (StrictDataclassError, ValueError) as error:
        raise ValueError(f"model: {error}") from error
    if tokenizer is not None and config.vocab_size < len(tokenizer):
        raise ValueError(
            f"model.vocab_size must be at least the tokenizer's {len(tokenizer)} tokens, got {config.vocab_size}"
        )
    return config


def token_fields(kind: type[Any]) -> list[str]:
    """Return the names of the fields of a configuration class that are ids of special tokens."""
    return [name for name in kind.__dataclass_fields__ if "token_id" in name]


def check_tokenizer(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that cannot mark padding, or where a sentence ends.

    Raises:
        ValueError: it says what is missing.
    """
    for name in ("pad", "eos"):
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise ValueError(f"{tokenizer_name(tokenizer)} has no {name}_token")
    if tokenizer("a")["input_ids"][-1:] != [tokenizer.eos_token_id]:
        raise ValueError(f"{tokenizer_name(tokenizer)} does not end a text with its eos_token")


def load_translator(name: str, tokenizer: Tokenizer, fields: dict[str, Any] | None = None) -> PreTrainedModel:
    """A translation model to train further, of a folder or a Hub id.

    Args:
        fields: configuration fields to change; weights that exist only because of them are new.

    Raises:
        ValueError: it is of another kind, or the tokenizer does not belong to it.
    """
    config = load_config(name, "model_name_or_path", trust_remote_code=None)
    if config.model_type not in (known := SEQ2SEQ.model_types()):
        raise ValueError(
            f'model_name_or_path "{name}" is a {config.model_type} model, not a {" or ".join(known)}: '
            "convert it first with hf-tfm convert --to tfm"
        )
    check_tokenizer(tokenizer)
    model, _ = load_to_train(SEQ2SEQ, name, lambda model, weight: "", fields)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f'model_name_or_path "{name}" has {model.config.vocab_size} tokens, fewer than the '
            f"{len(tokenizer)} of its tokenizer"
        )
    for token in ("pad", "eos"):
        ours, theirs = getattr(model.config, f"{token}_token_id"), getattr(tokenizer, f"{token}_token_id")
        if theirs not in (ours if isinstance(ours, list) else [ours]):
            raise ValueError(
                f'model_name_or_path "{name}": {token}_token_id is {ours} in the model, {theirs} in the tokenizer'
            )
    return model


def check_positions(config: Any, max_length: int) -> None:
    """Refuse learned positions that end before the longest text.

    Raises:
        ValueError: with both lengths.
    """
    if has_learned_positions(config) and config.max_position_embeddings < max_length:
        raise ValueError(
            "max_length must be at most max_position_embeddings of a model with learned positions, got "
            f"{max_length} and {config.max_position_embeddings}"
        )


@torch.inference_mode()
def translate(
    model: Any,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    accelerator: Accelerator | None = None,
    generation: dict[str, Any] | None = None,
    batch_tokens: int = 4096,
    progress: bool = False,
) -> list[str]:
    """Translate texts, in batches of similar length, each rank its share; every rank gets all translations.

    Args:
        model: any sequence-to-sequence model with ``generate``.
        tokenizer: a source longer than its ``model_max_length`` is cut there.
        accelerator: needed if there are several ranks, otherwise None.
        generation: arguments of ``generate``, such as ``num_beams`` and ``length_penalty``; ``max_length`` is lowered
            to the longest source of a batch plus `EXTRA_LENGTH`.
        batch_tokens: padded source tokens times beams in a batch.
    """
    generation = dict(generation or {})
    max_length = generation.pop("max_length", None) or model.generation_config.max_length or 512
    if not len(texts):
        return []
    # Most tokenizers have no limit, which is a number near 10^30; asked to cut there, they warn.
    limit = {"truncation": True} if tokenizer.model_max_length < 10**9 else {}
    ids = tokenizer(list(texts), **limit)["input_ids"]
    beams = (
        generation.get("length_candidates") or generation.get("num_beams") or model.generation_config.num_beams or 1
    )
    lengths = np.array([len(row) for row in ids])
    sampler = TokenBudgetSampler(lengths, max(batch_tokens // beams, int(lengths.max())), shuffle=False)
    steps = sampler.steps(0)
    rank, world_size = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    done: list[tuple[int, str]] = []
    for step in tqdm(steps, desc="translate", disable=not (progress and rank == 0), leave=False):
        part = part_of_rank(step, rank, world_size)
        if not part:
            continue
        batch = tokenizer.pad({"input_ids": [ids[i] for i in part]}, return_tensors="pt").to(device)
        longest = min(max_length, batch["input_ids"].shape[1] + EXTRA_LENGTH)
        output = model.generate(**batch, max_length=longest, **generation)
        done += zip(part, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True)
    model.train(training)
    if world_size > 1:
        done = gather_object(done)
    return [text.strip() for _, text in sorted(done)]


def generation_config(config, num_beams: int, length_penalty: float, max_length: int) -> GenerationConfig:
    """Default generation settings of a trained model; saved with it."""
    shared = {
        "pad_token_id": config.pad_token_id,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "decoder_start_token_id": config.decoder_start_token_id,
        "max_length": max_length,
    }
    if is_mask_predict(config):
        return GenerationConfig(**shared)
    beams = {"num_beams": num_beams, "length_penalty": length_penalty, "early_stopping": num_beams > 1}
    return GenerationConfig(**shared, **(beams if num_beams > 1 else {}))


METRICS: dict[str, Callable[[], TextMetric]] = {
    "bleu": Bleu,
    "bleu_lowercase": lambda: Bleu(lowercase=True),
    "chrf": Chrf,
    "chrf_lowercase": lambda: Chrf(lowercase=True),
    "exact_match": ExactMatch,
}


def score_texts(translations: Sequence[str], targets: Sequence[str], metrics: Sequence[str]) -> Scores:
    """Return `score` as `Scores`."""
    rows = score(translations, targets, metrics)
    return Scores({row["name"]: row["value"] for row in rows}, {row["name"]: row["signature"] for row in rows})


def length_scores(translations: Sequence[str], targets: Sequence[str]) -> dict[str, float]:
    """Return the number of words of the translations relative to that of the targets, and the number of pairs."""
    words = [sum(map(text.word_count, texts)) for texts in (translations, targets)]
    return {"length_ratio": words[0] / words[1], "sentences": len(targets)}


def bins_of(sources: Sequence[str], edges: Sequence[int]) -> dict[str, list[int]]:
    """Return the indices of the sources in each bin that is not empty, by its name; see ``length_bins``."""
    found: dict[int, list[int]] = {}
    for index, source in enumerate(sources):
        found.setdefault(bisect_right(edges, text.word_count(source)), []).append(index)
    first, last = f"up to {edges[0] - 1} words", f"{edges[-1]} words and more"
    names = [first, *(f"{low} to {high - 1} words" for low, high in pairwise(edges)), last]
    return {names[place]: found[place] for place in sorted(found)}


def score(predictions: Sequence[str], references: Sequence[str], metrics: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of ``name``, ``value`` and ``signature`` for each metric asked for.

    Raises:
        ValueError: a metric is not known, or there is nothing to score.
    """
    rows = []
    for name in metrics:
        result = METRICS[name]().result_of(list(predictions), list(references))
        value = result[name.split("_lowercase")[0]]
        rows.append({"name": name, "value": float(value), "signature": result.get("signature")})
    return rows
