"""Compress a classifier of texts while it is trained: fewer layers, heads or neurons, low-rank or sparse weights.

    hf-tfm run compress_train --config quickstart                                  seconds on 2 CPU cores
    hf-tfm run compress_train --config sst2_heads --model_name_or_path runs/sst2 --output_dir runs/sst2-heads
    hf-tfm run compress_train --config sst2_movement --model_name_or_path runs/sst2 --output_dir runs/sst2-sparse

The result is a model like any other: hf-tfm compress quantises it, and distill_task trains it with the original as its
teacher. Presets with their cost and expected results: recipes/presets/compress_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.compression import compress
from hf_tfm.tasks.text_classification import TextClassificationTask
from hf_tfm.training.trainer import recipe

main = recipe(compress(TextClassificationTask), __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
