"""Video forecasting: micro-batches and ranks, videos that are read or generated, scores and baselines."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset, Features, List
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor

from hf_tfm import TfmConvLSTMConfig, TfmConvLSTMForPrediction
from hf_tfm.data.batching import StepLoader
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.metrics.video import FrameErrors
from hf_tfm.tasks.video_forecasting import (
    VideoCollator,
    VideoEvaluationArguments,
    VideoForecastingArguments,
    VideoForecastingTask,
    joined,
    video_processor,
)
from hf_tfm.training.loop import train_step

FIELDS = {"image_size": 16, "context_length": 3, "prediction_length": 2}
TINY = {**FIELDS, "hidden_size": 4, "num_hidden_layers": 1, "kernel_size": 3, "patch_size": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved model, and parquet files with lists of frames: 4 videos of 9 frames, the last one of 4 frames."""
    folder = tmp_path_factory.mktemp("video")
    torch.manual_seed(0)
    TfmConvLSTMForPrediction(TfmConvLSTMConfig(**TINY)).save_pretrained(folder / "model")
    video_processor(16).save_pretrained(folder / "model")
    random = np.random.RandomState(0)
    features = Features({"frames": List(ImageFeature())})
    rows = [
        {"frames": [Image.fromarray(frame) for frame in random.randint(0, 256, (length, 16, 16), np.uint8)]}
        for length in (9, 9, 9, 4)
    ]
    for split in ("train", "validation"):
        Dataset.from_list(rows, features=features).to_parquet(folder / "data" / f"{split}.parquet")
    return folder


def training(folder, **options) -> VideoForecastingTask:
    given = {"dataset_name": str(folder / "data"), "max_steps": 1, "learning_rate": 0.1, **FIELDS, **options}
    model = {name: value for name, value in TINY.items() if name not in FIELDS}
    args = VideoForecastingArguments(output_dir=".", model=model, **given)
    task = VideoForecastingTask(args, Accelerator(cpu=True))
    task.splits = task.load_splits()
    task.processor, task.model = task.build_processor(), task.build_model()
    return task


def gradient(task: VideoForecastingTask, batches: list) -> Tensor:
    model = copy.deepcopy(task.model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0, fused=True)
    train_step(task.accelerator, task, model, optimizer, batches, 0.0)
    pairs = zip(task.model.parameters(), model.parameters(), strict=True)
    return torch.cat([(before - after).flatten().detach() for before, after in pairs])


def test_a_step_does_not_depend_on_micro_batches_and_dummies(folder):
    task = training(folder, dataset_name="moving-digits", moving_images=2)
    collate = task.collator("train", training=True)
    sampler = BatchSampler(20, 5, seed=0)
    rows = task.splits["train"].select(range(20))
    found = []
    for micro in (None, 2):
        batches = StepLoader(rows, sampler, collate, micro).micro_batches(sampler.steps(0)[0], 0)
        found.append(gradient(task, batches))
    dummy = collate([rows[0]], [0], 0, is_dummy=True)
    assert task.count(dummy) == {"frame": 0} and task.losses(task.model, dummy)["frame"] == 0
    found.append(gradient(task, [*batches, dummy]))
    assert found[0].abs().max() > 1e-5
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-7)


def test_ranks_get_the_videos_of_one_process(folder):
    task = training(folder, dataset_name="moving-digits", moving_images=2)
    collate, sampler = task.collator("train", training=True), BatchSampler(20, 5, seed=3)
    rows = task.splits["train"].select(range(20))
    (whole,) = StepLoader(rows, sampler, collate).micro_batches(sampler.steps(2)[1], 2)
    parts = [
        batch
        for rank in range(2)
        for batch in StepLoader(rows, sampler, collate, None, rank, 2).micro_batches(sampler.steps(2)[1], 2)
    ]
    for name in ("pixel_values_videos", "labels", "indices"):
        assert torch.equal(torch.cat([part[name] for part in parts]), whole[name])
    assert not torch.equal(collate([rows[0]], [0], 0)["labels"], collate([rows[0]], [0], 1)["labels"])  # other epoch


def test_videos_are_read(folder):
    """Training begins at a random frame, evaluation at the first; short videos are left out."""
    task = training(folder)
    rows = task.splits["train"]
    first = task.collator("validation")(rows[:4]["image"] and [rows[i] for i in range(4)], [0, 1, 2, 3], 0)
    assert first["videos"] == 3 and first["indices"].tolist() == [0, 1, 2] and "linear_motion" not in first
    assert first["bad"] == [(3, "it has 4 of the 5 frames that are read")]
    assert first["pixel_values_videos"].shape == (3, 3, 1, 16, 16) and first["labels"].shape == (3, 2, 1, 16, 16)
    collate = task.collator("train", training=True)
    starts = {collate([rows[0]], [0], epoch)["labels"][0, 0].float().mean().item() for epoch in range(12)}
    assert 1 < len(starts) <= 5
    stepped = VideoCollator(0, (16, 16), 1, 3, 2, step=2)([rows[0]], [0], 0)
    assert torch.equal(stepped["pixel_values_videos"][0, 1], first["pixel_values_videos"][0, 2])


@pytest.fixture
def evaluation(folder):
    def make(**options) -> VideoForecastingTask:
        given = {"dataset_name": "moving-digits", "max_samples": 6, "batch_size": 4, "progress": False, **options}
        task = VideoForecastingTask(
            VideoEvaluationArguments(model=str(folder / "model"), **given), Accelerator(cpu=True)
        )
        task.splits = task.load_splits()
        task.load_pretrained()
        return task

    return make


def test_scores_of_model_and_baselines(evaluation):
    """Against errors of all videos at once; the same videos in every evaluation."""
    task = evaluation()
    scores = task.evaluate(task.model, "test")
    rows = task.splits["test"]
    batch = task.collator("test")([rows[i] for i in range(6)], list(range(6)), 0)
    inputs, truth = batch["pixel_values_videos"].float() / 255, batch["labels"].float() / 255
    with torch.no_grad():
        predictions = {
            "": task.model(inputs).predictions,
            "copy_last_frame_": inputs[:, -1:].expand_as(truth),
            "linear_motion_": batch["linear_motion"].float() / 255,
        }
    for prefix, found in predictions.items():
        errors = FrameErrors()
        errors.add(found, truth)
        for name, value in errors.means().items():
            assert scores.values[prefix + name] == pytest.approx(value, rel=1e-5)
    assert scores.samples == 6 and scores.values["linear_motion_mse"] < scores.values["copy_last_frame_mse"]
    assert len(scores.details["by_frame"]["model"]["ssim"]) == 2
    assert {row["name"] for row in scores.rows("test", task.reported_metrics)} == scores.values.keys() - {
        "copy_last_frame_pixel_mse",
        "linear_motion_pixel_mse",
    }
    assert scores.signatures["pixel_mse"] == "pixels:mean|frames:mean" != scores.signatures["linear_motion_mse"]
    again = evaluation()
    assert again.evaluate(again.model, "test").values == scores.values
    other = evaluation(seed=1)
    assert other.evaluate(other.model, "test").values != scores.values


def test_runs_with_other_seeds_are_scored_on_the_same_videos(folder):
    batches = []
    for seed in (0, 1):
        task = training(folder, dataset_name="moving-digits", seed=seed)
        rows = task.splits["validation"]
        batches.append(task.collator("validation")([rows[0]], [0], 0)["labels"])
        batches.append(task.collator("train", training=True)([rows[0]], [0], 0)["labels"])
    assert torch.equal(batches[0], batches[2]) and not torch.equal(batches[1], batches[3])


def test_longer_forecasts_and_read_videos(evaluation, folder):
    task = evaluation(prediction_length=5)
    assert len(task.evaluate(task.model, "test").details["by_frame"]["linear_motion"]["mse"]) == 5
    read = evaluation(dataset_name=str(folder / "data"), split="validation", max_samples=None)
    scores = read.evaluate(read.model, "validation")
    assert scores.samples == 3 and scores.details["left_out"] == {"unreadable": 1}
    assert scores.details["by_frame"].keys() == {"model", "copy_last_frame"}
    none = evaluation(dataset_name=str(folder / "data"), split="validation", max_samples=None, prediction_length=9)
    with pytest.raises(ValueError, match="the data set has no video that can be read"):
        none.evaluate(none.model, "validation")


def test_errors_of_ranks_are_joined():
    torch.manual_seed(0)
    predictions, targets = torch.rand(4, 2, 1, 8, 8), torch.rand(4, 2, 1, 8, 8)
    whole, parts = FrameErrors(), [{"model": FrameErrors()}, {"model": FrameErrors()}, {}]
    whole.add(predictions, targets)
    parts[0]["model"].add(predictions[:1], targets[:1])
    parts[1]["model"].add(predictions[1:], targets[1:])
    assert joined(parts)["model"].means() == pytest.approx(whole.means())


def test_a_saved_model_decides_sizes(folder):
    options = dict.fromkeys(FIELDS) | {"model_name_or_path": str(folder / "model"), "dataset_name": "moving-digits"}
    task = VideoForecastingTask(
        VideoForecastingArguments(output_dir=".", max_steps=1, learning_rate=0.1, **options), Accelerator(cpu=True)
    )
    assert task.data_fields == {**FIELDS, "num_channels": 1}
    assert task.build_processor().size.height == 16 and task.build_model().config.hidden_size == 4
    assert VideoForecastingTask.accepts(task.build_model().config)
