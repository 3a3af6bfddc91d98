"""Pretrain a masked autoencoder on images alone (He et al. 2021, arXiv:2111.06377).

    hf-tfm run mae_pretrain --config quickstart                         1 to 3 minutes on a CPU core
    hf-tfm run mae_pretrain --config cifar10 --dataset_name DATA --output_dir runs/cifar10-mae
    accelerate launch recipes/mae_pretrain.py --config imagenet_base    on all GPUs of the launcher

Fine-tune the encoder with image_classification_train --model_name_or_path. Presets with their cost and expected
numbers: recipes/presets/mae_pretrain/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.masked_image import MaskedImageTask
from hf_tfm.training.trainer import recipe

main = recipe(MaskedImageTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
