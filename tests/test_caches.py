"""The test suite neither reads nor writes the user's caches."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PLACES = "import huggingface_hub.constants as hub; print(hub.HF_HOME, hub.HF_HUB_CACHE, hub.HF_TOKEN_PATH, sep='\\n')"


def cache_folders():
    """The cache folders of this process."""
    import datasets
    import evaluate
    import huggingface_hub.constants as hub
    import torch

    return [
        datasets.config.HF_DATASETS_CACHE,
        datasets.config.HF_MODULES_CACHE,
        evaluate.config.HF_EVALUATE_CACHE,
        hub.HF_HOME,
        hub.HF_HUB_CACHE,
        hub.HF_TOKEN_PATH,
        torch.hub.get_dir(),
    ]


@pytest.mark.parametrize("process", ["this", "started"])
def test_caches_are_in_the_suite_folder(process):
    found = cache_folders()
    if process == "started":
        started = subprocess.run([sys.executable, "-c", PLACES], capture_output=True, text=True, check=True)
        found = started.stdout.split("\n")[:-1]
        assert len(found) == 3
    home, own = Path.home().resolve(), Path(os.environ["HF_TFM_TESTS_HOME"]).resolve()
    for path in found:
        assert Path(path).resolve().is_relative_to(own), path
        assert not Path(path).resolve().is_relative_to(home / ".cache"), path
