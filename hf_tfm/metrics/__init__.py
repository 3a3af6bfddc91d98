"""Metrics as `evaluate` modules that need no network.

Make one from its class, ``Bleu(lowercase=True)``, or by name, ``evaluate.load(path("bleu"), lowercase=True)``.
"""

from pathlib import Path

from .bleu import Bleu
from .chrf import Chrf
from .exact_match import ExactMatch

__all__ = ["METRICS", "Bleu", "Chrf", "ExactMatch", "path"]

METRICS = {"bleu": Bleu, "chrf": Chrf, "exact_match": ExactMatch}


def path(name: str) -> str:
    """The script of a metric, for `evaluate.load`.

    Args:
        name: "bleu", "chrf" or "exact_match".

    Raises:
        ValueError: there is no such metric.
    """
    if name not in METRICS:
        raise ValueError(f'name must be one of {", ".join(METRICS)}, got "{name}"')
    return str(Path(__file__).with_name(f"{name}.py"))
