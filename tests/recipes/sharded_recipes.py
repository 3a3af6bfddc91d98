"""Every recipe on tiny models, and code that runs them on the ranks of a sharded run."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator
from recipe_helpers import fresh_state, write_data

from hf_tfm.recipe_files import run

TEXT = {
    **{"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2},
    **{"max_position_embeddings": 64, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
VIT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2, "patch_size": 8}
MAE = {
    **VIT,
    **{"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32},
    "decoder_num_hidden_layers": 1,
}
DETR = {"encoder_layers": 1, "decoder_layers": 1, **dict.fromkeys(("dropout", "attention_dropout"), 0.0)}
TRANSLATION = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "dropout": 0.0}
SCENES = "--batch_size 4 --max_train_samples 8 --backbone resnet10t --final_weights best"
DIGITS = "--batch_size 16 --warmup_epochs null --max_train_samples 64 --max_validation_samples 32 --test_splits []"

# name: recipe, fields of the model, options. A student's teacher is the run before it.
RUNS: dict[str, tuple[str, dict, str]] = {
    "translation": (
        "translation_train",
        {**TRANSLATION, "num_encoder_layers": 1, "num_decoder_layers": 1},
        "--vocab_size 270 --batch_tokens 256 --max_length 32 --ema_decay 0.5 --final_weights ema",
    ),
    "text": ("text_classification_train", TEXT, "--warmup_ratio null --vocab_size 60 --batch_size 8"),
    "text student": (
        "distill_task",
        {**TEXT, "hidden_size": 8, "num_hidden_layers": 1},
        "--warmup_ratio null --batch_size 8 "
        '--terms [{"kind":"soft_target"},{"kind":"hidden_state","layers":"uniform"},{"kind":"label"}]',
    ),
}


def train(name: str, folder: Path, *options: str) -> None:
    """Run a recipe for four steps in this process."""
    recipe, fields, own = RUNS[name]
    words = [
        *("--config", "quickstart", "--max_steps", "4", "--num_train_epochs", "null", "--eval_steps", "2"),
        *("--warmup_steps", "1", "--lr_scheduler_type", "constant", "--adam_epsilon", "1e-4", "--logging_steps", "1"),
        *("--progress", "false", "--metric_for_best_model", "loss", "--max_grad_norm", "1.0"),
        *("--model", json.dumps(fields), *own.split(), *options),
    ]
    if name == "translation":  # generates for all of its 1,000 texts otherwise
        words += ["--dataset_name", str(write_data(folder.parent / "pairs"))]
    if name.endswith(" student"):
        words += ["--teacher", str(folder.parent / "one" / name.removesuffix(" student")), "--costs", "false"]
    try:
        run(recipe, [*words, "--output_dir", str(folder / name)])
    except SystemExit as end:
        assert not end.code, end.code


def main(folder: Path, names: list[str]) -> None:
    """Code of every rank."""
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # keeps the process group for the next run
    for name in names:
        train(name, folder, "--fsdp", "true")
    torch.distributed.destroy_process_group()


def train_alone(folder: Path, names: list[str]) -> None:
    """The same in one process."""
    for name in names:
        fresh_state()
        train(name, folder)
