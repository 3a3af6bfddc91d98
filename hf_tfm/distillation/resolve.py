"""Resolve distillation terms against a student and a teacher, before training starts.

Term(kind, weight, layers, ...) + specs of student and teacher -> ResolvedTerm(pairs of signals, projection, items)
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .model_spec import ModelSpec
from .signals import BOXES, HIDDEN, LOGITS, MAP, SCORE, SET_BOXES, SET_LOGITS, signal
from .terms import KINDS, Kind, Term, on_logits


@dataclass(frozen=True)
class ResolvedTerm:
    """A term resolved for a student and a teacher.

    Args:
        name: name of the term in logs.
        term: the original term.
        pairs: (student signal, teacher signal) names to compare; the losses of all pairs are summed.
        widths: feature sizes of the student's and the teacher's signals if there is a projection.
    """

    name: str
    term: Term
    pairs: tuple[tuple[str, str], ...]
    widths: tuple[int, int] | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[self.term.kind]

    def projected(self, name: str) -> str:
        """Return the name of a student signal after the projection, if there is one."""
        return f"{self.name}:{name}" if self.widths else name


def layer_map(rule: str, student: int, teacher: int) -> dict[int, int]:
    """Return {student layer: teacher layer} for a rule, see `Term`.

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


def resolve_terms(
    terms: Sequence[Term], student: ModelSpec, teacher: ModelSpec, match_labels: Literal["name", "number"] = "name"
) -> list[ResolvedTerm]:
    """Resolve and check terms against both models.

    Args:
        match_labels: "name" refuses models whose class names differ, see `check_labels`; "number" identifies classes
            by index, whatever their names.

    Raises:
        ValueError: no term needs a teacher, there are several "label" terms, or a term does not fit the models; the
            error names both sides.
    """
    if all(term.kind == "label" for term in terms):
        raise ValueError(f"terms must include one that compares student and teacher, got {[t.kind for t in terms]}")
    if sum(term.kind == "label" for term in terms) > 1:
        raise ValueError('terms must have kind "label" once at most')
    if len({term.tokens for term in terms if on_logits(term)}) > 1:
        raise ValueError('terms on logits must have the same tokens, got "all" and "targets"')
    resolved: list[ResolvedTerm] = []
    for term in terms:
        same = sum(one.term.kind == term.kind for one in resolved)
        name = f"{term.kind}_{same + 1}" if same else term.kind
        try:
            pairs, widths = CHECKS[KINDS[term.kind].signal](term, student, teacher)
            if pairs[0][1] == LOGITS and match_labels == "name":
                check_labels(student.labels, teacher.labels)
        except ValueError as error:
            raise ValueError(f"term {name}: {error}") from error
        resolved.append(ResolvedTerm(name, term, tuple(pairs), widths))
    return resolved


Resolved = tuple[list[tuple[str, str]], tuple[int, int] | None]


def check_outputs(term: Term, student: ModelSpec, teacher: ModelSpec) -> Resolved:
    """Resolve a term on model outputs."""
    if term.kind == "label":
        return [(term.output, "")], None
    if student.scoring and teacher.scoring and student.scoring != teacher.scoring:
        raise ValueError(f"student and teacher must score classes alike, got {student.scoring} and {teacher.scoring}")
    if student.outputs != teacher.outputs:
        raise ValueError(
            f"student and teacher must have equal numbers of logits, got {student.outputs} and {teacher.outputs}: "
            "their vocabularies, or classes, differ"
        )
    if term.kind == "query":
        if not (student.queries and teacher.queries):
            raise ValueError("student and teacher must be detectors with queries")
        return [(SET_LOGITS, LOGITS), (SET_BOXES, BOXES)], None
    if student.queries:
        raise ValueError('queries of two detectors do not correspond to the same objects: use kind "query"')
    if student.outputs == 1 and term.kind == "hard_target":
        raise ValueError('a model with one output has no classes: use kind "soft_target" or "logit"')
    return [(term.output, LOGITS)], None


def check_labels(student: Sequence[str] | None, teacher: Sequence[str] | None) -> None:
    """Refuse models whose class names or their order differ; the comparison ignores case.

    A name shared by several classes of one model, such as the two cranes of ImageNet, is ambiguous: such classes are
    accepted if all others match.

    Raises:
        ValueError: reports the first difference, or that no class has a unique name.
    """
    if student is None or teacher is None:  # no names to compare
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
        raise ValueError(f'no class has a unique name, for example "{student[0]}" and "{teacher[0]}": {hint}')


def check_layers(term: Term, student: ModelSpec, teacher: ModelSpec) -> Resolved:
    """Resolve a term on layers."""
    kind = KINDS[term.kind]
    stack = "decoder" if term.stack == "cross" else term.stack
    ours, theirs = student.stack(stack, "student"), teacher.stack(stack, "teacher")
    given = {0: 0} if term.kind == "embedding" else term.layers or kind.layers
    layers = layer_map(given, ours.layers, theirs.layers) if isinstance(given, str) else given
    if not layers:
        raise ValueError(f'layers "{given}" selects no layers of {ours.layers} and {theirs.layers}')
    first = 1 if kind.signal == SCORE else 0
    for side, spec, chosen in (("student", ours, layers), ("teacher", theirs, layers.values())):
        for layer in chosen:
            if not first <= layer <= spec.layers:
                raise ValueError(f"layer {layer} of the {side} is not in {first} to {spec.layers}")
    if kind.heads and ours.heads != theirs.heads:
        raise ValueError(
            f"student and teacher must have equal numbers of attention heads, got {ours.heads} and {theirs.heads}"
        )
    pairs = [
        (signal(kind.signal, m, term.stack), signal(kind.signal, n, term.stack)) for m, n in sorted(layers.items())
    ]
    return pairs, projection(term, ours.width, theirs.width) if kind.signal == HIDDEN else None


def check_maps(term: Term, student: ModelSpec, teacher: ModelSpec) -> Resolved:
    """Resolve a term on feature maps of modules."""
    widths = {
        (student.channels(ours, "student"), teacher.channels(theirs, "teacher"))
        for ours, theirs in term.layers.items()
    }
    if len(widths) > 1:
        raise ValueError(f"modules of one term must have equal numbers of channels, got {sorted(widths)}: use several")
    return [(signal(MAP, m), signal(MAP, n)) for m, n in term.layers.items()], projection(term, *widths.pop())


def projection(term: Term, student: int, teacher: int) -> tuple[int, int] | None:
    """Return the input and output size of the linear projection; None if there is none."""
    if term.projection == "none" and student != teacher:
        raise ValueError(f'projection "none" needs equal widths, got {student} and {teacher}: use "auto"')
    return (student, teacher) if term.projection == "linear" or student != teacher else None


CHECKS: dict[str | None, Callable[[Term, ModelSpec, ModelSpec], Resolved]] = {
    None: check_outputs,
    HIDDEN: check_layers,
    SCORE: check_layers,
    MAP: check_maps,
}


def signals_of(resolved: Sequence[ResolvedTerm], side: Literal["student", "teacher"]) -> list[str]:
    """Return the distinct signal names that the terms compare on one side."""
    place = 0 if side == "student" else 1
    return list(dict.fromkeys(pair[place] for one in resolved for pair in one.pairs if pair[place]))


def describe(resolved: Sequence[ResolvedTerm]) -> list[dict[str, Any]]:
    """Describe the terms for the results file."""
    return [
        {"name": one.name, **{field: getattr(one.term, field) for field in ("weight", "temperature", "tokens")}}
        | {"pairs": [list(pair) for pair in one.pairs], "projection": one.widths and list(one.widths)}
        for one in resolved
    ]
