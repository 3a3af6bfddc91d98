"""Distil a language model into a smaller one on plain text: DistilBERT, TinyBERT's general stage, DistilGPT.

    hf-tfm run distill_pretrain --config quickstart --teacher runs/quickstart-bert      about 1 minute on 2 CPU cores
    hf-tfm run distill_pretrain --config distilbert --output_dir runs/distilbert
    hf-tfm run distill_cache distill_pretrain --config quickstart --teacher TEACHER --cache DIR --cache_epochs 4

Masks are a function of seed, epoch and sample, so a cache holds the teacher's activations for the same masked texts
that the student reads. Fine-tune the student with text_classification_train --model_name_or_path, or with
distill_task. Presets with their cost and expected results: recipes/presets/distill_pretrain/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.distillation import distill
from hf_tfm.tasks.language_modeling import LanguageModelingTask
from hf_tfm.training.trainer import recipe

main = recipe(distill(LanguageModelingTask), __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
