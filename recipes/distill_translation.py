"""Distil a translation model into a smaller one: soft targets token by token (Kim and Rush 2016, arXiv:1606.07947,
section 3.1), hidden states and attention of encoder and decoder.

    hf-tfm run translation_train --config quickstart                              the teacher, about a minute
    hf-tfm run distill_translation --config quickstart                            about a minute on 2 CPU cores
    hf-tfm run distill_translation --config multi30k_tiny --teacher TEACHER --dataset_name DATA
    hf-tfm run distill_translation --config multi30k_tiny --teacher TEACHER --architecture rnn_seq2seq

The teacher is any sequence-to-sequence model that transformers loads; the student, a Transformer, GRU or LSTM, has its
tokenizer. --cache DIR --write_cache true writes the teacher's signals and ends; --cache DIR reads them, without a
teacher in memory. Presets with their cost and expected results: recipes/presets/distill_translation/.
"""

from hf_tfm.command import run_recipe
from hf_tfm.tasks.distillation import distill
from hf_tfm.tasks.translation import TranslationTask
from hf_tfm.training.trainer import recipe

main = recipe(distill(TranslationTask), __file__)

if __name__ == "__main__":
    run_recipe(__file__, main)
