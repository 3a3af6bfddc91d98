"""Code that test_text_ranks.py runs on every rank: `main`."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from text_tasks import CASES, prediction, train_steps


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    for name in CASES:
        for micro in (None, 2):
            weights = train_steps(accelerator, name, micro)
            if accelerator.is_main_process:
                save_file(weights, folder / f"{name}-{micro}.safetensors")
    found = [prediction(accelerator, count) for count in (11, 1)]  # with one text, the second process has none
    report = [[part.labels.tolist(), part.logits.tolist(), part.loss] for part in found]
    (folder / f"report{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()
