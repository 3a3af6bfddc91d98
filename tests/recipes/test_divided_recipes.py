"""A recipe trains, scores and saves the same model however its steps are divided.

`make proofs` writes the largest differences to tests/equality.json, which docs/launch.md shows.
"""

import pytest
from divided_recipes import DIVISIONS, RUNS, folder_of, loss_difference, main, train_alone
from processes import run_ranks
from recipe_helpers import record
from vision_recipes import distance

pytestmark = pytest.mark.slow

# Rounding, which Adam enlarges where gradients are small.
TOLERANCE = {"detection, Deformable DETR": 1e-4, "panoptic segmentation": 1e-4}
LOSSES = 1e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the undivided runs in "one"."""
    folder = tmp_path_factory.mktemp("divided")
    train_alone(folder / "one", list(RUNS))
    return folder


@pytest.fixture(scope="module", params=list(DIVISIONS))
def divided(folder, request):
    """(undivided runs, divided runs)"""
    for division in DIVISIONS[request.param]:
        if division.processes == 1:
            train_alone(folder / request.param, list(RUNS), division)
        else:
            run_ranks(
                *(main, folder / request.param, list(RUNS), division), world_size=division.processes, timeout=1800
            )
    return folder / "one", folder / request.param


@pytest.mark.parametrize("name", list(RUNS))
def test_divided_run_equals_that_of_one_process(name, divided, equality):
    one, other = (runs / folder_of(name) for runs in divided)
    weights, losses = distance(one, other, key_biases=False), loss_difference(one, other)
    equality(name, other.parent.name, weights=weights, losses=losses)
    assert weights < TOLERANCE.get(name, 1e-5)
    assert losses < LOSSES
    scores = [{(row["name"], row["split"]): row["value"] for row in record(folder).metrics} for folder in (one, other)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4, abs=1e-4)
    # The code of the model, and no file of torch.
    assert {path.name for path in other.iterdir()} == {path.name for path in one.iterdir()}
    assert "FSDP" not in (other / "config.json").read_text()
