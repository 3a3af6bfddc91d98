"""Two processes train on images and classify them with the same results as one process."""

import json

import image_ranks
import pytest
from image_ranks import BAD, prediction, train_steps
from image_tasks import CASES
from processes import run_ranks
from safetensors.torch import load_file


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output folder of two gloo processes, and their standard error."""
    folder = tmp_path_factory.mktemp("ranks")
    done = run_ranks(image_ranks.main, folder)
    return folder, done.stderr


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("name", list(CASES))
def test_same_weights_as_one_process(two, accelerator, name, micro):
    mine, theirs = train_steps(accelerator, name, None), load_file(two[0] / f"{name}-{micro}.safetensors")
    fresh = CASES[name][1]().state_dict()
    assert max((mine[key] - theirs[key]).abs().max().item() for key in mine) < 1e-6
    assert max((mine[key] - fresh[key]).abs().max().item() for key in mine) > 1e-4


def test_same_predictions_as_one_process(two, accelerator):
    reports = [json.loads((two[0] / f"report{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]
    for found, count in zip(reports[0], (11, 1), strict=True):
        *mine, loss = prediction(accelerator, count)
        assert found[:3] == mine and found[3] == pytest.approx(loss, rel=1e-5)
        assert found[0] == [i for i in range(count) if i not in BAD]


def test_bad_images_are_reported_by_the_rank_that_read_them(two):
    for index in BAD:
        assert f"image {index} is left out: {index}.jpg: OSError" in two[1]
