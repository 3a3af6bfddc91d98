"""Inspect the weight files of a folder without reading the weights."""

from collections import Counter
from pathlib import Path

import torch
from safetensors import safe_open

from ..hub.loading import read_json

WEIGHTS, PICKLE = "model.safetensors", "pytorch_model.bin"


def weight_names(folder: Path) -> set[str]:
    """Return the names of all weights in ``folder``."""
    names: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    if not names:
        for path in folder.glob("pytorch_model*.bin"):
            names.update(torch.load(path, map_location="meta", weights_only=True))
    return names


def saved_dtype(folder: Path) -> torch.dtype:
    """Return the dtype of most weights in ``folder``; for pickled weights, the dtype in config.json."""
    counts = Counter()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            counts.update(file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118
    if counts:
        return {"BF16": torch.bfloat16, "F16": torch.float16}.get(counts.most_common(1)[0][0], torch.float32)
    config = read_json(folder / "config.json")
    return getattr(torch, config.get("dtype") or config.get("torch_dtype") or "float32")
