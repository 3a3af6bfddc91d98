"""The steps of a rollout, divided over several processes."""

from typing import Any

import numpy as np
import pytest

from hf_tfm.data.batching import StepLoader
from hf_tfm.data.equal_batches import BatchSampler
from hf_tfm.reinforcement.rollout import EpisodeCollator, RolloutLoader

EPISODES = [{"prompt": np.array([i]), "completion": np.arange(1 + i % 3)} for i in range(5)]


def text(examples: list[str], samples: Any, epoch: int, is_dummy: bool = False) -> tuple[list[str], bool]:
    return examples, not is_dummy


def micro_batches(rank: int, world: int) -> dict[int, Any]:
    """Those of a step of five episodes and three texts that count: {their position in the step: content}."""
    texts = StepLoader("abc", BatchSampler(3, 3, shuffle=False), text, 1, rank, world)
    loader = RolloutLoader(
        *(5, 5, lambda prompts, epoch: EPISODES, 1, 1, 0, EpisodeCollator(9), 1, rank, world),
        extra=lambda step: texts.micro_batches([0, 1, 2], 0),
    )
    step = next(loader.epoch(0))
    content = [(one["input_ids"].tolist(), one["counts"]) if isinstance(one, dict) else one for one in step]
    return {number: one for number, (one, counts) in zip(step.numbers, content, strict=True) if counts}


@pytest.mark.parametrize("world", [2, 3])
def test_processes_number_micro_batches_as_one_process_does(world):
    """Random numbers depend on the position, so dropout is the same on any number of processes."""
    alone = micro_batches(0, 1)
    assert list(alone) == list(range(8)) and [alone[i] for i in range(3)] == [["a"], ["b"], ["c"]]
    together: dict[int, Any] = {}
    for rank in range(world):
        mine = micro_batches(rank, world)
        assert not mine.keys() & together.keys()
        together |= mine
    assert together == alone
