"""One training loop for every recipe, and what it needs: arguments, optimizer, checkpoints."""

from .arguments import TrainingArguments
from .loop import evaluate, train_step
from .session import train

__all__ = ["TrainingArguments", "evaluate", "train", "train_step"]
