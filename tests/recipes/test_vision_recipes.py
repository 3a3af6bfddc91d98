"""The recipes on images, run as people run them: masked-autoencoder pretraining, classification, linear probe."""

import io
import re
import runpy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, load_dataset
from datasets import Image as ImageFeature
from PIL import Image
from recipe_helpers import ROOT, finish_process, fresh_state, history, record, start_process
from safetensors.torch import load_file
from torch import nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, AutoModelForPreTraining

from hf_tfm import TfmMAEConfig, TfmViTConfig
from hf_tfm.data.batching import StepLoader
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.images import WatchedLoader, image_rows
from hf_tfm.tasks.masked_image import MaskedImageTask
from hf_tfm.training import evaluate

CLASSES = ["ant", "bee", "cat"]
SPLITS = {"train": 24, "validation": 9, "test": 7}
ENCODER = "patch_size: 4, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
DECODER = (
    "decoder_hidden_size: 16, decoder_intermediate_size: 32, decoder_num_hidden_layers: 1, "
    "decoder_num_attention_heads: 2"
)
VIT, MAE = f"{{{ENCODER}, drop_path_rate: 0.0}}", f"{{{ENCODER}, {DECODER}}}"


def picture(number: int) -> bytes:
    """A PNG of 18 x 20 pixels; its class, number % 3, shows in its colour."""
    noise = np.random.default_rng(number).integers(0, 160, (20, 18, 3))
    noise[..., number % 3] += 90
    file = io.BytesIO()
    Image.fromarray(noise.astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def numbers_of(split: str) -> list[int]:
    """The images of a split, by class, as a folder of images has them."""
    start = {"train": 0, "validation": 24, "test": 33}[split]
    return sorted(range(start, start + SPLITS[split]), key=lambda number: (number % 3, number))


def write_images(folder: Path, bad: tuple[int, ...] = ()) -> Path:
    """Parquet of 24 training, 9 validation and 7 test images; the training images in the rows ``bad`` are cut off."""
    folder.mkdir(parents=True, exist_ok=True)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASSES)})
    for split in SPLITS:
        rows = []
        for row, number in enumerate(numbers_of(split)):
            data = picture(number)
            data = data[:60] if split == "train" and row in bad else data
            rows.append({"image": {"bytes": data, "path": None}, "label": number % 3})
        Dataset.from_list(rows, features=features).to_parquet(str(folder / f"{split}.parquet"))
    (folder / "README.md").write_text("---\nlicense: cc0-1.0\n---\n# Noise\n")
    return folder


def write_imagefolder(folder: Path) -> Path:
    """The same images as files."""
    for split in SPLITS:
        for number in numbers_of(split):
            place = folder / split / CLASSES[number % 3]
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{number:03}.png").write_bytes(picture(number))
    return folder


def words(recipe: str, data: Path, output_dir: Path, **knobs) -> list[str]:
    """The command line of a short run; a knob that is None is left out."""
    given = {
        "dataset": data,
        "output_dir": output_dir,
        "image_size": 16,
        "num_steps": 3,
        "warmup_steps": 1,
        "schedule": "cosine",
        "batch_size": 8,
        "learning_rate": 0.01,
        "size": "tiny",
        "progress": "false",
        "final_weights": "last",
        **({"test_splits": "[test]"} if recipe == "image_classification_train" else {}),
        **({} if "init_from" in knobs else {"model": VIT if recipe == "image_classification_train" else MAE}),
        **knobs,
    }
    return [word for name, value in given.items() if value is not None for word in (f"--{name}", str(value))]


def run(recipe: str, data: Path, output_dir: Path, **knobs) -> Path:
    """Run a recipe in this process; returns its folder."""
    fresh_state()
    script = str(ROOT / "recipes" / f"{recipe}.py")
    assert runpy.run_path(script)["main"](words(recipe, data, output_dir, **knobs)) == 0
    return output_dir


def classify(data: Path, output_dir: Path, **knobs) -> Path:
    return run("image_classification_train", data, output_dir, **knobs)


def pretrain(data: Path, output_dir: Path, **knobs) -> Path:
    return run("mae_pretrain", data, output_dir, **knobs)


def scores(folder: Path, split: str) -> dict[str, float]:
    """What results.json says of a split."""
    return {row["name"]: row["value"] for row in record(folder).metrics if row["split"] == split}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def distance(one: Path, other: Path) -> float:
    """The largest difference of two models' weights."""
    mine, theirs = weights(one), weights(other)
    assert mine.keys() == theirs.keys()
    return max((mine[name].float() - theirs[name].float()).abs().max().item() for name in mine)


def accuracy(folder: Path, data: Path, split: str) -> float:
    """Top-1 of a saved model and its saved processor, through transformers alone."""
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    rows = load_dataset(str(data), split=split)
    with torch.no_grad():
        logits = model(**processor([row["image"] for row in rows], return_tensors="pt")).logits
    names = [model.config.id2label[i] for i in logits.argmax(dim=-1).tolist()]
    return sum(name == CLASSES[row["label"]] for name, row in zip(names, rows, strict=True)) / len(rows)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images") / "parquet")


@pytest.fixture(scope="module")
def scratch(data, tmp_path_factory):
    """A classifier from scratch."""
    return classify(data, tmp_path_factory.mktemp("scratch") / "run", num_steps=12)


@pytest.fixture(scope="module")
def mae(data, tmp_path_factory):
    """A pretrained masked autoencoder."""
    return pretrain(data, tmp_path_factory.mktemp("mae") / "run", mean="[0.4, 0.5, 0.6]", std="[0.2, 0.3, 0.4]")


def test_classification_from_scratch(scratch, data):
    found = record(scratch)
    assert (found.task, found.model_type, found.base_model) == ("image-classification", "tfm_vit", None)
    assert found.data["rows"] == {"train": 24, "validation": 9, "test": 7}
    assert found.data["license"] == "cc0-1.0"
    assert found.training["steps"] == 12 and found.training["item"] == "images"
    for split in ("validation", "test"):
        assert scores(scratch, split)["accuracy"] == pytest.approx(accuracy(scratch, data, split))
    assert scores(scratch, "test")["accuracy"] > 0.6, "colours are easy to learn"
    assert all(f"| {row['split']} " in (scratch / "README.md").read_text() for row in found.metrics)
    assert AutoImageProcessor.from_pretrained(scratch).size == {"height": 16, "width": 16}


def test_pretraining(mae, data):
    model, processor = AutoModelForPreTraining.from_pretrained(mae).eval(), AutoImageProcessor.from_pretrained(mae)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    found = record(mae)
    assert (found.model_type, found.training["item"]) == ("tfm_mae", "hidden patches")
    fresh_state()
    task = MaskedImageTask(model.config, processor, seed=0)
    rows = image_rows(load_dataset(str(data), split="validation"), labelled=False)
    loader = WatchedLoader(StepLoader(rows, BatchSampler(9, 4, shuffle=False), task.collate))
    again = evaluate(Accelerator(cpu=True), task, model, loader)["loss"]
    assert scores(mae, "validation") == {"reconstruction_loss": pytest.approx(again, rel=1e-5)}
    assert "reconstruction_loss" in (mae / "README.md").read_text()


def test_fine_tuning_at_another_size(mae, data, tmp_path):
    model = "{pooling: mean, drop_path_rate: 0.1}"
    folder = classify(data, tmp_path / "run", init_from=mae, image_size=24, model=model, layer_decay=0.75)
    trained, old = weights(folder), weights(mae)
    assert trained["vit.embeddings.position_embeddings"].shape == (1, 1 + 36, 16)
    assert record(folder).base_model == str(mae)
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.size == {"height": 24, "width": 24}
    assert list(processor.image_mean) == [0.4, 0.5, 0.6], "the scale is the pretrained model's"
    config = AutoModelForImageClassification.from_pretrained(folder).config
    assert (config.pooling, config.image_size, config.drop_path_rate) == ("mean", 24, 0.1)
    assert scores(folder, "test")["accuracy"] == pytest.approx(accuracy(folder, data, "test"))
    name = "vit.encoder.layer.0.intermediate.dense.weight"
    assert 0.0 < (trained[name] - old[name]).abs().max() < 0.05, "it went on from the pretrained weights"


def test_linear_probe(mae, data, tmp_path):
    folder = classify(data, tmp_path / "run", init_from=mae, linear_probe="true", optimizer="sgd", learning_rate=0.1)
    untouched = classify(data, tmp_path / "other", init_from=mae, linear_probe="true", learning_rate=1e-9)
    trained, start = weights(folder), weights(untouched)
    moved = {name for name in trained if not torch.equal(trained[name], start[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model.classifier) is nn.Linear
    assert scores(folder, "test")["accuracy"] == pytest.approx(accuracy(folder, data, "test"))
    losses = [row["evaluation"]["loss"] for row in history(folder) if "evaluation" in row]
    assert scores(folder, "validation")["accuracy"] == history(folder)[-1]["evaluation"]["accuracy"] and losses


KNOBS = {
    "mixing": {"mixing": "{mixup: 0.8, cutmix: 1.0}", "label_smoothing": 0.1, "micro_batch_size": 4},
    "repeats": {"repeats": 3, "augmentation": "{crop: resized, rand_augment: 1, erasing: 0.5}"},
    "ema": {"ema_decay": 0.5, "final_weights": "ema"},
    "sgd": {"optimizer": "sgd", "max_grad_norm": 1.0, "precision": "bf16"},
    "stream": {"streaming": "true", "repeats": 2},
    "probe": {"linear_probe": "true", "optimizer": "sgd"},
}
RESUMED = {
    "image_classification_train": [("mixing", 2), ("repeats", 0), ("ema", 0), ("sgd", 2), ("stream", 0), ("probe", 0)],
    "mae_pretrain": [("repeats", 2), ("ema", 0), ("sgd", 0), ("stream", 1)],
}


@pytest.mark.parametrize(
    ("recipe", "kind", "workers"), [(recipe, *case) for recipe, cases in RESUMED.items() for case in cases]
)
def test_a_resumed_run_is_bit_equal(recipe, kind, workers, mae, data, tmp_path, capsys):
    """A killed run leaves its last checkpoint and nothing that came after; how many workers it has changes nothing."""
    start = {"init_from": mae} if kind == "probe" else {}
    knobs = {**KNOBS[kind], **start, "num_steps": 5, "save_steps": 1, "keep_checkpoints": 9, "eval_steps": 5}
    whole = run(recipe, data, tmp_path / "whole", **knobs)
    part = run(recipe, data, tmp_path / "part", num_workers=workers, **knobs)
    for step in (3, 4, 5):
        shutil.rmtree(part / "checkpoints" / f"step-{step:08d}")
    for name in ("results.json", "model.safetensors"):
        (part / name).unlink()
    capsys.readouterr()
    run(recipe, data, part, num_workers=workers, **knobs)
    assert "going on from" in capsys.readouterr().out
    assert distance(whole, part) == 0.0
    assert record(whole).metrics == record(part).metrics


def test_mixing_repeats_and_averages_change_the_weights(data, tmp_path):
    """Each of these knobs does something: no two of the runs end with equal weights."""
    runs = [classify(data, tmp_path / kind, **knobs) for kind, knobs in KNOBS.items() if kind != "probe"]
    runs.append(classify(data, tmp_path / "plain"))
    assert all(distance(one, other) > 1e-5 for i, one in enumerate(runs) for other in runs[:i])


@pytest.mark.parametrize("recipe", ["mae_pretrain", "image_classification_train"])
def test_the_format_of_the_data_changes_nothing(recipe, data, tmp_path):
    """Parquet, a folder of images and its files by split: the same images in the same order."""
    folder = write_imagefolder(tmp_path / "files")
    one = run(recipe, data, tmp_path / "one")
    other = run(recipe, folder, tmp_path / "other")
    files = ", ".join(f"{split}: {folder}/{split}/**" for split in SPLITS)
    named = run(recipe, "imagefolder", tmp_path / "named", data_files=f"{{{files}}}")
    assert record(one).metrics == record(other).metrics == record(named).metrics
    assert distance(one, other) == distance(one, named) == 0.0


def test_holdout_and_max_train_samples(data, tmp_path):
    folder = classify(data, tmp_path / "run", validation_split="null", holdout=6, max_train_samples=10)
    assert record(folder).data["rows"] == {"train": 10, "holdout": 6, "test": 7}
    assert {row["split"] for row in record(folder).metrics} == {"holdout", "test"}
    # The same images are held out by pretraining with the same seed, so that fine-tuning has a clean validation split.
    other = pretrain(data, tmp_path / "mae", validation_split="null", holdout=6)
    with_labels, without = (record(each).data["fingerprint"] for each in (folder, other))
    assert with_labels["holdout"] != without["holdout"], "labels are part of a fingerprint"
    held_out = [load_dataset(str(data), split="train").train_test_split(6, seed=0)["test"]["label"] for _ in range(2)]
    assert held_out[0] == held_out[1]


def test_base_learning_rate_and_warm_up_are_told(data, tmp_path, capsys):
    knobs = {"learning_rate": None, "base_learning_rate": 0.16, "warmup_steps": None, "warmup_epochs": 2}
    folder = classify(data, tmp_path / "run", **knobs)
    assert "learning rate 0.005 = 0.16 x 8 images / 256; warm-up 6 steps of 3 an epoch" in capsys.readouterr().out
    rates = [row["learning_rate"] for row in history(folder) if "learning_rate" in row]
    assert rates and max(rates) <= 0.005


def test_bad_images_are_left_out_and_told(tmp_path, caplog):
    broken = write_images(tmp_path / "data", bad=(3, 11))
    for recipe in ("mae_pretrain", "image_classification_train"):
        caplog.clear()
        run(recipe, broken, tmp_path / recipe)
        told = [line.getMessage() for line in caplog.records if "is left out" in line.getMessage()]
        assert sorted(line.split()[1] for line in told) == ["11", "3"]
        with pytest.raises(ValueError, match="more images cannot be read than max_bad_images=1 allows:\n  image"):
            run(recipe, broken, tmp_path / f"{recipe}-strict", max_bad_images=1)


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
    "two lengths": (BOTH, {"num_epochs": 1}, "exactly one of num_epochs and num_steps, got 1.0 and 3"),
    "endless": (BOTH, {"streaming": "true", "num_steps": "null", "num_epochs": 1}, "streaming needs num_steps"),
    "epochs of a stream": (
        BOTH,
        {"streaming": "true", "warmup_epochs": 1},
        "streaming needs warmup_steps, not warmup",
    ),
    "part of a stream": (BOTH, {"streaming": "true", "max_train_samples": 5}, "give no holdout and no max_train"),
    "repeats": (BOTH, {"repeats": 0}, "repeats must be at least 1, got 0"),
    "bad images": (BOTH, {"max_bad_images": -1}, "max_bad_images must be at least 0, got -1"),
    "field": (BOTH, {"model": "{mask_ration: 0.5}"}, "model.mask_ration is not a field of Tfm"),
    "field of its own": (BOTH, {"model": "{image_size: 32}"}, "model.image_size is not a field of Tfm"),
    "head": (BOTH, {"model": "{num_attention_heads: 5}"}, "hidden_size must be a multiple of 5"),
    "patch": (BOTH, {"image_size": 18}, "image_size"),
    "size": (BOTH, {"size": "giant"}, 'size must be one of tiny, small, base, large, huge, got "giant"'),
    "crop": (BOTH, {"augmentation": "{crop: middle}"}, "crop"),
    "smoothing": (CLASSIFY, {"label_smoothing": 1.0}, "label_smoothing must be in [0, 1), got 1.0"),
    "metric": (CLASSIFY, {"best_metric": "bleu"}, 'best_metric must be "loss" or "accuracy", got "bleu"'),
    "probe": (CLASSIFY, {"linear_probe": "true"}, "linear_probe needs init_from"),
    "probe decay": (CLASSIFY, {"linear_probe": "true", "layer_decay": 0.5, "init_from": "x"}, "layer_decay must be 1"),
    "mixing": (CLASSIFY, {"mixing": "{mixup: -1}"}, "mixup must be at least 0, got -1"),
}


@pytest.mark.parametrize(
    ("recipe", "knobs", "message"),
    [(recipe, knobs, message) for recipes, knobs, message in MISFITS.values() for recipe in recipes],
    ids=[f"{name}-{recipe}" for name, (recipes, *_) in MISFITS.items() for recipe in recipes],
)
def test_knobs_that_do_not_fit(recipe, knobs, message, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(recipe, data, tmp_path / "run", **knobs)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


UNFIT_FOR_THE_DATA = {
    "holdout": (BOTH, {"validation_split": "null", "holdout": 24}, "holdout must be below the 24 images of train"),
    "split": (BOTH, {"validation_split": "dev"}, 'validation_split "dev" is not a split of the data set; it has'),
    "image column": (BOTH, {"image_column": "photo"}, 'image_column "photo" is not a column of the data set'),
    "label column": (CLASSIFY, {"label_column": "kind"}, 'label_column "kind" is not a column of the data set'),
    "test split": (CLASSIFY, {"test_splits": "[best]"}, 'test_splits "best" is not a split of the data set'),
    "pairs": (CLASSIFY, {"mixing": "{mixup: 1}", "batch_size": 7}, "batch_size must be a multiple of 2"),
    "pairs apart": (CLASSIFY, {"mixing": "{mixup: 1}", "micro_batch_size": 3}, "micro_batch_size must be a multiple"),
    "resize": (BOTH, {"resize": 8}, "resize must be at least the size 16, got 8"),
}


@pytest.mark.parametrize(
    ("recipe", "knobs", "message"),
    [(recipe, knobs, message) for recipes, knobs, message in UNFIT_FOR_THE_DATA.values() for recipe in recipes],
    ids=[f"{name}-{recipe}" for name, (recipes, *_) in UNFIT_FOR_THE_DATA.items() for recipe in recipes],
)
def test_knobs_that_do_not_fit_the_data(recipe, knobs, message, data, tmp_path):
    with pytest.raises(ValueError, match=re.escape(message)):
        run(recipe, data, tmp_path / "run", **knobs)
    assert not (tmp_path / "run" / "history.jsonl").exists(), "no step was made"


def test_an_image_size_that_the_pretrained_patch_does_not_divide(mae, data, tmp_path):
    with pytest.raises(ValueError, match="image_size"):
        classify(data, tmp_path / "run", init_from=mae, image_size=18, model="{}")


LAUNCHED = {"num_steps": 3, "adam_epsilon": 1e-4, "augmentation": "{rand_augment: 1}"}
CASES = {
    "mae": ("mae_pretrain", {}),
    "mixed": ("image_classification_train", {"mixing": "{mixup: 0.8, cutmix: 1.0}", "repeats": 2}),
    "probe": ("image_classification_train", {"linear_probe": "true", "optimizer": "sgd", "learning_rate": 0.1}),
}


@pytest.mark.parametrize("case", list(CASES))
def test_launchers_and_two_processes_give_the_same_weights(case, mae, data, tmp_path):
    """As a script, by hf-tfm run, and as two processes (gloo), which share each step."""
    recipe, knobs = CASES[case]
    if case == "probe":
        knobs = {**knobs, "init_from": mae, "model": None}
    alone = run(recipe, data, tmp_path / "alone", **LAUNCHED, **knobs)
    script = str(ROOT / "recipes" / f"{recipe}.py")
    two = ("-m", "torch.distributed.run", "--nproc_per_node", "2")
    launchers = {
        "mae": {"script": (script,), "two": (*two, "-m", "hf_tfm.cli", "run", recipe)},
        "mixed": {"command": ("-m", "hf_tfm.cli", "run", recipe), "two": (*two, script)},
        "probe": {"two": (*two, script)},
    }[case]
    for name, launcher in launchers.items():
        finish_process(start_process(*launcher, *words(recipe, data, tmp_path / name, **LAUNCHED, **knobs)))
        assert distance(alone, tmp_path / name) < 1e-6
        for mine, theirs in zip(record(alone).metrics, record(tmp_path / name).metrics, strict=True):
            assert mine == {**theirs, "value": pytest.approx(theirs["value"], rel=1e-5)}
    assert record(tmp_path / "two").hardware["count"] == 2


def test_presets_of_cifar10_fit_each_other():
    """Fine-tuning and from scratch differ in where weights come from and how fast layers learn, in nothing else."""
    scratch, tuned = (preset("image_classification_train", name) for name in ("cifar10", "cifar10_finetune"))
    other = {key for key in scratch.keys() | tuned.keys() if scratch.get(key) != tuned.get(key)}
    assert other == {"init_from", "layer_decay", "output_dir", "size", "model"}
    pretrained = preset("mae_pretrain", "cifar10")
    assert tuned["init_from"] == pretrained["output_dir"]
    shared = {"dataset", "image_size", "mean", "std", "holdout", "validation_split"}
    assert all(pretrained[key] == scratch[key] == tuned[key] for key in shared)
    mine = TfmViTConfig.of_size(scratch["size"], image_size=32, **scratch["model"])
    theirs = TfmMAEConfig.of_size(pretrained["size"], image_size=32, **pretrained["model"])
    for name in ("patch_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        assert getattr(mine, name) == getattr(theirs, name)
    assert all(getattr(mine, name) == value for name, value in tuned["model"].items())


@pytest.mark.parametrize("name", ["mae_finetune", "mae_linear_probe"])
@pytest.mark.parametrize("size", ["base", "large", "huge"])
def test_presets_of_imagenet_go_on_from_each_other(name, size):
    later, earlier = preset("image_classification_train", f"{name}_{size}"), preset("mae_pretrain", f"imagenet_{size}")
    assert later["init_from"] == earlier["output_dir"]
    assert all(later[key] == earlier[key] for key in ("dataset", "image_size", "resize"))


def preset(recipe: str, name: str) -> dict:
    """The content of a preset."""
    return yaml.safe_load((ROOT / "recipes" / "presets" / recipe / f"{name}.yaml").read_text())
