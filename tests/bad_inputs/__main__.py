"""Print the verdicts for the whole table: python -m tests.bad_inputs --help."""

import argparse
import re
import tempfile
from collections import Counter
from pathlib import Path

from .rows import ROWS
from .runner import CPU_SECONDS, Server
from .verdicts import VERDICTS, prepared, verdict


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bad_inputs", description=__doc__)
    parser.add_argument("--package", type=Path, help="root folder of another checkout of hf_tfm")
    parser.add_argument("--failing", action="store_true", help="list the rows that are not handled well, with reasons")
    parser.add_argument("--only", default="", help="run only rows whose id matches this pattern")
    parser.add_argument("--seconds", type=int, default=CPU_SECONDS, help="limit of CPU time per case")
    options = parser.parse_args()
    counts, seconds = Counter(), 0.0
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary) / "server"
        home.mkdir()
        server = Server(home, options.package, options.seconds)
        chosen = [row for row in ROWS if re.search(options.only, row.id)]
        for number, row in enumerate(chosen):
            folder = Path(temporary) / f"case-{number}"
            folder.mkdir()
            result = server.run(row.arguments(prepared(row, folder), home / "models"), folder)
            found, reason = verdict(row, result)
            counts[found] += 1
            seconds += result.seconds
            if options.failing and found != "handled well":
                print(f"{found:<8} {row.id} ({result.seconds:.1f} s): {reason[:300]}", flush=True)
        server.close()
    print("| verdict | inputs |\n|---|---|")
    for name in VERDICTS:
        print(f"| {name} | {counts[name]} |")
    print(f"| all | {len(chosen)} |\n\n{seconds / max(len(chosen), 1):.2f} s of CPU time per case")


if __name__ == "__main__":
    main()
