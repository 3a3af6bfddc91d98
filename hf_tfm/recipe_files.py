"""Recipes by name: where their files are, and running one."""

import inspect
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from .command import run_recipe, short_errors
from .plugins import TASKS, plugin_names

DISTILL = "distill_"


def recipes_folder() -> Path:
    """Return the folder of the recipes: in an installed package, or next to the package in the repository."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def plugin_recipes() -> list[str]:
    """Return the names of the recipes of other packages: NAME trains a task and distill_NAME distils it."""
    names = plugin_names(TASKS)
    return [*names, *(DISTILL + name for name in names)]


def recipe_names() -> list[str]:
    """Return the names of all recipes."""
    return [*sorted(path.stem for path in recipes_folder().glob("*.py")), *plugin_recipes()]


def plugin_recipe(name: str) -> Callable[[list[str]], int]:
    """Return the ``main`` of a recipe of another package.

    Its presets are in the folder presets/NAME/ next to the module of the task.

    Raises:
        ValueError: the task cannot be imported.
    """
    from .tasks.distillation import distill
    from .tasks.registry import task_classes
    from .training.trainer import recipe

    task_class = task_classes().get(name.removeprefix(DISTILL))
    if task_class is None:
        raise ValueError(f'the plug-in "{name}" cannot be loaded')
    file = str(Path(inspect.getfile(task_class)).with_name(f"{name}.py"))
    return recipe(distill(task_class) if name.startswith(DISTILL) else task_class, file)


def recipe_main(name: str) -> Callable[[list[str]], int]:
    """Return the ``main`` of a recipe without running it.

    Raises:
        ValueError: it belongs to another package and cannot be imported.
    """
    file = recipes_folder() / f"{name}.py"
    return runpy.run_path(str(file))["main"] if file.is_file() else plugin_recipe(name)


def run(recipe: str, argv: list[str]) -> None:
    """Run a recipe by name, with its own options: hf-tfm run RECIPE --help.

    Args:
        recipe: name of a file in recipes/.
        argv: arguments of the recipe.

    Raises:
        SystemExit: with the exit status of the recipe.
    """
    known = recipe_names()
    if recipe not in known:
        print(f'hf-tfm run: there is no recipe "{recipe}"; available: {", ".join(known)}', file=sys.stderr)
        raise SystemExit(2)
    if not (recipes_folder() / f"{recipe}.py").is_file():
        with short_errors(f"run {recipe}", argv):
            main = plugin_recipe(recipe)
        sys.argv = [recipe, *argv]
        run_recipe(recipe, main)
    file = str(recipes_folder() / f"{recipe}.py")
    sys.argv = [file, *argv]
    with short_errors(f"run {recipe}", argv):  # errors before the recipe calls `run_recipe`
        runpy.run_path(file, run_name="__main__")
