"""Shared helpers of the text classification tests: examples, tiny models of several types, and training steps."""

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from hf_tfm import TfmBertConfig, TfmBertForSequenceClassification, TfmGPTConfig, TfmGPTForSequenceClassification
from hf_tfm.data.batching import StepLoader
from hf_tfm.data.labelled_texts import LengthBatchSampler
from hf_tfm.data.vocabulary import train_wordpiece
from hf_tfm.tasks.text_classification import Predictions, TextClassificationTask, predict
from hf_tfm.training import TrainingArguments, train_step
from hf_tfm.training.checkpoint import full_weights
from hf_tfm.training.optim import build_optimizer

SIZES = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "initializer_range": 0.2}


def tokenizer() -> PreTrainedTokenizerBase:
    return train_wordpiece(["abcdefghij"], 40)


VOCABULARY = len(tokenizer())


def bert(**fields) -> TfmBertForSequenceClassification:
    torch.manual_seed(0)
    config = TfmBertConfig(vocab_size=VOCABULARY, **SIZES, **STILL, **{"num_labels": 3, **fields})
    return TfmBertForSequenceClassification(config)


def gpt() -> TfmGPTForSequenceClassification:
    torch.manual_seed(0)
    return TfmGPTForSequenceClassification(
        TfmGPTConfig(vocab_size=VOCABULARY, pad_token_id=0, num_labels=3, **SIZES, **STILL)
    )


def classification() -> TextClassificationTask:
    return TextClassificationTask.for_model(bert(), tokenizer())


def numbers() -> TextClassificationTask:
    return TextClassificationTask.for_model(bert(num_labels=1), tokenizer())


# name -> task and model
CASES = {
    "classes": (classification, bert),
    "numbers": (numbers, lambda: bert(num_labels=1)),
    "language": (lambda: TextClassificationTask.for_model(gpt(), tokenizer(), language_weight=0.5), gpt),
}


def examples(count: int = 14, numbers: bool = False) -> list[dict]:
    """Random tokens in two segments, 4 to 11 tokens long; every fifth text has no label."""
    random = np.random.default_rng(0)
    rows = []
    for i, length in enumerate(random.integers(4, 12, count).tolist()):
        ids = random.integers(5, VOCABULARY, length).tolist()
        label = None if i % 5 == 4 else 0.3 * i if numbers else i % 3
        rows.append({"input_ids": ids, "token_type_ids": [0] * 2 + [1] * (length - 2), "label": label})
    return rows


def loader(task: TextClassificationTask, rows: list, micro: int | None = None, batch_size: int = 7, **ranks):
    """Shuffled steps of texts of similar length."""
    sampler = LengthBatchSampler(np.array([len(row["input_ids"]) for row in rows]), batch_size, seed=1)
    return StepLoader(rows, sampler, task.collator(), micro, **ranks)


def train_steps(accelerator: Accelerator, name: str, micro: int | None) -> dict[str, torch.Tensor]:
    """Weights after an epoch of two steps."""
    make, build = CASES[name]
    task, model = make(), build()
    # A large epsilon keeps the rounding noise of zero gradients small.
    args = TrainingArguments(output_dir=".", max_steps=2, adam_epsilon=1e-4, warmup_steps=0)
    prepared, optimizer = accelerator.prepare(model, build_optimizer(model, args))
    prepared.train()
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    for step in loader(task, examples(numbers=name == "numbers"), micro, **ranks).epoch(0):
        train_step(accelerator, task, prepared, optimizer, step)
    return full_weights(model)


def prediction(accelerator: Accelerator, count: int) -> Predictions:
    """Results of `predict` for some texts."""
    task = classification()
    ranks = {"rank": accelerator.process_index, "world_size": accelerator.num_processes}
    return predict(accelerator, task, bert(), loader(task, examples(count), batch_size=4, **ranks))
