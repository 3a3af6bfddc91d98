"""Reinforcement learning of a language model from rewards: PPO, PPO-ptx, RLOO and GRPO (Ouyang et al. 2022).

prompts -> completions sampled from the policy -> rewards and KL penalties -> advantages -> clipped policy losses

Shapes: B completions, G of each prompt; C tokens of the longest completion.
"""

import copy
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal

import datasets
import numpy as np
import torch
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from ..arguments import DatasetArguments, EvaluationArguments, SplitArguments, TrainingArguments
from ..data.batching import MicroBatches, SampleRef, StepLoader, part_of_rank, rng
from ..data.embedded import SPELLED_NUMBERS
from ..data.equal_batches import BatchSampler
from ..data.instructions import prompt_rows, tokenize_prompts
from ..data.language import Corpus, token_sequences
from ..families import CAUSAL_LM, TEXT_CLASSIFIER
from ..hub.loading import load_model, load_tokenizer
from ..hub.pretrained import Suitable, load_to_train
from ..limits import LARGEST_BATCH, SEEDS
from ..reinforcement.objectives import (
    generalized_advantages,
    group_advantages,
    kl_estimate,
    leave_one_out_advantages,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)
from ..reinforcement.rewards import call_reward, reward_function
from ..reinforcement.rollout import Episode, EpisodeCollator, RolloutLoader
from ..reinforcement.sampling import sample
from ..sharding import unsharded
from .actor_critic import ActorCritic, TokenValues
from .base import Batch, Collator, Loader, Scores, mean_losses
from .completions import (
    PromptArguments,
    PromptTask,
    complete_tokenizer,
    completion_log_probs,
    disable_dropout,
)
from .language_modeling import LanguageModelingTask, is_causal, longest_input
from .loaders import placement
from .model_fields import head_of

log = logging.getLogger(__name__)

PROMPT, GENERATED = "prompt", "generated_tokens"
EVALUATION = 2**32 - 1  # in place of an epoch, in the seeds of completions that are only scored
BETA = {"ppo": 0.02, "rloo": 0.05, "grpo": 0.04}  # InstructGPT, trl, Shao et al. 2024
GENERATIONS = {"ppo": 1, "rloo": 4, "grpo": 8}
# Largest log ratio of the policy to itself before it is trained: only rounding, as batches are padded differently.
SAME, SAME_BF16 = 1e-3, 0.2


@dataclass(kw_only=True)
class CompletionArguments(PromptArguments):
    """Prompts, sampled completions, and their rewards.

    Args:
        max_new_tokens: maximum number of tokens of a completion.
        temperature: of the distribution that is sampled from; for an evaluation, 0 takes the most likely tokens.
        reward_model: folder or Hub id of a sequence classifier with one label, its head a linear layer "score", and
            with the tokenizer of the policy.
        reward_functions: functions that are added to the reward: built-in rules (spelling, exact_match), or
            "module:function" with the arguments (prompts, completions, **columns), which imports that module.
        reward_weights: weights in the sum, of the reward model first; default, 1 each.
        true_reward: a further reward function that is only reported; default, "spelling" for the built-in spelled
            numbers.
        reference_model: folder or Hub id of the model that the KL divergence is measured from.
        validation_texts: texts whose token loss is reported as lm_loss, each {dataset_name, split, text_column, ...}.
        text_length: tokens in a block of texts.
        documents: whether each row of texts is a document; if false, rows are pieces of a running text.
    """

    max_new_tokens: int = 64
    temperature: float = 1.0
    reward_model: str | None = None
    reward_functions: list[str] = field(default_factory=list)
    reward_weights: list[float] | None = None
    true_reward: str | None = None
    reference_model: str | None = None
    validation_texts: list[Corpus] = field(default_factory=list)
    text_length: int = 128
    documents: bool = True

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="temperature", at_least_1="max_new_tokens text_length", at_most={"max_new_tokens": 2**20}
        )
        self.check_distinct("reward_functions")
        for name in self.reward_functions:
            reward_function("reward_functions", name)
        if self.true_reward is not None:
            reward_function("true_reward", self.true_reward)
        rewards = (self.reward_model is not None) + len(self.reward_functions)
        if self.reward_weights is not None and len(self.reward_weights) != rewards:
            raise ValueError(
                f"reward_weights must be one for each of the {rewards} rewards, got {len(self.reward_weights)}"
            )


@dataclass(kw_only=True)
class RLHFArguments(CompletionArguments, DatasetArguments, SplitArguments, TrainingArguments):
    """Arguments of reinforcement learning.

    Args:
        model_name_or_path: folder or Hub id of the policy to start from, usually a fine-tuned one; any causal language
            model.
        algorithm: ppo (Ouyang et al. 2022), rloo (Ahmadian et al. 2024) or grpo (Shao et al. 2024).
        reference_model: folder or Hub id of the model that the KL divergence is measured from; default, the initial
            policy.
        batch_size: completions of one optimizer step over all processes.
        micro_batch_size: completions that one process computes at once; saves memory, does not change the result.
        generation_batch_size: completions of a rollout, sampled from the same weights; default, batch_size.
        generation_micro_batch_size: completions that one process samples at once; default, all its part of a rollout.
        num_generations: completions per prompt; default, 1 for ppo, 4 for rloo and 8 for grpo.
        num_iterations: passes over a rollout.
        max_generated_tokens: stop after the rollout in which this many tokens were sampled, even if max_steps is not
            reached.
        beta: weight of the KL divergence from the reference: a penalty of the reward for ppo and rloo, a loss for
            grpo; default, 0.02 for ppo, 0.05 for rloo and 0.04 for grpo.
        clip: largest change of a probability ratio that is rewarded.
        loss_type: how the policy loss is averaged: over tokens (token), over completions after a mean over the tokens
            of each (sequence), or over completions after a sum divided by max_new_tokens (constant); of rloo, whose
            ratio is that of a completion, always over completions. Default, token for ppo, sequence for grpo.
        discount: of future rewards, for ppo.
        gae_lambda: of generalized advantage estimation, for ppo.
        value_coefficient: weight of the value loss, for ppo.
        value_clip: largest change of a value that is rewarded, for ppo.
        scale_rewards: divide the advantages of a prompt by their standard deviation, for grpo.
        whiten_rewards: scale the rewards of tokens to variance 1, for ppo.
        whiten_advantages: shift and scale advantages to mean 0 and variance 1; default, true for ppo.
        missing_eos_penalty: subtracted from the reward of a completion that does not end.
        pretraining_texts: texts whose loss is added (PPO-ptx), each {dataset_name, split, text_column, ...}.
        ptx_coefficient: weight of their loss.
        ptx_per_episode: their number of blocks per completion.
    """

    streaming: ClassVar[bool] = False
    accepted_models: ClassVar[dict[str, Suitable]] = {
        "model_name_or_path": Suitable("reinforcement learning", CAUSAL_LM, True, ("gpt2", "llama")),
        "reward_model": Suitable("a reward", TEXT_CLASSIFIER, True, ("gpt2", "llama")),
        "reference_model": Suitable("a reference", CAUSAL_LM, True, ("gpt2", "llama")),
    }

    model_name_or_path: str
    algorithm: Literal["ppo", "rloo", "grpo"] = "ppo"
    batch_size: int = 64
    micro_batch_size: int | None = None
    generation_batch_size: int | None = None
    generation_micro_batch_size: int | None = None
    num_generations: int | None = None
    num_iterations: int = 1
    max_generated_tokens: int | None = None
    beta: float | None = None
    clip: float = 0.2
    loss_type: Literal["token", "sequence", "constant"] | None = None
    discount: float = 1.0
    gae_lambda: float = 0.95
    value_coefficient: float = 0.1
    value_clip: float = 0.2
    scale_rewards: bool = True
    whiten_rewards: bool = False
    whiten_advantages: bool | None = None
    missing_eos_penalty: float | None = None
    pretraining_texts: list[Corpus] = field(default_factory=list)
    ptx_coefficient: float = 27.8
    ptx_per_episode: int = 8
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    learning_rate: float = 1e-5
    lr_scheduler_type: Literal["inverse_sqrt", "cosine", "linear", "constant", "step"] = "constant"
    adam_betas: tuple[float, float] = (0.9, 0.95)
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    final_weights: Literal["last", "best", "average", "ema"] = "last"
    metric_for_best_model: str = "reward"

    def __post_init__(self):
        super().__post_init__()
        self.beta = BETA[self.algorithm] if self.beta is None else self.beta
        self.num_generations = self.num_generations or GENERATIONS[self.algorithm]
        self.generation_batch_size = self.generation_batch_size or self.batch_size
        self.loss_type = self.loss_type or ("token" if self.algorithm == "ppo" else "sequence")
        if self.whiten_advantages is None:
            self.whiten_advantages = self.algorithm == "ppo"
        self.check_range(
            at_least_0="beta value_coefficient ptx_coefficient missing_eos_penalty",
            at_least_1="batch_size micro_batch_size generation_batch_size generation_micro_batch_size num_generations "
            "num_iterations max_generated_tokens ptx_per_episode",
            above_0="clip value_clip temperature",
            at_most={"batch_size": LARGEST_BATCH, "generation_batch_size": LARGEST_BATCH, "ptx_per_episode": 1024},
        )
        self.check_range(at_least_0="discount gae_lambda", at_most={"discount": 1, "gae_lambda": 1})
        if self.reward_model is None and not self.reward_functions:
            raise ValueError("give reward_model or reward_functions: there is no reward to learn from")
        if self.algorithm != "ppo" and self.num_generations < 2:
            raise ValueError(
                f"num_generations must be at least 2 for {self.algorithm}, which compares the completions of a "
                f"prompt, got {self.num_generations}"
            )
        for name, of in (("batch_size", self.batch_size), ("num_generations", self.num_generations)):
            if self.generation_batch_size % of:
                raise ValueError(
                    f"generation_batch_size must be a multiple of {name} = {of}, got {self.generation_batch_size}"
                )
        known = [name for name in metrics_of(self) if name in ("reward", "true_reward")]
        if self.metric_for_best_model not in known:
            raise ValueError(
                f'metric_for_best_model must be one of {", ".join(known)}, got "{self.metric_for_best_model}"'
            )


@dataclass(kw_only=True)
class RLHFEvaluationArguments(CompletionArguments, EvaluationArguments):
    """Scoring the completions of a language model.

    Args:
        best_of: number of completions per prompt, of which that with the highest reward is scored.
        seed: of the completions.
        batch_size: completions that are sampled at once.
    """

    best_of: int = 1
    seed: int = 0
    batch_size: int = 64

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="seed",
            at_least_1="best_of batch_size",
            at_most={"seed": SEEDS - 1, "best_of": 2**16, "batch_size": 2**16},
        )
        if self.best_of > 1 and self.reward_model is None and not self.reward_functions:
            raise ValueError(f"best_of = {self.best_of} needs reward_model or reward_functions to choose by")
        if self.best_of > 1 and self.temperature == 0:
            raise ValueError(f"best_of = {self.best_of} needs a temperature above 0: all completions would be equal")


def metrics_of(args: Any) -> tuple[str, ...]:
    """Return the names of the scores that an evaluation gives."""
    known = {
        "reward": args.reward_model is not None or args.reward_functions,
        "true_reward": true_reward_of(args),
        "kl": args.reference_model is not None or isinstance(args, RLHFArguments),
        "length": True,
        "ended": True,
        "lm_loss": args.validation_texts,
    }
    return tuple(name for name, given in known.items() if given)


def true_reward_of(args: Any) -> str | None:
    """Return the name of the reward function that is only reported, if there is one."""
    return args.true_reward or ("spelling" if args.dataset_name in SPELLED_NUMBERS else None)


class RLHFTask(PromptTask):
    """Clipped policy losses of completions that the policy has sampled, and for PPO the loss of its value function."""

    Arguments = RLHFArguments
    EvaluationArguments = RLHFEvaluationArguments
    kind, hub_task, refines = "policies", "text-generation", LanguageModelingTask
    item, term = "completion tokens", "token"
    processor_class, processor_folder = AutoTokenizer, "tokenizer"
    auto_class = AutoModelForCausalLM
    statistics = ("reward", "true_reward", "kl", "entropy", "clip_fraction", "length", "ended", "ptx_loss")

    def __init__(self, args: Any, accelerator: Any):
        super().__init__(args, accelerator)
        self.module: ActorCritic | None = None
        self.values: TokenValues | None = None
        self.reference: PreTrainedModel | None = None
        self.scorer: TokenValues | None = None
        self.rollouts: RolloutLoader | None = None
        self.generated = 0  # tokens sampled for training so far
        self.prompts: dict[str, list[np.ndarray]] = {}  # by split
        self.text_steps: dict[str, StepLoader] = {}

    @classmethod
    def accepts(cls, config: PreTrainedConfig) -> bool:
        """See `Task`; the options of an evaluation choose this task."""
        return is_causal(config)

    # --- data, processor and model

    def read(self, rows: datasets.Dataset) -> datasets.Dataset:
        """See `PromptTask`; all columns are passed to reward functions."""
        return prompt_rows(rows, self.args.prompt_column)

    def build_model(self) -> PreTrainedModel:
        """The policy, without dropout."""
        args = self.args
        set_seed(args.seed)
        if self.accelerator.distributed_type not in (
            DistributedType.NO,
            *(DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.FSDP),
        ):
            raise ValueError(
                "rlhf_train samples from the whole policy on every process: use data parallelism or FSDP instead of "
                f"{self.accelerator.distributed_type.value}"
            )
        model, _ = load_to_train(
            AutoModelForCausalLM, args.model_name_or_path, lambda *_: "", trust_remote_code=args.trust_remote_code
        )
        disable_dropout(model)
        return model

    def prepare(self) -> bool:
        """Load the models that are not trained, and the value function, which starts from the reward model."""
        args = self.args
        device = self.accelerator.device
        self.load_scorers()
        if self.reference is None:
            self.reference = copy.deepcopy(self.model).to(device).eval().requires_grad_(False)
        if args.algorithm == "ppo":
            self.values = self.build_values()
        self.check_prompts(args.train_split, *self.scored_splits)
        self.module = ActorCritic(self.model, self.values)
        return True

    def load_scorers(self) -> None:
        """Load the reward model and, if the arguments name one, the reference model.

        Raises:
            ValueError: one of them does not fit the policy.
        """
        args, options = self.args, {"trust_remote_code": self.args.trust_remote_code}
        if args.reward_model is not None:
            classifier = load_model(AutoModelForSequenceClassification, args.reward_model, "reward_model", **options)
            self.check_same_tokens("reward_model")
            with naming("reward_model", args.reward_model):
                self.scorer = TokenValues(classifier).to(self.accelerator.device).eval().requires_grad_(False)
        if args.reference_model is not None:
            reference = load_model(AutoModelForCausalLM, args.reference_model, "reference_model", **options)
            self.check_same_tokens("reference_model")
            self.reference = reference.to(self.accelerator.device).eval().requires_grad_(False)

    def check_same_tokens(self, argument: str) -> None:
        """Refuse a model whose tokenizer is not the policy's.

        Raises:
            ValueError: there is a difference.
        """
        source = getattr(self.args, argument)
        own = load_tokenizer(source, argument, trust_remote_code=self.args.trust_remote_code).get_vocab()
        if odd := sorted(self.processor.get_vocab().items() - own.items()):
            raise ValueError(
                f'{argument} "{source}" must have the tokenizer of the policy: token "{odd[0][0]}" is '
                f"{own.get(odd[0][0])} instead of {odd[0][1]}"
            )

    def build_values(self) -> TokenValues:
        """The value function: the reward model, or the policy with a new head whose values are 0."""
        if self.scorer is not None:
            values = copy.deepcopy(self.scorer).requires_grad_(True)
        else:
            classifier, _ = load_to_train(
                AutoModelForSequenceClassification,
                self.args.model_name_or_path,
                head_of,
                trust_remote_code=self.args.trust_remote_code,
                num_labels=1,
            )
            with naming("model_name_or_path", self.args.model_name_or_path):
                values = TokenValues(classifier)
            nn.init.zeros_(values.classifier.score.weight)
        disable_dropout(values)
        return values

    def load_pretrained(self) -> None:
        """See `Task`; any causal language model will do."""
        args = self.args
        self.processor = complete_tokenizer(load_tokenizer(args.model, **args.pretrained), self.chats)
        self.model = load_model(AutoModelForCausalLM, args.model, **args.pretrained)
        self.load_scorers()
        self.check_prompts(args.split)

    def check_prompts(self, *splits: str) -> None:
        """Tokenize the prompts of splits.

        Raises:
            ValueError: a prompt is empty, or leaves less room than ``max_new_tokens`` in the inputs of a model.
        """
        new = self.args.max_new_tokens
        models = [self.model, self.reference, self.scorer and self.scorer.classifier]
        limit = min(longest_input(model.config, 2**62) for model in models if model is not None)
        for split in dict.fromkeys(splits):
            self.prompts[split] = tokenize_prompts(self.splits[split], self.processor, self.args.prompt_format)
            lengths = np.array([len(row) for row in self.prompts[split]])
            if not lengths.min():
                raise ValueError(f"prompt {int(lengths.argmin())} of split {split} has no tokens")
            if lengths.max() + new > limit:
                raise ValueError(
                    f"max_new_tokens = {new} is too long after prompt {int(lengths.argmax())} of split {split} with "
                    f"{lengths.max()} tokens: the models take {limit} tokens in all"
                )

    @cached_property
    def texts(self) -> LanguageModelingTask:
        """The task of pretraining and validation texts."""
        return LanguageModelingTask.for_model(self.model, self.processor, objective="causal")

    def text_loader(self, corpora: Sequence[Corpus], batch_size: int, training: bool) -> StepLoader:
        """Blocks of tokens of some texts, for this rank."""
        args = self.args
        rows = datasets.concatenate_datasets([corpus.rows() for corpus in corpora])
        blocks = token_sequences(rows, self.processor, args.text_length, "packed", args.documents)
        sampler = BatchSampler(len(blocks), min(batch_size, len(blocks)), args.seed, shuffle=training)
        micro = args.micro_batch_size if training else None
        ranks = {} if self.evaluating else placement(args, self.accelerator, workers=False)
        return StepLoader(blocks, sampler, self.texts.collator(), micro, **ranks)

    def collator(self, split: str = "", training: bool = False) -> EpisodeCollator:
        """See `Task`; of episodes."""
        return EpisodeCollator(self.processor.pad_token_id)

    def dataloader(self, split: str, training: bool = False, collate: Collator | None = None) -> Loader:
        """See `Task`; training batches are sampled when they are requested.

        Raises:
            ValueError: a rollout needs more prompts than there are.
        """
        args = self.args
        if not training:
            raise ValueError("completions are scored by evaluate, not in batches of a loader")
        count, prompts = len(self.splits[split]), args.generation_batch_size // args.num_generations
        if prompts > count:
            raise ValueError(
                f"generation_batch_size / num_generations must be at most the {count} prompts of {split}, got "
                f"{args.generation_batch_size} / {args.num_generations}"
            )
        self.rollouts = RolloutLoader(
            count,
            prompts,
            self.rollout,
            args.generation_batch_size // args.batch_size,
            args.num_iterations,
            args.seed,
            self.collator(),
            args.micro_batch_size,
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.text_batches,
        )
        return self.rollouts

    def begin_training(self, loader: Loader) -> None:
        """Tokenize the texts, so that errors in them are raised before training."""
        args = self.args
        if args.pretraining_texts:
            size = args.batch_size * args.ptx_per_episode
            self.text_steps["train"] = self.text_loader(args.pretraining_texts, size, training=True)
        self.prepare_validation_texts()

    def prepare_validation_texts(self) -> None:
        """Tokenize the validation texts."""
        if self.args.validation_texts and "validation" not in self.text_steps:
            size = max(1, 4096 // self.args.text_length)
            self.text_steps["validation"] = self.text_loader(self.args.validation_texts, size, training=False)

    def text_batches(self, step: int) -> MicroBatches:
        """This rank's micro-batches of pretraining texts of an optimizer step."""
        if (loader := self.text_steps.get("train")) is None:
            return MicroBatches()
        epoch, number = divmod(step, loader.steps_per_epoch())
        return loader.micro_batches(loader.sampler.steps(epoch)[number], epoch)

    # --- rollouts

    def rollout(self, rows: Sequence[int], epoch: int) -> list[Episode]:
        """Sample and score completions of prompts of the training split; the same result on all ranks.

        Raises:
            ValueError: the untrained policy differs from itself as the reference.
        """
        args = self.args
        mine = part_of_rank(rows, self.accelerator.process_index, self.accelerator.num_processes)
        with unsharded(self.module), evaluating(self.module), self.accelerator.autocast():
            episodes = self.complete(self.model, args.train_split, mine, args.num_generations, epoch)
            self.score(args.train_split, mine, episodes)
            self.add_log_probs(episodes)
        episodes = gather_object(episodes) if self.accelerator.num_processes > 1 else episodes
        if not self.generated and args.reference_model is None and args.beta > 0:
            found = max(float(np.abs(one["log_probs"] - one["reference"]).max()) for one in episodes)
            self.require_same("KL divergence", found)
        self.generated += sum(len(episode["completion"]) for episode in episodes)
        self.add_advantages(episodes)
        return episodes

    def complete(self, model: nn.Module, split: str, rows: Sequence[int], copies: int, epoch: int) -> list[Episode]:
        """Sample completions of prompts; those of a prompt are next to each other.

        Args:
            copies: completions per prompt; epoch: part of their seed.
        """
        args = self.args
        if not rows:
            return []
        uniforms = np.stack(
            [
                rng(args.seed, epoch, SampleRef(row, one)).random(args.max_new_tokens, dtype=np.float32)
                for row in rows
                for one in range(copies)
            ]
        )
        size = args.batch_size if self.evaluating else args.generation_micro_batch_size
        prompts = [self.prompts[split][row] for row in rows]
        found = sample(model, prompts, uniforms, self.ends, self.processor.pad_token_id, args.temperature, size)
        return [
            {"prompt": prompts[i // copies], "completion": completion, "log_probs": log_probs}
            for i, (completion, log_probs) in enumerate(zip(*found, strict=True))
        ]

    @cached_property
    def ends(self) -> list[int]:
        """Tokens that end a completion."""
        own = getattr(self.model.generation_config, "eos_token_id", None)
        return sorted({self.processor.eos_token_id, *([] if own is None else [own] if isinstance(own, int) else own)})

    def score(self, split: str, rows: Sequence[int], episodes: list[Episode]) -> None:
        """Add the rewards of completions, and whether they ended."""
        args, count = self.args, len(episodes)
        if not episodes:
            return
        copies = count // len(rows)
        ended = np.isin([episode["completion"][-1] for episode in episodes], self.ends)
        rewards, weights = [], args.reward_weights or [1.0] * (len(args.reward_functions) + 1)
        if self.scorer is not None:
            rewards.append(self.model_rewards(episodes))
        true_reward = true_reward_of(args)
        if args.reward_functions or true_reward:
            ids = [episode["completion"] for episode in episodes]
            completions = self.processor.batch_decode(ids, skip_special_tokens=True)
            found = self.splits[split][list(rows)]
            columns = {name: [value for value in found[name] for _ in range(copies)] for name in found}
            prompts = columns.pop(PROMPT)
            for name in args.reward_functions:
                rewards.append(call_reward("reward_functions", name, prompts, completions, columns))
            if true_reward:
                truth = call_reward("true_reward", true_reward, prompts, completions, columns)
                add_scalars(episodes, "true_reward", truth)
        if rewards:
            total = np.array(rewards).T @ np.array(weights[: len(rewards)])
            if not self.evaluating and args.missing_eos_penalty is not None:
                total = total - args.missing_eos_penalty * ~ended
            add_scalars(episodes, "reward", total)
        add_scalars(episodes, "ended", ended)

    @torch.no_grad()
    def model_rewards(self, episodes: list[Episode]) -> list[float]:
        """Scores of the reward model at the last token of completions."""
        found = np.zeros(len(episodes))
        for chosen, batch in self.chunks(episodes):
            found[chosen] = self.scorer.of_last(batch).float().cpu()
        return found.tolist()

    @torch.no_grad()
    def add_log_probs(self, episodes: list[Episode]) -> None:
        """Add log-probabilities of policy and reference, and values, of the tokens of completions.

        Those of the policy are known from sampling, but in low precision decoding token by token rounds differently
        from the forward pass of training.
        """
        args = self.args
        models: dict[str, nn.Module | None] = {
            "log_probs": None if args.mixed_precision == "no" else self.model,
            "reference": self.reference if args.beta > 0 else None,
        }
        for chosen, batch in self.chunks(episodes):
            found = {
                name: completion_log_probs(model, batch, args.temperature)
                for name, model in models.items()
                if model is not None
            }
            if self.values is not None:
                found["values"] = self.values.of_completions(batch)
            for name, values in found.items():
                for i, row in zip(chosen, values.float().cpu().numpy(), strict=True):
                    episodes[i][name] = row[: len(episodes[i]["completion"])].copy()

    def chunks(self, episodes: list[Episode]) -> Any:
        """Yield (indices, batch on the device) of episodes of similar length."""
        args, collate = self.args, self.collator()
        size = args.batch_size if self.evaluating else args.micro_batch_size or args.batch_size
        order = sorted(range(len(episodes)), key=lambda i: len(episodes[i]["prompt"]) + len(episodes[i]["completion"]))
        for first in range(0, len(order), size):
            chosen = order[first : first + size]
            tokens = [{name: episodes[i][name] for name in ("prompt", "completion")} for i in chosen]
            yield chosen, send_to_device(collate(tokens, chosen, 0), self.accelerator.device)

    def add_advantages(self, episodes: list[Episode]) -> None:
        """Add ``advantages`` of tokens and ``returns`` for PPO, or the ``advantage`` of completions."""
        args = self.args
        padded = {
            name: pad_sequence([torch.from_numpy(one[name]) for one in episodes], batch_first=True)
            for name in ("log_probs", "reference", "values")
            if name in episodes[0]
        }
        sizes = torch.tensor([len(episode["completion"]) for episode in episodes])
        mask = (torch.arange(int(sizes.max())) < sizes[:, None]).float()
        rewards = torch.tensor(np.array([episode["reward"][0] for episode in episodes])).float()
        if args.algorithm == "ppo":
            reference = padded.get("reference", padded["log_probs"])
            of_tokens = token_rewards(rewards, padded["log_probs"], reference, mask, args.beta)
            if args.whiten_rewards:
                of_tokens = whiten(of_tokens, mask, centre=False)
            values = padded["values"]
            advantages, returns = generalized_advantages(of_tokens, values, mask, args.discount, args.gae_lambda)
            advantages = whiten(advantages, mask) if args.whiten_advantages else advantages
            for i, episode in enumerate(episodes):
                episode["advantages"] = advantages[i, : sizes[i]].numpy().copy()
                episode["returns"] = returns[i, : sizes[i]].numpy().copy()
            return
        if args.algorithm == "rloo":
            if args.beta > 0:
                rewards = rewards - args.beta * ((padded["log_probs"] - padded["reference"]) * mask).sum(1)
            found = leave_one_out_advantages(rewards, args.num_generations)
        else:
            found = group_advantages(rewards, args.num_generations, args.scale_rewards)
        if args.whiten_advantages:
            found = whiten(found[:, None], torch.ones(len(found), 1))[:, 0]
        add_scalars(episodes, "advantage", found.numpy())

    def require_same(self, name: str, found: float) -> None:
        """Raise if a log ratio that must be 0 before training is not, up to rounding.

        Raises:
            ValueError: with the ratio.
        """
        if not found <= (SAME if self.args.mixed_precision == "no" else SAME_BF16):
            raise ValueError(
                f"the {name} of the untrained policy from itself is not 0: a log ratio is {found:.3g}. Its forward "
                "pass is random or depends on the batch"
            )

    # --- state

    @property
    def out_of_budget(self) -> bool:
        """True in the last step of the rollout in which the last of ``max_generated_tokens`` was sampled."""
        most = self.args.max_generated_tokens
        return most is not None and self.generated >= most and self.rollouts is not None and not self.rollouts.left

    def state(self) -> dict[str, Tensor]:
        """See `Task`: the number of generated tokens, and the rollout that is trained on."""
        return {"generated": torch.tensor([self.generated]), **(self.rollouts.state() if self.rollouts else {})}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """See `Task`."""
        if "generated" not in state:
            raise ValueError("the checkpoint has no number of generated tokens")
        self.generated = int(state.pop("generated"))
        if self.rollouts is not None:
            self.rollouts.load_state(state)

    # --- one step

    def trained_module(self) -> nn.Module:
        """The policy and its value function."""
        assert self.module is not None
        return self.module

    def count(self, batch: Batch) -> dict[str, float]:
        """Tokens of completions, and the items of all terms and statistics."""
        args = self.args
        if "starts" not in batch:
            tokens, episodes, texts = 0.0, 0, len(self.texts.target_positions(batch))
        else:
            tokens, texts = float(batch["mask"].sum()), 0
            episodes = len(batch["mask"]) if batch["counts"] else 0
        policy = tokens if args.algorithm != "rloo" and args.loss_type == "token" else episodes
        return {
            "token": tokens,
            "policy": policy,
            "value": tokens,
            "ptx": texts,
            "ptx_loss": texts,
            "entropy": tokens,
            "clip_fraction": episodes if args.algorithm == "rloo" else tokens,
            **dict.fromkeys(("reward", "true_reward", "kl", "length", "ended"), episodes),
        }

    def losses(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Policy loss, value loss and weighted loss of pretraining texts; and the sums of `statistics`."""
        args = self.args
        if "starts" not in batch:
            total, _ = model(batch)
            return {"ptx": args.ptx_coefficient * total, "ptx_loss": total.detach()}
        log_probs, values = model(batch, args.temperature)
        mask, now = batch["mask"], log_probs.detach()
        log_ratio = log_probs - batch["log_probs"]
        if self.is_first_step:
            self.require_same("probability ratio", float(log_ratio.detach().abs().max()))
        sums = {}
        if args.algorithm == "rloo":
            losses, clipped = policy_loss(log_ratio.sum(1), batch["advantage"], args.clip)
            exists = mask[:, 0]
            sums["policy"], clips = (losses * exists).sum(), (clipped * exists).sum()
        else:
            advantages = batch["advantages"] if "advantages" in batch else batch["advantage"][:, None]
            losses, clipped = policy_loss(log_ratio, advantages, args.clip)
            clips = (clipped * mask).sum()
            if args.algorithm == "grpo" and args.beta > 0:
                losses = losses + args.beta * kl_estimate(log_probs, batch["reference"])
            lengths = args.max_new_tokens if args.loss_type == "constant" else mask.sum(1, keepdim=True).clamp_min(1)
            sums["policy"] = (losses * mask / (1.0 if args.loss_type == "token" else lengths)).sum()
        if values is not None:
            of_tokens = value_loss(values, batch["values"], batch["returns"], args.value_clip)
            sums["value"] = args.value_coefficient * (of_tokens * mask).sum()
        exists = mask[:, 0]
        found = {"entropy": -(now * mask).sum(), "clip_fraction": clips.detach(), "length": mask.sum()}
        if "reference" in batch:
            found["kl"] = ((now - batch["reference"]) * mask).sum()
        for name in ("reward", "true_reward", "ended"):
            if name in batch:
                found[name] = (batch[name] * exists).sum()
        return {**sums, **found}

    @property
    def is_first_step(self) -> bool:
        """True for the first optimizer step of a run."""
        rollouts = self.rollouts
        if rollouts is None or rollouts.position != (0, 0):
            return False
        return rollouts.left == rollouts.steps * rollouts.passes - 1

    # --- scores

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """See `Task`; also the number of tokens sampled for training."""
        return (*metrics_of(self.args), GENERATED)

    @property
    def reported_metrics(self) -> tuple[str, ...]:
        """See `Task`."""
        return metrics_of(self.args)

    def validate(self, module: nn.Module, metrics: Collection[str]) -> dict[str, float]:
        """See `Task`; of the policy alone."""
        values = super().validate(module.get_submodule("policy"), metrics)
        return {**values, GENERATED: self.generated}

    @torch.inference_mode()
    def evaluate(self, model: nn.Module, split: str, metrics: Collection[str] | None = None) -> Scores:
        """Mean rewards, log ratio to the reference and length of a sampled completion of each prompt, and the token
        loss of the validation texts; with ``best_of`` n, of that of n completions with the highest reward."""
        args, rank, world = self.args, self.accelerator.process_index, self.accelerator.num_processes
        copies = getattr(args, "best_of", 1)
        rows = list(part_of_rank(range(len(self.splits[split])), rank, world))
        self.prepare_validation_texts()
        with evaluating(model), nullcontext() if self.evaluating else self.accelerator.autocast():
            episodes = self.complete(model, split, rows, copies, EVALUATION)
            self.score(split, rows, episodes)
            generated = sum(len(episode["completion"]) for episode in episodes)
            if copies > 1:
                groups = [episodes[i : i + copies] for i in range(0, len(episodes), copies)]
                episodes = [max(group, key=lambda one: one["reward"][0]) for group in groups]
            if self.reference is not None:
                self.add_kl(model, episodes)
            values = {}
            if loader := self.text_steps.get("validation"):
                values["lm_loss"] = mean_losses(self.accelerator, self.texts, model, loader)["loss"]
        if world > 1:
            episodes = gather_object(episodes)
            generated = sum(gather_object([generated]))
        add_scalars(episodes, "length", [len(episode["completion"]) for episode in episodes])
        means = {
            name: float(np.mean([episode[name][0] for episode in episodes]))
            for name in ("reward", "true_reward", "kl", "length", "ended")
            if name in episodes[0]
        }
        how = f"temperature: {args.temperature:g}, seed: {args.seed}"
        details = {"temperature": args.temperature, "best_of": copies, "generated_tokens": generated}
        return Scores(
            {**means, **values},
            dict.fromkeys(means, f"best of {copies}, {how}" if copies > 1 else how),
            details=details if self.evaluating else {},
            listing={"predictions": self.listed(split, episodes)} if self.evaluating else {},
        )

    @torch.no_grad()
    def add_kl(self, model: nn.Module, episodes: list[Episode]) -> None:
        """Add the log ratio of a model and the reference, summed over the tokens of each completion."""
        temperature = self.args.temperature or 1.0
        for chosen, batch in self.chunks(episodes):
            ours, theirs = (completion_log_probs(one, batch, temperature) for one in (model, self.reference))
            for i, value in zip(chosen, (ours - theirs).sum(1).tolist(), strict=True):
                add_scalars([episodes[i]], "kl", [value])

    def listed(self, split: str, episodes: list[Episode]) -> list[dict[str, Any]]:
        """Prompt, completion and scores of each prompt."""
        texts = self.processor.batch_decode([one["completion"] for one in episodes], skip_special_tokens=True)
        names = [name for name in ("reward", "true_reward", "kl", "length") if name in episodes[0]]
        return [
            {PROMPT: prompt, "completion": text, **{name: float(episode[name][0]) for name in names}}
            for prompt, text, episode in zip(self.splits[split][PROMPT][:], texts, episodes, strict=True)
        ]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Switch a module to eval mode in this context."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def naming(argument: str, source: str) -> Iterator[None]:
    """Name the argument in errors about a model."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f'{argument} "{source}": {error}') from error


def add_scalars(episodes: Sequence[Episode], name: str, values: Sequence[float] | np.ndarray) -> None:
    """Set a scalar of each episode."""
    for episode, value in zip(episodes, values, strict=True):
        episode[name] = np.array([value], dtype=np.float32)
