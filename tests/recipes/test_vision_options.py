"""Incompatible options of the image recipes are rejected before the first step; presets fit each other."""

import re

import pytest
import yaml
from recipe_helpers import ROOT, arguments_of
from vision_recipes import classify, pretrain, run, write_images

from hf_tfm import TfmMAEConfig, TfmViTConfig
from hf_tfm.options import parse_arguments


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "parquet")


BOTH = ["mae_pretrain", "image_classification_train"]
CLASSIFY = BOTH[1:]
MISFITS = {
    "two splits": (BOTH, {"holdout": 3}, "exactly one of validation_split and holdout, got validation and 3"),
    "no splits": (
        BOTH,
        {"validation_split": "null"},
        "exactly one of validation_split and holdout, got None and None",
    ),
    "two rates": (BOTH, {"base_learning_rate": 0.1}, "exactly one of learning_rate and base_learning_rate"),
    "two lengths": (BOTH, {"num_train_epochs": 1}, "exactly one of num_train_epochs and max_steps, got 1.0 and 3"),
    "endless": (BOTH, {"streaming": "true", "max_steps": "null", "num_train_epochs": 1}, "streaming needs max_steps"),
    "epochs of a stream": (
        BOTH,
        {"streaming": "true", "warmup_epochs": 1, "warmup_steps": None},
        "streaming needs warmup_steps, not warmup",
    ),
    "part of a stream": (BOTH, {"streaming": "true", "max_train_samples": 5}, "give no holdout and no max_train"),
    "buffer": (BOTH, {"shuffle_buffer": 0}, "shuffle_buffer must be at least 1, got 0"),
    "repeats": (BOTH, {"repeats": 0}, "repeats must be at least 1, got 0"),
    "bad images": (BOTH, {"max_bad_images": -1}, "max_bad_images must be at least 0, got -1"),
    "field": (BOTH, {"model": "{mask_ration: 0.5}"}, "model.mask_ration is not a field of Tfm"),
    "field of its own": (BOTH, {"model": "{image_size: 32}"}, "model.image_size is not a field of Tfm"),
    "head": (BOTH, {"model": "{num_attention_heads: 5}"}, "hidden_size must be a multiple of 5"),
    "patch": (BOTH, {"image_size": 18}, "image_size"),
    "resize": (BOTH, {"resize": 8}, "resize must be at least image_size = 16, got 8"),
    "two warm-ups": (BOTH, {"warmup_epochs": 1}, "one of warmup_steps and warmup_epochs, got 1 and 1.0"),
    "size": (BOTH, {"size": "giant"}, 'size must be one of tiny, small, base, large, huge, got "giant"'),
    "crop": (BOTH, {"augmentation": "{crop: middle}"}, "crop"),
    "smoothing": (CLASSIFY, {"label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
    "metric": (
        CLASSIFY,
        {"metric_for_best_model": "bleu"},
        'metric_for_best_model must be "loss" or "accuracy", got "bleu"',
    ),
    "metric of labels": (
        BOTH[:1],
        {"metric_for_best_model": "accuracy"},
        'metric_for_best_model must be "loss", got "accuracy"',
    ),
    "probe": (CLASSIFY, {"linear_probe": "true"}, "linear_probe needs model_name_or_path"),
    "probe decay": (
        CLASSIFY,
        {"linear_probe": "true", "layer_wise_lr_decay": 0.5, "model_name_or_path": "x"},
        "layer_wise_lr_decay must be 1",
    ),
    "mixing": (CLASSIFY, {"mixing": "{mixup: -1}"}, "mixup must be at least 0, got -1"),
}


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [(recipe, overrides, message) for recipes, overrides, message in MISFITS.values() for recipe in recipes],
    ids=[f"{name}-{recipe}" for name, (recipes, *_) in MISFITS.items() for recipe in recipes],
)
def test_incompatible_options_are_refused(recipe, overrides, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(recipe, data, tmp_path / "run", **overrides)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


UNFIT_FOR_THE_DATA = {
    "holdout": (BOTH, {"validation_split": "null", "holdout": 24}, "holdout must be below the 24 rows of train"),
    "split": (BOTH, {"validation_split": "dev"}, 'validation_split "dev" is not a split of the data set; it has'),
    "image column": (BOTH, {"image_column": "photo"}, 'image_column "photo" is not a column of the data set'),
    "label column": (CLASSIFY, {"label_column": "kind"}, 'label_column "kind" is not a column of the data set'),
    "test split": (CLASSIFY, {"test_splits": "[best]"}, 'test_splits "best" is not a split of the data set'),
    "pairs": (CLASSIFY, {"mixing": "{mixup: 1}", "batch_size": 7}, "batch_size must be a multiple of 2"),
    "pairs apart": (CLASSIFY, {"mixing": "{mixup: 1}", "micro_batch_size": 3}, "micro_batch_size must be a multiple"),
}


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        (recipe, overrides, message)
        for recipes, overrides, message in UNFIT_FOR_THE_DATA.values()
        for recipe in recipes
    ],
    ids=[f"{name}-{recipe}" for name, (recipes, *_) in UNFIT_FOR_THE_DATA.items() for recipe in recipes],
)
def test_options_that_do_not_fit_the_data_are_refused(recipe, overrides, message, data, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(recipe, data, tmp_path / "run", **overrides)
    assert not (tmp_path / "run" / "history.jsonl").exists(), "no training step must run"


def test_image_size_must_be_a_multiple_of_the_pretrained_patch(data, tmp_path):
    mae = pretrain(data, tmp_path / "mae", max_steps=1)
    with pytest.raises(ValueError, match="image_size"):
        classify(data, tmp_path / "run", model_name_or_path=mae, image_size=18, model="{}")


def test_mismatched_encoder_weights_are_refused(data, tmp_path):
    mae = pretrain(data, tmp_path / "mae", max_steps=1)
    with pytest.raises(ValueError, match=r"do not fit it: .*patch_embeddings.projection.weight"):
        classify(data, tmp_path / "run", model_name_or_path=mae, model="{patch_size: 8}")


@pytest.mark.parametrize("name", ["cifar10", "cifar10_small"])
def test_cifar10_presets_fit_each_other(name):
    """Fine-tuning and training from scratch differ only in initial weights and layer-wise learning rates."""
    scratch, tuned = (preset("image_classification_train", kind) for kind in (name, f"{name}_finetune"))
    other = {key for key in scratch.keys() | tuned.keys() if scratch.get(key) != tuned.get(key)}
    assert other == {"model_name_or_path", "layer_wise_lr_decay", "output_dir", "size", "model"}
    pretrained = preset("mae_pretrain", name)
    assert tuned["model_name_or_path"] == pretrained["output_dir"]
    shared = {"dataset_name", "image_size", "mean", "std", "holdout", "validation_split"}
    assert all(pretrained[key] == scratch[key] == tuned[key] for key in shared)
    mine = TfmViTConfig.of_size(scratch["size"], image_size=32, **scratch["model"])
    theirs = TfmMAEConfig.of_size(pretrained["size"], image_size=32, **pretrained["model"])
    for name in ("patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert all(getattr(mine, name) == value for name, value in tuned["model"].items())


def test_cifar10_small_probe_fits_the_others():
    """It starts from the same pretraining as fine-tuning and is evaluated on the same images."""
    tuned, probe = (preset("image_classification_train", f"cifar10_small_{kind}") for kind in ("finetune", "probe"))
    assert probe["linear_probe"] and "layer_wise_lr_decay" not in probe
    shared = {
        "dataset_name",
        "image_size",
        "mean",
        "std",
        "holdout",
        "validation_split",
        "test_splits",
        "model_name_or_path",
        "model",
    }
    assert all(probe[key] == tuned[key] for key in shared)
    for recipe in ("distill_vision", "distill_mae"):
        student = preset(recipe, "cifar10_small")
        teachers = (
            preset("image_classification_train", "cifar10_small_finetune"),
            preset("mae_pretrain", "cifar10_small"),
        )
        (teacher,) = (one for one in teachers if one["output_dir"] == student["teacher"])
        assert all(student[key] == teacher[key] for key in ("dataset_name", "holdout", "validation_split"))


@pytest.mark.parametrize("name", ["mae_finetune", "mae_linear_probe"])
@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_imagenet_presets_build_on_each_other(name, size):
    """They start from the run of the command in their headers, 1600 epochs, to which their numbers refer."""
    later, earlier = preset("image_classification_train", f"{name}_{size}"), preset("mae_pretrain", f"imagenet_{size}")
    folder = later["model_name_or_path"]
    command = f"mae_pretrain --config imagenet_{size} --num_train_epochs 1600 --output_dir {folder}"
    for recipe, file in (("image_classification_train", f"{name}_{size}"), ("mae_pretrain", f"imagenet_{size}")):
        text = (ROOT / "recipes" / "presets" / recipe / f"{file}.yaml").read_text()
        assert f"hf-tfm run {command}" in " ".join(text.replace("\n#", " ").split())
    script = ROOT / "recipes" / "mae_pretrain.py"
    longer = parse_arguments(arguments_of(script), script, command.split()[1:])
    assert (
        (longer.num_train_epochs, longer.output_dir)
        == (1600, folder)
        != (earlier["num_train_epochs"], earlier["output_dir"])
    )
    assert all(later[key] == earlier[key] for key in ("dataset_name", "image_size", "resize"))


def preset(recipe: str, name: str) -> dict:
    """The content of a preset."""
    return yaml.safe_load((ROOT / "recipes" / "presets" / recipe / f"{name}.yaml").read_text())
