"""The detection recipe, run from the command line on small scenes in every supported layout."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel
from matplotlib.image import imread
from processes import run_ranks
from recipe_helpers import ROOT, arguments_of, history, record
from scene_recipes import LAYOUTS, SCENES, command_line, scenes, train, write_coco, write_hub
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    DetrConfig,
    DetrForObjectDetection,
    TimmBackboneConfig,
    pipeline,
)
from vision_recipes import distance, scores, weights

from hf_tfm.options import parse_arguments
from hf_tfm.tasks.evaluation import evaluate
from hf_tfm.tasks.object_detection import DetectionArguments

RECIPE = ROOT / "recipes" / "detection_train.py"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def splits():
    return scenes()


@pytest.fixture(scope="module")
def data(splits, tmp_path_factory):
    return write_hub(tmp_path_factory.mktemp("scenes") / "hub", splits)


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A run of six steps with two evaluations."""
    return train(data, tmp_path_factory.mktemp("trained") / "run", max_steps=6, eval_steps=3)


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run of two steps."""
    return train(data, tmp_path_factory.mktemp("plain") / "run")


# --- outputs of a run


def test_the_run(trained):
    found = record(trained)
    assert (found.task, found.model_type, found.base_model) == ("object-detection", "tfm_detr", None)
    assert found.data["rows"] == SCENES and found.data["license"] == "cc0-1.0"
    assert found.training["steps"] == 6 and found.training["item"] == "images"
    assert {row["split"] for row in found.metrics} == {"validation", "test"}
    assert {"AP", "AP50", "AR100"} <= scores(trained, "test").keys()
    evaluations = [row["evaluation"] for row in history(trained) if "evaluation" in row]
    assert [set(e) for e in evaluations] == [{"loss", "class", "box", "giou", "AP", "AP50"}] * 2
    card = (trained / "README.md").read_text()
    assert "AutoModelForObjectDetection.from_pretrained" in card and "trained from scratch" in card
    assert all(f"| {row['split']} | {row['name']} |" in card for row in found.metrics)
    assert imread(trained / "training_curve.png").shape[:2] == (840, 960), "with a panel of scores"


def test_plots_of_every_evaluation(trained, data, tmp_path):
    files = sorted(path.name for path in (trained / "predictions").iterdir())
    assert files == ["step-00000003.png", "step-00000006.png"]
    assert imread(trained / "predictions" / files[0]).shape[1] > 400
    assert "](predictions.png)" in (trained / "README.md").read_text(), "the model card shows the last plot"
    assert (trained / "predictions.png").read_bytes() == (trained / "predictions" / files[1]).read_bytes()
    other = train(data, tmp_path / "run", max_steps=6, eval_steps=3, num_pictures=0)
    assert not (other / "predictions").exists() and "predictions.png" not in (other / "README.md").read_text()
    assert distance(trained, other) == 0.0, "plots must not affect training"


def test_saved_model_loads_and_has_the_same_scores(trained, data):
    model, processor = (
        AutoModelForObjectDetection.from_pretrained(trained),
        AutoImageProcessor.from_pretrained(trained),
    )
    assert [model.config.id2label[i] for i in range(10)] == [str(digit) for digit in range(10)]
    assert (processor.size.shortest_edge, processor.size.longest_edge) == (64, 96)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for split in ("validation", "test"):
        result = evaluate(str(trained), dataset_name=str(data), split=split, batch_size=4, progress=False)
        again = {row["name"]: row["value"] for row in result["metrics"]}
        for name, value in scores(trained, split).items():
            assert again[name] == pytest.approx(value, abs=1e-6), name


def test_pipeline_runs(trained, splits):
    found = pipeline("object-detection", model=str(trained), threshold=0.0)(splits["test"][0]["image"])
    assert len(found) == 9
    assert all(box["label"] in "0123456789" and set(box["box"]) == {"xmin", "ymin", "xmax", "ymax"} for box in found)


def test_stored_arguments_are_a_config(trained, data, tmp_path):
    """results.json and the model card hold the options as given."""
    file = tmp_path / "arguments.yaml"
    file.write_text(json.dumps(record(trained).arguments))
    kind = arguments_of(RECIPE)
    given = command_line(data, trained, max_steps=6, eval_steps=3)
    # The record holds only the last component of paths.
    first = replace(parse_arguments(kind, RECIPE, given), output_dir=trained.name, dataset_name=data.name)
    assert parse_arguments(kind, RECIPE, ["--config", str(file)]) == first


# --- any data layout, micro-batch size and interruption


@pytest.mark.parametrize("layout", ["coco", "voc"])
def test_data_layout_does_not_matter(layout, splits, plain, tmp_path):
    """The same scenes in COCO's and Pascal VOC's layouts, and as Hub columns."""
    folder = LAYOUTS[layout](tmp_path / layout, splits)
    other = train(folder, tmp_path / "other")
    assert distance(plain, other) == 0.0
    for split in ("validation", "test"):
        one, two = scores(plain, split), scores(other, split)
        # VOC has no object areas, by which the other scores distinguish small and large objects.
        assert all(one[name] == two[name] for name in ("AP", "AP50", "AP75", "AR100"))


OPTIONS = {
    "plain": {},
    "parts": {"micro_batch_size": 2, "augmentation": "{scales: [56, 72], max_size: 90, color_jitter: 0.3}"},
    "ema": {"ema_decay": 0.5, "final_weights": "ema", "max_grad_norm": 0.1},
}


@pytest.mark.parametrize(
    ("kind", "workers"), [("plain", 1), *(pytest.param(kind, 0, marks=pytest.mark.slow) for kind in ("parts", "ema"))]
)
def test_a_resumed_run_is_bit_equal(kind, workers, data, tmp_path, capsys):
    """A killed run leaves only its last checkpoint; the number of workers does not matter."""
    overrides = {**OPTIONS[kind], "max_steps": 5, "save_steps": 1, "save_total_limit": 9, "eval_steps": 5}
    whole = train(data, tmp_path / "whole", **overrides)
    part = train(data, tmp_path / "part", dataloader_num_workers=workers, **overrides)
    for step in (3, 4, 5):
        shutil.rmtree(part / "checkpoints" / f"step-{step:08d}")
    for name in ("results.json", "model.safetensors", "predictions/step-00000005.png"):
        (part / name).unlink()
    capsys.readouterr()
    train(data, part, dataloader_num_workers=workers, **overrides)
    assert "resuming from" in capsys.readouterr().out
    assert distance(whole, part) == 0.0
    assert record(whole).metrics == record(part).metrics
    plots = [(folder / "predictions" / "step-00000005.png").read_bytes() for folder in (whole, part)]
    assert plots[0] == plots[1]


def test_options_change_the_weights(data, trained, tmp_path):
    """The options of the test above have an effect: no two runs end with equal weights."""
    runs = [
        train(data, tmp_path / kind, max_steps=6, eval_steps=6, **overrides) for kind, overrides in OPTIONS.items()
    ]
    assert all(distance(one, other) > 1e-6 for i, one in enumerate(runs) for other in runs[:i])


def test_micro_batches_and_two_processes_give_the_same_weights(data, tmp_path):
    """Two processes of hf-tfm run (gloo) that share each step, and one process with micro-batches of one scene."""
    overrides = {"max_steps": 3, "adam_epsilon": 1e-4}
    alone = train(data, tmp_path / "alone", **overrides)
    single = train(data, tmp_path / "single", micro_batch_size=1, **overrides)
    assert distance(alone, single) < 5e-6  # from rounding; the steps are 1e-3 long
    command = ("-m", "hf_tfm.cli", "run", "detection_train")
    run_ranks(*command, *command_line(data, tmp_path / "two", **overrides), cwd=ROOT)
    assert distance(alone, tmp_path / "two") < 5e-6
    for mine, theirs in zip(record(alone).metrics, record(tmp_path / "two").metrics, strict=True):
        assert mine == {**theirs, "value": pytest.approx(theirs["value"], abs=1e-6)}
    assert record(tmp_path / "two").hardware["count"] == 2
    plots = [sorted(path.name for path in (tmp_path / name / "predictions").iterdir()) for name in ("alone", "two")]
    assert plots[0] == plots[1] != []


# --- initialization from another model


def renamed(splits, names):
    """The scenes with other category names."""

    def change(rows):
        features = rows.features.copy()
        objects = dict(features["objects"].feature)
        objects["category"] = ClassLabel(names=names)
        features["objects"] = type(features["objects"])(objects)
        return rows.cast(features)

    return type(splits)({split: change(rows) for split, rows in splits.items()})


def test_initialization_with_the_same_classes_keeps_every_weight(trained, data, tmp_path, caplog):
    folder = train(data, tmp_path / "run", model_name_or_path=trained, learning_rate=1e-6, max_steps=3)
    assert 0 < distance(trained, folder) < 1e-5
    assert "initialised randomly" not in caplog.text
    assert record(folder).base_model == trained.name
    assert f"initialised from `{trained.name}` and trained" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("names", "model", "fresh"),
    [
        pytest.param([f"digit {i}" for i in range(10)], None, "class_labels_classifier", id="names"),
        pytest.param([str(i) for i in range(12)], None, "class_labels_classifier", id="more", marks=pytest.mark.slow),
        pytest.param(
            [str(i) for i in range(10)], "{num_queries: 12}", "query_position_embeddings.weight", id="queries"
        ),
    ],
)
def test_initialization_with_other_classes_resets_the_class_head_and_logs_it(
    trained, splits, names, model, fresh, tmp_path, caplog
):
    """The same number of other classes, more classes, and more queries; all other weights are kept."""
    old = weights(trained)
    folder = write_hub(tmp_path / "data", renamed(splits, names))
    start = {"model_name_or_path": trained, "learning_rate": 1e-9, "max_steps": 1, "model": model}
    new = weights(train(folder, tmp_path / "run", **start))
    moved = {name for name in new if new[name].shape != old[name].shape or (new[name] - old[name]).abs().max() > 1e-6}
    assert moved and all(fresh in name for name in moved)
    (message,) = [r.getMessage() for r in caplog.records if "initialised randomly" in r.getMessage()]
    assert fresh in message
    config = AutoModelForObjectDetection.from_pretrained(tmp_path / "run").config
    assert [config.id2label[i] for i in range(len(names))] == names


def test_fewer_queries_keep_the_first_ones(trained, data, tmp_path, caplog):
    start = {"model_name_or_path": trained, "learning_rate": 1e-9, "max_steps": 1, "model": "{num_queries: 5}"}
    folder = train(data, tmp_path / "run", **start)
    name = "model.query_position_embeddings.weight"
    assert (weights(folder)[name] - weights(trained)[name][:5]).abs().max() < 1e-6
    assert "initialised randomly" not in caplog.text
    assert AutoModelForObjectDetection.from_pretrained(folder).config.num_queries == 5


@pytest.mark.parametrize(
    ("model", "expected"), [(None, True), pytest.param("{auxiliary_loss: false}", False, marks=pytest.mark.slow)]
)
def test_auxiliary_losses_are_on_for_a_stock_model(model, expected, trained, data, tmp_path):
    """transformers' configuration disables auxiliary losses by default and writes that to its files."""
    stock = DetrForObjectDetection(
        DetrConfig(
            backbone_config=TimmBackboneConfig(backbone="test_resnet", out_indices=[-1]),
            **{"d_model": 32, "encoder_layers": 1, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32},
            **{"encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 9, "num_labels": 10},
        )
    )
    stock.save_pretrained(tmp_path / "stock")
    AutoImageProcessor.from_pretrained(trained).save_pretrained(tmp_path / "stock")
    assert not stock.config.auxiliary_loss
    folder = train(data, tmp_path / "run", model_name_or_path=tmp_path / "stock", max_steps=1, model=model)
    assert AutoModelForObjectDetection.from_pretrained(folder).config.auxiliary_loss is expected


def test_mismatched_weights_are_refused(trained, data, tmp_path):
    with pytest.raises(ValueError, match=r"weights of model_name_or_path .* do not fit it: .*encoder"):
        train(data, tmp_path / "run", model_name_or_path=trained, model="{encoder_ffn_dim: 48}")
    assert not (tmp_path / "run" / "history.jsonl").exists()


def test_missing_model_is_reported_before_anything_is_written(empty_hub, data, tmp_path):
    with pytest.raises(
        ValueError, match=r'model_name_or_path "runs/no-such-run" is neither a local folder nor found on the Hub'
    ):
        train(data, tmp_path / "run", model_name_or_path="runs/no-such-run")
    assert any("runs/no-such-run" in path for _, path in empty_hub.requests)
    assert not (tmp_path / "run").exists()


def test_categories_unknown_to_training_are_refused(splits, tmp_path):
    folder = write_coco(tmp_path / "data", splits)
    file = folder / "annotations" / "instances_val2017.json"
    file.write_text(file.read_text().replace('"name": "9"', '"name": "nine"'))
    with pytest.raises(ValueError, match='1 of 10 categories are not classes of the model, the first is "nine"'):
        train(folder, tmp_path / "run")
    assert not (tmp_path / "run" / "history.jsonl").exists(), "no training step must run"


# --- options


KEPT = ("num_queries", "nms_threshold")


def test_a_preset_for_a_backbone_also_serves_a_saved_detector(capsys):
    """--model_name_or_path replaces what the preset says about a new model, except for two fields."""

    def parse(*words):
        recipe = ROOT / "recipes" / "detection_train.py"
        return parse_arguments(DetectionArguments, recipe, ["--config", "finetune_small", *words])

    new, other, saved = parse(), parse("--backbone", "resnet18"), parse("--model_name_or_path", "x")
    assert new.pretrained_backbone and new.model["backbone"] == "tf_efficientnet_lite0"
    assert other.pretrained_backbone and other.model["backbone"] == "resnet18"
    assert new.model["backbone_norm"] == "frozen" and saved.model == {name: new.model[name] for name in KEPT}
    assert new.rate_factors["backbone"] == 0.4 and saved.rate_factors == {}, "DETR has no reference_points"
    assert (saved.model_name_or_path, saved.backbone, saved.pretrained_backbone) == ("x", None, False)
    chosen = parse("--model_name_or_path", "x", "--model.dropout", "0.2", "--rate_factors", "{backbone: 0.5}")
    assert chosen.model == {**saved.model, "dropout": 0.2} and chosen.rate_factors == {"backbone": 0.5}
    assert chosen.augmentation == new.augmentation and chosen.num_train_epochs == new.num_train_epochs
    assert parse("--model_name_or_path=null") == new
    assert parse("--model_name_or_path", "@x").model == saved.model, "a name need not be YAML"
    with pytest.raises(SystemExit):
        parse("--model_name_or_path", "x", "--backbone", "resnet18")
    assert "model_name_or_path has its own backbone: do not give backbone with it" in capsys.readouterr().err


MISFITS = {
    "metric": (
        {"metric_for_best_model": "accuracy"},
        'metric_for_best_model must be "loss", "AP" or "AP50", got "accuracy"',
    ),
    "sides": ({"shortest_side": 100}, "shortest_side must be at most longest_side = 96, got 100"),
    "field": ({"model": "{num_querys: 9}"}, "model.num_querys is not a field of TfmDetrConfig that can be chosen"),
    "things": ({"model": "{thing_ids: 0}"}, "model.thing_ids is not a field of TfmDetrConfig that can be chosen"),
    "width": ({"model": "{d_model: 30}"}, "d_model must be a multiple of 8 for encoder_attention_heads"),
    "size": ({"size": "giant"}, 'size must be one of tiny, small, base, got "giant"'),
    "frozen": (
        {"size": "base", "model": None},
        'model.backbone_norm "frozen" is for pretrained weights',
    ),
    "norm": ({"pretrained_backbone": "true"}, 'model.backbone_norm must be "frozen" or "batch", got "group"'),
    "both": (
        {"model_name_or_path": "x", "pretrained_backbone": "true", "model": None, "size": "base"},
        "model_name_or_path has its own backbone: do not give pretrained_backbone with it",
    ),
    "backbone": (
        {"model_name_or_path": "x", "backbone": "resnet18", "model": None, "size": "base"},
        "model_name_or_path has its own backbone: do not give backbone with it",
    ),
    "pictures": ({"num_pictures": -1}, "num_pictures must be at least 0, got -1"),
    "splits": ({"holdout": 3}, "exactly one of validation_split and holdout, got validation and 3"),
    "crop": ({"augmentation": "{crop: 2.0}"}, "crop must be in [0, 1], got 2.0"),
    "scales": ({"augmentation": "{scales: []}"}, "scales"),
    "lengths": ({"num_train_epochs": 1}, "exactly one of num_train_epochs and max_steps, got 1.0 and 2"),
}


@pytest.mark.parametrize(("overrides", "message"), MISFITS.values(), ids=list(MISFITS))
def test_incompatible_options_are_refused(overrides, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        train(data, tmp_path / "run", **overrides)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


UNFIT_FOR_THE_DATA = {
    "split": ({"validation_split": "dev"}, 'validation_split "dev" is not a split of the data set; it has'),
    "test split": ({"test_splits": "[best]"}, 'test_splits "best" is not a split of the data set'),
    "objects": ({"objects_column": "things"}, 'objects_column "things" is not a column of the data set; it has'),
    "image": ({"image_column": "photo"}, 'image_column "photo" is not a column of the data set'),
    "holdout": ({"validation_split": "null", "holdout": 14}, "holdout must be below the 14 rows of train"),
}


@pytest.mark.parametrize(("overrides", "message"), UNFIT_FOR_THE_DATA.values(), ids=list(UNFIT_FOR_THE_DATA))
def test_options_that_do_not_fit_the_data_are_refused(overrides, message, data, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        train(data, tmp_path / "run", **overrides)
    assert not (tmp_path / "run" / "history.jsonl").exists(), "no training step must run"


def test_boxes_in_another_format(splits, plain, tmp_path):
    """Corner coordinates relative to the image size, declared as such, give the same boxes."""

    def corners(row):
        for found in row["objects"]:
            x, y, w, h = found["bbox"]
            found["bbox"] = [x / 64, y / 64, (x + w) / 64, (y + h) / 64]
        return row

    other = write_hub(tmp_path / "corners", type(splits)({name: rows.map(corners) for name, rows in splits.items()}))
    with pytest.raises(ValueError, match='give box_format="xyxy" and relative_boxes=True'):
        train(other, tmp_path / "refused")
    again = train(other, tmp_path / "run", box_format="xyxy", relative_boxes="true")
    before, after = weights(plain), weights(again)
    assert all(torch.allclose(value, after[name], atol=1e-6) for name, value in before.items())
