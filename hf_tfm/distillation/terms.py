"""What a student is asked to be like its teacher in: terms, as a YAML file gives them, checked against both models.

Term(kind, weight, layers, ...) + facts of student and teacher -> Lesson(pairs of signals, projection, items)
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from . import losses
from .facts import Facts
from .signals import BOXES, HIDDEN, LOGITS, MAP, SCORE, SET_BOXES, SET_LOGITS, signal

ROWS, TOKENS, OBJECTS = "rows", "tokens", "objects"  # what a loss is summed over
RULES = ("uniform", "skip", "last", "final")
Layers = dict[int, int] | dict[str, str] | Literal["uniform", "skip", "last", "final"]


@dataclass(frozen=True)
class Kind:
    """A kind of term.

    Args:
        loss: its function in `losses`; None of the true labels', which the task computes.
        items: what it is summed over.
        signal: the kind of signals it compares, of layers; None of one that compares logits.
        layers: the rule where a term names no layers.
        heads: student and teacher need equally many.
        top: its function where the teacher's largest logits alone are known; None where they do not do.
        temperature: it has one.
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
    """One term of a distillation loss; see `losses` for each.

    Args:
        kind: what is compared: label (the true labels: no teacher), soft_target (of one output, where a number is
            predicted, its squared error), hard_target, logit, hidden_state, embedding, cosine, attention_score,
            attention_probability, feature_map or query.
        weight: how much it counts.
        temperature: of soft_target and query.
        layers: {student's layer: teacher's}, where blocks count from 1 and 0 is what the first one reads; of
            feature_map, {student's module: teacher's}. Or a rule, for M layers of a student and N of a teacher:
            uniform, m -> m N / M (TinyBERT, section 3.1; halves rounded up); skip, the same without the last
            (PKD-Skip, Sun et al. 2019, arXiv:1908.09355, section 3); last, m -> N - M + m (PKD-Last); final, M -> N
            alone. Default, uniform, and of cosine final.
        stack: encoder, decoder or cross, of models with both (cross: attention alone); default, the only one.
        projection: auto puts a linear layer behind the student's states where they are not as wide as the teacher's;
            linear always; none never.
        tokens: which of a text count: targets, those that a language model is to predict, the default of terms on
            logits; all, the default of terms on states and attention; or of these first, that of the class alone (PKD,
            section 3). Terms on logits must agree.
        output: the logits of the student that are compared, of DeiT "cls_logits" or "distillation_logits".

    Raises:
        ValueError: a value is not one it may have, or of no use for the kind.
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
        if self.kind not in KINDS:
            raise ValueError(f'kind must be one of {", ".join(KINDS)}, got "{self.kind}"')
        for name in ("weight", "temperature"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} of {self.kind} must be above 0, got {getattr(self, name)}")
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
    """Which tokens may count in a kind of term, its default first."""
    if kind.items == ROWS:
        return ("targets", "all") if kind.loss else ("targets",)
    return ("all", "targets", "first") if kind.signal in (HIDDEN, SCORE) else ("all",)


def read_terms(given: Sequence[Term | dict[str, Any]]) -> list[Term]:
    """Terms of a list as YAML has it; for the ``__post_init__`` of a recipe's knobs.

    Raises:
        ValueError: see `Term`; the error says which it is.
    """
    found = []
    for i, term in enumerate(given):
        try:
            if isinstance(term, dict) and (unknown := sorted(term.keys() - Term.__dataclass_fields__.keys())):
                raise ValueError(f"a term has no {unknown[0]}; it has {', '.join(Term.__dataclass_fields__)}")
            if isinstance(term, dict) and "kind" not in term:
                raise ValueError("a term needs a kind")
            found.append(term if isinstance(term, Term) else Term(**term))
        except ValueError as error:
            raise ValueError(f"terms[{i}]: {error}") from error
    return found


@dataclass(frozen=True)
class Lesson:
    """A term as student and teacher have it.

    Args:
        name: of the term in logs.
        term: as it was given.
        pairs: (student's signal, teacher's) that are compared; their losses are added up.
        widths: features of the student's and the teacher's signals where a projection stands between.
    """

    name: str
    term: Term
    pairs: tuple[tuple[str, str], ...]
    widths: tuple[int, int] | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[self.term.kind]

    def projected(self, name: str) -> str:
        """The name of the student's signal as it is compared."""
        return f"{self.name}:{name}" if self.widths else name


def layer_map(rule: str, student: int, teacher: int) -> dict[int, int]:
    """{student's layer: teacher's} of a rule, see `Term`.

    Raises:
        ValueError: the student has more layers than the teacher.
    """
    if student > teacher:
        raise ValueError(
            f'layers "{rule}": the student has {student} layers and the teacher {teacher}; give a map of layers'
        )
    if rule == "final":
        return {student: teacher}
    if rule == "last":
        return {m: teacher - student + m for m in range(1, student + 1)}
    even = {m: (2 * m * teacher + student) // (2 * student) for m in range(1, student + 1)}
    return {m: n for m, n in even.items() if m < student or rule == "uniform"}


def plan(
    terms: Sequence[Term], student: Facts, teacher: Facts, match_labels: Literal["name", "number"] = "name"
) -> list[Lesson]:
    """Check terms against both models, before anything is trained.

    Args:
        match_labels: "name" refuses classes of other names, see `check_labels`; "number" takes those of the same
            number for the same, whatever they are called.

    Raises:
        ValueError: none of the terms needs a teacher, there are several of "label", or one does not fit the models;
            the error names both sides.
    """
    if all(term.kind == "label" for term in terms):
        raise ValueError(f"terms must have one that compares student and teacher, got {[t.kind for t in terms]}")
    if sum(term.kind == "label" for term in terms) > 1:
        raise ValueError('terms must have kind "label" once at most')
    if len({term.tokens for term in terms if on_logits(term)}) > 1:
        raise ValueError('terms on logits must have the same tokens, got "all" and "targets"')
    lessons: list[Lesson] = []
    for term in terms:
        same = sum(lesson.term.kind == term.kind for lesson in lessons)
        name = f"{term.kind}_{same + 1}" if same else term.kind
        try:
            pairs, widths = CHECKS[KINDS[term.kind].signal](term, student, teacher)
            if pairs[0][1] == LOGITS and match_labels == "name":
                check_labels(student.labels, teacher.labels)
        except ValueError as error:
            raise ValueError(f"term {name}: {error}") from error
        lessons.append(Lesson(name, term, tuple(pairs), widths))
    return lessons


def on_logits(term: Term) -> bool:
    """Whether a term compares the logits of rows."""
    return KINDS[term.kind].items == ROWS and term.kind != "label"


Resolved = tuple[list[tuple[str, str]], tuple[int, int] | None]


def check_outputs(term: Term, student: Facts, teacher: Facts) -> Resolved:
    """A term on what the models give in the end."""
    if term.kind == "label":
        return [(term.output, "")], None
    if student.outputs != teacher.outputs:
        raise ValueError(
            f"student and teacher must give equally many logits, got {student.outputs} and {teacher.outputs}: "
            "their vocabularies, or classes, differ"
        )
    if term.kind == "query":
        if not (student.queries and teacher.queries):
            raise ValueError("student and teacher must be detectors with queries")
        return [(SET_LOGITS, LOGITS), (SET_BOXES, BOXES)], None
    if student.queries:
        raise ValueError('queries of two detectors do not stand for the same objects: use kind "query"')
    if student.outputs == 1 and term.kind == "hard_target":
        raise ValueError('a model with one output has no classes: use kind "soft_target" or "logit"')
    return [(term.output, LOGITS)], None


def check_labels(student: Sequence[str] | None, teacher: Sequence[str] | None) -> None:
    """Refuse classes of other names, or in another order; upper and lower case are the same.

    A name that several classes of a model share, as the two cranes of ImageNet, says nothing of which is which: such
    classes are taken for the same if all others are.

    Raises:
        ValueError: with the first that differs; or no class has a name of its own.
    """
    if student is None or teacher is None:  # without names there is nothing to compare
        return
    ours, theirs = ([name.casefold() for name in names] for names in (student, teacher))
    often = [Counter(ours), Counter(theirs)]
    known = [i for i, pair in enumerate(zip(ours, theirs, strict=True)) if all(often[s][pair[s]] == 1 for s in (0, 1))]
    hint = "if their numbers mean the same, match_labels=number compares those"
    for i in known:
        if ours[i] != theirs[i]:
            raise ValueError(
                f'label maps differ: class {i} is "{student[i]}" for the student, "{teacher[i]}" for the teacher; '
                + hint
            )
    if not known:
        raise ValueError(f'no class has a name that no other has, as "{student[0]}" and "{teacher[0]}": {hint}')


def check_layers(term: Term, student: Facts, teacher: Facts) -> Resolved:
    """A term on layers."""
    kind = KINDS[term.kind]
    stack = "decoder" if term.stack == "cross" else term.stack
    ours, theirs = student.stack(stack, "student"), teacher.stack(stack, "teacher")
    given = {0: 0} if term.kind == "embedding" else term.layers or kind.layers
    layers = layer_map(given, ours.layers, theirs.layers) if isinstance(given, str) else given
    if not layers:
        raise ValueError(f'layers "{given}" of {ours.layers} and {theirs.layers} layers are none')
    first = 1 if kind.signal == SCORE else 0
    for side, facts, chosen in (("student", ours, layers), ("teacher", theirs, layers.values())):
        for layer in chosen:
            if not first <= layer <= facts.layers:
                raise ValueError(f"layer {layer} of the {side} is not in {first} to {facts.layers}")
    if kind.heads and ours.heads != theirs.heads:
        raise ValueError(
            f"student and teacher must have equally many attention heads, got {ours.heads} and {theirs.heads}"
        )
    pairs = [
        (signal(kind.signal, m, term.stack), signal(kind.signal, n, term.stack)) for m, n in sorted(layers.items())
    ]
    return pairs, projection(term, ours.width, theirs.width) if kind.signal == HIDDEN else None


def check_maps(term: Term, student: Facts, teacher: Facts) -> Resolved:
    """A term on what modules give."""
    widths = {
        (student.channels(ours, "student"), teacher.channels(theirs, "teacher"))
        for ours, theirs in term.layers.items()
    }
    if len(widths) > 1:
        raise ValueError(f"modules of one term must have equally many channels, got {sorted(widths)}: use several")
    return [(signal(MAP, m), signal(MAP, n)) for m, n in term.layers.items()], projection(term, *widths.pop())


def projection(term: Term, student: int, teacher: int) -> tuple[int, int] | None:
    """Widths of the linear layer between; None where there is none."""
    if term.projection == "none" and student != teacher:
        raise ValueError(f'projection "none" needs equal widths, got {student} and {teacher}: use "auto"')
    return (student, teacher) if term.projection == "linear" or student != teacher else None


CHECKS: dict[str | None, Callable[[Term, Facts, Facts], Resolved]] = {
    None: check_outputs,
    HIDDEN: check_layers,
    SCORE: check_layers,
    MAP: check_maps,
}


def signals_of(lessons: Sequence[Lesson], side: Literal["student", "teacher"]) -> list[str]:
    """Names of the signals of one side that lessons compare, once each."""
    place = 0 if side == "student" else 1
    return list(dict.fromkeys(pair[place] for lesson in lessons for pair in lesson.pairs if pair[place]))


def describe(lessons: Sequence[Lesson]) -> list[dict[str, Any]]:
    """What a results file says of the terms."""
    return [
        {"name": lesson.name, **{field: getattr(lesson.term, field) for field in ("weight", "temperature", "tokens")}}
        | {"pairs": [list(pair) for pair in lesson.pairs], "projection": lesson.widths and list(lesson.widths)}
        for lesson in lessons
    ]
