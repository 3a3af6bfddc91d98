"""The gradient of a step does not depend on micro-batching, in a plain loop and under Trainer."""

import copy

import pytest
import torch
from head_cases import CASES, LISTS, Case, collate
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

import hf_tfm
from hf_tfm.training.step_items import StepItemsTrainer, total

PARTS = (slice(0, 3), slice(3, 4), slice(4, 8))


def gradient(model: PreTrainedModel) -> Tensor:
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
    return torch.cat([part.flatten() for part in parts])


def items_of(case: Case, model: PreTrainedModel, batch: dict):
    """Item counts as computed by Trainer, or by the model where Trainer cannot."""
    if hasattr(model, "count_items"):
        return model.count_items(**batch)
    labels = batch["labels"]
    return (labels[:, 1:] if "CausalLM" in type(model).__name__ else labels).ne(-100).sum()


def losses(case: Case, extra: dict | None = None) -> tuple[list[float], list[Tensor]]:
    """Loss and gradient of a step: the head's own mean, the whole batch with its item count, and micro-batches."""
    rows, model = case.rows(), case.model().train()
    items = items_of(case, model, collate(rows))
    values, gradients = [], []
    for parts, given in (((slice(0, 8),), {}), ((slice(0, 8),), {"items": 1}), (PARTS, {"items": 1})):
        model.zero_grad()
        value = 0.0
        for part in parts:
            loss = model(
                **collate(rows[part]), **(extra or {}), **({"num_items_in_batch": items} if given else {})
            ).loss
            loss.backward()
            value += loss.item()
        values.append(value)
        gradients.append(gradient(model))
    return values, gradients


# Faster R-CNN samples proposals, which rounding may change; its recipe's tests compare its steps.
@pytest.mark.parametrize("name", [name for name in CASES if name != "faster_rcnn"])
def test_micro_batches(name):
    values, gradients = losses(CASES[name])
    assert values[1] == pytest.approx(values[0], rel=1e-5) and values[2] == pytest.approx(values[0], rel=1e-5)
    assert gradients[0].abs().max() > 1e-4
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_micro_batches_with_the_language_term():
    case = CASES["gpt classes"]
    values, gradients = losses(case, {"language_weight": 0.5})
    assert values[0] > losses(case)[0][0] + 1
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-5)
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


def test_language_term_is_a_mean_over_sequences():
    """As in the 2018 authors' code: long and short texts have equal weight."""
    model, ids = CASES["gpt classes"].model().eval(), CASES["gpt classes"].columns["input_ids"][:2]
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1])}
    term = (model(**given, language_weight=1.0).loss - model(**given).loss).item()
    states = model.transformer(ids, mask).last_hidden_state @ model.transformer.wte.weight.T
    each = [
        torch.nn.functional.cross_entropy(states[row, : length - 1], ids[row, 1:length]).item()
        for row, length in ((0, 8), (1, 4))
    ]
    assert term == pytest.approx(sum(each) / 2, rel=1e-5)


def test_pretraining_with_a_single_item_count():
    """Trainer counts only the tokens; each pair is then weighted by its share of them."""
    rows, model = CASES["pretraining"].rows(), CASES["pretraining"].model().train()
    items = collate(rows)["labels"].ne(-100).sum()
    found = []
    for parts in ((slice(0, 8),), PARTS):
        model.zero_grad()
        for part in parts:
            model(**collate(rows[part]), num_items_in_batch=items).loss.backward()
        found.append(gradient(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


class Gradient(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.found = gradient(model).clone()


def trained(trainer_class, name: str, batch: int, steps: int, folder, **fields) -> Tensor:
    """The gradient of one step under a trainer, of a model whose configuration has these fields."""
    seen = Gradient()
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=steps,
        max_steps=1,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        max_grad_norm=0,
        learning_rate=0.0,
        remove_unused_columns=False,
        dataloader_drop_last=False,
    )
    case = CASES[name]
    model = copy.deepcopy(case.model())
    for field, value in fields.items():
        setattr(model.config, field, value)
    trainer_class(model, args, train_dataset=case.rows(), data_collator=collate, callbacks=[seen]).train()
    return seen.found


@pytest.mark.client("Trainer: accumulation", "transformers")
@pytest.mark.parametrize(
    "name", ["masked", "pretraining", "regression", "multi-label", "chooser", "causal", "soft labels", "seq2seq"]
)
def test_under_trainer(name, tmp_path):
    whole, parts = trained(Trainer, name, 8, 1, tmp_path), trained(Trainer, name, 2, 4, tmp_path)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["masked", "pretraining"])
def test_under_trainer_without_logits(name, tmp_path, monkeypatch):
    whole = trained(Trainer, name, 8, 1, tmp_path)
    refuse = lambda *_: pytest.fail("computes the logits of all tokens")  # noqa: E731
    monkeypatch.setattr(hf_tfm.models.bert_parts.MaskedLMHead, "forward", refuse)
    parts = trained(Trainer, name, 2, 4, tmp_path, training_logits=False)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


@pytest.mark.client("StepItemsTrainer: accumulation", "transformers")
@pytest.mark.parametrize("name", ["pretraining", "reader", "autoencoder", "detection", "panoptic", "classes"])
def test_under_trainer_with_item_counts(name, tmp_path):
    """Micro-batches of three, three and two rows with different numbers of items."""
    whole, parts = trained(StepItemsTrainer, name, 8, 1, tmp_path), trained(StepItemsTrainer, name, 3, 3, tmp_path)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-6)


def test_totals():
    assert total([1, torch.tensor(2)]).item() == 3
    assert {name: value.item() for name, value in total([{"a": 1.5, "b": 0}, {"a": 1, "b": 2}]).items()} == {
        "a": 2.5,
        "b": 2.0,
    }


def test_detection_refuses_a_single_item_count():
    case = CASES["detection"]
    with pytest.raises(ValueError, match=r"num_items_in_batch must hold a number for each of loss_ce, .*got 7"):
        case.model()(**collate(case.rows()[:2]), num_items_in_batch=7)


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*LISTS, "autoencoder")])
@pytest.mark.parametrize("items", [None, "counted"])
def test_no_labels(name, items):
    """Loss and gradients are 0, not NaN."""
    case, model = CASES[name], CASES[name].model().train()
    batch = collate(case.rows())
    for target in case.targets:
        batch[target] = torch.full_like(batch[target], -100)
    if items:
        batch["num_items_in_batch"] = items_of(case, model, batch)
    loss = model(**batch).loss
    loss.backward()
    assert loss.item() == 0 and gradient(model).eq(0).all()


@pytest.mark.parametrize("options", [{"return_logits": False}, {"return_logits": True}], ids=str)
@pytest.mark.parametrize("name", ["masked", "causal", "seq2seq", "pretraining"])
def test_no_token_labels_without_logits(name, options):
    case, model = CASES[name], CASES[name].model().train()
    batch = {**collate(case.rows()), "labels": torch.full((8, 8), -100)}
    batch.pop("next_sentence_label", None)
    loss = model(**batch, **options).loss
    loss.backward()
    assert loss.item() == 0 and gradient(model).eq(0).all()


def test_no_objects():
    for name in LISTS:
        model, empty = CASES[name].model(), {"class_labels": torch.zeros(0).long(), "boxes": torch.zeros(0, 4)}
        labels = [{**empty, "masks": torch.zeros(0, 32, 32)}] * 2
        output = model(torch.rand(2, 3, 32, 32), labels=labels)
        boxes = [loss for term, loss in output.loss_dict.items() if "box" in term or "giou" in term]
        assert output.loss.isfinite() and len(boxes) >= 2 and not any(boxes), name


def test_mask_predict_with_a_standard_collator():
    """transformers' collators derive decoder inputs from the labels, which reveals the tokens to predict."""
    config = hf_tfm.TfmTransformerConfig(**CASES["seq2seq"].fields, decoding="mask_predict")
    model = hf_tfm.TfmTransformerForConditionalGeneration(config).eval()
    batch = collate(CASES["seq2seq"].rows())
    torch.manual_seed(0)
    inputs = model.prepare_decoder_input_ids_from_labels(labels=batch["labels"])
    masked = inputs == config.mask_token_id
    assert (masked.sum(1) >= 1).all() and not masked[batch["labels"] == -100].any()
    assert torch.equal(inputs[~masked], batch["labels"].where(batch["labels"] != -100, 0)[~masked])
    torch.manual_seed(0)
    expected = model(**batch).loss
    assert model(**batch, decoder_input_ids=inputs).loss.item() == pytest.approx(expected.item(), rel=1e-6)
    answers = batch["labels"].where(batch["labels"] != -100, 0)
    with pytest.raises(ValueError, match="needs mask_token_id = 4 in decoder_input_ids at the labels to predict"):
        model(**batch, decoder_input_ids=answers)
