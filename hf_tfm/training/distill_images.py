"""What the recipes that distil image models share: their knobs, and one image processor for student and teacher."""

from dataclasses import dataclass

from accelerate import Accelerator
from transformers import BaseImageProcessor

from ..data.pixels import as_read, image_processor
from ..distillation.facts import check_processors
from .distill_run import DistillationKnobs
from .image_run import ImageRunArguments


@dataclass(kw_only=True)
class DistillImageArguments(DistillationKnobs, ImageRunArguments):
    """Knobs of learning from a teacher that reads images.

    Args:
        image_size: pixels of the images that both models read; default, the teacher's.

    The others are those of `DistillationKnobs` and `ImageRunArguments`; mean and std are the teacher's by default.
    """

    image_size: int | tuple[int, int] | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.cache:
            for name, on in (("repeats", self.repeats > 1), ("streaming", self.streaming)):
                if on:
                    raise ValueError(f"cache keeps one view of each image in an epoch: turn {name} off")


def shared_processor(args: DistillImageArguments) -> BaseImageProcessor:
    """The student's image processor; what it gives is what the teacher reads.

    Raises:
        ValueError: a knob, or ``model_name_or_path``, says something else than the teacher.
    """
    teacher = as_read(args.teacher, args.trust_remote_code)
    size = args.image_size or (teacher.size.height, teacher.size.width)
    scale = args.mean or tuple(teacher.image_mean), args.std or tuple(teacher.image_std)
    check_processors(image_processor(size, None, *scale), teacher)
    if args.model_name_or_path:
        check_processors(as_read(args.model_name_or_path, args.trust_remote_code), teacher)
    return image_processor(size, args.resize, *scale)


def settle(
    args: DistillImageArguments, accelerator: Accelerator, per_epoch: int | None, max_steps: int
) -> DistillImageArguments:
    """The knobs with what follows from the steps of an epoch, which is said; for `learn`."""
    settled, line = args.resolve(per_epoch, max_steps)
    accelerator.print(line)
    return settled
