"""The recipe of video forecasting: it learns, resumes bit-equal, and its pictures show what it predicts."""

import runpy
import shutil

import numpy as np
import pytest
from PIL import Image
from recipe_helpers import ROOT, fresh_state, record
from vision_recipes import distance

from hf_tfm.cli import main as hf_tfm
from hf_tfm.tasks.evaluation import evaluate
from hf_tfm.viz.forecast import Forecast, animate_forecast, as_rgb, plot_forecast

RECIPE = "video_forecasting_train"
SMALL = {
    "dataset_name": "moving-digits",
    "moving_images": 1,
    "image_size": 16,
    "moving_speed": 0.15,
    "context_length": 3,
    "prediction_length": 4,
    "size": "tiny",
    "model": "{patch_size: 2, hidden_size: 16, num_hidden_layers: 1}",
    "warmup_steps": 1,
    "lr_scheduler_type": "cosine",
    "batch_size": 16,
    "learning_rate": 0.02,
    "max_grad_norm": 1.0,
    "final_weights": "last",
    "progress": "false",
}


def train(output_dir, **options):
    fresh_state()
    given = {**SMALL, "output_dir": output_dir, **options}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    assert runpy.run_path(str(ROOT / "recipes" / f"{RECIPE}.py"))["main"](words) == 0
    return output_dir


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("runs") / "run", max_steps=200, eval_steps=200)


def test_it_learns_to_beat_copies_of_the_last_frame(trained):
    """On held-out digits. The mean frame has 0.7 of the error of the copies."""
    scores = {row["name"]: row["value"] for row in record(trained).metrics}
    assert scores["mse"] < 0.6 * scores["copy_last_frame_mse"] and scores["linear_motion_mse"] < scores["mse"]
    assert (record(trained).task, record(trained).model_type) == ("time-series-forecasting", "tfm_convlstm")
    card = (trained / "README.md").read_text()
    assert "AutoVideoProcessor" in card and "AutoModelForTimeSeriesPrediction" in card and "pixels:sum" in card
    rest = {"moving_speed": 0.15, "split": "validation", "progress": False}
    found = evaluate(str(trained), dataset_name="moving-digits", moving_images=1, **rest)
    again = {row["name"]: row["value"] for row in found["metrics"]}
    assert again == pytest.approx(scores) and found["videos"] == 200


def test_show_forecast(trained, tmp_path, capsys):
    """The picture has a row of frames for each prediction, the animation a frame for each that is read or
    predicted."""
    words = ["--dataset_name", "moving-digits", "--moving_images", "1", "--output", str(tmp_path / "a" / "f.png")]
    hf_tfm(["show", "forecast", str(trained), *words])
    assert capsys.readouterr().out.split() == [str(tmp_path / "a" / f"f.{kind}") for kind in ("png", "gif")]
    with Image.open(tmp_path / "a" / "f.gif") as image:
        assert image.n_frames == 3 + 4
    with pytest.raises(SystemExit):
        hf_tfm(["show", "forecast", str(trained), *words, "--index", "400"])
    assert 'index must be from 0 to 399 for split "test", got 400' in capsys.readouterr().err


def test_frames_of_the_pictures(tmp_path):
    """Each prediction is where the animation shows it."""
    frames = np.linspace(0.1, 1, 5, dtype=np.float32)[:, None, None, None] * np.ones((5, 8, 8, 1), np.float32)
    forecast = Forecast("title", frames[:3], frames[3:], {"model": 1 - frames[3:], "copy_last_frame": frames[[2, 2]]})
    with Image.open(animate_forecast(forecast, tmp_path / "f.gif")) as image:
        assert image.n_frames == 5
        for number in range(5):
            image.seek(number)
            pixels = np.asarray(image.convert("L"), np.float32) / 255
            shown = [pixels[80, 64 + i * 134] for i in range(3)]
            expected = [frames[number, 0, 0, 0]] * 3
            if number >= 3:
                expected[1:] = [1 - frames[number, 0, 0, 0], frames[2, 0, 0, 0]]
            assert np.allclose(shown, expected, atol=0.02)
    assert plot_forecast(forecast, tmp_path / "f.png").is_file() and as_rgb(frames).shape == (5, 8, 8, 3)


def test_a_resumed_run_is_bit_equal(tmp_path, capsys):
    """With another number of worker processes."""
    options = {"max_steps": 4, "save_steps": 1, "save_total_limit": 9, "eval_steps": 4, "batch_size": 4}
    options |= {"model": "{patch_size: 8, hidden_size: 8, num_hidden_layers: 1}", "holdout": 20}
    options |= {"validation_split": "null", "max_train_samples": 12, "micro_batch_size": 3}
    whole = train(tmp_path / "whole", **options)
    part = train(tmp_path / "part", dataloader_num_workers=1, **options)
    for step in (3, 4):
        shutil.rmtree(part / "checkpoints" / f"step-{step:08d}")
    for name in ("results.json", "model.safetensors"):
        (part / name).unlink()
    capsys.readouterr()
    train(part, dataloader_num_workers=1, **options)
    assert "resuming from" in capsys.readouterr().out
    assert distance(whole, part) == 0.0 and record(whole).metrics == record(part).metrics


@pytest.mark.slow
@pytest.mark.parametrize("autoregressive", ["false", "true"])
def test_the_transformer_learns(autoregressive, tmp_path):
    model = "{patch_size: 4, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 4, "
    model += f"autoregressive: {autoregressive}}}"
    options = {"architecture": "video_transformer", "model": model, "max_steps": 400, "eval_steps": 400}
    options["learning_rate"] = 0.003
    scores = {row["name"]: row["value"] for row in record(train(tmp_path / "run", **options)).metrics}
    assert scores["mse"] < 0.6 * scores["copy_last_frame_mse"]
