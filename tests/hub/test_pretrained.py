"""Initial models must be of a type that is_supported the task, with all weights that the task does not replace."""

import json
import re
import shutil

import pytest
import safetensors.torch
import torch
import transformers
from every_class import FAMILIES, class_of, tiny

from hf_tfm import families
from hf_tfm.cli import main
from hf_tfm.distillation.teacher import load_teacher
from hf_tfm.hub import pretrained
from hf_tfm.hub.loading import LoadingError
from hf_tfm.hub.pretrained import check_kind, load_to_train
from hf_tfm.tasks import detectors, image_classification, model_fields, text_model
from hf_tfm.tasks.masked_image import load_autoencoder

# Auto class of the initial models that a group of arguments accepts, and their main input.
GROUPS = {
    "TEXT_CLASSES": ("AutoModelForSequenceClassification", "input_ids"),
    "IMAGE_CLASSES": ("AutoModelForImageClassification", "pixel_values"),
    "IMAGE_PATCHES": ("AutoModelForPreTraining", "pixel_values"),
    "OBJECTS": ("AutoModelForObjectDetection", "pixel_values"),
    "SEGMENTS": ("AutoModelForUniversalSegmentation", "pixel_values"),
    "TRANSLATIONS": ("AutoModelForSeq2SeqLM", "input_ids"),
    "MASKED_WORDS": ("AutoModelForMaskedLM", "input_ids"),
    "SENTENCE_PAIRS": ("AutoModelForPreTraining", "input_ids"),
    "NEXT_WORDS": ("AutoModelForCausalLM", "input_ids"),
    "VIDEOS": ("AutoModelForTimeSeriesPrediction", "pixel_values_videos"),
}


def is_supported(group: str, name: str, argument: str = "model_name_or_path") -> bool:
    """Whether a family has the group's head; for initial models, also whether such a family reads its files."""
    auto_class, main_input = GROUPS[group]
    having = [
        family
        for family in families.FAMILIES
        if auto_class in family.auto_classes and family.classes()[auto_class].main_input_name == main_input
    ]
    if name in [family.name for family in having]:
        return True
    model_type = families.family_of(name).config.model_type
    return argument == "model_name_or_path" and any(model_type in family.reads for family in having)


def test_families_of_each_group():
    for group, known in {
        "TEXT_CLASSES": {"bert", "gpt"},
        "IMAGE_CLASSES": {"vit", "mae"},
        "IMAGE_PATCHES": {"mae"},
        "OBJECTS": {"detr"},
        "SEGMENTS": {"detr"},
        "TRANSLATIONS": {"transformer"},
        "MASKED_WORDS": {"bert"},
        "SENTENCE_PAIRS": {"bert"},
        "NEXT_WORDS": {"gpt"},
    }.items():
        first_six = ("transformer", "vit", "mae", "detr", "bert", "gpt")
        assert {name for name in first_six if is_supported(group, name)} == known
    assert not is_supported("IMAGE_CLASSES", "mae", "teacher") and is_supported("IMAGE_CLASSES", "vit", "teacher")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model of each family, {name: folder}."""
    folder = tmp_path_factory.mktemp("saved")
    for name in (
        *FAMILIES,
        "bert-masked",
        "bert-untied",
        "gpt-untied",
        "vit-base",
        "bert-base",
        "gpt-base",
        "detr-base",
    ):
        tiny(name).save_pretrained(folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("group", GROUPS)
def test_only_models_of_a_supported_type_are_accepted(group, family, saved):
    suitable = getattr(pretrained, group)["model_name_or_path"]
    if is_supported(group, family):
        check_kind("model_name_or_path", str(saved[family]), suitable)
        return
    with pytest.raises(LoadingError) as caught:
        check_kind("model_name_or_path", str(saved[family]), suitable)
    text = str(caught.value)
    assert text.startswith(f'model_name_or_path "{saved[family]}" is a tfm_{family} model')
    assert all(kind in text for kind in suitable.types)


RECIPES = {
    "translation_train": ("TRANSLATIONS", "model_name_or_path"),
    "language_pretrain": ("MASKED_WORDS", "model_name_or_path"),
    "text_classification_train": ("TEXT_CLASSES", "model_name_or_path"),
    "image_classification_train": ("IMAGE_CLASSES", "model_name_or_path"),
    "mae_pretrain": ("IMAGE_PATCHES", "model_name_or_path"),
    "detection_train": ("OBJECTS", "model_name_or_path"),
    "panoptic_train": ("SEGMENTS", "model_name_or_path"),
    "video_forecasting_train": ("VIDEOS", "model_name_or_path"),
    "distill_vision": ("IMAGE_CLASSES", "teacher"),
    "distill_mae": ("IMAGE_PATCHES", "teacher"),
    "distill_task": ("TEXT_CLASSES", "teacher"),
    "distill_pretrain": ("MASKED_WORDS", "teacher"),
    "distill_detection": ("OBJECTS", "teacher"),
    "distill_translation": ("TRANSLATIONS", "teacher"),
}


# The recipes that distill read their teachers as one of them does.
@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(recipe, marks=pytest.mark.slow if "distill" in recipe and recipe != "distill_detection" else ())
        for recipe in RECIPES
    ],
)
def test_recipes_refuse_models_of_other_types_first(recipe, saved, tmp_path, capsys):
    group, argument = RECIPES[recipe]
    data = [] if recipe not in ("detection_train", "panoptic_train") else ["--dataset_name", str(tmp_path / "data")]
    for family in FAMILIES:
        if is_supported(group, family, argument):
            continue
        words = ["run", recipe, "--config", "quickstart", f"--{argument}", str(saved[family]), "--model", "{}", *data]
        with pytest.raises(SystemExit) as ended:
            main([*words, "--output_dir", str(tmp_path / "run")])
        error = capsys.readouterr().err.strip()
        assert ended.value.code == 1 and error.count("\n") == 0, error
        assert f'{argument} "{saved[family]}" is a tfm_{family} model' in error
        assert not (tmp_path / "run").exists()


def nothing(model, name):
    return ""


STAGES = ("out_features", "out_indices", "stage_names")


def loader(name):
    """The function that loads an initial model for its task."""
    kind, auto_class = class_of(name), class_of(name)._auto_class
    if auto_class == "AutoModelForImageClassification":
        return lambda folder: image_classification.load_classifier(folder, ["a", "b", "c"], 16)
    if auto_class == "AutoModelForPreTraining":
        return lambda folder: load_autoencoder(folder, {})
    heads = {"AutoModelForObjectDetection": detectors.head_of, "AutoModelForSeq2SeqLM": nothing}
    return lambda folder: load_to_train(kind, folder, heads.get(auto_class, model_fields.head_of))


LOADERS = {name: loader(name) for name in (*FAMILIES, "bert-masked", "gpt-untied")}
LOADERS["bert"] = LOADERS["bert-masked"]  # a classifier as an initial language model


def language(folder, objective):
    kind = class_of("bert-masked" if objective == "masked" else "gpt")
    return load_to_train(kind, folder, model_fields.head_of)


def changed(folder, target, change):
    """A copy of a saved model with weights edited by ``change``."""
    shutil.copytree(folder, target)
    weights = safetensors.torch.load_file(target / "model.safetensors")
    safetensors.torch.save_file(change(weights), target / "model.safetensors", {"format": "pt"})
    return str(target)


# The loaders of the other families are the same; the test below damages the weights of all.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("transformer", "bert-masked", "gpt", "vit", "mae") else pytest.mark.slow
        )
        for name in LOADERS
        if name != "bert"
    ],
)
def test_missing_weight_is_refused_wherever_it_is(name, saved, tmp_path):
    weights = safetensors.torch.load_file(saved[name] / "model.safetensors")
    LOADERS[name](str(saved[name]))
    parameters = dict(tiny(name).named_parameters())
    names = [key for key in weights if key in parameters]
    for number, key in enumerate(names[:: max(1, len(names) // 6)]):

        def without(weights, key=key):
            return {other: weight for other, weight in weights.items() if other != key}

        alone = key in ("lm_head.weight",)  # all weights of a head, which may be newly initialized
        folder = changed(saved[name], tmp_path / str(number), without)
        if alone:
            LOADERS[name](folder)
            continue
        with pytest.raises(LoadingError, match=re.escape(key)) as caught:
            LOADERS[name](folder)
        assert str(caught.value).startswith(f'model_name_or_path "{folder}"') and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_weights_are_refused_in_one_line(name, saved, tmp_path):
    weights = safetensors.torch.load_file(saved[name] / "model.safetensors")
    sides = 4 if name == "convlstm" else 2  # it has convolutions alone
    heads = r"classifier|lm_head|body|forecaster|^head"
    kept = next(key for key, weight in weights.items() if weight.ndim == sides and not re.search(heads, key))

    def wider(weights):
        return {**weights, kept: torch.zeros(7, 5)}

    def not_a_number(weights):
        return {**weights, kept: torch.full_like(weights[kept], float("nan"))}

    for number, (change, message) in enumerate(((wider, "shape"), (not_a_number, "finite"))):
        folder = changed(saved[name], tmp_path / str(number), change)
        with pytest.raises(LoadingError, match=f"{re.escape(kept)}|{message}") as caught:
            LOADERS[name](folder)
        assert folder in str(caught.value) and "\n" not in str(caught.value)
    content = (saved[name] / "model.safetensors").read_bytes()
    for number, wrong in enumerate((content[: len(content) // 2], b"", b"\xff" * 64, content[:4])):
        folder = tmp_path / f"file-{number}"
        shutil.copytree(saved[name], folder)
        (folder / "model.safetensors").write_bytes(wrong)
        with pytest.raises(LoadingError) as caught:
            LOADERS[name](str(folder))
        assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoint_with_more_layers_is_refused(saved, tmp_path):
    for name, field in (("vit", "num_hidden_layers"), ("gpt", "num_hidden_layers"), ("detr", "decoder_layers")):
        folder = tmp_path / name
        shutil.copytree(saved[name], folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(
            json.dumps({key: value for key, value in config.items() if key not in STAGES} | {field: 1})
        )
        with pytest.raises(LoadingError, match="lacks the weights"):
            LOADERS[name](str(folder))
    # Allowed if requested: fewer layers, and a new one.
    image_classification.load_classifier(str(saved["vit"]), ["a", "b", "c"], 16, {"num_hidden_layers": 1})
    image_classification.load_classifier(str(saved["vit"]), ["a", "b", "c"], 16, {"num_hidden_layers": 3})


def test_heads_may_be_newly_initialized(saved):
    classes = ["a", "b", "c", "d", "e"]
    for name in ("vit", "vit-base", "mae"):
        assert image_classification.load_classifier(str(saved[name]), classes, 16).num_labels == 5
    _, fresh = language(str(saved["bert-base"]), "masked")
    assert {key.split(".")[0] for key in fresh} == {"lm_head"}
    language(str(saved["gpt-base"]), "causal")
    for name in ("bert-base", "bert", "bert-masked"):
        _, fresh = load_to_train(
            transformers.AutoModelForSequenceClassification,
            str(saved[name]),
            text_model.head_of,
            resized="",
            num_labels=5,
        )
        assert {"classifier.weight", "classifier.bias"} <= fresh
    _, fresh = load_to_train(class_of("detr"), str(saved["detr-base"]), detectors.head_of)
    assert {key.split(".")[0] for key in fresh} == {"class_labels_classifier", "bbox_predictor"}


def test_teachers_need_every_weight(saved, tmp_path):
    kind = transformers.AutoModelForImageClassification
    load_teacher(str(saved["vit"]), kind)
    with pytest.raises(LoadingError, match="lacks the weights"):
        load_teacher(str(saved["vit-base"]), kind)
    folder = changed(saved["vit"], tmp_path / "x", lambda w: {**w, "classifier.bias": torch.zeros(9)})
    with pytest.raises(LoadingError, match=r"classifier\.bias"):
        load_teacher(folder, kind)
