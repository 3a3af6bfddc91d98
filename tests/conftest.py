"""Keep the test suite out of the user's caches, in a temporary folder, and limit it to one thread per process.

The folder is chosen before anything else is imported, because libraries read these variables once. pytest-xdist
workers and child processes inherit them; the process that created the folder removes it.
"""

import atexit
import gc
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

HOME = "HF_TFM_TESTS_HOME"
VARIABLES = {
    "HF_HOME": "huggingface",
    "HF_HUB_CACHE": "huggingface/hub",
    "HF_XET_CACHE": "huggingface/xet",
    "HF_ASSETS_CACHE": "huggingface/assets",
    "HF_MODULES_CACHE": "huggingface/modules",
    "HF_DATASETS_CACHE": "huggingface/datasets",
    "HF_EVALUATE_CACHE": "huggingface/evaluate",
    "HF_METRICS_CACHE": "huggingface/metrics",
    "TORCH_HOME": "torch",
    "TRITON_CACHE_DIR": "triton",
    "MPLCONFIGDIR": "matplotlib",
    "XDG_CACHE_HOME": ".",
}

if "PYTEST_XDIST_WORKER" not in os.environ or HOME not in os.environ:
    os.environ[HOME] = tempfile.mkdtemp(prefix="hf-tfm-tests-")
    atexit.register(shutil.rmtree, os.environ[HOME], ignore_errors=True)
for variable, folder in VARIABLES.items():
    os.environ[variable] = str(Path(os.environ[HOME], folder))
# Tests use small models in two processes: with more threads they would slow each other down.
os.environ.setdefault("OMP_NUM_THREADS", "1")
for variable in ("TRANSFORMERS_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_TOKEN_PATH"):
    os.environ.pop(variable, None)
gc.disable()  # until all tests are imported, see pytest_collection_finish


@pytest.fixture(scope="session", autouse=True)
def forks():
    """End the servers of `processes` with the tests, before coverage collects what they measured."""
    yield
    if "processes" in sys.modules:
        sys.modules["processes"].close()


@pytest.fixture(scope="session", autouse=True)
def fast_files():
    """Do not flush files to the disk, and render one training curve of each size: a third of the time of a short run.

    Runs in other processes draw their own curves.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        if curve := sys.modules.get("hf_tfm.hub.curve"):
            rendered: dict[tuple[float, ...], bytes] = {}

            class RenderedOnce(curve.Figure):
                def savefig(self, path, **options):
                    size = tuple(self.get_size_inches())
                    if Path(path).name != curve.CURVE:
                        return super().savefig(path, **options)
                    if size not in rendered:
                        super().savefig(path, **options)
                        rendered[size] = Path(path).read_bytes()
                    Path(path).write_bytes(rendered[size])

            patch.setattr(curve, "Figure", RenderedOnce)
        yield


@pytest.fixture
def empty_hub(monkeypatch: pytest.MonkeyPatch):
    """A local Hub without repositories. Without a network, huggingface_hub would retry the real one for 23 s."""
    from huggingface_hub import constants
    from server import HubServer

    with HubServer() as hub:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        yield hub


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--equality-table", metavar="FILE", help="add the differences of divided runs to a JSON file")


@pytest.fixture
def equality(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``equality(name, way, weights=..., losses=...)`` adds the largest differences of a run that is divided in some
    way to the file of ``--equality-table``; one process of pytest must run the tests."""
    file = request.config.getoption("--equality-table")

    def add(name: str, way: str, **differences: float) -> None:
        print(f"{name}, {way}: {', '.join(f'{key} {value:.1e}' for key, value in differences.items())}")
        if file:
            from hf_tfm.hub.results import collect_versions

            found = json.loads(Path(file).read_text()) if Path(file).is_file() else {}
            found.setdefault("ways", {}).setdefault(way, {})[name] = differences
            Path(file).write_text(json.dumps({**found, "versions": collect_versions()}, indent=2) + "\n")

    return add


def pytest_configure(config: pytest.Config) -> None:
    """Child processes can import the folders in ``pythonpath`` of pyproject.toml, as tests do."""
    given = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys([*map(str, config.getini("pythonpath")), *given]))


def pytest_collection_finish() -> None:
    """Exclude all objects created by imports from garbage collection.

    Otherwise every ``gc.collect()``, which accelerate calls whenever it loads or frees a model, traverses several
    million objects for half a second.
    """
    gc.collect()
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # after pytest's own collections at the end, which take seconds otherwise
