"""Two processes that share the images of a data set compute the same scores as one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from metric_ranks import METRICS, SHARES, score


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output folder of two gloo processes."""
    folder = tmp_path_factory.mktemp("ranks")
    script = Path(__file__).with_name("metric_ranks.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", str(script), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("share", list(SHARES))
@pytest.mark.parametrize("name", list(METRICS))
def test_same_scores_as_one_process(two, name, share):
    expected = score(name, range(9))
    assert expected != score(name, SHARES[share][0]) or share == "none"
    for rank in (0, 1):
        assert (two / f"{name}-{share}-{rank}.txt").read_text() == expected
