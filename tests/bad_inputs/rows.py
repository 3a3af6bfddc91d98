"""The table of invalid inputs: a row is a command line, the files it reads, and the expected error.

In a command line, {in} is the folder of the row's files, {out} a nonexistent output path, and {models} the folder
of tiny models (`inputs.MODELS`). An error is one line of hf-tfm that matches the pattern. A row without a pattern
is valid and must be accepted, so that rejecting everything does not pass.
"""

import json
import os
import re
import shlex
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow

from . import inputs


@dataclass(frozen=True)
class Row:
    """A case.

    Args:
        id: name, unique in the table.
        command: the arguments, see above.
        error: pattern of the one-line error; None for a valid input.
        files: writes the files that the command reads into {in}.
    """

    id: str
    command: str
    error: str | None
    files: Callable[[Path], None] | None = None

    def arguments(self, folder: Path, models: Path) -> list[str]:
        """The arguments of the command for the case's own folder."""
        paths = {"{in}": folder / "in", "{out}": folder / "out", "{models}": models}
        arguments = shlex.split(self.command)
        for name, path in paths.items():
            arguments = [argument.replace(name, str(path)) for argument in arguments]
        return arguments


def got(option: str, *parts: str) -> str:
    """A pattern that matches the option followed by all of ``parts``, which are taken literally."""
    return rf"(?<!\w){re.escape(option)}(?!\w).*" + ".*".join(re.escape(part) for part in parts)


def backbone(content: dict | None) -> Callable[[Path], None]:
    """Write scenes, with a config.json in the folder of the training images that makes it a backbone."""

    def write(folder: Path) -> None:
        inputs.coco(folder)
        if content is not None:
            (folder / "train" / "config.json").write_text(json.dumps(content))

    return write


def anchors(folder: Path) -> None:
    """Write images, and options with an anchor."""
    inputs.images(folder)
    (folder / "a.yaml").write_text("mean: &m [0.5, 0.5, 0.5]\nstd: *m\nlearning_rate: 1e-3\nrate_factors: {}\n")


SHORT = "--config quickstart --output_dir {out} --progress false"
ONE = f"{SHORT} --max_steps 1 --eval_steps 1"
NO_EPOCHS = "--num_train_epochs null --warmup_epochs null"
VISION = f"run image_classification_train {SHORT}"
VISION_ONE = f"run image_classification_train {ONE} {NO_EPOCHS} --test_splits [] --batch_size 4"
VISION_ONE += " --model.hidden_size 16 --model.num_hidden_layers 1 --image_size 16 --model.num_attention_heads 2"
TEXT = f"run text_classification_train {SHORT}"
TEXT_ONE = (
    f"run text_classification_train {ONE} --num_train_epochs null --warmup_ratio null --test_splits [] --batch_size 4"
)
TEXT_ONE += " --model.hidden_size 16 --model.num_attention_heads 2"
LANGUAGE = f"run language_pretrain {SHORT}"
TRANSLATION = f"run translation_train {SHORT}"
MAE = f"run mae_pretrain {SHORT}"
VIDEO = f"run video_forecasting_train {SHORT}"
DETECTION = f"run detection_train {SHORT}"
SCENE = "--warmup_steps 0 --batch_size 2 --max_train_samples null --shortest_side 64 --longest_side 64"
SCENE += ' --validation_split validation --augmentation \'{"scales": [64], "max_size": 64, "crop": 0.0, "flip": 0.0}\''
DETECTION_ONE = f"run detection_train {ONE} {SCENE} --mixed_precision no --model.num_queries 5 --dataset_name {{in}}"
SMALL_HEADS = "--model.d_model 16 --model.encoder_layers 1 --model.decoder_layers 1"
SMALL_HEADS += " --model.encoder_attention_heads 2 --model.decoder_attention_heads 2"
SMALL_DETECTOR = f"{SMALL_HEADS} --model.backbone test_resnet"
LONG_RANGE = f"run long_range_arena_train {SHORT}"
SFT = f"run sft_train {SHORT}"
REWARD = f"run reward_train {SHORT} --model_name_or_path {{models}}/gpt"
PREFERENCE = f"run preference_train {SHORT} --model_name_or_path {{models}}/gpt"
RLHF = f"run rlhf_train {SHORT} --model_name_or_path {{models}}/gpt --reward_model null --reward_functions [spelling]"
PANOPTIC = f"run panoptic_train {SHORT}"
DISTIL = {
    name: f"run {name} {SHORT}"
    for name in (
        "distill_vision",
        "distill_mae",
        "distill_task",
        "distill_pretrain",
        "distill_detection",
        "distill_translation",
    )
}
COMPRESS = f"run compress_train {SHORT}"

# Options of every recipe: (command, arguments, pattern).
OPTIONS: list[tuple[str, str, str]] = [
    # lengths and schedules
    (VISION, "--num_train_epochs null --max_steps 2.5", got("max_steps", "2.5")),
    (VISION, "--num_train_epochs null --max_steps 0", got("max_steps", "1", "0")),
    (VISION, "--num_train_epochs null --max_steps -3", got("max_steps", "1", "-3")),
    (VISION, "--num_train_epochs null --max_steps many", got("max_steps", "integer", "many")),
    (VISION, "--num_train_epochs null --max_steps 99999999999999999999", got("max_steps", "99999999999999999999")),
    (VISION, "--num_train_epochs .nan", got("num_train_epochs", "nan")),
    (VISION, "--num_train_epochs -1", got("num_train_epochs", "0", "-1")),
    (VISION, "--num_train_epochs 1e30", got("num_train_epochs", "1,000,000", "1e+30")),
    (VISION, "--max_steps 5", got("num_train_epochs", "max_steps", "5")),
    (VISION, "--num_train_epochs null", got("num_train_epochs", "max_steps", "None")),
    (VISION, "--warmup_epochs 50", got("warmup_epochs", "10", "50")),
    (VISION, "--warmup_epochs .inf", got("warmup_epochs", "finite", "inf")),
    (VISION, "--warmup_steps 7", got("warmup_steps", "warmup_epochs", "7")),
    (TRANSLATION, "--warmup_steps 401", got("warmup_steps", "200", "401")),
    (TEXT, "--warmup_ratio 1.5", got("warmup_ratio", "1", "1.5")),
    (TEXT, "--warmup_steps 5", got("warmup_steps", "warmup_ratio", "5")),
    (VISION, "--lr_scheduler_type cosin", got("lr_scheduler_type", "cosine", '"cosin"', "did you mean cosine")),
    (VISION, "--lr_drop_ratio 2", got("lr_drop_ratio", "1", "2")),
    (SFT, "--min_lr_rate 1.5", got("min_lr_rate", "1", "1.5")),
    (SFT, "--lr_scheduler_type linear", got("min_lr_rate", "cosine", "linear")),
    (VISION, "--eval_steps 0", got("eval_steps", "1", "0")),
    (VISION, "--save_steps -1", got("save_steps", "1", "-1")),
    (VISION, "--logging_steps 0", got("logging_steps", "1", "0")),
    (VISION, "--early_stopping_patience -1", got("early_stopping_patience", "0", "-1")),
    # instructions and preferences
    (SFT, "--prompt_loss_weight 2", got("prompt_loss_weight", "1", "2")),
    (SFT, "--prompt_format alpacca", got("prompt_format", "plain", "alpacca", "did you mean alpaca")),
    (SFT, "--max_length 129", got("max_length", "128", "129")),
    (SFT, "--dataset_name number-words", got("prompt_column", "prompt", "number, translation")),
    (SFT, "--completion_column answer", got("completion_column", "answer", "prompt, completion")),
    (SFT, "--model_name_or_path {models}/vit --model {}", got("model_name_or_path", "tfm_vit", "fine-tuning", "gpt")),
    (REWARD, "--model_name_or_path runs/none", got("model_name_or_path", "runs/none")),
    (REWARD, "--dataset_name spelled-numbers", got("chosen_column", "chosen", "prompt, completion")),
    (REWARD, "--center_rewards_coefficient -1", got("center_rewards_coefficient", "0", "-1")),
    (REWARD, "--demonstrations '{dataset_name: none/none}'", got("demonstrations", "none/none")),
    (PREFERENCE, "--beta 0", got("beta", "0")),
    (PREFERENCE, "--label_smoothing 0.5", got("label_smoothing", "0.5")),
    (PREFERENCE, "--loss_type ippo", got("loss_type", "ipo", "ippo")),
    (PREFERENCE, "--reference_model runs/none", got("reference_model", "runs/none")),
    (RLHF, "--reward_functions []", got("reward_model", "reward_functions")),
    (RLHF, "--reward_functions [speling]", got("reward_functions", "exact_match", "did you mean spelling")),
    (RLHF, "--reward_functions [nowhere:f]", got("reward_functions", "nowhere")),
    (RLHF, "--reward_model runs/none", got("reward_model", "runs/none")),
    (RLHF, "--algorithm grpo --num_generations 1", got("num_generations", "2", "1")),
    (RLHF, "--batch_size 60", got("generation_batch_size", "60", "128")),
    (RLHF, "--max_new_tokens 1000", got("max_new_tokens", "1000", "prompt")),
    (RLHF, "--prompt_column question", got("prompt_column", "question", "prompt, completion")),
    (RLHF, "--max_generated_tokens 0", got("max_generated_tokens", "1", "0")),
    # optimizers
    (VISION, "--learning_rate .inf", got("learning_rate", "finite", "inf")),
    (VISION, "--learning_rate .nan", got("learning_rate", "finite", "nan")),
    (VISION, "--learning_rate -0.1", got("learning_rate", "0", "-0.1")),
    (VISION, "--learning_rate 1e9", got("learning_rate", "1,000", "1000000000")),
    (VISION, "--learning_rate fast", got("learning_rate", "number", "fast")),
    (VISION, "--base_learning_rate 0.1", got("learning_rate", "base_learning_rate", "0.1")),
    (VISION, "--weight_decay .inf", got("weight_decay", "finite", "inf")),
    (VISION, "--weight_decay -1", got("weight_decay", "0", "-1")),
    (VISION, "--weight_decay 5000", got("weight_decay", "learning_rate", "5000")),
    (VISION, "--layer_wise_lr_decay 5", got("layer_wise_lr_decay", "1", "5")),
    (VISION, "--layer_wise_lr_decay 0", got("layer_wise_lr_decay", "0", "0")),
    (VISION, "--adam_betas [0.9]", got("adam_betas", "2", "[0.9]")),
    (VISION, "--adam_betas [0.9,1.0]", got("adam_betas", "1", "1.0")),
    (VISION, "--adam_betas 0.9", got("adam_betas", "2", "0.9")),
    (VISION, "--adam_epsilon 0", got("adam_epsilon", "0", "0")),
    (VISION, "--momentum 1", got("momentum", "1", "1")),
    (VISION, "--max_grad_norm -1", got("max_grad_norm", "0", "-1")),
    (VISION, "--rate_factors '{embeddings: .inf}'", got("rate_factors", "embeddings", "inf")),
    (VISION, "--rate_factors 0.1", got("rate_factors", "mapping", "0.1")),
    (VISION, "--optimizer adamm", got("optimizer", "adamw", '"adamm"')),
    (VISION, "--mixed_precision fp16", got("mixed_precision", "fp16", "accelerator")),
    (VISION, "--mixed_precision half", got("mixed_precision", "fp16", '"half"')),
    (VISION, "--ema_decay 1", got("ema_decay", "1", "1")),
    (VISION, "--final_weights ema", got("final_weights", "ema", "0")),
    (VISION, "--final_weights average", got("final_weights", "average", "0")),
    (VISION, "--save_total_limit 0", got("save_total_limit", "1", "0")),
    (VISION, "--seed -1", got("seed", "0", "-1")),
    (VISION, "--seed 4294967296", got("seed", "4,294,967,295", "4294967296")),
    (VISION, "--seed 1.5", got("seed", "integer", "1.5")),
    (VISION, "--dataloader_num_workers 100000", got("dataloader_num_workers", "cores", "100000")),
    (VISION, "--report_to [mlflow]", got("report_to", "tensorboard", "mlflow")),
    (VISION, "--progress maybe", got("progress", "true or false", "maybe")),
    (VISION, "--torch_compile 1", got("torch_compile", "true or false", "1")),
    (VISION, "--metric_for_best_model bleu", got("metric_for_best_model", "accuracy", "bleu")),
    # names
    (VISION, "--output_dir ''", got("output_dir", "empty", '""')),
    (VISION, "--output_dir ' '", got("output_dir", "blank", '" "')),
    (VISION, "--output_dir {in}/notes.txt/run", got("output_dir", "lies below", "notes.txt", "a file")),
    (VISION, "--output_dir ~no-such-user/run", got("output_dir", "~no-such-user/run", "no such user")),
    (VISION, "--dataset_name ~no-such-user/a.csv", got("dataset_name", "~no-such-user/a.csv", "no such user")),
    (VISION, "--run_name ''", got("run_name", "empty", '""')),
    (VISION, "--dataset_name ''", got("dataset_name", "empty", '""')),
    (VISION, "--train_split ''", got("train_split", "empty", '""')),
    (VISION, "--learning_rat 1", r"--learning_rat is not an option; did you mean --learning_rate\?"),
    (VISION, "--epochs 3", r"--epochs is not an option"),
    (VISION, "-lr 3", r"-lr is not an option"),
    (VISION, "--num_steps 3", r"--num_steps is now called --max_steps"),
    (VISION, "--dataset digits", r"--dataset is now called --dataset_name.*--dataset_config"),
    (VISION, "--per_device_train_batch_size 8", r"--per_device_train_batch_size is not an option: batch_size is .*"),
    (VISION, "stray", r'expected an option, --NAME VALUE, got "stray"'),
    (VISION, "--seed", r"--seed needs a value"),
    (VISION, "--config", r"--config needs a value"),
    (VISION, "--config quickstrat", r'--config "quickstrat" is neither .* did you mean quickstart\?'),
    # long sequences
    (LONG_RANGE, "--vocabulary letters", got("vocabulary", "bytes", '"letters"')),
    (LONG_RANGE, "--max_length 33", got("max_length", "32", "33")),
    (LONG_RANGE, "--model.encoder_attention fast", got("encoder_attention", "linear", '"fast"')),
    (
        LONG_RANGE,
        "--model.encoder_attention linformer --model.encoder_attention_kwargs '{rank: 0}'",
        got("encoder_attention_kwargs", "rank", "1", "0"),
    ),
    # images
    (VISION, "--image_size 4000000", got("image_size", "16,384", "4000000")),
    (VISION, "--model.id2label '{0: a}'", r"a key of model\.id2label must be a string, got 0"),
    (LANGUAGE, "--batch_tokens 4", got("batch_tokens", "4", "16 tokens")),
    (
        LANGUAGE,
        "--more_texts '[{dataset_name: number-words, text_column: translation.en}, "
        "{dataset_name: number-words, text_column: none}]'",
        r'more_texts\[1\]: text_column "none" is not a column',
    ),
    (VISION, "--image_size 0", got("image_size", "1", "0")),
    (VISION, "--image_size [32]", got("image_size", "2 integers", "[32]")),
    (VISION, "--image_size 33", got("image_size", "33")),
    (VISION, "--image_size 16384 --batch_size 100000", "100,000 images of 16384 x 16384 pixels need .* GB"),
    (VISION, "--resize 8", got("resize", "32", "8")),
    (VISION, "--std [0,0,0]", got("std", "0", "0")),
    (VISION, "--std [0.5,0.5]", got("std", "3", "[0.5, 0.5]")),
    (VISION, "--mean [123,117,104]", got("mean", "1", "123")),
    (VISION, "--std [.nan,1,1]", got("std", "finite", "nan")),
    (VISION, "--batch_size 0", got("batch_size", "1", "0")),
    (VISION, "--micro_batch_size 0", got("micro_batch_size", "1", "0")),
    (VISION, "--max_bad_images -1", got("max_bad_images", "0", "-1")),
    (VISION, "--max_train_samples 0", got("max_train_samples", "1", "0")),
    (VISION, "--holdout 5", got("validation_split", "holdout", "5")),
    (VISION, "--validation_split null", got("validation_split", "holdout", "None")),
    (VISION, "--holdout 100000 --validation_split null", got("holdout", "rows of train", "100000")),
    (VISION, "--streaming true", got("streaming", "max_steps")),
    (VISION, "--label_smoothing 1", got("label_smoothing", "1", "1.0")),
    (VISION, "--test_splits test", got("test_splits", "list", '"test"')),
    (VISION, "--test_splits [test,test]", got("test_splits", '"test"', "twice")),
    (VISION, "--test_splits [dev]", got("test_splits", "dev", "train, validation, test")),
    (VISION, "--validation_split dev", got("validation_split", "dev", "train, validation, test")),
    (VISION, "--label_column colour", got("label_column", "colour", "image, label")),
    (VISION, "--image_column photo", got("image_column", "photo", "image, label")),
    (VISION, "--repeats 1000", got("repeats", "64", "1000")),
    (VISION, "--augmentation.crop middle", got("crop", "resized", '"middle"')),
    (VISION, "--augmentation.flip 2", got("flip", "1", "2")),
    (VISION, "--augmentation.flipp 1", r"augmentation.flipp is not an option; did you mean .*augmentation.flip\?"),
    (VISION, "--augmentation '{scale: [0.5, 0.1]}'", got("scale", "smaller first", "0.5")),
    (VISION, "--augmentation 5", got("augmentation", "mapping", "5")),
    (VISION, "--augmentation.magnitude 11", got("magnitude", "10", "11")),
    (VISION, "--mixing.mixup .nan", got("mixup", "finite", "nan")),
    (VISION, "--mixing '{mixup: -1}'", got("mixup", "0", "-1")),
    (VISION, "--model '{image_size: 32}'", got("model.image_size", "chosen")),
    (VISION, "--model.patchsize 4", r"model.patchsize is not a field .* did you mean patch_size\?"),
    (VISION, "--model.hidden_size wide", got("model.hidden_size", "integer", '"wide"')),
    (VISION, "--model.num_attention_heads 5", got("hidden_size", "5", "64")),
    (VISION, "--model.num_hidden_layers 1000000000", got("model.num_hidden_layers", "10,000", "1000000000")),
    (VISION, "--size giant", got("size", "huge", '"giant"')),
    (VISION, "--linear_probe true", got("linear_probe", "model_name_or_path")),
    (VISION, "--model_name_or_path /no/where", got("model_name_or_path", "/no/where")),
    (VISION, "--dataset_name /no/where", got("dataset_name", "/no/where")),
    (VISION, "--dataset_name no-such-set", got("dataset_name", "no-such-set")),
    # masked autoencoders
    (MAE, "--model.mask_ratio 1.5", got("mask_ratio", "1", "1.5")),
    (MAE, "--model.mask_ratio .nan", got("mask_ratio", "finite", "nan")),
    (MAE, "--model.decoder_hidden_size 6", got("decoder_hidden_size", "4", "6")),
    (MAE, "--metric_for_best_model accuracy", got("metric_for_best_model", "loss", "accuracy")),
    (MAE, "--model_name_or_path /no/where --model '{}'", got("model_name_or_path", "/no/where")),
    (MAE, "--shuffle_buffer 0", got("shuffle_buffer", "1", "0")),
    # videos
    (VIDEO, "--moving_images 0", got("moving_images", "1", "0")),
    (VIDEO, "--moving_speed 1.5", got("moving_speed", "1", "1.5")),
    (VIDEO, "--moving_size 17", got("moving_size", "image_size", "16 x 16", "17 x 17")),
    (VIDEO, "--frame_step 2", got("frame_step", "2")),
    (VIDEO, "--context_length 0", got("context_length", "1", "0")),
    (VIDEO, "--prediction_length 100000", got("prediction_length", "10,000", "100000")),
    (VIDEO, "--num_channels 2", got("num_channels", "1 or 3", "2")),
    (VIDEO, "--image_size 17", got("image_size", "multiple", "17 x 17")),
    (VIDEO, "--image_size 16384 --batch_size 1000000", got("image_size", "batch_size")),
    (VIDEO, "--metric_for_best_model mse", got("metric_for_best_model", "ssim", "mse")),
    (VIDEO, "--model.kernel_size 2", got("kernel_size", "odd", "2")),
    (VIDEO, "--model.peephole all", got("peephole", "none, channel, position", "all")),
    (VIDEO, "--model.prediction_length 3", got("model.prediction_length")),
    (VIDEO, "--model.strides [1,4]", got("strides", "1 or 2", "4")),
    (VIDEO, "--architecture vit", got("architecture", "convlstm, video_transformer", "vit")),
    (
        VIDEO,
        "--moving_images null --dataset_name digits",
        got("no image of validation can be read", "it has 1 of the 10 frames"),
    ),
    # texts
    (TEXT, "--text_columns [text,text]", got("text_columns", '"text"', "twice")),
    (TEXT, "--text_columns [a,b,c]", got("text_columns", "two", "a, b, c")),
    (TEXT, "--text_columns text", got("text_columns", "list", '"text"')),
    (TEXT, "--text_columns [text] --label_column text", got("label_column", "text_columns", "text")),
    (TEXT, "--text_columns [words]", got("text_columns", "words", "text")),
    (TEXT, "--label_column kind", got("label_column", "kind", "label")),
    (TEXT, "--max_length 0", got("max_length", "1", "0")),
    (TEXT, "--max_length 100000", got("max_length", "512", "100000")),
    (TEXT, "--vocab_size 1000000000", got("vocab_size", "1,000,000", "1000000000")),
    (TEXT, "--vocab_size 3", got("vocab_size", "3")),
    (TEXT, "--batch_size null", got("batch_size", "batch_tokens", "None")),
    (TEXT, "--batch_tokens 64", got("batch_size", "batch_tokens", "64")),
    (TEXT, "--micro_batch_tokens 64", got("micro_batch_tokens", "micro_batch_size")),
    (TEXT, "--metrics [bleu]", got("metrics", "accuracy", "bleu")),
    (TEXT, "--metrics [pearson]", got("metrics", "accuracy", "pearson")),
    (TEXT, "--task sst3", got("task", "sst2", '"sst3"')),
    (TEXT, "--tasks sst2,sst2", got("tasks", "duplicates", "sst2")),
    (TEXT, "--language_weight -1", got("language_weight", "0", "-1")),
    (TEXT, "--language_weight 1", got("language_weight", "gpt")),
    (TEXT, "--architecture t5", got("architecture", "bert", '"t5"')),
    (TEXT, "--tokenizer /no/where", got("tokenizer", "/no/where")),
    (TEXT, "--model_name_or_path /no/where --model '{}'", got("model_name_or_path", "/no/where")),
    # language models
    (LANGUAGE, "--objective next", got("objective", "causal", '"next"')),
    (LANGUAGE, "--sequences triples", got("sequences", "packed", '"triples"')),
    (LANGUAGE, "--objective causal --sequences pairs", got("sequences", "masked")),
    (LANGUAGE, "--mlm_probability 1", got("mlm_probability", "1", "1.0")),
    (LANGUAGE, "--max_length 33", got("max_length", "32", "33")),
    (LANGUAGE, "--batch_tokens 0", got("batch_tokens", "1", "0")),
    (LANGUAGE, "--batch_tokens 1.5", got("batch_tokens", "integer", "1.5")),
    (LANGUAGE, "--text_column words", got("text_column", "words")),
    (LANGUAGE, "--tokenizer_rows 0", got("tokenizer_rows", "1", "0")),
    (LANGUAGE, "--more_texts '[{split: train}]'", got("more_texts", "dataset_name")),
    (LANGUAGE, "--more_texts '[{dataset_name: /no/where}]'", got("dataset_name", "/no/where")),
    (LANGUAGE, "--model.vocab_size 5", got("model.vocab_size", "chosen")),
    (LANGUAGE, "--model.hidden_size 1048576 --model.num_attention_heads 64", "parameters needs .* GB"),
    # translation
    (TRANSLATION, "--source_column de", got("source_column", "target_column", "de")),
    (TRANSLATION, "--target_column fr", got("target_column", "fr")),
    (TRANSLATION, "--num_beams 0", got("num_beams", "1", "0")),
    (TRANSLATION, "--num_beams 100000", got("num_beams", "1,024", "100")),
    (TRANSLATION, "--iterations 0", got("iterations", "1", "0")),
    (TRANSLATION, "--max_words 0", got("max_words", "1", "0")),
    (TRANSLATION, "--length_bins [0,4]", got("length_bins", "1", "0, 4")),
    (TRANSLATION, "--model.position_embedding_type relative", got("position_embedding_type", "rotary", "relative")),
    (TRANSLATION, "--model '{position_embedding_type: floater, floater_step: 0}'", got("floater_step", "0", "0")),
    (TRANSLATION, "--model '{position_embedding_type: floater, floater_scope: some}'", got("floater_scope", "some")),
    (TRANSLATION, "--length_penalty .inf", got("length_penalty", "finite", "inf")),
    (TRANSLATION, "--vocab_size 10", got("vocab_size", "261", "10")),
    (TRANSLATION, "--size huge", got("size", "tiny", '"huge"')),
    (TRANSLATION, "--model.dropout 1.5", got("dropout", "1", "1.5")),
    (TRANSLATION, "--model.hidden_act evil", got("hidden_act", "gelu", "evil")),
    (TRANSLATION, "--tokenizer /no/where", got("tokenizer", "/no/where")),
    # scenes
    (DETECTION, "--num_pictures 1000000", got("num_pictures", "100", "1000000")),
    (DETECTION, "--num_pictures -1", got("num_pictures", "0", "-1")),
    (DETECTION, "--shortest_side 0", got("shortest_side", "1", "0")),
    (DETECTION, "--shortest_side 200", got("shortest_side", "128", "200")),
    (DETECTION, "--longest_side 4000000", got("longest_side", "16,384", "4000000")),
    (DETECTION, "--augmentation.scales []", got("scales", "1", "()")),
    (DETECTION, "--augmentation.max_size 4", got("max_size", "128", "4")),
    (DETECTION, "--augmentation.crop_size [5,1]", got("crop_size", "smaller first", "5, 1")),
    (DETECTION, "--box_format yxyx", got("box_format", "xywh", '"yxyx"')),
    (DETECTION, "--metric_for_best_model PQ", got("metric_for_best_model", "AP", "PQ")),
    (DETECTION, "--model.num_queries 0", got("num_queries", "1", "0")),
    (DETECTION, "--model_name_or_path /no/where --model '{}'", got("model_name_or_path", "/no/where")),
    (PANOPTIC, "--stage mask", got("stage", "masks", '"mask"')),
    (PANOPTIC, "--stage masks", got("stage", "masks", "model_name_or_path")),
    (PANOPTIC, "--panoptic_column ''", got("panoptic_column", "empty", '""')),
    # distillation
    (DISTIL["distill_vision"], "--teacher ''", got("teacher", "empty", '""')),
    (DISTIL["distill_vision"], "--teacher /no/where", got("teacher", "/no/where")),
    (DISTIL["distill_vision"], "--terms []", got("terms", "empty")),
    (
        DISTIL["distill_vision"],
        "--terms '[{kind: soft_targets}]'",
        got("terms[0]", "kind", "did you mean soft_target"),
    ),
    (DISTIL["distill_vision"], "--terms '[{weight: 1}]'", got("terms[0]", "kind")),
    (DISTIL["distill_vision"], "--terms '[5]'", got("terms[0]", "5")),
    (DISTIL["distill_vision"], "--terms '[{kind: label, weight: .nan}]'", got("terms[0]", "weight", "nan")),
    (DISTIL["distill_vision"], "--terms '[{kind: label, heat: 2}]'", got("terms[0]", "heat", "temperature")),
    (
        DISTIL["distill_vision"],
        "--terms '[{kind: soft_target, temperature: -1}]'",
        got("terms[0]", "temperature", "0", "-1"),
    ),
    (DISTIL["distill_vision"], "--terms '[{kind: hidden_state, layers: {1: a}}]'", got("terms[0]", "layers")),
    (DISTIL["distill_vision"], "--teacher_device nosuch", got("teacher_device", "cuda", '"nosuch"')),
    (DISTIL["distill_vision"], "--teacher_dtype fp8", got("teacher_dtype", "fp16", '"fp8"')),
    (DISTIL["distill_vision"], "--write_cache true", got("write_cache", "cache")),
    (DISTIL["distill_vision"], "--cache_epochs 0", got("cache_epochs", "1", "0")),
    (DISTIL["distill_vision"], "--student_layers [-1]", got("student_layers", "0", "-1")),
    (DISTIL["distill_vision"], "--expected_score .nan", got("expected_score", "finite", "nan")),
    (DISTIL["distill_mae"], "--terms '[{kind: soft_target}]'", got("terms", "soft_target")),
    (DISTIL["distill_mae"], "--teacher {models}/nothing", got("teacher", "nothing")),
    (DISTIL["distill_task"], "--teacher {models}/vit", got("teacher", "vit")),
    (DISTIL["distill_task"], "--match_labels order", got("match_labels", "number", '"order"')),
    (DISTIL["distill_task"], "--cache_top_k 0", got("cache_top_k", "1", "0")),
    (DISTIL["distill_pretrain"], "--tokenizer x", got("tokenizer", '"x"')),
    (DISTIL["distill_pretrain"], "--sequences pairs", got("sequences", "rows", "pairs")),
    (DISTIL["distill_pretrain"], "--teacher {models}/gpt", got("teacher", "gpt")),
    (DISTIL["distill_detection"], "--student_layers '{middle: [0]}'", got("student_layers", "encoder", "middle")),
    (DISTIL["distill_translation"], "--lowercase true", got("lowercase", "teacher")),
    (DISTIL["distill_translation"], "--teacher {models}/vit", got("teacher", "vit")),
    ("run distill_cache distill_vision --config quickstart", "--output_dir {out}", got("write_cache", "cache")),
    ("run distill_cache distill_visions", "--output_dir {out}", "distill_visions"),
    # compression
    (COMPRESS, "--sparsity 1.5", got("sparsity", "1", "1.5")),
    (COMPRESS, "--method '[int8]'", got("method", "int8", "hf-tfm compress")),
    (COMPRESS, "--method '[{name: heads, ratio: half}]'", got("ratio", "number", "half")),
    (COMPRESS, "--model_name_or_path {models}/vit", got("model_name_or_path", "vit")),
    (COMPRESS, "--model_name_or_path null", got("model_name_or_path")),
    # augmentation of texts
    ("run augment_texts --dataset_name number-parity --output_dir {out}", "", got("model")),
    (
        "run augment_texts --dataset_name number-parity --model /no/where",
        "--output_dir {out}",
        got("model", "/no/where"),
    ),
    ("run augment_texts --dataset_name number-parity --model x", "--output_dir {in}", "output_dir .*already exists"),
    (
        "run augment_texts --dataset_name number-parity --model x --output_dir {out}",
        "--substitution.copies 0",
        got("copies", "1", "0"),
    ),
    (
        "run augment_texts --dataset_name number-parity --model {models}/bert --output_dir {out}",
        "--text_columns [words]",
        got("text_columns", "words"),
    ),
    # commands
    ("run", "nosuch", r'no recipe "nosuch"'),
    ("nosuch", "", '"nosuch" is not a command'),
    ("evaluate", "", "model and dataset"),
    ("evaluate {models}/tr --dataset_name number-words", "--batch_tokens 0", got("batch_tokens", "1", "0")),
    ("evaluate {models}/tr --dataset_name number-words", "--num_beams 100000", got("num_beams", "1,024", "100")),
    ("evaluate {models}/tr --dataset_name number-words", "--max_sample 2", r"did you mean --max_samples\?"),
    ("evaluate {models}/tr --dataset_name number-words", "--split dev", got("split", "dev", "train")),
    ("evaluate {models}/tr --dataset_name number-words", "--confusion x.png", got("confusion", "classifiers")),
    ("evaluate {models}/tr --dataset_name number-words", "--metrics [accuracy]", got("metrics", "bleu", "accuracy")),
    ("evaluate {models}/vit --dataset_name digits", "--max_samples 0", got("max_samples", "1", "0")),
    ("evaluate {models}/vit --dataset_name digits", "--max_samples few", got("max_samples", "integer", "few")),
    (
        "evaluate {models}/vit --dataset_name digits",
        "--max_samples 1e3",
        '^hf-tfm evaluate: max_samples must be an integer or null, got "1000.0"$',
    ),
    (
        "evaluate {models}/vit --dataset_name digits",
        f"--max_samples {'1' * 5000}",
        got("max_samples", "integer", "5000 digits"),
    ),
    ("evaluate {models}/vit --dataset_name digits", "--batch_size -1", got("batch_size", "1", "-1")),
    (
        "evaluate {models}/vit --dataset_name digits",
        "--dataloader_num_workers 100000",
        got("dataloader_num_workers", "256", "100"),
    ),
    ("evaluate {models}/vit --dataset_name digits", "--mixed_precision half", got("mixed_precision", "half")),
    ("evaluate {models}/vit --dataset_name /no/where", "", got("dataset_name", "/no/where")),
    (
        "evaluate {models}/gpt --dataset_name number-words --text_column translation.en",
        "--batch_tokens 0",
        "batch_tokens",
    ),
    ("evaluate {models}/gpt --dataset_name spelled-numbers", "--best_of 2", got("best_of", "2", "reward_model")),
    ("evaluate {models}/gpt --dataset_name number-words", "--mlm_probability 2", got("mlm_probability", "1", "2")),
    ("evaluate {models}/txt --dataset_name number-parity", "--max_length 0", got("max_length", "1", "0")),
    (
        "evaluate {models}/det --dataset_name digit-scenes",
        "--encoder_attention fast",
        got("encoder_attention", "full, ", "clustered", "fast"),
    ),
    (
        "evaluate {models}/det --dataset_name digit-scenes --encoder_attention clustered",
        "--encoder_attention_kwargs '{rounds: 0}'",
        got("encoder_attention_kwargs: rounds", "1", "0"),
    ),
    ("evaluate /no/where --dataset_name digits", "", got("model", "/no/where")),
    ("evaluate {models}/nothing --dataset_name digits", "", got("model", "nothing")),
    ("evaluate timm:unknown --dataset_name digits", "", r'timm has no model "unknown"'),
    ("evaluate torchvision:unknown --dataset_name digits", "", r'torchvision has no model "unknown"'),
    ("evaluate timm:local-dir:/no/where --dataset_name digits", "", got("model", "/no/where")),
    ("evaluate timm:test_vit --dataset_name digits", "--weights /no/where", got("weights", "/no/where")),
    ("evaluate {models}/vit --dataset_name digits", "--random_weights true", got("random_weights", "timm:NAME")),
    ("convert {models}/vit", "--to gguf --output_dir {out}", got("to", "vit", "gguf")),
    ("convert {models}/vit", "--to vit", "output_dir"),
    ("convert {models}/vit", "--to gpt2 --output_dir {out}", "gpt2"),
    ("convert /no/where", "--to vit --output_dir {out}", "/no/where"),
    ("convert {models}/vit", "--to vit --output_dir {in}", "in"),
    ("convert {models}/vit", "--to vit --output_dir ''", got("output_dir", "empty")),
    (
        "compress {models}/txt",
        "--method int9 --output_dir {out}",
        got("method", '"int9"', "did you mean int8"),
    ),
    ("compress {models}/txt", "--method heads --output_dir {out}", got("method", "heads", "dataset_name")),
    ("compress {models}/txt", "--method '{name: heads, ratio: 2}' --output_dir {out}", got("ratio", "1", "2")),
    ("compress {models}/txt", "--method '[int8, layers]' --output_dir {out}", got("method", "layers", "int8")),
    ("compress {models}/tr", "--method int8 --output_dir {out}", "int8.*tfm_transformer"),
    ("compress {models}/txt", "--method int8", "output_dir"),
    ("compress {models}/txt", "--method int8 --output_dir {in}", got("output_dir", "empty")),
    ("compress /no/where", "--method int8 --output_dir {out}", "/no/where"),
    ("show compression {models}/vit", "--dataset_name digits --output_dir {out}", got("models", "two")),
    (
        "show compression {models}/vit /no/where",
        "--dataset_name digits --output_dir {out}",
        got("models", "/no/where"),
    ),
    ("export {models}/vit", "--to tflite", got("to", "onnx, openvino, executorch", "tflite")),
    ("export {models}/vit", "--to onnx --quantize int4", got("quantize", "dynamic, static", "int4")),
    ("export {models}/vit", "--to onnx --output_dir {out} --quantize static", got("calibration_data", "static")),
    ("export {models}/vit", "--to onnx --output_dir {out} --calibration_data /no/where", got("calibration_data")),
    ("export /no/where", "--to onnx --output_dir {out}", "/no/where"),
    ("export {models}/vit", "--to onnx --output_dir {in}", "in"),
    ("push /no/where", "me/model", "/no/where"),
    ("push {in}", "me/model", "config.json"),
    ("push {models}/vit", "me", "me"),
    ("push {models}/vit", "me/model --privat true", r"did you mean --private\?"),
    ("show attention {models}/vit", "", "IMAGE|image"),
    ("show attention {models}/vit", "/no/where.png --output_dir {out}", "/no/where.png"),
    ("show attention {models}/vit digits:train:-1", "--output_dir {out}", got("index", "0", "-1")),
    ("convert {models}/vit", "--to vit --output_dir {out} --revision v1", got("revision", '"v1"', "local")),
    ("show attention {models}/tr --text word", "--layers [9] --output_dir {out}", got("layers", "9")),
    ("show attention {models}/tr --text ''", "--output_dir {out}", got("text", "empty")),
    ("show attention {models}/vit digits:train:0", "--heads [9] --output_dir {out}", got("heads", "9")),
    ("show attention {models}/vit digits:train:999999", "--output_dir {out}", "999999"),
    ("show attention {models}/vit digits:dev:0", "--output_dir {out}", "dev"),
    ("show detections {models}/det", "/no/where.png --output {out}.png", "/no/where.png"),
    ("show detections {models}/vit digits:train:0", "--output {out}.png", "vit"),
    ("show detections {models}/det digits:train:0", "--threshold 2 --output {out}.png", got("threshold", "1", "2")),
    ("show positions {models}/tr {models}/vit", "--output {out}.png", got("models", "vit")),
    ("show positions {models}/tr", "--length 0 --output {out}.png", got("length", "2", "0")),
    ("show queries {models}/det", "--output {out}.png", "IMAGE|image"),
    (
        "show reconstruction {models}/mae digits:train:0",
        "--mask_ratio .nan --output {out}.png",
        got("mask_ratio", "nan"),
    ),
    ("show scores {models}/det", "--output {out}.png", "runs must be folders or results files"),
    ("show reconstruction {models}/vit digits:train:0", "--output {out}.png", "vit"),
    ("show detecton", "x", r"did you mean detections\?"),
    ("doctor detection", "--quick", "--data|dataset"),
    ("doctor data", "", "dataset must be given"),
    ("doctor data /no/where", "", got("dataset_name", "/no/where")),
    ("doctor detection --data digit-scenes", "--bogus 1", "^hf-tfm doctor detection: --bogus is not an option"),
    ("launch --on slurm", "--nodes 0 translation_train --config quickstart", got("nodes", "at least 1", "0")),
    ("launch --on k8s", "translation_train --config quickstart", "image must be given"),
    ("launch", "--gpus 0 translation_train --config quickstart --seed -1", got("seed", "at least 0", "-1")),
    ("doctor launch --step 3", "translation_train", r"did you mean --steps\?"),
    ("doctor launch translation_train", "--config fly", got("config", "fly")),
    ("doctor data digits", "--max_sample 3", "--max_sample is not an option"),
    ("doctor detection --data digit-scenes", "--quick --learning_rate .nan", got("learning_rate", "finite", "nan")),
    ("doctor detection --data digit-scenes", "--quick --model /no/where", "/no/where"),
    ("quickstart", "--output_dir ''", got("output_dir", "empty")),
    ("quickstart", "--output_dir {in}/notes.txt/run", got("output_dir", "lies below", "notes.txt", "a file")),
    ("evaluate ~no-such-user/model", "--dataset_name digits", got("model", "~no-such-user/model", "no such user")),
    ("quickstart", "--output x", r"did you mean --output_dir\?"),
]


def option_rows() -> list[Row]:
    """A row for each of `OPTIONS`, named after its command and arguments."""
    rows, seen = [], set()
    for command, words, error in OPTIONS:
        parts = [part for part in shlex.split(command) if not part.startswith("-")]
        name = "-".join(parts[1:2] if parts[0] == "run" and len(parts) > 1 else parts[:2])
        name = re.sub(r"[^\w.]+", "_", f"{name} {words}").strip("_")[:70]
        while name in seen:
            name += "_"
        seen.add(name)
        rows.append(Row(name, f"{command} {words}", error, lambda folder: (folder / "notes.txt").write_text("mine")))
    return rows


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    """A builder of a single file."""

    def build(folder: Path) -> None:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return build


def yaml_row(name: str, content: str | bytes, error: str | None) -> Row:
    """A row for a YAML file of options."""
    return Row(f"yaml_{name}", f"{VISION} --config {{in}}/a.yaml", error, text("a.yaml", content))


BOMB = "\n".join(
    ["a0: &a0 [x,x,x,x,x,x,x,x,x]"] + [f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
)
YAML = [
    yaml_row("duplicate_key", "seed: 1\nlogging_steps: 5\nseed: 2\n", "a.yaml.*line 3.*duplicate.*seed"),
    yaml_row("duplicate_nested_key", "model: {patch_size: 4, patch_size: 8}\n", "a.yaml.*duplicate.*patch_size"),
    yaml_row("list", "- seed\n- 1\n", "a.yaml must be a mapping"),
    yaml_row("scalar", "fast", "a.yaml must be a mapping"),
    yaml_row("empty", "", "a.yaml is empty"),
    yaml_row("broken", "seed: [1\n", "a.yaml.*line.*invalid YAML"),
    yaml_row("tabs", "model:\n\tpatch_size: 4\n", "a.yaml.*line 2.*invalid YAML"),
    yaml_row("binary", b"\xff\xfe\x00\x01", "a.yaml is not a text file"),
    yaml_row("python_tag", "seed: !!python/object/apply:os.getpid []\n", "a.yaml.*line 1.*tag"),
    yaml_row("custom_tag", "seed: !env SEED\n", "a.yaml.*line 1.*tag"),
    yaml_row("alias_bomb", BOMB, "a.yaml.*10,000 values"),
    yaml_row("recursion", "model: &m {patch_size: *m}\n", "a.yaml.*deep|a.yaml.*model"),
    yaml_row("deep", f"model: {'[' * 3000}{']' * 3000}\n", "a.yaml.*deep"),
    yaml_row("unknown_key", "learning_rat: 0.1\n", r"a.yaml.*learning_rat.*did you mean learning_rate\?"),
    yaml_row("unknown_nested_key", "augmentation: {flipp: 1}\n", r"a.yaml.*augmentation.flipp.*did you mean flip\?"),
    yaml_row("dotted_key", "model.patch_size: 4\n", "a.yaml.*model.patch_size.*without a dot"),
    yaml_row("number_as_key", "1: 2\n", "a.yaml.*1.*not an option"),
    yaml_row("infinite", "weight_decay: .inf\n", "a.yaml.*weight_decay.*finite.*inf"),
    yaml_row("nan_in_list", "adam_betas: [0.9, .nan]\n", "a.yaml.*adam_betas.*finite.*nan"),
    yaml_row("text_as_number", "seed: fast\n", "a.yaml.*seed.*integer.*fast"),
    yaml_row("quoted_number", "seed: '5'\n", 'a.yaml.*seed.*integer.*"5"'),
    yaml_row("digits", f"seed: {'1' * 5000}\n", "a.yaml, line 1.*seed.*5,000 digits"),
    yaml_row("digits_in_list", f"mean: [{'1' * 5000}]\n", "a.yaml, line 1.*5,000 digits"),
    yaml_row("null_group", "augmentation: null\n", "a.yaml.*augmentation.*mapping"),
    yaml_row("null_where_needed", "seed: null\n", "a.yaml.*seed.*integer.*None"),
    yaml_row("list_as_text", "dataset_name: [digits]\n", "a.yaml.*dataset_name.*string"),
    yaml_row("two_documents", "seed: 1\n---\nseed: 2\n", "a.yaml.*another document"),
    Row("yaml_folder", f"{VISION} --config {{in}}", "--config .*in.* is neither a file"),
    Row("yaml_missing", f"{VISION} --config {{in}}/b.yaml", "--config .*b.yaml.* is neither a file"),
    Row(
        "yaml_pipe",
        f"{VISION} --config {{in}}/pipe",
        "--config .*pipe.* is neither a file",
        lambda folder: os.mkfifo(folder / "pipe"),
    ),
    Row(
        "yaml_huge",
        f"{VISION} --config {{in}}/a.yaml",
        "a.yaml has .* bytes",
        text("a.yaml", "# " + "x" * 2_000_000),
    ),
]

ONE_CLASS = "label.*(one|1) class|one class|one label|classes.*1|two classes"
HEAD = b"text,label\n"
TEXTS: list[tuple[str, dict, str | None]] = [
    (
        "one_class",
        {"train": [[f"text {i}", 0] for i in range(8)]},
        "label.*(one|1) class|one label|classes.*1|two classes",
    ),
    ("empty_texts", {"train": [["", i % 2] for i in range(8)]}, "text"),
    ("blank_texts", {"train": [["  ", i % 2] for i in range(8)]}, "text"),
    ("no_rows", {"train": HEAD}, "train"),
    ("zero_bytes", {"train": b""}, "train"),
    ("bad_utf8", {"train": HEAD + b"caf\xe9 au lait,0\n" * 8}, "train.csv|UTF-8|utf-8"),
    ("no_label_column", {"columns": ["text", "kind"]}, "label"),
    ("no_labels", {"train": [[f"text {i}", ""] for i in range(8)]}, "label"),
    ("missing_texts", {"train": [["a text", 0], [None, 1], ["other", 1]]}, "text"),
    ("unknown_label", {"validation": [["a text", 7], ["b text", 8]]}, "label.*7|7.*label"),
    ("no_validation", {"validation": None}, "validation"),
    (
        "semicolons_in_train",
        {"train": b"text;label\n" + b"a text;0\nb text;1\n" * 4},
        "text_columns \"text\" is empty in all 8 rows.*text;label.*separated by ';'",
    ),
    (
        "semicolons_everywhere",
        dict.fromkeys(("train", "validation", "test"), b"text;label\n" + b"a text;0\nb text;1\n" * 4),
        "label_column must name a column.*text;label.*separated by ';'",
    ),
    (
        "other_columns_in_validation",
        {"validation": b"sentence,label\n" + b"a text,0\nb text,1\n" * 4},
        'text_columns "text" is empty in all 8 rows of a split, whose columns are .*sentence',
    ),
    (
        "numbers_for_words_in_validation",
        {"train": [[f"text {i}", "yes" if i % 2 else "no"] for i in range(8)]},
        "validation_split.*label [01] is not a class.*no, yes",
    ),
    (
        "negative_labels",
        {"train": [[f"text {i}", -(i % 2)] for i in range(8)]},
        "two classes of labels, got '0'.*below 0",
    ),
]


def text_rows() -> list[Row]:
    """Rows with CSV files that cannot be trained on."""
    return [
        Row(
            f"texts_{name}",
            f"{TEXT_ONE} --dataset_name {{in}} --text_columns [text]",
            error,
            lambda folder, changes=changes: inputs.texts(folder, **changes),
        )
        for name, changes, error in TEXTS
    ]


IMAGES: list[tuple[str, dict, str | None]] = [
    ("all_broken", {"train": b"not an image"}, "image"),
    ("one_class", {"classes": ("ant",)}, got("label_column", "image")),  # the folder names then give no classes
    ("no_images", {"each": 0}, "dataset|image|data file"),
    ("broken_validation", {"validation": b"GIF89a"}, "image|validation"),
]


def image_rows() -> list[Row]:
    """Rows with image folders that cannot be trained on."""
    return [
        Row(
            f"images_{name}",
            f"{VISION_ONE} --dataset_name {{in}} --max_bad_images 3",
            error,
            lambda folder, changes=changes: inputs.images(folder, **changes),
        )
        for name, changes, error in IMAGES
    ]


def each(**fields) -> Callable[[dict], None]:
    """Change fields of every annotation."""

    def change(content: dict) -> None:
        for annotation in content["annotations"]:
            annotation.update(fields)

    return change


def every_image(**fields) -> Callable[[dict], None]:
    """Change fields of every image."""

    def change(content: dict) -> None:
        for image in content["images"]:
            image.update(fields)

    return change


COCO: list[tuple[str, object, str]] = [
    ("broken", b'{"images": [', "instances_train.json"),
    ("zero_bytes", b"", "instances_train.json"),
    ("list", lambda content: [1], "instances_train.json.*categories|instances_train.json"),
    ("deep", b"[" * 100_000, "instances_train.json"),
    ("no_categories", lambda content: content.pop("categories") and None, "instances_train.json.*categories"),
    ("empty_categories", lambda content: content.update(categories=[]), "instances_train.json.*categor"),
    ("unknown_category", each(category_id=99), "instances_train.json.*99"),
    ("no_annotations", lambda content: content.update(annotations=[]), "annotation|object|box"),
    ("no_images", lambda content: content.update(images=[]), "image"),
    ("boxes_nan", each(bbox=[float("nan")] * 4), "box"),
    ("boxes_outside", each(bbox=[500, 500, 5, 5]), "box"),
    ("boxes_flat", each(bbox=[8, 8, 0, 0]), "box"),
    ("boxes_text", each(bbox=["a", "b", "c", "d"]), "bbox|box"),
    ("boxes_short", each(bbox=[1, 2]), "bbox|box"),
    ("all_crowds", each(iscrowd=1), "crowd|object|box"),
    ("other_image_ids", each(image_id=77), "image_id|image|77"),
    ("missing_images", every_image(file_name="nothing.png"), "nothing.png"),
    ("absolute_name", every_image(file_name="/etc/hostname"), "/etc/hostname"),
    ("traversal", every_image(file_name="../../../x.png"), r"\.\./\.\./\.\./x.png"),
    ("device", every_image(file_name="/dev/zero"), "/dev/zero"),
    ("duplicate_image_ids", every_image(id=3), "instances_train.json.*3"),
    ("duplicate_category_ids", lambda content: content["categories"][1].update(id=1), "instances_train.json.*1"),
    ("names_numbers", lambda content: content["categories"][1].update(name=5), "instances_train.json.*name|name.*5"),
]


def coco_rows() -> list[Row]:
    """Rows with annotations that cannot be trained on."""
    rows = []
    for name, change, error in COCO:
        arguments = {"raw": change} if isinstance(change, bytes) else {"change": change}

        def build(folder: Path, arguments=arguments) -> None:
            inputs.coco(folder, **arguments)

        rows.append(Row(f"coco_{name}", DETECTION_ONE, error, build))
    return rows


def model_folder(**files: bytes | dict | None) -> Callable[[Path], None]:
    """A builder of {in}/m: files by name, with "__" for "."; a dict is written as JSON."""

    def build(folder: Path) -> None:
        model = folder / "m"
        model.mkdir()
        for name, content in files.items():
            if content is not None:
                data = json.dumps(content).encode() if isinstance(content, dict) else content
                (model / name.replace("__", ".")).write_bytes(data)

    return build


VIT = {"model_type": "tfm_vit", "architectures": ["TfmViTForImageClassification"], "image_size": 16, "patch_size": 8}
VIT |= {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
FOLDERS: list[tuple[str, dict, str]] = [
    ("no_config", {}, "m|config.json"),
    ("config_binary", {"config__json": b"\xff\xfe\x00"}, "config.json"),
    ("config_broken", {"config__json": b"{"}, "config.json"),
    ("config_list", {"config__json": b"[1]"}, "config.json"),
    ("config_deep", {"config__json": b"[" * 100_000}, "config.json"),
    ("config_unknown_type", {"config__json": {"model_type": "unheard_of"}}, "unheard_of"),
    ("no_weights", {"config__json": VIT}, "weights|safetensors|m"),
    ("zero_weights", {"config__json": VIT, "model__safetensors": b""}, "model.safetensors"),
    ("junk_weights", {"config__json": VIT, "model__safetensors": b"junk" * 50}, "model.safetensors"),
    ("bad_activation", {"config__json": {**VIT, "hidden_act": "evil"}}, "hidden_act.*evil"),
    ("negative_size", {"config__json": {**VIT, "hidden_size": -8}}, "hidden_size.*-8"),
    ("text_size", {"config__json": {**VIT, "hidden_size": "wide"}}, "hidden_size.*wide"),
    ("number_as_type", {"config__json": {**VIT, "model_type": 5}}, "model_type.*text, got 5"),
    ("text_as_classes", {"config__json": {**VIT, "architectures": "TfmViT"}}, "architectures.*list.*TfmViT"),
    ("list_of_labels", {"config__json": {**VIT, "id2label": ["ant", "bee"]}}, "id2label.*mapping.*ant"),
    ("labels_with_a_gap", {"config__json": {**VIT, "id2label": {"0": "ant", "5": "bee"}}}, 'id2label.*2 names.*"5"'),
    ("unknown_dtype", {"config__json": {**VIT, "dtype": "float99"}}, "dtype.*float99"),
    ("number_as_quantization", {"config__json": {**VIT, "quantization_config": 5}}, "quantization_config.*got 5"),
]


def folder_rows() -> list[Row]:
    """Rows with folders that hold no usable model, for every command that reads a model."""
    commands = {
        "evaluate": "evaluate {in}/m --dataset_name digits --max_samples 2 --progress false",
        "convert": "convert {in}/m --to vit --output_dir {out}",
        "show": "show positions {in}/m --output {out}.png",
    }
    return [
        Row(f"{name}_{fault}", command, error, model_folder(**files))
        for fault, files, error in FOLDERS
        for name, command in commands.items()
    ]


EVALUATION = "evaluate {models}/vit --dataset_name {in} --progress false"


def instead_of_train(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """A builder of texts whose train.csv is replaced by something else."""

    def build(folder: Path) -> None:
        inputs.texts(folder)
        (folder / "train.csv").unlink()
        make(folder / "train.csv")

    return build


def truncated(ending: str) -> Callable[[Path], None]:
    """A builder of texts whose train.csv is replaced by the first half of a zip or Arrow file."""

    def build(folder: Path) -> None:
        inputs.texts(folder)
        table = pyarrow.table({"text": ["a text"] * 1000, "label": [0, 1] * 500})
        for split in ("train", "validation", "test"):
            path = folder / f"{split}.{ending}"
            if ending == "zip":
                with zipfile.ZipFile(path, "w") as archive:
                    archive.write(folder / f"{split}.csv", f"{split}.csv")
            else:
                with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
                    writer.write_table(table)
            (folder / f"{split}.csv").unlink()
        content = (folder / f"train.{ending}").read_bytes()
        (folder / f"train.{ending}").write_bytes(content[: len(content) // 2])

    return build


def card(content: str) -> Callable[[Path], None]:
    """A builder of texts with a README.md."""

    def build(folder: Path) -> None:
        inputs.texts(folder)
        (folder / "README.md").write_text(content)

    return build


def nested_classes(folder: Path) -> None:
    """Images whose class folders are nested in other folders."""
    for split in ("train", "validation"):
        for name in ("ant", "bees/bee"):
            (folder / split / name).mkdir(parents=True)
            (folder / split / name / "0.png").write_bytes(inputs.png())


NAMED = "is named like a data file but is"
TEXTS_OF = f"{TEXT_ONE} --dataset_name {{in}} --text_columns [text]"
SOURCES = [
    Row("data_link", TEXTS_OF, f"train.csv {NAMED} a link to", instead_of_train(lambda p: p.symlink_to("gone.csv"))),
    Row("data_pipe", TEXTS_OF, f"train.csv {NAMED} not a regular file", instead_of_train(lambda p: os.mkfifo(p))),
    Row("data_folder", TEXTS_OF, f"train.csv {NAMED} an empty folder", instead_of_train(lambda p: p.mkdir())),
    Row("data_zip", TEXTS_OF, "train.zip is not a zip file, or a damaged one", truncated("zip")),
    Row("data_arrow", TEXTS_OF, "train.arrow is not an Arrow file, or a damaged one", truncated("arrow")),
    Row("data_card", TEXTS_OF, "README.md has invalid YAML", card("---\nconfigs: [a\n---\ntext")),
    Row(
        "data_revision",
        f"{TEXTS_OF} --dataset_revision v1",
        got("dataset_revision", '"v1"', "only to a data set on the Hub", "local files"),
        inputs.texts,
    ),
    Row("data_config", f"{TEXTS_OF} --dataset_config x", got("dataset_name", "x"), inputs.texts),
    Row("data_missing", f"{TEXT_ONE} --dataset_name no/where", got("dataset_name", "no/where")),
    Row(
        "data_nested_classes",
        f"{VISION_ONE} --dataset_name {{in}}",
        "label_column.*image.*train/CLASS/NAME.png; .*at the same depth",
        nested_classes,
    ),
]
KEEP_ALL = "--save_total_limit 1000000000"
FILES = [
    Row(
        "evaluate_output_is_a_folder", f"{EVALUATION} --output {{in}}", "in: Is a directory|output .*in", inputs.images
    ),
    Row(
        "evaluate_label_column_of_images",
        f"{EVALUATION} --label_column image",
        got("label_column", "image"),
        inputs.images,
    ),
    Row(
        "evaluate_broken_images",
        f"{EVALUATION} --max_bad_images 0",
        "image|png",
        lambda folder: inputs.images(folder, test=b"broken"),
    ),
    Row(
        "evaluate_model_of_texts", "evaluate {models}/txt --dataset_name {in} --progress false", "text", inputs.images
    ),
    Row(
        "unknown_backbone", f"{DETECTION_ONE} --model.backbone resnet9000", got("backbone", "resnet9000"), inputs.coco
    ),
    Row("backbone_folder", f"{DETECTION_ONE} {SMALL_HEADS} --backbone {{models}}/mae", None, inputs.coco),
    Row(
        "backbone_of_texts",
        f"{DETECTION_ONE} --backbone {{models}}/bert",
        got("backbone", "bert", "maps"),
        inputs.coco,
    ),
    Row(
        "backbone_that_does_not_exist",
        f"{DETECTION_ONE} --backbone {{in}}/resnet",
        got("backbone", "resnet", "neither a local folder"),
        inputs.coco,
    ),
    *(
        Row(
            f"backbone_{name}",
            f"{DETECTION_ONE} --backbone {{in}}/train",
            got("backbone", "train", *told),
            backbone(content),
        )
        for name, content, told in (
            ("without_config", None, ("config.json",)),
            ("unknown", {"model_type": "vtt"}, ("model_type", "vtt")),
            ("unknown_to_timm", {"architecture": "resnet9000"}, ("resnet9000",)),
            ("with_code", {"model_type": "own", "auto_map": {"AutoModel": "code.Own"}}, ("code",)),
            ("of_one_channel", {"model_type": "vit", "num_channels": 1}, ("num_channels", "3", "1")),
            (
                "without_weights",
                {"model_type": "tfm_vit", "num_hidden_layers": 1, **inputs.SIZES},
                ("model.safetensors",),
            ),
            ("of_timm_without_weights", {"architecture": "test_resnet"}, ("model.safetensors",)),
            ("too_large", {"model_type": "vit", "num_hidden_layers": 10**9}, ("num_hidden_layers", "1,000,000,000")),
        )
    ),
    Row(
        "backbone_frozen_stages",
        f"{DETECTION_ONE} --backbone {{models}}/mae --model.backbone_frozen_stages 2",
        got("backbone_frozen_stages", "1", "2"),
        inputs.coco,
    ),
    Row(
        "backbone_dilation",
        f"{DETECTION_ONE} --backbone {{models}}/mae --model.dilation true",
        got("dilation", "tfm_vit"),
        inputs.coco,
    ),
    Row(
        "backbone_of_a_trained_detector",
        f"{DETECTION_ONE} --backbone {{models}}/mae --model_name_or_path {{models}}/det",
        got("model_name_or_path", "backbone"),
        inputs.coco,
    ),
    Row("backbone_of_masks", f"{PANOPTIC} --backbone {{models}}/mae", got("backbone", "mae"), None),
    Row(
        "distill_detection_from_a_classifier",
        f"run distill_detection {ONE} {SCENE} --mixed_precision no --dataset_name {{in}} --teacher {{models}}/vit",
        got("teacher", "vit"),
        inputs.coco,
    ),
    Row(
        "train_from_a_translator",
        f"{VISION} --model_name_or_path {{models}}/tr --model '{{}}'",
        got("model_name_or_path"),
        None,
    ),
    Row(
        "train_from_a_detector",
        f"{MAE} --model_name_or_path {{models}}/det --model '{{}}'",
        got("model_name_or_path"),
        None,
    ),
    Row(
        "train_texts_from_images",
        f"{TEXT} --model_name_or_path {{models}}/vit --model '{{}}'",
        got("model_name_or_path"),
        None,
    ),
    Row(
        "train_language_from_images",
        f"{LANGUAGE} --model_name_or_path {{models}}/vit --model '{{}}'",
        got("model_name_or_path"),
        None,
    ),
    Row(
        "augment_texts_with_missing_ones",
        "run augment_texts --dataset_name {in} --text_columns [text] --model {models}/bert --output_dir {out}",
        'column "text" must hold text, got None in row 1',
        lambda folder: inputs.texts(folder, train=[["a text", 0], [None, 1]] * 4),
    ),
]

ROOM = "--dataset_name {in} --max_steps 1000000000 --save_steps 1 --save_total_limit 1000000000"
FILES += [Row("room_for_checkpoints", f"{VISION_ONE} {ROOM}", "checkpoints take about .* MB, but only", inputs.images)]

VALID = [
    Row("valid_more_checkpoints_than_steps", f"{VISION_ONE} --dataset_name {{in}} {KEEP_ALL}", None, inputs.images),
    Row("valid_texts", f"{TEXT_ONE} --dataset_name {{in}} --text_columns [text] --warmup_steps 1", None, inputs.texts),
    Row(
        "valid_texts_evaluated_at_the_end",
        f"{TEXT_ONE} --dataset_name {{in}} --text_columns [text] --eval_steps 100000 --save_steps 100000",
        None,
        inputs.texts,
    ),
    Row(
        "valid_texts_with_quotes_and_empty_cells_elsewhere",
        f"{TEXT_ONE} --dataset_name {{in}} --text_columns [text]",
        None,
        lambda folder: inputs.texts(folder, train=[['a "quoted, text"', 0], ["NA", 1], ["null", 0], ["None", 1]] * 3),
    ),
    Row(
        "valid_images",
        f"{VISION_ONE} --dataset_name {{in}} --layer_wise_lr_decay 1 --seed 4294967295",
        None,
        inputs.images,
    ),
    Row(
        "valid_one_broken_image",
        f"{VISION_ONE} --dataset_name {{in}} --max_bad_images 1",
        None,
        lambda folder: inputs.images(folder, train_ant_0=b"broken"),
    ),
    Row(
        "valid_yaml_with_anchors",
        f"{VISION_ONE} --dataset_name {{in}} --config {{in}}/a.yaml",
        None,
        anchors,
    ),
    Row("valid_coco", f"{DETECTION_ONE} {SMALL_DETECTOR}", None, inputs.coco),
    Row("valid_evaluation", f"{EVALUATION} --max_samples 1 --batch_size 1", None, inputs.images),
    Row("valid_picture", "show positions {models}/vit --output {out}.png", None),
]

ROWS = [*option_rows(), *YAML, *text_rows(), *image_rows(), *coco_rows(), *folder_rows(), *SOURCES, *FILES, *VALID]
