"""Reward models: a scalar score of a prompt with its completion (Ouyang et al. 2022, arXiv:2203.02155, section 3.4).

prompt, ranked completions -> one row for each completion -> scores -> loss of all pairs of a prompt -> accuracy

Shapes: B completions; P pairs; T tokens.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar

import datasets
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel

from ..data.batching import StepLoader, pad_tokens
from ..data.instructions import demonstration_rows, tokenize_demonstrations
from ..data.labelled_texts import LengthBatchSampler
from ..data.language import sequence_lengths
from ..data.source import load_splits, take_split
from ..families import TEXT_CLASSIFIER
from ..hub.pretrained import Suitable
from ..hub.usage import REWARD
from ..values import conform_fields
from .base import Batch, Scores
from .completions import (
    PromptEvaluationArguments,
    PromptTrainingArguments,
    RankingArguments,
    RankingTask,
    check_length,
    complete_tokenizer,
    disable_dropout,
    load_prompt_model,
)
from .model_fields import label_fields
from .text_classification import TextClassificationTask
from .text_model import class_fields, head_of, load_text_classifier

log = logging.getLogger(__name__)

MODELS = {"model_name_or_path": Suitable("a reward model", TEXT_CLASSIFIER, True, ("gpt2", "llama"))}
METRICS = ("loss", "accuracy", "margin", "mean_reward")
SHIFT_TOLERANCE = 1e-3  # of the mean reward after the shift


@dataclass(kw_only=True)
class Demonstrations:
    """Demonstrations whose mean reward becomes 0.

    Args:
        dataset_name: any data set that `datasets.load_dataset` accepts.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        split: split of the data set.
        prompt_column, completion_column: see `FineTuningArguments`.
    """

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    split: str = "train"
    prompt_column: str | None = None
    completion_column: str | None = None

    def __post_init__(self):
        conform_fields(self)

    def rows(self) -> datasets.Dataset:
        """Load them, as `demonstration_rows` returns them."""
        splits = load_splits(self.dataset_name, self.dataset_config, self.dataset_revision)
        rows = take_split(splits, self.split, f"split of {self.dataset_name}")
        return demonstration_rows(rows, self.prompt_column, self.completion_column)


@dataclass(kw_only=True)
class RewardArguments(RankingArguments, PromptTrainingArguments):
    """Arguments of training a reward model.

    Args:
        model_name_or_path: folder or Hub id of the model to start from, usually a fine-tuned causal language model,
            of this package or of transformers, with its tokenizer; it gets a head with one output.
        model: configuration fields that differ from those of model_name_or_path.
        center_rewards_coefficient: weight of the squared sum of the rewards of a pair, which keeps rewards near 0
            (Eisenstein et al. 2023, arXiv:2312.09244); 0 disables it.
        demonstrations: after training, rewards are shifted so that their mean over these demonstrations is 0
            (Ouyang et al. 2022): {dataset_name, split, ...}.
        disable_dropout: train without dropout.
    """

    accepted_models: ClassVar = MODELS

    model_name_or_path: str
    model: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    center_rewards_coefficient: float = 0.0
    demonstrations: Demonstrations | None = None
    disable_dropout: bool = True
    learning_rate: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_0="center_rewards_coefficient", at_most={"center_rewards_coefficient": 1000})
        if self.metric_for_best_model not in ("loss", "accuracy"):
            raise ValueError(f'metric_for_best_model must be loss or accuracy, got "{self.metric_for_best_model}"')


@dataclass(kw_only=True)
class RewardEvaluationArguments(RankingArguments, PromptEvaluationArguments):
    """Scoring a reward model."""


class RewardTask(RankingTask):
    """Cross-entropy of the better completion of each pair; a prompt has the mean over all its pairs."""

    Arguments = RewardArguments
    EvaluationArguments = RewardEvaluationArguments
    refines = TextClassificationTask
    kind, hub_task = "reward models", "text-classification"
    item, term = "prompts", "prompt"
    auto_class = AutoModelForSequenceClassification
    reported_metrics = METRICS
    validation_metrics = METRICS

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """True for a sequence classifier with one label."""
        return TextClassificationTask.accepts(config) and config.num_labels == 1

    def load_splits(self) -> dict[str, Any]:
        """See `Task`; also loads the demonstrations, so that errors in them are raised before training."""
        self.demonstrations = None
        if not self.evaluating and self.args.demonstrations is not None:
            try:
                self.demonstrations = self.args.demonstrations.rows()
            except ValueError as error:
                raise ValueError(f"demonstrations: {error}") from error
        return super().load_splits()

    def build_model(self) -> PreTrainedModel:
        """See `Task`."""
        model = load_prompt_model(
            AutoModelForSequenceClassification,
            MODELS["model_name_or_path"],
            self.args,
            self.processor,
            head_of,
            resized="",
            **class_fields(None),
            **label_fields([REWARD]),
        )
        if self.args.disable_dropout:
            disable_dropout(model)
        if self.demonstrations is not None:
            bias_of_score(model)
        return model

    def load_pretrained(self) -> None:
        """See `Task`."""
        args = self.args
        self.model, tokenizer = load_text_classifier(args.model, **args.pretrained)
        self.processor = complete_tokenizer(tokenizer, self.chats)
        limit = getattr(self.model.config, "max_position_embeddings", None) or self.processor.model_max_length
        args.max_length = args.max_length or min(limit, self.processor.model_max_length)
        check_length(self.model, args.max_length)

    def rewards(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the reward of each completion, (B,) float32."""
        return model(**self.inputs(batch)).logits[:, 0].float()

    def pair_rewards(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return the rewards of all completions (B,), and of the better and the worse ones of pairs (P,)."""
        rewards = self.rewards(model, batch)
        return rewards, rewards[batch["pairs"][:, 0]], rewards[batch["pairs"][:, 1]]

    def count(self, batch: Batch) -> dict[str, int]:
        """Prompts."""
        return {"prompt": batch["prompts"]}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `Task`; of each prompt the mean over its pairs (Ouyang et al. 2022, equation 1)."""
        _, better, worse = self.pair_rewards(model, batch)
        return {"prompt": self.pair_losses(better, worse, batch["pair_weights"])}

    def pair_losses(self, better: Tensor, worse: Tensor, weights: Tensor) -> Tensor:
        """Return the weighted sum of the losses of pairs (P,)."""
        losses = -logsigmoid(better - worse)
        if coefficient := getattr(self.args, "center_rewards_coefficient", 0.0):
            losses = losses + coefficient * (better + worse).square()
        return (losses * weights).sum()

    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean loss of a prompt; fraction of all pairs whose better completion has the higher reward, and mean
        difference of their rewards; mean reward of a completion."""

        def compute(model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, int]]:
            rewards, better, worse = self.pair_rewards(model, batch)
            rewards = rewards if batch["prompts"] else rewards[:0]
            return {
                "loss": (self.pair_losses(better, worse, batch["pair_weights"]), batch["prompts"]),
                "accuracy": ((better > worse).sum(), len(better)),
                "margin": ((better - worse).sum(), len(better)),
                "mean_reward": (rewards.sum(), len(rewards)),
            }

        return Scores(self.means(model, split, compute), samples=len(self.evaluation_loader(split).examples))

    # After training: the mean reward of demonstrations becomes 0

    def end_training(self) -> None:
        """Shift all rewards so that those of the demonstrations have mean 0."""
        if self.demonstrations is None:
            return
        args = self.args
        rows = tokenize_demonstrations(self.demonstrations, self.processor, args.prompt_format, args.max_length)
        loader = StepLoader(
            rows, LengthBatchSampler(sequence_lengths(rows), args.batch_size, shuffle=False), self.pad_demonstrations
        )
        before = self.mean_reward(loader)
        shift_rewards(self.model, -before)
        after = self.mean_reward(loader)
        log.info("mean reward of %d demonstrations: %.4f, shifted to %.4f", len(rows), before, after)
        if abs(after) > SHIFT_TOLERANCE * max(1.0, abs(before)):
            raise ValueError(
                f"the rewards of a {self.model.config.model_type} model cannot be shifted by a bias: the mean reward "
                f"of the demonstrations is {after:.4f} after the shift; set demonstrations to null"
            )

    def pad_demonstrations(self, examples: list[dict], *_: Any) -> Batch:
        """Collate demonstrations."""
        return pad_tokens(examples, self.processor.pad_token_id)

    @torch.no_grad()
    def mean_reward(self, loader: StepLoader) -> float:
        """Return the mean reward of demonstrations, on every rank."""
        training = self.model.training
        self.model.eval()
        found = [
            self.rewards(self.model, send_to_device(batch, self.accelerator.device)).cpu()
            for batches in loader.epoch(0)
            for batch in batches
        ]
        self.model.train(training)
        return torch.cat(found).double().mean().item()


def bias_of_score(model: PreTrainedModel) -> tuple[Tensor, Tensor | None]:
    """Return a bias by which all rewards of a model can be shifted.

    It is that of the linear layer ``score``, or of the layer norm whose output this layer reads: the last one.

    Returns:
        The bias, and the weights (D,) of the rewards in it; None for 1.

    Raises:
        ValueError: there is neither.
    """
    score = getattr(model, "score", None)
    if isinstance(score, nn.Linear) and score.out_features == 1:
        if score.bias is not None:
            return score.bias, None
        norms = [one for one in model.modules() if isinstance(one, nn.LayerNorm) and one.bias is not None]
        if norms and norms[-1].normalized_shape == (score.in_features,):
            return norms[-1].bias, score.weight[0]
    raise ValueError(
        f"demonstrations need a bias by which rewards can be shifted, but {type(model).__name__} has none: neither a "
        "linear layer score with a bias nor a layer norm with a bias below it"
    )


@torch.no_grad()
def shift_rewards(model: PreTrainedModel, shift: float) -> None:
    """Add a constant to all rewards of a model; see `bias_of_score`."""
    bias, weights = bias_of_score(model)
    if weights is None:
        bias += shift
    else:
        bias += shift * weights / weights.square().sum()
