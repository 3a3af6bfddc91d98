"""Prompts with completions: what supervised fine-tuning, reward models and preference optimization share.

folder or Hub id -> tokenizer and model of any library; batch -> log-probabilities of completions; batches -> means

Shapes: B sequences; T tokens of prompt and completion; C tokens of the longest completion; P pairs.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import InitVar, dataclass
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, set_seed
from transformers import PreTrainedTokenizerBase as Tokenizer

from ..arguments import Arguments, DatasetArguments, EvaluationArguments, SplitArguments, TrainingArguments
from ..data.batching import StepLoader, pad_tokens
from ..data.equal_batches import BatchSampler
from ..data.instructions import (
    CHAT_TEMPLATE,
    PromptFormat,
    is_conversational,
    is_ranking,
    pairs_of,
    ranking_lengths,
    ranking_rows,
    tokenize_rankings,
)
from ..data.labelled_texts import LengthBatchSampler
from ..data.text import fingerprint
from ..data.vocabulary import require_tokens
from ..hub.loading import load_config, load_tokenizer
from ..hub.pretrained import Suitable, load_to_train
from ..limits import LARGEST_BATCH, LONGEST
from ..models.cross_entropy import IGNORE_INDEX
from .base import Batch, Loader, Task, mean, widest_float
from .loaders import placement
from .model_fields import takes
from .splits import load_rows

log = logging.getLogger(__name__)

TOKEN_FIELDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")  # of a configuration: the tokenizer's
LANGUAGE_HEAD = r"^(lm_head|output|embed_out|cls)\."  # names of weights that a model with another head does not have


@dataclass(kw_only=True)
class PromptArguments(Arguments):
    """Prompts and completions.

    Args:
        prompt_format: how prompts that are texts are rendered: plain, as they are, the parts of an instruction
            separated by blank lines; alpaca, in the words of Alpaca (Taori et al. 2023); or chat, as a message of the
            user. Conversations are rendered by the chat template of the tokenizer, or a simple one if it has none.
        prompt_column: column of prompts; default, "prompt" or "instruction".
    """

    prompt_format: PromptFormat = "plain"
    prompt_column: str | None = None


@dataclass(kw_only=True)
class PromptTrainingArguments(PromptArguments, DatasetArguments, SplitArguments, TrainingArguments):
    """Training on prompts and completions.

    Args:
        max_length: maximum number of tokens of a prompt with its completion; longer ones are left out.
        batch_size: prompts, with all their completions, of one optimizer step over all processes, so that a run does
            not depend on the hardware.
        micro_batch_size: prompts that one process computes at once; saves memory, does not change the result.
        bucketing: batches of similar length, which saves padding; false mixes all lengths.
    """

    streaming: ClassVar[bool] = False

    max_length: int = 1024
    batch_size: int = 32
    micro_batch_size: int | None = None
    bucketing: bool = True
    lr_scheduler_type: Literal["inverse_sqrt", "cosine", "linear", "constant", "step"] = "linear"
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_1="max_length batch_size micro_batch_size",
            at_most={"max_length": LONGEST, "batch_size": LARGEST_BATCH},
        )


@dataclass(kw_only=True)
class PromptEvaluationArguments(PromptArguments, EvaluationArguments):
    """Scoring a model on prompts with completions.

    Args:
        max_length: maximum number of tokens of a prompt with its completion; longer ones are left out. Default, the
            maximum of the model and its tokenizer.
        batch_size: prompts in a batch.
    """

    max_length: int | None = None
    batch_size: int = 32

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_1="max_length batch_size", at_most={"max_length": LONGEST, "batch_size": 2**16})


class PromptTask(Task):
    """Base class of the tasks on prompts with completions.

    Subclasses set `read`, `tokenize`, `lengths`, and what a task does with a batch.
    """

    processor_class, processor_folder = AutoTokenizer, "tokenizer"
    described_columns = ("prompt_column",)
    sample = "prompts"

    def read(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Return the columns of the task, of rows of a data set."""
        raise NotImplementedError

    def tokenize(self, rows: datasets.Dataset) -> datasets.Dataset:
        """Return the examples of rows of `read`."""
        raise NotImplementedError

    def lengths(self, rows: datasets.Dataset) -> np.ndarray:
        """Return the number of tokens of each example, (N,)."""
        raise NotImplementedError

    def load_splits(self) -> dict[str, Any]:
        """See `Task`."""
        return load_rows(self.args, self.read)

    def fingerprint(self, rows: datasets.Dataset) -> str:
        """See `Task`."""
        return fingerprint(rows)

    @property
    def chats(self) -> bool:
        """True if prompts are rendered as conversations."""
        return self.args.prompt_format == "chat" or any(is_conversational(rows) for rows in self.splits.values())

    def build_processor(self) -> Tokenizer:
        """The tokenizer of ``model_name_or_path``; see `complete_tokenizer`."""
        args = self.args
        tokenizer = load_tokenizer(args.model_name_or_path, "model_name_or_path", None, args.trust_remote_code)
        return complete_tokenizer(tokenizer, self.chats)

    def dataloader(self, split: str, training: bool = False, collate: Any = None) -> StepLoader:
        """See `Task`; the batches of scores are sorted by length."""
        args, rows = self.args, self.tokenize(self.splits[split])
        collate = collate or self.collator(split, training)
        if not training:
            sampler: Any = LengthBatchSampler(self.lengths(rows), args.batch_size, shuffle=False)
        elif args.bucketing:
            sampler = LengthBatchSampler(self.lengths(rows), args.batch_size, args.seed)
        else:
            sampler = BatchSampler(len(rows), args.batch_size, args.seed)
        micro = None if self.evaluating else args.micro_batch_size
        workers = training and not self.evaluating
        return StepLoader(rows, sampler, collate, micro, **placement(args, self.accelerator, workers))

    def begin_training(self, loader: Loader) -> None:
        """Tokenize the splits that are scored, so that errors in them are raised before training."""
        for split in self.scored_splits:
            self.evaluation_loader(split)

    def inputs(self, batch: Batch) -> Batch:
        """See `Task`."""
        return {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}

    def means(
        self,
        model: nn.Module,
        split: str,
        compute: Callable[[nn.Module, Batch], Mapping[str, tuple[Tensor, Tensor | float]]],
    ) -> dict[str, float]:
        """Mean scores of a split; see `mean_scores`."""
        progress = self.evaluating and self.args.progress
        return mean_scores(self.accelerator, model, self.evaluation_loader(split), compute, progress)


@dataclass(kw_only=True)
class RankingArguments(Arguments):
    """Pairs or rankings of completions.

    Args:
        chosen_column: column of the better completions; default, "chosen". Columns "completions" and "scores" hold
            rankings, of any number of completions of a prompt.
        rejected_column: column of the worse completions; default, "rejected".
    """

    chosen_column: str | None = None
    rejected_column: str | None = None


@dataclass
class RankingCollator:
    """Examples of `tokenize_rankings` -> a batch with one row for each completion, those of a prompt in order.

    ``input_ids`` (B, T), prompt and completion; ``attention_mask`` (B, T) if there is padding; ``starts`` (B,), length
    of each prompt; ``mask`` (B, C), 1.0 for tokens of completions; ``pairs`` (P, 2), rows of the better and the worse
    completion of each pair; ``pair_weights`` (P,), 1 / number of pairs of their prompt; ``indices``, of the prompts;
    ``prompts``, their number. A dummy batch has neither pairs nor prompts.

    Raises:
        ValueError: the tokenizer has no padding token.
    """

    tokenizer: InitVar[Tokenizer]

    def __post_init__(self, tokenizer: Tokenizer):
        require_tokens(tokenizer, "pad_token")
        self.pad = tokenizer.pad_token_id

    def __call__(self, examples: list[dict], indices: list[int], epoch: int, is_dummy: bool = False) -> Batch:
        rows: list[dict] = []
        pairs: list[tuple[int, int]] = []
        weights: list[float] = []
        for example in examples:
            first, prompt = len(rows), example["prompt_ids"]
            for completion in example["completion_ids"]:
                rows.append({"input_ids": [*prompt, *completion], "start": len(prompt)})
            own = [] if is_dummy else pairs_of(example["scores"])
            pairs += [(first + better, first + worse) for better, worse in own]
            weights += [1.0 / len(own) for _ in own]
        batch: Batch = pad_tokens(rows, self.pad)
        starts = torch.tensor([row["start"] for row in rows])
        sizes = torch.tensor([len(row["input_ids"]) for row in rows]) - starts
        return batch | {
            "starts": starts,
            "mask": (torch.arange(int(sizes.max())) < sizes[:, None]).float(),
            "pairs": torch.tensor(pairs, dtype=torch.long).view(-1, 2),
            "pair_weights": torch.tensor(weights, dtype=torch.float32),
            "indices": torch.tensor([] if is_dummy else indices, dtype=torch.long),
            "prompts": 0 if is_dummy else len(examples),
        }


class RankingTask(PromptTask):
    """Base class of the tasks on pairs or rankings of completions."""

    described_columns = ("prompt_column", "chosen_column", "rejected_column")

    @classmethod
    def reads(cls, columns: Collection[str]) -> bool:
        """See `Task`."""
        return is_ranking(columns)

    def read(self, rows: datasets.Dataset) -> datasets.Dataset:
        """See `PromptTask`."""
        args = self.args
        return ranking_rows(rows, args.prompt_column, args.chosen_column, args.rejected_column)

    def tokenize(self, rows: datasets.Dataset) -> datasets.Dataset:
        """See `PromptTask`."""
        return tokenize_rankings(rows, self.processor, self.args.prompt_format, self.args.max_length)

    def lengths(self, rows: datasets.Dataset) -> np.ndarray:
        """See `PromptTask`."""
        return ranking_lengths(rows)

    def collator(self, split: str = "", training: bool = False) -> RankingCollator:
        """See `Task`."""
        return RankingCollator(self.processor)


def complete_tokenizer(tokenizer: Tokenizer, chats: bool) -> Tokenizer:
    """Give a tokenizer a padding token, its end token if it has none, and, for conversations, a chat template.

    Raises:
        ValueError: it has no end token.
    """
    require_tokens(tokenizer, "eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding counts for nothing
    if chats and tokenizer.chat_template is None:
        tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def load_prompt_model(
    kind: Any,
    suitable: Suitable,
    args: Any,
    tokenizer: Tokenizer,
    head_of: Callable[[PreTrainedModel, str], str],
    argument: str = "model_name_or_path",
    resized: str | None = None,
    **fields: Any,
) -> PreTrainedModel:
    """Load a model of any library to train it on prompts and completions.

    Args:
        kind: Auto class of models that no family of this package reads.
        suitable: valid models.
        args: of a run: ``model_name_or_path``, ``max_length``, ``seed``, ``trust_remote_code`` and, in ``model``,
            changed configuration fields.
        tokenizer: of the model.
        head_of: see `load_to_train`.
        argument: of ``args`` that names the model.
        resized: see `load_to_train`.
        fields: configuration fields that the task determines.

    Raises:
        ValueError: the model lacks weights, a field, or does not fit the tokenizer or ``max_length``.
    """
    set_seed(args.seed)
    source, changed = getattr(args, argument), getattr(args, "model", {})
    config = load_config(source, argument, trust_remote_code=args.trust_remote_code)
    if unknown := [name for name in changed if not hasattr(config, name) or name in TOKEN_FIELDS]:
        raise ValueError(f"model.{unknown[0]} is not a field of {type(config).__name__} that can be chosen")
    ours = config.model_type in suitable.head.model_types()
    model, new = load_to_train(
        suitable.head if ours else kind,
        source,
        head_of,
        changed,
        argument,
        resized,
        LANGUAGE_HEAD,
        args.trust_remote_code,
        **fields,
    )
    if new:
        log.warning("weights that %s does not have are initialised randomly: %s", argument, ", ".join(sorted(new)))
    check_length(model, args.max_length)
    vocabulary = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f'{argument} "{source}" has {vocabulary} tokens, fewer than the {len(tokenizer)} of its tokenizer'
        )
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def check_length(model: PreTrainedModel, max_length: int) -> None:
    """Refuse sequences that are too long for a model.

    Raises:
        ValueError: ``max_length`` exceeds its positions.
    """
    longest = getattr(model.config, "max_position_embeddings", None) or max_length
    if max_length > longest:
        raise ValueError(
            f"max_length must be at most the model's max_position_embeddings = {longest}, got {max_length}"
        )


def disable_dropout(model: nn.Module) -> None:
    """Set all dropout rates of a model to 0, so that differences of outputs are differences of weights.

    Rates are those of `nn.Dropout` modules, and numbers that layers pass to a function; the configuration keeps them.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def completion_places(batch: Batch) -> Tensor:
    """Return the positions (B, C) of the states from which the tokens of completions are predicted.

    Args:
        batch: see `completion_log_probs`.
    """
    steps = torch.arange(batch["mask"].shape[1], device=batch["mask"].device)
    return (batch["starts"][:, None] - 1 + steps).clamp_max(batch["input_ids"].shape[1] - 2)


def completion_log_probs(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Return the log-probabilities of the tokens of completions, (B, C); 0 at padding.

    Logits are computed from the end of the shortest prompt on.

    Args:
        batch: ``input_ids`` (B, T), ``attention_mask`` (B, T) if there is padding, ``starts`` (B,), the lengths of the
            prompts, and ``mask`` (B, C), 1 for tokens of completions.
        temperature: divides the logits.
    """
    ids, mask = batch["input_ids"], batch["mask"]
    places = completion_places(batch)
    first = int(places[:, 0].min())
    kept = ids.shape[1] - first
    options = {"logits_to_keep": kept} if takes(model, "logits_to_keep") else {}
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    logits = model(**inputs, use_cache=False, **options).logits[:, -kept:-1].float()
    logits = logits if temperature == 1.0 else logits / temperature
    losses = cross_entropy(logits.flatten(0, 1), ids[:, first + 1 :].flatten(), reduction="none")
    return -losses.view(len(ids), -1).gather(1, places - first) * mask


def next_token_targets(labels: Tensor) -> Tensor:
    """Return the label that each position predicts, (B, T), from labels (B, T)."""
    return pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


@torch.no_grad()
def mean_scores(
    accelerator: Accelerator,
    model: nn.Module,
    loader: Loader,
    compute: Callable[[nn.Module, Batch], Mapping[str, tuple[Tensor, Tensor | float]]],
    progress: bool = False,
) -> dict[str, float]:
    """Return means over a data set, exact over uneven ranks.

    Args:
        compute: (model, batch) -> {name: sum over items, and their number}, with the same names for every batch.
        progress: show a progress bar.
    """
    totals: dict[str, Tensor] = {}
    wide = widest_float(accelerator.device)
    training = model.training
    model.eval()
    steps = loader.steps_per_epoch() if progress else None
    for micro_batches in tqdm(loader.epoch(0), total=steps, unit="batch", disable=not progress, leave=False):
        for batch in micro_batches:
            for name, (total, count) in compute(model, send_to_device(batch, accelerator.device)).items():
                pair = torch.stack([total.to(wide), torch.as_tensor(count, dtype=wide, device=total.device)])
                totals[name] = totals[name] + pair if name in totals else pair
    model.train(training)
    return {name: mean(total, count).item() for name, (total, count) in accelerator.reduce(totals).items()}
