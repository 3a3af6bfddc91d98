"""Code that test_rlhf.py runs on every rank: `main`."""

import json
from pathlib import Path

import torch

from hf_tfm.tasks.rlhf import RLHFArguments, RLHFTask
from hf_tfm.training.trainer import Runs


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    Runs(RLHFTask, "rlhf_train", [])(RLHFArguments(**json.loads((folder / "arguments.json").read_text())))
