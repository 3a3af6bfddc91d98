"""hf-tfm evaluate on models of timm and torchvision: scores against the models called directly, and refused inputs."""

import contextlib
import itertools
import json

import pytest
import timm
import torch
import torchvision
from datasets import ClassLabel
from detector_data import SIZES, write_objects
from evaluation_helpers import COUNT, QUIET, photos, save_rows, values
from safetensors.torch import save_file
from torch import nn
from torchvision.models import get_model, get_model_weights

from hf_tfm import cli
from hf_tfm.hub import external
from hf_tfm.hub.external import TorchvisionModel, external_model, published_table
from hf_tfm.tasks.evaluation import evaluate, lines
from hf_tfm.tasks.labels import imagenet_numbers

TIMM, CLASSIFIER, DETECTOR = "test_vit", "shufflenet_v2_x0_5", "fasterrcnn_mobilenet_v3_large_320_fpn"
COCO = get_model_weights(DETECTOR).DEFAULT.meta["categories"]  # 91 names, "__background__" first
NAMES = ["zebra", "n01440764", "hen", "tench, Tinca tinca", "goldfish"][:3]  # a name, a synset, a first word
NUMBERS = [340, 0, 8]  # of these classes in ImageNet
LABELS = [i % len(NAMES) for i in range(COUNT)]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return save_rows(tmp_path_factory.mktemp("data"), LABELS, ClassLabel(names=NAMES))


@pytest.fixture(scope="module")
def networks(tmp_path_factory):
    """Random networks that predict different classes for different images, and files with their weights."""
    torch.manual_seed(0)
    folder, found = tmp_path_factory.mktemp("weights"), {}
    network = timm.create_model(TIMM, pretrained=False).eval()
    nn.init.normal_(network.head.weight)
    save_file(network.state_dict(), folder / "model.safetensors")
    found["timm"] = (network, str(folder))
    network = get_model(CLASSIFIER, weights=None).eval()
    nn.init.normal_(network.fc.weight, std=10.0)
    torch.save(network.state_dict(), folder / "classifier.pth")
    found["torchvision"] = (network, str(folder / "classifier.pth"))
    return found


@torch.inference_mode()
def ranked(network, transform) -> list[list[int]]:
    logits = torch.cat([network(transform(photo)[None]) for photo in photos()])
    return logits.topk(5).indices.tolist()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_predictions_equal_the_network_called_directly(library, data, networks, tmp_path):
    network, weights = networks[library]
    if library == "timm":
        name, config = TIMM, timm.data.resolve_model_data_config(network)
        transform, names = timm.data.create_transform(**config), timm.data.ImageNetInfo().label_descriptions()
    else:
        name, default = CLASSIFIER, get_model_weights(CLASSIFIER).DEFAULT
        transform, names = default.transforms(), default.meta["categories"]
    expected, file = ranked(network, transform), tmp_path / "result.json"
    model = f"{library}:{name}"
    result = evaluate(model, dataset_name=data, weights=weights, output=str(file), **QUIET)
    predictions = json.loads(file.read_text())["predictions"]
    assert [row["predicted"] for row in predictions] == [[names[i] for i in top] for top in expected]
    assert len({tuple(row["predicted"]) for row in predictions}) > 1, "predictions that tell something"
    hits = [top[0] == NUMBERS[label] for top, label in zip(expected, LABELS, strict=True)]
    assert values(result)["accuracy"] == pytest.approx(sum(hits) / COUNT)
    assert result["parameters"] == sum(p.numel() for p in network.parameters())
    assert result["gflops"] > 0.01 and result["match_labels"] == "name" and result["published"] == []
    assert any(
        f"{result['gflops']:.2f} GFLOPs for an input of {result['gflops_input']}" in one for one in lines(result)
    )


def test_random_weights_are_stated_and_have_no_published_score(data):
    result = evaluate(f"timm:{TIMM}", dataset_name=data, random_weights=True, max_samples=2, **QUIET)
    assert result["weights"] == "random" and "published" not in result
    assert any("weights: random" in line for line in lines(result))


def test_folder_of_timm_is_evaluated_as_it_is(data, networks, tmp_path):
    network, _ = networks["timm"]
    config = {"architecture": TIMM, "num_classes": 1000, "pretrained_cfg": network.pretrained_cfg}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    output = tmp_path / "result.json"
    evaluate(f"timm:local-dir:{tmp_path}", dataset_name=data, output=str(output), **QUIET)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(network))
    names = timm.data.ImageNetInfo().label_descriptions()
    expected = [[names[i] for i in top] for top in ranked(network, transform)]
    assert [row["predicted"] for row in json.loads(output.read_text())["predictions"]] == expected


def test_published_score_stands_beside_the_measured_one(monkeypatch, data, networks, tmp_path):
    model = TorchvisionModel(CLASSIFIER)
    published = {one["name"]: one["value"] for one in model.published()}
    assert published == {"accuracy": pytest.approx(0.60552), "top5_accuracy": pytest.approx(0.81746)}
    _, weights = networks["torchvision"]
    monkeypatch.setattr(external, "HASH_LENGTH", 0)  # as if the file had the published weights
    result = evaluate(f"torchvision:{CLASSIFIER}", dataset_name=data, weights=weights, max_samples=2, **QUIET)
    assert result["published"] == model.published()
    line = next(line for line in lines(result) if line.startswith("test  accuracy"))
    assert "published: 0.606 on ImageNet-1K (torchvision" in line


# --- detectors


class KnownBoxes(nn.Module):
    """Takes the place of the second stage of a Faster R-CNN: returns boxes in pixels of the resized images.

    Args:
        objects: by `shape` of an image, boxes xyxy relative to the image and labels of torchvision.
    """

    def __init__(self, objects):
        super().__init__()
        self.objects = objects

    def forward(self, features, proposals, image_shapes, targets=None):
        found = []
        for height, width in image_shapes:
            boxes, labels = self.objects[shape(height, width)]
            boxes = torch.tensor(boxes) * torch.tensor([width, height] * 2)
            found.append({"boxes": boxes, "labels": torch.tensor(labels), "scores": torch.full((len(labels),), 0.9)})
        return found, {}


def shape(height: int, width: int) -> int:
    """Square, landscape or portrait: 0, 1 or 2."""
    return (width > height) + 2 * (width < height)


# Classes on both sides of the gaps in COCO's ids, in another order than there.
CATEGORIES = ["toothbrush", "person", "stop sign", "dining table", "cat"]
BOXES = [[0.1, 0.2, 0.6, 0.9], [0.3, 0.2, 0.8, 0.9]]
CHOSEN = [[0], [1, 2], [3, 4]]  # categories of the objects by shape of the image


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """A data set, and its objects as torchvision's model would find them."""
    rows = []
    for height, width in SIZES:
        pixels = [[x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height] for x0, y0, x1, y1 in BOXES]
        chosen = CHOSEN[shape(height, width)]
        rows.append([{"bbox": box, "category": c} for box, c in zip(pixels, chosen, strict=False)])
    objects = [(BOXES[: len(chosen)], [COCO.index(CATEGORIES[c]) for c in chosen]) for chosen in CHOSEN]
    return write_objects(tmp_path_factory.mktemp("scenes"), rows, CATEGORIES), objects


def with_known_boxes(monkeypatch, objects, change=lambda labels: labels):
    build = TorchvisionModel.build

    def built(self, file, random):
        network = build(self, file, random)
        network.roi_heads = KnownBoxes([(boxes, change(labels)) for boxes, labels in objects])
        return network

    monkeypatch.setattr(TorchvisionModel, "build", built)


def test_boxes_of_a_detector_are_mapped_to_the_data(monkeypatch, scenes):
    data, objects = scenes
    with_known_boxes(monkeypatch, objects)
    result = evaluate(f"torchvision:{DETECTOR}", dataset_name=data, random_weights=True, batch_size=3, progress=False)
    assert values(result)["AP"] == pytest.approx(1.0) and result["images"] == len(SIZES)
    assert result["match_labels"] == "name" and set(result["per_class"]) == set(CATEGORIES)
    assert result["gflops"] > 0.1


def test_shifted_labels_of_a_detector_score_nothing(monkeypatch, scenes):
    data, objects = scenes
    with_known_boxes(monkeypatch, objects, lambda labels: [label - 1 for label in labels])  # person -> background
    result = evaluate(f"torchvision:{DETECTOR}", dataset_name=data, random_weights=True, progress=False)
    assert values(result)["AP"] == 0.0


@pytest.mark.parametrize("name", [DETECTOR, pytest.param("ssdlite320_mobilenet_v3_large", marks=pytest.mark.slow)])
def test_random_detector_is_scored(name, scenes, capsys):
    options = ["--dataset_name", scenes[0], "--random_weights", "true", "--progress", "false"]
    cli.main(["evaluate", f"torchvision:{name}", *options])
    printed = capsys.readouterr().out
    assert (
        "test  AP" in printed and "weights: random" in printed and "GFLOPs" in printed and "published" not in printed
    )


def test_classes_of_a_detector_keep_the_gaps():
    config = external_model(f"torchvision:{DETECTOR}").config
    assert config.num_labels == 90 and (config.id2label[0], config.id2label[89]) == ("person", "toothbrush")
    assert [COCO[number + 1] for number in range(90)] == [config.id2label[number] for number in range(90)]


# --- labels


def test_names_of_imagenet_are_found_in_any_spelling():
    names = timm.data.ImageNetInfo().label_descriptions()
    numbers = imagenet_numbers(names)
    for one in ("n02391049", "zebra"):
        assert numbers[one] == 340
    for one in ("n01440764", "tench", "tench, Tinca tinca"):
        assert numbers[one] == 0
    assert "crane" not in numbers, "two classes"
    assert imagenet_numbers(get_model_weights(CLASSIFIER).DEFAULT.meta["categories"])["n02391049"] == 340
    assert imagenet_numbers([f"class {i}" for i in range(1000)]) == {} == imagenet_numbers(["zebra"])


def test_label_that_imagenet_lacks_is_refused(data, tmp_path):
    data = save_rows(tmp_path / "data", [0, 1] * 11 + [0], ClassLabel(names=["zebra", "unicorn"]))
    with pytest.raises(ValueError, match="only the data set has unicorn"):
        evaluate(f"timm:{TIMM}", dataset_name=data, random_weights=True, **QUIET)


# --- published scores


def test_every_published_score_has_a_source():
    table = published_table()
    for entry in table["models"]:
        assert entry["scores"] and all(score["source"] in table["sources"] for score in entry["scores"]), entry
        assert all(0 < score["value"] < 1 for score in entry["scores"])
    assert all(source["url"].startswith("https://") for source in table["sources"].values())


def test_published_models_exist_and_torchvision_states_the_same():
    for entry in published_table()["models"]:
        if "evaluate" not in entry:
            continue
        model = external_model(entry["evaluate"])
        assert model.has_weights
        if model.library == "torchvision":
            stated = {one["name"]: one["value"] for one in model.published()}
            assert stated == {score["name"]: pytest.approx(score["value"]) for score in entry["scores"]}
            meta = model.weights.meta
            assert (meta["num_params"], meta["_ops"]) == (entry["parameters"], entry["gflops"])
        else:
            assert model.published()


# --- refused


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("timm:test_vi", {}, 'timm has no model "test_vi"; did you mean test_vit'),
        ("timm:test_vit.other", {}, 'timm has no weights "test_vit.other"; it has test_vit.r160_in1k'),
        ("timm:vit_base_patch14_dinov2", {}, "has no classifier, only features"),
        ("torchvision:resnet5", {}, 'torchvision has no model "resnet5"; did you mean resnet50'),
        ("torchvision:resnet50.V3", {}, 'torchvision has no weights "resnet50.V3"; it has IMAGENET1K_V1'),
        ("torchvision:fcn_resnet50", {}, "neither an image classifier nor a detector"),
        ("timm:local-dir:/no/where", {}, 'model "/no/where" is neither a local folder'),
        (f"timm:{TIMM}", {"weights": "/no/where"}, "weights /no/where does not exist"),
        (f"timm:{TIMM}", {"weights": "{data}"}, "has no file of weights"),
        (f"timm:{TIMM}", {"weights": "{other}"}, "weights .*classifier.pth.*state_dict"),
        (f"timm:{TIMM}", {"weights": "w", "random_weights": True}, "either weights or random_weights"),
        (f"timm:{TIMM}", {"revision": "main"}, 'revision "main" applies only to a model on the Hub'),
        (f"timm:{TIMM}", {"box_format": "xyxy"}, "box_format is for detectors"),
        (f"torchvision:{DETECTOR}", {"random_weights": True}, "objects_column must name a column"),
    ],
)
def test_bad_input_is_refused(model, options, message, data, networks):
    places = {"{data}": data, "{other}": networks["torchvision"][1]}
    given = {name: places.get(value, value) for name, value in options.items()}
    with pytest.raises((ValueError, OSError), match=message):
        evaluate(model, dataset_name=data, **QUIET, **given)


def test_weights_are_not_for_models_in_folders(data, models):
    for option in ({"weights": "file"}, {"random_weights": True}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is for models timm:NAME and torchvision:NAME"):
            evaluate(models["vit"], dataset_name=data, **QUIET, **option)


def test_classifier_on_boxes_is_refused(scenes):
    with pytest.raises(ValueError, match="label_column"):
        evaluate(f"timm:{TIMM}", dataset_name=scenes[0], random_weights=True, progress=False)


def test_class_that_a_detector_lacks_is_refused(tmp_path):
    data = write_objects(tmp_path, [[{"bbox": [1, 1, 9, 9], "category": 0}]] * len(SIZES), ["unicorn"])
    with pytest.raises(ValueError, match='the first is "unicorn"'):
        evaluate(f"torchvision:{DETECTOR}", dataset_name=data, random_weights=True, progress=False)


def test_missing_download_names_the_options(monkeypatch, data):
    def fails(*args, **kwargs):
        raise OSError("no connection")

    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fails)
    with pytest.raises(
        ValueError, match=r"torchvision:shufflenet.*no connection.*weights FILE or random_weights true"
    ):
        evaluate(f"torchvision:{CLASSIFIER}", dataset_name=data, **QUIET)


# --- the doctor


def label_map(capsys, data: str, model: str) -> str:
    """Level and message of the doctor's finding on the labels."""
    options = ["--train_split", "test", "--model", model]
    with contextlib.suppress(SystemExit):  # other checks fail on so little data
        cli.main(["doctor", "data", data, *options])
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if " label_map " in line)
    own = [lines[start], *itertools.takewhile(lambda line: line.startswith(" " * 9), lines[start + 1 :])]
    return " ".join(" ".join(own).split())


def test_doctor_compares_labels_with_the_classes_of_a_model(capsys, scenes, data, models, tmp_path):
    found = label_map(capsys, scenes[0], f"torchvision:{DETECTOR}")
    assert found.startswith("ok") and 'first for "toothbrush", 0 in the data and 89 in the model' in found
    found = label_map(capsys, data, f"timm:{TIMM}")
    assert found.startswith("ok") and "3 classes of the data, 1000 of the model, matched by name" in found
    other = write_objects(tmp_path, [[{"bbox": [1, 1, 9, 9], "category": 0}]] * len(SIZES), ["unicorn"])
    found = label_map(capsys, other, f"torchvision:{DETECTOR}")
    assert found.startswith("failed") and 'the first is "unicorn"' in found


def test_doctor_refuses_a_model_of_another_task(capsys, scenes):
    with pytest.raises(SystemExit):
        cli.main(["doctor", "data", scenes[0], "--train_split", "test", "--model", f"timm:{TIMM}"])
    assert "is one of the image classifiers, but the data is for object_detection" in capsys.readouterr().err
