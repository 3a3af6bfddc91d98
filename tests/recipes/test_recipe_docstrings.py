"""Commands in the docstrings of recipes are valid."""

import ast
import re
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[2] / "recipes"
COMMAND = re.compile(
    r"(?:hf-tfm run|accelerate launch) (?:distill_cache )?(?:recipes/)?(\w+)(?:\.py)? .*?--config (\w+)"
)


def commands(recipe: Path) -> list[tuple[str, str]]:
    """(recipe, preset) of every command in a docstring; a command may be for another recipe."""
    return COMMAND.findall(ast.get_docstring(ast.parse(recipe.read_text())))


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_every_indented_line_is_one_command(recipe):
    text = ast.get_docstring(ast.parse(recipe.read_text()))
    for line in (line for line in text.splitlines() if line.startswith("    ")):
        assert re.match(r"    (hf-tfm run|accelerate launch) ", line), line
        assert len(re.findall(r"hf-tfm run|accelerate launch", line)) == 1, line


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_every_preset_in_a_docstring_exists(recipe):
    words = ast.get_docstring(ast.parse(recipe.read_text())).split()
    found = commands(recipe)
    assert len(found) >= words.count("--config")  # the pattern must match all of them
    for name, preset in found:
        assert (RECIPES / "presets" / name / f"{preset}.yaml").is_file(), f"{name} has no preset {preset}"
