"""Train BERT or GPT to classify texts: from scratch, or from a pretrained model, on any data set or on GLUE.

    hf-tfm run text_classification_train --config quickstart                      seconds on 2 CPU cores
    hf-tfm run text_classification_train --config glue_base --task sst2 --output_dir runs/sst2
    hf-tfm run text_classification_train --config glue_base --tasks glue          all nine tasks and the macro score
    accelerate launch recipes/text_classification_train.py --config glue_base ... as many GPUs as the launcher finds

Presets with their cost and expected results: recipes/presets/text_classification_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.text_classification import TextClassificationTask
from hf_tfm.training.trainer import recipe

main = recipe(TextClassificationTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
