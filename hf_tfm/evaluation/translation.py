"""Score a translation model on any split of any data set."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel

from ..data import text
from ..hub.loading import check_vocabulary, load_model, load_tokenizer
from ..limits import LIMITS
from ..tasks.translation import check_metrics, score, translate
from ..values import checked
from .results import check_options, describe, write


def load_seq2seq(model: str, revision: str | None = None, trust_remote_code: bool = False):
    """Model and tokenizer of a folder or a Hub id, on the best device there is."""
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    tokenizer = load_tokenizer(model, **options)
    if tokenizer.pad_token is None:
        raise ValueError(f'model "{model}": its tokenizer has no pad_token, which shorter texts are filled with')
    loaded = load_model(AutoModelForSeq2SeqLM, model, **options)
    check_vocabulary(model, loaded.config, tokenizer)
    return loaded.to(PartialState().device), tokenizer


def check_decoding(
    loaded: PreTrainedModel, model: str, num_beams: int | None, length_penalty: float | None, iterations: int | None
) -> None:
    """Refuse options of decoding that the model does not have.

    Args:
        loaded, model: the model and its name.

    Raises:
        ValueError: with the option.
    """
    masked = getattr(loaded.config, "decoding", "autoregressive") == "mask_predict"
    if iterations is not None and not masked:
        raise ValueError(f'iterations is for mask-predict models, and "{model}" is none: leave it out')
    if masked and (num_beams or length_penalty is not None):
        name, value = ("num_beams", num_beams) if num_beams else ("length_penalty", length_penalty)
        raise ValueError(f'{name} is for autoregressive models, and "{model}" is a mask-predict model, got {value}')
    size = getattr(loaded.config, "vocab_size", None)
    if num_beams is not None and size is not None and num_beams > size:
        raise ValueError(f"num_beams must be at most {size}, the size of the vocabulary, got {num_beams}")


@checked(**LIMITS)
def evaluate_translation(
    model: str,
    dataset_name: str,
    split: str = "test",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
    source_column: str = "en",
    target_column: str = "de",
    metrics: Sequence[str] = ("bleu", "bleu_lowercase", "chrf", "chrf_lowercase"),
    num_beams: int | None = None,
    length_penalty: float | None = None,
    iterations: int | None = None,
    max_samples: int | None = None,
    batch_tokens: int = 4096,
    mixed_precision: str = "no",
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Translate a split and score the translations.

    Args:
        model: folder or Hub id of a sequence-to-sequence model, ours or any other, with its tokenizer.
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, or "number-words".
        split: of the data set.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch of the data set on the Hub.
        data_files: files by split, where dataset_name is a format such as "parquet".
        source_column: column of the source text, a dotted path, or a language in a column "translation".
        target_column: of the reference translation.
        metrics: bleu, bleu_lowercase, chrf, chrf_lowercase, exact_match.
        num_beams: default, as saved with the model.
        length_penalty: default, as saved with the model.
        iterations: refinement passes of a mask-predict model.
        max_samples: score only the first rows.
        batch_tokens: padded source tokens times beams in a batch.
        mixed_precision: no (float32) or bf16 autocast.
        revision: commit, tag or branch of the model on the Hub.
        trust_remote_code: run the code a Hub repository brings; our own models need none where hf_tfm is installed.
        output: also write the result, with the answer to every row, to this JSON file.
        progress: show a progress bar.

    Returns:
        ``metrics``, rows of name, value, split and signature; model, dataset_name, rows and versions.

    Raises:
        ValueError: split, column or metric is not known, or a number is too small.
        FileNotFoundError: the folder of ``output`` does not exist.
    """
    if not metrics:
        raise ValueError("metrics must name at least one metric")
    check_metrics(metrics)
    counts = {"num_beams": num_beams, "iterations": iterations, "batch_tokens": batch_tokens}
    check_options(mixed_precision, output, max_samples=max_samples, **counts)
    if length_penalty is not None and not math.isfinite(length_penalty):
        raise ValueError(f"length_penalty must be finite, got {length_penalty}")
    splits = text.load_splits(dataset_name, dataset_config, dataset_revision, data_files)
    rows = text.text_pairs(text.take_split(splits, split, "split"), source_column, target_column)
    if max_samples is not None:
        rows = rows.select(range(min(max_samples, len(rows))))
    loaded, tokenizer = load_seq2seq(model, revision, trust_remote_code)
    check_decoding(loaded, model, num_beams, length_penalty, iterations)
    options = {"num_beams": num_beams, "length_penalty": length_penalty, "iterations": iterations}
    generation = {name: value for name, value in options.items() if value is not None}
    with torch.autocast(loaded.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        said = translate(loaded, tokenizer, rows["source"], None, generation, batch_tokens, progress)
    scores = [{**row, "split": split} for row in score(said, rows["target"], metrics)]
    result = {**describe(model, dataset_name, split, rows, scores, text.fingerprint), "generation": generation}
    if output:
        pairs = [
            {"source": s, "target": t, "translation": p}
            for s, t, p in zip(rows["source"], rows["target"], said, strict=True)
        ]
        write({**result, "translations": pairs}, output)
    return result
