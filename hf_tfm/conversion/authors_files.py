"""Unpack files published by the papers' authors, pickles of ``{"model": weights}``, into folders for `convert`."""

import argparse
import json
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..command import reworded
from ..hub.loading import read_json
from . import detr_authors, mae_authors
from .weight_files import WEIGHTS


def unpack(path: Path, folder: Path) -> Path:
    """Write a file of the authors as a folder with a config.json.

    A fine-tuned classifier of the masked autoencoder's authors uses timm's names and becomes a timm folder.

    Args:
        path: the file. A config.json next to it, as written by `convert`, provides what the weights do not: the number
            of heads, ``norm_pix_loss``, ``dilation``.
        folder: folder to create.

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
    mae, detr = mae_authors.is_authors_mae(weights), detr_authors.is_authors_detr(weights)
    if not mae and not detr:
        raise ValueError(
            f"{path} is not a file of the masked autoencoder's authors, nor of DETR's: it holds {list(weights)[:5]}"
        )
    told = path.parent / "config.json"
    if told.is_file():
        config = read_json(told)
    elif detr:
        config = detr_authors.guessed_config(weights, arguments, path)
    else:
        config = mae_authors.guessed_config(weights, getattr(arguments, "norm_pix_loss", False))
    folder.mkdir()
    save_file({name: weight.contiguous() for name, weight in weights.items()}, folder / WEIGHTS, {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
