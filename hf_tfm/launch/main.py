"""The command ``hf-tfm launch``: print what would be started or submitted, and do it with ``--yes``."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence

from .options import parse
from .submissions import LAUNCHERS, Submission


def main(argv: Sequence[str]) -> int:
    """Run the command; return the exit status, with ``--yes`` that of the program that starts or submits.

    Raises:
        ValueError: that program is not installed.
        SystemExit: an argument is invalid.
    """
    launch = parse(argv)
    submission = LAUNCHERS[launch.options.on](launch)
    if not launch.options.yes:
        print(submission.text)
        does = f"submits it: {shlex.join(submission.command)}" if submission.takes_text else "runs it"
        print(f"hf-tfm launch: nothing is started; --yes {does}", file=sys.stderr)
        return 0
    program = submission.command[0]
    if shutil.which(program) is None:
        raise ValueError(f"{program} is not installed here, or not on the PATH: --on {launch.options.on} needs it")
    return start(submission)


def start(submission: Submission) -> int:
    """Run the program of a submission, which receives SIGTERM in place of this process; return its exit status."""
    content = submission.text + "\n" if submission.takes_text else None
    process = subprocess.Popen(
        submission.command,
        stdin=subprocess.PIPE if submission.takes_text else None,
        env={**os.environ, **submission.environment},
        text=True,
    )
    before = signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    try:
        process.communicate(content)
    except KeyboardInterrupt:  # the program has received it as well
        process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    return process.returncode if process.returncode >= 0 else 128 - process.returncode
