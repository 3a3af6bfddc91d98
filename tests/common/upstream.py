"""transformers' own common model tests, as base classes of ours.

They are in the source distribution of transformers but not in its wheel: `make test-common` fetches the source of
the installed version and sets TRANSFORMERS_SOURCE to its folder. Without it these tests are skipped.
"""

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = "TRANSFORMERS_SOURCE"
# Modules that the common tests import from folders missing in the source distribution.
LEFT_OUT = {
    "upstream_tests.exporters": {},
    "upstream_tests.exporters.test_export": {"ExportTesterMixin": type("ExportTesterMixin", (), {})},
    "upstream_tests.generation": {},
    "upstream_tests.generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "upstream_tests.utils": {},
    "upstream_tests.utils.test_configuration_utils": {"config_common_kwargs": {}},
}


def package(name: str, paths: list[str], **members: object) -> None:
    """Create a package from the given folders and members."""
    module = ModuleType(name)
    module.__path__ = paths
    vars(module).update(members)
    sys.modules[name] = module


def upstream(name: str) -> ModuleType:
    """Import a module of transformers' folder ``tests``; without it, skip the tests of the calling module."""
    if FOLDER not in os.environ:
        pytest.skip(
            f"{FOLDER} does not name a copy of transformers' sources: make test-common", allow_module_level=True
        )
    if "upstream_tests" not in sys.modules:
        folder = Path(os.environ[FOLDER]) / "tests"
        (folder / "__init__.py").touch()  # also missing
        package("upstream_tests", [str(folder)])
        for missing, members in LEFT_OUT.items():
            package(missing, [], **members)
    return importlib.import_module(f"upstream_tests.{name}")
