"""Distillation loss terms, as specified in YAML.

{kind, weight, layers, ...} -> Term, validated on its own; `plan` checks it against both models
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ..values import check_bounds, closest, conform_fields, shown
from . import losses
from .signals import HIDDEN, LOGITS, MAP, SCORE

ROWS, TOKENS, OBJECTS = "rows", "tokens", "objects"  # the items that a loss is summed over
RULES = ("uniform", "skip", "last", "final")
Layers = dict[int, int] | dict[str, str] | Literal["uniform", "skip", "last", "final"]


@dataclass(frozen=True)
class Kind:
    """A kind of term.

    Args:
        loss: its function in `losses`; None for the true labels, whose loss the task computes.
        items: items that the loss is summed over.
        signal: kind of the layer signals to compare; None if it compares logits.
        layers: default layer mapping rule.
        heads: student and teacher need the same number of attention heads.
        top: loss function if only the teacher's largest logits are known; None if these are not enough.
        temperature: the kind has a temperature.
    """

    loss: Callable[..., Tensor] | None
    items: str
    signal: str | None = None
    layers: str | None = None
    heads: bool = False
    temperature: bool = False
    top: Callable[..., Tensor] | None = None


KINDS = {
    "label": Kind(None, ROWS),
    "soft_target": Kind(losses.soft_target_loss, ROWS, temperature=True, top=losses.soft_target_top_loss),
    "hard_target": Kind(losses.hard_target_loss, ROWS, top=losses.hard_target_top_loss),
    "logit": Kind(losses.logit_loss, ROWS),
    "hidden_state": Kind(losses.hidden_state_loss, TOKENS, HIDDEN, "uniform"),
    "embedding": Kind(losses.embedding_loss, TOKENS, HIDDEN),
    "cosine": Kind(losses.cosine_loss, TOKENS, HIDDEN, "final"),
    "attention_score": Kind(losses.attention_score_loss, TOKENS, SCORE, "uniform", heads=True),
    "attention_probability": Kind(losses.attention_probability_loss, TOKENS, SCORE, "uniform", heads=True),
    "feature_map": Kind(losses.feature_map_loss, TOKENS, MAP),
    "query": Kind(losses.query_loss, OBJECTS, temperature=True),
}


@dataclass(frozen=True, kw_only=True)
class Term:
    """One term of a distillation loss; see `losses` for each kind.

    Args:
        kind: loss to compute: label (true labels, no teacher), soft_target (for regression with a single output:
            squared error), hard_target, logit, hidden_state, embedding, cosine, attention_score,
            attention_probability, feature_map or query.
        weight: weight of the term.
        temperature: softmax temperature of soft_target and query.
        layers: mapping {student layer: teacher layer}, where blocks count from 1 and 0 is the input of the first
            block; for feature_map, {student module: teacher module}. Or a rule, for a student of M layers and a
            teacher of N: uniform, m -> m N / M (TinyBERT, section 3.1; halves rounded up); skip, uniform without the
            last layer (PKD-Skip, Sun et al. 2019, arXiv:1908.09355, section 3); last, m -> N - M + m (PKD-Last);
            final, only M -> N. Default: uniform, or final for cosine.
        stack: encoder, decoder or cross (attention only) of an encoder-decoder model; by default the only stack.
        projection: auto adds a linear layer to the student's states if their width differs from the teacher's; linear
            always adds it; none never does.
        tokens: tokens of a text that count: targets, those that a language model predicts (default for terms on
            logits); all (default for terms on states and attention); or, for the latter, first, the class token only
            (PKD, section 3). All terms on logits must use the same value.
        output: student logits to compare; for DeiT also cls_logits or distillation_logits.

    Raises:
        ValueError: a value is invalid, or does not apply to the kind.
    """

    kind: str
    weight: float = 1.0
    temperature: float = 1.0
    layers: Layers | None = None
    stack: Literal["", "encoder", "decoder", "cross"] = ""
    projection: Literal["auto", "linear", "none"] = "auto"
    tokens: Literal["all", "targets", "first"] | None = None
    output: Literal["logits", "cls_logits", "distillation_logits"] = "logits"

    def __post_init__(self):
        conform_fields(self)
        if self.kind not in KINDS:
            raise ValueError(f'kind must be one of {", ".join(KINDS)}, got "{self.kind}"{closest(self.kind, KINDS)}')
        for name in ("weight", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of {self.kind} must be above 0, got {getattr(self, name)}")
            check_bounds(f"{name} of {self.kind}", getattr(self, name), most=1_000_000)
        kind = KINDS[self.kind]
        if self.tokens is None:
            object.__setattr__(self, "tokens", tokens_of(kind)[0])
        useless = {
            "temperature": self.temperature != 1.0 and not kind.temperature,
            "layers": self.layers is not None and kind.layers is None and kind.signal != MAP,
            "stack": bool(self.stack) and kind.signal not in (HIDDEN, SCORE),
            "projection": self.projection != "auto" and kind.signal not in (HIDDEN, MAP),
            "tokens": self.tokens not in tokens_of(kind),
            "output": self.output != LOGITS and kind.items != ROWS,
        }
        for name, found in useless.items():
            if found:
                raise ValueError(f'{self.kind} takes no {name}, got "{getattr(self, name)}"')
        if isinstance(self.layers, str) and (kind.signal == MAP or self.layers not in RULES):
            raise ValueError(f'layers of {self.kind} must be a map or one of {", ".join(RULES)}, got "{self.layers}"')
        if isinstance(self.layers, dict) or kind.signal == MAP:
            sort = str if kind.signal == MAP else int
            if not self.layers or not all(type(x) is sort for pair in self.layers.items() for x in pair):
                raise ValueError(
                    f"layers of {self.kind} must be {{student's: teacher's}}, each "
                    f"{'the name of a module' if sort is str else 'a number'}, got {self.layers}"
                )
        if self.stack == "cross" and kind.signal != SCORE:
            raise ValueError(f'stack of {self.kind} must be "encoder" or "decoder", got "cross"')


def tokens_of(kind: Kind) -> tuple[str, ...]:
    """Return the valid values of `Term.tokens` for a kind, the default first."""
    if kind.items == ROWS:
        return ("targets", "all") if kind.loss else ("targets",)
    return ("all", "targets", "first") if kind.signal in (HIDDEN, SCORE) else ("all",)


def read_terms(given: Sequence[Term | dict[str, Any]]) -> list[Term]:
    """Convert a list from YAML to terms; for the ``__post_init__`` of argument dataclasses.

    Raises:
        ValueError: see `Term`; the error gives the index of the term.
    """
    found = []
    for i, term in enumerate(given):
        try:
            if not isinstance(term, (dict, Term)):
                raise ValueError(f"a term must be a mapping with a kind, got {shown(term)}")
            if isinstance(term, dict) and (unknown := [key for key in term if key not in Term.__dataclass_fields__]):
                known = Term.__dataclass_fields__
                raise ValueError(f"a term has no {unknown[0]}; it has {', '.join(known)}{closest(unknown[0], known)}")
            if isinstance(term, dict) and "kind" not in term:
                raise ValueError("a term needs a kind")
            found.append(term if isinstance(term, Term) else Term(**term))
        except ValueError as error:
            raise ValueError(f"terms[{i}]: {error}") from error
    return found


def on_logits(term: Term) -> bool:
    """Return True if a term compares the logits of rows."""
    return KINDS[term.kind].items == ROWS and term.kind != "label"
