"""Example inputs for static quantisation, from a file of texts or a folder of images."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from ..hub.loading import load_image_processor, load_tokenizer
from .graphs import Forward, Graph, example

MOST = 128  # examples
ROWS = 8  # examples in a batch
IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def calibration_inputs(
    model: PreTrainedModel, graphs: list[Graph], folder: Path, data: Path
) -> list[dict[str, Tensor]]:
    """Return batches of inputs of a model's forward pass.

    Args:
        graphs: of the model.
        folder: has its tokenizer or image processor.
        data: text file, one example a line, or folder of images; the first `MOST` are used.

    Raises:
        ValueError: the model generates text or reads videos, or there are no examples of its kind.
    """
    if not isinstance(graphs[0].module, Forward) or model.main_input_name == "pixel_values_videos":
        kind = "reads videos" if model.main_input_name == "pixel_values_videos" else "generates text"
        raise ValueError(f'quantize must be "dynamic" for a model that {kind}, got "static"')
    names = graphs[0].inputs.keys()
    batches = (texts if model.main_input_name == "input_ids" else images)(folder, data)
    found = []
    for rows, batch in batches:
        # Inputs that no processor provides, such as the noise of a masked autoencoder.
        rest = example(model, (4,) * rows, len(found)) if names - batch.keys() else {}
        found.append({name: batch[name] if name in batch else rest[name] for name in names})
    return found


def texts(folder: Path, data: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """Return batches of tokenised lines of a file, with the number of lines in each."""
    if not data.is_file():
        raise ValueError(f'calibration_data must be a text file with an example a line, got "{data}"')
    lines = [line for line in data.read_text(encoding="utf-8").splitlines() if line.strip()][:MOST]
    if not lines:
        raise ValueError(f'calibration_data "{data}" has no text')
    tokenizer = load_tokenizer(str(folder), trust_remote_code=None)
    batches = [lines[start : start + ROWS] for start in range(0, len(lines), ROWS)]
    options: dict[str, Any] = {"padding": True, "truncation": True, "return_tensors": "pt"}
    return [(len(batch), dict(tokenizer(batch, **options))) for batch in batches]


def images(folder: Path, data: Path) -> list[tuple[int, dict[str, Tensor]]]:
    """Return batches of processed images of a folder, with the number of images in each."""
    files = sorted(path for path in data.rglob("*") if path.suffix.lower() in IMAGES)[:MOST] if data.is_dir() else []
    if not files:
        raise ValueError(f'calibration_data must be a folder with images ({", ".join(IMAGES)}), got "{data}"')
    processor = load_image_processor(str(folder), trust_remote_code=None)
    found = []
    for start in range(0, len(files), ROWS):
        batch = [Image.open(path).convert("RGB") for path in files[start : start + ROWS]]
        inputs = processor(images=batch, return_tensors="pt")
        found.append((len(batch), {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}))
    return found
