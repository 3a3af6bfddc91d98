"""Metrics as `evaluate` modules that work offline.

Create one from its class, ``Bleu(lowercase=True)``, or by name, ``evaluate.load(path("bleu"), lowercase=True)``.
"""

from pathlib import Path

from .accuracy import Accuracy
from .bleu import Bleu
from .chrf import Chrf
from .coco_ap import CocoAP
from .exact_match import ExactMatch
from .glue import Glue
from .panoptic_quality import PanopticQuality
from .real_accuracy import RealAccuracy

__all__ = [
    "CLASS_METRICS",
    "DETECTION_METRICS",
    "LABEL_METRICS",
    "METRICS",
    "Accuracy",
    "Bleu",
    "Chrf",
    "CocoAP",
    "ExactMatch",
    "Glue",
    "PanopticQuality",
    "RealAccuracy",
    "path",
]

METRICS = {"bleu": Bleu, "chrf": Chrf, "exact_match": ExactMatch}
CLASS_METRICS = {"accuracy": Accuracy, "real_accuracy": RealAccuracy}
LABEL_METRICS = {"glue": Glue}
DETECTION_METRICS = {"coco_ap": CocoAP, "panoptic_quality": PanopticQuality}


def path(name: str) -> str:
    """Return the path of a metric's script, for `evaluate.load`.

    Args:
        name: a key of `METRICS` (text), `CLASS_METRICS` (image classification), `LABEL_METRICS` (text labels) or
            `DETECTION_METRICS` (detection and segmentation).

    Raises:
        ValueError: if the metric is unknown.
    """
    known = METRICS | CLASS_METRICS | LABEL_METRICS | DETECTION_METRICS
    if name not in known:
        raise ValueError(f'name must be one of {", ".join(known)}, got "{name}"')
    return str(Path(__file__).with_name(f"{name}.py"))
