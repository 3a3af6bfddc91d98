"""Two processes train on texts and classify them with the same results as one process."""

import json

import numpy as np
import pytest
import text_ranks
from processes import run_ranks
from safetensors.torch import load_file
from text_tasks import CASES, prediction, train_steps


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output folder of two gloo processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(text_ranks.main, folder)
    return folder


@pytest.mark.parametrize("micro", [None, 2])
@pytest.mark.parametrize("name", list(CASES))
def test_same_weights_as_one_process(two, accelerator, name, micro):
    mine, theirs = train_steps(accelerator, name, None), load_file(two / f"{name}-{micro}.safetensors")
    fresh = CASES[name][1]().state_dict()
    assert max((mine[key] - theirs[key]).abs().max().item() for key in mine) < 1e-6
    assert max((mine[key] - fresh[key]).abs().max().item() for key in mine) > 1e-4


def test_same_predictions_as_one_process(two, accelerator):
    reports = [json.loads((two / f"report{rank}.json").read_text()) for rank in (0, 1)]
    assert reports[0] == reports[1]
    for (labels, logits, loss), count in zip(reports[0], (11, 1), strict=True):
        alone = prediction(accelerator, count)
        assert labels == alone.labels.tolist() and len(labels) == count
        assert np.allclose(logits, alone.logits, atol=1e-6)
        assert loss == pytest.approx(alone.loss, rel=1e-5)
