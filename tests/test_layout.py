"""Files saved with a model import only siblings, the standard library, and dependencies of transformers and timm."""

import ast
import re
import sys
from pathlib import Path

import pytest

MODELS = Path(__file__).parents[1] / "hf_tfm" / "models"
FILES = sorted(path for path in MODELS.glob("*.py") if path.name != "__init__.py")
ALLOWED = {"torch", "transformers", "huggingface_hub", "timm", "torchvision", "numpy", "scipy"} | set(
    sys.stdlib_module_names
)


def test_models_is_flat():
    assert FILES and not [path for path in MODELS.iterdir() if path.is_dir() and path.name != "__pycache__"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_model_files_import_only_available_modules(path):
    text = path.read_text()
    siblings = {file.stem for file in FILES}
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            for name in node.names:
                assert name.name.split(".")[0] in ALLOWED, name.name
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert node.module.split(".")[0] in ALLOWED, node.module
        elif isinstance(node, ast.ImportFrom):
            # The scanner that copies files misses `from . import x`, and `from ..x import y` crashes it.
            assert node.level == 1 and node.module in siblings, ast.unparse(node)
            found.add(node.module)
    # The scanner is a regular expression over the whole text: it must find exactly these imports, none in docstrings.
    assert set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, re.MULTILINE)) == found
    assert not re.findall(r"^\s*import\s+\.(\S+)\s*$", text, re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_model_files_never_name_the_package(path):
    assert "hf_tfm" not in path.read_text()


def test_every_file_is_imported_by_a_modeling_file():
    """Files that no modeling file imports would not be copied."""
    reached, todo = set(), [path.stem for path in FILES if path.stem.startswith(("modeling_", "configuration_"))]
    while todo:
        stem = todo.pop()
        if stem not in reached:
            reached.add(stem)
            todo += re.findall(r"^from \.(\S+) import", (MODELS / f"{stem}.py").read_text(), re.MULTILINE)
    assert reached == {path.stem for path in FILES}
