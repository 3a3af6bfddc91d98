"""Train a language model from rewards with PPO, PPO-ptx, RLOO or GRPO.

    hf-tfm run rlhf_train --config quickstart           about 1 minute on a CPU core
    hf-tfm run rlhf_train --config instructgpt --dataset_name PROMPTS --model_name_or_path SFT --reward_model RM \
        --pretraining_texts '[{dataset_name: TEXTS}]'   InstructGPT as published

The policy is a causal language model, usually fine-tuned on demonstrations; the reward is a reward model, a built-in
rule, or a Python function. Presets with their cost and expected results: recipes/presets/rlhf_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.rlhf import RLHFTask
from hf_tfm.training.trainer import recipe

main = recipe(RLHFTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
