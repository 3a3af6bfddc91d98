"""Classify long sequences with any attention method, as in the Long Range Arena (Tay et al. 2021, arXiv:2011.04006).

    hf-tfm run long_range_arena_train --config quickstart               seconds on 2 CPU cores
    hf-tfm run long_range_arena_train --config listops_small --model.encoder_attention linear --output_dir runs/linear
    accelerate launch recipes/long_range_arena_train.py --config listops    on all GPUs of the launcher

Presets with their cost and expected results: recipes/presets/long_range_arena_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.long_range_arena import LongRangeArenaTask
from hf_tfm.training.trainer import recipe

main = recipe(LongRangeArenaTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
