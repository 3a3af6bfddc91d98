"""hf-tfm evaluate on detectors: scores against models called directly, image by image, and refused inputs."""

import json

import pytest
import torch
from datasets import load_dataset
from detector_data import (
    DETECTORS,
    NAMES,
    PANOPTIC,
    SIZES,
    THINGS,
    found_by_hand,
    objects_in,
    save_detector,
    segments_in,
    write_objects,
    write_panoptic,
)
from evaluation_helpers import values

from hf_tfm import cli
from hf_tfm.data.detection import fingerprint, scene_rows
from hf_tfm.data.source import load_splits
from hf_tfm.metrics import CocoAP, PanopticQuality
from hf_tfm.tasks.evaluation import evaluate, evaluate_task, lines
from hf_tfm.tasks.object_detection import AP_SCORES, PQ_SCORES, DetectionEvaluationArguments, DetectionTask

QUIET = {"progress": False}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """By kind and batching: a detector, its expected detections, and a data set derived from them."""
    folder, cases = tmp_path_factory.mktemp("detectors"), {}
    for kind in (*DETECTORS, *PANOPTIC):
        model = save_detector(folder / kind, kind)
        for together in (False, True)[: 1 if kind == "yolos" else 2]:
            boxes, maps = found_by_hand(model, together)
            rows, references = objects_in(boxes)
            data = write_objects(folder / f"{kind}-{together}", rows)
            case = {"model": model, "boxes": boxes, "maps": maps, "data": data, "references": references}
            if maps is not None:
                case["segments"] = segments_in(maps)
                case["panoptic"] = write_panoptic(folder / f"{kind}-{together}-panoptic", case["segments"])
            cases[kind, together] = case
    return cases


def without_nan(scores: dict, names: tuple[str, ...]) -> dict[str, float]:
    return {name: pytest.approx(scores[name], abs=1e-6) for name in names if scores[name] == scores[name]}


@pytest.mark.parametrize(
    ("kind", "together"), [("tfm", False), ("tfm", True), ("detr", False), ("detr", True), ("yolos", False)]
)
def test_box_scores_equal_the_model_called_directly(kind, together, cases, tmp_path):
    case, batch_size = cases[kind, together], 6 if together else 1
    metric = CocoAP(class_names=NAMES)
    metric.add_batch(predictions=case["boxes"], references=case["references"])
    expected = metric.compute()
    assert 0.05 < expected["AP"] < 0.95, "scores that tell something"
    file = tmp_path / "result.json"
    result = evaluate(case["model"], dataset_name=case["data"], batch_size=batch_size, output=str(file), **QUIET)
    assert values(result) == without_nan(expected, AP_SCORES)
    assert result["per_class"] == {
        name: {key: pytest.approx(value, abs=1e-6) for key, value in scores.items()}
        for name, scores in expected["per_class"].items()
        if scores["AP"] == scores["AP"]
    }
    assert (result["images"], result["rows"], result["left_out"]) == (len(SIZES), len(SIZES), {"unreadable": 0})
    assert result["fingerprint"] == fingerprint(scene_rows(load_splits(case["data"])["test"])[0])
    assert set(result["throughput"]) == {"model", "whole"} and min(result["throughput"].values()) > 0
    saved = json.loads(file.read_text())
    assert saved["metrics"] == result["metrics"]
    check_predictions(saved["predictions"], case["boxes"])


def check_predictions(predictions: list[dict], boxes: list[dict]) -> None:
    """The file holds detections with a score of at least 0.05 in COCO's result format, best first."""
    assert sorted(image["image_id"] for image in predictions) == list(range(len(SIZES)))
    for image in predictions:
        found = boxes[image["image_id"]]
        best = [i for i in found["scores"].argsort(descending=True).tolist() if found["scores"][i] >= 0.05]
        assert [NAMES[found["labels"][i]] for i in best] == [o["category"] for o in image["objects"]]
        for i, written in zip(best, image["objects"], strict=True):
            left, top, right, bottom = found["boxes"][i].tolist()
            assert written["bbox"] == pytest.approx([left, top, right - left, bottom - top], abs=0.02)
            assert written["score"] == pytest.approx(found["scores"][i].item(), abs=1e-4)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kind", list(PANOPTIC))
def test_segment_scores_equal_the_model_called_directly(kind, together, cases):
    case, batch_size = cases[kind, together], 6 if together else 1
    metric = PanopticQuality(class_names=NAMES, thing_ids=THINGS)
    metric.add_batch(predictions=case["maps"], references=case["segments"])
    expected = metric.compute()
    assert 0.05 < expected["PQ"] < 0.95
    result = evaluate(case["model"], dataset_name=case["panoptic"], batch_size=batch_size, **QUIET)
    found = values(result)
    assert {name: found[name] for name in PQ_SCORES if name in found} == without_nan(expected, PQ_SCORES)
    assert "AP" in found and all({"PQ", "SQ", "RQ"} <= scores.keys() for scores in result["per_class"].values())


def test_model_with_masks_can_be_scored_by_its_boxes(cases):
    case = cases["tfm_panoptic", False]
    metric = CocoAP(class_names=NAMES)
    metric.add_batch(predictions=case["boxes"], references=case["references"])
    result = evaluate(case["model"], dataset_name=case["data"], segments=False, batch_size=1, **QUIET)
    assert values(result) == without_nan(metric.compute(), AP_SCORES)


def test_box_format_does_not_change_scores(cases, tmp_path):
    """The same options as `detection_train --box_format`."""
    case = cases["tfm", False]
    rows = load_dataset(case["data"], split="test")

    def corners(row: dict) -> dict:
        boxes = [
            [x / row["width"], y / row["height"], (x + w) / row["width"], (y + h) / row["height"]]
            for x, y, w, h in (o["bbox"] for o in row["objects"])
        ]
        return {"objects": [{**o, "bbox": box} for o, box in zip(row["objects"], boxes, strict=True)]}

    rows.map(corners, features=rows.features).to_parquet(tmp_path / "data" / "test.parquet")
    options = {"box_format": "xyxy", "relative_boxes": True}
    one = evaluate(case["model"], dataset_name=str(tmp_path / "data"), batch_size=1, **options, **QUIET)
    other = evaluate(case["model"], dataset_name=case["data"], batch_size=1, **QUIET)
    assert values(one) == pytest.approx(values(other), abs=1e-4)


def test_model_without_padding_mask_needs_batch_size_1(cases):
    case = cases["yolos", False]
    with pytest.raises(ValueError, match="no input that marks padding: give batch_size=1"):
        evaluate(case["model"], dataset_name=case["data"], batch_size=6, **QUIET)


def test_workers_and_max_samples(cases):
    case = cases["tfm", False]
    one = evaluate(case["model"], dataset_name=case["data"], max_samples=4, batch_size=2, **QUIET)
    two = evaluate(
        case["model"], dataset_name=case["data"], max_samples=4, batch_size=2, dataloader_num_workers=1, **QUIET
    )
    assert one["metrics"] == two["metrics"] and one["images"] == 4


def test_bf16_computes_in_bf16(cases, monkeypatch):
    case, seen = cases["tfm", False], set()
    layer = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.add(layer(*a).dtype) or layer(*a))
    result = evaluate(case["model"], dataset_name=case["data"], mixed_precision="bf16", **QUIET)
    assert torch.bfloat16 in seen and result["mixed_precision"] == "bf16"
    assert values(result)["AP50"] > 0.05


def test_unreadable_images_are_skipped(cases, tmp_path):
    case = cases["tfm", False]
    rows, references = objects_in(case["boxes"])
    data = write_objects(tmp_path / "data", rows, bad=(0, 1, 4))
    result = evaluate(case["model"], dataset_name=data, batch_size=1, **QUIET)
    metric = CocoAP(class_names=NAMES)
    metric.add_batch(predictions=[case["boxes"][i] for i in (2, 3, 5)], references=[references[i] for i in (2, 3, 5)])
    assert values(result) == without_nan(metric.compute(), AP_SCORES)
    assert (result["images"], result["left_out"]) == (3, {"unreadable": 3})
    with pytest.raises(ValueError, match="max_bad_images=2"):
        evaluate(case["model"], dataset_name=data, max_bad_images=2, **QUIET)


# --- classes


def test_categories_are_matched_by_name_or_number(cases, tmp_path):
    case = cases["tfm", False]
    rows, _ = objects_in(case["boxes"])
    expected = values(evaluate(case["model"], dataset_name=case["data"], **QUIET))
    turned = [[{**o, "category": len(NAMES) - 1 - o["category"]} for o in objects] for objects in rows]
    by_name = write_objects(tmp_path / "names", turned, NAMES[::-1])
    assert values(evaluate(case["model"], dataset_name=by_name, **QUIET)) == expected
    by_number = write_objects(tmp_path / "numbers", rows, ["a", "b", "c", "d", "e"])
    result = evaluate(case["model"], dataset_name=by_number, match_labels="number", **QUIET)
    assert values(result) == expected and result["match_labels"] == "number"
    with pytest.raises(ValueError, match='5 of 5 categories are not classes of the model, the first is "a"'):
        evaluate(case["model"], dataset_name=by_number, **QUIET)
    more = write_objects(tmp_path / "more", rows, [*"abcdefg"])
    with pytest.raises(ValueError, match="7 categories and the model 5 classes"):
        evaluate(case["model"], dataset_name=more, match_labels="number", **QUIET)


def test_unnamed_and_duplicate_class_names(cases, tmp_path):
    """Such as transformers' default names, and COCO's 91 names with several "N/A"."""
    plain = save_detector(tmp_path / "plain", "tfm", id2label={i: f"LABEL_{i}" for i in range(5)})
    assert evaluate(plain, dataset_name=cases["tfm", False]["data"], **QUIET)["match_labels"] == "number"
    gaps = {0: "N/A", 1: "boat", 2: "cow", 3: "N/A", 4: "elm"}
    model = save_detector(tmp_path / "gaps", "tfm", id2label=gaps)
    rows, _ = objects_in(found_by_hand(model)[0])
    kept = [
        [{**o, "category": [1, 2, 4].index(o["category"])} for o in objects if o["category"] in (1, 2, 4)]
        for objects in rows
    ]
    data = write_objects(tmp_path / "data", kept, ["boat", "cow", "elm"])
    there = {("boat", "cow", "elm")[o["category"]] for objects in kept for o in objects}
    assert len(there) > 1 and set(evaluate(model, dataset_name=data, **QUIET)["per_class"]) == there


# --- command line and refused options


def test_the_command_line(cases, tmp_path, capsys):
    case = cases["tfm_panoptic", False]
    arguments = [
        "evaluate",
        case["model"],
        "--dataset_name",
        case["panoptic"],
        "--progress",
        "false",
        "--batch_size",
        "3",
    ]
    cli.main([*arguments, "--segments", "true", "--output", str(tmp_path / "scores.json")])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads((tmp_path / "scores.json").read_text())
    assert printed == lines(result)
    assert [line.split()[:2] for line in printed[:2]] == [["test", "AP"], ["test", "AP50"]]
    table = printed[len(result["metrics"]) : -3]
    assert table[0].split() == ["class", "AP", "AP50", "PQ", "SQ", "RQ"]
    assert [line.split()[0] for line in table[1:]] == list(result["per_class"])
    for line, scores in zip(table[1:], result["per_class"].values(), strict=True):
        shown = [scores.get(name) for name in table[0].split()[1:]]
        assert line.split()[1:] == ["-" if value is None else f"{value:.3f}" for value in shown]
    assert printed[-3].startswith("6 images; left out: 0 unreadable") and printed[-2].startswith("images/s: ")
    assert printed[-1].startswith("parameters: 0.")


@pytest.mark.parametrize("kind", ["tfm", pytest.param("detr", marks=pytest.mark.slow)])
def test_another_attention_of_the_encoder(kind, cases, capsys):
    """Clusters of a single query give the scores of the exact model, a single cluster gives others."""
    case = cases[kind, False]

    def scores(rounds: int, width: float) -> dict[str, float]:
        options = {"encoder_attention": "clustered", "encoder_attention_kwargs": {"rounds": rounds, "width": width}}
        return values(evaluate(case["model"], dataset_name=case["data"], **QUIET, **options))

    exact = values(evaluate(case["model"], dataset_name=case["data"], **QUIET))
    assert scores(64, 1e-3) == pytest.approx(exact, abs=1e-6)
    coarse = scores(1, 1e6)
    assert coarse["AP"] < exact["AP"] - 0.01
    words = ["--progress", "false", "--encoder_attention", "clustered", "--encoder_attention_kwargs"]
    cli.main(["evaluate", case["model"], "--dataset_name", case["data"], *words, "{rounds: 1, width: 1e6}"])
    assert f"AP              {coarse['AP']:8.3f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"encoder_attention_kwargs": {"rounds": 2}},
            "encoder_attention_kwargs needs encoder_attention, the method whose options they are",
        ),
        ({"segments": True}, "segments needs a model with masks, and"),
        ({"match_labels": "order"}, 'match_labels must be one of name, number, got "order"'),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"objects_column": "things"}, 'objects_column "things" is not a column of the data set'),
        ({"split": "dev"}, 'split "dev" is not a split of the data set'),
        (
            {"label_column": "label"},
            "label_column is for image classifiers and text classifiers.*; .* of the detectors",
        ),
        ({"seed": 1}, "seed is for masked autoencoders and language models.*; .* is one of the detectors"),
        ({"confusion": "a.png"}, "confusion is for image classifiers"),
    ],
)
def test_incompatible_options_are_refused(cases, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(cases["tfm", False]["model"], dataset_name=cases["tfm", False]["data"], **QUIET, **options)


def test_model_of_another_task_is_refused(models, cases):
    with pytest.raises(ValueError, match="is a tfm_vit model saved as TfmViTForImageClassification, not a detector"):
        evaluate_task(
            DetectionTask,
            DetectionEvaluationArguments(model=models["tfm"], dataset_name=cases["tfm", False]["data"], **QUIET),
        )
    with pytest.raises(ValueError, match=r"panoptic_categories\.json is missing"):
        evaluate(cases["tfm_panoptic", False]["model"], dataset_name=cases["tfm_panoptic", False]["data"], **QUIET)
