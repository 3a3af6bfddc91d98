"""Options of ``hf-tfm launch``, and the recipe with its arguments behind them, all checked before anything starts."""

import argparse
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import PurePosixPath
from typing import Any, Literal, get_args, get_origin

import docstring_parser
import torch
from huggingface_hub import JobHardware

from ..arguments import Arguments, TrainingArguments
from ..command import DEBUG_HELP, visible, without_debug
from ..options import PlainParser, check_word, choice_name, load_yaml, parse_arguments, type_name, unknown
from ..recipe_files import recipe_main, recipe_names
from ..training.trainer import Recipe
from ..values import closest, hints_of, literals, shown

DAY, HOUR, MINUTE = 86_400, 3_600, 60
UNITS = {"s": 1, "m": MINUTE, "h": HOUR, "d": DAY}
TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")
PORT = 29_500  # torchrun's default
# Options that only one kind of launcher has.
OWN = {
    "local": ("master",),
    "slurm": ("partition", "account", "qos", "setup"),
    "k8s": ("namespace", "runtime"),
    "jobs": ("flavor",),
}
SHARED = {  # options that some of them have
    "image": ("k8s", "jobs"),
    "volume": ("k8s", "jobs"),
    "time": ("slurm", "k8s", "jobs"),
    "cpus": ("local", "slurm", "k8s"),
    "grace": ("slurm", "k8s"),
}
DEFAULT_GRACE, DEFAULT_RUNTIME = 120, "torch-distributed"
# Names that all of them accept: Slurm's and Hugging Face's rules are weaker than those of Kubernetes (RFC 1123).
NAME = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")


@dataclass(kw_only=True)
class LaunchArguments(Arguments):
    """Where and how processes are started.

    Args:
        on: local runs the processes on this machine; slurm, k8s (a TrainJob of Kubeflow Trainer) and jobs (Hugging
            Face Jobs) submit a job.
        nodes: machines.
        gpus: GPUs of each node, one process for each; 0 trains on CPUs. Default: local, those of this machine; jobs,
            those of the flavor; otherwise 1.
        processes: processes of each node with gpus 0.
        strategy: ddp (a copy of the model on each GPU), fsdp2 (weights, gradients and optimizer states sharded over
            all GPUs) or hsdp (sharded within a node, copied between nodes).
        time: time limit, as 90m, 12h, 2d, HH:MM:SS or D-HH:MM:SS.
        name: name of the job; default, the recipe and the last part of output_dir.
        max_restarts: how often torchrun restarts the processes after one has failed; they resume from the last
            checkpoint.
        cpus: CPU cores of each node.
        grace: seconds before the time limit, or between SIGTERM and SIGKILL, in which the run saves its state; default
            120.
        master: local with several nodes: HOST or HOST:PORT of one of them; run the same command on each node.
        partition: Slurm partition.
        account: Slurm account.
        qos: Slurm quality of service.
        setup: shell commands that the Slurm script runs before the recipe, for instance "source .venv/bin/activate".
        image: container image in which hf-tfm is installed.
        volume: file system to mount, may be repeated: CLAIM:/PATH for k8s (a persistent volume claim),
            hf://buckets/USER/NAME:/PATH or hf://datasets/USER/NAME:/PATH for jobs.
        namespace: Kubernetes namespace.
        runtime: ClusterTrainingRuntime of the TrainJob; default torch-distributed.
        flavor: hardware of Hugging Face Jobs, for instance a10g-largex4.
        check: run `hf-tfm doctor launch` with the recipe's arguments in place of the recipe.
        yes: start or submit; otherwise print only.

    Raises:
        ValueError: a value is out of range, or options contradict each other.
    """

    on: Literal["local", "slurm", "k8s", "jobs"] = "local"
    nodes: int = 1
    gpus: int | None = None
    processes: int = 1
    strategy: Literal["ddp", "fsdp2", "hsdp"] = "ddp"
    time: str | None = None
    name: str | None = None
    max_restarts: int = 0
    cpus: int | None = None
    grace: int | None = None
    master: str | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    setup: str | None = None
    image: str | None = None
    volume: list[str] = field(default_factory=list)
    namespace: str | None = None
    runtime: str | None = None
    flavor: str | None = None
    check: bool = False
    yes: bool = False

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="gpus max_restarts",
            at_least_1="nodes processes cpus grace",
            at_most={"nodes": 100_000, "gpus": 64, "processes": 1024, "max_restarts": 1000, "cpus": 4096},
        )
        self.check_launcher()
        self.check_text()
        if self.on == "jobs":
            self.check_flavor()
        if self.gpus is None:
            self.gpus = torch.cuda.device_count() if self.on == "local" else 1
        self.check_size()
        self.check_mounts()

    def check_launcher(self) -> None:
        """Refuse options of another launcher, and require those that this one needs."""
        allowed = {**{name: (kind,) for kind, names in OWN.items() for name in names}, **SHARED}
        for name, kinds in allowed.items():
            if self.on not in kinds and getattr(self, name):
                raise ValueError(f"{name} is for --on {' or '.join(kinds)}, not {self.on}")
        if self.on in ("k8s", "jobs") and self.image is None:
            raise ValueError(f"image must be given with --on {self.on}: a container image with hf-tfm installed")
        if self.on == "jobs" and self.flavor is None:
            raise ValueError("flavor must be given with --on jobs, for instance a10g-large")
        if self.on == "jobs" and self.nodes > 1:
            raise ValueError(f"nodes must be 1 with --on jobs, which runs on a single machine, got {self.nodes}")
        if self.on == "local" and (self.nodes > 1) != (self.master is not None):
            raise ValueError(
                f"master must be given with several nodes and --on local, and only then, got nodes {self.nodes} and "
                f"master {shown(self.master)}"
            )

    def check_text(self) -> None:
        """Refuse values that would be read as something else in a script: line breaks, blanks and wrong times."""
        for name in ("partition", "account", "qos", "namespace", "runtime", "flavor", "image", "master"):
            value = getattr(self, name)
            if value is not None and not re.fullmatch(r"[\w./:@,+-]+", value, re.ASCII):
                raise ValueError(f"{name} must be a name without blanks and quotes, got {shown(value)}")
        if self.setup is not None and not self.setup.isprintable():
            raise ValueError(f"setup must be one line of shell commands, got {shown(self.setup)}")
        if self.name is not None and not NAME.fullmatch(self.name):
            raise ValueError(
                f"name must be at most 63 lower-case letters, digits and hyphens, the first and last no hyphen, got "
                f"{shown(self.name)}"
            )
        if self.seconds is not None:
            if not MINUTE <= self.seconds <= 365 * DAY:
                raise ValueError(f"time must be between a minute and a year, got {shown(self.time)}")
            if self.on == "slurm" and self.seconds <= self.save_seconds:
                raise ValueError(
                    f"time must exceed grace, the {self.save_seconds} seconds to save the state, got {self.time}"
                )
        if self.master is not None:
            port = self.master.rpartition(":")[2] if ":" in self.master else str(PORT)
            if not (port.isdecimal() and 0 < int(port) < 2**16):
                raise ValueError(f"master must be HOST or HOST:PORT, got {shown(self.master)}")

    def check_flavor(self) -> None:
        """Take the number of GPUs from the flavor, or refuse another one."""
        known = [one.value for one in JobHardware]
        if self.flavor not in known:
            raise ValueError(
                f"flavor must be one of {', '.join(known)}, got {shown(self.flavor)}{closest(self.flavor, known)}"
            )
        has = 0 if self.flavor.startswith("cpu-") else int((re.findall(r"x(\d+)$", self.flavor) or ["1"])[0])
        if self.gpus not in (None, has):
            raise ValueError(f"gpus must be {has}, those of flavor {self.flavor}, got {self.gpus}")
        self.gpus = has

    def check_size(self) -> None:
        """Refuse a strategy that this number of processes cannot have."""
        if self.gpus and self.processes > 1:
            raise ValueError(f"processes is for gpus 0; there is one process for each of the {self.gpus} GPUs")
        if self.strategy != "ddp" and not self.gpus:
            raise ValueError(f"strategy {self.strategy} needs GPUs, got gpus 0: on CPUs accelerate ignores it")
        if self.strategy == "hsdp" and (self.nodes < 2 or self.per_node < 2):
            raise ValueError(
                "strategy hsdp shards within a node and copies between nodes: it needs at least 2 nodes of 2 GPUs, "
                f"got {self.nodes} of {self.per_node}"
            )
        if self.strategy not in ("ddp", "hsdp") and self.world < 2:
            raise ValueError(f"strategy {self.strategy} needs at least 2 GPUs, got {self.world}")
        if self.on == "local" and self.nodes == 1 and self.yes and self.gpus > (has := torch.cuda.device_count()):
            raise ValueError(f"gpus must be at most the {has} of this machine, got {self.gpus}")

    def check_mounts(self) -> None:
        """Refuse volumes that are not SOURCE:/PATH."""
        pattern = r"hf://[\w./@-]+:(/[\w./-]+)(?::r[ow])?" if self.on == "jobs" else r"[a-z0-9.-]+:(/[\w./-]+)"
        for one in self.volume:
            if not re.fullmatch(pattern, one, re.ASCII):
                form = "hf://[TYPE/]USER/NAME:/PATH" if self.on == "jobs" else "CLAIM:/PATH"
                raise ValueError(f"volume must be {form} with --on {self.on}, got {shown(one)}")

    @property
    def per_node(self) -> int:
        """Processes of each node."""
        return self.gpus or self.processes

    @property
    def world(self) -> int:
        """Processes of all nodes."""
        return self.nodes * self.per_node

    @property
    def seconds(self) -> int | None:
        """Time limit in seconds.

        Raises:
            ValueError: it is written in another way.
        """
        if self.time is None:
            return None
        if found := re.fullmatch(r"(\d{1,9})([smhd])", self.time):
            return int(found[1]) * UNITS[found[2]]
        if (found := TIME.fullmatch(self.time)) and max(int(found[3]), int(found[4])) < 60:
            return int(found[1] or 0) * DAY + int(found[2]) * HOUR + int(found[3]) * MINUTE + int(found[4])
        raise ValueError(f"time must be like 90m, 12h, 2d, HH:MM:SS or D-HH:MM:SS, got {shown(self.time)}")

    @property
    def save_seconds(self) -> int:
        """Seconds in which the run saves its state."""
        return self.grace or DEFAULT_GRACE

    @property
    def mounts(self) -> list[tuple[str, str]]:
        """(source, path in the container) of each volume."""
        found = (re.fullmatch(r"(.+?):(/[^:]*)(?::r[ow])?", one) for one in self.volume)
        return [(one[1], one[2]) for one in found if one]


@dataclass(frozen=True)
class Launch:
    """What is to be launched.

    Args:
        options: where and how.
        recipe: name of the recipe.
        words: arguments of the recipe.
        args: the same, parsed.
        argv: the whole command line.
    """

    options: LaunchArguments
    recipe: str
    words: tuple[str, ...]
    args: TrainingArguments
    argv: tuple[str, ...] = ()

    @property
    def remark(self) -> str:
        """A line of comment with the command."""
        argv = [one for i, one in enumerate(self.argv) if one != "--yes" or i >= len(self.argv) - len(self.words)]
        return f"# {visible(shlex.join(['hf-tfm', 'launch', *argv]))}"

    @property
    def output_dir(self) -> str:
        """Folder that the run writes."""
        return str(getattr(self.args, self.args.folder_argument))

    @property
    def name(self) -> str:
        """Name of the job."""
        text = f"{self.recipe}-{PurePosixPath(self.output_dir).name}".lower()
        return self.options.name or re.sub(r"[^a-z0-9]+", "-", text)[:63].strip("-")

    def check_output(self) -> None:
        """Refuse a container that would take the results with it.

        Raises:
            ValueError: the output folder is in no volume.
        """
        if self.options.on not in ("k8s", "jobs") or self.options.check:
            return
        folder = PurePosixPath(self.output_dir)
        if not any(folder.is_relative_to(path) for _, path in self.options.mounts):
            raise ValueError(
                f"output_dir {self.output_dir} is in no volume, so it would be lost with the container: mount one "
                "with --volume and name an absolute path in it"
            )


def find_recipe(name: str) -> Recipe:
    """Return a recipe that trains.

    Raises:
        ValueError: there is no such recipe, or it trains nothing.
    """
    known = recipe_names()
    if name not in known:
        raise ValueError(f'there is no recipe "{name}"{closest(name, known)}; available: {", ".join(known)}')
    main = recipe_main(name)
    if not isinstance(main, Recipe):
        raise ValueError(f"{name} trains nothing, so that several processes are of no use: run it with hf-tfm run")
    return main


def parse_recipe(command: str, name: str, words: Sequence[str]) -> TrainingArguments:
    """Parse the arguments of a recipe.

    Args:
        command: for error messages, for instance "launch".

    Raises:
        ValueError: see `find_recipe`.
        SystemExit: an argument is invalid.
    """
    main = find_recipe(name)
    return parse_arguments(main.task_class.Arguments, main.path, words, f"{command} {name}")


def add_options(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add the fields of an argument dataclass to a parser: flags for booleans, repeatable options for lists."""
    about = {one.arg_name: one.description for one in docstring_parser.parse(kind.__doc__ or "").params}
    for one in fields(kind):
        hint, text = hints_of(kind)[one.name], " ".join((about[one.name] or "").split()).replace("%", "%%")
        if hint is bool:
            parser.add_argument(f"--{one.name}", action="store_true", default=None, help=text)
            continue
        if choices := literals(hint):
            text += f" (default: {one.default})"
        many = {"action": "append"} if get_origin(hint) is list else {}
        metavar = choice_name(choices) if choices else type_name(get_args(hint)[0] if many else hint)
        parser.add_argument(f"--{one.name}", metavar=metavar, help=text, **many)


def typed(kind: type, given: dict[str, Any]) -> dict[str, Any]:
    """Convert the values of a command line to the types of an argument dataclass.

    Raises:
        ValueError: a value is of another type.
    """
    values = {}
    for name, value in given.items():
        hint = hints_of(kind)[name]
        if isinstance(value, str):
            check_word(name, value, hint)
            value = value if str in (hint, *get_args(hint)) or literals(hint) else load_yaml(value, name)
        values[name] = value
    return values


def split_words(argv: Sequence[str], kind: type) -> tuple[list[str], list[str]]:
    """Split a command line before the recipe: the first word that is neither an option nor the value of one."""
    flags = {f"--{one.name}" for one in fields(kind) if hints_of(kind)[one.name] is bool} | {"-h", "--help"}
    i = 0
    while i < len(argv) and argv[i].startswith("-"):
        i += 1 if argv[i] in flags or "=" in argv[i] else 2
    return list(argv[:i]), list(argv[i:])


def parse_own(
    command: str, kind: type, argv: Sequence[str], description: str
) -> tuple[PlainParser, dict[str, Any], str, list[str]]:
    """Parse ``[--OPTION VALUE ...] RECIPE [--ARGUMENT VALUE ...]``.

    Args:
        kind: dataclass of the options before the recipe.

    Returns:
        The parser, the options given, the recipe and its arguments.
    """
    parser = PlainParser(
        prog=f"hf-tfm {command}",
        usage="%(prog)s [--OPTION VALUE ...] RECIPE [--ARGUMENT VALUE ...]",
        description=description,
        epilog=f"Arguments after RECIPE are those of hf-tfm run RECIPE. {DEBUG_HELP}.",
        allow_abbrev=False,
    )
    add_options(parser, kind)
    own, rest = split_words(without_debug(argv), kind)
    values, extra = parser.parse_known_args(own)
    if extra:
        parser.error(unknown(extra[0].partition("=")[0], [f"--{one.name}" for one in fields(kind)]))
    if not rest:
        parser.error(f"RECIPE must be given, one of {', '.join(recipe_names())}")
    return parser, {name: value for name, value in vars(values).items() if value is not None}, rest[0], rest[1:]


def parse(argv: Sequence[str]) -> Launch:
    """Parse the arguments of ``hf-tfm launch``.

    Raises:
        SystemExit: an option or an argument of the recipe is invalid; status 2.
    """
    about = "Start a recipe on this machine, or submit it to Slurm, Kubernetes or Hugging Face Jobs."
    parser, given, recipe, words = parse_own("launch", LaunchArguments, argv, about)
    try:
        options = LaunchArguments(**typed(LaunchArguments, given))
        launch = Launch(options, recipe, tuple(words), parse_recipe("launch", recipe, words), tuple(argv))
        launch.check_output()
    except ValueError as error:
        parser.error(str(error))
    return launch
