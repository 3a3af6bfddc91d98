"""Distil a masked autoencoder into a smaller one, from features of the visible patches; images need no labels.

    hf-tfm run mae_pretrain --config quickstart                                   the teacher, about 1 minute
    hf-tfm run distill_mae --config quickstart                                    seconds on 2 CPU cores
    hf-tfm run distill_mae --config cifar10_small --dataset_name DATA --teacher TEACHER

Student and teacher read the same visible patches, so a teacher costs a quarter of its forward pass on whole images;
with a term "label" the student also reconstructs (Bai et al. 2022, "Masked Autoencoders Enable Efficient Knowledge
Distillers", arXiv:2208.12256). Fine-tune the student with image_classification_train --model_name_or_path. --cache DIR
--write_cache true writes the teacher's signals, --cache DIR reads them. Presets with their cost:
recipes/presets/distill_mae/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.distillation import distill
from hf_tfm.tasks.masked_image import MaskedImageTask
from hf_tfm.training.trainer import recipe

main = recipe(distill(MaskedImageTask), __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
