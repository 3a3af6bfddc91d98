"""Forecasts of a video beside the true frames: a picture of all frames, and an animation.

frames (T, H, W, C) in [0, 1] -> rows of a mosaic -> PNG; panels next to each other, enlarged -> GIF
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from .mosaic import Mosaic

NAMES = {"model": "predicted", "copy_last_frame": "copied", "linear_motion": "linear"}
SIDE = 128  # minimum height of a panel of an animation
HEAD = 14  # pixels above a panel, for its title
GAP = 6  # pixels between panels
MILLISECONDS = 200  # of a frame
READ, PREDICTED = (70, 110, 180), (200, 80, 60)  # colours of titles while frames are read and predicted


@dataclass(frozen=True)
class Forecast:
    """A video and forecasts of its last frames. Frames are (frames, H, W, 1 or 3) float32 in [0, 1].

    Args:
        title: of the pictures.
        inputs: the T frames that are read.
        truth: the F frames that follow.
        predictions: {name: F frames}, of the model and of baselines.
    """

    title: str
    inputs: np.ndarray
    truth: np.ndarray
    predictions: dict[str, np.ndarray]


def as_rgb(frames: np.ndarray) -> np.ndarray:
    """Return frames with three channels."""
    return np.broadcast_to(frames, (*frames.shape[:3], 3))


def plot_forecast(forecast: Forecast, output: str | Path) -> Path:
    """Write a PNG file with a row of frames each for input, truth and predictions, one column per frame."""
    rows = {"read": forecast.inputs, "true": forecast.truth}
    rows |= {NAMES.get(name, name): frames for name, frames in forecast.predictions.items()}
    count = max(map(len, rows.values()))
    blank = np.ones((count, *forecast.truth.shape[1:3], 3))
    panels = [list(np.concatenate([as_rgb(frames), blank])[:count]) for frames in rows.values()]
    columns = [str(i + 1) for i in range(count)]
    return Mosaic(panels, rows=list(rows), columns=columns, title=[forecast.title], side=0.9).save(output)


def animate_forecast(forecast: Forecast, output: str | Path) -> Path:
    """Write an animated GIF: the true video, and next to it the frames that are read, continued by each prediction."""
    panels = {"true": forecast.truth}
    panels |= {NAMES.get(name, name): frames for name, frames in forecast.predictions.items()}
    height, width = forecast.truth.shape[1:3]
    scale = -(-SIDE // height)
    pictures = []
    for number in range(len(forecast.inputs) + len(forecast.truth)):
        later = number - len(forecast.inputs)
        canvas = Image.new("RGB", (len(panels) * (width * scale + GAP) - GAP, height * scale + HEAD), "white")
        for i, (name, frames) in enumerate(panels.items()):
            frame = as_rgb((forecast.inputs if later < 0 else frames)[[later]])[0]
            picture = Image.fromarray(np.rint(frame * 255).astype(np.uint8))
            left = i * (width * scale + GAP)
            canvas.paste(picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (left, HEAD))
            title = f"{number + 1} read" if later < 0 else f"{number + 1} {name}"
            ImageDraw.Draw(canvas).text((left, 1), title, fill=READ if later < 0 else PREDICTED)
        pictures.append(canvas)
    path = Path(output)
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures[0].save(path, "GIF", save_all=True, append_images=pictures[1:], duration=MILLISECONDS, loop=0)
    return path
