"""Train, evaluate, convert, export, publish and visualise Transformers.

hf-tfm COMMAND --help lists the options of a command.
"""

import argparse
import inspect
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import docstring_parser

from .command import DEBUG_HELP, run_command, short_errors, without_debug
from .options import OptionParser
from .recipe_files import recipe_names, run
from .show import (
    show_attention,
    show_detections,
    show_forecast,
    show_positions,
    show_queries,
    show_reconstruction,
    show_scores,
)
from .values import PATHS, checked, expanded


@checked()
def convert(model: str, to: str, output_dir: str, revision: str | None = None) -> None:
    """Convert a model to another library's class, or back, with a parity certificate.

    Args:
        model: folder (also of TinyBERT's authors), Hub id, or .pth file of the authors of the masked autoencoder, DETR
            or Swin, or of torchvision's Swin.
        to: a class of transformers, timm or torchvision, or the weight names of a paper's authors, for instance vit,
            bert, timm or detr_authors (an unknown name is answered with the list of all); or back: tfm.
        output_dir: folder to create.
        revision: branch, tag or commit on the Hub.
    """
    from .conversion import convert as convert_model

    certificate = convert_model(model, to, output_dir, revision)
    differences = ", ".join(f"{name} {value:.2g}" for name, value in certificate["differences"].items())
    print(f"{output_dir}: largest difference of {differences} (tolerance {certificate['tolerance']:.2g})")
    for remark in certificate["remarks"]:
        print(remark)


@checked()
def export(
    model: str,
    to: str,
    output_dir: str | None = None,
    quantize: Literal["dynamic", "static"] | None = None,
    calibration_data: str | None = None,
    revision: str | None = None,
) -> None:
    """Export a model to ONNX, OpenVINO or ExecuTorch, with a certificate that the outputs are the same.

    Args:
        model: folder or Hub id.
        to: onnx, openvino or executorch; needs the extra of hf-tfm of that name.
        output_dir: folder to create; default, the name of the model and the format, joined by "-".
        quantize: 8-bit weights, with activations quantised while the model runs (dynamic) or with ranges from
            ``calibration_data`` (static).
        calibration_data: for static quantisation, a text file with an example a line, or a folder of images.
        revision: branch, tag or commit on the Hub.
    """
    from .export import export as export_model

    folder = output_dir or f"{Path(model).resolve().name if Path(model).exists() else Path(model).name}-{to}"
    certificate = export_model(model, to, folder, quantize, calibration_data, revision)
    differences = ", ".join(f"{name} {value:.2g}" for name, value in certificate["differences"].items())
    limit = "quantised" if certificate["tolerance"] is None else f"tolerance {certificate['tolerance']:.2g}"
    print(f"{folder}: largest difference of {differences} ({limit})")
    if "same_predictions" in certificate:
        print(f"share of equal predictions: {certificate['same_predictions']:.4g}")


@checked()
def push(folder: str, repo_id: str, private: bool = False) -> None:
    """Upload a run's folder to the Hub: model, code, tokenizer, card and results.

    Args:
        folder: folder of a run.
        repo_id: user/name.
        private: create a new repository as private.
    """
    from .hub.push import files_to_push
    from .hub.push import push as push_folder

    _, left_out = files_to_push(Path(folder))
    if left_out:
        print(f"not uploaded: {', '.join(left_out)}")
    print(push_folder(folder, repo_id, private).commit_url)


def doctor_detection(argv: list[str]) -> int:
    """Find the causes of an AP of 0 before a run starts: hf-tfm doctor detection --help.

    Args:
        argv: arguments of the command.
    """
    from .doctor.detection import main as examine

    return examine(argv)


def doctor_launch(argv: list[str]) -> int:
    """Check processes, network, data, disks and memory of a launch: hf-tfm doctor launch --help.

    Args:
        argv: arguments of the command.
    """
    from .doctor.launch import main as examine

    return examine(argv)


def launch(argv: list[str]) -> int:
    """Start a recipe on this machine, or submit it to Slurm, Kubernetes or Hugging Face Jobs: hf-tfm launch --help.

    Args:
        argv: arguments of the command.
    """
    from .launch.main import main as start

    return start(argv)


@checked()
def quickstart(output_dir: str = "runs/quickstart") -> None:
    """Train a model of every kind on data that needs no download, reload, compare and visualise them.

    Args:
        output_dir: folder of the translation run; the other runs append a suffix to its name.
    """
    from .quickstart import quickstart as start

    start(output_dir)


def main(argv: list[str] | None = None) -> None:
    """Run ``hf-tfm``.

    Args:
        argv: arguments; by default those of this process.

    Raises:
        SystemExit: with the exit status, see `command`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["run"]:
        if len(argv) < 2 or argv[1] in ("-h", "--help"):
            names = "\n  ".join(recipe_names())
            usage = (
                f"usage: hf-tfm run RECIPE [options]\n\nrecipes:\n  {names}\n\n"
                "hf-tfm run RECIPE --help lists the options of a recipe"
            )
            print(usage, file=sys.stdout if argv[1:] else sys.stderr)
            raise SystemExit(0 if argv[1:] else 2)
        run(argv[1], argv[2:])
    elif argv[:1] == ["launch"]:
        raise SystemExit(run_command("launch", launch, argv[1:]))
    elif argv[:2] == ["doctor", "detection"]:
        raise SystemExit(run_command("doctor detection", doctor_detection, argv[2:]))
    elif argv[:2] == ["doctor", "launch"]:
        raise SystemExit(run_command("doctor launch", doctor_launch, argv[2:]))
    else:
        with short_errors("", argv):
            path, function, given = parse(without_debug(argv))
        takes_code = "trust_remote_code" in option_names(function)
        if status := run_command(" ".join(path), lambda _: call(path, function, given), argv, takes_code):
            raise SystemExit(status)


def parse(argv: list[str]) -> tuple[list[str], Callable, dict[str, Any]]:
    """Parse arguments to a command path, its function and the given options.

    Raises:
        SystemExit: the arguments are invalid; status 2.
    """
    from .compress import LEFT_OUT, CompressArguments, ReportArguments, compress, kinds_of, show_compression
    from .doctor.data import doctor_data
    from .tasks.evaluation import evaluate
    from .tasks.registry import evaluated_tasks

    # The objects of a command are positional arguments; everything else is an option.
    commands = {
        "run": (run, "recipe"),  # listed for --help; `main` passes the arguments after the name to the recipe
        "evaluate": (evaluate, "model"),
        "convert": (convert, "model"),
        "compress": (compress, "model"),
        "export": (export, "model"),
        "push": (push, "folder", "repo_id"),
        "launch": (launch, "argv"),  # listed for --help; parses its own arguments
        "show": {
            "attention": (show_attention, "model", "image"),
            "compression": (show_compression, "models"),
            "detections": (show_detections, "model", "images"),
            "forecast": (show_forecast, "model"),
            "positions": (show_positions, "models"),
            "queries": (show_queries, "model", "image"),
            "reconstruction": (show_reconstruction, "model", "images"),
            "scores": (show_scores, "runs"),
        },
        # "detection" and "launch" are listed for --help and parse their own arguments
        "doctor": {
            "data": (doctor_data, "dataset"),
            "detection": (doctor_detection, "argv"),
            "launch": (doctor_launch, "argv"),
        },
        "quickstart": (quickstart,),
    }
    description = f"{' '.join(__doc__.split())} {DEBUG_HELP}."
    parser = OptionParser(prog="hf-tfm", description=description)
    kinds = {
        evaluate: ({one.kind: one.EvaluationArguments for one in evaluated_tasks()}, ()),
        compress: (kinds_of(CompressArguments), LEFT_OUT),
        show_compression: (kinds_of(ReportArguments), LEFT_OUT),
    }
    functions = add_commands(parser, commands, argv, kinds=kinds)
    values = parser.parse_args(argv, defaults=False)  # functions have their own defaults
    path = [values.command]
    chosen = values[values.command]
    while "command" in chosen:
        path.append(chosen.command)
        chosen = chosen[chosen.command]
    return path, functions[tuple(path)], chosen.as_dict()


def option_names(function: Callable) -> set[str]:
    """Return the names of the options of a command."""
    from .compress import compress, show_compression
    from .tasks.evaluation import evaluate
    from .tasks.registry import evaluated_tasks

    takes_any = function in (evaluate, compress, show_compression)
    functions = [one.EvaluationArguments for one in evaluated_tasks()] if takes_any else [function]
    return {name for function in functions for name in inspect.signature(function).parameters}


def call(path: list[str], function: Callable, given: dict[str, Any]) -> int:
    """Call the function of a command, print its result, and return the exit status."""
    from .hub.loading import require_model
    from .tasks.evaluation import lines

    given = {name: with_homes(name, value) for name, value in given.items()}
    if path[0] == "show":
        for argument in filter(given.get, ("model", "beside")):
            require_model(argument, given[argument])
    result = function(**given)
    for line in lines(result) if isinstance(result, dict) else ():
        print(line)
    return result if isinstance(result, int) else 0


def with_homes(name: str, value: Any) -> Any:
    """Expand "~" to a home directory in the value of an option that may name files; see `values.PATHS`."""
    if isinstance(value, list):
        return [with_homes(name, one) for one in value]
    return expanded(name, value) if name in PATHS and isinstance(value, str) and value[:1] == "~" else value


def add_commands(
    parser: OptionParser,
    commands: dict,
    argv: Sequence[str],
    path: tuple[str, ...] = (),
    kinds: Mapping[Callable, tuple[Mapping[str, Callable], Collection[str]]] | None = None,
) -> dict[tuple[str, ...], Callable]:
    """Add a subcommand for each function, with options from its signature and docstring.

    Args:
        commands: name -> (function, its positional arguments ...), or another such dict.
        argv: arguments to parse; commands that do not occur there get no options, because adding them takes 0.2 s.
        path: parent commands.
        kinds: for a function that dispatches to one of several functions, these by name, and options of theirs that it
            lacks; the others are added.

    Returns:
        The functions by command path.
    """
    functions: dict[tuple[str, ...], Callable] = {}
    group = parser.add_subcommands(dest="command", metavar="COMMAND")
    for name, entry in commands.items():
        if isinstance(entry, dict):
            sub = OptionParser(description=f"{name}: {', '.join(entry)}")
            group.add_subcommand(name, sub, help=sub.description)
            functions |= add_commands(sub, entry, argv, (*path, name), kinds)
        else:
            function, *positional = entry
            document = docstring_parser.parse(function.__doc__)
            about = {argument.arg_name: argument.description for argument in document.params}
            parameters = inspect.signature(function).parameters
            usage, sub = ["hf-tfm", *path, name], OptionParser(description=document.short_description)
            for argument in positional:
                is_list = parameters[argument].annotation == list[str]
                optional = parameters[argument].default is not inspect.Parameter.empty
                how = {"nargs": "+" if is_list else "?"} if is_list or optional else {}
                sub.add_argument(argument, type=str, help=about[argument], **how)
                usage.append(f"[{argument.upper()}]" if optional else argument.upper() + " ..." * is_list)
            sub.usage = " ".join([*usage, "[--OPTION VALUE ...]"])
            if name in argv and function in (kinds or {}):
                versions, left_out = kinds[function]
                add_options_of_kinds(sub, versions, {*left_out, *positional})
            elif name in argv:
                add_options(sub, function, set(positional))
            group.add_subcommand(name, sub, help=sub.description)
            functions[(*path, name)] = function
    return functions


def add_options_of_kinds(parser: OptionParser, kinds: Mapping[str, Callable], skip: set[str]) -> None:
    """Add the options of several functions to a parser, grouped by the functions that have them.

    Args:
        kinds: functions by name; if the help of an option differs between them, all versions are shown.
        skip: arguments to leave out.
    """
    options: dict[str, dict[str, argparse.Action]] = {}  # by name and kind
    for kind, function in kinds.items():
        own = OptionParser()
        add_options(own, function, skip)
        for action in own._actions:
            if action.dest in inspect.signature(function).parameters:
                options.setdefault(action.dest, {})[kind] = action
    groups: dict[str, set[str]] = {}
    for name, own in options.items():
        groups.setdefault("all models" if len(own) == len(kinds) else enumerated(list(own)), set()).add(name)
    for title, names in groups.items():
        function = kinds[next(iter(options[next(iter(names))]))]
        add_options(parser.add_argument_group(title), function, skip | options.keys() - names)
    for action in parser._actions:
        versions: dict[str, list[str]] = {}
        for kind, version in options.get(action.dest, {}).items():
            versions.setdefault(version.help or "", []).append(kind)
        if len(versions) > 1:
            action.help = "; ".join(f"{enumerated(own)}: {text.rstrip('.')}" for text, own in versions.items())
            if len({str(version.default) for version in options[action.dest].values()}) > 1:
                action.default = None


def add_options(group: Any, function: Callable, skip: set[str]) -> None:
    """Add the parameters of a function or argument class to a group of options."""
    add = group.add_class_arguments if isinstance(function, type) else group.add_function_arguments
    add(function, as_group=False, skip=skip & inspect.signature(function).parameters.keys(), fail_untyped=True)


def enumerated(words: Sequence[str]) -> str:
    """Join words with commas, and "and" before the last."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


if __name__ == "__main__":
    main()
