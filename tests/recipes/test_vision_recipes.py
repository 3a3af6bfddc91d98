"""The image recipes, run from the command line: masked-autoencoder pretraining, classification, linear probing."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from datasets import load_dataset
from processes import finish, run_ranks
from recipe_helpers import ROOT, arguments_of, fresh_state, history, record, start_process
from torch import nn
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, AutoModelForPreTraining
from vision_recipes import (
    CLASSES,
    SPLITS,
    accuracy,
    classify,
    command_line,
    distance,
    pretrain,
    run,
    scores,
    weights,
    write_imagefolder,
    write_images,
)

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining, TfmViTConfig, TfmViTForImageClassification
from hf_tfm.data.batching import StepLoader
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.data.images import WatchedLoader, image_rows
from hf_tfm.data.pixels import image_processor
from hf_tfm.data.source import gather
from hf_tfm.options import parse_arguments
from hf_tfm.tasks.image_classification import (
    ImageClassificationArguments,
    ImageClassificationTask,
    ImageDistillationArguments,
)
from hf_tfm.tasks.masked_image import MaskedImageArguments, MaskedImageTask
from hf_tfm.training import evaluate

# For what both recipes do with the same code.
ONE_RECIPE = pytest.mark.parametrize(
    "recipe", [pytest.param("mae_pretrain", marks=pytest.mark.slow), "image_classification_train"]
)


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
    """A classifier trained from scratch."""
    return classify(data, tmp_path_factory.mktemp("scratch") / "run", max_steps=12)


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
    assert scores(scratch, "test")["accuracy"] > 0.6, "colors are easy to learn"
    assert all(f"| {row['split']} " in (scratch / "README.md").read_text() for row in found.metrics)
    assert AutoImageProcessor.from_pretrained(scratch).size == {"height": 16, "width": 16}


def test_pretraining(mae, data):
    model, processor = AutoModelForPreTraining.from_pretrained(mae).eval(), AutoImageProcessor.from_pretrained(mae)
    assert (list(processor.image_mean), list(processor.image_std)) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    found = record(mae)
    assert (found.model_type, found.training["item"]) == ("tfm_mae", "hidden patches")
    fresh_state()
    task = MaskedImageTask.for_model(model, processor)
    rows = image_rows(load_dataset(str(data), split="validation"), labelled=False)
    loader = WatchedLoader(StepLoader(rows, BatchSampler(9, 4, shuffle=False), task.collator()))
    again = evaluate(Accelerator(cpu=True), task, model, loader)["loss"]
    assert scores(mae, "validation") == {"reconstruction_loss": pytest.approx(again, rel=1e-5)}
    assert "reconstruction_loss" in (mae / "README.md").read_text()


def test_fine_tuning_at_another_size(mae, data, tmp_path):
    model = "{pooling: mean, drop_path_rate: 0.1}"
    folder = classify(
        data, tmp_path / "run", model_name_or_path=mae, image_size=24, model=model, layer_wise_lr_decay=0.75
    )
    trained, old = weights(folder), weights(mae)
    assert trained["vit.embeddings.position_embeddings"].shape == (1, 1 + 36, 16)
    assert record(folder).base_model == mae.name
    processor = AutoImageProcessor.from_pretrained(folder)
    assert processor.size == {"height": 24, "width": 24}
    assert list(processor.image_mean) == [0.4, 0.5, 0.6], "normalization of the pretrained model"
    config = AutoModelForImageClassification.from_pretrained(folder).config
    assert (config.pooling, config.image_size, config.drop_path_rate) == ("mean", 24, 0.1)
    assert scores(folder, "test")["accuracy"] == pytest.approx(accuracy(folder, data, "test"))
    name = "vit.layers.0.feed_forward.up_proj.weight"
    assert 0.0 < (trained[name] - old[name]).abs().max() < 0.05, "training starts from the pretrained weights"


def test_linear_probe(mae, data, tmp_path):
    folder = classify(
        data, tmp_path / "run", model_name_or_path=mae, linear_probe="true", optimizer="sgd", learning_rate=0.1
    )
    untouched = classify(data, tmp_path / "other", model_name_or_path=mae, linear_probe="true", learning_rate=1e-9)
    trained, start = weights(folder), weights(untouched)
    moved = {name for name in trained if not torch.equal(trained[name], start[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert type(model.classifier) is nn.Linear
    assert scores(folder, "test")["accuracy"] == pytest.approx(accuracy(folder, data, "test"))
    losses = [row["evaluation"]["loss"] for row in history(folder) if "evaluation" in row]
    assert scores(folder, "validation")["accuracy"] == history(folder)[-1]["evaluation"]["accuracy"] and losses


def classifier_of(names, folder, **fields):
    """A classifier for these classes with its processor and random weights."""
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    sizes = {"patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    torch.manual_seed(1)
    config = TfmViTConfig(**sizes, num_attention_heads=2, image_size=16, **labels, **fields)
    model = TfmViTForImageClassification(config)
    model.save_pretrained(folder)
    image_processor(16).save_pretrained(folder)
    return folder, model


SAME, OTHERS, MORE = CLASSES, ["cat", "bee", "ant"], [*CLASSES, "dog"]


@pytest.mark.parametrize("recipe", ["image_classification_train", "distill_vision"])
@pytest.mark.parametrize("token", [False, True])
@pytest.mark.parametrize(
    ("names", "kept"), [(SAME, True), (OTHERS, False), (MORE, False)], ids=["same", "other", "more"]
)
def test_heads_are_kept_only_for_the_same_classes(names, kept, token, recipe, data, tmp_path):
    """Also both heads of a model with a distillation token; a stale head would predict wrong class names."""
    folder, earlier = classifier_of(names, tmp_path / "earlier", distillation_token=token)
    given = {"dataset_name": str(data), "output_dir": ".", "max_steps": 1, "learning_rate": 0.1}
    given |= {"model_name_or_path": str(folder), "image_size": 16}
    if recipe == "distill_vision":
        args = ImageDistillationArguments(**given, teacher="x", terms=[{"kind": "hard_target"}])
    else:
        args = ImageClassificationArguments(**given)
    task = ImageClassificationTask(args, None)
    task.splits, task.processor = task.load_splits(), image_processor(16)
    model = task.build_model()
    assert model.config.id2label == dict(enumerate(CLASSES)) and hasattr(model, "distillation_classifier") == token
    for name in ["classifier", "distillation_classifier"][: 1 + token]:
        mine, theirs = getattr(model, name), getattr(earlier, name)
        assert mine.weight.shape == (3, 16) and mine.bias.shape == (3,)
        assert (mine.weight.shape == theirs.weight.shape and torch.equal(mine.weight, theirs.weight)) == kept
        assert mine.weight.std() > 0.01
    state = model.vit.state_dict()
    assert all(torch.equal(state[name], value) for name, value in earlier.vit.state_dict().items())


def test_new_pooling_resets_the_head(data, tmp_path):
    folder, earlier = classifier_of(OTHERS, tmp_path / "earlier")
    begun = classify(data, tmp_path / "run", model_name_or_path=folder, model="{pooling: mean}", learning_rate=1e-12)
    assert "vit.fc_norm.weight" in weights(begun), "the earlier model has no such weight"
    assert not torch.allclose(weights(begun)["classifier.weight"], earlier.classifier.weight, atol=1e-4)


def test_linear_probe_of_a_model_with_a_distillation_token(data, tmp_path):
    folder, earlier = classifier_of(MORE, tmp_path / "earlier", distillation_token=True)
    probe = {"linear_probe": "true", "optimizer": "sgd", "learning_rate": 0.1}
    trained = classify(data, tmp_path / "run", model_name_or_path=folder, **probe)
    heads = {f"{head}.{kind}" for head in ("classifier", "distillation_classifier") for kind in ("weight", "bias")}
    state = earlier.save_pretrained(tmp_path / "again") or weights(tmp_path / "again")
    assert {name for name, value in weights(trained).items() if not torch.equal(value, state[name])} == heads
    assert scores(trained, "test")["accuracy"] == pytest.approx(accuracy(trained, data, "test"))


@pytest.mark.parametrize(
    "recipe", ["mae_pretrain", pytest.param("image_classification_train", marks=pytest.mark.slow)]
)
def test_image_size_defaults_to_the_initial_model(recipe, mae, data, tmp_path):
    """From its image processor; another size applies to the model, its processor and its configuration."""
    for size, expected in ((None, 16), (24, 24), ("[24, 16]", (24, 16))):
        folder = run(recipe, data, tmp_path / str(size), model_name_or_path=mae, image_size=size, max_steps=1)
        height, width = (expected, expected) if isinstance(expected, int) else expected
        assert AutoImageProcessor.from_pretrained(folder).size == {"height": height, "width": width}
        found = AutoConfig.from_pretrained(folder).image_size
        assert found == expected or tuple(found) == expected
        table = weights(folder)["vit.embeddings.position_embeddings"]
        assert table.shape == (1, 1 + height * width // 16, 16)
        if recipe == "mae_pretrain":
            again = AutoModelForPreTraining.from_pretrained(folder)
            assert again.decoder.decoder_pos_embed.shape == table.shape and again.decoder.grid == (
                height // 4,
                width // 4,
            )


def test_initial_model_without_a_processor_needs_a_size(data, tmp_path):
    folder, _ = classifier_of(SAME, tmp_path / "earlier")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no image processor: .*, or give image_size, mean and std"):
        classify(data, tmp_path / "run", model_name_or_path=folder, image_size=None)
    scale = {"image_size": 16, "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"}
    classify(data, tmp_path / "other", model_name_or_path=folder, **scale, max_steps=1)


def test_stream_is_shuffled_by_its_buffer(data):
    """The file is sorted by class; every epoch has each image once, in another order."""
    model = TfmMAEForPreTraining(TfmMAEConfig(image_size=16, patch_size=4))
    orders = []
    for buffer in (1, 24):
        overrides = {
            "streaming": True,
            "max_steps": 1,
            "learning_rate": 0.1,
            "batch_size": 8,
            "shuffle_buffer": buffer,
        }
        args = MaskedImageArguments(dataset_name=str(data), output_dir=".", **overrides)
        task = MaskedImageTask(args, Accelerator(cpu=True))
        task.model, task.processor = model, image_processor(16)
        task.splits = task.load_splits()
        loader = task.dataloader("train", training=True, collate=task.collator())
        for epoch in (0, 1):
            steps = [batch["pixel_values"] for step in loader.epoch(epoch) for batch in step]
            orders.append([image.numpy().tobytes() for step in steps for image in step])
    assert len({tuple(order) for order in orders}) == 4
    task.splits["gathered"] = gather(task.splits["train"])
    evaluation = task.dataloader("gathered")
    expected = {
        image.numpy().tobytes() for step in evaluation.epoch(0) for batch in step for image in batch["pixel_values"]
    }
    assert len(expected) == 24 and all(set(order) == expected and len(order) == 24 for order in orders)


OPTIONS = {
    "mixing": {"mixing": "{mixup: 0.8, cutmix: 1.0}", "label_smoothing": 0.1, "micro_batch_size": 4},
    "repeats": {"repeats": 3, "augmentation": "{crop: resized, rand_augment: 1, erasing: 0.5}"},
    "ema": {"ema_decay": 0.5, "final_weights": "ema"},
    "sgd": {"optimizer": "sgd", "max_grad_norm": 1.0, "mixed_precision": "bf16"},
    "stream": {"streaming": "true", "repeats": 2},
    "probe": {"linear_probe": "true", "optimizer": "sgd"},
}
# Options that the other recipe tests, too.
SLOW = {("image_classification_train", "repeats"), ("image_classification_train", "stream"), ("mae_pretrain", "sgd")}
SLOW |= {("mae_pretrain", "ema"), ("image_classification_train", "sgd")}
# The stream of mae_pretrain has repeats, too; other tests resume with averages and with trained heads.
SLOW |= {("mae_pretrain", "repeats"), ("image_classification_train", "ema"), ("image_classification_train", "probe")}
RESUMED = {
    "image_classification_train": [("mixing", 1), ("repeats", 0), ("ema", 0), ("sgd", 2), ("stream", 0), ("probe", 0)],
    "mae_pretrain": [("repeats", 2), ("ema", 0), ("sgd", 0), ("stream", 1)],
}


@pytest.mark.parametrize(
    ("recipe", "kind", "workers"),
    [
        pytest.param(recipe, *case, marks=pytest.mark.slow if (recipe, case[0]) in SLOW else ())
        for recipe, cases in RESUMED.items()
        for case in cases
    ],
)
def test_a_resumed_run_is_bit_equal(recipe, kind, workers, mae, data, tmp_path, capsys):
    """A killed run leaves only its last checkpoint; the number of workers does not matter."""
    start = {"model_name_or_path": mae} if kind == "probe" else {}
    overrides = {**OPTIONS[kind], **start, "max_steps": 5, "save_steps": 1, "save_total_limit": 9, "eval_steps": 5}
    whole = run(recipe, data, tmp_path / "whole", **overrides)
    part = run(recipe, data, tmp_path / "part", dataloader_num_workers=workers, **overrides)
    for step in (3, 4, 5):
        shutil.rmtree(part / "checkpoints" / f"step-{step:08d}")
    for name in ("results.json", "model.safetensors"):
        (part / name).unlink()
    capsys.readouterr()
    run(recipe, data, part, dataloader_num_workers=workers, **overrides)
    assert "resuming from" in capsys.readouterr().out
    assert distance(whole, part) == 0.0
    assert record(whole).metrics == record(part).metrics


def test_mixing_repeats_and_averages_change_the_weights(data, tmp_path):
    """Each of these options has an effect: no two of the runs end with equal weights."""
    runs = [classify(data, tmp_path / kind, **overrides) for kind, overrides in OPTIONS.items() if kind != "probe"]
    runs.append(classify(data, tmp_path / "plain"))
    assert all(distance(one, other) > 1e-5 for i, one in enumerate(runs) for other in runs[:i])


@ONE_RECIPE
def test_data_format_does_not_matter(recipe, data, tmp_path):
    """Parquet, an image folder, and files per split give the same images in the same order."""
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


def test_pretraining_and_fine_tuning_hold_out_the_same_images(data):
    """Images used to select the fine-tuned model are not in the pretraining data, and all others are."""

    def read(labelled: bool) -> dict[str, set[bytes]]:
        overrides = {"max_steps": 1, "learning_rate": 0.1, "validation_split": None, "holdout": 6}
        kind = ImageClassificationTask if labelled else MaskedImageTask
        rows = kind(kind.Arguments(dataset_name=str(data), output_dir=".", **overrides), None).load_splits()
        return {split: {row["image"]["bytes"] for row in part} for split, part in rows.items()}

    tuned, pretrained = read(True), read(False)
    assert tuned == pretrained and {split: len(part) for split, part in tuned.items()} == {"train": 18, "holdout": 6}
    assert not tuned["train"] & tuned["holdout"]


def test_scaled_learning_rate_and_warmup_are_logged(data, tmp_path, capsys):
    overrides = {"learning_rate": None, "base_learning_rate": 0.16, "warmup_steps": None, "warmup_epochs": 2}
    folder = classify(data, tmp_path / "run", max_steps=8, **overrides)
    assert "learning rate 0.005 = 0.16 x 8 images / 256; warm-up 6 steps of 3 an epoch" in capsys.readouterr().out
    rates = [row["learning_rate"] for row in history(folder) if "learning_rate" in row]
    assert rates and max(rates) <= 0.005


@ONE_RECIPE
def test_stored_arguments_are_a_config(recipe, data, tmp_path):
    """results.json and the model card hold the options as given, so the run can be repeated."""
    given = {"learning_rate": None, "base_learning_rate": 0.16, "warmup_steps": None, "warmup_epochs": 1}
    folder = run(recipe, data, tmp_path / "run", **given)
    file = tmp_path / "arguments.yaml"
    file.write_text(json.dumps(record(folder).arguments))
    script = ROOT / "recipes" / f"{recipe}.py"
    kind = arguments_of(script)
    again = parse_arguments(kind, script, ["--config", str(file)])
    # The record holds only the last component of paths.
    first = parse_arguments(kind, script, command_line(recipe, data, folder, **given))
    assert again == replace(first, output_dir=folder.name, dataset_name=data.name)


@ONE_RECIPE
def test_bad_images_are_skipped_and_reported(recipe, tmp_path, caplog):
    broken = write_images(tmp_path / "data", bad=(3, 11))
    run(recipe, broken, tmp_path / "run")
    messages = [line.getMessage() for line in caplog.records if "is left out" in line.getMessage()]
    assert sorted(line.split()[1] for line in messages) == ["11", "3"]
    with pytest.raises(ValueError, match="more images cannot be read than max_bad_images=1 allows: image"):
        run(recipe, broken, tmp_path / "strict", max_bad_images=1)


LAUNCHED = {"max_steps": 3, "adam_epsilon": 1e-4, "augmentation": "{rand_augment: 1}"}
CASES = {
    "mae": ("mae_pretrain", {}),
    "mixed": ("image_classification_train", {"mixing": "{mixup: 0.8, cutmix: 1.0}", "repeats": 2}),
    "probe": ("image_classification_train", {"linear_probe": "true", "optimizer": "sgd", "learning_rate": 0.1}),
}


@pytest.mark.parametrize("case", ["mae", "mixed", pytest.param("probe", marks=pytest.mark.slow)])
def test_launchers_and_two_processes_give_the_same_weights(case, mae, data, tmp_path):
    """As a script, by hf-tfm run, and as two processes (gloo) that share each step."""
    recipe, overrides = CASES[case]
    if case == "probe":
        overrides = {**overrides, "model_name_or_path": mae, "model": None}
    alone = run(recipe, data, tmp_path / "alone", **LAUNCHED, **overrides)
    script = str(ROOT / "recipes" / f"{recipe}.py")
    launchers = {
        "mae": {"script": (script,), "two": ("-m", "hf_tfm.cli", "run", recipe)},
        "mixed": {"command": ("-m", "hf_tfm.cli", "run", recipe), "two": (script,)},
        "probe": {"two": (script,)},
    }[case]
    for name, launcher in launchers.items():
        command = (*launcher, *command_line(recipe, data, tmp_path / name, **LAUNCHED, **overrides))
        if name == "two":
            run_ranks(*command, cwd=ROOT)
        else:
            finish(start_process(*command))
        assert distance(alone, tmp_path / name) < 1e-6
        for mine, theirs in zip(record(alone).metrics, record(tmp_path / name).metrics, strict=True):
            assert mine == {**theirs, "value": pytest.approx(theirs["value"], rel=1e-5)}
    assert record(tmp_path / "two").hardware["count"] == 2
