"""Recipes sharded by FSDP2 over two processes train, score and save like one process."""

import pytest
from processes import run_ranks
from recipe_helpers import record
from sharded_recipes import RUNS, main, train_alone
from vision_recipes import distance

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Folder with the runs of one process in "one" and of two in "two"."""
    folder = tmp_path_factory.mktemp("sharded")
    train_alone(folder / "one", list(RUNS))
    run_ranks(main, folder / "two", list(RUNS))
    return folder


@pytest.mark.parametrize("name", list(RUNS))
def test_sharded_run_equals_that_of_one_process(name, runs):
    one, two = (runs / world / name for world in ("one", "two"))
    assert distance(one, two) < 1e-5
    scores = [{(row["name"], row["split"]): row["value"] for row in record(folder).metrics} for folder in (one, two)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4, abs=1e-4)
    # The code of the model, and no file of torch.
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    assert "FSDP" not in (two / "config.json").read_text()
