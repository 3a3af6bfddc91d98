"""Train a Transformer to translate, from scratch or from a checkpoint, and evaluate, save and describe it.

    hf-tfm run translation_train --config quickstart                    about a minute on 2 CPU cores
    hf-tfm run translation_train --config multi30k_tiny --dataset_name DATA --output_dir runs/multi30k
    accelerate launch recipes/translation_train.py --config wmt14_base  as many GPUs as the launcher finds

Presets with their cost and expected numbers: recipes/presets/translation_train/.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

from hf_tfm.command import run_recipe
from hf_tfm.data import text
from hf_tfm.data.source import describe_source
from hf_tfm.hub.loading import load_tokenizer as read_tokenizer
from hf_tfm.hub.pretrained import TRANSLATIONS
from hf_tfm.limits import LARGEST_VOCABULARY, LONGEST, MOST_BEAMS
from hf_tfm.memory import new_model
from hf_tfm.tasks import translation
from hf_tfm.tasks.translation import TranslationTask, score, translate
from hf_tfm.training import TokenArguments, evaluate
from hf_tfm.training.run import Run, finish, recipe_main
from hf_tfm.training.token_run import check_stream, token_loader
from hf_tfm.values import check_bounds


@dataclass(kw_only=True)
class TranslationArguments(TokenArguments):
    """Knobs of translation training.

    Args:
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, or "number-words".
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        data_files: files by split, where dataset is a format such as "parquet".
        streaming: read the training split as it comes; needs max_steps.
        source_column: column of the source text, a dotted path, or a language in a column "translation".
        target_column: of the target text.
        train_split: split to learn from.
        validation_split: split that decides which weights are best.
        test_splits: splits that are only scored, in the end.
        max_length: training pairs with a longer side, in tokens, are left out; translations end there.
        tokenizer: folder or Hub id of a ready tokenizer; default, a byte-pair encoding is trained on the data.
        vocab_size: of the tokenizer that is trained.
        lowercase: the tokenizer that is trained lower-cases all text, source and target.
        size: see TfmTransformerConfig.
        model: fields of TfmTransformerConfig that differ from the size's.
        model_name_or_path: folder or Hub id of a model to go on from, with its tokenizer; takes the place of size and
            model.
        num_beams: of the final translations; 1 is greedy.
        length_penalty: exponent of the length that beam scores are divided by.
        iterations: refinement passes of a mask-predict model.
        metrics: of the final translations.
        license: licence of the model, for its card.
    """

    fitting: ClassVar = TRANSLATIONS

    dataset_name: str
    dataset_config: str | None = None
    dataset_revision: str | None = None
    data_files: dict[str, str | list[str]] | None = None
    streaming: bool = False
    source_column: str = "en"
    target_column: str = "de"
    train_split: str = "train"
    validation_split: str = "validation"
    test_splits: list[str] = field(default_factory=list)
    max_length: int = 256
    tokenizer: str | None = None
    vocab_size: int = 10_000
    lowercase: bool = False
    size: Literal["tiny", "base", "big"] = "tiny"
    model: dict[str, int | float | bool | str] = field(default_factory=dict)
    model_name_or_path: str | None = None
    num_beams: int = 5
    length_penalty: float = 1.0
    iterations: int = 10
    metrics: list[Literal["bleu", "bleu_lowercase", "chrf", "chrf_lowercase", "exact_match"]] = field(
        default_factory=lambda: ["bleu", "bleu_lowercase", "chrf", "chrf_lowercase"]
    )
    license: str | None = None

    def __post_init__(self):
        super().__post_init__()
        self.check_range(
            at_least_1="max_length vocab_size num_beams iterations",
            at_most={
                "max_length": LONGEST,
                "vocab_size": LARGEST_VOCABULARY,
                "num_beams": MOST_BEAMS,
                "iterations": 1000,
            },
        )
        check_bounds("length_penalty", self.length_penalty, -100, 100)
        self.check_distinct("test_splits", "metrics")
        if self.source_column == self.target_column:
            raise ValueError(f"source_column and target_column must be two columns, got {self.source_column} for both")
        if self.metric_for_best_model != "loss":
            translation.check_metrics([self.metric_for_best_model], "metric_for_best_model, if not loss,")
        if self.streaming:
            check_stream(self, self.max_length, (self.validation_split, *self.test_splits))
        if self.model_name_or_path and (self.model or self.tokenizer):
            raise ValueError(
                "model_name_or_path brings its own model and tokenizer: give no model or tokenizer beside it"
            )
        if self.lowercase and (self.model_name_or_path or self.tokenizer):
            raise ValueError(
                "lowercase is for a tokenizer that is trained: give none, and no model_name_or_path, beside it"
            )
        if not self.model_name_or_path:
            translation.check_positions(translation.build_config(self.size, self.model), self.max_length)


def load_pairs(args: TranslationArguments) -> dict:
    """{split: text pairs} of every split that is used."""
    splits = text.load_splits(
        args.dataset_name, args.dataset_config, args.dataset_revision, args.data_files, args.streaming
    )
    knobs = {**dict.fromkeys(args.test_splits, "test_splits"), args.validation_split: "validation_split"}
    pairs = {}
    for name, knob in {**knobs, args.train_split: "train_split"}.items():
        rows = text.text_pairs(text.take_split(splits, name, knob), args.source_column, args.target_column)
        pairs[name] = text.gather(rows) if args.streaming and knob != "train_split" else rows
    return pairs


def describe_data(args: TranslationArguments, pairs: dict) -> dict:
    """What the results file and the card say of the data."""
    return {
        "path": args.dataset_name,
        "name": args.dataset_config,
        **describe_source(args.dataset_name, args.dataset_revision),
        "source_column": args.source_column,
        "target_column": args.target_column,
        **text.describe(pairs),
    }


def load_tokenizer(args: TranslationArguments, pairs: dict):
    """The tokenizer that is named, or one trained on the data."""
    if ready := args.tokenizer or args.model_name_or_path:
        return read_tokenizer(
            ready, "tokenizer" if args.tokenizer else "model_name_or_path", None, args.trust_remote_code
        )
    return text.train_tokenizer(text.sentences(pairs[args.train_split]), args.vocab_size, args.lowercase)


def build_model(args: TranslationArguments, tokenizer):
    """The model to train, with weights drawn from the seed or taken from ``model_name_or_path``."""
    set_seed(args.seed)
    if args.model_name_or_path:
        model = translation.load_translator(args.model_name_or_path, tokenizer)
    else:
        config = translation.build_config(args.size, args.model, tokenizer)
        new = partial(AutoModelForSeq2SeqLM.from_config, trust_remote_code=False)
        model = new_model(new, config)
    translation.check_positions(model.config, args.max_length)
    if model.config.position_embedding_type == "learned":
        tokenizer.model_max_length = model.config.max_position_embeddings  # longer sources are cut
    model.generation_config = translation.generation_config(
        model.config, args.num_beams, args.length_penalty, args.max_length
    )
    return model


def work(args: TranslationArguments, run: Run) -> int:
    """A whole run; the exit status."""
    accelerator = run.accelerator
    pairs = load_pairs(args)
    run.open(args, "translation", describe_data(args, pairs), args.validation_split)
    tokenizer = run.once("tokenizer", lambda: load_tokenizer(args, pairs), AutoTokenizer.from_pretrained)
    model = build_model(args, tokenizer)
    task = TranslationTask(model.config, args.seed)
    generation = {"iterations": args.iterations} if task.masked else {}

    def loader(split: str, learning: bool):
        rows = text.tokenize_pairs(pairs[split], tokenizer, args.max_length)
        return token_loader(args, accelerator, task.collate, rows, text.pair_lengths, text.pair_length, learning)

    training, validation = loader(args.train_split, True), loader(args.validation_split, False)
    per_epoch = training.steps_per_epoch()
    max_steps = args.max_steps or math.ceil(args.num_train_epochs * per_epoch)

    def score_validation(trained) -> dict[str, float]:
        values = evaluate(accelerator, task, trained, validation)
        if args.metric_for_best_model != "loss":
            rows = pairs[args.validation_split]
            said = translate(trained, tokenizer, rows["source"], accelerator, generation)
            values[args.metric_for_best_model] = score(said, rows["target"], [args.metric_for_best_model])[0]["value"]
        return values

    eval_steps = args.eval_steps or per_epoch or max_steps
    result = run.train(task, model, training, args, max_steps, eval_steps, score_validation)
    if result.stopped:
        return run.stopped(result)
    run.save(model.eval(), tokenizer)
    metrics = []
    for split in args.test_splits:
        rows = pairs[split]
        said = translate(model, tokenizer, rows["source"], accelerator, generation, progress=args.progress)
        metrics += [{**row, "split": split} for row in score(said, rows["target"], args.metrics)]
    finish(run, model, task, result, metrics)
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    return recipe_main(TranslationArguments, Path(__file__), argv, work)


if __name__ == "__main__":
    run_recipe(__file__, main)
