"""Run a command: errors become one line on standard error and an exit status; ``--debug`` shows the traceback.

exception -> root cause -> one line that names the argument and the file -> standard error, exit status

Exit status: 0 success, 1 failure, 2 invalid arguments (as in argparse), 130 keyboard interrupt.
"""

import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

DEBUG_OPTION, DEBUG_VARIABLE = "--debug", "HF_TFM_DEBUG"
DEBUG_HELP = f"{DEBUG_OPTION} (or {DEBUG_VARIABLE}=1) prints the trace of an error instead of one line"

# Exceptions caused by user input. Others are reported as unexpected, because they are probably bugs.
USER_ERRORS = (ValueError, OSError, ImportError, MemoryError, FloatingPointError, EOFError)
# Libraries whose exceptions describe the data, file or option that they were given.
USER_ERROR_LIBRARIES = {
    *("argparse", "datasets", "fsspec", "huggingface_hub", "jsonargparse", "PIL", "pickle", "struct", "tarfile"),
    *("httpcore", "httpcore2", "httpx", "httpx2", "hf_xet"),
    *("pyarrow", "requests", "safetensors", "tokenizers", "urllib3", "yaml", "zipfile", "zlib", "_pickle"),
}
# Exceptions that only wrap the informative one.
WRAPPERS = {"DatasetGenerationError"}
LONGEST_LINE = 600

# Library messages that span many lines or name arguments that our commands lack: pattern -> replacement.
REWORDED: tuple[tuple[str, str], ...] = (
    (r"Repo id must be in the form.*?: '(.*?)'\.", '"{0}" is neither a local folder nor a repository name of the Hub'),
    (r"Repo id must use alphanumeric chars.*?: '(.*?)'\.", '"{0}" is neither a local folder nor a repository name'),
    (r"Unrecognized model in (\S+?)\. Should have", '"{0}" is not a model: its config.json has no known model_type'),
    (r"has model type `(.*?)` but Transformers does not", 'model type "{0}" is not known to transformers or hf-tfm'),
    (
        r"You need to have sentencepiece or tiktoken",
        "there is no tokenizer that can be loaded (tokenizer.json)",
    ),
    (
        r"You set `ignore_mismatched_sizes`",
        "the shapes of some weights differ from what config.json asks for; the report above lists them",
    ),
    (
        r"weights_only(?:=True)?[\s\S]*?[Uu]nsupported global[s]?:? (?:GLOBAL )?(\S+)",
        "not a file of plain tensors: it holds a pickled {0}, and pickled code is never run",
    ),
    (
        r"gloo/[\s\S]*?Timed out waiting (\d+)ms|Watchdog caught collective operation timeout",
        "another process has not answered within ddp_timeout: look for its error, or for a fault of the network",
    ),
    (
        r"gloo/[\s\S]*?(?:Connection (?:closed|reset|refused)|Broken pipe)|remote process exited",
        "another process has ended: look for its error; the same command resumes from the last checkpoint",
    ),
    (
        r"Name or service not known|failure in name resolution|Connection refused|ConnectError|ConnectTimeout",
        "the Hub cannot be reached: there is no connection",
    ),
    (r"Weights only load failed", "not a file of plain tensors, or a damaged one: pickled objects are not loaded"),
    (r"you tried to allocate (\d+) bytes", "out of memory: {0} bytes could not be allocated"),
    (r"out of memory\. Tried to allocate ([\d.]+ \w+)", "out of memory on the device: {0} could not be allocated"),
    (r"std::bad_alloc", "out of memory"),
    (
        r"Dataset scripts are no longer supported, but found (\S+)",
        '"{0}" is a dataset script, which is not supported',
    ),
    (
        r"Error while deserializing header: (.*)",
        "not a valid safetensors file, or a damaged one ({0})",
    ),
    (r"Failed to parse string: '(.*?)' as a scalar of type (\w+)", 'a column of type {1} contains the value "{0}"'),
)
REMOTE_CODE = re.compile(r"trust_remote_code|contains custom code which must be executed")
REMOTE_CODE_PLACE = re.compile(r"(?:repository|loading|model|from) `?([^\s`]+?)`? (?:contains|requires)")
# RuntimeErrors caused by input; others are probably bugs.
RUNTIME_CAUSES = re.compile(
    r"allocat|out of memory|bad_alloc|ignore_mismatched_sizes|[Ww]eights.only|Dataset scripts|size mismatch"
    r"|device string|device type|CUDA|cuda|DataLoader worker|PytorchStreamReader|Error\(s\) in loading state_dict"
    r"|gloo/|NCCL"
)
# Variable names under which library frames hold the model or file that they read.
PLACES = ("pretrained_model_name_or_path", "checkpoint_file", "resolved_config_file", "path_or_repo_id", "filename")
FILES = ("checkpoint_file", "resolved_config_file", "resolved_vocab_files", "path", "file", "filename", "f", "name")
WRITTEN = ("self", "output", "part", *FILES)  # variable names under which frames hold the file that they write
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}  # write errors that do not name the file
# Environment variables set by distributed launchers: name -> minimum.
LAUNCHER = {"WORLD_SIZE": 1, "RANK": 0, "LOCAL_WORLD_SIZE": 1, "LOCAL_RANK": 0}
MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
FLAGS = ("ACCELERATE_USE_CPU", "ACCELERATE_DEBUG_MODE", "ACCELERATE_DOWNCAST_BF16", "FORK_LAUNCHED")
FLAG_VALUES = ("1", "0", "true", "false", "yes", "no", "y", "n", "t", "f", "on", "off")


def run_command(
    name: str, function: Callable[[list[str]], int | None], argv: Sequence[str], code_option: bool = False
) -> int:
    """Run ``function`` with command-line arguments.

    Args:
        name: command as typed after "hf-tfm", for instance "run translation_train".
        function: takes the arguments without ``--debug`` and returns the exit status; None means 0.
        argv: arguments.
        code_option: True if the command has an option ``trust_remote_code`` that an error may recommend.

    Returns:
        The exit status.

    Raises:
        SystemExit: with the exit status, after an error.
    """
    with short_errors(name, argv, code_option):
        check_encoding(argv)
        status = function(without_debug(argv))
        if sys.stdout is not None:  # None if the shell closed it
            sys.stdout.flush()  # raises for a closed pipe here instead of at interpreter exit
    return status or 0


def check_encoding(words: Sequence[str]) -> None:
    """Refuse arguments that are not valid text, which could not be written to the files of a run.

    Raises:
        ValueError: names the argument.
    """
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{word.encode(errors='backslashreplace').decode()!r} is not text in the encoding of this shell: set "
                "LANG=C.UTF-8 or PYTHONUTF8=1"
            ) from error


def check_environment() -> None:
    """Refuse environment variables that make libraries fail, or wait for processes that were never started.

    Raises:
        ValueError: names the variable, its value and the remedy.
    """
    for name in FLAGS:
        value = os.environ.get(name)
        if value is not None and value.lower() not in FLAG_VALUES:
            raise ValueError(f'the environment variable {name} must be true or false, got "{value}": unset it')
    found: dict[str, int] = {}
    for name, least in LAUNCHER.items():
        value = os.environ.get(name)
        if value is None or (name == "LOCAL_RANK" and value == "-1"):  # accelerate's value for no rank
            continue
        if not (value.isascii() and value.isdecimal() and least <= int(value) < 2**31):
            raise ValueError(
                f'the environment variable {name} must be an integer of at least {least}, got "{value}": unset it, or '
                "start several processes with torchrun or accelerate launch"
            )
        found[name] = int(value)
    several = [name for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK") if found.get(name, 0) > (name == "WORLD_SIZE")]
    if several and not os.environ.get("MASTER_ADDR") and not any(name in os.environ for name in MPI_SIZES):
        raise ValueError(
            f"the environment variable {several[0]} is {found[several[0]]}, but MASTER_ADDR is not set, so no "
            f"launcher started this process: unset {several[0]}, or start several processes with torchrun or "
            "accelerate launch"
        )
    if found.get("RANK", 0) >= found.get("WORLD_SIZE", 2**31):
        raise ValueError(
            f"the environment variable RANK must be below WORLD_SIZE, {found['WORLD_SIZE']}, got {found['RANK']}: "
            "unset both, or start several processes with torchrun or accelerate launch"
        )


def run_recipe(recipe: str, function: Callable[[list[str]], int]) -> None:
    """Apply `run_command` to a recipe file and exit with its status; every recipe has ``trust_remote_code``."""
    raise SystemExit(run_command(f"run {Path(recipe).stem}", function, sys.argv[1:], code_option=True))


def without_debug(words: Sequence[str]) -> list[str]:
    """Return the arguments without ``--debug``."""
    return [word for word in words if word != DEBUG_OPTION]


def wants_trace(words: Sequence[str]) -> bool:
    """Return True if a traceback was requested, with an argument or an environment variable."""
    return DEBUG_OPTION in words or os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0")


@contextmanager
def short_errors(name: str, words: Sequence[str] = (), code_option: bool = False) -> Iterator[None]:
    """Convert an exception to one line on standard error and ``SystemExit``; with ``--debug``, let it propagate.

    See `run_command` for the arguments.
    """
    prefix = f"hf-tfm {name}".rstrip()
    try:
        check_environment()
        yield
    except SystemExit as end:
        if isinstance(end.code, str):
            say(f"{prefix}: {end.code}")
            raise SystemExit(1) from None
        raise
    except KeyboardInterrupt:
        say(f"{prefix}: interrupted")
        raise SystemExit(130) from None
    except BaseException as error:
        if isinstance(error, GeneratorExit) or wants_trace(words):
            raise
        if isinstance(error, BrokenPipeError):  # the reader of standard output has exited
            discard_output()
            raise SystemExit(1) from None
        line = describe(error, words, code_option)
        if isinstance(error, OSError) and error.errno in FULL and of_output(error):
            line = f"standard output cannot be written: {error.strerror}"
            discard_output()
        traceback.clear_frames(error.__traceback__)  # closes progress bars, which would share the line
        say(f"{prefix}{rank()}: {line}")
        raise SystemExit(1) from None


def say(text: str) -> None:
    """Print to standard error, after flushing standard output."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError, ValueError):  # the stream is closed
            stream.flush()
    print(visible(text), file=sys.stderr, flush=True)


def visible(text: str) -> str:
    """Escape control characters, so that a name can neither add lines nor control the terminal."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def of_output(error: OSError) -> bool:
    """Return True if a failed write was to standard output."""
    line = traceback.extract_tb(error.__traceback__, limit=-1)[0].line or ""
    if line.startswith("print(") and "file=" not in line:
        return True
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        return True
    return False


def discard_output() -> None:
    """Redirect standard output to the null device, so that the flush at interpreter exit succeeds."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def rank() -> str:
    """Return " (rank N)" in every process but the first of several, otherwise ""."""
    number = os.environ.get("RANK", "0")
    return "" if number == "0" or not number.isdecimal() else f" (rank {number})"


def describe(error: BaseException, words: Sequence[str] = (), code_option: bool = False) -> str:
    """Describe an exception in one line: argument, file and cause.

    Args:
        words: command-line arguments, among which the option is found whose value the message contains.
        code_option: see `run_command`.
    """
    while type(error).__name__ in WRAPPERS and error.__cause__ is not None:
        error = error.__cause__
    text = cause(error, code_option)
    if (argument := argument_of(text, words)) and not re.search(rf"\b{re.escape(argument)}\b", text):
        text = f"{argument}: {text}"
    if is_expected(error):
        return text
    return f"unexpected {type(error).__name__}: {text}; run again with {DEBUG_OPTION} for the trace, and report it"


def cause(error: BaseException, code_option: bool = False) -> str:
    """Return the message of an exception in one line, with the file that a library was reading."""
    text, place = reworded(error, code_option), place_of(error)
    text = text.replace("\n", " ")
    return f"{place}: {text}" if place and not holds(text, place) else text


def is_expected(error: BaseException) -> bool:
    """Return True if input may have caused an exception; otherwise it is probably a bug."""
    if isinstance(error, USER_ERRORS) or type(error) is Exception:  # tokenizers raises plain Exception
        return True
    modules = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if modules & (USER_ERROR_LIBRARIES | {"hf_tfm"}) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, RecursionError):
        return "JSON" in str(error)
    return isinstance(error, RuntimeError) and bool(RUNTIME_CAUSES.search(str(error)) or raised_by_us(error))


def raised_by_us(error: BaseException) -> bool:
    """Return True if an exception was raised in this package or a recipe, not in a library."""
    frames = traceback.extract_tb(error.__traceback__, limit=-1)
    folders = (Path(__file__).parent, Path(__file__).parents[1] / "recipes")
    return (
        bool(frames)
        and (frames[0].line or "").startswith("raise ")
        and any(Path(frames[0].filename).is_relative_to(folder) for folder in folders)
    )


def reworded(error: BaseException, code_option: bool = False) -> str:
    """Return the message of an exception in one line, without advice that does not apply to the command."""
    message = str(error).strip()
    if message and raised_by_us(error):
        return first_line(message)
    if isinstance(error, KeyError) and error.args:
        message = f"{error.args[0]!r}" if not isinstance(error.args[0], str) else f'"{error.args[0]}" is missing'
    if isinstance(error, MemoryError) and "allocate" not in message:
        return "out of memory"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in FULL and error.strerror:
        return error.strerror
    if "Original Traceback" in message:  # from a DataLoader worker: the last line is the exception
        message = message.splitlines()[-1].partition(": ")[2] or message.splitlines()[-1]
    if (REMOTE_CODE.search(message) and "\n" in message) or "contains custom code which must" in message:
        found = REMOTE_CODE_PLACE.search(message)
        which = f'"{found[1]}"' if found else "the repository"
        remedy = "; --trust_remote_code true runs it" if code_option else ""
        return f"{which} brings its own code, which is not run{remedy}"
    for pattern, text in REWORDED:
        if found := re.search(pattern, message):
            return text.format(*found.groups())
    return first_line(message) or f"{type(error).__name__} without a message"


def first_line(message: str) -> str:
    """Return the first line of a message, with the next if it ends in a colon or comma, up to `LONGEST_LINE`
    characters."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    text = ""
    while lines and (not text or text.endswith((":", ","))):
        text = f"{text} {lines.pop(0)}".lstrip()
    return text if len(text) <= LONGEST_LINE else f"{text[: LONGEST_LINE - 3]}..."


def place_of(error: BaseException) -> str | None:
    """Return the file or model that a library was reading, for exceptions that do not name it themselves."""
    nameless = isinstance(error, (UnicodeError, RecursionError)) or type(error).__name__ in (
        *("JSONDecodeError", "SafetensorError", "UnpicklingError", "BadZipFile"),
    )
    models = nameless or re.search(r"sentencepiece or tiktoken|ignore_mismatched|[Ww]eights.only", str(error))
    if isinstance(error, OSError) and error.errno in FULL and error.filename is None:
        return written_file(error)
    if not models:
        return None
    # Prefer the innermost frame with a file, then the innermost with a model.
    frames = list(walk(error.__traceback__))[::-1]
    for names in (FILES, PLACES) if nameless else (PLACES,):
        for frame in frames:
            for name in names:
                value = frame.get(name)
                if isinstance(value, os.PathLike):
                    value = os.fspath(value)
                if isinstance(value, str) and (names is PLACES or os.path.isfile(value)):
                    return value
    return None


def written_file(error: OSError) -> str | None:
    """Return the file that was being written, from the innermost frame that holds one."""
    for frame in list(walk(error.__traceback__))[::-1]:
        for name in WRITTEN:
            value = frame.get(name)
            if isinstance(value, io.IOBase):
                value = getattr(value, "name", None)
            if isinstance(value, (str, os.PathLike)) and os.path.exists(value) and not os.path.isdir(value):
                return os.fspath(value)
    return None


def walk(trace: TracebackType | None) -> Iterator[dict[str, Any]]:
    """Yield the local variables of the frames of a traceback, outermost first."""
    while trace is not None:
        yield trace.tb_frame.f_locals
        trace = trace.tb_next


def holds(text: str, place: str) -> bool:
    """Return True if a text contains the path or name of a file or folder."""
    return place in text or Path(place).name in text


def argument_of(text: str, words: Sequence[str]) -> str | None:
    """Return the option whose value, a path, occurs in a text; None if there is not exactly one."""
    found = set()
    for i, word in enumerate(words):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            value = value if equals else (words[i + 1] if i + 1 < len(words) else "")
            if "/" in value and value in text:
                found.add(name)
    return found.pop() if len(found) == 1 else None
