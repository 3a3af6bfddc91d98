"""The knobs that every recipe shares."""

import ast
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Literal

from jsonargparse import ActionConfigFile, ArgumentParser

from ..command import DEBUG_HELP


@dataclass(kw_only=True)
class TrainingArguments:
    """How long, how fast and how safely to train.

    Args:
        output_dir: where the model, its card, checkpoints and logs go.
        overwrite_output_dir: delete another run, one with other data or knobs, that the folder holds; this run itself
            goes on.
        seed: of weights, order of data, dropout and masks.
        num_epochs: passes over the training data; or give num_steps.
        num_steps: optimizer steps; takes the place of num_epochs, which is then null.
        num_workers: processes that prepare batches, beside each training process.
        optimizer: Adam with decoupled (adamw) or with L2 weight decay (adam), or stochastic gradient descent (sgd).
        learning_rate: the highest of the schedule.
        layer_decay: each layer learns this much slower than the one above it (Clark et al. 2020); 1 is no difference.
        rate_factors: parts of the model by a piece of their weights' names, and what their learning rate is multiplied
            by, say {backbone: 0.1}.
        schedule: inverse_sqrt (Vaswani et al. 2017, equation 3), cosine, linear, constant, or step (constant, and a
            tenth from drop_after on), each after a warm-up.
        drop_after: share of the steps after which the step schedule drops.
        warmup_steps: steps of linear rise from 0.
        adam_betas: decay rates of the moments.
        adam_epsilon: added to the root of the second moment.
        momentum: of sgd.
        weight_decay: of weight matrices; biases, norms, positions and single tokens have none.
        max_grad_norm: gradients are scaled down to this norm; 0 turns it off.
        precision: no (float32), bf16 or fp16 autocast.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        compile: compile the model (pays on GPUs).
        ema_decay: decay of an exponential moving average of the weights; 0 turns it off.
        average_checkpoints: number of last checkpoints that final_weights "average" takes the mean of.
        final_weights: which weights are saved in the end.
        eval_steps: steps between evaluations; default, once an epoch.
        save_steps: steps between checkpoints; default, with every evaluation.
        log_steps: steps between log lines.
        best_metric: what "best" and early stopping look at: loss, or a metric of the task (higher is better then).
        patience: evaluations without a better best_metric before the run stops; 0 never stops.
        keep_checkpoints: last checkpoints kept, beside the best and those to be averaged.
        max_nonfinite_steps: the run ends after this many steps in a row whose gradient is not finite; fp16, which
            searches its loss scale that way, has 16 more.
        trackers: experiment trackers: tensorboard, wandb, trackio.
        run_name: name of the run in trackers; default, the output folder's.
        progress: show a progress bar; without it, log lines are printed.

    Raises:
        ValueError: a value is outside its range, or two do not fit each other.
    """

    output_dir: str
    overwrite_output_dir: bool = False
    seed: int = 0
    num_epochs: float | None = None
    num_steps: int | None = None
    num_workers: int = 0
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
    rate_factors: dict[str, float] = field(default_factory=dict)
    schedule: Literal["inverse_sqrt", "cosine", "linear", "constant", "step"] = "inverse_sqrt"
    drop_after: float = 2 / 3
    warmup_steps: int = 1000
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_epsilon: float = 1e-9
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    ema_decay: float = 0.0
    average_checkpoints: int = 0
    final_weights: Literal["last", "best", "average", "ema"] = "best"
    eval_steps: int | None = None
    save_steps: int | None = None
    log_steps: int = 50
    best_metric: str = "loss"
    patience: int = 0
    keep_checkpoints: int = 2
    max_nonfinite_steps: int = 5
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    run_name: str | None = None
    progress: bool = True

    def __post_init__(self):
        for knob in fields(self):
            value = getattr(self, knob.name)
            if is_dataclass(knob.type) and isinstance(value, dict):  # a group of knobs, as YAML has it
                setattr(self, knob.name, knob.type(**value))
        if (self.num_epochs is None) == (self.num_steps is None):
            raise ValueError(
                f"give exactly one of num_epochs and num_steps, got {self.num_epochs} and {self.num_steps}; "
                "null takes back what a preset gives"
            )
        self.check_range(
            at_least_0="seed num_workers warmup_steps weight_decay max_grad_norm average_checkpoints patience",
            at_least_1="num_steps eval_steps save_steps log_steps keep_checkpoints max_nonfinite_steps",
            above_0="num_epochs learning_rate adam_epsilon layer_decay",
        )
        for part, factor in self.rate_factors.items():
            if not factor > 0.0:
                raise ValueError(f"rate_factors must be above 0, got {factor} for {part}")
        below_1 = [("adam_betas", beta) for beta in self.adam_betas]
        shares = [(name, getattr(self, name)) for name in ("ema_decay", "momentum", "drop_after")]
        for name, value in (*shares, *below_1):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.final_weights == "ema" and not self.ema_decay:
            raise ValueError('final_weights="ema" needs ema_decay above 0, got 0')
        if self.final_weights == "average" and self.average_checkpoints < 1:
            raise ValueError(f'final_weights="average" needs average_checkpoints, got {self.average_checkpoints}')
        for name in self.trackers:
            # accelerate would leave out a tracker that is not installed without a word.
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"trackers: {name} is not installed")

    def check_range(self, at_least_0: str = "", at_least_1: str = "", above_0: str = "") -> None:
        """Check numbers against their lower bounds; None is none.

        Args:
            at_least_0, at_least_1, above_0: names of knobs, with spaces between.

        Raises:
            ValueError: a value is too small, or not a number.
        """
        for names, limit, fits in (
            (at_least_0, "at least 0", lambda value: value >= 0),
            (at_least_1, "at least 1", lambda value: value >= 1),
            (above_0, "above 0", lambda value: value > 0),
        ):
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not fits(value):
                    raise ValueError(f"{name} must be {limit}, got {value}")


@dataclass(kw_only=True)
class TokenArguments(TrainingArguments):
    """Training on batches of about equally many tokens.

    Args:
        batch_tokens: padded tokens, on the longer side, of one optimizer step over all processes.
        micro_batch_tokens: padded tokens that one process computes at once; less memory, the same result.

    The others are those of `TrainingArguments`.
    """

    batch_tokens: int = 4096
    micro_batch_tokens: int | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="batch_tokens micro_batch_tokens")


@dataclass(kw_only=True)
class ImageArguments(TrainingArguments):
    """Training on batches of equally many images.

    Args:
        batch_size: images of one optimizer step over all processes.
        micro_batch_size: images that one process computes at once; less memory, the same result.
        learning_rate: the highest of the schedule; default, from base_learning_rate.
        base_learning_rate: the learning rate for 256 images a step: learning_rate = base * batch_size / 256
            (Goyal et al. 2017, arXiv:1706.02677).
        warmup_epochs: takes the place of warmup_steps.

    The others are those of `TrainingArguments`.

    Raises:
        ValueError: a value is outside its range, or two do not fit each other.
    """

    batch_size: int = 256
    micro_batch_size: int | None = None
    learning_rate: float | None = None
    base_learning_rate: float | None = None
    warmup_epochs: float | None = None

    def __post_init__(self):
        if (self.learning_rate is None) == (self.base_learning_rate is None):
            raise ValueError(
                f"give exactly one of learning_rate and base_learning_rate, got {self.learning_rate} and "
                f"{self.base_learning_rate}; null takes back what a preset gives"
            )
        self.check_range(
            at_least_0="warmup_epochs", at_least_1="batch_size micro_batch_size", above_0="base_learning_rate"
        )
        super().__post_init__()

    def settle(self, steps_per_epoch: int | None) -> tuple["ImageArguments", str]:
        """Work out the learning rate and the warm-up.

        Args:
            steps_per_epoch: None where it is not known; warmup_epochs needs it.

        Returns:
            These knobs with ``learning_rate`` and ``warmup_steps`` alone, for the optimizer; this object stays as it
            was given, for the record. And a line that says what they are.
        """
        rate, steps, base = self.learning_rate, self.warmup_steps, ""
        if self.base_learning_rate is not None:
            rate = self.base_learning_rate * self.batch_size / 256
            base = f" = {self.base_learning_rate:g} x {self.batch_size} images / 256"
        if self.warmup_epochs is not None:
            steps = round(self.warmup_epochs * steps_per_epoch)
        line = f"learning rate {rate:g}{base}; warm-up {steps} steps"
        line += f" of {steps_per_epoch} an epoch" if steps_per_epoch else ""
        settled = {"learning_rate": rate, "base_learning_rate": None, "warmup_steps": steps, "warmup_epochs": None}
        return replace(self, **settled), line


def parse_arguments(kind: type, recipe: Path, argv: Sequence[str]):
    """Command line and YAML -> a dataclass of knobs.

    ``--config`` takes a file or the name of one of the recipe's presets; all other words override it, wherever they
    stand.
    ``--print_config`` prints the result instead of running it.

    Args:
        kind: the recipe's dataclass.
        recipe: the recipe's file; its presets are in ``presets/<recipe>/`` beside it.
        argv: the command line, without the program.

    Raises:
        SystemExit: a key is unknown or a value is not one it may have; the message names it.
    """
    name = f"hf-tfm run {recipe.stem}"
    parser = ArgumentParser(
        prog=name,
        usage=f"{name} [--config PRESET or FILE] [--KNOB VALUE ...]",
        description=recipe_summary(recipe),
        epilog=DEBUG_HELP,
        allow_abbrev=False,  # a mistyped knob must not pass for another
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file or a preset's name")
    parser.add_class_arguments(kind, fail_untyped=True, sub_configs=False)
    presets = recipe.parent / "presets" / recipe.stem
    configs, words = [], []
    rest = iter(argv)
    for word in rest:
        name = word.removeprefix("--config=") if word.startswith("--config=") else None
        name = next(rest, None) if word == "--config" else name
        if name is None:
            words.append(word)
        else:
            configs += ["--config", preset_path(name, presets, parser)]
    values = parser.parse_args([*configs, *words])
    values.pop("config")
    try:
        return kind(**values.as_dict())
    except ValueError as error:
        parser.error(str(error))


def preset_path(name: str, presets: Path, parser: ArgumentParser) -> str:
    """The file of a preset, or ``name`` itself where it is a file."""
    if Path(name).is_file():
        return name
    file = presets / f"{name}.yaml"
    if not file.is_file():
        known = ", ".join(sorted(p.stem for p in presets.glob("*.yaml")))
        parser.error(f'--config "{name}" is neither a file nor a preset; presets: {known}')
    return str(file)


def recipe_summary(recipe: Path) -> str:
    """The first paragraph of a recipe's docstring."""
    return ast.get_docstring(ast.parse(recipe.read_text())).split("\n\n")[0]
