"""Pretrain BERT on masked tokens, with or without next sentences, or GPT on next tokens.

    hf-tfm run language_pretrain --config quickstart                       about 1 minute on 2 CPU cores
    hf-tfm run language_pretrain --config bert_mini --output_dir runs/bert
    accelerate launch recipes/language_pretrain.py --config bert_base      as many GPUs as the launcher finds

The trained model can be fine-tuned with text_classification_train --model_name_or_path. Presets with their cost and
expected results: recipes/presets/language_pretrain/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.language_modeling import LanguageModelingTask
from hf_tfm.training.trainer import recipe

main = recipe(LanguageModelingTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
