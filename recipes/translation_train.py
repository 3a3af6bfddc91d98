"""Train a Transformer, GRU or LSTM to translate, from scratch or from a pretrained model.

    hf-tfm run translation_train --config quickstart                    about a minute on 2 CPU cores
    hf-tfm run translation_train --config multi30k_tiny --dataset_name DATA --output_dir runs/multi30k
    accelerate launch recipes/translation_train.py --config wmt14_base  as many GPUs as the launcher finds

Presets with their cost and expected results: recipes/presets/translation_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training.trainer import recipe

main = recipe(TranslationTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
