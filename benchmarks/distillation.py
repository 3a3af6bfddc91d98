"""Distillation speed: steps of DistilBERT and TinyBERT, ours against a plain implementation, and cache sizes.

python -m benchmarks distillation --dataset nyu-mll/glue --dataset_name sst2

DistilBERT's step (a BERT-base teacher, 6 layers, 8 sequences of 128 tokens):
  plain    both models' logits of all tokens, the teacher in memory, soft targets and cosine over all tokens
  masked   our task: logits of masked tokens only
  cached   the same with the teacher's signals read from a cache
TinyBERT-4's step on inner layers:
  plain    transformers' BERT for both, returning attention and states of all layers, the teacher in memory
  online   our task
  cached   the same with the teacher's signals read from a cache
A step includes creating its batch and reading its part of the cache.
"""

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn.functional import cosine_similarity, cross_entropy, kl_div, log_softmax, mse_loss
from torch.optim import AdamW
from transformers import BertConfig, BertForMaskedLM, BertModel, DistilBertConfig, DistilBertForMaskedLM

from hf_tfm import TfmBertConfig, TfmBertForMaskedLM
from hf_tfm.data.language import Texts, text_rows, token_sequences
from hf_tfm.data.source import load_splits
from hf_tfm.data.vocabulary import train_wordpiece
from hf_tfm.distillation.cache import CachedTeacher, CacheFormat, write_cache
from hf_tfm.distillation.model_spec import spec_of
from hf_tfm.distillation.resolve import resolve_terms, signals_of
from hf_tfm.distillation.samples import TrainingSamples
from hf_tfm.distillation.student import StudentWithProjections, freeze_unused
from hf_tfm.distillation.teacher import Teacher
from hf_tfm.distillation.terms import Term
from hf_tfm.tasks.distillation import DistillationTask
from hf_tfm.tasks.language_modeling import LanguageModelingTask
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.optim import build_optimizer

from . import common

DISTILBERT = (
    Term(kind="soft_target", weight=5.0, temperature=2.0),
    Term(kind="label", weight=2.0),
    Term(kind="cosine"),
)
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
TINYBERT = (Term(kind="embedding"), Term(kind="hidden_state"), Term(kind="attention_score"))


def main(
    dataset: str = "nyu-mll/glue",
    dataset_name: str | None = None,
    text_column: str | None = None,
    batch_size: int = 8,
    length: int = 128,
    vocab_size: int = 30_522,
    rounds: int = 5,
    precisions: tuple[str, ...] = ("no", "bf16"),
) -> None:
    """Measure and write benchmarks/results/distillation.json.

    Args:
        dataset, dataset_name, text_column: texts; one batch of them is used repeatedly.
        batch_size: sequences per batch; length: tokens of each.
        vocab_size: of the models; the texts use a smaller vocabulary trained on them.
        rounds: timed rounds; medians are reported.
        precisions: no (float32) and bf16: autocast of the students and of the plain teacher, ours has such weights.
    """
    rows = text_rows(load_splits(dataset, dataset_name)["train"], text_column)
    tokenizer = train_wordpiece(Texts(rows), 8000)
    found = token_sequences(rows.take(2000), tokenizer, length).filter(lambda row: len(row["input_ids"]) == length)
    examples = [found[i] for i in range(batch_size)]
    task = LanguageModelingTask.for_model(None, tokenizer)
    found_of = {label(precision): measure(task, examples, vocab_size, precision, rounds) for precision in precisions}
    teacher = bert_base(vocab_size)
    sizes = {f"top {k} logits": cache_bytes(teacher, task, found, k) for k in (32, 128)}
    common.write(
        "distillation",
        {
            **{"dataset": dataset, "batch_size": batch_size, "length": length, "rounds": rounds},
            **{"precisions": found_of, "kilobytes_per_sequence_of_64": sizes},
        },
    )


def bert_base(vocab_size: int) -> BertForMaskedLM:
    """The teacher, with random weights."""
    torch.manual_seed(0)
    return BertForMaskedLM(BertConfig(vocab_size=vocab_size)).eval()


def measure(task: LanguageModelingTask, examples: list, vocab_size: int, precision: str, rounds: int) -> dict:
    """Seconds of every step, their ratios, and cache size per sequence in kB."""
    caches = {}
    with tempfile.TemporaryDirectory() as folder:
        variants = {
            "distilbert_plain": plain_distilbert(bert_base(vocab_size), task, examples, precision),
            "tinybert4_plain": plain_tinybert(bert_base(vocab_size), task, examples, precision),
        }
        teacher = Teacher(bert_base(vocab_size), label(precision))
        for name, terms, size in (("distilbert", DISTILBERT, "distilbert"), ("tinybert4", TINYBERT, "tinybert4")):
            config = TfmBertConfig.of_size(size, vocab_size=vocab_size)
            place = Path(folder) / name
            caches[name], more = steps(name, teacher, terms, config, task, examples, place, precision)
            variants |= more
        rates = common.interleaved(variants, rounds)
    ratios = {
        f"{peer} / {ours}": round(common.ratio(rates, ours, peer), 2)
        for ours, peer in (
            ("distilbert_masked", "distilbert_plain"),
            ("distilbert_cached", "distilbert_plain"),
            ("tinybert4_cached", "tinybert4_plain"),
            ("tinybert4_cached", "tinybert4_online"),
        )
    }
    seconds = {name: round(len(examples) / statistics.median(r), 3) for name, r in rates.items()}
    return {"seconds_per_step": seconds, "times_faster": ratios, "kilobytes_per_sequence": caches}


def plain_distilbert(
    teacher: BertForMaskedLM, task: LanguageModelingTask, examples: list, precision: str
) -> Callable[[int], int]:
    """DistilBERT's losses as in the authors' code, over all tokens."""
    student = DistilBertForMaskedLM(DistilBertConfig(vocab_size=teacher.config.vocab_size))

    def loss(theirs, ours, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        soft = kl_div(
            log_softmax(ours.logits.flatten(0, 1) / 2.0, -1),
            log_softmax(theirs.logits.flatten(0, 1) / 2.0, -1),
            reduction="batchmean",
            log_target=True,
        )
        label = cross_entropy(ours.logits.flatten(0, 1).float(), batch["labels"].flatten())
        cosine = 1.0 - cosine_similarity(ours.hidden_states[-1], theirs.hidden_states[-1], dim=-1).mean()
        return 5.0 * 4.0 * soft + 2.0 * label + cosine

    return plain(teacher, student, student.parameters(), loss, task, examples, precision)


def plain_tinybert(
    teacher: BertForMaskedLM, task: LanguageModelingTask, examples: list, precision: str
) -> Callable[[int], int]:
    """TinyBERT's losses on attention, states and embeddings returned by all layers of transformers' models."""
    sizes = {name: getattr(TfmBertConfig.of_size("tinybert4"), name) for name in SIZES}
    student = BertModel(BertConfig(vocab_size=teacher.config.vocab_size, **sizes, attn_implementation="eager"))
    fit = torch.nn.Linear(student.config.hidden_size, teacher.config.hidden_size)
    teacher.bert.set_attn_implementation("eager")
    step = teacher.config.num_hidden_layers // student.config.num_hidden_layers

    def loss(theirs, ours, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        states = sum(
            mse_loss(fit(a), b) for a, b in zip(ours.hidden_states, theirs.hidden_states[::step], strict=True)
        )
        attention = zip(ours.attentions, theirs.attentions[step - 1 :: step], strict=True)
        return states + sum(mse_loss(a, b) for a, b in attention)

    weights = [*student.parameters(), *fit.parameters()]
    return plain(teacher.bert, student, weights, loss, task, examples, precision, output_attentions=True)


def plain(
    teacher, student, weights, loss: Callable, task: LanguageModelingTask, examples: list, precision: str, **options
) -> Callable[[int], int]:
    """A plain step: both models return everything, and ``loss(theirs, ours, batch)`` compares it."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    student, optimizer = accelerator.prepare(student.train(), AdamW(weights, lr=1e-4))
    teacher.to(accelerator.device)
    options["output_hidden_states"] = True
    collate = task.collator()

    def work(number: int) -> int:
        batch = collate(examples, list(range(len(examples))), number)
        batch = {name: value.to(accelerator.device) for name, value in batch.items()}
        inputs = task.inputs(batch)
        with torch.no_grad(), accelerator.autocast():
            theirs = teacher(**inputs, **options)
        accelerator.backward(loss(theirs, student(**inputs, **options), batch))
        optimizer.step()
        optimizer.zero_grad()
        return len(examples)

    return work


def steps(
    name: str,
    teacher: Teacher,
    terms: tuple[Term, ...],
    config: TfmBertConfig,
    task: LanguageModelingTask,
    examples: list,
    folder: Path,
    precision: str,
) -> tuple[float, dict[str, Callable[[int], int]]]:
    """Cache size per sequence in kB, and steps with the teacher online and cached."""
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    teacher.model.to(accelerator.device)
    resolved = resolve_terms(terms, spec_of(TfmBertForMaskedLM(config)), teacher.spec)
    top_k, temperature = (32, 2.0) if name == "distilbert" else (None, 1.0)
    form = CacheFormat(signals_of(resolved, "teacher"), 1, top_k, temperature=temperature)
    report = write_cache(teacher, samples_of(task, examples), folder, form)
    indices, variants = list(range(len(examples))), {}
    online = "masked" if name == "distilbert" else "online"
    for kind, source in ((online, teacher), ("cached", CachedTeacher(folder))):
        distilled = DistillationTask.around(task, source, resolved)
        collate = distilled.collator()
        model = StudentWithProjections(TfmBertForMaskedLM(config), resolved)
        args = TrainingArguments(output_dir=".", max_steps=1, learning_rate=1e-4)
        freeze_unused(accelerator, distilled, model, collate(examples, indices, 0))
        model, optimizer = accelerator.prepare(model.train(), build_optimizer(model, args))

        def work(number: int, distilled=distilled, collate=collate, model=model, optimizer=optimizer) -> int:
            train_step(accelerator, distilled, model, optimizer, [collate(examples, indices, 0)])
            return len(examples)

        variants[f"{name}_{kind}"] = work
    return round(report.bytes_per_sample / 1e3, 2), variants


def samples_of(task: LanguageModelingTask, examples: list) -> TrainingSamples:
    """Examples in the form a teacher reads."""
    return TrainingSamples(examples, task.collator(), task.inputs, task.target_positions, data="")


def cache_bytes(teacher: BertForMaskedLM, task: LanguageModelingTask, rows, top_k: int) -> float:
    """Cache size in kB of the largest logits for a sequence of 64 tokens."""
    examples = [{"input_ids": rows[i]["input_ids"][:64]} for i in range(8)]
    with tempfile.TemporaryDirectory() as folder:
        form = CacheFormat(top_k=top_k)
        report = write_cache(Teacher(teacher), samples_of(task, examples), Path(folder) / "cache", form)
    return round(report.bytes_per_sample / 1e3, 2)


def label(precision: str) -> str:
    """The dtype used for computation."""
    return {"no": "fp32", "bf16": "bf16"}[precision]
