"""Classification of long sequences: bytes of texts or pairs of texts, words, or the pixels of images, as in the Long
Range Arena (Tay et al. 2021, arXiv:2011.04006).

texts or images -> {"input_ids", "label"}, a pair has "pair_ids" too -> padded batch -> logits -> loss, accuracy

Shapes: B sequences or pairs; T tokens; C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import datasets
import torch
from datasets import Image
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..data.batching import pad
from ..data.labelled_texts import PAIR, TEXT, text_lengths
from ..data.long_range import GENERATED, byte_tokenizer, pixel_rows, word_tokenizer
from ..data.progress import show_progress_of
from ..data.source import announce
from ..hub.loading import load_tokenizer
from ..limits import LARGEST_VOCABULARY
from ..models.configuration_long_range import TfmLongRangeConfig
from .base import Batch
from .distillation import DistillationArguments
from .model_fields import new_config
from .text_classification import (
    TextArguments,
    TextClassificationEvaluationArguments,
    TextClassificationTask,
    TextCollator,
)
from .text_model import all_texts, build_classifier

PAIR_IDS = "pair_ids"


@dataclass(kw_only=True)
class LongSequenceArguments(TextArguments):
    """Training of a classifier of long sequences, with or without a teacher.

    The data set has one column of texts, two of them (pairs; ``--size retrieval`` or ``--model.matching true``), or a
    column of images, whose grey values are the tokens. Or it is generated: "listops" and "pathfinder" as in the Long
    Range Arena, "pathfinder-128" for images of 128 x 128 pixels, "listops-small" and "pathfinder-small" for two CPU
    cores, "listops-tiny".

    Args:
        image_column: images, their bytes or paths; default, the only column of images, if there is one.
        max_length: longer texts are truncated to this many tokens; an image has height times width.
    """

    # Options of text classification without a meaning here.
    task: ClassVar[None] = None  # type: ignore[misc]
    tasks: ClassVar[None] = None  # type: ignore[misc]
    language_weight: ClassVar[float] = 0.0

    architecture: str = "long_range"
    size: str = "tiny"
    image_column: str | None = None
    max_length: int = 1024

    def __post_init__(self):
        super().__post_init__()
        if not issubclass(self.config_class, TfmLongRangeConfig):
            raise ValueError(f'architecture must be "long_range", got "{self.architecture}"')
        if not self.model_name_or_path:
            check_length(self.max_length, new_config(self.config_class, self))


@dataclass(kw_only=True)
class LongRangeArenaArguments(LongSequenceArguments):
    """Arguments of training on the Long Range Arena.

    Args:
        vocabulary: tokens of texts of a new model: bytes, or words between spaces (ListOps). Images have one token
            for each of 256 grey values.
        vocab_size: maximum number of words; the most frequent ones of the training data.
    """

    vocabulary: Literal["bytes", "words"] = "bytes"
    vocab_size: int = 30_000

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="vocab_size", at_most={"vocab_size": LARGEST_VOCABULARY})


@dataclass(kw_only=True)
class LongRangeDistillationArguments(DistillationArguments, LongSequenceArguments):
    """Arguments of training with a teacher, whose tokenizer the student shares."""


@dataclass(kw_only=True)
class LongRangeEvaluationArguments(TextClassificationEvaluationArguments):
    """Scoring a classifier of long sequences.

    Args:
        image_column: images, their bytes or paths; default, the only column of images, if there is one.
    """

    task: ClassVar[None] = None  # type: ignore[misc]
    tasks: ClassVar[None] = None  # type: ignore[misc]

    image_column: str | None = None


def check_length(max_length: int, config: Any) -> int:
    """Return the maximum number of tokens of a model, without its class token.

    Raises:
        ValueError: ``max_length`` is larger.
    """
    longest = config.max_position_embeddings - (config.pooling == "cls")
    if max_length > longest:
        raise ValueError(
            f"max_length must be at most {longest}, that of the model without its class token, got {max_length}: see "
            "model.max_position_embeddings"
        )
    return longest


class PairCollator(TextCollator):
    """Examples with ``pair_ids`` too -> ``input_ids`` and ``attention_mask`` (B, 2, T); see `TextCollator`."""

    def __call__(self, examples: list[dict], indices: list[int], epoch: int, is_dummy: bool = False) -> Batch:
        batch = super().__call__(examples, indices, epoch, is_dummy)
        sides = [example[name] for example in examples for name in ("input_ids", PAIR_IDS)]
        ids = pad(sides, self.pad)  # (2 B, T)
        mask = (torch.arange(ids.shape[1]) < torch.tensor([[len(side)] for side in sides])).long()
        return batch | {"input_ids": ids.unflatten(0, (-1, 2)), "attention_mask": mask.unflatten(0, (-1, 2))}


class LongRangeArenaTask(TextClassificationTask):
    """Cross-entropy of the class of a long sequence, or of a pair of them."""

    Arguments = LongRangeArenaArguments
    EvaluationArguments = LongRangeEvaluationArguments
    DistillationArguments = LongRangeDistillationArguments
    kind, sample, item = "classifiers of long sequences", "sequences", "sequences"

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """See `Task`."""
        return config.model_type == TfmLongRangeConfig.model_type and super().accepts(config)

    @classmethod
    def evaluates_several(cls, options: dict[str, Any]) -> bool:
        """See `Task`."""
        return False

    def load_pretrained(self) -> None:
        """See `TextClassificationTask`.

        Raises:
            ValueError: the model takes fewer than ``max_length`` tokens.
        """
        super().load_pretrained()
        check_length(self.args.max_length, self.model.config)

    def load_source(self) -> datasets.DatasetDict:
        """See `TextClassificationTask`; also the generated data sets.

        Raises:
            ValueError: a generated data set is given a configuration, revision or files.
        """
        name, *others = self.args.source
        if name not in GENERATED:
            return super().load_source()
        if any(others):
            raise ValueError(f'dataset_name "{name}" is generated: it takes no name, revision or data_files')
        splits = GENERATED[name]()
        announce(splits, name)
        return splits

    def sample_rows(self, rows: datasets.Dataset, columns: list[str]) -> datasets.Dataset:
        """Rows of `pixel_rows` if there are images, otherwise of `text_rows`.

        Raises:
            ValueError: both text_columns and image_column are given, or an image is larger than max_length.
        """
        args, has_images = self.args, any(isinstance(one, Image) for one in rows.features.values())
        if args.image_column is None and (columns or not has_images):
            return super().sample_rows(rows, columns)
        if columns:
            raise ValueError(f"give text_columns or image_column, got {', '.join(columns)} and {args.image_column}")
        return pixel_rows(rows, args.image_column, args.label_column)

    def tokens(self, split: str) -> datasets.Dataset:
        """See `TextClassificationTask`; each text of a pair has its own tokens, and images are tokens already.

        Raises:
            ValueError: an image has more pixels than max_length, or the model does not classify such data.
        """
        rows, longest = self.splits[split], self.args.max_length
        config: Any = self.model.config
        if config.matching != (PAIR in rows.column_names):
            found = "pairs of texts" if PAIR in rows.column_names else "no pairs"
            expected = "pairs" if config.matching else "no pairs"
            raise ValueError(f'split "{split}" has {found}, but the model classifies {expected}: see model.matching')
        if TEXT not in rows.column_names:
            rows = rows.flatten_indices()
            if (most := int(text_lengths(rows).max())) > longest:
                raise ValueError(f"max_length must be at least {most}, the pixels of the largest image, got {longest}")
            return rows
        if not config.matching:
            return super().tokens(split)
        tokenizer = self.processor

        def tokenize(batch: Mapping[str, list]) -> dict[str, list]:
            options = {"truncation": True, "max_length": longest, "return_attention_mask": False}
            one, other = (tokenizer(batch[side], **options)["input_ids"] for side in (TEXT, PAIR))
            return {"input_ids": one, PAIR_IDS: other}

        show_progress_of(rows)
        return rows.map(tokenize, batched=True, remove_columns=[TEXT, PAIR])

    def build_processor(self) -> Tokenizer:
        """The tokenizer of bytes, or of the words of the training data, or that of ``args.model_name_or_path``.

        Raises:
            ValueError: images have no words.
        """
        args = self.args
        if args.model_name_or_path:
            return load_tokenizer(args.model_name_or_path, "model_name_or_path", None, args.trust_remote_code)
        if args.vocabulary == "bytes":
            return byte_tokenizer()
        rows = self.splits[args.train_split]
        if TEXT not in rows.column_names:
            raise ValueError('vocabulary must be "bytes" for images, whose pixels are the tokens, got "words"')
        return word_tokenizer(all_texts(rows), args.vocab_size)

    def build_model(self) -> PreTrainedModel:
        """See `build_classifier`.

        Raises:
            ValueError: the model has no room for ``max_length`` tokens and its class token.
        """
        model = build_classifier(self.args, self.processor, self.labels)
        self.processor.model_max_length = check_length(self.args.max_length, model.config)
        return model

    def end_training(self) -> None:
        """Nothing: the tokenizer returns what the model reads."""

    def collator(self, split: str = "", training: bool = False) -> TextCollator:
        """See `Task`."""
        config: Any = self.model.config
        kind = PairCollator if config.matching else TextCollator
        return kind(self.processor, self.label_ids(split))

    def sample_inputs(self) -> dict[str, Tensor]:
        """A sequence, or pair, of the median length of the validation data."""
        ids, config = super().sample_inputs()["input_ids"], self.model.config
        return {"input_ids": ids[:, None].expand(-1, 2, -1) if getattr(config, "matching", False) else ids}
