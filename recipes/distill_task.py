"""Distil a text classifier into a smaller one: soft targets (DistilBERT), or inner layers first (TinyBERT).

    hf-tfm run distill_task --config quickstart --teacher runs/quickstart-text      seconds on 2 CPU cores
    hf-tfm run distill_task --config tinybert4_intermediate --task sst2 --teacher TEACHER --output_dir runs/tiny1
    hf-tfm run distill_task --config tinybert4_prediction --task sst2 --teacher TEACHER --model_name_or_path runs/tiny1
    hf-tfm run distill_task --config distilbert_second --tasks glue --teacher 'runs/glue_base/{task}' ...

--cache DIR --write_cache true writes the teacher's activations and exits; --cache DIR alone reads them, without the
teacher in memory. Presets with their cost and expected results: recipes/presets/distill_task/.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_tfm.command import run_recipe
from hf_tfm.data.labelled_texts import text_lengths
from hf_tfm.distillation.model_spec import check_tokenizers
from hf_tfm.hub.results import RunRecord
from hf_tfm.tasks.model_fields import check_fields, new_config
from hf_tfm.tasks.old_text_classification import TextClassificationTask, predict, score
from hf_tfm.tasks.text_model import ARCHITECTURES, TOKEN_FIELDS, build_classifier, complete, keep_what_is_read
from hf_tfm.training.distill_cache import Yardstick, table_of_costs, wrote_cache
from hf_tfm.training.distill_run import (
    DistillationKnobs,
    begin_with_layers,
    check_teacher,
    learn,
    prepare,
    teacher_words,
)
from hf_tfm.training.run import Run, finish
from hf_tfm.training.text_run import TextArguments, load_labelled_texts, text_loader
from hf_tfm.training.text_tasks import run_tasks

CLASSIFIER = AutoModelForSequenceClassification


@dataclass(kw_only=True)
class DistillTaskArguments(DistillationKnobs, TextArguments):
    """Knobs of distilling a classifier of texts.

    Args:
        architecture: of a new student, bert or gpt.
        size: of a new student, see TfmBertConfig and TfmGPTConfig.
        model: fields of the configuration that differ from the size's, or from model_name_or_path's.
        model_name_or_path: folder or Hub id of a student to go on from, with the teacher's tokenizer.

    The others are those of `DistillationKnobs` and `TextArguments`.
    """

    architecture: Literal["bert", "gpt"] = "bert"
    size: str = "tinybert4"
    model: dict[str, int | float | bool | str | None] = field(default_factory=dict)
    model_name_or_path: str | None = None
    language_weight: ClassVar[float] = 0.0

    def __post_init__(self):
        super().__post_init__()
        if not self.model_name_or_path:
            config_class, _ = ARCHITECTURES[self.architecture]
            check_fields(config_class, self.model, TOKEN_FIELDS)
            new_config(config_class, self)


def distil(args: DistillTaskArguments, run: Run) -> RunRecord | None:
    """A whole run; its record, or None where it has written a cache or was asked to stop."""
    accelerator = run.accelerator
    args, texts = load_labelled_texts(args)
    data = texts.described(args)
    run.open(args, "text-classification", data, texts.validation[0])
    tokenizer = complete(AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=args.trust_remote_code))
    if args.model_name_or_path:
        check_tokenizers(
            complete(AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False)), tokenizer
        )
    student = build_classifier(args, tokenizer, texts.labels, teacher_words(args))
    begin_with_layers(args, student)

    def task_of(split: str) -> TextClassificationTask:
        # Both models are given all that the teacher's tokenizer makes; each takes what it knows.
        return TextClassificationTask(tokenizer, texts.label_ids(split))

    task = task_of(args.train_split)
    lessons = prepare(args, accelerator, task, student, CLASSIFIER)

    def loader_of(split: str, collate, learning: bool = False):
        return text_loader(args, accelerator, collate, tokenizer, texts.rows[split], learning)

    learning = loader_of(args.train_split, lessons.task.collate, learning=True)
    scored = {split: loader_of(split, lessons.compared(task_of(split)).collate) for split in texts.scored}
    decisive = scored[texts.validation[0]]

    def scores_of(model) -> dict[str, float]:
        found = predict(accelerator, task, model, decisive)
        return {"loss": found.loss, **{row["name"]: row["value"] for row in score(found, args.metrics)}}

    typical = int(sorted(text_lengths(decisive.examples))[len(decisive.examples) // 2])
    sample = {"input_ids": torch.ones(1, typical, dtype=torch.long)}
    metric, split = args.metrics[0], texts.validation[0]
    held = data["fingerprint"][split]
    yardstick = Yardstick(sample, lambda model: scores_of(model)[metric], f"{metric}, {split}", held)
    fingerprint = data["fingerprint"][args.train_split]
    if wrote_cache(args, accelerator, lessons, learning.examples, fingerprint, yardstick):
        return None
    check_teacher(args, lessons, scores_of)

    def score_validation(trained) -> dict[str, float]:
        return scores_of(trained.student) | lessons.distance(accelerator, trained, decisive)

    result = learn(
        args, run, lessons, learning, score_validation, lambda per_epoch, steps: args.resolve(per_epoch, steps)[0]
    )
    if result.stopped:
        run.stopped(result)
        return None
    keep_what_is_read(tokenizer, student)
    run.save(student.eval(), tokenizer)
    metrics = []
    for split, loader in scored.items():
        found = predict(accelerator, task, student, loader)
        metrics += [{**row, "split": split} for row in score(found, args.metrics)]
    costs = table_of_costs(args, accelerator, lessons, yardstick)
    return finish(run, student, task, result, metrics, costs, lessons.described(args))


def main(argv: Sequence[str] | None = None) -> int:
    return run_tasks(DistillTaskArguments, Path(__file__), argv, distil)


if __name__ == "__main__":
    run_recipe(__file__, main)
