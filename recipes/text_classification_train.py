"""Train BERT or GPT to classify texts: from scratch, or from a pretrained model, on any data set or on GLUE.

    hf-tfm run text_classification_train --config quickstart                      seconds on 2 CPU cores
    hf-tfm run text_classification_train --config glue_base --task sst2 --output_dir runs/sst2
    hf-tfm run text_classification_train --config glue_base --tasks glue          all nine tasks and the macro score
    accelerate launch recipes/text_classification_train.py --config glue_base ... as many GPUs as the launcher finds

Presets with their cost and expected numbers: recipes/presets/text_classification_train/.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from transformers import AutoTokenizer

from hf_tfm.command import run_recipe
from hf_tfm.data.labelled_texts import PAIR, TEXT
from hf_tfm.hub.results import RunRecord
from hf_tfm.limits import LARGEST_VOCABULARY
from hf_tfm.tasks.model_fields import check_fields, new_config
from hf_tfm.tasks.text_classification import TextClassificationTask, input_names, predict, score
from hf_tfm.training.run import Run, finish
from hf_tfm.training.text_model import (
    ARCHITECTURES,
    TOKEN_FIELDS,
    build_classifier,
    check_height,
    classifier_tokenizer,
    keep_what_is_read,
)
from hf_tfm.training.text_run import TextArguments, load_labelled_texts, text_loader
from hf_tfm.training.text_tasks import run_tasks


@dataclass(kw_only=True)
class TextClassificationArguments(TextArguments):
    """Knobs of text classification.

    Args:
        architecture: of a new model, bert or gpt.
        tokenizer: folder or Hub id of a ready tokenizer; default, one is trained on the training texts, WordPiece for
            bert and byte-pair encoding for gpt.
        vocab_size: of the tokenizer that is trained.
        lowercase: the tokenizer that is trained lower-cases all text.
        size: of a new model, see TfmBertConfig and TfmGPTConfig.
        model: fields of the configuration that differ from the size's, or from model_name_or_path's.
        model_name_or_path: folder or Hub id of a model to go on from, ours or transformers', with its tokenizer.
        language_weight: adds so much of the loss of predicting the text itself, for decoders (Radford et al. 2018).

    The others are those of `TextArguments`.
    """

    architecture: Literal["bert", "gpt"] = "bert"
    tokenizer: str | None = None
    vocab_size: int = 30_522
    lowercase: bool = True
    size: str = "small"
    model: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    model_name_or_path: str | None = None
    language_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_0="language_weight",
            at_least_1="vocab_size",
            at_most={"language_weight": 1000, "vocab_size": LARGEST_VOCABULARY},
        )
        if self.model_name_or_path and self.tokenizer:
            raise ValueError("model_name_or_path brings its own tokenizer: give no tokenizer beside it")
        if not self.model_name_or_path:
            config_class, _ = ARCHITECTURES[self.architecture]
            check_fields(config_class, self.model, TOKEN_FIELDS)
            limit = new_config(config_class, self).max_position_embeddings
            if self.max_length > limit:
                raise ValueError(
                    f"max_length must be at most max_position_embeddings = {limit}, got {self.max_length}"
                )
            if self.language_weight and self.architecture != "gpt":
                raise ValueError('language_weight is for decoders: give architecture="gpt" or model_name_or_path')


def train_classifier(args: TextClassificationArguments, run: Run) -> RunRecord | None:
    """A whole run; its record, or None where it was asked to stop."""
    accelerator = run.accelerator
    args, texts = load_labelled_texts(args)
    run.open(args, "text-classification", texts.described(args), texts.validation[0])
    learned = texts.rows[args.train_split]
    sides = [part for part in (TEXT, PAIR) if part in learned.column_names]
    tokenizer = run.load_or_create(
        "tokenizer", lambda: classifier_tokenizer(args, learned, sides), AutoTokenizer.from_pretrained
    )
    model = build_classifier(args, tokenizer, texts.labels)
    keep_what_is_read(tokenizer, model)
    check_height(args, model)

    def task_of(split: str) -> TextClassificationTask:
        return TextClassificationTask(tokenizer, texts.label_ids(split), input_names(model), args.language_weight)

    def loader_of(split: str, learning: bool = False):
        collate = task_of(split).collate
        return text_loader(args, accelerator, collate, tokenizer, texts.rows[split], learning)

    task, learning = task_of(args.train_split), loader_of(args.train_split, learning=True)
    scored = {split: loader_of(split) for split in texts.scored}
    per_epoch = learning.steps_per_epoch()
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * per_epoch)

    def score_validation(trained) -> dict[str, float]:
        found = predict(accelerator, task, trained, scored[texts.validation[0]])
        return {"loss": found.loss, **{row["name"]: row["value"] for row in score(found, args.metrics)}}

    eval_steps = args.eval_steps or per_epoch
    settled = args.resolve(per_epoch, max_steps)[0]
    result = run.train(task, model, learning, settled, max_steps, eval_steps, score_validation)
    if result.stopped:
        run.stopped(result)
        return None
    run.save(model.eval(), tokenizer)
    metrics = []
    for split, loader in scored.items():
        metrics += [{**row, "split": split} for row in score(predict(accelerator, task, model, loader), args.metrics)]
    return finish(run, model, task, result, metrics)


def main(argv: Sequence[str] | None = None) -> int:
    return run_tasks(TextClassificationArguments, Path(__file__), argv, train_classifier)


if __name__ == "__main__":
    run_recipe(__file__, main)
