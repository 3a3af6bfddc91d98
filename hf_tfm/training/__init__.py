"""One training loop for every recipe, and what it needs: arguments, optimizer, checkpoints."""

from .arguments import ImageArguments, TokenArguments, TrainingArguments
from .loop import evaluate, train_step
from .session import train

__all__ = ["ImageArguments", "TokenArguments", "TrainingArguments", "evaluate", "train", "train_step"]
