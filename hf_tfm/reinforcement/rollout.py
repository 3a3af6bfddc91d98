"""Rollouts: completions sampled from the current policy, and the optimizer steps that are trained on them.

    prompts of a rollout -> episodes (completions, rewards, advantages) -> steps of batch_size episodes

An episode is a dictionary of arrays: ``prompt`` and ``completion`` ids; per token of the completion ``log_probs``,
``advantages`` and, for PPO, ``values`` and ``returns``; and scalars such as ``reward``, as arrays (1,).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.batching import MicroBatches, Sample, StepLoader, pad, rng
from ..data.equal_batches import BatchSampler

Episode = dict[str, np.ndarray]
TOKEN_FIELDS = ("log_probs", "reference", "advantages", "values", "returns")
LENGTHS = ".lengths"
POSITION = "rollout"


def pack(episodes: Sequence[Episode]) -> dict[str, Tensor]:
    """Return episodes as tensors: the arrays of a field joined, and their lengths as "FIELD.lengths"."""
    found = {}
    for name in episodes[0]:
        arrays = [episode[name] for episode in episodes]
        found[name] = torch.from_numpy(np.concatenate(arrays))
        found[name + LENGTHS] = torch.tensor([len(array) for array in arrays])
    return found


def unpack(tensors: dict[str, Tensor]) -> list[Episode]:
    """Undo `pack`.

    Raises:
        ValueError: lengths are missing or wrong.
    """
    columns = {}
    for name in tensors:
        if not name.endswith(LENGTHS):
            lengths = tensors.get(name + LENGTHS)
            if lengths is None or int(lengths.sum()) != len(tensors[name]):
                raise ValueError(f"the lengths of {name} do not fit its {len(tensors[name])} values")
            columns[name] = np.split(tensors[name].numpy(), np.cumsum(lengths.numpy())[:-1])
    return [dict(zip(columns, arrays, strict=True)) for arrays in zip(*columns.values(), strict=True)]


@dataclass
class EpisodeCollator:
    """Episodes -> a batch of right-padded tensors.

    ``input_ids`` (B, T); ``attention_mask`` (B, T) if there is padding; ``starts`` (B,), lengths of prompts; ``mask``
    (B, C), 1.0 for tokens of completions; token fields (B, C) and scalars (B,). A dummy batch has a mask of zeros and
    ``counts`` False.

    Args:
        pad_token_id: fills ``input_ids``.
    """

    pad_token_id: int

    def __call__(
        self, examples: Sequence[Episode], samples: Sequence[Sample], epoch: int, is_dummy: bool = False
    ) -> dict[str, Any]:
        rows = [np.concatenate([episode["prompt"], episode["completion"]]) for episode in examples]
        ids, lengths = pad(rows, self.pad_token_id), torch.tensor([len(row) for row in rows])
        sizes = torch.tensor([len(episode["completion"]) for episode in examples])
        mask = (torch.arange(int(sizes.max())) < sizes[:, None]).float()  # (B, C)
        batch: dict[str, Any] = {
            "input_ids": ids,
            "starts": lengths - sizes,
            "mask": torch.zeros_like(mask) if is_dummy else mask,
            "counts": not is_dummy,
        }
        if int(lengths.min()) < ids.shape[1]:
            batch["attention_mask"] = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
        for name in examples[0].keys() - {"prompt", "completion"}:
            values = [torch.from_numpy(episode[name]) for episode in examples]
            if name in TOKEN_FIELDS:
                batch[name] = torch.nn.utils.rnn.pad_sequence(values, batch_first=True)
            else:
                batch[name] = torch.stack(values)[:, 0]
        return batch


class RolloutLoader:
    """The steps of an epoch, an epoch being a pass over the prompts; see `tasks.base.Loader`.

    The episodes of a rollout are sampled when its first step is requested, from the weights of that moment.

    Args:
        prompts: number of prompts.
        prompts_per_rollout: their number in one rollout.
        collect: (prompts of a rollout, epoch) -> its episodes, the same on all ranks.
        steps: number of optimizer steps per rollout and pass over it.
        passes: passes over a rollout.
        seed: of the order of prompts, and of the episodes.
        collate: see `EpisodeCollator`.
        micro_batch_size: episodes that one process computes at once; None for all of a step.
        rank, world_size: this process and the number of processes.
        extra: number of an optimizer step -> further micro-batches that come before those of the episodes.
    """

    def __init__(
        self,
        prompts: int,
        prompts_per_rollout: int,
        collect: Callable[[Sequence[int], int], list[Episode]],
        steps: int,
        passes: int,
        seed: int,
        collate: EpisodeCollator,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        extra: Callable[[int], MicroBatches] = lambda step: MicroBatches(),
    ):
        self.sampler = BatchSampler(prompts, prompts_per_rollout, seed, drop_last=True)
        self.collect, self.steps, self.passes, self.seed, self.extra = collect, steps, passes, seed, extra
        self.collate, self.micro_batch_size, self.rank, self.world_size = collate, micro_batch_size, rank, world_size
        self.position: tuple[int, int] | None = None  # epoch and number in it of the rollout that is held
        self.episodes: list[Episode] = []
        self.left = 0  # steps of the rollout after the current one

    def steps_per_epoch(self, epoch: int = 0) -> int:
        """See `tasks.base.Loader`."""
        return len(self.sampler.steps(epoch)) * self.steps * self.passes

    def epoch(self, epoch: int, start: int = 0) -> Iterator[MicroBatches]:
        """See `tasks.base.Loader`; must not be read ahead of training.

        Raises:
            ValueError: ``start`` lies inside of a rollout that is not held.
        """
        per_rollout = self.steps * self.passes
        for number, prompts in enumerate(self.sampler.steps(epoch)):
            if (number + 1) * per_rollout <= start:
                continue
            done = max(0, start - number * per_rollout)
            if self.position != (epoch, number):
                if done:
                    raise ValueError(f"the episodes of rollout {number} in epoch {epoch} are not in the checkpoint")
                self.episodes, self.position = self.collect([int(i) for i in prompts], epoch), (epoch, number)
            order = self.order(epoch, number)
            loader = StepLoader(
                self.episodes,
                BatchSampler(len(self.episodes), len(order[0])),
                self.collate,
                self.micro_batch_size,
                self.rank,
                self.world_size,
            )
            for i in range(done, per_rollout):
                self.left = per_rollout - 1 - i
                # Neighbours of similar length, for less padding in a micro-batch.
                episodes = sorted(order[i], key=lambda one: len(self.episodes[one]["completion"]))
                step = epoch * self.steps_per_epoch(epoch) + number * per_rollout + i
                yield self.extra(step).followed_by(loader.micro_batches(episodes, epoch))

    def order(self, epoch: int, number: int) -> list[list[int]]:
        """Return the episodes of each step on a rollout: every pass has them once, in random order."""
        found = []
        for one in range(self.passes):
            order = rng(self.seed, epoch, number, one).permutation(len(self.episodes))
            found += [part.tolist() for part in np.split(order, self.steps)]
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the rollout that is held if steps on it are left, see `tasks.base.Task.state`."""
        if not self.left or self.position is None:
            return {}
        return {POSITION: torch.tensor([*self.position, self.left]), **pack(self.episodes)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continue with the rollout of a `state`.

        Raises:
            ValueError: it is damaged.
        """
        if POSITION in state:
            epoch, number, self.left = state[POSITION].tolist()
            self.position = epoch, number
            self.episodes = unpack({name: value for name, value in state.items() if name != POSITION})
