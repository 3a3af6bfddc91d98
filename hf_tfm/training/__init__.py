"""One training loop for every task, and what it needs: optimizer, checkpoints, run folders."""

from ..arguments import ImageBatchArguments, TokenBatchArguments, TrainingArguments
from ..tasks.base import mean_losses as evaluate
from .loop import train_step
from .session import train

__all__ = ["ImageBatchArguments", "TokenBatchArguments", "TrainingArguments", "evaluate", "train", "train_step"]
