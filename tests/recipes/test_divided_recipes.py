"""A recipe trains, scores and saves the same model however its steps are divided."""

import pytest
from divided_recipes import DIVISIONS, REFUSED, RUNS, folder_of, main, train_alone
from processes import run_ranks
from recipe_helpers import record
from vision_recipes import distance

pytestmark = pytest.mark.slow

# Rounding, which Adam enlarges where gradients are small.
TOLERANCE = {"detection, Deformable DETR": 1e-4, "panoptic segmentation": 1e-4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder with the undivided runs in "one"."""
    folder = tmp_path_factory.mktemp("divided")
    train_alone(folder / "one", list(RUNS))
    return folder


@pytest.fixture(scope="module", params=list(DIVISIONS))
def divided(folder, request):
    """(undivided runs, divided runs)"""
    division, names = DIVISIONS[request.param], [name for name in RUNS if (name, request.param) not in REFUSED]
    if division.processes == 1:
        train_alone(folder / request.param, names, division)
    else:
        run_ranks(main, folder / request.param, names, division, timeout=1800)
    return folder / "one", folder / request.param


@pytest.mark.parametrize("name", list(RUNS))
def test_divided_run_equals_that_of_one_process(name, divided):
    if (name, divided[1].name) in REFUSED:
        pytest.skip("refused")
    one, other = (runs / folder_of(name) for runs in divided)
    assert distance(one, other, key_biases=False) < TOLERANCE.get(name, 1e-5)
    scores = [{(row["name"], row["split"]): row["value"] for row in record(folder).metrics} for folder in (one, other)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4, abs=1e-4)
    # The code of the model, and no file of torch.
    assert {path.name for path in other.iterdir()} == {path.name for path in one.iterdir()}
    assert "FSDP" not in (other / "config.json").read_text()
