"""Distil a DETR or Deformable DETR into a smaller one: fewer decoder layers, fewer queries, narrower.

    hf-tfm run detection_train --config quickstart                                the teacher, a minute or two
    hf-tfm run distill_detection --config quickstart                              about a minute on 2 CPU cores
    hf-tfm run distill_detection --config digits --teacher TEACHER --output_dir runs/small-detr

The teacher is a DETR or Deformable DETR of this package or of transformers, and the student of the same kind
(--architecture). The student learns from the teacher's best queries (kind
"query"), annotated objects (kind "label") and hidden states. --cache DIR --write_cache true writes the teacher's
activations and exits; --cache DIR alone reads them, without the teacher in memory. Presets with their cost and
expected results: recipes/presets/distill_detection/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.distillation import distill
from hf_tfm.tasks.object_detection import DetectionTask
from hf_tfm.training.trainer import recipe

main = recipe(distill(DetectionTask), __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
