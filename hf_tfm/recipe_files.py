"""Recipes by name: where their files are, and running one."""

import runpy
import sys
from pathlib import Path

from .command import short_errors


def recipes_folder() -> Path:
    """Return the folder of the recipes: in an installed package, or next to the package in the repository."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def run(recipe: str, argv: list[str]) -> None:
    """Run a recipe by name, with its own options: hf-tfm run RECIPE --help.

    Args:
        recipe: name of a file in recipes/.
        argv: arguments of the recipe.

    Raises:
        SystemExit: with the exit status of the recipe.
    """
    known = sorted(path.stem for path in recipes_folder().glob("*.py"))
    if recipe not in known:
        print(f'hf-tfm run: there is no recipe "{recipe}"; there are {", ".join(known)}', file=sys.stderr)
        raise SystemExit(2)
    file = str(recipes_folder() / f"{recipe}.py")
    sys.argv = [file, *argv]
    with short_errors(f"run {recipe}", argv):  # errors before the recipe calls `run_recipe`
        runpy.run_path(file, run_name="__main__")
