"""Text classification: batches, counts, losses, the inputs of each model type, and predictions."""

import numpy as np
import pytest
import torch
from text_tasks import (
    CASES,
    VOCABULARY,
    bert,
    classification,
    examples,
    gpt,
    loader,
    numbers,
    prediction,
    tokenizer,
    train_steps,
)
from torch.nn.functional import cross_entropy
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
)

from hf_tfm.tasks.text_classification import (
    IGNORE_LABEL,
    TextClassificationArguments,
    TextClassificationTask,
    TextCollator,
    predict,
    score,
)
from hf_tfm.tasks.text_model import input_names


def batch_of(task, rows, hidden=False):
    return task.collator()(rows, list(range(len(rows))), 0, hidden)


def test_batch_is_padded_to_its_longest_text():
    rows = examples(5)
    batch = batch_of(classification(), rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (5, max(lengths))
    assert batch["attention_mask"].sum(dim=1).tolist() == lengths
    for i, row in enumerate(rows):
        assert batch["input_ids"][i].tolist() == row["input_ids"] + [0] * (max(lengths) - lengths[i])
        assert batch["token_type_ids"][i, : lengths[i]].tolist() == row["token_type_ids"]
    assert batch["labels"].tolist() == [0, 1, 2, 0, IGNORE_LABEL]
    assert batch["indices"].tolist() == [0, 1, 2, 3, 4] and batch["texts"] == 5


def test_equal_lengths_need_no_mask():
    assert "attention_mask" not in batch_of(classification(), examples(1) * 3)


@pytest.mark.parametrize("name", list(CASES))
def test_loss_sums_and_counts(name):
    make, build = CASES[name]
    task, model = make(), build().eval()
    rows = examples(7, numbers=name == "numbers")
    batch = batch_of(task, rows)
    count, losses = task.count(batch), task.losses(model, batch)
    assert count.keys() == losses.keys() and count["label"] == 6
    expected = 0.0
    tokens, language = 0, 0.0
    for row in rows:
        ids = torch.tensor([row["input_ids"]])
        types = {} if name == "language" else {"token_type_ids": torch.tensor([row["token_type_ids"]])}
        output = model(ids, **types, output_hidden_states=True)
        if row["label"] is not None and name == "numbers":
            expected += (output.logits[0, 0] - row["label"]) ** 2
        elif row["label"] is not None:
            expected += cross_entropy(output.logits, torch.tensor([row["label"]]))
        if name == "language":
            scores = output.hidden_states[-1] @ model.transformer.wte.weight.T
            language += 0.5 * cross_entropy(scores[0, :-1], ids[0, 1:], reduction="sum")
            tokens += len(row["input_ids"]) - 1
    assert losses["label"].item() == pytest.approx(float(expected.detach()), rel=1e-5)
    assert (count.get("language", 0), torch.as_tensor(losses.get("language", 0.0)).item()) == (
        tokens,
        pytest.approx(torch.as_tensor(language).item(), rel=1e-5),
    )


@pytest.mark.parametrize("name", list(CASES))
def test_dummy_batch_has_no_effect(name):
    make, build = CASES[name]
    task, model = make(), build()
    batch = batch_of(task, examples(3, numbers=name == "numbers"), hidden=True)
    assert set(task.count(batch).values()) == {0}
    losses = task.losses(model, batch)
    assert [value.item() for value in losses.values()] == [0.0] * len(losses)
    sum(losses.values()).backward()
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("name", list(CASES))
def test_micro_batches_equal_one_batch(accelerator, name):
    whole, parts = train_steps(accelerator, name, None), train_steps(accelerator, name, 2)
    assert max((whole[key] - parts[key]).abs().max().item() for key in whole) < 1e-6


def test_methods_used_by_distillation():
    task, model = classification(), bert().eval()
    batch = batch_of(task, examples(6))
    assert set(task.inputs(batch)) == {"input_ids", "attention_mask", "token_type_ids"}
    assert task.target_positions(batch) is None and task.term in task.count(batch)
    output = model(**task.inputs(batch))
    assert torch.equal(task.output_losses(output, output.logits, batch)["label"], task.losses(model, batch)["label"])


def test_unknown_class_is_refused():
    with pytest.raises(ValueError, match="label 5 of text 1 is not a class of the model"):
        batch_of(classification(), [{**row, "label": 5 * i} for i, row in enumerate(examples(2))])


def test_hidden_labels():
    assert batch_of(classification(), [{**examples(1)[0], "label": -1}])["labels"].tolist() == [IGNORE_LABEL]
    labels = batch_of(numbers(), [{**examples(1)[0], "label": label} for label in (-1.5, None)])["labels"]
    assert labels[0] == -1.5 and labels[1].isnan()


def test_invalid_arguments_are_refused():
    bare = tokenizer()
    bare.pad_token = None
    with pytest.raises(ValueError, match="has no pad_token"):
        TextCollator(bare, None)
    with pytest.raises(ValueError, match=r"language_weight must be at least 0, got -0.5"):
        TextClassificationArguments(dataset_name="x", output_dir="y", max_steps=1, language_weight=-0.5)


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "pad_token_id": 0,
}
ENDS = {"bos_token_id": 3, "eos_token_id": 3}
MODELS = {
    "tfm_bert": (bert, True),
    "tfm_bert without segments": (lambda: bert(type_vocab_size=0), False),
    "tfm_gpt": (gpt, False),
    "bert": (lambda: BertForSequenceClassification(BertConfig(**SMALL, num_labels=3)), True),
    "distilbert": (
        lambda: DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=VOCABULARY, dim=8, hidden_dim=8, n_layers=1, n_heads=1, num_labels=3)
        ),
        False,
    ),
    "gpt2": (lambda: GPT2ForSequenceClassification(GPT2Config(**SMALL, **ENDS, num_labels=3)), False),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_models_receive_only_supported_inputs(accelerator, name):
    """Batched predictions equal those of each text alone."""
    build, segments = MODELS[name]
    model = build().eval()
    names = input_names(model)
    assert ("token_type_ids" in names) is segments
    task = TextClassificationTask.for_model(model, tokenizer())
    rows = examples(9)
    found = predict(accelerator, task, model, loader(task, rows, batch_size=4))
    for i, row in enumerate(rows):
        inputs = {name: torch.tensor([row[name]]) for name in names if name in row}
        assert np.allclose(found.logits[i], model(**inputs).logits.detach()[0].numpy(), atol=1e-5)


def test_predictions_are_in_order_and_scored(accelerator):
    found = prediction(accelerator, 14)
    labels = [IGNORE_LABEL if row["label"] is None else row["label"] for row in examples(14)]
    assert found.labels.tolist() == labels
    known = np.array(labels) != IGNORE_LABEL
    scores = score(found, ["accuracy", "f1_macro"])
    assert list(scores) == ["accuracy", "f1_macro"]
    assert scores["accuracy"] == np.mean(found.logits.argmax(axis=1)[known] == np.array(labels)[known])
    shifted = found.logits - np.log(np.exp(found.logits).sum(axis=1, keepdims=True))
    assert found.loss == pytest.approx(-shifted[np.flatnonzero(known), np.array(labels)[known]].mean(), rel=1e-5)


def test_regression_is_scored(accelerator):
    make, build = CASES["numbers"]
    task = make()
    found = predict(accelerator, task, build(), loader(task, examples(12, numbers=True)))
    known = ~np.isnan(found.labels)
    assert known.sum() == 10 and found.predicted.shape == (12,)
    assert score(found, ["pearson"])["pearson"] == pytest.approx(
        np.corrcoef(found.predicted[known], found.labels[known])[0, 1], abs=1e-5
    )
    assert found.loss == pytest.approx(((found.predicted - found.labels)[known] ** 2).mean(), rel=1e-5)
