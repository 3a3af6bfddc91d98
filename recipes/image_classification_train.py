"""Train a Vision Transformer to classify images: from scratch, by fine-tuning, or as a linear probe.

    hf-tfm run image_classification_train --config quickstart                     about 1 minute on 2 CPU cores
    hf-tfm run image_classification_train --config cifar10 --dataset_name DATA --output_dir runs/cifar10
    hf-tfm run image_classification_train --config cifar10_finetune --dataset_name DATA --model_name_or_path MODEL
    accelerate launch recipes/image_classification_train.py --config deit_small   as many GPUs as the launcher finds

Presets with their cost and expected results: recipes/presets/image_classification_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.image_classification import ImageClassificationTask
from hf_tfm.training.trainer import recipe

main = recipe(ImageClassificationTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
