"""Code that test_ranks.py runs on every rank: `main`, several runs one after another."""

import json
import os
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
from accelerate import DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import distributed
from training_helpers import arguments, fresh_accelerator, pairs, run_training, tiny_model

from hf_tfm.training import checkpoint
from hf_tfm.training.checkpoint import full_weights, share_statistics
from hf_tfm.training.ranks import main_first, on_main


def equal_pairs() -> list:
    return [{name: [*(ids[:-1] * 8)[:7], 2] for name, ids in row.items()} for row in pairs(28)]


# name -> options and model fields; each run is compared with the same run on one process.
EQUAL = {
    "plain": ({}, {}),
    "micro_batches": ({"micro_batch_tokens": 20, "dataloader_num_workers": 1}, {}),
    "one_sample_a_step": ({"batch_tokens": 13}, {}),  # fewer samples than processes
    "mask_predict": ({"micro_batch_tokens": 30}, {"decoding": "mask_predict"}),
    "ema": ({"ema_decay": 0.8, "final_weights": "ema", "max_grad_norm": 0.5}, {}),
    # Every step has four samples of equal length, in two micro-batches: both on one rank, or one on each.
    "dropout": (
        {"batch_tokens": 32, "micro_batch_tokens": 16, "rows": equal_pairs(), "dataloader_num_workers": 1},
        {"dropout": 0.3},
    ),
    "fsdp": (
        {"fsdp": True, "micro_batch_tokens": 20, "max_grad_norm": 0.5, "ema_decay": 0.8, "final_weights": "ema"},
        {"norm_first": True},
    ),
    "fsdp_accelerate": (
        {
            "fsdp_accelerate": True,
            "average_checkpoints": 2,
            "final_weights": "average",
            "gradient_checkpointing": True,
        },
        {},
    ),
    "checkpointing": ({"gradient_checkpointing": True}, {"norm_first": True}),
}
# Runs started by one process and resumed by two, and the reverse.
RESUMED = {"from_one": {}, "from_two": {}}


def fail() -> None:
    raise ValueError("only the main process knows")


def full(*args) -> None:
    raise OSError("the disk of one process is full")


def flip(file: Path) -> None:
    """Flip one bit."""
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)


def whole_only(accelerator, tensors) -> dict:
    """Takes the place of `checkpoint.share_tensors` where no process needs tensors of another one."""
    assert not tensors
    return {}


def prepare(file: Path) -> str:
    """Write a cache, or read that of another process."""
    if file.exists():
        return file.read_text()
    time.sleep(0.3)
    file.write_text(f"made by {os.environ['RANK']}")
    return "made"


def fail_on(rank: str) -> None:
    if os.environ["RANK"] == rank:
        raise ValueError(f"rank {rank} failed")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    accelerator = fresh_accelerator(arguments(folder))
    assert accelerator.num_processes == 2
    reports = {}

    def run(name: str, fields: dict, **options) -> None:
        given = {key: options.pop(key) for key in ("events", "rows", "stop_evaluation") if key in options}
        output_dir = options.pop("output_dir", folder / name)
        state, through_accelerate = accelerator.state, options.pop("fsdp_accelerate", False)
        if through_accelerate:  # accelerate ignores its configuration of FSDP on a CPU
            state.fsdp_plugin, before = FullyShardedDataParallelPlugin(fsdp_version=2), state.distributed_type
            state.distributed_type = DistributedType.FSDP
        args = arguments(output_dir, **options)
        result, model = run_training(args, tiny_model(**fields), accelerator=accelerator, **given)
        if through_accelerate:
            state.fsdp_plugin, state.distributed_type = None, before
        weights = full_weights(model)
        if accelerator.is_main_process:
            save_file(weights, folder / f"{name}.safetensors")
        reports[name] = [result.progress.step, result.stopped, result.progress.items]

    for name, (options, fields) in EQUAL.items():
        run(name, fields, **options)
    run("from_one", {"dropout": 0.2})
    # Only the second process receives SIGTERM.
    run("from_two", {}, fsdp=True, events={7: "SIGTERM"} if accelerator.process_index == 1 else {})
    with patch.object(distributed, "new_group", wraps=distributed.new_group) as made:
        run("damaged", {}, fsdp=True, ddp_timeout=77)
    reports["timeout"] = made.call_args.kwargs["timeout"].total_seconds()  # of the processes that write shards
    options, fields = EQUAL["fsdp"]
    run("fsdp_resumed", fields, **options, events={7: "SIGTERM"})
    reports["shards"] = [path.name for path in sorted((folder / "fsdp_resumed/checkpoints").glob("*8/shard-*"))]
    if accelerator.is_main_process:
        flip(folder / "fsdp_resumed/checkpoints/step-00000008" / reports["shards"][-1])
    accelerator.wait_for_everyone()
    with patch.object(checkpoint, "share_tensors", whole_only):
        run("fsdp_resumed", fields, **options)
    # Folders on disks of their own; the checkpoints of the second one are older.
    run("local", {}, output_dir=folder / f"local{accelerator.process_index}")
    reports["errors"] = []
    reports["prepared"] = gather_object([main_first(accelerator, lambda: prepare(folder / "prepared"))])
    for work in (
        lambda: run("lost", {}),
        lambda: on_main(accelerator, fail),
        lambda: main_first(accelerator, lambda: fail_on("0")),
        lambda: main_first(accelerator, lambda: fail_on("1")),
    ):
        try:
            work()
        except ValueError as error:
            reports["errors"].append(str(error))
    with patch.object(checkpoint, "sync", full):  # only the main process writes
        try:
            run("full", {})
        except OSError as error:
            reports["errors"].append(str(error))
    second = accelerator.process_index == 1
    with patch.object(checkpoint.HuggingFaceStorageWriter, "write_data", full) if second else nullcontext():
        try:
            run("full_shard", {}, fsdp=True)
        except OSError as error:
            reports["errors"].append(str(error))
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(2))
    norm[0].running_mean += accelerator.process_index
    norm[0].running_var += 2 * accelerator.process_index
    share_statistics(accelerator, norm)
    reports["statistics"] = [norm[0].running_mean.tolist(), norm[0].running_var.tolist()]
    # Only the second process receives SIGTERM, during its second evaluation, of step 10. After it, they cannot
    # communicate.
    run("evaluating", {}, **({"stop_evaluation": 2} if accelerator.process_index == 1 else {}))
    (folder / f"report{accelerator.process_index}.json").write_text(json.dumps(reports))
    accelerator.end_training()
