"""Distil a classifier of texts into a smaller one: soft targets (DistilBERT), or inner layers first (TinyBERT).

    hf-tfm run distill_task --config quickstart --teacher runs/quickstart-text      seconds on 2 CPU cores
    hf-tfm run distill_task --config tinybert4_intermediate --task sst2 --teacher TEACHER --output_dir runs/tiny1
    hf-tfm run distill_task --config tinybert4_prediction --task sst2 --teacher TEACHER --model_name_or_path runs/tiny1
    hf-tfm run distill_task --config distilbert_second --tasks glue --teacher 'runs/glue_base/{task}' ...

--cache DIR --write_cache true writes the teacher's signals and ends; --cache DIR reads them, without a teacher in
memory. Presets with their cost and expected results: recipes/presets/distill_task/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.distillation import distill
from hf_tfm.tasks.text_classification import TextClassificationTask
from hf_tfm.training.trainer import recipe

main = recipe(distill(TextClassificationTask), __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
