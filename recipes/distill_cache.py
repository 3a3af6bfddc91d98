"""Write a teacher's activations to a cache, from which students are trained without the teacher in memory.

    hf-tfm run distill_cache distill_task --config quickstart --teacher runs/quickstart-text --cache runs/cache
    hf-tfm run distill_task --config quickstart --teacher runs/quickstart-text --cache runs/cache

The first argument is a distillation recipe, followed by its options. Data, teacher and terms determine what is
written; --cache_epochs, --cache_top_k and --cache_dtype its size. An interrupted run resumes.
"""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_tfm.command import run_recipe
from hf_tfm.values import closest, shown


def main(argv: Sequence[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    recipes = sorted(path for path in Path(__file__).parent.glob("distill_*.py") if path != Path(__file__))
    known = {path.stem: path for path in recipes}
    if argv[:1] in (["-h"], ["--help"]):
        print(f"{__doc__}\nrecipes: {', '.join(known)}")
        return 0
    if not argv or argv[0] not in known:
        word = f"{shown(argv[0])} is not a distillation recipe" if argv else "give a distillation recipe"
        near = closest(argv[0], known) if argv else ""
        print(f"hf-tfm run distill_cache: {word}; available: {', '.join(known)}{near}", file=sys.stderr)
        return 2
    return runpy.run_path(str(known[argv[0]]))["main"]([*argv[1:], "--write_cache", "true"])


if __name__ == "__main__":
    run_recipe(__file__, main)
