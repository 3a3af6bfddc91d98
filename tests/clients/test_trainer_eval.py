"""Trainer evaluates every head: loss, metrics, and the best model at the end."""

import math

import pytest
import torch
from head_cases import CASES, LISTS, collate
from transformers import Trainer, TrainingArguments
from transformers.utils.generic import can_return_loss, find_labels

every_head = pytest.mark.parametrize("name", CASES)


def trainer(name: str, folder, rows: list | None = None, **options) -> Trainer:
    case = CASES[name]
    args = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        per_device_eval_batch_size=3,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        learning_rate=1e-2,
        logging_strategy="no",
        eval_do_concat_batches=name not in LISTS,
        **options,
    )
    seen = []

    def metrics(prediction):
        seen.append(prediction)
        return {"seen": len(seen)}

    rows = rows or case.rows()
    made = Trainer(
        case.model(), args, data_collator=collate, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics
    )
    made.seen = seen
    return made


@every_head
def test_label_names_of_a_head(name):
    """Trainer treats each parameter with "label" in its name as a label that every batch has."""
    case = CASES[name]
    assert tuple(find_labels(case.model_class)) == case.targets
    assert can_return_loss(case.model_class) == (not case.targets)


@pytest.mark.client("Trainer: evaluation", "transformers")
@every_head
def test_evaluation(name, tmp_path):
    made = trainer(name, tmp_path)
    found = made.evaluate()
    expected = made.model.eval()(**collate(CASES[name].rows())).loss.item()
    assert math.isfinite(found["eval_loss"]) and found["eval_seen"] == 1
    # Trainer averages batches of three, three and two rows weighted by their rows.
    assert found["eval_loss"] == pytest.approx(expected, rel=0.25)
    (prediction,) = made.seen
    if name not in LISTS and CASES[name].targets == ("labels",):
        assert prediction.label_ids.tolist() == CASES[name].columns["labels"].tolist()


@pytest.mark.client("Trainer: best model at the end", "transformers")
@pytest.mark.parametrize("name", ["masked", "pretraining", "causal", "vit", "autoencoder", "seq2seq", "detection"])
def test_the_best_model_at_the_end(name, tmp_path):
    options = {"eval_strategy": "epoch", "save_strategy": "epoch", "metric_for_best_model": "eval_loss"}
    made = trainer(name, tmp_path, num_train_epochs=2, load_best_model_at_end=True, save_total_limit=1, **options)
    made.train()
    losses = [entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry]
    assert len(losses) == 2 and made.state.best_metric == pytest.approx(min(losses))
    assert made.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-4)


@pytest.mark.parametrize("name", ["masked", "causal", "seq2seq", "tagger"])
def test_batch_without_labels_gives_no_nan(name, tmp_path):
    """A batch of one row without a label."""
    rows = CASES[name].rows()
    rows[3] = {**rows[3], "labels": torch.full_like(rows[3]["labels"], -100)}
    made = trainer(name, tmp_path, rows)
    made.args.per_device_eval_batch_size = 1
    assert math.isfinite(made.evaluate()["eval_loss"])


def test_pretraining_with_token_labels_only(tmp_path):
    """Like transformers' BertForPreTraining, it has two kinds of labels; the data set provides one."""
    rows = [{key: row[key] for key in ("input_ids", "labels")} for row in CASES["pretraining"].rows()]
    made = trainer("pretraining", tmp_path, rows, label_names=["labels"])
    found = made.evaluate()
    assert math.isfinite(found["eval_loss"]) and found["eval_seen"] == 1
