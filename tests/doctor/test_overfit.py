"""The overfitting test: eight healthy images can be memorized, contradictory data or a broken loss cannot."""

import dataclasses

import pytest
from planted import MODEL, as_splits, boxes_of, examine, healthy, only, plant

from hf_tfm.doctor import overfit
from hf_tfm.doctor.detection import parse
from hf_tfm.doctor.splits import Case, Split, read_splits
from hf_tfm.doctor.weights import add_model


@pytest.fixture
def few_steps(monkeypatch):
    """Limit the test to the steps that healthy images need."""
    monkeypatch.setattr(overfit, "STEPS", 120)
    monkeypatch.setattr(overfit, "FIRST_SCORE", 120)


def test_healthy_images_are_memorized(monkeypatch, few_steps):
    found = only(examine(monkeypatch, as_splits(healthy()), learn=True), "overfit", "ok")
    assert "on 8 training images after 120 steps, 64 pixels, the run's own model" in found.message


@pytest.mark.slow
def test_one_image_with_different_targets_is_not_memorized(monkeypatch, few_steps):
    def planted(rows):
        for row in rows["train"]:
            row["image"] = rows["train"][0]["image"]

    found = only(examine(monkeypatch, as_splits(plant(planted)), learn=True), "overfit")
    assert "limit: AP above 0.9 within 120 steps" in found.message
    assert found.sample.split == "train" and 100 <= found.sample.image_id < 124


def test_loss_without_box_terms_fails(monkeypatch, few_steps):
    model = MODEL + ", bbox_loss_coefficient: 0, giou_loss_coefficient: 0}"
    found = only(examine(monkeypatch, as_splits(healthy()), learn=True, model=model), "overfit")
    assert found.remedy.endswith("check the loss weights and the model's arguments")


def test_large_model_gets_only_a_warning(monkeypatch):
    for name, value in {"SMALL_MODEL": 1000, "STEPS": 2, "MORE_STEPS": 3, "FIRST_SCORE": 6}.items():
        monkeypatch.setattr(overfit, name, value)
    found = examine(monkeypatch, as_splits(healthy()), learn=True, full=True)
    assert "after 6 steps, 64 pixels, the run's own model" in only(found, "overfit", "warning").message


def test_overfitting_is_skipped_for_broken_data(monkeypatch):
    def planted(rows):
        for found in boxes_of(rows):
            found["category"] += 1

    found = only(examine(monkeypatch, as_splits(plant(planted)), learn=True), "overfit", "skipped")
    assert found.message == "correct the data first"


# --- choice of images and model


def case_of(monkeypatch, data, **options) -> Case:
    examine(monkeypatch, data)  # from here on, "planted" names this data
    given = {"config": "digits", "data": "planted", "test_splits": "[]", "model": MODEL + "}"} | options
    _, args, _ = parse([word for name, value in given.items() for word in (f"--{name}", str(value))])
    case = Case(args, read_splits(args))
    add_model(case)
    return case


def test_readable_images_with_the_fewest_objects_are_chosen(monkeypatch):
    def planted(rows):
        for row in rows["train"][:12]:
            row["objects"] = row["objects"][:1]
        rows["train"][1]["objects"][0]["bbox"][2:] = [3, 3]
        rows["train"][2]["image"] = rows["train"][2]["image"][:90]
        rows["train"][3]["objects"] = []

    split: Split = case_of(monkeypatch, as_splits(plant(planted))).train
    chosen = overfit.easiest(split, most=10)
    assert len(chosen) == 8 and set(chosen) <= {0, *range(4, 12)}
    assert len(overfit.easiest(split, most=0)) == 0
    few = plant(lambda rows: rows["train"].__delitem__(slice(3, None)))
    assert sorted(overfit.easiest(case_of(monkeypatch, as_splits(few)).train, most=10)) == [0, 1, 2]


def test_replacement_model_has_the_losses_of_the_run(monkeypatch):
    model = MODEL + ", eos_coefficient: 0.3, giou_cost: 7, auxiliary_loss: false, dropout: 0.2}"
    case = case_of(monkeypatch, as_splits(healthy()), model=model)
    itself, name = overfit.choose_model(case, full=False, most=3)
    assert name == "the run's own model" and itself.config.d_model == 64 and itself.config.dropout == 0
    monkeypatch.setattr(overfit, "SMALL_MODEL", 1000)
    small, name = overfit.choose_model(case, full=False, most=8)
    assert name.startswith("a small model instead of one with 0 million weights")
    assert (small.config.eos_coefficient, small.config.giou_cost, small.config.auxiliary_loss) == (0.3, 7, False)
    assert (small.config.d_model, small.config.num_queries, small.config.dropout) == (128, 16, 0)
    assert small.config.id2label == case.config.id2label
    assert overfit.choose_model(case, full=True, most=3)[0].config.d_model == 64


def test_image_size_suits_the_smallest_objects(monkeypatch):
    case = case_of(monkeypatch, as_splits(healthy()), shortest_side=800, longest_side=1333)
    rows = case.train.rows.select(range(4))
    assert overfit.shortest_side(case, rows, stride=16) == 128
    tiny = plant(lambda rows: [found["bbox"].__setitem__(slice(2, 4), [1, 1]) for found in boxes_of(rows)])
    small = case_of(monkeypatch, as_splits(tiny), shortest_side=800, longest_side=1333)
    assert overfit.shortest_side(small, small.train.rows.select(range(4)), stride=16) == 256
    small.args = dataclasses.replace(small.args, shortest_side=100, longest_side=200)
    assert overfit.shortest_side(small, small.train.rows.select(range(4)), stride=16) == 100
