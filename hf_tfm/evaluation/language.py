"""Score a language model, of masked or of next tokens, on any split of any data set of texts."""

from typing import Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedConfig,
)

from ..data.batching import StepLoader, TokenBudgetSampler
from ..data.language import sequence_lengths, text_rows, token_sequences
from ..data.source import load_splits, take_split
from ..data.text import fingerprint
from ..hub.loading import load_config, load_model, load_tokenizer
from ..limits import LIMITS
from ..tasks.language import CausalLanguageTask, LanguageTask, MaskedLanguageTask, check_vocabulary, score
from ..values import checked
from .reading import first, one_process
from .results import check_options, describe, write


@checked(**LIMITS)
def evaluate_language(
    model: str,
    dataset_name: str,
    split: str = "test",
    dataset_config: str | None = None,
    dataset_revision: str | None = None,
    data_files: dict[str, str | list[str]] | None = None,
    text_column: str | None = None,
    documents: bool = True,
    sequences: Literal["packed", "rows"] = "packed",
    max_length: int | None = None,
    mlm_probability: float = 0.15,
    whole_words: bool = False,
    seed: int = 0,
    max_samples: int | None = None,
    batch_tokens: int = 4096,
    mixed_precision: str = "no",
    revision: str | None = None,
    trust_remote_code: bool = False,
    output: str | None = None,
) -> dict[str, Any]:
    """Perplexity of a language model: of next tokens, or for a masked model of those that are masked.

    Args:
        model: folder or Hub id of a language model, ours or any other, with its tokenizer.
        dataset_name: what `datasets.load_dataset` takes, one json/jsonl/csv/parquet file, or "number-words".
        split: of the data set.
        dataset_config: configuration of the data set.
        dataset_revision: commit, tag or branch of the data set on the Hub.
        data_files: files by split, where dataset_name is a format such as "text" or "parquet".
        text_column: a column or a dotted path; default, "text" or the only column of strings.
        documents: each row is a document of its own; false: rows are pieces of a running text.
        sequences: packed blocks of running text, or rows, a text each.
        max_length: tokens of a sequence; default, the longest the model and its tokenizer take.
        mlm_probability: share of tokens that are masked.
        whole_words: mask words and not tokens.
        seed: of the masks.
        max_samples: score only the first rows.
        batch_tokens: padded tokens in a batch.
        mixed_precision: no (float32) or bf16 autocast.
        revision: commit, tag or branch of the model on the Hub.
        trust_remote_code: run the code a Hub repository brings; our own models need none where hf_tfm is installed.
        output: also write the result to this JSON file.

    Returns:
        ``metrics``, rows of name, value, split and signature: perplexity and token_loss; model, dataset_name, rows,
        ``max_length`` and versions.

    Raises:
        ValueError: split, column or option is not known, or a number is out of range.
        FileNotFoundError: the folder of ``output`` does not exist.
    """
    counts = {"max_length": max_length, "max_samples": max_samples, "batch_tokens": batch_tokens, "seed": seed}
    check_options(mixed_precision, output, **counts)
    if sequences not in ("packed", "rows"):
        raise ValueError(f'sequences must be "packed" or "rows", got "{sequences}"')
    splits = load_splits(dataset_name, dataset_config, dataset_revision, data_files)
    rows = first(text_rows(take_split(splits, split, "split"), text_column), max_samples)
    accelerator = one_process()
    where = {"revision": revision, "trust_remote_code": trust_remote_code}
    causal = is_causal(load_config(model, **where))
    tokenizer = load_tokenizer(model, **where)
    auto_class = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    loaded = load_model(auto_class, model, **where).to(accelerator.device)
    if causal and tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding counts for nothing
    length = max_length or min(loaded.config.max_position_embeddings, tokenizer.model_max_length)
    check_vocabulary(loaded.config, tokenizer, length)
    task: LanguageTask = CausalLanguageTask(tokenizer)
    if not causal:
        task = MaskedLanguageTask(tokenizer, mlm_probability, whole_words, seed)
    examples = token_sequences(rows, tokenizer, length, sequences, documents)
    sampler = TokenBudgetSampler(sequence_lengths(examples), max(batch_tokens, length), shuffle=False)
    loader = StepLoader(examples, sampler, task.collate)
    with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=mixed_precision == "bf16"):
        metrics = [{**row, "split": split} for row in score(accelerator, task, loaded, loader)]
    result = {**describe(model, dataset_name, split, rows, metrics, fingerprint), "max_length": length}
    if output:
        write(result, output)
    return result


def is_language_model(config: PreTrainedConfig) -> bool:
    """Whether a model was saved with an output layer that tells tokens, and is no translator."""
    saved = ", ".join(config.architectures or ())
    return any(kind in saved for kind in ("ForMaskedLM", "ForCausalLM", "LMHeadModel")) or (
        config.model_type in ("tfm_bert", "bert") and "ForPreTraining" in saved
    )


def is_causal(config: PreTrainedConfig) -> bool:
    """Whether it predicts next tokens, rather than masked ones."""
    saved = ", ".join(config.architectures or ())
    remote = getattr(config, "auto_map", None) or {}
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
    return known and "ForMaskedLM" not in saved and "ForPreTraining" not in saved
