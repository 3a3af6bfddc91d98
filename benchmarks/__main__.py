"""python -m benchmarks [NAME [options]]: run one benchmark, or all with their defaults."""

import importlib
import sys
from pathlib import Path

from jsonargparse import CLI

NAMES = (
    *("padding_waste", "label_smoothing", "translation_training", "translation_generation", "image_loading"),
    "vision_training",
    "swin_training",
    "language_training",
    "language_generation",
    "rlhf",
    "distillation",
    "set_criterion",
    "detection_training",
    "detection_padding",
    "detection_evaluation",
    "depthwise_training",
    "detection_step",
    "checkpoint_stall",
    "engine_overhead",
    "clustered_attention",
    "positions",
    "recurrent",
    "attention_methods",
    "convlstm_training",
    "streams",
    "report",
)

if __name__ == "__main__":
    chosen = sys.argv[1:2] or list(NAMES)
    if unknown := set(chosen) - set(NAMES):
        sys.exit(f"there is no benchmark {unknown.pop()} in {Path(__file__).parent}; there are {', '.join(NAMES)}")
    for name in chosen:
        CLI(importlib.import_module(f"benchmarks.{name}").main, args=sys.argv[2:])
