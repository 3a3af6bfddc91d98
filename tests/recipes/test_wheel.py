"""An installed wheel contains the recipes, their presets and the model card template."""

import importlib.util
import subprocess
import sys
import zipfile

import pytest
from recipe_helpers import ROOT


@pytest.mark.slow
def test_wheel_contains_the_recipes(tmp_path):
    isolation = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", *isolation, "--wheel-dir", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode and not isolation and "No matching distribution" in done.stderr:
        pytest.skip("hatchling is neither installed nor can it be downloaded")
    assert done.returncode == 0, done.stderr[-4000:]
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    recipes = ROOT / "recipes"
    expected = {
        f"hf_tfm/recipes/{path.relative_to(recipes)}" for kind in ("py", "yaml") for path in recipes.rglob(f"*.{kind}")
    }
    assert len(expected) >= 8
    assert expected | {"hf_tfm/hub/card_template.md", "hf_tfm/py.typed"} <= names
    assert not any(name.startswith(("tests/", "benchmarks/")) or "__pycache__" in name for name in names)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    listed = subprocess.run(
        [
            sys.executable,
            "-c",
            "import hf_tfm.recipe_files as c; print(c.__file__, sorted(p.name for p in c.recipes_folder().iterdir()))",
        ],
        cwd=tmp_path / "site",
        capture_output=True,
        text=True,
        timeout=100,
    ).stdout
    assert str(tmp_path / "site") in listed
    assert "translation_train.py" in listed
