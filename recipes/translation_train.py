"""Train a Transformer to translate, from scratch or from a checkpoint, and evaluate, save and describe it.

    hf-tfm run translation_train --config quickstart                    about 2 minutes on 2 CPU cores
    hf-tfm run translation_train --config multi30k_tiny --dataset DATA --output_dir runs/multi30k
    accelerate launch recipes/translation_train.py --config wmt14_base  as many GPUs as the launcher finds

Presets with their cost and expected numbers: recipes/presets/translation_train/.
"""

import math
import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, set_seed

import hf_tfm
from hf_tfm.data import text
from hf_tfm.data.batching import StepLoader, StreamLoader, TokenBudgetSampler
from hf_tfm.tasks.translation import TranslationTask, generation_config, score, translate
from hf_tfm.training import TrainingArguments, evaluate, train
from hf_tfm.training.arguments import parse_arguments
from hf_tfm.training.run import finish, open_run, start_accelerator


@dataclass(kw_only=True)
class TranslationArguments(TrainingArguments):
    """Knobs of translation training.

    Args:
        dataset: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, or "number-words".
        dataset_name: configuration of the data set.
        dataset_revision: commit, tag or branch on the Hub.
        data_files: files by split, where dataset is a format such as "parquet".
        streaming: read the training split as it comes; needs num_steps.
        source_column: column of the source text, a dotted path, or a language in a column "translation".
        target_column: of the target text.
        train_split: split to learn from.
        validation_split: split that decides which weights are best.
        test_splits: splits that are only scored, in the end.
        max_length: training pairs with a longer side, in tokens, are left out; translations end there.
        tokenizer: folder or Hub id of a ready tokenizer; default, a byte-pair encoding is trained on the data.
        vocab_size: of the tokenizer that is trained.
        lowercase: lower-case all text, source and target.
        size: tiny, base or big (see TfmTransformerConfig).
        model: fields of TfmTransformerConfig that differ from the size's.
        init_from: folder or Hub id of a model to go on from, with its tokenizer; takes the place of size and model.
        num_beams: of the final translations; 1 is greedy.
        length_penalty: exponent of the length that beam scores are divided by.
        iterations: refinement passes of a mask-predict model.
        metrics: of the final translations: bleu, bleu_lowercase, chrf, exact_match.
        license: licence of the model, for its card.
    """

    dataset: str
    dataset_name: str | None = None
    dataset_revision: str | None = None
    data_files: dict[str, str] | None = None
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
    size: str = "tiny"
    model: dict[str, int | float | bool | str] = field(default_factory=dict)
    init_from: str | None = None
    num_beams: int = 5
    length_penalty: float = 1.0
    iterations: int = 10
    metrics: list[str] = field(default_factory=lambda: ["bleu", "bleu_lowercase", "chrf"])
    license: str | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.streaming and self.num_steps is None:
            raise ValueError("streaming needs num_steps: the length of a stream is not known")
        if self.init_from and (self.model or self.tokenizer):
            raise ValueError("init_from brings its own model and tokenizer: give no model or tokenizer beside it")


def build_model(args: TranslationArguments, tokenizer):
    """The model to train, with weights drawn from the seed or taken from ``init_from``."""
    set_seed(args.seed)
    if args.init_from:
        return AutoModelForSeq2SeqLM.from_pretrained(args.init_from)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos", "mask")}
    known = hf_tfm.TfmTransformerConfig.__dataclass_fields__
    if unknown := sorted(set(args.model) - set(known)):
        raise ValueError(f"model.{unknown[0]} is not a field of TfmTransformerConfig")
    fields = {**ids, "decoder_start_token_id": ids["bos_token_id"], "vocab_size": len(tokenizer), **args.model}
    return AutoModelForSeq2SeqLM.from_config(hf_tfm.TfmTransformerConfig.of_size(args.size, **fields))


def describe_data(args: TranslationArguments) -> dict[str, str | None]:
    """What the card says of the data."""
    return {
        "path": args.dataset,
        "name": args.dataset_name,
        "revision": args.dataset_revision,
        "source_column": args.source_column,
        "target_column": args.target_column,
    }


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(TranslationArguments, Path(__file__), argv)
    accelerator = start_accelerator(args)
    splits = text.load_splits(args.dataset, args.dataset_name, args.dataset_revision, args.data_files, args.streaming)
    names = {args.train_split: "train_split", args.validation_split: "validation_split"}
    names |= {name: "test_splits" for name in args.test_splits}
    pairs = {
        name: text.text_pairs(text.take_split(splits, name, knob), args.source_column, args.target_column)
        for name, knob in names.items()
    }
    if args.streaming:
        pairs = {k: v if k == args.train_split else text.gather(v) for k, v in pairs.items()}
    run = open_run(accelerator, args, "translation", {name: text.describe(rows) for name, rows in pairs.items()})

    def make_tokenizer():
        if args.tokenizer or args.init_from:
            return AutoTokenizer.from_pretrained(args.tokenizer or args.init_from)
        rows = pairs[args.train_split]
        texts = (text for row in rows for text in (row["source"], row["target"]))
        return text.train_tokenizer(texts, args.vocab_size, args.lowercase)

    tokenizer = run.once("tokenizer", make_tokenizer, AutoTokenizer.from_pretrained)
    model = build_model(args, tokenizer)
    task = TranslationTask(model.config, tokenizer, args.seed)
    placement = {
        "rank": accelerator.process_index,
        "world_size": accelerator.num_processes,
        "pin_memory": accelerator.device.type == "cuda",
    }

    def loader(split: str, training: bool) -> StepLoader | StreamLoader:
        rows = text.tokenize_pairs(pairs[split], tokenizer, args.max_length)
        if training:
            placement.update(num_workers=args.num_workers, micro_batch_tokens=args.micro_batch_tokens)
        if training and args.streaming:
            return StreamLoader(rows, text.pair_length, args.batch_tokens, task.collate, args.seed, **placement)
        sampler = TokenBudgetSampler(text.pair_lengths(rows), args.batch_tokens, args.seed, shuffle=training)
        return StepLoader(rows, sampler, task.collate, **placement)

    validation = loader(args.validation_split, False)
    training = loader(args.train_split, True)
    per_epoch = None if args.streaming else training.steps_per_epoch()
    num_steps = args.num_steps or math.ceil(args.num_epochs * per_epoch)
    model.generation_config = generation_config(model.config, args.num_beams, args.length_penalty, args.max_length)

    generation = {"iterations": args.iterations} if task.masked else {}

    def score_validation(trained) -> dict[str, float]:
        values = evaluate(accelerator, task, trained, validation)
        if args.best_metric != "loss":
            rows = pairs[args.validation_split]
            said = translate(trained, tokenizer, rows["source"], accelerator, generation)
            values[args.best_metric] = score(said, rows["target"], [args.best_metric])[0]["value"]
        return values

    result = train(
        accelerator,
        task,
        model,
        training,
        args,
        num_steps,
        args.eval_steps or per_epoch or num_steps,
        score_validation,
    )
    if result.stopped:
        return run.stopped(result)
    model.eval()
    metrics = []
    for split in args.test_splits:
        rows = pairs[split]
        said = translate(model, tokenizer, rows["source"], accelerator, generation, progress=args.progress)
        metrics += [{**row, "split": split} for row in score(said, rows["target"], args.metrics)]
    finish(run, model, tokenizer, task, result, metrics, describe_data(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
