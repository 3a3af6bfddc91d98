"""Preference optimization of a causal language model without a reward model: DPO (Rafailov et al. 2023,
arXiv:2305.18290) and its variants.

prompt, chosen, rejected -> log-probabilities of both, of policy and reference -> implicit rewards -> loss of a pair

Shapes: B completions, those of a pair one after the other; P pairs; T tokens.
"""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import datasets
import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..arguments import Arguments
from ..data.instructions import split_pairs
from ..families import CAUSAL_LM
from ..hub.loading import load_model, load_tokenizer, require_model
from ..hub.pretrained import Suitable
from .base import Batch, Loader, Scores
from .completions import (
    PromptEvaluationArguments,
    PromptTrainingArguments,
    RankingArguments,
    RankingTask,
    check_length,
    complete_tokenizer,
    completion_log_probs,
    disable_dropout,
    load_prompt_model,
)
from .language_modeling import LanguageModelingTask, is_causal, longest_input
from .model_fields import head_of

log = logging.getLogger(__name__)

MODELS = {"model_name_or_path": Suitable("preference optimization", CAUSAL_LM, True, ("gpt2", "llama"))}
METRICS = ("accuracy", "margin", "chosen_reward", "rejected_reward")
LossType = Literal["sigmoid", "ipo", "hinge", "robust"]
SAME = 1e-3  # largest log ratio of a policy to itself; differences are rounding


@dataclass(kw_only=True)
class PreferenceLossArguments(Arguments):
    """The loss of a pair.

    Args:
        loss_type: sigmoid (DPO), ipo (Azar et al. 2023, arXiv:2310.12036, of mean log-probabilities of tokens, as in
            trl), hinge (Zhao et al. 2023, arXiv:2305.10425) or robust (Chowdhury et al. 2024, arXiv:2403.00409).
        beta: weight of the divergence from the reference; for ipo, its tau.
        label_smoothing: assumed fraction of wrong labels, for sigmoid (conservative DPO, Mitchell 2023) and robust; in
            [0, 0.5).
        reference_model: folder or Hub id of the reference, with the same tokenizer.
    """

    loss_type: LossType = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    reference_model: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(above_0="beta", at_most={"beta": 1000})
        if not 0.0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")
        if self.label_smoothing and self.loss_type not in ("sigmoid", "robust"):
            raise ValueError(f'label_smoothing is for loss_type "sigmoid" and "robust", got "{self.loss_type}"')


@dataclass(kw_only=True)
class PreferenceArguments(PreferenceLossArguments, RankingArguments, PromptTrainingArguments):
    """Arguments of preference optimization.

    Args:
        model_name_or_path: folder or Hub id of the policy to start from, usually a fine-tuned one, with its tokenizer:
            a causal language model of this package or of transformers.
        model: configuration fields that differ from those of model_name_or_path.
        reference_model: folder or Hub id of the reference, with the same tokenizer; default, the initial policy. Its
            log-probabilities are computed once.
        disable_dropout: train without dropout, so that policy and reference differ by their weights alone.
    """

    accepted_models: ClassVar = MODELS

    model_name_or_path: str
    model: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    disable_dropout: bool = True
    learning_rate: float = 1e-6

    def __post_init__(self):
        super().__post_init__()
        if self.metric_for_best_model not in ("loss", *METRICS):
            raise ValueError(
                f'metric_for_best_model must be one of loss, {", ".join(METRICS)}, got "{self.metric_for_best_model}"'
            )


@dataclass(kw_only=True)
class PreferenceEvaluationArguments(PreferenceLossArguments, RankingArguments, PromptEvaluationArguments):
    """Scoring a causal language model on preferences.

    Args:
        reference_model: folder or Hub id of the reference, with the same tokenizer; without it, only
            log-probabilities are reported.
    """


class PreferenceTask(RankingTask):
    """Loss of pairs of completions by the log ratio of policy and reference.

    Attributes:
        reference: {split: (N, 2) float32 log-probabilities of the chosen and the rejected completion}.
    """

    Arguments = PreferenceArguments
    EvaluationArguments = PreferenceEvaluationArguments
    refines = LanguageModelingTask
    kind, hub_task = "models trained on preferences", "text-generation"
    item, term, sample = "pairs", "pair", "pairs"
    auto_class = AutoModelForCausalLM
    validation_metrics = ("loss", *METRICS)

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """True for a causal language model."""
        return LanguageModelingTask.accepts(config) and is_causal(config)

    def __init__(self, args: Any, accelerator: Any):
        super().__init__(args, accelerator)
        self.reference: dict[str, Tensor] = {}
        self.reference_policy: PreTrainedModel | None = None
        self.training_loader: Any = None

    def load_splits(self) -> dict[str, Any]:
        """See `Task`; also checks that the reference exists, before any data is read."""
        if self.args.reference_model is not None:
            require_model("reference_model", self.args.reference_model)
        return super().load_splits()

    def tokenize(self, rows: datasets.Dataset) -> datasets.Dataset:
        """See `PromptTask`; all pairs of rankings."""
        return split_pairs(super().tokenize(rows))

    def build_model(self) -> PreTrainedModel:
        """See `Task`."""
        args = self.args
        model = load_prompt_model(AutoModelForCausalLM, MODELS["model_name_or_path"], args, self.processor, head_of)
        if args.disable_dropout:
            disable_dropout(model)
        return model

    def load_reference(self) -> PreTrainedModel:
        """Load ``reference_model``.

        Raises:
            ValueError: its vocabulary is smaller than the tokenizer's, or it reads too few tokens.
        """
        args = self.args
        reference = load_model(
            AutoModelForCausalLM, args.reference_model, "reference_model", trust_remote_code=args.trust_remote_code
        )
        check_length(reference, args.max_length)
        if reference.get_input_embeddings().num_embeddings < len(self.processor):
            raise ValueError(
                f'reference_model "{args.reference_model}" has fewer tokens than the tokenizer of the policy'
            )
        return reference.to(self.accelerator.device)

    def load_pretrained(self) -> None:
        """See `Task`; also computes the log-probabilities of the reference."""
        args = self.args
        self.processor = complete_tokenizer(load_tokenizer(args.model, **args.pretrained), self.chats)
        self.model = load_model(self.auto_class, args.model, **args.pretrained)
        args.max_length = args.max_length or longest_input(self.model.config, self.processor.model_max_length)
        check_length(self.model, args.max_length)
        if args.reference_model is not None:
            self.reference = {args.split: self.log_probs_of(self.load_reference(), self.evaluation_loader(args.split))}

    def begin_training(self, loader: Loader) -> None:
        """See `Task`; also loads a reference other than the initial policy."""
        super().begin_training(loader)
        self.training_loader = loader
        if self.args.reference_model is not None:
            self.reference_policy = self.load_reference()

    def state(self) -> dict[str, Tensor]:
        """The log-probabilities of the reference, which a resumed run does not compute again."""
        return self.reference

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Task`."""
        splits = [self.args.train_split, *self.scored_splits]
        if any(split not in state for split in splits):
            raise ValueError(f"log-probabilities of the reference are missing for {', '.join(splits)}")
        self.reference = state

    def prepare_reference(self, policy: nn.Module) -> None:
        """Compute the log-probabilities of the reference for all pairs, unless a checkpoint had them.

        Those for training are computed in the batches of the first epoch: the initial policy then equals its reference
        exactly, whatever the padding.

        Args:
            policy: before its first step.
        """
        if self.reference or self.evaluating:
            return
        model = self.reference_policy or policy
        loaders = {self.args.train_split: self.training_loader}
        loaders |= {split: self.evaluation_loader(split) for split in self.scored_splits if split not in loaders}
        found = {split: self.log_probs_of(model, loader) for split, loader in loaders.items()}
        self.reference, initial, self.reference_policy = found, self.reference_policy is None, None
        if initial and self.args.disable_dropout:
            self.check_equal(policy, self.training_loader)

    @torch.no_grad()
    def check_equal(self, policy: nn.Module, loader: Loader) -> None:
        """Check on the first batch that a policy in training equals its reference before it is trained.

        Raises:
            ValueError: its outputs differ from one forward pass to the next.
        """
        for batch in next(iter(loader.epoch(0)), []):
            with self.accelerator.autocast():
                _, ratios = self.log_ratios(
                    policy, send_to_device(batch, self.accelerator.device), self.args.train_split
                )
            if ratios.numel() and (largest := ratios.abs().max().item()) > SAME:
                raise ValueError(
                    "the policy must equal its reference before training, but log-probabilities differ by "
                    f"{largest:.2g}: a {type(policy).__name__} draws random numbers despite disable_dropout"
                )

    @torch.no_grad()
    def log_probs_of(self, model: nn.Module, loader: Any) -> Tensor:
        """Return log-probabilities of completions, (N, 2) float32, on every rank."""
        found = torch.zeros(len(loader.examples), 2, device=self.accelerator.device)
        training = model.training
        model.eval()
        for micro_batches in loader.epoch(0):
            for batch in micro_batches:
                batch = send_to_device(batch, self.accelerator.device)
                with self.accelerator.autocast():
                    sums = completion_log_probs(model, batch).sum(1)
                if batch["prompts"]:
                    found[batch["indices"]] = sums[batch["pairs"]]
        model.train(training)
        return self.accelerator.reduce(found).cpu()

    def log_ratios(self, model: nn.Module, batch: Batch, split: str) -> tuple[Tensor, Tensor]:
        """Return log-probabilities of chosen and rejected completions (P, 2), and their differences from those of the
        reference."""
        log_probs = completion_log_probs(model, batch).sum(1)[batch["pairs"]]
        if not self.reference:
            return log_probs, log_probs
        return log_probs, log_probs - self.reference[split][batch["indices"].cpu()].to(log_probs.device)

    def pair_losses(self, log_ratios: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each pair (P,).

        Args:
            log_ratios: (P, 2) of the chosen and the rejected completion.
        """
        args = self.args
        if args.loss_type == "ipo":
            log_ratios = log_ratios / batch["mask"].sum(1)[batch["pairs"]].clamp_min(1)
        difference = log_ratios[:, 0] - log_ratios[:, 1]
        if args.loss_type == "ipo":
            return (difference - 1 / (2 * args.beta)).square()
        scaled, smoothing = args.beta * difference, args.label_smoothing
        if args.loss_type == "hinge":
            return torch.relu(1 - scaled)
        if args.loss_type == "robust":
            mixed = -(1 - smoothing) * logsigmoid(scaled) + smoothing * logsigmoid(-scaled)
            return mixed / (1 - 2 * smoothing)
        return -(1 - smoothing) * logsigmoid(scaled) - smoothing * logsigmoid(-scaled)

    def count(self, batch: Batch) -> dict[str, int]:
        """Pairs."""
        return {"pair": len(batch["pairs"])}

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """See `Task`."""
        self.prepare_reference(model)
        _, log_ratios = self.log_ratios(model, batch, self.args.train_split)
        return {"pair": self.pair_losses(log_ratios, batch).sum()}

    # Scores

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`; without a reference, of log-probabilities alone."""
        names = ("log_prob_accuracy", "chosen_log_prob", "rejected_log_prob")
        if self.evaluating and self.args.reference_model is None:
            return names
        return ("loss", *METRICS, *names)

    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean loss of a pair; fraction of pairs whose chosen completion has the higher reward, beta times the log
        ratio of policy and reference, and mean difference and values of these rewards; and the same fraction and
        values of log-probabilities."""

        def compute(model: nn.Module, batch: Batch) -> dict[str, tuple[Tensor, int]]:
            log_probs, log_ratios = self.log_ratios(model, batch, split)
            (chosen, rejected), pairs = (self.args.beta * log_ratios).unbind(1), len(log_probs)
            sums = {
                "loss": self.pair_losses(log_ratios, batch).sum(),
                "accuracy": (chosen > rejected).sum(),
                "margin": (chosen - rejected).sum(),
                "chosen_reward": chosen.sum(),
                "rejected_reward": rejected.sum(),
                "log_prob_accuracy": (log_probs[:, 0] > log_probs[:, 1]).sum(),
                "chosen_log_prob": log_probs[:, 0].sum(),
                "rejected_log_prob": log_probs[:, 1].sum(),
            }
            return {name: (total, pairs) for name, total in sums.items()}

        return Scores(self.means(model, split, compute), samples=len(self.evaluation_loader(split).examples))
