"""Distil an image classifier into a smaller Vision Transformer: soft or hard targets, inner layers, DeiT's token.

    hf-tfm run image_classification_train --config quickstart                     the teacher, about 1 minute
    hf-tfm run distill_vision --config quickstart                                 seconds on 2 CPU cores
    hf-tfm run distill_vision --config cifar10_small --dataset_name DATA --teacher TEACHER
    accelerate launch recipes/distill_vision.py --config deit_base                on all GPUs of the launcher

The teacher is any image classifier that transformers loads, including timm's. --cache DIR --write_cache true writes
the teacher's signals and ends; --cache DIR reads them, without a teacher in memory. Presets with their cost and
expected numbers: recipes/presets/distill_vision/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.distillation import distill
from hf_tfm.tasks.image_classification import ImageClassificationTask
from hf_tfm.training.trainer import recipe

main = recipe(distill(ImageClassificationTask), __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
