"""A distillation step is invariant to micro-batching, sums its terms, and trains the student; for every kind of
model.
"""

import copy

import pytest
import torch
from accelerate import Accelerator
from distillation_helpers import (
    LABELS,
    VIT,
    TextTask,
    batches,
    bert,
    classifier,
    detection_task,
    detr,
    distillation,
    image_rows,
    image_task,
    language_task,
    losses,
    scenes,
    sentence_pairs,
    sentences,
    tokenizer,
    trained,
    translation_task,
    translator,
    vit,
)
from torch.nn.functional import cross_entropy, kl_div, mse_loss
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.data.augment import Augmentation, Mixing
from hf_tfm.distillation.signals import collect
from hf_tfm.distillation.teacher import Teacher
from hf_tfm.tasks.distillation import grids_of, token_weights
from hf_tfm.tasks.language_modeling import LanguageModelingTask
from hf_tfm.tasks.text_classification import TextClassificationTask
from hf_tfm.training import evaluate

LANGUAGE = [
    {"kind": "label", "weight": 2.0},
    {"kind": "soft_target", "weight": 5.0, "temperature": 2.0},
    {"kind": "cosine", "projection": "linear"},
    {"kind": "hidden_state"},
    {"kind": "embedding"},
    {"kind": "attention_score"},
    {"kind": "attention_probability", "layers": "final"},
    {"kind": "cosine", "layers": "skip", "projection": "linear", "tokens": "first"},
    {"kind": "hidden_state", "layers": "final", "tokens": "targets"},
]
TEXT = [{"kind": "label"}, {"kind": "soft_target"}, {"kind": "hard_target"}, {"kind": "logit", "weight": 0.1}]
IMAGES = [
    {"kind": "label", "weight": 0.5},
    {"kind": "hard_target", "weight": 0.5},
    {"kind": "hidden_state", "layers": "last"},
]
DETECTION = [
    {"kind": "label"},
    {"kind": "query", "temperature": 1.5},
    {"kind": "feature_map", "weight": 100.0, "layers": {"model.input_projection": "model.input_projection"}},
    {"kind": "hidden_state", "stack": "encoder"},
    {"kind": "attention_score", "stack": "decoder", "layers": "final"},
]


def language(native=False):
    return distillation(language_task(), bert(4, native=native), bert(2, 16, seed=1), LANGUAGE)


def every_token():
    terms = [{"kind": "label"}, {"kind": "soft_target", "tokens": "all"}, {"kind": "cosine", "projection": "linear"}]
    return distillation(language_task(), bert(4), bert(2, 16, seed=1), terms)


def texts(terms=TEXT, task=None):
    return distillation(task or TextTask(), classifier(4), classifier(2, 16, seed=1), terms)


def images(kind="ours", **options):
    attention = [] if kind == "timm" else [{"kind": "attention_score"}]
    return distillation(image_task(**options), vit(4, kind=kind), vit(2, 16, seed=1), [*IMAGES, *attention])


def detection():
    student = detr(2, seed=1)
    return distillation(detection_task(student), detr(4), student, DETECTION)


def translation():
    terms = [
        {"kind": "label"},
        {"kind": "soft_target", "temperature": 2.0},
        {"kind": "hidden_state", "stack": "encoder"},
        {"kind": "attention_score", "stack": "cross", "layers": "final"},
    ]
    return distillation(translation_task(), translator(4), translator(2, 16, seed=1), terms)


CASES = {
    "language": (language, sentences),
    "native language": (lambda: language(native=True), sentences),
    "language, all tokens": (every_token, sentences),
    "texts": (texts, sentences),
    "GLUE": (lambda: texts(task=TextClassificationTask.for_model(classifier(), tokenizer())), sentences),
    "images": (images, image_rows),
    "native images": (lambda: images("native"), image_rows),
    "timm images": (lambda: images("timm"), image_rows),
    "mixed images": (
        lambda: images(augmentation=Augmentation(), mixing=Mixing(mixup=0.8, cutmix=1.0), label_smoothing=0.1),
        image_rows,
    ),
    "detection": (detection, scenes),
    "translation": (translation, sentence_pairs),
}
CUTS = [[[0, 1, 2, 3, 4, 5]], [[0, 1], [2, 3], [4, 5]]]


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_equal_one_batch(name):
    make, rows = CASES[name]
    rows = rows()
    found = []
    for cuts in CUTS:
        task, model = make()
        before = {key: value.clone() for key, value in model.state_dict().items()}
        found.append(trained(task, model, [batches(task, rows, cuts), batches(task, rows, cuts, epoch=1)]))
    (one, whole), (many, cut) = found
    assert max((one[key] - many[key]).abs().max() for key in one) < 1e-6
    assert cut == pytest.approx(whole, rel=1e-5)
    assert max((one[key] - before[key]).abs().max() for key in one) > 1e-4  # the steps change the weights


@pytest.mark.parametrize("name", CASES)
def test_dummy_batch_has_zero_loss_and_reaches_every_weight(name):
    """A rank without samples takes part in every pass, because data-parallel training waits for its gradients."""
    make, rows = CASES[name]
    task, model = make()
    rows = rows()
    hidden = task.collator()([rows[0]], [0], 0, is_dummy=True)
    assert not any(task.count(hidden).values())
    sums = task.losses(model, hidden)
    real = batches(task, rows, [[0, 1]])[0]
    assert sums.keys() == task.losses(model, real).keys() <= task.count(hidden).keys()
    assert all(value.item() == 0.0 for value in sums.values())
    sum(sums.values()).backward()
    reached = {key for key, p in model.named_parameters() if p.grad is not None}
    assert all((p.grad == 0).all() for p in model.parameters() if p.grad is not None)
    model.zero_grad()
    sum(task.losses(model, real).values()).backward()
    assert reached == {key for key, p in model.named_parameters() if p.grad is not None}


def test_language_model_terms_by_hand():
    """Every term computed by hand on one padded batch: sums over masked tokens or real tokens."""
    teacher, student = bert(4), bert(2, 16, seed=1)
    task, model = distillation(language_task(), copy.deepcopy(teacher), student, LANGUAGE)
    batch = batches(task, sentences(), [[0, 1, 2, 3]])[0]
    model.eval(), teacher.eval()
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    mask, masked = batch["attention_mask"].bool(), batch["labels"] != -100
    assert not mask.all()
    with torch.no_grad():
        ours = model.student(**inputs, output_hidden_states=True)
        theirs = teacher(**inputs, output_hidden_states=True)
        found = losses(task, model, batch)
        scores = [
            collect(m, inputs, ["score/1", "score/2", "score/4"][: m.config.num_hidden_layers])[0]
            for m in (model.student, teacher)
        ]
    q, p = ours.logits[masked], theirs.logits[masked]
    soft = (p / 2).softmax(1) * ((p / 2).log_softmax(1) - (q / 2).log_softmax(1))
    weights = {name: p.weight for name, p in model.projections.items()}
    expected = {
        "token": 2 * cross_entropy(q, batch["labels"][masked]).item(),
        "soft_target": 5 * 4 * soft.sum(1).mean().item(),
        "hidden_state": sum(
            mse_loss(ours.hidden_states[m][mask] @ weights["hidden_state"].T, theirs.hidden_states[n][mask]).item()
            for m, n in ((1, 2), (2, 4))
        ),
        "embedding": mse_loss(
            ours.hidden_states[0][mask] @ weights["embedding"].T, theirs.hidden_states[0][mask]
        ).item(),
        "cosine": 1
        - torch.cosine_similarity(ours.hidden_states[2][mask] @ weights["cosine"].T, theirs.hidden_states[4][mask])
        .mean()
        .item(),
        "hidden_state_2": mse_loss(
            ours.hidden_states[2][masked] @ weights["hidden_state_2"].T, theirs.hidden_states[4][masked]
        ).item(),
        "cosine_2": 1
        - torch.cosine_similarity(ours.hidden_states[1][:, 0] @ weights["cosine_2"].T, theirs.hidden_states[2][:, 0])
        .mean()
        .item(),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name
    score = 0.0
    for own, other in (("score/1", "score/2"), ("score/2", "score/4")):
        for b, length in enumerate(mask.sum(1).tolist()):
            a, t = (scores[i][key][b, :, :length, :length] for i, key in enumerate((own, other)))
            score += length * mse_loss(a, t).item()
    assert found["attention_score"] == pytest.approx(score / int(mask.sum()), rel=1e-4)
    counts = task.count(batch)
    assert counts["token"] == counts["soft_target"] == int(masked.sum())
    assert counts["cosine"] == counts["attention_score"] == int(mask.sum())
    assert counts["cosine_2"] == len(mask) and counts["hidden_state_2"] == counts["token"]


def test_target_tokens_need_a_task_with_token_targets():
    terms = [{"kind": "hidden_state", "tokens": "targets"}]
    with pytest.raises(
        ValueError, match='tokens "targets" of hidden_state: the task has no such tokens with a target'
    ):
        task, model = distillation(TextTask(), classifier(4), classifier(2, 16, seed=1), terms)
        losses(task, model, batches(task, sentences(), [[0, 1]])[0])


def test_logits_of_all_tokens_with_labels_at_targets():
    task, model = every_token()
    batch = batches(task, sentences(), [[0, 1, 2]])[0]
    found, teacher = losses(task, model.eval(), batch), task.source.model
    inputs, mask, chosen = task.task.inputs(batch), batch["attention_mask"].bool(), batch["labels"] != -100
    ours, theirs = (m(**inputs).logits.float() for m in (model.student, teacher))
    soft = kl_div(ours[mask].log_softmax(-1), theirs[mask].log_softmax(-1), reduction="sum", log_target=True)
    assert found["soft_target"] == pytest.approx(soft.item() / int(mask.sum()), rel=1e-4)
    label = cross_entropy(ours[chosen], batch["labels"][chosen])
    assert found["token"] == pytest.approx(label.item(), rel=1e-4)
    assert task.count(batch)["token"] == int(chosen.sum()) < task.count(batch)["soft_target"] == int(mask.sum())


def test_all_tokens_need_a_task_with_token_logits():
    terms = [{"kind": "soft_target", "tokens": "all"}]
    task, _ = distillation(TextTask(), classifier(4), classifier(2, 16, seed=1), terms)
    with pytest.raises(ValueError, match='tokens "all" of a term on logits: the task has no tokens with a target'):
        batches(task, sentences(), [[0, 1]])


def test_head_is_skipped_if_no_logits_are_compared():
    task, model = distillation(language_task(), bert(4), bert(2, 16, seed=1), [{"kind": "hidden_state"}])
    batch = batches(task, sentences(), [[0, 1]])[0]
    _, output = model(task.task.inputs(batch), task.positions(batch))
    assert output.logits.shape == (0, 60)


def test_token_counts_are_the_same_without_a_mask():
    """Sequences of equal length are batched without an attention mask."""
    rows = [{"input_ids": sentences()[0]["input_ids"], "label": 0}] * 2
    task, model = distillation(language_task(), bert(4), bert(2, 16, seed=1), [{"kind": "hidden_state"}])
    batch = batches(task, rows, [[0, 1]])[0]
    assert "attention_mask" not in batch
    assert task.count(batch)["hidden_state"] == 2 * len(rows[0]["input_ids"])
    plain = losses(task, model.eval(), batch)["hidden_state"]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    assert losses(task, model, batch)["hidden_state"] == pytest.approx(plain, rel=1e-5)


def test_causal_model_compares_every_next_token():
    def gpt(layers, seed):
        torch.manual_seed(seed)
        sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "dropout": 0.0}
        return TfmGPTForCausalLM(
            TfmGPTConfig(vocab_size=60, max_position_embeddings=20, num_hidden_layers=layers, **sizes)
        )

    terms = [{"kind": "label"}, {"kind": "soft_target", "temperature": 2.0}, {"kind": "attention_score"}]
    causal = LanguageModelingTask.for_model(None, tokenizer(), objective="causal")
    task, model = distillation(causal, gpt(4, 0), gpt(2, 1), terms)
    batch = batches(task, sentences(), [[0, 1, 2]])[0]
    counts = task.count(batch)
    assert counts["token"] == counts["soft_target"] == counts["attention_score"] - 3
    found = losses(task, model.eval(), batch)
    expected = task.task.losses(model.student, batch)["token"].item() / counts["token"]
    assert found["token"] == pytest.approx(expected, rel=1e-4) and found["attention_score"] > 0


@pytest.mark.parametrize("name", ["language", "texts", "images", "detection"])
def test_training_moves_the_student_towards_the_teacher(name):
    make, rows = CASES[name]
    # Labels and hard targets work against a random teacher's probabilities, which are nearly uniform.
    task, model = texts([{"kind": "soft_target"}, {"kind": "logit"}]) if name == "texts" else make()
    step = batches(task, rows(), CUTS[1])
    before = losses(task, copy.deepcopy(model).eval(), step[0])
    trained(task, model, [step] * 15, learning_rate=5e-3, weight_decay=0.0)
    after = losses(task, model.eval(), step[0])
    for term in task.terms:
        if term.kind.loss is not None:
            assert after[term.name] < 0.9 * before[term.name], term.name


def test_loss_is_zero_if_student_equals_teacher():
    student = detr(3)
    terms = [{"kind": "query"}, {"kind": "hidden_state", "stack": "decoder"}]
    student.config.auxiliary_loss = False
    task, model = distillation(detection_task(student), copy.deepcopy(student), student, terms)
    found = losses(task, model.eval(), batches(task, scenes(), [[0, 1]])[0])
    assert all(value == pytest.approx(0.0, abs=1e-4) for value in found.values())


def test_evaluation_reports_the_terms():
    task, model = texts()
    step = batches(task, sentences(), CUTS[1])

    class Loader:
        def epoch(self, epoch, start=0):
            return iter([step])

    found = evaluate(Accelerator(cpu=True), task, model, Loader())
    whole = losses(task, model.eval(), batches(task, sentences(), CUTS[0])[0])
    assert found.keys() == {"loss", *whole}
    assert found["loss"] == pytest.approx(sum(whole.values()), rel=1e-5)


def test_teacher_weights_stay_fixed():
    teacher = classifier(4)
    task, model = distillation(TextTask(), teacher, classifier(2, 16, seed=1), TEXT)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trained(task, model, [batches(task, sentences(), CUTS[1])])
    assert all(torch.equal(before[name], value) for name, value in teacher.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_bfloat16_teacher_gives_similar_losses():
    found = []
    for dtype in ("fp32", "bf16"):
        task, model = distillation(TextTask(), Teacher(classifier(4), dtype), classifier(2, 16, seed=1), TEXT)
        found.append(losses(task, model.eval(), batches(task, sentences(), CUTS[0])[0]))
    assert found[0] != found[1]
    assert found[1] == pytest.approx(found[0], rel=0.05)


def test_unreadable_images_are_skipped():
    rows = image_rows()
    task, model = images()
    whole = losses(task, model.eval(), batches(task, rows, [[0, 2, 3]])[0])
    rows[1]["image"]["bytes"] = rows[1]["image"]["bytes"][:50]
    batch = batches(task, rows, [[0, 1, 2, 3]])[0]
    assert task.count(batch)["hidden_state"] == 3
    assert losses(task, model, batch) == pytest.approx(whole, rel=1e-5)


def test_image_tokens_have_total_weight_one_without_padding():
    states = torch.zeros(2, 6, 8)
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[0], mask[1, :64, :64] = True, True
    batch = {"pixel_values": mask, "pixel_mask": mask}
    found = token_weights(batch, "encoder/hidden/1", states)
    assert torch.allclose(found, torch.tensor([[1 / 6] * 6, [1 / 4, 1 / 4, 0, 1 / 4, 1 / 4, 0]]))
    assert torch.allclose(token_weights(batch, "map/x", torch.zeros(2, 8, 2, 3)), found)
    assert torch.allclose(token_weights(batch, "decoder/hidden/1", states), torch.full((2, 6), 1 / 6))
    assert grids_of((100, 130), 4 * 5) == [(4, 5)]
    assert grids_of((100, 130), 13 * 17 + 7 * 9 + 4 * 5) == [(13, 17), (7, 9), (4, 5)]
    with pytest.raises(ValueError, match="7 cells of an image of 64 x 96 pixels"):
        grids_of((64, 96), 7)
    with pytest.raises(ValueError, match=r"tokens of the text \(2, 5\), got \(2, 6\)"):
        token_weights({"input_ids": torch.zeros(2, 5)}, "hidden/1", states)


def test_student_with_two_heads_uses_one_target_for_each():
    """DeiT (Touvron et al. 2021, section 3): labels for the class token, the teacher for the distillation token."""
    torch.manual_seed(0)
    student = DeiTForImageClassificationWithTeacher(DeiTConfig(**VIT, **LABELS, hidden_size=32, num_hidden_layers=2))
    terms = [
        {"kind": "label", "weight": 0.5, "output": "cls_logits"},
        {"kind": "hard_target", "weight": 0.5, "output": "distillation_logits"},
    ]
    task, model = distillation(image_task(), vit(3), student, terms)
    batch = batches(task, image_rows(), [[0, 1, 2]])[0]
    found = task.losses(model, batch)
    found["hard_target"].backward(retain_graph=True)
    assert student.distillation_classifier.weight.grad is not None and student.cls_classifier.weight.grad is None
    found["label"].backward()
    assert student.cls_classifier.weight.grad is not None
    given = model.student(**task.task.inputs(batch))
    expected = cross_entropy(given.cls_logits, batch["labels"], reduction="sum").item()
    assert found["label"].item() == pytest.approx(0.5 * expected, rel=1e-5)
