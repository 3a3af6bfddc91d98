"""Two processes that share the images of a data set compute the same scores as one process."""

import metric_ranks
import pytest
from metric_ranks import METRICS, SHARES, score
from processes import run_ranks


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The output folder of two gloo processes."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(metric_ranks.main, folder)
    return folder


@pytest.mark.parametrize("share", list(SHARES))
@pytest.mark.parametrize("name", list(METRICS))
def test_same_scores_as_one_process(two, name, share):
    expected = score(name, range(9))
    assert expected != score(name, SHARES[share][0]) or share == "none"
    for rank in (0, 1):
        assert (two / f"{name}-{share}-{rank}.txt").read_text() == expected
