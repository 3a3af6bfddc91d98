"""Loss terms are parsed from YAML and validated before training starts."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from distillation_helpers import bert, classifier, detr, tokenizer, vit
from timm.data import ImageNetInfo
from transformers import (
    BertTokenizer,
    DeformableDetrConfig,
    DeformableDetrForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    TimmBackboneConfig,
    ViTImageProcessor,
)

from hf_tfm.distillation.model_spec import ModelSpec, check_processors, check_tokenizers, spec_of
from hf_tfm.distillation.resolve import describe, layer_map, resolve_terms, signals_of
from hf_tfm.distillation.terms import Term, read_terms
from hf_tfm.options import parse_arguments
from hf_tfm.tasks.image_classification import ImageDistillationArguments

ROOT = Path(__file__).parents[2]
TINY_TO_BASE = (spec_of(bert(4, 16)), spec_of(bert(12, 32)))


def resolve(student, teacher, *terms):
    return resolve_terms([Term(**term) for term in terms], student, teacher)


@dataclass(kw_only=True)
class RecipeArguments:
    """Arguments of a recipe.

    Args:
        terms: loss terms.
    """

    terms: list[Term] = field(default_factory=list)

    def __post_init__(self):
        self.terms = read_terms(self.terms)


def test_terms_from_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text(
        """
        terms:
          - {kind: soft_target, weight: 5, temperature: 2}
          - {kind: hidden_state, layers: {1: 3, 2: 6}}
          - {kind: attention_score, layers: last}
          - {kind: feature_map, layers: {model.input_projection: model.input_projection}}
        """
    )
    found = parse_arguments(RecipeArguments, Path(__file__), ["--config", str(tmp_path / "a.yaml")]).terms
    assert found == [
        Term(kind="soft_target", weight=5.0, temperature=2.0),
        Term(kind="hidden_state", layers={1: 3, 2: 6}),
        Term(kind="attention_score", layers="last"),
        Term(kind="feature_map", layers={"model.input_projection": "model.input_projection"}),
    ]


@pytest.mark.parametrize(
    "line",
    ["{kind: nonsense}", "{kind: soft_target, heat: 2}", "{kind: cosine, weight: a}", "{kind: query, layers: x}"],
)
def test_invalid_yaml_exits_with_an_error(tmp_path, line, capsys):
    (tmp_path / "a.yaml").write_text(f"terms:\n  - {line}\n")
    with pytest.raises(SystemExit):
        parse_arguments(RecipeArguments, Path(__file__), ["--config", str(tmp_path / "a.yaml")])
    assert "terms" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "cosinus"}, "kind must be one of label, soft_target"),
        ({"kind": "soft_target", "weight": 0.0}, "weight of soft_target must be above 0, got 0"),
        ({"kind": "soft_target", "temperature": -1.0}, "temperature of soft_target must be above 0"),
        ({"kind": "cosine", "temperature": 2.0}, 'cosine takes no temperature, got "2.0"'),
        ({"kind": "soft_target", "layers": "last"}, "soft_target takes no layers"),
        ({"kind": "embedding", "layers": {0: 0}}, "embedding takes no layers"),
        ({"kind": "soft_target", "stack": "encoder"}, "takes no stack"),
        ({"kind": "attention_score", "projection": "linear"}, "takes no projection"),
        ({"kind": "hidden_state", "output": "cls_logits"}, "takes no output"),
        ({"kind": "soft_target", "tokens": "first"}, "takes no tokens"),
        ({"kind": "label", "tokens": "all"}, "takes no tokens"),
        (
            {"kind": "hidden_state", "layers": "first"},
            "layers must be a mapping of .* or one of uniform, skip, last, final",
        ),
        ({"kind": "hidden_state", "layers": {"a": "b"}}, "each a number"),
        ({"kind": "hidden_state", "layers": {}}, "each a number"),
        ({"kind": "feature_map"}, "each the name of a module"),
        ({"kind": "feature_map", "layers": "last"}, "must be a map"),
        ({"kind": "hidden_state", "stack": "cross"}, '"encoder" or "decoder", got "cross"'),
    ],
)
def test_invalid_term_is_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        Term(**fields)


def test_terms_on_logits_must_count_the_same_tokens():
    terms = {"kind": "soft_target", "tokens": "all"}, {"kind": "logit"}
    with pytest.raises(ValueError, match='the same tokens, got "all" and "targets"'):
        resolve(*TINY_TO_BASE, *terms)


def test_layer_maps():
    assert layer_map("uniform", 4, 12) == {1: 3, 2: 6, 3: 9, 4: 12}  # TinyBERT, g(m) = 3 m
    assert layer_map("skip", 6, 12) == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10}  # PKD-Skip
    assert layer_map("last", 4, 12) == {1: 9, 2: 10, 3: 11, 4: 12}
    assert layer_map("final", 6, 12) == {6: 12}
    assert layer_map("uniform", 4, 6) == {1: 2, 2: 3, 3: 5, 4: 6}
    assert layer_map("uniform", 3, 3) == {1: 1, 2: 2, 3: 3}
    with pytest.raises(ValueError, match="the student has 4 layers and the teacher 3"):
        layer_map("uniform", 4, 3)


def test_resolved_terms_name_their_signals():
    student, teacher = TINY_TO_BASE
    found = resolve(
        student,
        teacher,
        {"kind": "label", "weight": 2.0},
        {"kind": "soft_target", "temperature": 2.0},
        {"kind": "embedding"},
        {"kind": "hidden_state"},
        {"kind": "hidden_state", "layers": {4: 1}},
        {"kind": "attention_score", "layers": {4: 12}},
        {"kind": "cosine", "projection": "linear"},
    )
    assert [term.name for term in found] == [
        *("label", "soft_target", "embedding", "hidden_state", "hidden_state_2", "attention_score", "cosine")
    ]
    assert found[3].pairs == tuple((f"hidden/{m}", f"hidden/{3 * m}") for m in range(1, 5))
    assert [term.widths for term in found] == [None, None, *[(16, 32)] * 3, None, (16, 32)]
    assert signals_of(found, "student") == ["logits", *(f"hidden/{i}" for i in range(5)), "score/4"]
    assert signals_of(found, "teacher") == ["logits", *(f"hidden/{i}" for i in (0, 3, 6, 9, 12, 1)), "score/12"]
    assert describe(found)[5] == {
        "name": "attention_score",
        "weight": 1.0,
        "temperature": 1.0,
        "tokens": "all",
        "pairs": [["score/4", "score/12"]],
        "projection": None,
    }


def test_equal_widths_need_no_projection():
    same = spec_of(bert(2, 32))
    assert resolve(same, TINY_TO_BASE[1], {"kind": "hidden_state"})[0].widths is None
    assert resolve(same, TINY_TO_BASE[1], {"kind": "hidden_state", "projection": "linear"})[0].widths == (32, 32)


def heads(count):
    return spec_of(bert(2, 32, num_attention_heads=count))


@pytest.mark.parametrize(
    ("student", "teacher", "term", "words"),
    [
        (
            heads(2),
            heads(4),
            {"kind": "attention_score"},
            "attention_score: .*equal numbers of attention heads, got 2 and 4",
        ),
        (heads(2), heads(4), {"kind": "attention_probability"}, "equal numbers of attention heads"),
        (*TINY_TO_BASE, {"kind": "hidden_state", "projection": "none"}, "equal widths, got 16 and 32"),
        (*TINY_TO_BASE, {"kind": "hidden_state", "layers": {5: 1}}, "layer 5 of the student is not in 0 to 4"),
        (*TINY_TO_BASE, {"kind": "hidden_state", "layers": {1: 13}}, "layer 13 of the teacher is not in 0 to 12"),
        (*TINY_TO_BASE, {"kind": "attention_score", "layers": {0: 0}}, "layer 0 of the student is not in 1 to 4"),
        (*TINY_TO_BASE[::-1], {"kind": "hidden_state"}, "the student has 12 layers and the teacher 4"),
        (*TINY_TO_BASE, {"kind": "hidden_state", "stack": "decoder"}, 'stack "decoder" is not one of the student'),
        (*TINY_TO_BASE, {"kind": "query"}, "must be detectors"),
        (*TINY_TO_BASE, {"kind": "feature_map", "layers": {"a": "b"}}, '"a" of the student'),
        (TINY_TO_BASE[0], spec_of(bert(12, vocab_size=61)), {"kind": "soft_target"}, "60 and 61"),
        (TINY_TO_BASE[0], spec_of(bert(12).bert), {"kind": "soft_target"}, "60 and None"),
        (spec_of(classifier(2)), spec_of(classifier(4, num_labels=3)), {"kind": "soft_target"}, "got 2 and 3"),
        (*[spec_of(classifier(2, num_labels=1))] * 2, {"kind": "hard_target"}, 'use kind "soft_target" or "logit"'),
        (*[spec_of(detr(2))] * 2, {"kind": "soft_target"}, 'use kind "query"'),
        (
            *[spec_of(detr(2))] * 2,
            {"kind": "hidden_state"},
            'stack "" is not one of the student.*"encoder", "decoder"',
        ),
    ],
)
def test_terms_incompatible_with_the_models_are_refused(student, teacher, term, words):
    with pytest.raises(ValueError, match=words):
        resolve(student, teacher, term)


def test_different_label_maps_are_refused():
    student = spec_of(vit(2))
    other = replace(student, labels=("a", "b", "d", "c", "e"))
    with pytest.raises(ValueError, match='label maps differ: class 2 is "c" for the student, "d" for the teacher'):
        resolve(student, other, {"kind": "hard_target"})
    resolve(student, spec_of(vit(2, kind="timm")), {"kind": "hard_target"})  # timm models have no class names
    resolve(student, other, {"kind": "hidden_state"})  # this term does not compare classes
    assert resolve_terms([Term(kind="hard_target")], student, other, "number")


def test_ambiguous_class_names_are_not_compared():
    student, term = spec_of(vit(2)), {"kind": "soft_target"}
    resolve(replace(student, labels=tuple("ABCDE")), student, term)
    cranes = replace(student, labels=("crane", "b", "c", "Crane", "e"))
    resolve(cranes, cranes, term)
    resolve(replace(student, labels=("crane", "b", "c", "crane2", "e")), cranes, term)
    with pytest.raises(ValueError, match=r'class 2 is "x" for the student, "c" .*match_labels=number'):
        resolve(replace(student, labels=("crane", "b", "x", "crane", "e")), cranes, term)
    with pytest.raises(ValueError, match="no class has a unique name"):
        resolve(replace(student, labels=("a",) * 5), student, term)


def test_timm_imagenet_names_are_accepted():
    info = ImageNetInfo()
    names = tuple(info.label_descriptions(as_dict=True)[synset] for synset in info.label_names())
    assert len(set(names)) < len(names) == 1000
    teacher = replace(spec_of(vit(2, kind="timm")), outputs=1000, labels=names)
    resolve(replace(teacher, labels=tuple(name.upper() for name in names)), teacher, {"kind": "hard_target"})
    recipe = ROOT / "recipes" / "distill_vision.py"
    args = parse_arguments(ImageDistillationArguments, recipe, ["--config", "deit_base"])
    other = replace(teacher, labels=("TENCH", *names[1:500], "something else", *names[501:]))
    terms = [Term(kind="hard_target")]
    assert resolve_terms(terms, other, teacher, args.match_labels)
    with pytest.raises(ValueError, match="match_labels=number"):
        resolve_terms(terms, other, teacher)


def test_missing_teacher_term_and_duplicate_terms_are_refused():
    student, teacher = TINY_TO_BASE
    with pytest.raises(ValueError, match="must include one that compares"):
        resolve(student, teacher, {"kind": "label"})
    with pytest.raises(ValueError, match="once at most"):
        resolve(student, teacher, {"kind": "label"}, {"kind": "cosine"}, {"kind": "label"})


@pytest.mark.parametrize("model", [bert(2), vit(3), vit(2, kind="timm"), detr(2)], ids=lambda m: type(m).__name__)
def test_model_spec_survives_json(model):
    facts = spec_of(model)
    assert ModelSpec.from_json(json.loads(json.dumps(facts.to_json()))) == facts


def test_spec_of_every_family():
    native, ours = spec_of(bert(3, native=True)), spec_of(bert(3))
    assert native.stacks == ours.stacks and native.outputs == ours.outputs == 60 and ours.labels is None
    images = spec_of(vit(3, kind="timm"))
    assert (images.stacks[""].layers, images.stacks[""].width, images.outputs) == (3, 32, 5)
    assert images.labels is None and spec_of(vit(3)).labels == tuple("abcde")
    detector = spec_of(detr(3))
    assert detector.stacks["decoder"].layers == 3 and detector.stacks["encoder"].layers == 1
    assert detector.outputs == 11 and detector.queries == 6 and detector.widths["model.input_projection"] == 32


def test_different_tokenizers_are_refused():
    same, more = tokenizer(), tokenizer()
    check_tokenizers(same, tokenizer())
    more.add_tokens(["extra"])
    with pytest.raises(ValueError, match='60 and 61 tokens; "extra" is None for the student, 60 for the teacher'):
        check_tokenizers(same, more)
    words = {word: i for word, i in same.get_vocab().items() if i < 57} | {"caf": 57, "questions": 58, "funny": 59}
    lower, cased = (BertTokenizer(vocab=words, do_lower_case=flag) for flag in (True, False))
    with pytest.raises(ValueError, match=r"same tokenizer, got .* for"):
        check_tokenizers(lower, cased)


def test_different_image_processors_are_refused():
    ours = ViTImageProcessor(size={"height": 16, "width": 16})
    check_processors(ours, ViTImageProcessor(size={"height": 16, "width": 16}))
    for name, value in (("size", {"height": 32, "width": 32}), ("image_mean", [0.1, 0.2, 0.3])):
        other = ViTImageProcessor(**{"size": {"height": 16, "width": 16}, name: value})
        with pytest.raises(ValueError, match=f"same {name} in their image processors"):
            check_processors(ours, other)


def test_scoring_of_detectors_of_transformers():
    """Known from the number of their logits; one with a class for no object does not teach one without."""
    backbone = TimmBackboneConfig(backbone="test_resnet", out_indices=[-1])
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8}
    fields = {**sizes, "backbone_config": backbone, "num_labels": 4}
    deformable = spec_of(DeformableDetrForObjectDetection(DeformableDetrConfig(**fields, num_feature_levels=1)))
    softmax = spec_of(DetrForObjectDetection(DetrConfig(**fields)))
    assert (deformable.scoring, deformable.outputs) == ("sigmoid", 4) and deformable.queries
    assert (softmax.scoring, softmax.outputs) == ("softmax", 5)
    with pytest.raises(ValueError, match="must score classes alike, got softmax and sigmoid"):
        resolve(softmax, deformable, {"kind": "query"})
