"""The options that every recipe shares, and how a command line with YAML files becomes a dataclass of them."""

import ast
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from jsonargparse import ActionConfigFile

from ..command import DEBUG_HELP
from ..limits import LARGEST_BATCH, SEEDS
from ..options import OptionParser, check_config, check_words
from ..values import check_bounds, closest, conform_fields, shown

DEFAULT_WARMUP = 1000  # steps
WORKERS_PER_CORE, FEWEST_WORKERS = (
    4,
    64,
)  # the limit of dataloader_num_workers; presets are written for larger machines than this


@dataclass(kw_only=True)
class TrainingArguments:
    """How long, how fast and how safely to train.

    Args:
        output_dir: where the model, its card, checkpoints and logs go.
        overwrite_output_dir: delete another run, one with other data or knobs, that the folder holds; this run itself
            goes on.
        seed: of weights, order of data, dropout and masks.
        num_train_epochs: passes over the training data; or give max_steps.
        max_steps: optimizer steps; takes the place of num_train_epochs, which is then null.
        dataloader_num_workers: processes that prepare batches, beside each training process.
        optimizer: Adam with decoupled (adamw) or with L2 weight decay (adam), or stochastic gradient descent (sgd).
        learning_rate: the highest of the schedule.
        layer_wise_lr_decay: layer-wise learning-rate decay factor (Clark et al. 2020), in (0, 1]; 1.0 disables it.
        rate_factors: parts of the model by a piece of their weights' names, and what their learning rate is multiplied
            by, say {backbone: 0.1}.
        lr_scheduler_type: inverse_sqrt (Vaswani et al. 2017, equation 3), cosine, linear, constant, or step (constant,
            and a tenth from lr_drop_ratio on), each after a warm-up.
        lr_drop_ratio: share of the steps after which the step schedule drops.
        warmup_steps: steps of linear rise from 0, at most the run's; default, the smaller of 1,000 and a tenth of the
            run.
        adam_betas: decay rates of the moments.
        adam_epsilon: added to the root of the second moment.
        momentum: of sgd.
        weight_decay: of weight matrices; biases, norms, positions and single tokens have none.
        max_grad_norm: gradients are scaled down to this norm; 0 turns it off.
        mixed_precision: no (float32), bf16 or fp16 autocast.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        torch_compile: compile the model (pays on GPUs).
        ema_decay: decay of an exponential moving average of the weights; 0 turns it off.
        average_checkpoints: number of last checkpoints that final_weights "average" takes the mean of.
        final_weights: which weights are saved in the end.
        eval_steps: steps between evaluations, of which one is always at the end; default, once an epoch.
        save_steps: steps between checkpoints; default, with every evaluation.
        logging_steps: steps between log lines.
        metric_for_best_model: what "best" and early stopping look at: loss, or a metric of the task (higher is better
            then).
        early_stopping_patience: evaluations without a better metric_for_best_model before the run stops; 0 never
            stops.
        save_total_limit: last checkpoints kept, beside the best and those to be averaged.
        max_nonfinite_steps: the run ends after this many steps in a row whose gradient is not finite; fp16, which
            searches its loss scale that way, has 16 more.
        report_to: experiment trackers: tensorboard, wandb, trackio.
        run_name: name of the run in trackers; default, the output folder's.
        progress: show a progress bar; without it, log lines are printed.
        trust_remote_code: run the code that a model named by another argument brings, or its tokenizer; without it,
            such a model is refused.

    Raises:
        ValueError: a value is outside its range, or two do not fit each other.
    """

    output_dir: str
    overwrite_output_dir: bool = False
    seed: int = 0
    num_train_epochs: float | None = None
    max_steps: int | None = None
    dataloader_num_workers: int = 0
    optimizer: Literal["adam", "adamw", "sgd"] = "adamw"
    learning_rate: float = 1e-3
    layer_wise_lr_decay: float = 1.0
    rate_factors: dict[str, float] = field(default_factory=dict)
    lr_scheduler_type: Literal["inverse_sqrt", "cosine", "linear", "constant", "step"] = "inverse_sqrt"
    lr_drop_ratio: float = 2 / 3
    warmup_steps: int | None = None
    adam_betas: tuple[float, float] = (0.9, 0.98)
    adam_epsilon: float = 1e-9
    momentum: float = 0.9
    weight_decay: float = 0.0
    max_grad_norm: float = 0.0
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    ema_decay: float = 0.0
    average_checkpoints: int = 0
    final_weights: Literal["last", "best", "average", "ema"] = "best"
    eval_steps: int | None = None
    save_steps: int | None = None
    logging_steps: int = 50
    metric_for_best_model: str = "loss"
    early_stopping_patience: int = 0
    save_total_limit: int = 2
    max_nonfinite_steps: int = 5
    report_to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    run_name: str | None = None
    progress: bool = True
    trust_remote_code: bool = False

    def __post_init__(self):
        conform_fields(self)
        if (self.num_train_epochs is None) == (self.max_steps is None):
            raise ValueError(
                f"give exactly one of num_train_epochs and max_steps, got {self.num_train_epochs} and "
                f"{self.max_steps}; null removes the value of a preset"
            )
        self.check_range(
            at_least_0="seed dataloader_num_workers warmup_steps weight_decay max_grad_norm average_checkpoints "
            "early_stopping_patience",
            at_least_1="max_steps eval_steps save_steps logging_steps save_total_limit max_nonfinite_steps",
            above_0="num_train_epochs learning_rate adam_epsilon layer_wise_lr_decay",
            at_most={
                "seed": SEEDS - 1,
                "max_steps": 1_000_000_000,
                "num_train_epochs": 1_000_000,
                "layer_wise_lr_decay": 1,
                "learning_rate": 1000,
                "adam_epsilon": 1,
            },
        )
        cores = os.cpu_count() or 1
        if self.dataloader_num_workers > (most := max(FEWEST_WORKERS, WORKERS_PER_CORE * cores)):
            raise ValueError(
                f"dataloader_num_workers must be at most {most} on a machine with {cores} CPU cores, got "
                f"{self.dataloader_num_workers}"
            )
        if self.max_steps is not None:
            self.warmup(self.max_steps)
        if self.optimizer != "adam" and self.learning_rate is not None and self.learning_rate * self.weight_decay >= 1:
            raise ValueError(
                "weight_decay times learning_rate must be below 1, or a step turns the sign of the weights; got "
                f"{self.weight_decay} times {self.learning_rate}"
            )
        for part, factor in self.rate_factors.items():
            if not 0.0 < factor <= 1000.0:
                raise ValueError(f"rate_factors must be above 0 and at most 1000, got {factor} for {part}")
        below_1 = [("adam_betas", beta) for beta in self.adam_betas]
        shares = [(name, getattr(self, name)) for name in ("ema_decay", "momentum", "lr_drop_ratio")]
        for name, value in (*shares, *below_1):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name} must be in [0, 1), got {value}")
        if self.final_weights == "ema" and not self.ema_decay:
            raise ValueError('final_weights="ema" needs ema_decay above 0, got 0')
        if self.final_weights == "average" and self.average_checkpoints < 1:
            raise ValueError(f'final_weights="average" needs average_checkpoints, got {self.average_checkpoints}')
        self.check_distinct("report_to")
        for name in self.report_to:
            # accelerate would leave out a tracker that is not installed without a word.
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"report_to: {name} is not installed")

    def warmup(self, max_steps: int) -> int:
        """Steps of warm-up of a run of ``max_steps``.

        Raises:
            ValueError: ``warmup_steps`` is above ``max_steps``: the run would never reach its learning rate.
        """
        if self.warmup_steps is None:
            return min(DEFAULT_WARMUP, max_steps // 10)
        if self.warmup_steps > max_steps:
            raise ValueError(
                f"warmup_steps must be at most the {max_steps} steps of the run (max_steps), got {self.warmup_steps}"
            )
        return self.warmup_steps

    def check_range(
        self,
        at_least_0: str = "",
        at_least_1: str = "",
        above_0: str = "",
        at_most: Mapping[str, float] | None = None,
    ) -> None:
        """Check numbers against their bounds; None is not checked.

        Args:
            at_least_0, at_least_1, above_0: names of options, with spaces between.
            at_most: largest values by option.

        Raises:
            ValueError: a value is outside its bounds.
        """
        for names, least in ((at_least_0, 0), (at_least_1, 1)):
            for name in names.split():
                check_bounds(name, getattr(self, name), least)
        for name in above_0.split():
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        for name, most in (at_most or {}).items():
            check_bounds(name, getattr(self, name), most=most)

    def check_distinct(self, *names: str) -> None:
        """Refuse lists in which something stands twice.

        Args:
            names: of options; those that these options do not have are left out.

        Raises:
            ValueError: it names the option and the value.
        """
        for name in names:
            values = getattr(self, name, None) or []
            if twice := [value for i, value in enumerate(values) if value in values[:i]]:
                raise ValueError(f"{name} must name each once, got {shown(twice[0])} twice")


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
        self.check_range(at_least_1="batch_tokens micro_batch_tokens", at_most={"batch_tokens": 1_000_000_000})


@dataclass(kw_only=True)
class ImageArguments(TrainingArguments):
    """Training on batches of equally many images.

    Args:
        batch_size: images of one optimizer step over all processes.
        micro_batch_size: images that one process computes at once; less memory, the same result.
        learning_rate: the highest of the schedule; default, from base_learning_rate.
        base_learning_rate: the learning rate for 256 images a step: learning_rate = base * batch_size / 256
            (Goyal et al. 2017, arXiv:1706.02677).
        warmup_epochs: takes the place of warmup_steps, which is then null.

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
        super().__post_init__()
        if (self.learning_rate is None) == (self.base_learning_rate is None):
            raise ValueError(
                f"give exactly one of learning_rate and base_learning_rate, got {self.learning_rate} and "
                f"{self.base_learning_rate}; null takes back what a preset gives"
            )
        self.check_range(
            at_least_0="warmup_epochs",
            at_least_1="batch_size micro_batch_size",
            above_0="base_learning_rate",
            at_most={"batch_size": LARGEST_BATCH, "base_learning_rate": 1000},
        )
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError(
                f"give one of warmup_steps and warmup_epochs, got {self.warmup_steps} and {self.warmup_epochs}; null "
                "takes back what a preset gives"
            )
        if None not in (self.warmup_epochs, self.num_train_epochs) and self.warmup_epochs > self.num_train_epochs:
            raise ValueError(
                f"warmup_epochs must be at most num_train_epochs = {self.num_train_epochs}, got {self.warmup_epochs}"
            )

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
        rise = "of a tenth of the run, at most 1,000" if steps is None else steps
        line = f"learning rate {rate:g}{base}; warm-up {rise} steps"
        line += f" of {steps_per_epoch} an epoch" if steps_per_epoch else ""
        settled = {"learning_rate": rate, "base_learning_rate": None, "warmup_steps": steps, "warmup_epochs": None}
        return replace(self, **settled), line


def parse_arguments(kind: type, recipe: Path, argv: Sequence[str]):
    """Command line and YAML -> a dataclass of options.

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
    parser = OptionParser(
        prog=name,
        usage=f"{name} [--config PRESET or FILE] [--OPTION VALUE ...]",
        description=recipe_summary(recipe),
        epilog=DEBUG_HELP,
        allow_abbrev=False,  # a mistyped option must not pass for another
    )
    parser.add_argument("--config", action=ActionConfigFile, help="a YAML file or a preset's name")
    parser.add_class_arguments(kind, fail_untyped=True, sub_configs=False)
    presets = recipe.parent / "presets" / recipe.stem
    configs, words = [], []
    rest = iter(argv)
    try:
        for word in rest:
            config = word.removeprefix("--config=") if word.startswith("--config=") else None
            config = next(rest, None) if word == "--config" else config
            if config is None:
                words.append(word)
            else:
                configs += ["--config", preset_path(config, presets)]
                check_config(Path(configs[-1]), kind)
        check_words(words, kind)
        values = parser.parse_args([*configs, *words])
        values.pop("config")
        return kind(**values.as_dict())
    except ValueError as error:
        parser.error(str(error))


def preset_path(name: str, presets: Path) -> str:
    """The file of a preset, or ``name`` itself where it is a file.

    Raises:
        ValueError: it is neither.
    """
    if Path(name).is_file():
        return name
    file = presets / f"{name}.yaml"
    if not name or not file.is_file():
        known = sorted(p.stem for p in presets.glob("*.yaml"))
        raise ValueError(
            f"--config {shown(name)} is neither a file nor a preset; presets: {', '.join(known)}{closest(name, known)}"
        )
    return str(file)


def recipe_summary(recipe: Path) -> str:
    """The first paragraph of a recipe's docstring."""
    return ast.get_docstring(ast.parse(recipe.read_text())).split("\n\n")[0]
