"""Train a reward model on preferences or rankings: the second step of InstructGPT.

    hf-tfm run reward_train --config quickstart                            seconds on 2 CPU cores, after sft_train
    hf-tfm run reward_train --config preference_small --model_name_or_path runs/sft --output_dir runs/reward
    accelerate launch recipes/reward_train.py --config instructgpt --model_name_or_path runs/instructgpt-sft

The trained model scores completions in rlhf_train. Presets with their cost and expected results:
recipes/presets/reward_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.reward_modeling import RewardTask
from hf_tfm.training.trainer import recipe

main = recipe(RewardTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
