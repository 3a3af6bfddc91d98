"""Train DETR, Deformable DETR or Faster R-CNN to detect objects (Carion et al. 2020, arXiv:2005.12872; Zhu et al.
2021, arXiv:2010.04159; Ren et al. 2015, arXiv:1506.01497).

    hf-tfm run detection_train --config quickstart                        about a minute on 2 CPU cores
    hf-tfm run detection_train --config digits                            from random weights
    hf-tfm run detection_train --config digits_deformable                 the same with Deformable DETR
    hf-tfm run detection_train --config frcnn_digits                      the same with Faster R-CNN
    hf-tfm run detection_train --config bccd --dataset_name DATA               starts from the previous run
    hf-tfm run detection_train --config finetune_small --dataset_name DATA     from a backbone of ImageNet
    hf-tfm run detection_train --config finetune_small --dataset_name DATA --model_name_or_path MODEL
    accelerate launch recipes/detection_train.py --config r50_300         as many GPUs as the launcher finds

DATA is a folder in COCO's or Pascal VOC's layout, or any data set with a column of objects. Presets with their cost
and expected results: recipes/presets/detection_train/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.object_detection import DetectionTask
from hf_tfm.training.trainer import recipe

main = recipe(DetectionTask, __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
