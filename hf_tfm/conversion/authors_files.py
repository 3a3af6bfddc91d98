"""Unpack files of weights, pickles of ``{"model": weights}`` or of the weights, into folders for `convert`."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..command import reworded
from ..hub.loading import read_json
from .conversion import WeightsFile
from .weight_files import WEIGHTS


def unpack(path: Path, folder: Path, kinds: Sequence[WeightsFile]) -> Path:
    """Write a file of weights as a folder with a config.json.

    Args:
        path: the file. A config.json next to it, as written by `convert`, provides what the weights do not: the number
            of heads, ``norm_pix_loss``, ``dilation``.
        folder: folder to create.
        kinds: of files that can be read.

    Raises:
        ValueError: the file has other content, or a value that the weights do not determine is unknown.
    """
    # Training checkpoints also contain the parsed arguments.
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an invalid pickle can raise anything
        reason = reworded(error) if isinstance(error, UnpicklingError) else "torch cannot read it"
        raise ValueError(f"{path} is not a plain weights file: {reason}") from error
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path} must hold a mapping of weights, got a {type(checkpoint).__name__}")
    weights, arguments = checkpoint.get("model", checkpoint), checkpoint.get("args")
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} must hold weights by name, got a {type(weights).__name__} with other values")
    kind = next((kind for kind in kinds if kind.matches(weights)), None)
    if kind is None:
        owners = ", ".join(dict.fromkeys(kind.owner for kind in kinds))
        raise ValueError(f"{path} is not a weights file of {owners}: it holds {list(weights)[:5]}")
    told = path.parent / "config.json"
    config = read_json(told) if told.is_file() else kind.guess(weights, arguments, path)
    weights = kind.rename(weights) if kind.rename else weights
    folder.mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
