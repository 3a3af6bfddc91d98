"""Code that test_ranks.py runs on every rank: `main`, several runs one after another."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from training_helpers import arguments, fresh_accelerator, run_training, tiny_model

from hf_tfm.training.checkpoint import full_weights, share_statistics
from hf_tfm.training.ranks import on_main

# name -> options and model fields; each run is compared with the same run on one process.
EQUAL = {
    "plain": ({}, {}),
    "micro_batches": ({"micro_batch_tokens": 20, "dataloader_num_workers": 1}, {}),
    "one_sample_a_step": ({"batch_tokens": 13}, {}),  # fewer samples than processes
    "mask_predict": ({"micro_batch_tokens": 30}, {"decoding": "mask_predict"}),
    "ema": ({"ema_decay": 0.8, "final_weights": "ema", "max_grad_norm": 0.5}, {}),
    "checkpointing": ({"gradient_checkpointing": True}, {"norm_first": True}),
}
# Runs started by one process and resumed by two, and the reverse.
RESUMED = {"from_one": {}, "from_two": {}}


def fail() -> None:
    raise ValueError("only the main process knows")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = fresh_accelerator(arguments(folder))
    assert accelerator.num_processes == 2
    reports = {}

    def run(name: str, fields: dict, **options) -> None:
        stop = options.pop("events", {})
        result, model = run_training(
            arguments(folder / name, **options), tiny_model(**fields), stop, accelerator=accelerator
        )
        weights = full_weights(model)
        if accelerator.is_main_process:
            save_file(weights, folder / f"{name}.safetensors")
        reports[name] = [result.progress.step, result.stopped, result.progress.items]

    for name, (options, fields) in EQUAL.items():
        run(name, fields, **options)
    run("from_one", {"dropout": 0.2})
    # Only the second process receives SIGTERM.
    run("from_two", {}, events={7: "SIGTERM"} if accelerator.process_index == 1 else {})
    run("damaged", {})
    reports["errors"] = []
    for work in (lambda: run("lost", {}), lambda: on_main(accelerator, fail)):
        try:
            work()
        except ValueError as error:
            reports["errors"].append(str(error))
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    norm[0].running_mean += accelerator.process_index
    norm[0].running_var += 2 * accelerator.process_index
    share_statistics(accelerator, norm)
    reports["statistics"] = [norm[0].running_mean.tolist(), norm[0].running_var.tolist()]
    (folder / f"report{accelerator.process_index}.json").write_text(json.dumps(reports))
    accelerator.end_training()
