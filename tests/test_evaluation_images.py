"""hf-tfm evaluate on image models: against the models called by hand, and what it refuses."""

import json
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from datasets import ClassLabel, Dataset, Features, Value
from matplotlib.image import imread
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    AutoModelForPreTraining,
    BertConfig,
    BertForMaskedLM,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextImageProcessor,
    MobileViTImageProcessor,
    TimmWrapperImageProcessor,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmMAEModel,
    TfmViTConfig,
    TfmViTForImageClassification,
    TfmViTModel,
    cli,
)
from hf_tfm.data.batching import rng
from hf_tfm.evaluation import evaluate, evaluate_classification, evaluate_masked_autoencoder
from hf_tfm.evaluation import reading as reading_module
from hf_tfm.evaluation.reading import Stopwatch, WholeProcessor, suitable
from hf_tfm.hub.convert import convert
from hf_tfm.tasks.images import Pixels

NAMES = ["ant", "bee", "cat", "dog", "eel", "fox"]
COUNT = 23
TINY = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {**TINY, "image_size": 16, "patch_size": 4, "initializer_range": 0.5}
DECODER = {f"decoder_{name}": value for name, value in TINY.items()}
QUIET = {"progress": False, "batch_size": 5}


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def photos() -> list[Image.Image]:
    draw = np.random.RandomState(0)
    return [Image.fromarray(draw.randint(0, 256, (20, 18 + i % 3, 3), dtype=np.uint8)) for i in range(COUNT)]


LABELS = np.random.RandomState(1).randint(0, len(NAMES), COUNT).tolist()


def save_rows(folder, labels, feature, images=None) -> str:
    """A data set of one split, test."""
    rows = {"image": photos() if images is None else images, "label": labels}
    features = Features({"image": datasets.Image(), "label": feature})
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(rows, features).to_parquet(folder / "test.parquet")
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data"), LABELS, ClassLabel(names=NAMES))


def save_model(folder, model_class, config, processor=None) -> str:
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    (processor or ViTImageProcessor(size={"height": 16, "width": 16})).save_pretrained(folder)
    return str(folder)


def labels_of(names) -> dict:
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of tiny random models by name."""
    folder, names = tmp_path_factory.mktemp("models"), labels_of(NAMES)
    convnext = ConvNextConfig(hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1], initializer_range=0.5, **names)
    half = ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.5)  # its resizing is its own
    tfm = save_model(folder / "tfm", TfmViTForImageClassification, TfmViTConfig(**SIZES, **names))
    convert(tfm, "timm", str(folder / "timm"))  # timm's kind of configuration, which names no class
    return {
        "tfm": tfm,
        "timm": str(folder / "timm"),
        "vit": save_model(folder / "vit", ViTForImageClassification, ViTConfig(**SIZES, **names)),
        "convnext": save_model(folder / "convnext", ConvNextForImageClassification, convnext, half),
        "mae": save_model(folder / "mae", TfmMAEForPreTraining, TfmMAEConfig(**SIZES, **DECODER)),
        "vit_mae": save_model(folder / "vit_mae", ViTMAEForPreTraining, ViTMAEConfig(**SIZES, **DECODER)),
    }


def ranked(model: str) -> np.ndarray:
    """(N, classes), best first, by the model's own processor and one image at a time."""
    loaded, processor = (
        AutoModelForImageClassification.from_pretrained(model),
        AutoImageProcessor.from_pretrained(model),
    )
    with torch.inference_mode():
        logits = [loaded.eval()(**processor(images=photo, return_tensors="pt")).logits[0] for photo in photos()]
    return torch.stack(logits).argsort(descending=True).numpy()


def values(result) -> dict[str, float]:
    return {row["name"]: row["value"] for row in result["metrics"]}


# --- classifiers


@pytest.mark.parametrize("name", ["tfm", "vit", "convnext", "timm"])
def test_scores_are_those_of_the_model_called_by_hand(name, models, data, tmp_path):
    top = ranked(models[name])
    file = tmp_path / "result.json"
    result = evaluate(models[name], dataset=data, output=str(file), **QUIET)
    right = [place.tolist().index(label) for place, label in zip(top, LABELS, strict=True)]
    assert len({*top[:, 0]}) > 1
    assert values(result) == {"accuracy": np.mean(np.equal(right, 0)), "top5_accuracy": np.mean(np.less(right, 5))}
    assert (result["images"], result["rows"], result["left_out"]) == (COUNT, COUNT, {"unreadable": 0, "unlabelled": 0})
    assert set(result["throughput"]) == {"model", "whole"} and min(result["throughput"].values()) > 0
    said = json.loads(file.read_text())
    assert said["metrics"] == result["metrics"]
    assert said["predictions"] == [
        {"index": i, "label": NAMES[label], "predicted": [NAMES[c] for c in top[i, :5]]}
        for i, label in enumerate(LABELS)
    ]


def test_batches_and_workers_change_nothing(models, data):
    options = {"dataset": data, "progress": False}
    one = evaluate(models["tfm"], batch_size=COUNT, **options)
    two = evaluate(models["tfm"], batch_size=1, num_workers=1, **options)
    assert one["metrics"] == two["metrics"]


def test_bf16_computes_in_bf16(models, data, monkeypatch):
    seen = set()
    layer = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *a: seen.add(layer(*a).dtype) or layer(*a))
    for precision, expected in (("no", torch.float32), ("bf16", torch.bfloat16)):
        seen.clear()
        assert evaluate(models["tfm"], dataset=data, precision=precision, **QUIET)["precision"] == precision
        assert seen == {expected}


def test_weights_stored_in_half_precision(models, data, tmp_path):
    AutoModelForImageClassification.from_pretrained(models["tfm"]).to(torch.bfloat16).save_pretrained(tmp_path)
    AutoImageProcessor.from_pretrained(models["tfm"]).save_pretrained(tmp_path)
    whole = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=torch.float32)
    whole.save_pretrained(tmp_path / "whole")
    AutoImageProcessor.from_pretrained(models["tfm"]).save_pretrained(tmp_path / "whole")
    one, two = (evaluate(str(folder), dataset=data, **QUIET) for folder in (tmp_path, tmp_path / "whole"))
    assert one["metrics"] == two["metrics"]


def test_the_first_rows(models, data):
    result = evaluate(models["tfm"], dataset=data, max_samples=7, **QUIET)
    assert result["rows"] == result["images"] == 7
    assert values(result)["accuracy"] == np.mean(ranked(models["tfm"])[:7, 0] == LABELS[:7])


def test_figures_are_those_of_the_training_run(tmp_path):
    """The same model and split as in the results file that the recipe wrote."""
    folder, small = tmp_path / "run", "{patch_size: 8, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2}"
    options = ["--config", "quickstart", "--model", small, "--num_epochs", "null", "--num_steps", "2"]
    options += ["--warmup_epochs", "null", "--warmup_steps", "1", "--precision", "no", "--progress", "false"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["run", "image_classification_train", *options, "--output_dir", str(folder)])
    assert ended.value.code == 0
    told = json.loads((folder / "results.json").read_text())["metrics"]
    for split in ("validation", "test"):
        result = evaluate(str(folder), dataset="digits", split=split, progress=False)
        assert values(result) == {row["name"]: row["value"] for row in told if row["split"] == split}


# --- labels and classes


def test_classes_are_matched_by_name(models, data, tmp_path):
    """The same labels in a data set that counts its classes in another order, and lacks one, or stores text."""
    expected = evaluate(models["tfm"], dataset=data, max_samples=9, **QUIET)["metrics"]
    other = [name for name in sorted(NAMES, reverse=True) if name in {NAMES[label] for label in LABELS}]
    turned = save_rows(tmp_path / "a", [other.index(NAMES[label]) for label in LABELS], ClassLabel(names=other))
    text = save_rows(tmp_path / "b", [NAMES[label] for label in LABELS], Value("string"))
    for where in (turned, text):
        result = evaluate(models["tfm"], dataset=where, max_samples=9, **QUIET)
        assert (result["metrics"], result["match_labels"]) == (expected, "name")


def test_other_names_are_refused_and_can_be_matched_by_number(models, data, tmp_path):
    names = ["ant", "bee", "cat", "dog", "elk", "fly"]
    other = save_rows(tmp_path / "a", LABELS, ClassLabel(names=names))
    with pytest.raises(ValueError, match=r"the data set alone has elk, fly; the model alone has eel, fox\. .*number"):
        evaluate(models["tfm"], dataset=other, **QUIET)
    numbers = save_rows(tmp_path / "b", LABELS, Value("int64"))
    with pytest.raises(ValueError, match="the data set alone has 0, 1, 2"):
        evaluate(models["tfm"], dataset=numbers, **QUIET)
    expected = evaluate(models["tfm"], dataset=data, **QUIET)["metrics"]
    for where in (other, numbers):
        result = evaluate(models["tfm"], dataset=where, match_labels="number", **QUIET)
        assert (result["metrics"], result["match_labels"]) == (expected, "number")
    more = save_rows(tmp_path / "c", LABELS, ClassLabel(names=[*names, "gnu"]))
    with pytest.raises(ValueError, match="0 to 5; the data set also has 6"):
        evaluate(models["tfm"], dataset=more, match_labels="number", **QUIET)


def test_a_model_without_names_is_matched_by_number(data, tmp_path):
    model = save_model(tmp_path / "m", TfmViTForImageClassification, TfmViTConfig(**SIZES, num_labels=6))
    result = evaluate(model, dataset=data, **QUIET)
    assert result["match_labels"] == "number"
    assert values(result)["accuracy"] == np.mean(ranked(model)[:, 0] == LABELS)


def test_two_classes_of_one_name_are_refused(data, tmp_path):
    config = TfmViTConfig(**SIZES, id2label=dict(enumerate([*NAMES, "cat"])), label2id={"cat": 2})
    model = save_model(tmp_path / "m", TfmViTForImageClassification, config)
    with pytest.raises(ValueError, match=r"several classes called cat: .*number"):
        evaluate(model, dataset=data, **QUIET)


def test_real_labels(models, data, tmp_path):
    """An image is right where the prediction is among its labels; those without labels count for nothing."""
    first = ranked(models["tfm"])[:, 0].tolist()
    lists = [[] if i % 5 == 0 else [(c + 1) % 6] if i % 5 == 1 else [(c + 2) % 6, c] for i, c in enumerate(first)]
    file = tmp_path / "real.json"
    file.write_text(json.dumps(lists))
    result = evaluate(models["tfm"], dataset=data, real_labels=str(file), **QUIET)
    counted = [i for i in range(COUNT) if i % 5]
    assert values(result)["real_accuracy"] == np.mean([i % 5 > 1 for i in counted])
    assert set(values(result)) == {"accuracy", "top5_accuracy", "real_accuracy"}
    counted = [i for i in range(8) if i % 5]
    short = evaluate(models["tfm"], dataset=data, real_labels=str(file), max_samples=8, **QUIET)
    assert values(short)["real_accuracy"] == np.mean([i % 5 > 1 for i in counted])
    # They are numbers of the data set's labels, whatever the model calls those.
    turned = save_rows(tmp_path / "a", [5 - label for label in LABELS], ClassLabel(names=NAMES[::-1]))
    file.write_text(json.dumps([[5 - label for label in labels] for labels in lists]))
    assert evaluate(models["tfm"], dataset=turned, real_labels=str(file), **QUIET)["metrics"] == result["metrics"]


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ([[0]] * 3, f"a list for each of the {COUNT} images, got 3"),
        ({"0": [1]}, "must hold a list of lists"),
        ([0] * COUNT, "must hold a list of lists"),
        ([[0]] * (COUNT - 1) + [[6]], f"6 of image {COUNT - 1} is not a label of the data set"),
    ],
)
def test_real_labels_that_do_not_fit(content, named, models, data, tmp_path):
    file = tmp_path / "real.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=named):
        evaluate(models["tfm"], dataset=data, real_labels=str(file), **QUIET)


def test_images_without_label_or_content_are_left_out(models, tmp_path):
    images = [*photos()[:-1], {"bytes": b"no image", "path": None}]
    labels = [-1 if i < 4 else label for i, label in enumerate(LABELS)]
    rows = save_rows(tmp_path / "rows", labels, ClassLabel(names=NAMES), images)
    file, real = tmp_path / "result.json", tmp_path / "real.json"
    result = evaluate(models["tfm"], dataset=rows, output=str(file), **QUIET)
    assert (result["images"], result["left_out"]) == (COUNT - 1, {"unreadable": 1, "unlabelled": 4})
    assert values(result)["accuracy"] == np.mean(ranked(models["tfm"])[4:-1, 0] == LABELS[4:-1])
    said = json.loads(file.read_text())
    assert list(said["unreadable"]) == [str(COUNT - 1)]
    assert [row["label"] for row in said["predictions"][:5]] == [None] * 4 + [NAMES[LABELS[4]]]
    with pytest.raises(ValueError, match="max_bad_images=0"):
        evaluate(models["tfm"], dataset=rows, max_bad_images=0, **QUIET)
    blank = save_rows(tmp_path / "blank", [-1] * COUNT, ClassLabel(names=NAMES))
    with pytest.raises(ValueError, match="no image has a label"):
        evaluate(models["tfm"], dataset=blank, **QUIET)
    real.write_text(json.dumps([[label] for label in LABELS]))
    result = evaluate(models["tfm"], dataset=blank, real_labels=str(real), **QUIET)
    assert values(result) == {"real_accuracy": np.mean(ranked(models["tfm"])[:, 0] == LABELS)}


# --- masked autoencoders


@pytest.mark.parametrize("name", ["mae", "vit_mae"])
def test_reconstruction_loss_is_that_of_the_model_called_by_hand(name, models, data):
    loaded = AutoModelForPreTraining.from_pretrained(models[name]).eval()
    processor = AutoImageProcessor.from_pretrained(models[name])
    losses = []
    for i, photo in enumerate(photos()):
        noise = torch.from_numpy(rng(3, 0, i).random(16, dtype=np.float32))[None]
        pixels = processor(images=photo, return_tensors="pt")["pixel_values"]
        with torch.inference_mode():
            losses.append(loaded(pixel_values=pixels, noise=noise).loss.item())
    result = evaluate(models[name], dataset=data, seed=3, **QUIET)
    assert values(result) == {"reconstruction_loss": pytest.approx(np.mean(losses), rel=1e-5)}
    assert (result["images"], result["left_out"]) == (COUNT, {"unreadable": 0})
    other = values(evaluate(models[name], dataset=data, seed=4, **QUIET))["reconstruction_loss"]
    assert other != pytest.approx(np.mean(losses), rel=1e-5)


# --- the parts


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
def test_images_are_what_the_processor_makes_of_them(processor, whole):
    found = suitable(processor)
    assert isinstance(found, WholeProcessor) == whole
    image = torch.from_numpy(np.array(photos()[0])).permute(2, 0, 1)
    halves = Pixels(found)
    expected = processor(images=photos()[0], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(halves.scale(halves.resize(image)[None]), expected, atol=1e-4, rtol=1e-4)
    assert halves.size == (16, 16)


def test_images_of_no_fixed_size_are_refused():
    with pytest.raises(ValueError, match="fixed size"):
        suitable(ViTImageProcessor(do_resize=False))


def test_stopwatch(monkeypatch):
    """By a clock that ticks once whenever it is read: start, (before, after) x 3, end."""
    ticks = iter([0.0, 1.0, 9.0, 10.0, 12.0, 13.0, 15.0, 20.0])
    monkeypatch.setattr(reading_module.time, "perf_counter", lambda: next(ticks))
    model = TfmViTForImageClassification(TfmViTConfig(**SIZES))
    with Stopwatch(model) as watch:
        for count in (2, 4, 6):
            model(pixel_values=torch.zeros(count, 3, 16, 16))
    model(pixel_values=torch.zeros(1, 3, 16, 16))  # no longer watched: the clock would be out of ticks
    assert watch.throughput(12) == {"model": (4 + 6) / (2 + 2), "whole": 12 / 20}


# --- what is refused


@pytest.mark.parametrize(
    ("name", "options", "named"),
    [
        ("tfm", {"num_beams": 2}, 'num_beams is for translation models; ".*" is one of the image classifiers'),
        ("mae", {"confusion": "a.png"}, 'confusion is for image classifiers; ".*" is one of the masked autoencoders'),
        ("tfm", {"seed": 1}, "seed is for masked autoencoders"),
        ("tfm", {"beams": 1}, "beams is no option of evaluate"),
        ("tfm", {"split": "tset"}, 'split "tset" is not a split'),
        ("tfm", {"precision": "fp8"}, 'got "fp8"'),
        ("tfm", {"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ("mae", {"max_samples": 0}, "max_samples must be at least 1, got 0"),
        ("mae", {"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ("tfm", {"image_column": "picture"}, 'image_column "picture" is not a column'),
        ("tfm", {"label_column": "fine"}, 'label_column "fine" is not a column'),
        ("tfm", {"confusion": "a.jpg"}, 'confusion must be a ".png" file'),
        ("tfm", {"match_labels": "rank"}, 'must be "name" or "number", got "rank"'),
    ],
)
def test_errors(name, options, named, models, data):
    with pytest.raises(ValueError, match=named):
        evaluate(models[name], **{"dataset": data, **QUIET, **options})


def test_models_that_cannot_be_scored_are_refused(data, tmp_path):
    bert = BertConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    BertForMaskedLM(bert).save_pretrained(tmp_path / "bert")
    (tmp_path / "detr").mkdir()
    detr = {"model_type": "detr", "is_encoder_decoder": True, "architectures": ["DetrForObjectDetection"]}
    (tmp_path / "detr" / "config.json").write_text(json.dumps(detr))
    headless = save_model(tmp_path / "headless", TfmViTModel, TfmViTConfig(**SIZES))
    kinds = {
        tmp_path / "bert": "BertForMaskedLM",
        tmp_path / "detr": "DetrForObjectDetection",
        headless: "TfmViTModel",
    }
    for model, saved in kinds.items():
        with pytest.raises(ValueError, match=f"saved as {saved}, and evaluate is for translation models, image"):
            evaluate(str(model), dataset=data)
    with pytest.raises(ValueError, match="no weights for classifier"):
        evaluate_classification(headless, data, **QUIET)
    with pytest.raises(ValueError, match="no weights for decoder"):
        evaluate_masked_autoencoder(save_model(tmp_path / "half", TfmMAEModel, TfmMAEConfig(**SIZES)), data, **QUIET)
    TfmViTForImageClassification(TfmViTConfig(**SIZES)).save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no image processor"):
        evaluate(str(tmp_path / "bare"), dataset=data)
    grey = save_model(tmp_path / "grey", TfmViTForImageClassification, TfmViTConfig(**SIZES, num_channels=1))
    with pytest.raises(ValueError, match=r"num_channels of .* must be 3"):
        evaluate(grey, dataset=data)


def test_several_processes_are_refused(models, data, monkeypatch):
    """Each would score everything, and write the same files."""
    monkeypatch.setattr(reading_module, "Accelerator", lambda: SimpleNamespace(num_processes=2))
    for name in ("tfm", "mae"):
        with pytest.raises(ValueError, match="evaluate runs in one process, got 2"):
            evaluate(models[name], dataset=data, **QUIET)


# --- the command


def test_the_command(models, data, tmp_path, capsys):
    picture = tmp_path / "new" / "confusion.png"
    words = ["--dataset", data, "--confusion", str(picture), "--progress", "false"]
    cli.main(["evaluate", models["tfm"], *words])
    said = capsys.readouterr().out.splitlines()
    accuracy = np.mean(ranked(models["tfm"])[:, 0] == LABELS)
    assert said[0].split() == ["test", "accuracy", f"{accuracy:.3f}"]
    assert said[2] == f"{COUNT} images; left out: 0 unreadable, 0 unlabelled"
    assert "by the model alone" in said[3]
    assert imread(picture).shape[2] == 4
    cli.main(["evaluate", "--dataset", data, models["mae"], "--progress", "false"])  # options may stand first
    assert capsys.readouterr().out.split()[:2] == ["test", "reconstruction_loss"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", models["mae"], *words])
    assert str(ended.value.code).startswith("hf-tfm evaluate: confusion is for image classifiers")


def test_help_tells_whose_each_option_is(capsys):
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "--help"])
    groups, group = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.endswith(":") and not line.startswith(" "):
            group = line[:-1]
        elif line.startswith("  --"):
            groups.setdefault(group, []).append(line.split()[0].removeprefix("--"))
    assert {"dataset", "split", "precision", "output"} < set(groups["all models"])
    assert {"metrics", "num_beams", "source_column"} < set(groups["translation models"])
    assert {"batch_size", "image_column"} < set(groups["image classifiers and masked autoencoders"])
    assert {"confusion", "real_labels", "label_column"} < set(groups["image classifiers"])
    assert groups["masked autoencoders"] == ["seed"]
