"""Compression of any task's model while it is trained: structured pruning first, then gradual pruning of weights.

model -> blocks, heads, neurons or ranks removed -> training with growing masks -> masked weights

`compress` makes the class for a task, also for a task with a teacher: ``compress(distill(TextClassificationTask))``.
"""

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field, make_dataclass, replace
from functools import cache, partial
from typing import Any, Literal

from accelerate.utils import DistributedType, send_to_device
from transformers import PreTrainedModel

from ..arguments import Arguments
from ..compression.masks import Pruner
from ..compression.methods import Calibration, Int8, apply_methods, describe, read_methods
from ..hub.cost import Cost, beside_teacher, measure_costs
from ..hub.loading import load_config
from .base import Task
from .distillation import LOWER_IS_BETTER, DistillationTask

SCORES = "parametrizations.weight.0.scores"  # in the names of trained scores of weights
LARGEST_FACTOR = 1000  # of a learning rate


@dataclass(kw_only=True)
class CompressionArguments(Arguments):
    """Compression of the model named by model_name_or_path, which is then trained.

    Args:
        method: what is removed before training, see `compression.methods`: layers, heads, neurons, low_rank; each a
            name or {name, option: value}.
        pruning: set weights of the blocks to zero during training: those of least magnitude (Zhu and Gupta 2017), or
            of the least trained scores (movement, Sanh et al. 2020); default, none.
        sparsity: final fraction of zeros.
        pruning_begin: fraction of the run after which the first weights are pruned.
        pruning_end: fraction of the run after which the sparsity is final; it grows by a cubic schedule until then.
        pruning_interval: steps between two updates of the masks.
        scores_learning_rate: peak learning rate of the scores of movement pruning.
        calibration_samples: training samples that importances are measured on.
        costs: measure costs and scores of the original and of the compressed model after training, for the card.
    """

    method: list[Any] = field(default_factory=list)
    pruning: Literal["magnitude", "movement"] | None = None
    sparsity: float = 0.8
    pruning_begin: float = 0.1
    pruning_end: float = 0.7
    pruning_interval: int = 10
    scores_learning_rate: float = 1e-2
    calibration_samples: int = 512
    costs: bool = True

    def __post_init__(self):
        super().__post_init__()
        run: Any = self  # arguments of a run have those of ModelArguments and TrainingArguments, too
        for method in read_methods(self.method, exports=False):
            if isinstance(method, Int8):
                raise ValueError("method int8 cannot be trained: apply it to the trained model with hf-tfm compress")
        self.check_range(
            at_least_1="pruning_interval calibration_samples",
            above_0="scores_learning_rate",
            at_most={"scores_learning_rate": 1000},
        )
        if not 0.0 < self.sparsity < 1.0:
            raise ValueError(f"sparsity must be above 0 and below 1, got {self.sparsity}")
        if not 0.0 <= self.pruning_begin < self.pruning_end <= 1.0:
            raise ValueError(
                "pruning_begin must be at least 0 and below pruning_end, which is at most 1, got "
                f"{self.pruning_begin} and {self.pruning_end}"
            )
        if not self.method and self.pruning is None:
            raise ValueError("nothing to compress: give method or pruning")
        if not run.model_name_or_path:
            raise ValueError("model_name_or_path must name the model to compress")
        if self.pruning and run.final_weights == "average":
            raise ValueError('final_weights "average" of checkpoints with different masks is not sparse: give "best"')
        if self.pruning == "movement" and run.learning_rate is not None:
            self.scores_factor(run.learning_rate)

    def scores_factor(self, learning_rate: float) -> float:
        """Return the learning rate of the scores as a multiple of that of the weights.

        Raises:
            ValueError: it is too large.
        """
        factor = self.scores_learning_rate / learning_rate
        if factor > LARGEST_FACTOR:
            raise ValueError(
                f"scores_learning_rate must be at most {LARGEST_FACTOR} times learning_rate = {learning_rate:g}, got "
                f"{self.scores_learning_rate:g}"
            )
        return factor

    def resolve(self, steps_per_epoch: int | None, max_steps: int) -> tuple[Any, str | None]:
        """See `TrainingArguments.resolve`; scores get their own learning rate."""
        resolved, line = super().resolve(steps_per_epoch, max_steps)  # type: ignore[misc]  # of TrainingArguments
        if self.pruning != "movement":
            return resolved, line
        rates = {**resolved.rate_factors, SCORES: self.scores_factor(resolved.learning_rate)}
        return replace(resolved, rate_factors=rates), line


class CompressionMixin(Task):
    """Compression of a task's model; see `compress`.

    Attributes:
        original: the model before compression, to compare costs; None if it has no trained head, or no costs are
            wanted.
        pruner: sets weights to zero during training, or None.
        done: what the methods did.
    """

    original: PreTrainedModel | None = None
    pruner: Pruner | None = None
    done: list[dict[str, Any]]

    @property
    def plain(self) -> Task:
        """The task without a teacher."""
        return self.task if isinstance(self, DistillationTask) else self

    def build_model(self) -> PreTrainedModel:
        """The loaded model, compressed.

        Raises:
            ValueError: a method does not fit the model.
        """
        args = self.args
        model = super().build_model()  # type: ignore[safe-super]  # of the task
        saved = load_config(args.model_name_or_path, trust_remote_code=args.trust_remote_code)
        trained = type(model).__name__ in (saved.architectures or ()) and saved.num_labels == model.config.num_labels
        if args.costs and trained and not isinstance(self, DistillationTask):
            self.original = copy.deepcopy(model)
        if self.accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED) and args.pruning:
            raise ValueError(f"pruning does not run with {self.accelerator.distributed_type.value}: use DDP")
        self.plain.model = model.to(self.accelerator.device)
        data = Calibration(self.plain.losses, CalibrationBatches(self), partial(self.accelerator.reduce))
        methods = read_methods(args.method, exports=False)
        self.done = apply_methods(model, methods, data)
        if self.done:
            left = sum(parameter.numel() for parameter in model.parameters())
            self.accelerator.print(f"compressed by {describe(self.done)}: {left:,} parameters are left")
        if args.pruning:
            self.pruner = Pruner(model, args.pruning, args.sparsity, args.pruning_interval)
        return model

    def callback(self, max_steps: int) -> Pruner | None:
        """See `Task`; the schedule of the pruner."""
        if self.pruner is not None:
            args = self.args
            self.pruner.schedule(round(args.pruning_begin * max_steps), round(args.pruning_end * max_steps))
        return self.pruner

    def end_training(self) -> None:
        """See `Task`; the masks become zeros of the weights."""
        if self.pruner is not None:
            self.done.append(
                {"name": self.args.pruning, "sparsity": self.pruner.measured(), "modules": len(self.pruner.layers)}
            )
            self.pruner.bake()
        super().end_training()

    def report(self) -> dict[str, Any]:
        """See `Task`; costs, and what was done."""
        found = {**super().report(), "compression": {"source": self.args.model_name_or_path, "methods": self.done}}
        if self.args.costs and not isinstance(self, DistillationTask):
            found["costs"] = self.compared()
        return found

    def compared(self) -> list[Cost] | None:
        """Costs and scores of the original and of the compressed model, on the main process."""
        named = {"original": self.original} if self.original is not None else {}
        models = {**named, describe(self.done): self.model}
        metric, split = self.main_metric, self.validation_split
        scores = {}
        for name, model in models.items():
            scores[name] = self.evaluate(model.to(self.accelerator.device), split, (metric,)).values[metric]
        if not self.accelerator.is_main_process:
            return None
        accepted = inspect.signature(self.model.forward).parameters
        sample = {key: value for key, value in self.sample_inputs().items() if key in accepted}
        costs = [
            Cost(**cost, score=scores[cost["model"]], metric=f"{metric.replace('_', ' ')}, {split}")
            for cost in measure_costs(models, sample)
        ]
        better = not any(name in metric for name in LOWER_IS_BETTER)
        return beside_teacher(*costs) if better and named else costs


@dataclass
class CalibrationBatches:
    """Batches of ``calibration_samples`` training samples, divided between the processes."""

    task: CompressionMixin

    def __iter__(self) -> Iterator[Any]:
        args, plain = self.task.args, self.task.plain
        left = max(1, args.calibration_samples // self.task.accelerator.num_processes)
        for micro_batches in plain.dataloader(args.train_split, training=True).epoch(0):
            for batch in micro_batches:
                if left <= 0:
                    return
                left -= int(plain.count(batch)[plain.term])
                yield send_to_device(batch, self.task.accelerator.device)


@cache
def compress(task_class: type[Task]) -> type[Task]:
    """Return the task that compresses the model of a task while it trains it."""
    name = task_class.__name__.removesuffix("Task")
    arguments = make_dataclass(
        f"{name}CompressionArguments",
        [],
        bases=(CompressionArguments, task_class.Arguments),
        kw_only=True,
        namespace={"__doc__": f"{name} of a model that is compressed."},
    )
    return type(
        f"{name}CompressionTask",
        (CompressionMixin, task_class),
        {"__doc__": f"Compression of a model of `{task_class.__name__}`.", "Arguments": arguments}
        | {"__module__": task_class.__module__},
    )
