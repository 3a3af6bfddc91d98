"""Check a launch on all of its processes before a run: ``hf-tfm doctor launch``.

    arguments -> connected -> each process examines itself -> reports gathered on all -> checks -> table of the first

Start it as the run will be started: ``hf-tfm launch --check ...`` does. A check is a function of the `Case` that
returns one or more `Finding`s; add new ones to one of the lists below. Nothing that a process does alone may raise:
the others would wait for it.
"""

import hashlib
import math
import os
import shutil
import socket
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, gather_object
from datasets.config import HF_DATASETS_CACHE

from ..arguments import Arguments, TrainingArguments
from ..command import describe, say
from ..hub.results import collect_versions
from ..launch.options import find_recipe, parse_own, parse_recipe, typed
from ..launcher import create_accelerator
from ..memory import TRAINING, WEIGHT, machine_memory
from ..sharding import sharding_options
from ..tasks.base import Task
from ..training.loop import train_step
from ..training.session import checkpoints_to_come, prepare
from ..values import one_line
from .findings import Finding, failed, findings_of, graded, ok, save, skipped, warning

PAYLOAD = {True: 64 * 2**20, False: 8 * 2**20}  # bytes of a collective operation: with and without a GPU
ROUNDS = 5  # after one to warm up
VISIBLE_SECONDS = 5.0  # in which a file of another machine must appear
LEAST_FREE = 2**30  # bytes free on the disk of a cache
SLOWEST = 2.0  # a process this much slower than the median delays all
COPIED = 12  # bytes per parameter in host memory while a checkpoint is written: float32 weight and moments of Adam
FULL = 0.9  # fraction of the memory in use above which a run may fail later


@dataclass(kw_only=True)
class DoctorArguments(Arguments):
    """What the doctor does.

    Args:
        steps: training steps to run, for the estimates of memory and time; 0 skips them.
        json: file to write the report to.
    """

    steps: int = 3
    json: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(at_least_0="steps", at_most={"steps": 1000})
        if self.json and not Path(self.json).parent.is_dir():
            raise ValueError(f"json {self.json}: there is no folder {Path(self.json).parent}")


@dataclass
class Case:
    """What the checks read.

    Args:
        args: of the run.
        accelerator: of this process.
        connected: seconds until all processes were connected.
        ranks: report of each process, {name: value}.
        task: with its data, processor and model as far as they could be built.
        resolved: arguments with the learning rate of the run; None if the data cannot be read.
        steps_per_epoch, max_steps: of the run; None for a stream, and if unknown.
    """

    args: TrainingArguments
    accelerator: Accelerator
    connected: float
    ranks: list[dict[str, Any]] = field(default_factory=list)
    task: Task | None = None
    resolved: TrainingArguments | None = None
    steps_per_epoch: int | None = None
    max_steps: int | None = None

    @property
    def world(self) -> int:
        """Number of processes."""
        return self.accelerator.num_processes

    @property
    def hosts(self) -> dict[str, list[int]]:
        """{host: its ranks}."""
        found: dict[str, list[int]] = {}
        for rank, report in enumerate(self.ranks):
            found.setdefault(report["host"], []).append(rank)
        return found

    def gather(self, **values: Any) -> None:
        """Add values to the reports of all processes."""
        found = gather_object([values]) if self.world > 1 else [values]
        self.ranks = self.ranks or [{} for _ in found]
        for report, own in zip(self.ranks, found, strict=True):
            report.update(own)

    def differing(self, name: str) -> str:
        """Describe the first process whose value differs from that of most; "" if all are equal."""
        values = [str(report.get(name)) for report in self.ranks]
        usual = Counter(values).most_common(1)[0][0]
        for rank, value in enumerate(values):
            if value != usual:
                return f"{self.place(rank)} has {value}, others have {usual}"
        return ""

    def errors(self, name: str) -> list[str]:
        """Errors of the processes, each with its place."""
        return [f"{self.place(rank)}: {report[name]}" for rank, report in enumerate(self.ranks) if report.get(name)]

    def place(self, rank: int) -> str:
        """A process as messages name it."""
        return f"rank {rank} on {self.ranks[rank]['host']}"


# --- what each process does


def code_hash() -> str:
    """Hash of the package's source files."""
    root, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        found.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return found.hexdigest()[:12]


def examine_process(case: Case) -> None:
    """Report this process: host, device, versions, code and arguments."""
    device = case.accelerator.device
    case.gather(
        host=socket.gethostname(),
        device=str(device),
        gpu=torch.cuda.get_device_properties(device).name if device.type == "cuda" else None,
        versions=collect_versions(),
        code=code_hash(),
        arguments=hashlib.sha256(repr(case.args).encode()).hexdigest()[:12],
        cache_free=free_bytes(Path(HF_DATASETS_CACHE)),
        memory=torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine_memory(),
        host_memory=machine_memory(),
    )


def existing(folder: Path) -> Path:
    """Return the folder or its closest parent that exists."""
    folder = folder.expanduser().absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.is_dir())


def free_bytes(folder: Path) -> int:
    """Bytes free on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(existing(folder)).free


def examine_output(case: Case) -> None:
    """Write a file where the output folder will be, on the first process, and look for it on all."""
    place = existing(Path(getattr(case.args, case.args.folder_argument)))
    name, error = [f".hf-tfm-doctor-{uuid.uuid4().hex}"], None
    if case.accelerator.is_main_process:
        try:
            (place / name[0]).write_text("")
        except OSError as raised:
            error = f"{place}: {raised.strerror}"
    if case.world > 1:
        torch.distributed.broadcast_object_list(name)
    end = time.monotonic() + VISIBLE_SECONDS
    while not (seen := (place / name[0]).exists()) and error is None and time.monotonic() < end:
        os.listdir(place)  # makes a network file system look again
        time.sleep(0.05)
    case.gather(
        output_seen=seen, output_error=error, output_free=shutil.disk_usage(place).free, output_place=str(place)
    )
    if case.accelerator.is_main_process:
        with suppress(OSError):
            (place / name[0]).unlink()


def examine_collective(case: Case) -> None:
    """Time an all-reduce, and check its result."""
    if case.world == 1:
        return
    device = case.accelerator.device
    count = PAYLOAD[device.type == "cuda"] // 4
    seconds, right = [], True
    for _ in range(ROUNDS + 1):
        values = torch.full((count,), float(case.accelerator.process_index + 1), device=device)
        start = time.perf_counter()
        torch.distributed.all_reduce(values)
        right = right and values[0].item() == values[-1].item() == case.world * (case.world + 1) / 2
        seconds.append(time.perf_counter() - start)
    case.gather(reduced=right, reduce_seconds=sorted(seconds[1:])[ROUNDS // 2])


def examine_data(case: Case, task_class: type[Task]) -> None:
    """Load the data, and build processor and model, as the run will."""
    error, rows, start = None, None, time.monotonic()
    try:
        task = task_class(case.args, case.accelerator)
        task.splits = task.load_splits()
        rows = str(task.describe_data()["fingerprint"])
        task.processor = task.build_processor()
        task.model = task.build_model()
        case.task = task
    except Exception as raised:
        error = describe(raised)
    case.gather(data_error=error, data=rows, data_seconds=time.monotonic() - start)


def examine_steps(case: Case, count: int) -> None:
    """Run some training steps, without saving anything; measure their time and the memory in use."""
    error, task, accelerator = None, case.task, case.accelerator
    seconds, parameters = [], 0
    try:
        if task is None:
            raise ValueError("data and model are missing")
        task.prepare()
        loader = task.dataloader(task.args.train_split, training=True)
        task.begin_training(loader)
        case.steps_per_epoch = loader.steps_per_epoch()
        case.max_steps = task.args.max_steps or math.ceil(task.args.num_train_epochs * case.steps_per_epoch)
        case.resolved, _ = task.args.resolve(case.steps_per_epoch, case.max_steps)
        module = task.trained_module()
        parameters = sum(one.numel() for one in module.parameters())
        options = sharding_options(accelerator, task.args.fsdp)
        model, optimizer = prepare(accelerator, module, case.resolved, options)
        model.train()
        for i, micro_batches in enumerate(loader.epoch(0)):
            if i == count:
                break
            start = time.perf_counter()
            train_step(
                accelerator, task, model, optimizer, micro_batches, case.args.max_grad_norm
            ).gradient_norm.item()
            seconds.append(time.perf_counter() - start)
    except Exception as raised:
        error = describe(raised)
    on_gpu = accelerator.device.type == "cuda"
    used = torch.cuda.max_memory_reserved(accelerator.device) if on_gpu else psutil.Process().memory_info().rss
    later = sorted(seconds[1:] or seconds)  # the first one allocates and compiles
    case.gather(
        step_error=error, step_seconds=later[len(later) // 2] if later else None, used=used, parameters=parameters
    )


# --- checks


def world_size(case: Case) -> Iterator[Finding]:
    """All processes that the launcher started are connected, and each GPU has one."""
    shares = ", ".join(f"{len(ranks)} on {host}" for host, ranks in case.hosts.items())
    backend = case.accelerator.state.backend or "no backend"
    message = f"{case.world} connected in {case.connected:.1f} s, by {backend}: {shares}"
    places = [(report["host"], report["device"]) for report in case.ranks]
    shared = [
        f"{report['device']} of {report['host']}"
        for report in case.ranks
        if report["gpu"] and places.count((report["host"], report["device"])) > 1
    ]
    if shared:
        yield failed(f"several processes share {shared[0]}", "start one process for each GPU")
    elif len({len(ranks) for ranks in case.hosts.values()}) > 1:
        yield warning(message, "give all nodes equally many processes")
    else:
        yield ok(message)


def strategy(case: Case) -> Finding:
    """Sharding that was asked for is in force."""
    kind = case.accelerator.distributed_type.value
    for name, value in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DEEPSPEED")):
        if os.environ.get(name, "false").lower() in ("1", "true") and kind != value:
            return failed(f"{name} is set, but accelerate trains with {kind}", "on CPUs it ignores sharding: use GPUs")
    if kind == "DEEPSPEED":
        return failed("the recipes do not train with DeepSpeed", "--strategy fsdp2 shards the same states")
    return ok(f"{kind} on {case.ranks[0]['gpu'] or case.ranks[0]['device']}")


def versions(case: Case) -> Finding:
    """All processes have the same versions of Python and packages."""
    if told := case.differing("versions"):
        theirs = [report["versions"] for report in case.ranks]
        for name in sorted({name for one in theirs for name in one}):
            found = [one.get(name) for one in theirs]
            if len(set(found)) > 1:
                usual = Counter(found).most_common(1)[0][0]
                rank = next(i for i, value in enumerate(found) if value != usual)
                told = f"{case.place(rank)} has {name} {found[rank]}, others have {usual}"
                break
        return failed(told, "install the same environment everywhere, or use a container image")
    mine = case.ranks[0]["versions"]
    return ok(
        ", ".join(f"{name} {mine[name]}" for name in ("python", "torch", "transformers", "accelerate") if name in mine)
    )


def code(case: Case) -> Finding:
    """All processes run the same source code with the same arguments."""
    for name, remedy in (("code", "install the same version of hf-tfm everywhere"), ("arguments", "start all alike")):
        if told := case.differing(name):
            return failed(f"{name}: {told}", remedy)
    return ok(f"hash {case.ranks[0]['code']}")


def collective(case: Case) -> Finding:
    """Processes sum numbers correctly; with the bandwidth of the network between them."""
    if case.world == 1:
        return ok("one process exchanges nothing")
    if wrong := [case.place(rank) for rank, report in enumerate(case.ranks) if not report["reduced"]]:
        return failed(f"{wrong[0]} received a wrong sum", "check the network and NCCL settings")
    size = PAYLOAD[case.ranks[0]["gpu"] is not None]
    slowest = max(report["reduce_seconds"] for report in case.ranks)
    rate = size * 2 * (case.world - 1) / case.world / slowest
    return ok(f"all-reduce of {size / 2**20:.0f} MiB in {slowest * 1000:.1f} ms, bus bandwidth {rate / 1e9:.2f} GB/s")


def data(case: Case) -> Finding:
    """All processes read the same data, and can build processor and model."""
    if found := case.errors("data_error"):
        return failed(f"{found[0]}{others(found)}", "make data and models visible on all nodes, by the same paths")
    if told := case.differing("data"):
        return failed(f"fingerprints differ: {told}", "give all nodes the same files")
    slowest = max(report["data_seconds"] for report in case.ranks)
    return ok(f"equal fingerprints; read in {slowest:.1f} s by the slowest process")


def output(case: Case) -> Finding:
    """The first process can write output_dir."""
    if error := case.ranks[0]["output_error"]:
        return failed(f"output_dir cannot be written: {error}", "choose another folder, or change its permissions")
    blind = list(dict.fromkeys(report["host"] for report in case.ranks if not report["output_seen"]))
    if blind:
        return warning(
            f"{case.ranks[0]['output_place']} of {case.ranks[0]['host']} is not visible on {blind[0]}{others(blind)}",
            "use a shared folder, or start the first process on the same machine whenever the run is resumed",
        )
    return ok(f"{case.ranks[0]['output_place']} is writable, and visible on all nodes")


def disk(case: Case) -> Iterator[Finding]:
    """Checkpoints fit on the disk of output_dir, and data on that of the cache."""
    free, args = case.ranks[0]["output_free"], case.args
    if case.task is not None and case.max_steps:
        module = case.task.trained_module()
        size = sum(one.numel() * one.element_size() for one in module.parameters()) * (4 if args.ema_decay else 3)
        eval_steps = args.eval_steps or case.steps_per_epoch or case.max_steps
        needed = size * checkpoints_to_come(args, case.max_steps, eval_steps)
        message = f"checkpoints need {amount(needed)}, {amount(free)} are free"
        if needed > free:
            yield failed(message, "make room, or lower save_total_limit or average_checkpoints")
        else:
            yield ok(message)
    full = [(report["cache_free"], report["host"]) for report in case.ranks if report["cache_free"] < LEAST_FREE]
    if full:
        least, host = min(full)
        yield warning(f"{amount(least)} are free for {HF_DATASETS_CACHE} on {host}", "set HF_HOME to a larger disk")


def batch(case: Case) -> Iterator[Finding]:
    """Batch and learning rate are those that are meant, and every process has a part of each batch."""
    args, resolved = case.args, case.resolved
    if resolved is None:
        yield skipped("correct the data first")
        return
    size = getattr(args, "batch_size", None)
    whole = f"{size} samples" if size else f"{getattr(args, 'batch_tokens', '?')} tokens"
    limit = getattr(args, "micro_batch_size", None) or getattr(args, "micro_batch_tokens", None)
    share = (size or getattr(args, "batch_tokens", 0)) / case.world
    micro = math.ceil(share / limit) if limit else 1
    message = (
        f"{whole} a step, {share:.4g} on each of {case.world} processes, in {micro} micro-batch{'es' * (micro > 1)}"
    )
    if size and size < case.world:
        yield warning(f"{message}: {case.world - size} have nothing to do", "raise batch_size, or use fewer processes")
    elif size and size % case.world:
        yield warning(f"{message}: the shares differ", f"a multiple of {case.world} for batch_size uses all equally")
    else:
        yield ok(message)
    steps = case.max_steps or 0
    warmup = resolved.warmup(steps)
    per_epoch = f" of {case.steps_per_epoch} an epoch" if case.steps_per_epoch else ""
    told = f"{steps} steps{per_epoch}; {args.lr_scheduler_type} schedule, peak learning rate "
    yield ok(f"{told}{resolved.learning_rate:g} after {warmup} steps; neither depends on the number of processes")


def memory(case: Case) -> Finding:
    """Weights, gradients, optimizer states and activations fit in the memory of each device, and in that of each host
    also the copy that it holds while a checkpoint is written."""
    counted = max((report.get("parameters", 0) for report in case.ranks), default=0)
    if not counted:
        return skipped("correct the data first")
    local = max(len(ranks) for ranks in case.hosts.values())
    on_gpu = case.ranks[0]["gpu"] is not None
    sharded = case.args.fsdp or case.accelerator.distributed_type.value == "FSDP"
    shards = case.world if sharded else 1
    average = WEIGHT if case.args.ema_decay else 0
    states = counted * (TRAINING + average) / shards
    have = min(report["memory"] for report in case.ranks) / (1 if on_gpu else local)
    used = max(report["used"] for report in case.ranks)
    whose = "GPU" if on_gpu else "process"
    copy = counted * (COPIED + average)
    # Each process copies its shards if all can write them, else the main process copies everything.
    spread = shards > 1 and all(report["output_seen"] for report in case.ranks)
    needs = []
    for ranks in case.hosts.values():
        copies = copy * len(ranks) / case.world if spread else copy * (0 in ranks)
        beside = 0 if on_gpu else len(ranks)
        host = case.ranks[ranks[0]]["host_memory"]
        needs.append((host, copies, copies + beside * states, copies + beside * max(states, used)))
    host, copies, least, most = max(needs, key=lambda need: need[-1] / need[0])
    message = f"{counted / 1e6:.1f} M parameters: {amount(states)} of states for each process; {amount(used)} in "
    message += f"use after the steps, {amount(have)} for each {whose}; {amount(copies)} more on a host of "
    message += f"{amount(host)} for the copy while a checkpoint is written"
    tight = max(states, used) > FULL * have
    if tight or most > FULL * host:
        remedy = "lower micro_batch_size or micro_batch_tokens, or use --strategy fsdp2"
        return graded(states > have or least > host, message, remedy if tight else "use hosts with more memory")
    return ok(message)


def duration(case: Case) -> Iterator[Finding]:
    """Training steps work on all processes, none of which is much slower."""
    if found := case.errors("step_error"):
        yield failed(f"{found[0]}{others(found)}", "see the message; a run would fail with it")
        return
    seconds = [report.get("step_seconds") for report in case.ranks]
    if None in seconds or not case.max_steps:
        yield skipped("no training step was run")
        return
    usual, slowest = sorted(seconds)[len(seconds) // 2], max(seconds)
    total = timedelta(seconds=round(slowest * case.max_steps))
    message = f"{slowest:.3g} s a step: {total} for {case.max_steps} steps, without evaluations"
    if slowest > SLOWEST * usual:
        yield warning(
            f"{message}; {case.place(seconds.index(slowest))} is the slowest", "look for other work on that node"
        )
    else:
        yield ok(message)


def amount(count: float) -> str:
    """Format bytes in MB or GB."""
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def others(found: Sequence[str]) -> str:
    """Count the further ones of several messages."""
    return f" (and {len(found) - 1} more)" if len(found) > 1 else ""


# check(case): of the processes, which need no data; and of the run
OF_PROCESSES: tuple[Callable, ...] = (world_size, strategy, versions, code, collective, output)
OF_THE_RUN: tuple[Callable, ...] = (data, batch, disk, memory, duration)


# --- the command


def connect(args: TrainingArguments) -> tuple[Accelerator, float]:
    """Connect this process with the others; return the accelerator and the seconds it took.

    Raises:
        RuntimeError, ValueError: they cannot be reached.
    """
    start = time.monotonic()
    timeout = timedelta(seconds=args.ddp_timeout)
    accelerator = create_accelerator(
        mixed_precision=args.mixed_precision,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timeout),
            DistributedDataParallelKwargs(broadcast_buffers=False),
        ],
    )
    accelerator.wait_for_everyone()
    return accelerator, time.monotonic() - start


def examine(case: Case, task_class: type[Task], steps: int) -> Iterator[Finding]:
    """Run all checks, on all processes; yield the findings as they are made."""
    examine_process(case)
    examine_output(case)
    examine_collective(case)
    for check in OF_PROCESSES:
        yield from findings_of(check, case)
    examine_data(case, task_class)
    readable = not case.errors("data_error") and not case.differing("data")
    if readable:
        examine_steps(case, steps)
    for check in OF_THE_RUN if readable else (data,):
        yield from findings_of(check, case)


def parse(argv: Sequence[str]) -> tuple[DoctorArguments, str, TrainingArguments]:
    """Return the doctor's own options, the recipe and its arguments.

    Raises:
        SystemExit: an option is invalid; status 2.
    """
    about = "Check processes, network, data, disks and memory of a launch. Start it as the run will be started."
    parser, given, recipe, words = parse_own("doctor launch", DoctorArguments, argv, about)
    try:
        own = DoctorArguments(**typed(DoctorArguments, given))
        return own, recipe, parse_recipe("doctor launch", recipe, words)
    except ValueError as error:
        parser.error(str(error))


def main(argv: Sequence[str]) -> int:
    """Run the command; return 1 if a check failed, otherwise 0.

    Raises:
        RuntimeError: the processes cannot be connected.
        SystemExit: an option is invalid.
    """
    own, recipe, args = parse(argv)
    try:
        accelerator, seconds = connect(args)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise ValueError(
            f"rendezvous: the processes cannot be connected at {where}: {one_line(error)[:300]}"
        ) from error
    case = Case(args, accelerator, seconds)
    found: list[Finding] = []
    for finding in examine(case, find_recipe(recipe).task_class, own.steps):
        found.append(finding)
        accelerator.print("\n".join(finding.lines()), flush=True)
    broken = [finding for finding in found if finding.level == "failed"]
    if accelerator.is_main_process:
        if own.json:
            save(found, own.json, {"recipe": recipe, "arguments": list(argv)})
        names = list(dict.fromkeys(finding.check for finding in broken))
        warnings = sum(finding.level == "warning" for finding in found)
        print(f"failed: {', '.join(names) or 'nothing'}; warnings: {warnings}", flush=True)
        if broken:
            say(f"hf-tfm doctor launch: {broken[0].check}: {broken[0].message}")
    accelerator.end_training()
    return 1 if broken else 0
