"""What the recipes of language models share: the knobs of texts, masks and tokens, and their loaders."""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from ..arguments import TokenBatchArguments
from ..data import language, text
from ..data.language import Corpus
from ..data.source import describe_source, gather, load_splits, take_split
from ..data.vocabulary import tell_unknown, train_bytes, train_wordpiece
from ..hub.loading import load_tokenizer as read_tokenizer
from ..hub.pretrained import MASKED_WORDS, NEXT_WORDS, Suitable, load_to_train
from ..limits import LARGEST_VOCABULARY, LONGEST
from ..memory import new_model
from ..models.configuration_bert import TfmBertConfig
from ..models.configuration_gpt import TfmGPTConfig
from ..models.modeling_bert import TfmBertForMaskedLM, TfmBertForPreTraining
from ..models.modeling_gpt import TfmGPTForCausalLM
from ..tasks.language import CausalLanguageTask, LanguageTask, MaskedLanguageTask, check_vocabulary
from ..tasks.loaders import check_stream, token_loader
from ..tasks.model_fields import check_fields, new_config
from ..tasks.splits import split_rows

log = logging.getLogger(__name__)

TOKEN_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")  # of a configuration: the tokenizer's


@dataclass(kw_only=True)
class LanguageArguments(TokenBatchArguments):
    """Knobs of language-model pretraining.

    Args:
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, or "number-words".
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        data_files: files by split, where dataset is a format such as "text" or "parquet".
        streaming: read the training split as it comes; needs max_steps.
        text_column: a column or a dotted path; default, "text" or the only column of strings.
        more_texts: other data sets to learn from too, each {dataset, split, text_column, ...}.
        documents: each row is a document of its own; false: rows are pieces of a running text.
        train_split: split to learn from.
        validation_split: split that decides which weights are best.
        holdout: so many rows of the training split, drawn at random, are the validation split where that is null.
        max_train_samples: learn from the first of the training rows only, after they were shuffled by the seed.
        test_splits: splits that are only scored, in the end.
        objective: masked tokens (BERT) or next tokens (GPT).
        sequences: packed blocks of running text, rows (a text each, cut off), or pairs of segments, which adds next
            sentence prediction.
        max_length: tokens of a sequence.
        mlm_probability: share of tokens that are masked.
        whole_words: mask words and not tokens.
        tokenizer: folder or Hub id of a ready tokenizer; default, one is trained on the training texts: WordPiece for
            masked, byte-pair encoding for next tokens.
        tokenizer_rows: rows of the training texts that the tokenizer is trained on; default, all.
        vocab_size: of the tokenizer that is trained.
        lowercase: the tokenizer that is trained lower-cases all text.
        size: of a new model, see TfmBertConfig and TfmGPTConfig.
        model: fields of the configuration that differ from the size's.
        model_name_or_path: folder or Hub id of a model to go on from, with its tokenizer; takes the place of size and
            model.
        license: licence of the model, for its card.
    """

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    data_files: dict[str, str | list[str]] | None = None
    streaming: bool = False
    text_column: str | None = None
    more_texts: list[Corpus] = field(default_factory=list)
    documents: bool = True
    train_split: str = "train"
    validation_split: str | None = "validation"
    holdout: int | None = None
    max_train_samples: int | None = None
    test_splits: list[str] = field(default_factory=list)
    objective: Literal["masked", "causal"] = "masked"
    sequences: Literal["packed", "rows", "pairs"] = "packed"
    max_length: int = 128
    mlm_probability: float = 0.15
    whole_words: bool = False
    tokenizer: str | None = None
    tokenizer_rows: int | None = None
    vocab_size: int = 30_522
    lowercase: bool = True
    size: str = "small"
    model: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    model_name_or_path: str | None = None
    license: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_1="max_length vocab_size tokenizer_rows holdout max_train_samples",
            at_most={"max_length": LONGEST, "vocab_size": LARGEST_VOCABULARY},
        )
        self.check_distinct("test_splits")
        self.check_exactly_one("validation_split", "holdout")
        if self.metric_for_best_model != "loss":
            raise ValueError(f'metric_for_best_model must be "loss", got "{self.metric_for_best_model}"')
        if self.objective == "causal" and (self.sequences == "pairs" or self.whole_words):
            raise ValueError('sequences="pairs" and whole_words are for objective="masked"')
        if not 0.0 < self.mlm_probability < 1.0:
            raise ValueError(f"mlm_probability must be in (0, 1), got {self.mlm_probability}")
        if self.streaming:
            check_stream(self, self.max_length, (self.validation_split, *self.test_splits))
            if self.more_texts or self.holdout or self.max_train_samples:
                raise ValueError("streaming reads one split: give no more_texts, holdout and max_train_samples")
        if self.model_name_or_path and (self.model or self.tokenizer):
            raise ValueError(
                "model_name_or_path brings its own model and tokenizer: give no model or tokenizer beside it"
            )
        check_fields(self.config_class, self.model, TOKEN_FIELDS)
        if not self.model_name_or_path:
            config = new_config(self.config_class, self)
            if self.max_length > config.max_position_embeddings:
                raise ValueError(
                    f"max_length must be at most model.max_position_embeddings = {config.max_position_embeddings}, "
                    f"got {self.max_length}"
                )

    @property
    def fitting(self) -> dict[str, Suitable]:
        """Models that ``model_name_or_path`` and ``teacher`` may name."""
        return MASKED_WORDS if self.objective == "masked" else NEXT_WORDS

    @property
    def held_out(self) -> str:
        """The name of the split that decides which weights are best."""
        return self.validation_split or "holdout"

    @property
    def config_class(self) -> type:
        return TfmBertConfig if self.objective == "masked" else TfmGPTConfig

    @property
    def model_class(self) -> type:
        if self.objective == "causal":
            return TfmGPTForCausalLM
        return TfmBertForPreTraining if self.sequences == "pairs" else TfmBertForMaskedLM


def load_texts(args: LanguageArguments) -> dict:
    """{split: rows with a text} of every split, and {"DATA SET, SPLIT": rows} of more_texts."""
    source = args.dataset_name, args.dataset_config, args.dataset_revision, args.data_files, args.streaming
    splits = load_splits(*source)

    def rows_of(name: str, argument: str):
        rows = language.text_rows(take_split(splits, name, argument), args.text_column)
        return gather(rows) if args.streaming and argument != "train_split" else rows

    texts = split_rows(args, args.test_splits, rows_of)
    for place, more in enumerate(args.more_texts):
        try:
            texts[f"{Path(more.dataset_name).name}, {more.split}"] = more.rows()
        except ValueError as error:
            raise ValueError(f"more_texts[{place}]: {error}") from error
    return texts


def describe_data(args: LanguageArguments, texts: dict) -> dict:
    """What the results file and the card say of the data."""
    return {
        "path": args.dataset_name,
        "name": args.dataset_config,
        **describe_source(args.dataset_name, args.dataset_revision),
        "text_column": args.text_column,
        **text.describe(texts),
    }


def load_tokenizer(args: LanguageArguments, learned) -> PreTrainedTokenizerBase:
    """The tokenizer that is named, or one trained on the texts."""
    if ready := args.tokenizer or args.model_name_or_path:
        return read_tokenizer(
            ready, "tokenizer" if args.tokenizer else "model_name_or_path", None, args.trust_remote_code
        )
    rows = learned if args.tokenizer_rows is None else learned.take(args.tokenizer_rows)
    teach = train_wordpiece if args.objective == "masked" else train_bytes
    return teach(language.Texts(rows), args.vocab_size, args.lowercase)


def head_of(model: PreTrainedModel, name: str) -> str:
    """Head of a weight, for `load_to_train`: an output layer, or the pooler that next sentences are read from."""
    top = name.split(".")[0]
    return "pooler" if ".pooler." in name else "" if top == model.base_model_prefix else top


def build_model(
    args: LanguageArguments, tokenizer: PreTrainedTokenizerBase, vocab_size: int | None = None
) -> PreTrainedModel:
    """The model to train, with weights drawn from the seed or taken from ``model_name_or_path``.

    Args:
        vocab_size: words of a new model, at least the tokenizer's; default, those.

    Raises:
        ValueError: the model does not fit the tokenizer or ``max_length``, or lacks weights; see `load_to_train`.
    """
    set_seed(args.seed)
    if args.model_name_or_path:
        model, fresh = load_to_train(args.model_class, args.model_name_or_path, head_of)
        if fresh:
            log.warning("weights that model_name_or_path does not have start anew: %s", ", ".join(sorted(fresh)))
        check_vocabulary(model.config, tokenizer, args.max_length)
        return model
    tokens = {name: getattr(tokenizer, name) for name in TOKEN_FIELDS[1:]}
    config = new_config(args.config_class, args, vocab_size=vocab_size or len(tokenizer), **tokens)
    check_vocabulary(config, tokenizer, args.max_length)
    return new_model(args.model_class, config)


def join_texts(args: LanguageArguments, texts: dict) -> Any:
    """All that is learned from: the training split and more_texts."""
    parts = [texts[name] for name in learned_from(args, texts)]
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


def learned_from(args: LanguageArguments, texts: dict) -> list[str]:
    """Names of the parts of `join_texts`."""
    scored = scored_splits(args)
    return [name for name in texts if name == args.train_split or name not in scored]


def scored_splits(args: LanguageArguments) -> list[str]:
    """Splits that are scored; the first decides which weights are best."""
    return list(dict.fromkeys([args.held_out, *args.test_splits]))


def new_task(args: LanguageArguments, tokenizer: PreTrainedTokenizerBase) -> LanguageTask:
    """What a step computes."""
    if args.objective == "causal":
        return CausalLanguageTask(tokenizer)
    return MaskedLanguageTask(tokenizer, args.mlm_probability, args.whole_words, args.seed)


def language_loader(
    args: LanguageArguments, accelerator: Accelerator, collate: Any, tokenizer: Any, rows: Any, learning: bool
) -> Any:
    """Batches of texts, for training or evaluation; its ``examples`` are sequences of tokens."""
    found = language.token_sequences(rows, tokenizer, args.max_length, args.sequences, args.documents, args.seed)
    if not learning:
        tell_unknown(found, tokenizer)
    lengths = language.sequence_lengths, language.sequence_length
    return token_loader(args, accelerator, collate, found, *lengths, learning)
