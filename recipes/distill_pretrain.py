"""Distil a language model into a smaller one on plain text: DistilBERT, TinyBERT's general stage, DistilGPT.

    hf-tfm run distill_pretrain --config quickstart --teacher runs/quickstart-bert      about 1 minute on 2 CPU cores
    hf-tfm run distill_pretrain --config distilbert --output_dir runs/distilbert
    hf-tfm run distill_cache distill_pretrain --config quickstart --teacher TEACHER --cache DIR --cache_epochs 4

Masks are a function of seed, epoch and sample, so a cache holds the teacher's activations for the same masked texts
that the student reads. Fine-tune the student with text_classification_train --model_name_or_path, or with
distill_task. Presets with their cost and expected results: recipes/presets/distill_pretrain/.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hf_tfm.command import run_recipe
from hf_tfm.distillation.model_spec import check_tokenizers
from hf_tfm.tasks.language import score
from hf_tfm.training import evaluate
from hf_tfm.training.distill_cache import Yardstick, table_of_costs, wrote_cache
from hf_tfm.training.distill_run import (
    DistillationKnobs,
    begin_with_layers,
    check_teacher,
    learn,
    prepare,
    teacher_words,
)
from hf_tfm.training.language_run import (
    LanguageArguments,
    build_model,
    describe_data,
    join_texts,
    language_loader,
    learned_from,
    load_texts,
    new_task,
    scored_splits,
)
from hf_tfm.training.run import Run, finish, recipe_main


@dataclass(kw_only=True)
class DistillPretrainArguments(DistillationKnobs, LanguageArguments):
    """Knobs of distilling a language model, with the teacher's tokenizer.

    They are those of `DistillationKnobs` and `LanguageArguments`.
    """

    size: str = "distilbert"

    def __post_init__(self):
        super().__post_init__()
        if self.sequences == "pairs":
            raise ValueError('sequences must be "packed" or "rows": next sentences are not distilled, got "pairs"')
        if self.tokenizer:
            raise ValueError(f'the tokenizer is the teacher\'s: give no tokenizer, got "{self.tokenizer}"')
        if self.streaming and self.cache:
            raise ValueError("cache needs to know the samples: it does not go with streaming")


def work(args: DistillPretrainArguments, run: Run) -> int:
    """A whole run; the exit status."""
    accelerator = run.accelerator
    masked = args.objective == "masked"
    auto_class = AutoModelForMaskedLM if masked else AutoModelForCausalLM
    texts = load_texts(args)
    data = describe_data(args, texts)
    run.open(args, "fill-mask" if masked else "text-generation", data, args.held_out)
    learned = join_texts(args, texts)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher, trust_remote_code=args.trust_remote_code)
    if args.model_name_or_path:
        check_tokenizers(AutoTokenizer.from_pretrained(args.model_name_or_path, trust_remote_code=False), tokenizer)
    tokenizer.model_max_length = args.max_length
    student = build_model(args, tokenizer, teacher_words(args))  # as many logits as the teacher's
    begin_with_layers(args, student)
    task = new_task(args, tokenizer)
    lessons = prepare(args, accelerator, task, student, auto_class)

    def loader(rows, collate, learning: bool = False):
        return language_loader(args, accelerator, collate, tokenizer, rows, learning)

    learning = loader(learned, lessons.task.collate, learning=True)
    scored = {split: loader(texts[split], task.collate) for split in scored_splits(args) if split != args.held_out}
    validation = loader(texts[args.held_out], lessons.compared(task).collate)

    def perplexity(model) -> float:
        return score(accelerator, task, model, validation)[0]["value"]

    sample = {"input_ids": torch.ones(1, args.max_length, dtype=torch.long)}
    held = data["fingerprint"][args.held_out]
    yardstick = Yardstick(sample, perplexity, f"perplexity, {args.held_out}", held, higher_is_better=False)
    if not args.streaming:
        fingerprint = str({name: data["fingerprint"][name] for name in learned_from(args, texts)})
        if wrote_cache(args, accelerator, lessons, learning.examples, fingerprint, yardstick):
            return 0
    check_teacher(args, lessons, lambda model: evaluate(accelerator, task, model, validation))

    def score_validation(trained) -> dict[str, float]:
        own = evaluate(accelerator, task, trained.student, validation)
        return own | lessons.distance(accelerator, trained, validation)

    result = learn(args, run, lessons, learning, score_validation)
    if result.stopped:
        return run.stopped(result)
    run.save(student.eval(), tokenizer)
    metrics = []
    for split, part in {args.held_out: validation, **scored}.items():
        metrics += [{**row, "split": split} for row in score(accelerator, task, student, part)]
    costs = table_of_costs(args, accelerator, lessons, yardstick)
    finish(run, student, task, result, metrics, costs, lessons.described(args))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(DistillPretrainArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
