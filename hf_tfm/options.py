"""Parse command-line arguments and YAML files, with one-line errors: option, value, and valid values.

arguments or a YAML file, argument dataclass -> checked, or a ValueError, before jsonargparse parses them
"""

import argparse
import ast
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from itertools import zip_longest
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, NoReturn, Union, get_args, get_origin

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser, DefaultHelpFormatter

from .arguments import ModelArguments
from .command import DEBUG_HELP
from .values import closest, conform, expected, hints_of, literals, one_line, shown

LARGEST_FILE = 1_000_000  # bytes; a typical file of options has a few hundred
MOST_VALUES = 10_000  # with aliases expanded
MOST_DIGITS = 100  # of an integer; Python reads none of more than 4,300
DEEPEST = 20  # nesting levels of mappings and lists
# Renamed options: the error for an old name suggests the new one.
RENAMED = {
    "num_steps": "max_steps",
    "num_epochs": "num_train_epochs",
    "log_steps": "logging_steps",
    "best_metric": "metric_for_best_model",
    "patience": "early_stopping_patience",
    "keep_checkpoints": "save_total_limit",
    "trackers": "report_to",
    "num_workers": "dataloader_num_workers",
    "schedule": "lr_scheduler_type",
    "compile": "torch_compile",
    "precision": "mixed_precision",
    "layer_decay": "layer_wise_lr_decay",
    "drop_after": "lr_drop_ratio",
    "mask_share": "mlm_probability",
    "init_from": "model_name_or_path",
    "dataset": "dataset_name",
}
# Options of other trainers that this package lacks: their replacement.
ELSEWHERE = {
    "per_device_train_batch_size": "batch_size is the number of samples of one optimizer step over all processes, "
    "which makes a run independent of the hardware; micro_batch_size limits how many one process computes at once",
    "gradient_accumulation_steps": "batch_size is the number of samples of one optimizer step, and micro_batch_size "
    "how many of them one process computes at once: accumulation follows from the two",
    "per_device_eval_batch_size": "evaluation uses batch_size and micro_batch_size",
}
# Arguments that had the name of another one.
RENAMED_TWICE = {"dataset_name": "dataset_config"}
PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "str", "int", "float", "bool", "null", "merge")}


def renamed(values: Any) -> Any:
    """Return arguments that an earlier version recorded, a JSON value, under their names of today."""
    if isinstance(values, list):
        return [renamed(value) for value in values]
    if not isinstance(values, dict):
        return values
    names = {**RENAMED, **(RENAMED_TWICE if "dataset" in values else {})}
    return {names.get(name, name): renamed(value) for name, value in values.items()}


class Loader(yaml.SafeLoader):
    """Loader of plain YAML values, with numbers as in jsonargparse: 1e-3 is a number, and a date is a string."""


Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":float"))]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:(?:\d[\d_]*\.[\d_]*|\.\d[\d_]*)(?:[eE][-+]?\d+)?|\d[\d_]*[eE][-+]?\d+|\.inf|\.Inf|\.INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


class PlainParser(argparse.ArgumentParser):
    """argparse parser with one-line errors on standard error."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2 and ``PROG: MESSAGE``."""
        self.exit(2, f"{self.prog}: {one_line(message)}\n")


class OptionHelp(DefaultHelpFormatter):
    """Help of options: name, type or choices, description, and default if there is one."""

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        hint = getattr(action, "_typehint", None)
        return super()._get_default_metavar_for_optional(action) if hint is None else type_name(hint)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        names = [name for name in action.option_strings if not name.endswith("+")]  # --NAME+ appends to a list
        if not names or getattr(action, "_typehint", None) is None:
            return super()._format_action_invocation(action)
        return f"{', '.join(names)} {self._format_args(action, self._get_default_metavar_for_optional(action))}"

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.dest == "print_config":
            return "print the options as YAML and exit; =skip_default omits those with their default"
        is_complete = getattr(action, "_jsonargparse_preexpanded_help", False)
        if is_complete or getattr(action, "_typehint", None) is None or not action.option_strings:
            return action.help or ""
        text, default = action.help or "", action.default
        if action.required:
            return f"{text} (required)"
        if default in (None, argparse.SUPPRESS) or (isinstance(default, (list, dict)) and not default):
            return text
        return f"{text} (default: {as_word(default)})".lstrip()


class OptionParser(ArgumentParser):
    """jsonargparse parser with one-line errors on standard error, without the usage of forty options."""

    def __init__(self, *args: Any, **options: Any):
        # Without abbreviations, a misspelled option cannot match another.
        super().__init__(*args, formatter_class=OptionHelp, allow_abbrev=False, **options)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with status 2 and ``PROG: MESSAGE``."""
        *_, parser = self.chosen()
        name = " ".join(word for word in parser.prog.split() if word != "[options]")
        self.exit(2, f"{name}: {one_line(self.explained(message))}\n")

    def explained(self, message: str) -> str:
        """Rephrase an error of argparse or jsonargparse in terms of the option, its value and the valid values."""
        parsers = list(self.chosen())
        if found := re.search(r"unrecognized arguments: (\S+)", message, re.IGNORECASE):
            word = found[1].split("=")[0]
            if not word.startswith("-"):
                return f"expected an option, --NAME VALUE, got {shown(word)}"
            known = [option for parser in parsers for action in parser._actions for option in action.option_strings]
            return unknown(word, known)
        if found := re.search(r'Parser key "([^"]+)"', message):
            value = re.search(r"Got value: (.*?)(?:\\n|\n|$)", message) or re.search(r"Given value: (.*)", message)
            value = value or re.search(r"Exceeds the limit .*value has (\d+ digits)", message)
            for parser in parsers:
                for action in parser._actions:
                    hint = getattr(action, "_typehint", None)
                    if value and hint is not None and found[1].endswith(action.dest):
                        return f"{action.dest} must be {expected(hint)}, got {shown(value[1].strip())}"
        if found := re.search(r"argument (?:-\S+/)?--(\S+): expected (?:one|at least one) argument", message):
            return f"--{found[1]} needs a value"
        if found := re.search(r"the following arguments are required: (.*)", message):
            names = [name.rpartition(".")[2] for name in found[1].split(", ")]
            return f"{' and '.join(names)} must be given"
        if found := re.search(r"invalid choice: (.*?) \(choose from (.*)\)", message):
            word, known = found[1].strip("'"), [name.strip("'") for name in found[2].split(", ")]
            return f"{shown(word)} is not a command; the commands are {', '.join(known)}{closest(word, known)}"
        if found := re.search(r"to be one of \{(.*)\}, but it was not provided", message):
            return f"a command must be given, one of {found[1].replace(',', ', ')}"
        return message

    def chosen(self) -> Iterator[ArgumentParser]:
        """Yield this parser, and those of the subcommands in the arguments."""
        yield self
        words = getattr(self, "args", None) or []
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                for i, word in enumerate(words):
                    if isinstance(sub := action.choices.get(word), OptionParser):
                        sub.args = words[i + 1 :]
                        yield from sub.chosen()
                        return


def load_yaml(text: str, name: str) -> Any:
    """Parse YAML text to plain Python values.

    Args:
        name: name of the file or option, for errors.

    Raises:
        ValueError: it is invalid YAML, or has a tag, a duplicate key or too many values; the error names the line.
    """
    try:
        node = yaml.compose(text, Loader)
        if node is None:
            return None
        check_nodes(node, name)
        return yaml.load(text, Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ValueError(f"{name}{where}: invalid YAML: {one_line(reason)}") from error
    except RecursionError as error:
        raise ValueError(f"{name}: lists and mappings are nested more than {DEEPEST} levels deep") from error


def check_nodes(root: yaml.Node, name: str) -> None:
    """Refuse a YAML tree with tags or duplicate keys, or one that is too large; see `load_yaml`."""
    todo, count = [(root, 0)], 0
    while todo:
        node, depth = todo.pop()
        count, line = count + 1, node.start_mark.line + 1
        if node.tag not in PLAIN:
            raise ValueError(f"{name}, line {line}: the tag {shown(node.tag)} is not allowed: write plain values")
        if depth > DEEPEST:
            raise ValueError(f"{name}, line {line}: lists and mappings are nested more than {DEEPEST} levels deep")
        if count > MOST_VALUES:
            raise ValueError(f"{name}: more than {MOST_VALUES:,} values with aliases expanded")
        if node.tag.endswith(":int") and len(node.value) > MOST_DIGITS:
            raise ValueError(
                f"{name}, line {line}: integers have at most 64 bits, got one of {len(node.value):,} digits"
            )
        if isinstance(node, yaml.SequenceNode):
            todo += [(item, depth + 1) for item in node.value]
        elif isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if value.tag.endswith(":int") and len(value.value) > MOST_DIGITS:
                    raise ValueError(
                        f"{name}, line {line}: {shown(key.value)} must be a 64-bit integer, got one of "
                        f"{len(value.value):,} digits"
                    )
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise ValueError(f"{name}, line {key.start_mark.line + 1}: duplicate key {shown(key.value)}")
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
                todo += [(key, depth + 1), (value, depth + 1)]


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options.

    Raises:
        ValueError: it cannot be read, is not text, not YAML (see `load_yaml`), or not a mapping of options.
    """
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise ValueError(f"--config {path} has {path.stat().st_size:,} bytes; the limit is {LARGEST_FILE:,}")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--config {path} is not a text file in UTF-8: {one_line(error)}") from error
    except OSError as error:
        raise ValueError(f"--config {path} cannot be read: {error.strerror}") from error
    values = load_yaml(text, f"--config {path}")
    if values is None:
        raise ValueError(f"--config {path} is empty: it must be a mapping of options to values")
    if not isinstance(values, dict):
        raise ValueError(f"--config {path} must be a mapping of options to values, got {shown(values)}")
    return values


def check_config(path: Path, kind: type) -> None:
    """Check a YAML file against an argument dataclass.

    Raises:
        ValueError: see `read_yaml`; or an option is unknown or has a value that its annotation does not allow.
    """
    for name, value in read_yaml(path).items():
        if "." in str(name):
            raise ValueError(f"--config {path}: {shown(name)} must be written as nested mappings, without a dot")
        if (hint := hint_of(kind, str(name))) is None:
            raise ValueError(f"--config {path}: {unknown(str(name), names_of(kind))}")
        try:
            conform(str(name), value, hint)
        except ValueError as error:
            raise ValueError(f"--config {path}: {error}") from error


def check_words(words: Sequence[str], kind: type) -> None:
    """Check arguments, --NAME VALUE or --NAME=VALUE, against an argument dataclass.

    Raises:
        ValueError: an option is unknown, or has no value or one that its annotation does not allow.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if name in ("-h", "--help", "--print_config"):
            if name != "--print_config":
                return  # help ignores all other arguments
            continue
        if not name.startswith("-"):
            raise ValueError(f"expected an option, --NAME VALUE, got {shown(word)}")
        if word == "--config":
            raise ValueError("--config needs a value, a YAML file or a preset")
        key = name.removeprefix("--").removesuffix("+")
        hint = hint_of(kind, key) if name.startswith("--") else None
        if hint is None:
            raise ValueError(unknown(name, [f"--{one}" for one in names_of(kind)]))
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise ValueError(f"{name} needs a value")
            value = rest.pop(0)
        if not name.endswith("+"):  # --NAME+ appends to a list
            check_word(key, value, hint)


def unknown(name: str, known: Sequence[str]) -> str:
    """Return the error for an unknown option: its new name, its replacement, or the closest known option.

    Args:
        name: as given, with or without "--".
        known: known options in the same form.
    """
    key = name.removeprefix("--")
    prefix = name.removesuffix(key)
    if (new := RENAMED.get(key)) and f"{prefix}{new}" in known:
        also = f"; the configuration of a data set is {prefix}dataset_config" if key == "dataset" else ""
        return f"{name} is now called {prefix}{new}{also}"
    if key in ELSEWHERE:
        return f"{name} is not an option: {ELSEWHERE[key]}"
    return f"{name if name.startswith('-') else shown(name)} is not an option{closest(name, known)}"


def check_word(name: str, word: str, hint: Any) -> None:
    """Check the text of a value; see `check_words`."""
    if admits_text(hint):
        conform(name, word, str)
        if "." in name and word[:1] in ("{", "["):  # which the parser reads as a mapping or a list in a group
            conform(name, load_yaml(word, name), hint)
        return
    if word in literals(hint):  # "no" is a choice of mixed_precision, but false in YAML
        return
    try:
        value = load_yaml(word, name)
    except ValueError:
        if word[:1] in ("{", "[") or not word.strip():
            raise
        value = word
    conform(name, value, hint)


def admits_text(hint: Any) -> bool:
    """Return True if an annotation allows any string."""
    return (
        hint is str
        or hint is Any
        or any(one is str for one in get_args(hint) if get_origin(hint) not in (list, tuple, dict))
    )


def names_of(kind: Any) -> list[str]:
    """Return the options of a dataclass, with nested ones as GROUP.NAME."""
    names = []
    for one in fields(kind):
        hint = hints_of(kind)[one.name]
        names += [one.name, *(f"{one.name}.{inner}" for inner in (names_of(hint) if is_dataclass(hint) else ()))]
    return names


def hint_of(kind: Any, name: str) -> Any:
    """Return the annotation of an option, GROUP.NAME for one in a group or a mapping; None if it is unknown."""
    hint: Any = kind
    for part in name.split("."):
        if is_dataclass(hint):
            hint = hints_of(hint).get(part) if part in {one.name for one in fields(hint)} else None
        else:
            options = (hint, *get_args(hint))
            hint = next((get_args(one)[1] for one in options if get_origin(one) is dict), None)
        if hint is None:
            return None
    return hint


def type_name(hint: Any) -> str:
    """Return the placeholder of a value in the help: INT, FLOAT, STR, MAPPING, choices, or VALUE for several types."""
    if choices := literals(hint):
        return choice_name(choices)
    hints = [
        one for one in (get_args(hint) if get_origin(hint) in (Union, UnionType) else [hint]) if one is not NoneType
    ]
    kind = get_origin(hints[0]) or hints[0]
    return "VALUE" if len(hints) > 1 else "MAPPING" if kind is dict else getattr(kind, "__name__", "value").upper()


def choice_name(choices: Iterable[Any]) -> str:
    """Return the placeholder of a value with these choices in the help."""
    return f"{{{','.join(map(str, choices))}}}"


def as_word(value: Any) -> str:
    """Return a default as a command line has it."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(as_word, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def groups_of(kind: type) -> dict[str, set[str]]:
    """Group the options of an argument dataclass by the class that adds them.

    Returns:
        {first line of the docstring of a class: names}, in the order of inheritance.
    """
    groups: dict[type, set[str]] = {base: set() for base in kind.__mro__ if is_dataclass(base)}
    for one in fields(kind):
        adds = [
            base
            for base in groups
            if one.name in vars(base).get("__annotations__", ()) and one.name in {own.name for own in fields(base)}
        ]
        groups[adds[-1]].add(one.name)
    return {
        (base.__doc__ or base.__name__).strip().split("\n")[0].rstrip("."): names
        for base, names in groups.items()
        if names
    }


def parse_arguments(kind: type, recipe: Path, argv: Sequence[str], command: str | None = None):
    """Parse command-line arguments and YAML to an argument dataclass.

    ``--config`` takes a file or the name of one of the recipe's presets; all other arguments override it, whatever
    their order. With ``--model_name_or_path``, what it says about a new model does not apply, see
    `ModelArguments.new_model_options`. ``--print_config`` prints the result instead of running it.

    Args:
        kind: argument dataclass of the recipe.
        recipe: file of the recipe; its presets are in ``presets/<recipe>/`` next to it.
        argv: arguments without the program name.

    Raises:
        SystemExit: an option is unknown or has an invalid value; the message names it.
    """
    parser = option_parser(kind, recipe, command or f"run {recipe.stem}")
    presets = recipe.parent / "presets" / recipe.stem
    configs, words = [], []
    rest = iter(argv)
    try:
        for word in rest:
            config = word.removeprefix("--config=") if word.startswith("--config=") else None
            config = next(rest, None) if word == "--config" else config
            if config is None:
                words.append(word)
            else:
                configs.append(preset_path(config, presets))
                check_config(Path(configs[-1]), kind)
        check_words(words, kind)
        if issubclass(kind, ModelArguments) and names_saved_model(words):
            configs = [yaml.safe_dump(kind.without_new_model(read_yaml(Path(config)))) for config in configs]
        values = parser.parse_args([*(f"--config={config}" for config in configs), *words]).as_dict()
        values.pop("config")
        return kind(**values)
    except ValueError as error:
        parser.error(str(error))


@cache
def option_parser(kind: type, recipe: Path, command: str) -> OptionParser:
    """Return the parser of a recipe's options; building it takes as long as parsing a command line."""
    name = f"hf-tfm {command}"
    parser = OptionParser(
        prog=name,
        usage=f"{name} [--config PRESET or FILE] [--OPTION VALUE ...]",
        description=recipe_summary(recipe),
        epilog=DEBUG_HELP,
    )
    presets = recipe.parent / "presets" / recipe.stem
    known = f", or a preset: {', '.join(preset_names(presets))}" if presets.is_dir() else ""
    parser.add_argument("--config", action=ActionConfigFile, metavar="NAME", help=f"YAML file of options{known}")
    parser.add_class_arguments(kind, as_group=False, fail_untyped=True, sub_configs=False)
    group_actions(parser, kind)
    choices = kind.choices() if issubclass(kind, ModelArguments) else {}
    for action in parser._actions:
        if action.dest in choices:
            action.metavar = choice_name(choices[action.dest])
    return parser


def names_saved_model(words: Sequence[str]) -> bool:
    """Return True if a command line has ``--model_name_or_path`` and its last value is not null."""
    values = ["null"]
    for word, following in zip_longest(words, words[1:], fillvalue=""):
        name, equals, value = word.partition("=")
        if name == "--model_name_or_path":
            values.append(value if equals else following)
    return values[-1] != "null"


def group_actions(parser: OptionParser, kind: type) -> None:
    """Group the options of an argument dataclass in the help, see `groups_of`.

    jsonargparse has no such groups; adding its options group by group would read the whole class for each of them.
    """
    plain = parser._optionals
    nested = parser._action_groups[2:]  # of options that are dataclasses themselves
    for title, names in groups_of(kind).items():
        parser._action_groups = [group for group in parser._action_groups if group not in nested]
        group = parser.add_argument_group(title)
        group._group_actions += [action for action in plain._group_actions if root(action) in names]
        within = [one for one in nested if root(one._group_actions[-1]) in names]
        parser._action_groups += within
        nested = [one for one in nested if one not in within]
        own = [action for action in parser._actions if root(action) in names]
        parser._actions = [*(action for action in parser._actions if action not in own), *own]
        plain._group_actions = [action for action in plain._group_actions if action not in own]


def root(action: argparse.Action) -> str:
    """Return the name of an option, or of the group that it belongs to."""
    return action.dest.split(".")[0]


def preset_path(name: str, presets: Path) -> str:
    """Return the file of a preset, or ``name`` itself if it is a file.

    Raises:
        ValueError: it is neither.
    """
    if Path(name).is_file():
        return name
    file = presets / f"{name}.yaml"
    if not name or not file.is_file():
        known = preset_names(presets)
        raise ValueError(
            f"--config {shown(name)} is neither a file nor a preset; presets: {', '.join(known)}{closest(name, known)}"
        )
    return str(file)


def preset_names(presets: Path) -> list[str]:
    """Return the names of the presets in a folder."""
    return sorted(path.stem for path in presets.glob("*.yaml"))


def recipe_summary(recipe: Path) -> str:
    """Return the first paragraph of a recipe's docstring; "" without one, and for a recipe of another package."""
    if not recipe.is_file():
        return ""
    return (ast.get_docstring(ast.parse(recipe.read_text())) or "").split("\n\n")[0]
