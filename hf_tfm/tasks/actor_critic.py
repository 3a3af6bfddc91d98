"""Policy and value function, and what they say about the tokens of completions.

right-padded prompts and completions -> one forward pass -> log-probabilities and values of the completions' tokens

Shapes: B completions; T tokens of prompt and completion; C tokens of the longest completion; V vocabulary size.
"""

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .base import Batch
from .completions import completion_log_probs, completion_places
from .language_modeling import LanguageModelingTask


class TokenValues(nn.Module):
    """A sequence classifier with one label whose score is read at every token, as a value function or a reward.

    Args:
        classifier: a decoder whose head is the linear layer ``score``, as in transformers.

    Raises:
        ValueError: it has another head, or several labels.
    """

    def __init__(self, classifier: PreTrainedModel):
        super().__init__()
        score = getattr(classifier, "score", None)
        if not isinstance(score, nn.Linear):
            raise ValueError(f"{type(classifier).__name__} has no linear layer score, so it cannot score tokens")
        if score.out_features != 1:
            raise ValueError(f"{type(classifier).__name__} must have one label, got {score.out_features}")
        self.classifier = classifier

    def forward(self, batch: Batch) -> Tensor:
        """Return a score for each token, (B, T)."""
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
        states = self.classifier.base_model(**inputs, use_cache=False).last_hidden_state
        return self.classifier.score(states)[..., 0].float()

    def of_completions(self, batch: Batch) -> Tensor:
        """Return the values (B, C) before each token of completions, 0 at padding."""
        return self(batch).gather(1, completion_places(batch)) * batch["mask"]

    def of_last(self, batch: Batch) -> Tensor:
        """Return the scores (B,) at the last token of completions."""
        last = batch["starts"] + batch["mask"].sum(1).long() - 1
        return self(batch).gather(1, last[:, None])[:, 0]


class ActorCritic(nn.Module):
    """The module that is trained: a policy and, for PPO, its value function.

    Args:
        policy: a causal language model.
        values: None without a value function.
    """

    def __init__(self, policy: PreTrainedModel, values: TokenValues | None = None):
        super().__init__()
        self.policy, self.values = policy, values

    @property
    def config(self) -> PreTrainedConfig:
        """Configuration of the policy."""
        return self.policy.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Enable gradient checkpointing of both models, see transformers."""
        self.policy.gradient_checkpointing_enable(**kwargs)
        if self.values is not None:
            self.values.classifier.gradient_checkpointing_enable(**kwargs)

    def forward(self, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """Score a batch of `EpisodeCollator`, or of texts.

        Returns:
            Log-probabilities and values (B, C), both 0 at padding; the values are None without a value function. Of
            texts, the sum of the losses of their tokens, and None.
        """
        if "starts" not in batch:
            return LanguageModelingTask.for_model(self.policy).losses(self.policy, batch)["token"], None
        log_probs = completion_log_probs(self.policy, batch, temperature)
        if self.values is None:
            return log_probs, None
        return log_probs, self.values.of_completions(batch)
