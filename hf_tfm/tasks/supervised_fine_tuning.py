"""Supervised fine-tuning of a causal language model on demonstrations (Ouyang et al. 2022, arXiv:2203.02155, step 1).

prompts and completions -> {"input_ids", "completion_mask"} -> padded batch -> losses of completions -> perplexity

Shapes: B demonstrations; T tokens; V vocabulary size; n tokens with a target.
"""

import math
from collections.abc import Collection
from dataclasses import InitVar, dataclass
from typing import ClassVar

import datasets
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.utils import ModelOutput

from ..arguments import ModelArguments
from ..data.batching import pad, pad_tokens
from ..data.instructions import all_texts, demonstration_rows, is_demonstration, tokenize_demonstrations
from ..data.language import sequence_lengths
from ..data.vocabulary import require_tokens, train_bytes
from ..families import CAUSAL_LM
from ..hub.loading import load_model, load_tokenizer
from ..hub.pretrained import Suitable
from ..limits import LARGEST_VOCABULARY
from ..models.cross_entropy import IGNORE_INDEX
from .base import Batch, Scores
from .completions import (
    TOKEN_FIELDS,
    PromptEvaluationArguments,
    PromptTask,
    PromptTrainingArguments,
    check_length,
    complete_tokenizer,
    load_prompt_model,
    next_token_targets,
)
from .language_modeling import LanguageModelingTask, check_fit, is_causal, longest_input
from .model_fields import build_new, check_fields, head_of, new_config, sums_losses

MODELS = {"model_name_or_path": Suitable("supervised fine-tuning", CAUSAL_LM, True, ("gpt2", "llama"))}


@dataclass(kw_only=True)
class FineTuningArguments(PromptTrainingArguments, ModelArguments):
    """Arguments of supervised fine-tuning.

    Args:
        model_name_or_path: folder or Hub id of a causal language model, of this package or of transformers, with its
            tokenizer; default, a new model with random weights.
        model: configuration fields that differ from those of the size, or of model_name_or_path; for instance
            {hidden_dropout_prob: 0.2}.
        completion_column: column of completions; default, "completion", "output" or "response". A column "messages"
            holds both: each message of the assistant is a completion.
        prompt_loss_weight: weight of the tokens of prompts in the loss; 0 trains on completions only.
        tokenizer: folder or Hub id of the tokenizer of a new model; default, a byte-pair encoding is trained on the
            training data.
        vocab_size: vocabulary size of the trained tokenizer.
        lowercase: the trained tokenizer lower-cases all text.
    """

    accepted_models: ClassVar = MODELS

    completion_column: str | None = None
    prompt_loss_weight: float = 0.0
    tokenizer: str | None = None
    vocab_size: int = 8192
    lowercase: bool = False
    architecture: str = "gpt"
    size: str = "small"
    learning_rate: float = 2e-5

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="vocab_size", at_most={"vocab_size": LARGEST_VOCABULARY})
        if not 0.0 <= self.prompt_loss_weight <= 1.0:
            raise ValueError(f"prompt_loss_weight must be in [0, 1], got {self.prompt_loss_weight}")
        if self.metric_for_best_model not in METRICS:
            raise ValueError(
                f'metric_for_best_model must be one of {", ".join(METRICS)}, got "{self.metric_for_best_model}"'
            )
        if self.model_name_or_path and self.tokenizer:
            raise ValueError("model_name_or_path has its own tokenizer: do not give tokenizer with it")
        if not self.model_name_or_path:
            check_fields(self.config_class, self.model, TOKEN_FIELDS)
            longest = longest_input(new_config(self.config_class, self), self.max_length)
            if self.max_length > longest:
                raise ValueError(
                    f"max_length must be at most max_position_embeddings = {longest}, got {self.max_length}"
                )


@dataclass(kw_only=True)
class FineTuningEvaluationArguments(PromptEvaluationArguments):
    """Scoring the completions of demonstrations.

    Args:
        completion_column: column of completions; default, "completion", "output" or "response", or "messages".
    """

    completion_column: str | None = None


METRICS = ("loss", "token_accuracy")


@dataclass
class DemonstrationCollator:
    """Examples of `tokenize_demonstrations` -> ``input_ids``, ``labels`` (B, T), and ``attention_mask`` if padded.

    Labels are the ids of completions, with ``prompt_loss_weight`` of prompts too, `IGNORE_INDEX` elsewhere and in a
    dummy batch. With a weight between 0 and 1 the batch has ``weights`` (B, T) of the labels.

    Raises:
        ValueError: the tokenizer has no padding token.
    """

    tokenizer: InitVar[Tokenizer]
    prompt_loss_weight: float = 0.0

    def __post_init__(self, tokenizer: Tokenizer):
        require_tokens(tokenizer, "pad_token")
        self.pad = tokenizer.pad_token_id

    def __call__(self, examples: list[dict], indices: list[int], epoch: int, is_dummy: bool = False) -> Batch:
        batch: Batch = pad_tokens(examples, self.pad)
        masks = pad([example["completion_mask"] for example in examples], -1)  # -1 is padding
        if is_dummy:
            masks = torch.full_like(masks, -1)
        trained = masks == 1 if self.prompt_loss_weight == 0 else masks >= 0
        batch["labels"] = batch["input_ids"].where(trained, IGNORE_INDEX)
        if 0.0 < self.prompt_loss_weight < 1.0:
            batch["weights"] = torch.where(masks == 1, 1.0, self.prompt_loss_weight) * trained
        return batch


class FineTuningTask(PromptTask):
    """Cross-entropy of the tokens of completions."""

    Arguments = FineTuningArguments
    EvaluationArguments = FineTuningEvaluationArguments
    refines = LanguageModelingTask
    kind, hub_task = "models that follow instructions", "text-generation"
    item, term = "tokens", "token"
    auto_class = AutoModelForCausalLM
    described_columns = ("prompt_column", "completion_column")
    reported_metrics = ("perplexity", "token_loss", "token_accuracy")
    validation_metrics = METRICS
    cache_options = ("max_length", "prompt_format", "prompt_column", "completion_column")

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """True for a causal language model."""
        return LanguageModelingTask.accepts(config) and is_causal(config)

    @classmethod
    def reads(cls, columns: Collection[str]) -> bool:
        """See `Task`."""
        return is_demonstration(columns)

    # Data, processor and model

    def read(self, rows: datasets.Dataset) -> datasets.Dataset:
        """See `PromptTask`."""
        return demonstration_rows(rows, self.args.prompt_column, self.args.completion_column)

    def tokenize(self, rows: datasets.Dataset) -> datasets.Dataset:
        """See `PromptTask`."""
        return tokenize_demonstrations(rows, self.processor, self.args.prompt_format, self.args.max_length)

    def lengths(self, rows: datasets.Dataset) -> np.ndarray:
        """See `PromptTask`."""
        return sequence_lengths(rows)

    def build_processor(self) -> Tokenizer:
        """The tokenizer that the arguments name, or one trained on the training data."""
        args = self.args
        if args.model_name_or_path:
            return super().build_processor()
        if args.tokenizer:
            tokenizer = load_tokenizer(args.tokenizer, "tokenizer", None, args.trust_remote_code)
        else:
            tokenizer = train_bytes(all_texts(self.splits[args.train_split]), args.vocab_size, args.lowercase)
        return complete_tokenizer(tokenizer, self.chats)

    def build_model(self) -> PreTrainedModel:
        """See `Task`."""
        args, tokenizer = self.args, self.processor
        if args.model_name_or_path:
            model = load_prompt_model(AutoModelForCausalLM, MODELS["model_name_or_path"], args, tokenizer, head_of)
        else:
            set_seed(args.seed)
            ids = {name: getattr(tokenizer, name) for name in TOKEN_FIELDS[1:]}
            config = new_config(args.config_class, args, vocab_size=len(tokenizer), **ids)
            check_fit(config, tokenizer, args.max_length)
            model = build_new(config, args.head)
        tokenizer.model_max_length = longest_input(model.config, tokenizer.model_max_length)
        return model

    def load_pretrained(self) -> None:
        """See `Task`; any causal language model will do."""
        args = self.args
        self.processor = complete_tokenizer(load_tokenizer(args.model, **args.pretrained), self.chats)
        self.model = load_model(self.auto_class, args.model, **args.pretrained)
        args.max_length = args.max_length or longest_input(self.model.config, self.processor.model_max_length)
        check_length(self.model, args.max_length)

    def collator(self, split: str = "", training: bool = False) -> DemonstrationCollator:
        """See `Task`; scores are of completions alone."""
        return DemonstrationCollator(self.processor, self.args.prompt_loss_weight if training else 0.0)

    # One step

    def count(self, batch: Batch) -> dict[str, float]:
        """The weight of the tokens with a target."""
        if "weights" in batch:
            return {"token": float(batch["weights"][:, 1:].sum())}
        return {"token": int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())}

    @staticmethod
    def target_positions(batch: Batch) -> Tensor:
        """See `Task`."""
        return (next_token_targets(batch["labels"]) != IGNORE_INDEX).flatten().nonzero()[:, 0]

    def output_losses(self, output: ModelOutput, logits: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Token loss of the logits (n, V) at `target_positions`."""
        targets = self.target_positions(batch) + 1
        labels = batch["labels"].flatten()[targets]
        if "weights" not in batch:
            return {"token": cross_entropy(logits.float(), labels, reduction="sum")}
        losses = cross_entropy(logits.float(), labels, reduction="none")
        return {"token": (losses * batch["weights"].flatten()[targets]).sum()}

    def target_logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits (n, V) at `target_positions`."""
        logits = model(**self.inputs(batch), use_cache=False).logits
        return logits.flatten(0, 1)[self.target_positions(batch)]

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `Task`; a model that sums losses itself keeps no logits."""
        if "weights" in batch or not sums_losses(model):
            return self.output_losses(ModelOutput(), self.target_logits(model, batch), batch)
        output = model(
            **self.inputs(batch), labels=batch["labels"], num_items_in_batch=1, return_logits=False, use_cache=False
        )
        return {"token": output.loss}

    # Scores

    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean loss of a token of the completions, its exponential, and the fraction of tokens predicted right."""

        def compute(model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, int]]:
            logits = self.target_logits(model, batch).float()
            labels = batch["labels"].flatten()[self.target_positions(batch) + 1]
            right = (logits.argmax(-1) == labels).sum()
            return {
                "loss": (cross_entropy(logits, labels, reduction="sum"), len(labels)),
                "token_accuracy": (right, len(labels)),
            }

        values = self.means(model, split, compute)
        values |= {"token_loss": values["loss"], "perplexity": math.exp(values["loss"])}
        return Scores(values, samples=len(self.evaluation_loader(split).examples))

    # Distillation

    def sample_inputs(self) -> dict[str, Tensor]:
        """See `Task`."""
        lengths = np.sort(self.lengths(self.evaluation_loader(self.validation_split).examples))
        return {"input_ids": torch.ones(1, int(lengths[len(lengths) // 2]), dtype=torch.long)}
