"""The command line: hf-tfm run | evaluate | convert | push | show | doctor | quickstart.

hf-tfm COMMAND --help tells each one's options.
"""

import inspect
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import docstring_parser

from .command import DEBUG_HELP, run_command, short_errors, without_debug
from .options import OptionParser
from .show import show_attention, show_detections, show_positions, show_queries, show_reconstruction
from .values import PATHS, checked, expanded


def recipes_folder() -> Path:
    """Where the recipes are: inside an installed package, or beside it in the repository."""
    here = Path(__file__).parent
    return here / "recipes" if (here / "recipes").is_dir() else here.parent / "recipes"


def run(recipe: str, argv: list[str]) -> None:
    """Run a recipe by name, with its own options: hf-tfm run RECIPE --help.

    Args:
        recipe: name of a file in recipes/.
        argv: its command line.

    Raises:
        SystemExit: with the exit status of the recipe.
    """
    known = sorted(path.stem for path in recipes_folder().glob("*.py"))
    if recipe not in known:
        print(f'hf-tfm run: there is no recipe "{recipe}"; there are {", ".join(known)}', file=sys.stderr)
        raise SystemExit(2)
    file = str(recipes_folder() / f"{recipe}.py")
    sys.argv = [file, *argv]
    with short_errors(f"run {recipe}", argv):  # what fails before the recipe's own `run_recipe`
        runpy.run_path(file, run_name="__main__")


@checked()
def convert(model: str, to: str, output_dir: str, revision: str | None = None) -> None:
    """Write a model as another library's class, or back, with a parity certificate beside it.

    Args:
        model: folder (of TinyBERT's authors too) or Hub id, or a .pth file of the authors of the masked autoencoder or
            of DETR.
        to: a class that needs no remote code: transformers' marian (post-norm) or pegasus (pre-norm) for a translation
            model, transformers' vit or timm for a classifier, transformers' deit for one with a distillation token,
            transformers' vit_mae or the names of mae_authors for a masked autoencoder, transformers' detr or the
            names of detr_authors for a detector, transformers' bert or distilbert (without segments) or the names of
            tinybert's authors for a BERT, transformers' gpt2 for a GPT; or back: tfm.
        output_dir: folder to make.
        revision: branch, tag or commit on the Hub.
    """
    from .conversion import convert as convert_model

    certificate = convert_model(model, to, output_dir, revision)
    differences = ", ".join(f"{name} {value:.2g}" for name, value in certificate["differences"].items())
    print(f"{output_dir}: largest difference of {differences} (tolerance {certificate['tolerance']:.2g})")


@checked()
def push(folder: str, repo_id: str, private: bool = False) -> None:
    """Upload a run's folder to the Hub: model, code, tokenizer, card and results.

    Args:
        folder: of a run.
        repo_id: user/name.
        private: make a new repository private.
    """
    from .hub.push import files_to_push
    from .hub.push import push as push_folder

    _, left_out = files_to_push(Path(folder))
    if left_out:
        print(f"not uploaded: {', '.join(left_out)}")
    print(push_folder(folder, repo_id, private).commit_url)


def doctor_detection(argv: list[str]) -> int:
    """Find out why AP would be 0 before a run starts: hf-tfm doctor detection --help.

    Args:
        argv: its command line.
    """
    from .doctor.detection import main as examine

    return examine(argv)


@checked()
def quickstart(output_dir: str = "runs/quickstart") -> None:
    """Train a model of every kind on data that needs no download, load and compare them, and look at them.

    Args:
        output_dir: folder of the translation run; those of the image runs have its name with an ending.
    """
    from .quickstart import quickstart as start

    start(output_dir)


def main(argv: list[str] | None = None) -> None:
    """Entry point of ``hf-tfm``.

    Args:
        argv: arguments; default, those of this process.

    Raises:
        SystemExit: with the exit status, see `command`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        if len(argv) < 2 or argv[1] in ("-h", "--help"):
            names = "\n  ".join(sorted(path.stem for path in recipes_folder().glob("*.py")))
            usage = f"usage: hf-tfm run RECIPE [options]\n\nrecipes:\n  {names}\n\nhf-tfm run RECIPE --help tells more"
            print(usage, file=sys.stdout if argv[1:] else sys.stderr)
            raise SystemExit(0 if argv[1:] else 2)
        run(argv[1], argv[2:])
    elif argv[:2] == ["doctor", "detection"]:
        raise SystemExit(run_command("doctor detection", doctor_detection, argv[2:]))
    else:
        with short_errors("", argv):
            path, function, given = parse(without_debug(argv))
        takes_code = "trust_remote_code" in option_names(function)
        if status := run_command(" ".join(path), lambda _: call(path, function, given), argv, takes_code):
            raise SystemExit(status)


def parse(argv: list[str]) -> tuple[list[str], Callable, dict[str, Any]]:
    """Command line -> command path, its function and the arguments given.

    Raises:
        SystemExit: the command line is not valid; status 2.
    """
    from .doctor.data import doctor_data
    from .evaluation import KINDS, evaluate

    # What each command is about stands first, without a name; everything else is an option.
    commands = {
        "run": (run, "recipe"),  # listed here; what follows the recipe's name is the recipe's own to read
        "evaluate": (evaluate, "model"),
        "convert": (convert, "model"),
        "push": (push, "folder", "repo_id"),
        "show": {
            "attention": (show_attention, "model", "image"),
            "detections": (show_detections, "model", "images"),
            "positions": (show_positions, "model"),
            "queries": (show_queries, "model", "image"),
            "reconstruction": (show_reconstruction, "model", "images"),
        },
        # "detection" is listed here and parses its arguments itself
        "doctor": {"data": (doctor_data, "dataset"), "detection": (doctor_detection, "argv")},
        "quickstart": (quickstart,),
    }
    description = f"{__doc__.split(chr(10))[0]} {DEBUG_HELP}."
    parser = OptionParser(prog="hf-tfm", description=description, allow_abbrev=False)
    functions = add_commands(parser, commands, kinds={evaluate: KINDS})
    values = parser.parse_args(argv, defaults=False)  # what is not given, each function knows itself
    path = [values.command]
    chosen = values[values.command]
    while "command" in chosen:
        path.append(chosen.command)
        chosen = chosen[chosen.command]
    return path, functions[tuple(path)], chosen.as_dict()


def option_names(function: Callable) -> set[str]:
    """Names of the options of a command."""
    from .evaluation import KINDS, evaluate

    functions = map(callable_of, KINDS.values()) if function is evaluate else [function]
    return {name for function in functions for name in inspect.signature(function).parameters}


def call(path: list[str], function: Callable, given: dict[str, Any]) -> int:
    """Call the function of a command and print its result; returns the exit status."""
    from .evaluation import lines
    from .training.run import require_model

    given = {name: with_homes(name, value) for name, value in given.items()}
    if path[0] == "show":
        for argument in filter(given.get, ("model", "beside")):
            require_model(argument, given[argument])
    result = function(**given)
    for line in lines(result) if isinstance(result, dict) else ():
        print(line)
    return result if isinstance(result, int) else 0


def with_homes(name: str, value: Any) -> Any:
    """A value of an option in which "~" is a home directory where it names files; see `values.PATHS`."""
    if isinstance(value, list):
        return [with_homes(name, one) for one in value]
    return expanded(name, value) if name in PATHS and isinstance(value, str) and value[:1] == "~" else value


def add_commands(
    parser: OptionParser,
    commands: dict,
    path: tuple[str, ...] = (),
    kinds: Mapping[Callable, Mapping[str, Callable]] | None = None,
) -> dict[tuple[str, ...], Callable]:
    """Give a parser a command for each function, with options from its signature and docstring.

    Args:
        commands: name -> (function, its positional arguments ...), or another such dict.
        path: commands before these.
        kinds: for a function that calls one of several, those by name: their options are its own.

    Returns:
        The functions by path of commands.
    """
    functions: dict[tuple[str, ...], Callable] = {}
    group = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, entry in commands.items():
        if isinstance(entry, dict):
            sub = OptionParser(description=f"{name}: {', '.join(entry)}", allow_abbrev=False)
            group.add_subcommand(name, sub, help=sub.description)
            functions |= add_commands(sub, entry, (*path, name), kinds)
        else:
            function, *positional = entry
            document = docstring_parser.parse(function.__doc__)
            about = {argument.arg_name: argument.description for argument in document.params}
            sub = OptionParser(description=document.short_description, allow_abbrev=False)
            parameters = inspect.signature(function).parameters
            for argument in positional:
                many = {"nargs": "+"} if parameters[argument].annotation == list[str] else {}
                optional = {} if parameters[argument].default is inspect.Parameter.empty else {"nargs": "?"}
                sub.add_argument(argument, type=str, help=about[argument], **many, **optional)
            if function in (kinds or {}):
                add_options_of_kinds(sub, kinds[function], set(positional))
            else:
                sub.add_function_arguments(function, skip=set(positional), fail_untyped=True)
            group.add_subcommand(name, sub, help=sub.description)
            functions[(*path, name)] = function
    return functions


def add_options_of_kinds(parser: OptionParser, kinds: Mapping[str, Callable], skip: set[str]) -> None:
    """Give a parser the options of several functions, grouped by who takes them.

    Args:
        kinds: functions by name; what the first that takes an option says of it is its help.
        skip: arguments to leave out.
    """
    takers: dict[str, list[str]] = {}
    for kind, function in kinds.items():
        for name in inspect.signature(callable_of(function)).parameters:
            takers.setdefault(name, []).append(kind)
    groups: dict[str, set[str]] = {}
    for name, kind in takers.items():
        groups.setdefault("all models" if len(kind) == len(kinds) else enumerated(kind), set()).add(name)
    for title, names in groups.items():
        function = callable_of(kinds[takers[next(iter(names))][0]])
        others = set(inspect.signature(function).parameters) - names
        group = parser.add_argument_group(title)
        add = group.add_class_arguments if isinstance(function, type) else group.add_function_arguments
        add(function, as_group=False, skip=others | skip, fail_untyped=True)


def callable_of(kind: Any) -> Callable:
    """The function, or class of arguments, whose parameters are the options of a kind of model."""
    return kind.EvaluationArguments if isinstance(kind, type) else kind


def enumerated(words: Sequence[str]) -> str:
    """Words with commas, and "and" before the last."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


if __name__ == "__main__":
    main()
