"""Two processes train a student and write a cache with the same results as one process."""

import distillation_ranks
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from distillation_ranks import TERMS, build, cache, train_steps
from processes import run_ranks
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output folder of two gloo processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(distillation_ranks.main, folder)
    return folder


@pytest.mark.parametrize("micro", [None, 1])
@pytest.mark.parametrize("name", list(TERMS))
def test_same_weights_as_one_process(two, name, micro):
    """The runs with inner-layer terms and micro-batches read their teacher from the cache that two processes wrote."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    task, model = build(name)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    mine, theirs = (
        train_steps(Accelerator(cpu=True), task, model, None),
        load_file(two / f"{name}-{micro}.safetensors"),
    )
    assert mine.keys() == theirs.keys()
    assert max((mine[key] - theirs[key]).abs().max().item() for key in mine) < 1e-6
    assert max((mine[key] - fresh[key]).abs().max().item() for key in mine) > 1e-4


def test_same_cache_as_one_process(two, tmp_path):
    cache(None, tmp_path)
    names = sorted(path.name for path in (tmp_path / "shards").iterdir())
    assert names == sorted(path.name for path in (two / "cache" / "shards").iterdir()) and len(names) == 5
    for name in names:
        mine, theirs = (load_file(folder / "shards" / name) for folder in (tmp_path, two / "cache"))
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(theirs[key], value, rtol=1e-5, atol=1e-5)  # rounding: other thread count
