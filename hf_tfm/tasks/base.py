"""The contract of a task: everything that training, evaluation and distillation ask of one.

arguments -> splits -> processor -> model -> batches -> {term: items}, {term: sum of losses} -> scores

A task is one module: its arguments, data, model, losses and scores. `training.trainer.Trainer` trains it, and
`tasks.evaluation.evaluate` scores a saved model with it, and `tasks.distillation.distill` distils it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import SimpleNamespace
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput

from ..arguments import EvaluationArguments, TrainingArguments
from ..data.batching import Sample
from ..data.source import describe_rows, describe_source

Batch = dict[str, Any]
Collator = Callable[..., Batch]
AnyTask = TypeVar("AnyTask", bound="Task")


class Loader(Protocol):
    """The steps of an epoch.

    ``epoch(epoch, start)`` yields this rank's micro-batches of every optimizer step from step ``start`` on, equally
    many on every rank; ``steps_per_epoch(epoch)`` is the number of steps, or None for a stream. The ``start`` of a
    stream may also be a position of `data.stream.StreamLoader`.
    """

    def epoch(self, epoch: int, start: Any = 0) -> Iterator[list[Any]]: ...

    def steps_per_epoch(self, epoch: int = 0) -> int | None: ...


@dataclass
class Scores:
    """Scores of a model on a split.

    Args:
        values: {name: value}; "loss" and its terms are among them if the task computed them.
        signatures: {name: how the metric was computed}, in sacrebleu's format.
        samples: number of scored samples; makes ``hf-tfm evaluate`` report it and the throughput.
        details: further results for the report of ``hf-tfm evaluate``: JSON values.
        listing: further results for the file of ``--output`` alone, for example ``predictions``, one per sample.
        parts: scores of parts of the split, by name of the part.
    """

    values: dict[str, float]
    signatures: dict[str, str | None] = field(default_factory=dict)
    samples: int | None = None
    details: dict[str, Any] = field(default_factory=dict)
    listing: dict[str, Any] = field(default_factory=dict)
    parts: dict[str, "Scores"] = field(default_factory=dict)

    def rows(self, split: str, names: Collection[str]) -> list[dict[str, Any]]:
        """Rows of name, value, signature and split, for results.json; the split of a part is "SPLIT, PART"."""
        rows = [
            {"name": name, "value": self.values[name], "signature": self.signatures.get(name), "split": split}
            for name in names
            if name in self.values
        ]
        return rows + [row for part, scores in self.parts.items() for row in scores.rows(f"{split}, {part}", names)]


class Task(ABC):
    """A task, for one run or one evaluation.

    Subclasses set the class attributes and the abstract methods; the others have defaults.

    Args:
        args: of the class `Arguments` (a run) or `EvaluationArguments` (an evaluation).
        accelerator: of this process.

    Attributes:
        args: may be replaced by `load_splits`, which resolves what the data decides.
        splits: {name: rows}, of `load_splits`.
        processor: tokenizer or image processor.
    """

    Arguments: ClassVar[type[TrainingArguments]]
    EvaluationArguments: ClassVar[type[EvaluationArguments]]
    DistillationArguments: ClassVar[type | None] = None  # default: `tasks.distillation.distill` combines the groups
    kind: ClassVar[str]  # the models that the task evaluates, a plural noun: "image classifiers"
    reports_cost: ClassVar[bool] = False  # an evaluation reports parameters and FLOPs of the model
    sample: ClassVar[str] = "samples"  # plural name of the samples in the report of an evaluation
    term: ClassVar[str]  # the term of `count` that counts these
    processor_class: ClassVar[Any]  # Auto class that loads the processor
    # A task that evaluates the same models on other data, and which the options or the columns of the data decide on.
    refines: ClassVar["type[Task] | None"] = None
    described_columns: ClassVar[tuple[str, ...]] = ()  # arguments with column names that the results file records
    processor_folder: ClassVar[str] = "processor"  # subfolder of the run's folder that holds it during training
    # Distillation: arguments that determine the model inputs, recorded in a cache; and whether the loss of a student
    # on validation data is that of all terms, because no term may reach the head of its own loss.
    cache_options: ClassVar[tuple[str, ...]] = ()
    head_is_optional: ClassVar[bool] = False
    # Terms of `losses` that are logged but not trained on, such as a reward: their sums have no gradient.
    statistics: ClassVar[tuple[str, ...]] = ()

    def __init__(self, args: Any, accelerator: Accelerator):
        self.args, self.accelerator = args, accelerator
        self.splits: dict[str, Any] = {}
        self.processor: Any = None
        self._model: PreTrainedModel | None = None
        self.loaders: dict[str, Loader] = {}

    @property
    def model(self) -> PreTrainedModel:
        """The model that is trained or evaluated.

        Raises:
            RuntimeError: it is not built or loaded yet.
        """
        if self._model is None:
            raise RuntimeError(f"{type(self).__name__} has no model yet: set it, or call load_pretrained")
        return self._model

    @model.setter
    def model(self, model: PreTrainedModel) -> None:
        self._model = model

    @classmethod
    def for_model(cls: type[AnyTask], model: PreTrainedModel, processor: Any = None, **options: Any) -> AnyTask:
        """A task around an existing model, without data: for its `collator`, `count` and `losses` in a custom loop.

        Args:
            options: fields of `Arguments` that differ from their defaults.
        """
        made = {
            one.name: one.default if one.default_factory is MISSING else one.default_factory()
            for one in fields(cls.Arguments)
        }
        task = cls(SimpleNamespace(**{**made, **options}), None)
        task.model, task.processor = model, processor
        return task

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """True for a saved model that the task evaluates."""
        return False

    @classmethod
    def reads(cls, columns: Collection[str]) -> bool:
        """True for data with these columns, of a task that `refines` another one."""
        return False

    @property
    def hub_task(self) -> str:
        """The Hub's name of the task, for the model card."""
        raise NotImplementedError(f"{type(self).__name__} has no hub_task")

    @property
    def item(self) -> str:
        """The unit of throughput in logs, say "target tokens"."""
        raise NotImplementedError(f"{type(self).__name__} has no item")

    @property
    def auto_class(self) -> Any:
        """Auto class, or model class, that loads a saved model with the task's head."""
        raise NotImplementedError(f"{type(self).__name__} has no auto_class")

    @property
    def evaluating(self) -> bool:
        """True for the evaluation of a saved model, False for a run."""
        return isinstance(self.args, EvaluationArguments)

    # --- data, processor and model

    @abstractmethod
    def load_splits(self) -> dict[str, Any]:
        """Rows by split: of a run, all splits it uses; of an evaluation, ``args.split``."""

    @abstractmethod
    def fingerprint(self, rows: Any) -> str:
        """A hash of the content of some rows."""

    def describe_data(self) -> dict[str, Any]:
        """Fields of `hub.results.Data` for the results file and the card."""
        args = self.args
        return {
            "path": args.dataset_name,
            "name": args.dataset_config,
            **describe_source(args.dataset_name, args.dataset_revision),
            **{name: getattr(args, name) for name in self.described_columns},
            **describe_rows(self.splits, self.fingerprint),
        }

    @abstractmethod
    def build_processor(self) -> Any:
        """The tokenizer or image processor of a new run."""

    @abstractmethod
    def build_model(self) -> PreTrainedModel:
        """The model to train: new, with weights drawn from ``args.seed``, or from ``args.model_name_or_path``."""

    @abstractmethod
    def load_pretrained(self) -> None:
        """Load ``args.model`` and its processor for an evaluation."""

    @abstractmethod
    def collator(self, split: str = "", training: bool = False) -> Collator:
        """``collate(examples, samples, epoch, is_dummy) -> batch`` for a split; a dummy batch counts for nothing.

        It is sent to worker processes: keep it small.
        """

    @abstractmethod
    def dataloader(self, split: str, training: bool = False, collate: Collator | None = None) -> Loader:
        """Batches of a split.

        Args:
            training: shuffled and augmented.
            collate: takes the place of `collator`.
        """

    def evaluation_loader(self, split: str) -> Any:
        """The `dataloader` of a split that is scored, made once."""
        if split not in self.loaders:
            self.loaders[split] = self.dataloader(split)
        return self.loaders[split]

    # --- one step

    @abstractmethod
    def count(self, batch: Batch) -> Mapping[str, float]:
        """{term: number of items}, from the targets alone; `term` and every term of `losses` are among them."""

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """{term: weighted sum of losses over its items}."""
        output = model(**self.inputs(batch), **self.targets(batch))
        return self.output_losses(output, output.get("logits"), batch)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments of the forward pass, without targets: what both teacher and student read."""
        raise NotImplementedError(f"{type(self).__name__} has no inputs, so it cannot be distilled")

    def targets(self, batch: Batch) -> dict[str, Any]:
        """Keyword arguments with the targets, for a model that needs them to compute its loss."""
        return {}

    @staticmethod
    def target_positions(batch: Batch) -> Tensor | None:
        """(n,) flat positions of the rows of logits (B T) that have a target; None if every row has one."""
        return None

    def output_losses(self, output: ModelOutput, logits: Any, batch: Batch) -> dict[str, Tensor]:
        """`losses` of the output of a forward pass.

        Args:
            output: of ``model(**inputs(batch), **targets(batch))``.
            logits: its rows at `target_positions`; None if the model gives no logits.
        """
        raise NotImplementedError(f"{type(self).__name__} has no output_losses, so it cannot be distilled")

    # --- state of training that batches depend on, beyond weights and the position in the data

    @property
    def out_of_budget(self) -> bool:
        """True if training ends with the current step because a budget other than that of steps or time is used up."""
        return False

    def state(self) -> dict[str, Tensor]:
        """State that a checkpoint stores, the same on all ranks; for example completions that are still to be trained
        on."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue from the `state` in a checkpoint.

        Raises:
            ValueError: it is damaged.
        """

    # --- scores

    @property
    def validation_split(self) -> str:
        """The split whose scores decide which weights are best; the split of an evaluation."""
        return self.args.split if self.evaluating else self.args.held_out

    @property
    def scored_splits(self) -> list[str]:
        """Splits that are scored after training."""
        return list(dict.fromkeys([self.args.held_out, *self.args.test_splits]))

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names of the scores that are logged at every evaluation during training."""
        return ("loss",)

    @property
    @abstractmethod
    def reported_metrics(self) -> tuple[str, ...]:
        """Names of the scores in results.json and in the output of ``hf-tfm evaluate``."""

    @abstractmethod
    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Score a model on a split; every rank computes its share and has the result.

        Args:
            metrics: names of scores to compute, default `reported_metrics`; the result may contain others.
        """

    def validate(self, module: nn.Module, metrics: Collection[str]) -> dict[str, float]:
        """Scores of `trained_module`, or of the average of its weights, on `validation_split`."""
        return self.evaluate(module, self.validation_split, metrics).values

    def mean_losses(self, model: nn.Module, loader: Loader) -> dict[str, float]:
        """See `mean_losses`."""
        return mean_losses(self.accelerator, self, model, loader, self.evaluating and self.args.progress)

    # --- hooks of distillation; see `tasks.distillation`

    def build_student_processor(self) -> Any:
        """The processor of a student, whose output the teacher reads too; default, the teacher's.

        Raises:
            ValueError: an argument, or ``model_name_or_path``, contradicts the teacher's.
        """
        return self.processor_class.from_pretrained(self.args.teacher, trust_remote_code=self.args.trust_remote_code)

    def build_student(self, teacher: PreTrainedConfig) -> PreTrainedModel:
        """The student, see `build_model`.

        Args:
            teacher: configuration of the teacher.

        Raises:
            ValueError: they do not fit each other.
        """
        return self.build_model()

    def training_fingerprint(self) -> str:
        """A hash of the content of the training data."""
        return self.fingerprint(self.splits[self.args.train_split])

    def sample_refs(self, loader: Any) -> Callable[[int], list[Sample]] | None:
        """Function from an epoch to its samples, if the inputs depend on more than their rows; else None.

        Args:
            loader: of the training data.
        """
        return None

    def sample_inputs(self) -> dict[str, Tensor]:
        """Inputs of one typical sample, (1, ...) each, for the cost of a forward pass."""
        raise NotImplementedError(f"{type(self).__name__} has no sample_inputs: turn costs off")

    @property
    def main_metric(self) -> str:
        """The score by which teacher and student are compared in the table of costs."""
        return self.reported_metrics[0]

    # --- hooks of a run and of an evaluation

    @classmethod
    def run_all(cls, args: Any, fit: Callable[..., Any]) -> int:
        """The runs that a command line asks for, usually one; the exit status.

        Args:
            args: of the class `Arguments`.
            fit: (arguments, extra command-line arguments) -> the record of a run; see `training.trainer.Runs`.
        """
        fit(args)
        return 0

    @classmethod
    def evaluates_several(cls, options: dict[str, Any]) -> bool:
        """True if options of ``hf-tfm evaluate`` ask for several models, which `evaluate_all` then finds."""
        return False

    @classmethod
    def evaluate_all(cls, args: Any, evaluate: Callable[..., dict[str, Any]]) -> dict[str, Any]:
        """The evaluations that a command line asks for, usually one; the result.

        Args:
            args: of the class `EvaluationArguments`.
            evaluate: arguments -> the result of an evaluation; see `tasks.evaluation.evaluate_task`.
        """
        return evaluate(args)

    def end_evaluation(self, scores: Scores) -> None:
        """Called after the file of ``--output`` is written, for instance to draw a picture of the scores."""

    def prepare(self) -> bool:
        """Called once data, processor and model are there; False ends the run, whose work is then done."""
        return True

    def begin_training(self, loader: Loader) -> None:
        """Called before training starts or resumes; ``loader`` gives the training batches."""

    def trained_module(self) -> nn.Module:
        """The module whose parameters are optimized; the model, or a wrapper around it."""
        return self.model

    def callback(self, max_steps: int) -> Any:
        """A `training.session.StepCallback` for a run of ``max_steps``, or None."""
        return None

    def show(self, module: nn.Module, step: int) -> None:
        """Called on all ranks at every evaluation, for instance to draw a picture.

        Args:
            module: `trained_module` or the average of its weights.
        """

    def end_training(self) -> None:
        """Called when `model` holds its final weights, before it is saved."""

    def report(self) -> dict[str, Any]:
        """Further fields of `hub.results.RunRecord`; called after the model is saved."""
        return {}


def mean(total: Tensor, count: Tensor) -> Tensor:
    """Return ``total / count``, or ``total`` if the count is 0."""
    return total / count.where(count != 0, 1)


def widest_float(device: torch.device) -> torch.dtype:
    """Return the dtype for sums over many items: float64 if the device supports it."""
    return torch.float32 if device.type == "mps" else torch.float64


@torch.no_grad()
def mean_losses(
    accelerator: Accelerator, task: Any, model: nn.Module, loader: Loader, progress: bool = False
) -> dict[str, float]:
    """Mean of each loss term over a data set, exact over uneven ranks; "loss" is their sum.

    Args:
        task: has `Task.count` and `Task.losses`.
        progress: show a progress bar.
    """
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    wide = widest_float(accelerator.device)
    training = model.training
    model.eval()
    total = loader.steps_per_epoch() if progress else None
    for micro_batches in tqdm(loader.epoch(0), total=total, unit="batch", disable=not progress, leave=False):
        for batch in micro_batches:
            for term, count in task.count(batch).items():
                counts[term] = counts.get(term, 0) + count
            for term, value in task.losses(model, send_to_device(batch, accelerator.device)).items():
                sums[term] = sums.get(term, 0) + value.to(wide)
    model.train(training)
    totals = accelerator.reduce(
        {term: torch.stack([sums[term], sums[term].new_tensor(counts[term])]) for term in sums}
    )
    means = {term: mean(total, count).item() for term, (total, count) in totals.items()}
    return {"loss": sum(means.values()), **(means if len(means) > 1 else {})}
