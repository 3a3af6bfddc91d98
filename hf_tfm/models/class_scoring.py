"""Scoring of object queries: how class logits become scores, matching costs and a loss.

    logits of queries -> scores of classes; cost of (query, object); loss of matched and unmatched queries

A detector's configuration names its scoring in ``class_scoring``: "softmax", the default, one distribution over the
classes and "no object" (Carion et al. 2020, arXiv:2005.12872, section 3.1), or "sigmoid", an independent probability
of each class and the focal loss (Zhu et al. 2021, arXiv:2010.04159; Lin et al. 2017, arXiv:1708.02002).

Shapes: L decoder layers; B images; Q object queries; M maximum number of objects per image; C classes.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

EPS = 1e-8  # added to probabilities before the logarithm in the matching cost, as in the authors' code


class ClassScoring(ABC):
    """Scoring of object queries."""

    @classmethod
    @abstractmethod
    def of(cls, config: Any) -> "ClassScoring":
        """Create the scoring with the values of a configuration."""

    @staticmethod
    @abstractmethod
    def outputs(num_labels: int) -> int:
        """Return the number of logits of a query for C classes."""

    @staticmethod
    @abstractmethod
    def scores(logits: Tensor) -> Tensor:
        """Return the probability of each class: (..., C)."""

    @staticmethod
    @abstractmethod
    def detects(logits: Tensor) -> Tensor:
        """Return whether each query predicts an object: (...) bool."""

    @abstractmethod
    def cost(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Compute the cost of matching queries to objects of these classes, without gradient.

        Args:
            logits: (L, B, Q, outputs) float32.
            classes: (B, M) int64.

        Returns:
            (L, B, Q, M).
        """

    @property
    @abstractmethod
    def highest_cost(self) -> float:
        """Upper bound on `cost`."""

    @abstractmethod
    def loss(self, logits: Tensor, queries: Tensor, classes: Tensor) -> Tensor:
        """Sum the classification loss of all queries, per layer: (L,).

        Args:
            logits: (L, B, Q, outputs) float32.
            queries: (L, B, M) int64, the query of each object; Q if it has none.
            classes: (B, M) int64.
        """

    @abstractmethod
    def items(self, counts: list[int], num_queries: int) -> float:
        """Return the divisor of the sum of `loss`, for images with these numbers of objects."""


def at_objects(values: Tensor, classes: Tensor) -> Tensor:
    """Select the entry of each object's class: (L, B, Q, outputs), (B, M) -> (L, B, Q, M)."""
    return values.gather(-1, classes[None, :, None].expand(*values.shape[:3], -1))


@dataclass(frozen=True)
class SoftmaxScoring(ClassScoring):
    """One distribution over C classes and, last, "no object"; cross-entropy.

    Args:
        eos_coefficient: weight of queries without an object in the loss.
    """

    eos_coefficient: float = 0.1

    @classmethod
    def of(cls, config: Any) -> "SoftmaxScoring":
        """See `ClassScoring`."""
        return cls(getattr(config, "eos_coefficient", cls.eos_coefficient))

    @staticmethod
    def outputs(num_labels: int) -> int:
        """See `ClassScoring`."""
        return num_labels + 1

    @staticmethod
    def scores(logits: Tensor) -> Tensor:
        """See `ClassScoring`."""
        return logits.softmax(-1)[..., :-1]

    @staticmethod
    def detects(logits: Tensor) -> Tensor:
        """See `ClassScoring`."""
        return logits.argmax(-1) != logits.shape[-1] - 1

    def cost(self, logits: Tensor, classes: Tensor) -> Tensor:
        """See `ClassScoring`: ``-p(class)``."""
        return at_objects(logits.softmax(-1), classes).neg()

    @property
    def highest_cost(self) -> float:
        """See `ClassScoring`."""
        return 0.0

    def loss(self, logits: Tensor, queries: Tensor, classes: Tensor) -> Tensor:
        """See `ClassScoring`: cross-entropy, weighted by ``eos_coefficient`` for queries without an object."""
        L, B, Q, outputs = logits.shape
        nothing = outputs - 1
        target = classes.new_full((L, B, Q + 1), nothing)  # the last slot collects objects without a query
        target = target.scatter(2, queries, classes.expand(L, -1, -1))[:, :, :Q]
        loss = nn.functional.cross_entropy(logits.flatten(0, 2), target.flatten(), reduction="none").view(L, -1)
        return (loss * torch.where(target == nothing, self.eos_coefficient, 1.0).view(L, -1)).sum(dim=1)

    def items(self, counts: list[int], num_queries: int) -> float:
        """See `ClassScoring`: the total weight of the queries, 1 if matched, else ``eos_coefficient``."""
        matched = sum(min(count, num_queries) for count in counts)
        return matched + self.eos_coefficient * (num_queries * len(counts) - matched)


@dataclass(frozen=True)
class SigmoidScoring(ClassScoring):
    """An independent probability of each class; focal loss.

    Args:
        alpha: weight of a positive; that of a negative is 1 - alpha.
        gamma: exponent of the factor that reduces the loss of well classified examples.
    """

    alpha: float
    gamma: float

    @classmethod
    def of(cls, config: Any) -> "SigmoidScoring":
        """See `ClassScoring`."""
        return cls(config.focal_alpha, config.focal_gamma)

    @staticmethod
    def outputs(num_labels: int) -> int:
        """See `ClassScoring`."""
        return num_labels

    @staticmethod
    def scores(logits: Tensor) -> Tensor:
        """See `ClassScoring`."""
        return logits.sigmoid()

    @staticmethod
    def detects(logits: Tensor) -> Tensor:
        """See `ClassScoring`."""
        return (logits > 0).any(-1)

    def cost(self, logits: Tensor, classes: Tensor) -> Tensor:
        """See `ClassScoring`: the focal loss as a positive minus that as a negative."""
        positive = at_objects(logits, classes).sigmoid()
        negative = 1 - positive
        gain = self.alpha * negative**self.gamma * (positive + EPS).log()
        return (1 - self.alpha) * positive**self.gamma * (negative + EPS).log() - gain

    @property
    def highest_cost(self) -> float:
        """See `ClassScoring`."""
        return -self.alpha * math.log(EPS)

    def negative_loss(self, logits: Tensor) -> Tensor:
        """Compute the focal loss of logits of classes that are absent, elementwise."""
        return (1 - self.alpha) * logits.sigmoid() ** self.gamma * nn.functional.softplus(logits)

    def positive_loss(self, logits: Tensor) -> Tensor:
        """Compute the focal loss of logits of classes that are present, elementwise."""
        return self.alpha * (-logits).sigmoid() ** self.gamma * nn.functional.softplus(-logits)

    def loss(self, logits: Tensor, queries: Tensor, classes: Tensor) -> Tensor:
        """See `ClassScoring`: focal loss, equation 5.

        All logits count as negatives first; at the few matched ones the difference to a positive is added. This saves
        the table of targets and half of the arithmetic.
        """
        Q, outputs = logits.shape[2:]
        chosen = queries.clamp_max(Q - 1) * outputs + classes  # (L, B, M)
        own = logits.flatten(2).gather(2, chosen)
        change = (self.positive_loss(own) - self.negative_loss(own)) * (queries < Q)
        return self.negative_loss(logits).sum((1, 2, 3)) + change.sum((1, 2))

    def items(self, counts: list[int], num_queries: int) -> float:
        """See `ClassScoring`: the number of objects, which may be 0."""
        return float(sum(counts))


SCORINGS: dict[str, type[ClassScoring]] = {"softmax": SoftmaxScoring, "sigmoid": SigmoidScoring}


def scoring_of(config: Any) -> ClassScoring:
    """Return the scoring of a detector, ``config.class_scoring``; "softmax" if its configuration does not say."""
    return SCORINGS[getattr(config, "class_scoring", "softmax")].of(config)


def scoring_name(config: Any, outputs: int) -> str:
    """Return the name of the scoring of any detector; without ``class_scoring`` the number of logits tells it.

    Args:
        outputs: number of logits of a query.
    """
    inferred = "softmax" if outputs == SoftmaxScoring.outputs(config.num_labels) else "sigmoid"
    return getattr(config, "class_scoring", inferred)
