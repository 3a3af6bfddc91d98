"""Train a causal language model on preferences without a reward model: DPO and IPO.

    hf-tfm run preference_train --config quickstart                        seconds on 2 CPU cores, after sft_train
    hf-tfm run preference_train --config preference_small --model_name_or_path runs/sft --output_dir runs/dpo
    accelerate launch recipes/preference_train.py --config dpo --model_name_or_path runs/sft

Presets with their cost and expected results: recipes/presets/preference_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.preference_optimization import PreferenceTask
from hf_tfm.training.trainer import recipe

main = recipe(PreferenceTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
