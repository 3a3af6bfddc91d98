"""Every recipe on a tiny model, divided in several ways, and the largest difference that a division makes."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from accelerate import (
    Accelerator,
    DistributedType,
    FullyShardedDataParallelPlugin,
    ParallelismConfig,
    PartialState,
)
from recipe_helpers import fresh_state, history, write_data

from hf_tfm.launcher import create_accelerator
from hf_tfm.recipe_files import run
from hf_tfm.training.session import Session

LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "intermediate_size": 32}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
TEXT = {**LAYERS, **NO_DROPOUT, "max_position_embeddings": 64}
VIT = {**LAYERS, "patch_size": 8}
MAE = {
    **VIT,
    **{"decoder_hidden_size": 16, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 32},
    "decoder_num_hidden_layers": 1,
}
SWIN = {
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1, 2],
    "num_heads": [1, 2],
    "window_size": 2,
    "drop_path_rate": 0.0,
}
DETR = {
    **{"encoder_layers": 1, "decoder_layers": 1, "d_model": 32, "dropout": 0.0, "attention_dropout": 0.0},
    "backbone_norm": "group",  # statistics of a batch depend on how it is divided
}
PAIRS = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "dropout": 0.0}
SHALLOW = {**PAIRS, "num_encoder_layers": 1, "num_decoder_layers": 1}
RNN = {"embedding_size": 16, "hidden_size": 16, "num_encoder_layers": 1, "num_decoder_layers": 1, "dropout": 0.0}
VIDEO = {**LAYERS, "patch_size": 4}

STUDENT = "--student_layers null --teacher"
TRANSLATION = "--batch_tokens 256 --max_length 32"
TEXTS = "--batch_size 8 --max_length 64"
SENTENCES = "--batch_tokens 256 --max_train_samples 64"
INSTRUCTIONS = f"{TEXTS} --min_lr_rate 0 --max_train_samples 32"
TUNED = f"{INSTRUCTIONS} --model_name_or_path {{one}}/instruction_tuning"
SHORT = "--batch_size 8 --max_train_samples 32"
VIDEOS = "--batch_size 4 --max_train_samples 16"
DIGITS = "--batch_size 16 --warmup_epochs null --max_train_samples 64 --test_splits []"
SCENES = "--batch_size 4 --max_train_samples 8 --num_pictures 0 --backbone resnet10t"
TOKENS, SAMPLES = "--micro_batch_tokens 96", "--micro_batch_size 2"


class Division(NamedTuple):
    """How a run is divided.

    Args:
        processes: their number.
        options: of the recipe.
        accumulates: each process divides its part into micro-batches.
        copies: groups of processes that each hold a copy of the model, sharded within the group (HSDP).
        stop: step after which all processes stop as after SIGTERM.
    """

    processes: int
    options: tuple[str, ...] = ()
    accumulates: bool = False
    copies: int = 0
    stop: int | None = None


SHARDED = ("--fsdp", "true")
WHOLE = Division(1)
DIVISIONS = {
    "accumulation": (Division(1, accumulates=True),),
    "DDP": (Division(2),),
    "FSDP2": (Division(2, SHARDED),),
    "HSDP": (Division(4, copies=2),),
    # One run, continued by others: on 1, 2, 3 and again 1 process.
    "resumed": (
        Division(1, stop=1),
        Division(2, accumulates=True, stop=2),
        Division(3, SHARDED, stop=3),
        Division(1, accumulates=True),
    ),
}


class Run(NamedTuple):
    """A run of a recipe.

    Args:
        fields: of the model's configuration; None for those of the model that it starts from.
        options: others; "{one}" is the folder of the undivided runs, of which earlier ones are finished.
        micro_batches: option that divides a step into micro-batches.
    """

    recipe: str
    fields: dict | None
    options: str
    micro_batches: str = SAMPLES


RUNS = {
    "translation": Run(
        "translation_train", SHALLOW, f"{TRANSLATION} --vocab_size 270 --ema_decay 0.5 --final_weights ema", TOKENS
    ),
    "translation, GRU": Run(
        "translation_train", RNN, f"{TRANSLATION} --vocab_size 270 --architecture rnn_seq2seq", TOKENS
    ),
    "translation student": Run(
        "distill_translation",
        {**SHALLOW, "hidden_size": 8},
        f"{TRANSLATION} {STUDENT} {{one}}/translation",
        TOKENS,
    ),
    "image classification": Run("image_classification_train", VIT, DIGITS),
    "image classification, Swin": Run("image_classification_train", SWIN, f"{DIGITS} --architecture swin"),
    "image classification student": Run(
        "distill_vision",
        {**VIT, "hidden_size": 8, "num_hidden_layers": 1},
        f"{DIGITS} --teacher {{one}}/image_classification",
    ),
    "masked images": Run("mae_pretrain", MAE, DIGITS.replace("--test_splits []", "")),
    "masked images student": Run(
        "distill_mae",
        {**MAE, "hidden_size": 8, "num_hidden_layers": 1},
        DIGITS.replace("--test_splits []", "--teacher {one}/masked_images"),
    ),
    "detection": Run("detection_train", DETR, f"{SCENES} --final_weights best"),
    "detection, Deformable DETR": Run("detection_train", DETR, f"{SCENES} --architecture deformable_detr"),
    "detection student": Run("distill_detection", DETR, f"{SCENES} {STUDENT} {{one}}/detection"),
    "panoptic segmentation": Run("panoptic_train", DETR, SCENES),
    "masked language model": Run("language_pretrain", TEXT, SENTENCES, TOKENS),
    "causal language model": Run(
        "language_pretrain",
        TEXT,
        f"{SENTENCES} --vocab_size 270 --objective causal",
        TOKENS,
    ),
    "language model student": Run(
        "distill_pretrain",
        {**TEXT, "num_hidden_layers": 1},
        f"{SENTENCES} --teacher {{one}}/masked_language_model",
        TOKENS,
    ),
    "text classification": Run("text_classification_train", TEXT, f"--warmup_ratio null --vocab_size 60 {TEXTS}"),
    "text classification student": Run(
        "distill_task",
        {**TEXT, "hidden_size": 8, "num_hidden_layers": 1},
        f"--warmup_ratio null {TEXTS} --teacher {{one}}/text_classification "
        '--terms [{"kind":"soft_target"},{"kind":"hidden_state","layers":"uniform"},{"kind":"label"}]',
    ),
    "long sequences": Run(
        "long_range_arena_train",
        {**TEXT, "max_position_embeddings": 33, "activation_dropout": 0.0},
        SHORT,
    ),
    "video forecasting": Run("video_forecasting_train", VIDEO, f"{VIDEOS} --architecture video_transformer"),
    "video forecasting, ConvLSTM": Run(
        "video_forecasting_train",
        {"patch_size": 4, "hidden_size": 8},
        VIDEOS,
    ),
    "instruction tuning": Run("sft_train", TEXT, f"{INSTRUCTIONS} --vocab_size 320"),
    "reward model": Run(
        "reward_train",
        None,
        TUNED,
    ),
    "preferences": Run(
        "preference_train",
        None,
        TUNED,
    ),
    "PPO": Run(
        "rlhf_train",
        None,
        "--model_name_or_path {one}/instruction_tuning --reward_model {one}/reward_model --batch_size 8 "
        "--generation_batch_size 8 --max_new_tokens 8 --max_train_samples 32",
    ),
}


def folder_of(name: str) -> str:
    """The name of a run's folder."""
    return name.replace(", ", "_").replace(" ", "_")


def train(name: str, folder: Path, division: Division = WHOLE) -> None:
    """Run a recipe for four steps in this process, into ``folder``/<division>/<run>."""
    recipe, fields, own, micro_batches = RUNS[name]
    words = [
        *("--config", "quickstart", "--max_steps", "4", "--num_train_epochs", "null", "--eval_steps", "2"),
        *("--warmup_steps", "1", "--lr_scheduler_type", "constant", "--adam_epsilon", "1e-4", "--logging_steps", "1"),
        *("--progress", "false", "--metric_for_best_model", "loss", "--max_grad_norm", "1.0"),
        *own.replace("{one}", str(folder.parent / "one")).split(),
        *division.options,
    ]
    if recipe == "rlhf_train":
        words[words.index("--metric_for_best_model") + 1] = "reward"
    if fields is not None:
        words += ["--model", json.dumps(fields)]
    if division.accumulates:
        words += micro_batches.split()
    if recipe in ("translation_train", "distill_translation"):  # generates for all of its 1,000 texts otherwise
        words += ["--dataset_name", str(write_data(folder.parent / "pairs"))]
    if name.endswith(" student"):
        words += ["--costs", "false"]
    with patch.object(Session, "step", stopping(division.stop)):
        try:
            run(recipe, [*words, "--output_dir", str(folder / folder_of(name))])
        except SystemExit as end:
            assert not end.code, end.code


def stopping(last: int | None):
    """Return `Session.step` that stops the run after step ``last``, as SIGTERM does."""
    step = Session.step

    def stops(self: Session, *args) -> None:
        step(self, *args)
        self.stopped = self.stopped or self.progress.step == last

    return stops


def shard_in_groups(processes: int, copies: int) -> None:
    """Configure accelerate for HSDP, as the variables of its launch file do where there are GPUs."""
    state = create_accelerator().state
    PartialState().distributed_type = DistributedType.FSDP
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2)
    sizes = {"dp_replicate_size": copies, "dp_shard_size": processes // copies}
    state.parallelism_config = ParallelismConfig(**sizes)


def main(folder: Path, names: Sequence[str], division: Division) -> None:
    """Code of every rank."""
    torch.set_num_threads(1)
    Accelerator.end_training = lambda self: None  # keeps the process group for the next run
    if division.copies:
        shard_in_groups(division.processes, division.copies)
    for name in names:
        train(name, folder, division)
    torch.distributed.destroy_process_group()


def train_alone(folder: Path, names: Sequence[str], division: Division = WHOLE) -> None:
    """The same in one process."""
    for name in names:
        fresh_state()
        train(name, folder, division)


def loss_difference(one: Path, other: Path) -> float:
    """The largest difference of the losses of a step, relative to those above 1."""
    pairs = zip(history(one), history(other), strict=True)
    losses = [(a["loss"], b["loss"]) for a, b in pairs if "loss" in a]
    assert len(losses) == 4 and all(math.isfinite(loss) for pair in losses for loss in pair)
    return max(abs(a - b) / max(1.0, abs(a)) for a, b in losses)
