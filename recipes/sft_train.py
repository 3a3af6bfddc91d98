"""Fine-tune a causal language model on demonstrations: the first step of InstructGPT.

    hf-tfm run sft_train --config quickstart                               about 1 minute on 2 CPU cores
    hf-tfm run sft_train --config instruct_small --model_name_or_path runs/gpt --output_dir runs/sft
    accelerate launch recipes/sft_train.py --config instructgpt --model_name_or_path openai-community/gpt2-xl

The trained model is the start of reward_train, preference_train and rlhf_train. Presets with their cost and expected
results: recipes/presets/sft_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.supervised_fine_tuning import FineTuningTask
from hf_tfm.training.trainer import recipe

main = recipe(FineTuningTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
