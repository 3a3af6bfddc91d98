"""Train DETR for panoptic segmentation (Carion et al. 2020, arXiv:2005.12872, section 4.4): boxes first, then masks.

    hf-tfm run panoptic_train --config quickstart                       a few minutes on 2 CPU cores
    hf-tfm run panoptic_train --config coco_boxes --dataset_name COCO        boxes of things and stuff
    hf-tfm run panoptic_train --config coco_masks --dataset_name COCO --model_name_or_path runs/coco-panoptic-boxes
    accelerate launch recipes/panoptic_train.py --config coco_boxes     as many GPUs as the launcher finds

The data set must have panoptic maps and their segments, in COCO's folders or in columns ``panoptic`` and
``segments_info``, and state which categories are things. Presets with their cost and expected results:
recipes/presets/panoptic_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.panoptic_segmentation import PanopticTask
from hf_tfm.training.trainer import recipe

main = recipe(PanopticTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
