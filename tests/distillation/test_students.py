"""Students initialized from teacher layers, and the wrapper with their projections."""

import copy

import pytest
import torch
from accelerate import Accelerator
from distillation_helpers import (
    batches,
    bert,
    classifier,
    detr,
    distillation,
    language_task,
    sentences,
    trained,
    vit,
)

from hf_tfm.arguments import TrainingArguments
from hf_tfm.distillation.student import StudentWithProjections, copy_layers, freeze_unused, student_of
from hf_tfm.training.optim import parameter_groups

DISTILBERT = (0, 2, 4, 7, 9, 11)


@pytest.mark.parametrize("native", [False, True])
def test_student_has_the_chosen_layers(native):
    teacher = bert(12, 16, native=native)
    student = student_of(teacher, DISTILBERT)
    assert type(student) is type(teacher) and student.config.num_hidden_layers == 6
    blocks = (lambda m: m.bert.encoder.layer) if native else (lambda m: m.bert.layers)
    for own, number in zip(blocks(student), DISTILBERT, strict=True):
        origin = blocks(teacher)[number].state_dict()
        assert all(torch.equal(value, origin[name]) for name, value in own.state_dict().items())
    words = student.get_input_embeddings().weight
    assert torch.equal(words, teacher.get_input_embeddings().weight)
    assert student.get_output_embeddings().weight is words
    assert words is not teacher.get_input_embeddings().weight


def test_student_of_all_layers_equals_the_teacher():
    for teacher, inputs in (
        (vit(3), {"pixel_values": torch.randn(2, 3, 16, 16)}),
        (vit(3, kind="native"), {"pixel_values": torch.randn(2, 3, 16, 16)}),
    ):
        student = student_of(teacher.eval(), [0, 1, 2]).eval()
        assert torch.equal(student(**inputs).logits, teacher(**inputs).logits)


def test_student_may_lack_parts():
    teacher = bert(4)
    student = student_of(teacher, [0, 2], type_vocab_size=0)
    assert student.bert.embeddings.token_type_embeddings is None
    assert torch.equal(
        student.bert.layers[1].feed_forward.up_proj.weight, teacher.bert.layers[2].feed_forward.up_proj.weight
    )


def test_detector_decoder_is_shortened():
    teacher = detr(6)
    student = student_of(teacher, {"decoder": [2, 5]})
    assert student.config.decoder_layers == 2 and student.config.encoder_layers == 1
    for name in ("self_attn", "cross_attn"):
        own = getattr(student.model.decoder.layers[1], name).q_proj.weight
        assert torch.equal(own, getattr(teacher.model.decoder.layers[5], name).q_proj.weight)
    assert torch.equal(student.model.query_position_embeddings.weight, teacher.model.query_position_embeddings.weight)
    assert torch.equal(
        student.model.encoder.layers[0].self_attn.q_proj.weight,
        teacher.model.encoder.layers[0].self_attn.q_proj.weight,
    )
    pixels = torch.randn(1, 3, 64, 64)
    last = student_of(teacher.eval(), {"decoder": range(6)}).eval()
    assert torch.equal(last(pixel_values=pixels).logits, teacher(pixel_values=pixels).logits)


def test_different_widths_are_refused_unless_truncation_is_requested():
    teacher, student = bert(4, 32), bert(2, 16, seed=1, intermediate_size=24)
    before = student.bert.layers[0].feed_forward.up_proj.weight.clone()
    with pytest.raises(ValueError, match=r"is \(60, 16\) for the student and \(60, 32\) .* truncate_width=True"):
        copy_layers(student, teacher, [1, 3])
    assert torch.equal(student.bert.layers[0].feed_forward.up_proj.weight, before)
    assert copy_layers(student, teacher, [1, 3], truncate_width=True) == []
    assert torch.equal(
        student.bert.layers[0].feed_forward.up_proj.weight,
        teacher.bert.layers[1].feed_forward.up_proj.weight[:24, :16],
    )
    with pytest.raises(ValueError, match=r"widths must be the same$"):
        copy_layers(teacher, bert(4, 16), [0, 1, 2, 3], truncate_width=True)


def test_missing_teacher_layers_are_refused():
    student = classifier(2)
    fresh = copy_layers(student, bert(4), [0, 3])
    assert sorted(fresh) == [
        *("bert.pooler.dense.bias", "bert.pooler.dense.weight", "classifier.bias", "classifier.weight")
    ]


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([0, 4], r"layers must be in \[0, 4\), the number of the teacher's layers, got 4"),
        ([0, -1], r"got -1"),
        ([0], "layers must be 2, one for each of the student's, got 1"),
        ({"middle": [0, 1]}, 'stack must be one of .*, got "middle"'),
        ({"decoder": [0, 1]}, "layers of the decoder must be 0"),
    ],
)
def test_nonexistent_layers_are_refused(layers, words):
    with pytest.raises(ValueError, match=words):
        copy_layers(bert(2), bert(4), layers)


def test_mismatched_weight_names_are_refused():
    with pytest.raises(ValueError, match="load the teacher as the student's class"):
        copy_layers(bert(2), bert(4, native=True), [0, 1])


TERMS = [{"kind": "hidden_state"}, {"kind": "embedding"}]


def test_projections_are_shared_within_a_term_and_not_saved(tmp_path):
    _, model = distillation(language_task(), bert(4), bert(2, 16), TERMS)
    assert {name: tuple(p.shape) for name, p in model.projections.named_parameters()} == {
        "hidden_state.weight": (32, 16),
        "embedding.weight": (32, 16),
    }
    model.student.save_pretrained(tmp_path)
    loaded, report = type(model.student).from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not any("project" in name for name in loaded.state_dict())


def test_layer_wise_lr_decay_uses_the_student_layers():
    _, model = distillation(language_task(), bert(4), bert(2, 16), TERMS)
    groups = parameter_groups(
        model, TrainingArguments(output_dir=".", max_steps=1, layer_wise_lr_decay=0.5, learning_rate=1.0)
    )
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    student = model.student.bert
    assert rates[id(student.layers[1].self_attn.q_proj.weight)] == 0.5
    assert rates[id(student.layers[0].self_attn.q_proj.weight)] == 0.25
    assert rates[id(student.embeddings.word_embeddings.weight)] == 0.125
    assert rates[id(model.projections["hidden_state"].weight)] == 1.0


def test_gradient_checkpointing_of_the_student_changes_no_gradient():
    terms = [{"kind": "soft_target"}, {"kind": "hidden_state"}]
    found = []
    for checkpointing in (False, True):
        task, model = distillation(language_task(), bert(4), bert(2, 16), terms)
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.student.is_gradient_checkpointing
        found.append(trained(task, model, [batches(task, sentences(), [[0, 1, 2]])])[0])
    assert max((found[0][name] - found[1][name]).abs().max() for name in found[0]) < 1e-6


def test_gradient_checkpointing_with_attention_terms_is_refused():
    _, model = distillation(language_task(), bert(4), bert(2, 16), [{"kind": "attention_score"}])
    with pytest.raises(ValueError, match="does not work with terms on attention"):
        model.gradient_checkpointing_enable()


def test_weights_without_gradient_are_frozen():
    rows = sentences()
    task, model = distillation(language_task(), bert(4), bert(3, 16), [{"kind": "hidden_state", "layers": {2: 4}}])
    frozen = freeze_unused(Accelerator(cpu=True), task, model, batches(task, rows, [[0, 1]])[0])
    assert frozen and all(name.startswith(("student.bert.layers.2.", "student.lm_head.")) for name in frozen)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "student.bert.layers.1.feed_forward.down_proj.weight" in learning
    assert "projections.hidden_state.weight" in learning
    assert all(p.grad is None for p in model.parameters())
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained(task, model, [batches(task, rows, [[0, 1, 2]])])
    assert all(torch.equal(before[name], p) == (name in frozen) for name, p in model.named_parameters())


def test_student_with_projections_can_be_copied():
    """The weight average holds a copy of the model."""
    task, model = distillation(language_task(), bert(4), bert(2, 16), [{"kind": "attention_score"}, *TERMS])
    batch = batches(task, sentences(), [[0, 1]])[0]
    twin = copy.deepcopy(model)
    assert isinstance(twin, StudentWithProjections) and twin.student is not model.student
    one, other = (sum(task.losses(m.eval(), batch).values()) for m in (model, twin))
    assert one.item() == pytest.approx(other.item())
