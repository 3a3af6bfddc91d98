"""hf-tfm evaluate on image models: scores against models called directly, and refused inputs."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel
from evaluation_helpers import (
    COUNT,
    LABELS,
    NAMES,
    QUIET,
    SIZES,
    photos,
    ranked,
    save_model,
    save_rows,
    values,
)
from matplotlib.image import imread
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    BertConfig,
    BertModel,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    TimmWrapperImageProcessor,
    ViTImageProcessor,
)

from hf_tfm import (
    TfmMAEConfig,
    TfmMAEModel,
    TfmViTConfig,
    TfmViTForImageClassification,
    TfmViTModel,
    cli,
)
from hf_tfm.data.batching import rng
from hf_tfm.data.pixels import Pixels, WholeProcessor, suitable
from hf_tfm.tasks import stopwatch
from hf_tfm.tasks.evaluation import evaluate, evaluate_task
from hf_tfm.tasks.image_classification import ImageClassificationEvaluationArguments, ImageClassificationTask
from hf_tfm.tasks.masked_image import MaskedImageEvaluationArguments, MaskedImageTask
from hf_tfm.tasks.stopwatch import Stopwatch


@pytest.mark.parametrize("name", ["tfm", "vit", "convnext", "timm"])
def test_scores_equal_the_model_called_directly(name, models, data, tmp_path):
    top = ranked(models[name])
    file = tmp_path / "result.json"
    result = evaluate(models[name], dataset_name=data, output=str(file), **QUIET)
    right = [ranking.tolist().index(label) for ranking, label in zip(top, LABELS, strict=True)]
    assert len({*top[:, 0]}) > 1
    assert values(result) == {"accuracy": np.mean(np.equal(right, 0)), "top5_accuracy": np.mean(np.less(right, 5))}
    assert (result["images"], result["rows"], result["left_out"]) == (COUNT, COUNT, {"unreadable": 0, "unlabelled": 0})
    assert set(result["throughput"]) == {"model", "whole"} and min(result["throughput"].values()) > 0
    saved = json.loads(file.read_text())
    assert saved["metrics"] == result["metrics"]
    assert saved["predictions"] == [
        {"index": i, "label": NAMES[label], "predicted": [NAMES[c] for c in top[i, :5]]}
        for i, label in enumerate(LABELS)
    ]


def test_scores_do_not_depend_on_batches_and_workers(models, data):
    options = {"dataset_name": data, "progress": False}
    one = evaluate(models["tfm"], batch_size=COUNT, **options)
    two = evaluate(models["tfm"], batch_size=1, dataloader_num_workers=1, **options)
    assert one["metrics"] == two["metrics"]


def test_bf16_computes_in_bf16(models, data, monkeypatch):
    seen = set()
    layer = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.add(layer(*a).dtype) or layer(*a))
    for precision, expected in (("no", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        assert (
            evaluate(models["tfm"], dataset_name=data, mixed_precision=precision, **QUIET)["mixed_precision"]
            == precision
        )
        assert seen == {expected}


def test_weights_stored_in_half_precision(models, data, tmp_path):
    AutoModelForImageClassification.from_pretrained(models["tfm"]).to(torch.bfloat16).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(models["tfm"]).save_pretrained(tmp_path)
    whole = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "whole")
    AutoImageProcessor.from_pretrained(models["tfm"]).save_pretrained(tmp_path / "whole")
    one, two = (evaluate(str(folder), dataset_name=data, **QUIET) for folder in (tmp_path, tmp_path / "whole"))
    assert one["metrics"] == two["metrics"]


def test_max_samples(models, data):
    result = evaluate(models["tfm"], dataset_name=data, max_samples=7, **QUIET)
    assert result["rows"] == result["images"] == 7
    assert values(result)["accuracy"] == np.mean(ranked(models["tfm"])[:7, 0] == LABELS[:7])


def test_scores_equal_those_of_the_training_run(tmp_path):
    """The same model and split as in the results file that the recipe wrote."""
    folder, small = tmp_path / "run", "{patch_size: 8, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    options = ["--config", "quickstart", "--model", small, "--num_train_epochs", "null", "--max_steps", "2"]
    options += ["--warmup_epochs", "null", "--warmup_steps", "1", "--mixed_precision", "no", "--progress", "false"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "image_classification_train", *options, "--output_dir", str(folder)])
    assert ended.value.code == 0
    reported = json.loads((folder / "results.json").read_text())["metrics"]
    for split in ("validation", "test"):
        result = evaluate(str(folder), dataset_name="digits", split=split, progress=False)
        assert values(result) == {row["name"]: row["value"] for row in reported if row["split"] == split}


# --- labels and classes


def test_unlabelled_and_unreadable_images_are_skipped(models, tmp_path):
    images = [*photos()[:-1], {"bytes": b"no image", "path": None}]
    labels = [-1 if i < 4 else label for i, label in enumerate(LABELS)]
    rows = save_rows(tmp_path / "rows", labels, ClassLabel(names=NAMES), images)
    file, real = tmp_path / "result.json", tmp_path / "real.json"
    result = evaluate(models["tfm"], dataset_name=rows, output=str(file), **QUIET)
    assert (result["images"], result["left_out"]) == (COUNT - 1, {"unreadable": 1, "unlabelled": 4})
    assert values(result)["accuracy"] == np.mean(ranked(models["tfm"])[4:-1, 0] == LABELS[4:-1])
    saved = json.loads(file.read_text())
    assert list(saved["unreadable"]) == [str(COUNT - 1)]
    assert [row["label"] for row in saved["predictions"][:5]] == [None] * 4 + [NAMES[LABELS[4]]]
    with pytest.raises(ValueError, match="max_bad_images=0"):
        evaluate(models["tfm"], dataset_name=rows, max_bad_images=0, **QUIET)
    blank = save_rows(tmp_path / "blank", [-1] * COUNT, ClassLabel(names=NAMES))
    result = evaluate(models["tfm"], dataset_name=blank, output=str(file), **QUIET)
    assert (result["metrics"], result["left_out"]) == ([], {"unreadable": 0, "unlabelled": COUNT})
    predicted = [NAMES[best] for best in ranked(models["tfm"])[:, 0]]
    assert [row["predicted"][0] for row in json.loads(file.read_text())["predictions"]] == predicted
    real.write_text(json.dumps([[label] for label in LABELS]))
    result = evaluate(models["tfm"], dataset_name=blank, real_labels=str(real), **QUIET)
    assert values(result) == {"real_accuracy": np.mean(ranked(models["tfm"])[:, 0] == LABELS)}


@pytest.mark.parametrize("kind", ["no label", "classes"])
def test_impossible_confusion_matrix_is_refused_at_once(kind, models, data, tmp_path, monkeypatch):
    """Before any image is classified."""
    monkeypatch.setattr(ImageClassificationTask, "predict", None)
    where, named = data, "confusion has at most 5 classes, but the model has 6"
    if kind == "classes":
        monkeypatch.setattr("hf_tfm.viz.confusion.MAX_CLASSES", 5)
    else:
        where, named = save_rows(tmp_path / "blank", [-1] * COUNT, ClassLabel(names=NAMES)), "no row of the split has"
    with pytest.raises(ValueError, match=named):
        evaluate(models["tfm"], dataset_name=where, confusion=str(tmp_path / "c.png"), **QUIET)


def test_scores_are_written_before_the_plot(models, data, tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    monkeypatch.setattr("hf_tfm.viz.confusion.save", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate(models["tfm"], dataset_name=data, confusion=str(tmp_path / "c.png"), output=str(file), **QUIET)
    assert len(json.loads(file.read_text())["predictions"]) == COUNT


# --- masked autoencoders


@pytest.mark.parametrize("name", ["mae", "vit_mae"])
def test_reconstruction_loss_equals_the_model_called_directly(name, models, data):
    loaded = AutoModelForPreTraining.from_pretrained(models[name]).eval()
    processor = AutoImageProcessor.from_pretrained(models[name])
    losses = []
    for i, photo in enumerate(photos()):
        noise = torch.from_numpy(rng(3, 0, i).random(16, dtype=np.float32))[None]
        pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            losses.append(loaded(pixel_values=pixels, noise=noise).loss.item())
    result = evaluate(models[name], dataset_name=data, seed=3, **QUIET)
    assert values(result) == {"reconstruction_loss": pytest.approx(np.mean(losses), rel=1e-5)}
    assert (result["images"], result["left_out"]) == (COUNT, {"unreadable": 0})
    other = values(evaluate(models[name], dataset_name=data, seed=4, **QUIET))["reconstruction_loss"]
    assert other != pytest.approx(np.mean(losses), rel=1e-5)


# --- helper functions


@pytest.mark.parametrize(
    ("processor", "whole"),
    [
        (ViTImageProcessor(size={"height": 16, "width": 16}), False),
        (ViTImageProcessor(size={"shortest_edge": 20}, do_center_crop=True, crop_size=16), False),
        (ViTImageProcessor(size={"height": 16, "width": 16}, do_rescale=False), False),
        (ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.8), True),
        (MobileViTImageProcessor(size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}), True),  # BGR
        (TimmWrapperImageProcessor({"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.2] * 3}), True),
    ],
)
def test_images_match_the_processor(processor, whole):
    found = suitable(processor)
    assert isinstance(found, WholeProcessor) == whole
    image = torch.from_numpy(np.array(photos()[0])).permute(2, 0, 1)
    halves = Pixels(found)
    expected = processor(images=photos()[0], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(halves.scale(halves.resize(image)[None]), expected, atol=1e-4, rtol=1e-4)
    assert halves.size == (16, 16)


def test_processors_without_a_fixed_size_are_refused():
    with pytest.raises(ValueError, match="fixed size"):
        suitable(ViTImageProcessor(do_resize=False))


def test_stopwatch(monkeypatch):
    """With a clock that advances by one at each reading: start, (before, after) x 3, end."""
    ticks = iter([0.0, 1.0, 9.0, 10.0, 12.0, 13.0, 15.0, 20.0])
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: next(ticks))
    model = TfmViTForImageClassification(TfmViTConfig(**SIZES))
    with Stopwatch(model) as watch:
        for count in (2, 4, 6):
            model(pixel_values=torch.zeros(count, 3, 16, 16))
    model(pixel_values=torch.zeros(1, 3, 16, 16))  # stopped: the clock would raise StopIteration
    assert watch.throughput(12) == {"model": (4 + 6) / (2 + 2), "whole": 12 / 20}


# --- refused inputs


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("tfm", {"num_beams": 2}, 'num_beams is for translation models; ".*" is one of the image classifiers'),
        (
            "mae",
            {"confusion": "a.png"},
            "confusion is for image classifiers and .* one of the masked autoencoders",
        ),
        ("tfm", {"seed": 1}, "seed is for masked autoencoders"),
        ("tfm", {"beams": 1}, "beams is not an option of evaluate"),
        ("tfm", {"split": "tset"}, 'split "tset" is not a split'),
        ("tfm", {"mixed_precision": "fp8"}, 'got "fp8"'),
        ("tfm", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("mae", {"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ("mae", {"dataloader_num_workers": -1}, "num_workers must be at least 0, got -1"),
        ("tfm", {"image_column": "picture"}, 'image_column "picture" is not a column'),
        ("tfm", {"label_column": "fine"}, 'label_column "fine" is not a column'),
        ("tfm", {"confusion": "a.jpg"}, 'confusion must be a ".png" file'),
        ("tfm", {"match_labels": "rank"}, 'must be one of name, number, got "rank"'),
    ],
)
def test_errors(name, options, named, models, data):
    with pytest.raises(ValueError, match=named):
        evaluate(models[name], **{"dataset_name": data, **QUIET, **options})


def test_unsupported_models_are_refused(data, tmp_path):
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertModel(bert).save_pretrained(tmp_path / "bert")
    (tmp_path / "detr").mkdir()
    detr = {"model_type": "detr", "is_encoder_decoder": True, "architectures": ["DetrModel"]}
    (tmp_path / "detr" / "config.json").write_text(json.dumps(detr))
    headless = save_model(tmp_path / "headless", TfmViTModel, TfmViTConfig(**SIZES))
    kinds = {
        tmp_path / "bert": "BertModel",
        tmp_path / "detr": "DetrModel",
        headless: "TfmViTModel",
    }
    for model, saved in kinds.items():
        with pytest.raises(ValueError, match=f"saved as {saved}, but evaluate supports translation models, image"):
            evaluate(str(model), dataset_name=data)
    where = {"dataset_name": data, **QUIET}
    with pytest.raises(ValueError, match="no weights for classifier"):
        evaluate_task(ImageClassificationTask, ImageClassificationEvaluationArguments(**where, model=headless))
    with pytest.raises(ValueError, match="no weights for decoder"):
        half = save_model(tmp_path / "half", TfmMAEModel, TfmMAEConfig(**SIZES))
        evaluate_task(MaskedImageTask, MaskedImageEvaluationArguments(**where, model=half))
    TfmViTForImageClassification(TfmViTConfig(**SIZES)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no image processor"):
        evaluate(str(tmp_path / "bare"), dataset_name=data)
    grey = save_model(tmp_path / "grey", TfmViTForImageClassification, TfmViTConfig(**SIZES, num_channels=1))
    with pytest.raises(ValueError, match=r"num_channels of .* must be 3"):
        evaluate(grey, dataset_name=data)


def test_multiple_processes_are_refused(models, data, monkeypatch):
    """Each process would score everything and write the same files."""
    monkeypatch.setattr("hf_tfm.tasks.evaluation.create_accelerator", lambda: SimpleNamespace(num_processes=2))
    for name in ("tfm", "mae"):
        with pytest.raises(ValueError, match="evaluate runs in one process, got 2"):
            evaluate(models[name], dataset_name=data, **QUIET)


# --- the command


def test_the_command(models, data, tmp_path, capsys):
    plot = tmp_path / "new" / "confusion.png"
    arguments = ["--dataset_name", data, "--confusion", str(plot), "--progress", "false"]
    cli.main(["evaluate", models["tfm"], *arguments])
    printed = capsys.readouterr().out.splitlines()
    accuracy = np.mean(ranked(models["tfm"])[:, 0] == LABELS)
    assert printed[0].split() == ["test", "accuracy", f"{accuracy:.3f}"]
    assert printed[2] == f"{COUNT} images; left out: 0 unreadable, 0 unlabelled"
    assert "by the model alone" in printed[3]
    assert imread(plot).shape[2] == 4
    cli.main(["evaluate", "--dataset_name", data, models["mae"], "--progress", "false"])  # options first
    assert capsys.readouterr().out.split()[:2] == ["test", "reconstruction_loss"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", models["mae"], *arguments])
    assert ended.value.code == 1
    assert capsys.readouterr().err.startswith("hf-tfm evaluate: confusion is for image classifiers")


def test_help_groups_options_by_model_kind(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    groups, group = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            group = line[:-1]
        elif line.startswith("  --"):
            groups.setdefault(group, []).append(line.split()[0].removeprefix("--"))
    assert {"dataset_name", "max_samples", "mixed_precision", "output"} < set(groups["all models"])
    assert {"num_beams", "source_column"} < set(groups["translation models"])
    images = "image classifiers, detectors, masked autoencoders"
    assert "dataloader_num_workers" in groups[f"{images} and video forecasters"]
    assert "image_column" in groups[f"{images}, classifiers of long sequences and video forecasters"]
    assert groups["image classifiers"] == ["real_labels"]
    labelled = groups["image classifiers, text classifiers and classifiers of long sequences"]
    assert set(labelled) == {"confusion", "label_column"}
    boxes = {"objects_column", "box_format", "relative_boxes"}
    attention = {"encoder_attention", "encoder_attention_kwargs"}
    assert set(groups["detectors"]) == {*boxes, *attention, "segments", "panoptic_column", "segments_column"}
    assert groups["masked autoencoders, language models, video forecasters and policies"] == ["seed"]
    assert {"mlm_probability", "text_column"} < set(groups["language models"])
