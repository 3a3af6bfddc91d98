"""transformers' own common model tests, as base classes for ours.

They are in the source distribution of transformers and not in its wheel: `make test-common` fetches that of the
installed version and names its folder in TRANSFORMERS_SOURCE. Without it the tests here skip.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = "TRANSFORMERS_SOURCE"
# What the common tests import of folders that the source distribution leaves out.
LEFT_OUT = {
    "upstream_tests.exporters": {},
    "upstream_tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "upstream_tests.generation": {},
    "upstream_tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "upstream_tests.utils": {},
    "upstream_tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def package(name: str, paths: list[str], **members: object) -> None:
    """Make a package of the given folders and members."""
    module = ModuleType(name)
    module.__path__ = paths
    vars(module).update(members)
    sys.modules[name] = module


def upstream(name: str) -> ModuleType:
    """A module of transformers' folder ``tests``; without it, the tests of the calling module are skipped."""
    if FOLDER not in os.environ:
        pytest.skip(
            f"{FOLDER} does not name a copy of transformers' sources: make test-common", allow_module_level=True
        )
    if "upstream_tests" not in sys.modules:
        folder = Path(os.environ[FOLDER]) / "tests"
        (folder / "__init__.py").touch()  # left out too
        package("upstream_tests", [str(folder)])
        for missing, members in LEFT_OUT.items():
            package(missing, [], **members)
    return importlib.import_module(f"upstream_tests.{name}")
