"""Compress a classifier of texts while it learns from a teacher, usually the original model.

    hf-tfm run compress_distill --config quickstart                                seconds on 2 CPU cores
    hf-tfm run compress_distill --config sst2_heads --model_name_or_path runs/sst2 --teacher runs/sst2 ...

Options are those of compress_train and of distill_task. Presets with their cost and expected results:
recipes/presets/compress_distill/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.compression import compress
from hf_tfm.tasks.distillation import distill
from hf_tfm.tasks.text_classification import TextClassificationTask
from hf_tfm.training.trainer import recipe

main = recipe(compress(distill(TextClassificationTask)), __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
