"""Pretrain BERT on masked tokens, with or without next sentences, or GPT on next tokens.

    hf-tfm run language_pretrain --config quickstart                       about 1 minute on 2 CPU cores
    hf-tfm run language_pretrain --config bert_mini --output_dir runs/bert
    accelerate launch recipes/language_pretrain.py --config bert_base      as many GPUs as the launcher finds

What it learned is fine-tuned with text_classification_train --model_name_or_path. Presets with their cost and expected
numbers: recipes/presets/language_pretrain/.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import AutoTokenizer

from hf_tfm.command import run_recipe
from hf_tfm.tasks.language import score
from hf_tfm.training import evaluate
from hf_tfm.training.language_run import (
    LanguageArguments,
    build_model,
    describe_data,
    join_texts,
    language_loader,
    load_texts,
    load_tokenizer,
    new_task,
    scored_splits,
)
from hf_tfm.training.run import Run, finish, recipe_main


@dataclass(kw_only=True)
class PretrainArguments(LanguageArguments):
    """Knobs of language-model pretraining: those of `LanguageArguments`."""


def work(args: PretrainArguments, run: Run) -> int:
    """A whole run; the exit status."""
    accelerator = run.accelerator
    texts = load_texts(args)
    kind = "fill-mask" if args.objective == "masked" else "text-generation"
    run.open(args, kind, describe_data(args, texts), args.held_out)
    learned = join_texts(args, texts)
    tokenizer = run.load_or_create("tokenizer", lambda: load_tokenizer(args, learned), AutoTokenizer.from_pretrained)
    tokenizer.model_max_length = args.max_length
    model = build_model(args, tokenizer)
    task = new_task(args, tokenizer)

    def loader(rows, learning: bool = False):
        return language_loader(args, accelerator, task.collate, tokenizer, rows, learning)

    training = loader(learned, learning=True)
    scored = {split: loader(texts[split]) for split in scored_splits(args)}
    validation = scored[args.held_out]
    per_epoch = training.steps_per_epoch()
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * per_epoch)

    def score_validation(trained) -> dict[str, float]:
        return evaluate(accelerator, task, trained, validation)

    eval_steps = args.eval_steps or per_epoch or max_steps
    result = run.train(task, model, training, args, max_steps, eval_steps, score_validation)
    if result.stopped:
        return run.stopped(result)
    run.save(model.eval(), tokenizer)
    metrics = []
    for split, part in scored.items():
        metrics += [{**row, "split": split} for row in score(accelerator, task, model, part)]
    finish(run, model, task, result, metrics)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(PretrainArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
