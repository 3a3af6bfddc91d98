"""Trained from scratch, BERT learns to fill masks and GPT to continue texts, but not with a planted bug.

All are slow, because those of tests/recipes/test_language_pretrain.py learn as much.
"""

import math

import pytest
import torch
from tiny_text import MODELS, progressions, twice
from torch import nn

from hf_tfm.models.cross_entropy import IGNORE_INDEX

pytestmark = pytest.mark.slow
HALF, LENGTH = 5, 10
SMALL = {"vocab_size": 16, "hidden_size": 48, "intermediate_size": 96}


def batch_of(name: str, rows: int, seed: int) -> dict:
    """Texts of a toy language with their labels."""
    if MODELS[name][0].__name__.startswith("TfmGPT"):
        ids = progressions(rows, LENGTH, seed)
        return {"input_ids": ids, "labels": ids}
    return twice(rows, HALF, seed)


def trained(name: str, steps: int, plant=lambda model: None, rate: float = 2e-3, **options):
    torch.manual_seed(0)
    model_class, fields = MODELS[name]
    model = model_class(model_class.config_class(**{**fields, **SMALL})).train()
    plant(model)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(**batch_of(name, 32, seed=1000 + step), **options).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval(), loss.item()


@torch.no_grad()
def mask_accuracy(model) -> float:
    """Share of masked tokens predicted correctly, in texts not seen in training."""
    found = twice(200, HALF, seed=1)
    labels = found.pop("labels")
    hidden = labels != IGNORE_INDEX
    got = model(**found).logits.argmax(dim=-1)
    return (got[hidden] == labels[hidden]).float().mean().item()


def continuation_accuracy(model) -> float:
    """Share of correct tokens after the first three, in texts not seen in training."""
    texts = progressions(200, LENGTH, seed=1)
    options = {"max_new_tokens": LENGTH - 3, "min_new_tokens": LENGTH - 3, "do_sample": False}
    got = model.generate(texts[:, :3], attention_mask=torch.ones(200, 3, dtype=torch.long), **options)
    return (got[:, 3:] == texts[:, 3:]).float().mean().item()


@pytest.mark.parametrize("return_logits", [True, False])
def test_bert_learns_to_fill_masks(return_logits):
    assert mask_accuracy(trained("masked", 400, return_logits=return_logits)[0]) > 0.95


def test_bert_without_positions_learns_nothing():
    """The masked token is determined only by its position."""

    def plant(model):
        table = model.bert.embeddings.position_embeddings.weight
        table.data.zero_()
        table.requires_grad_(False)

    assert mask_accuracy(trained("masked", 400, plant)[0]) < 0.5


@pytest.mark.parametrize(("name", "options"), [("causal", {}), ("post-norm", {"return_logits": False})])
def test_gpt_learns_to_continue(name, options):
    model, loss = trained(name, 250, rate=4e-3, **options)
    assert continuation_accuracy(model) > 0.95
    assert loss > math.log(4) / (LENGTH - 1) - 0.02, "the second token, one of four, is unpredictable"


def test_gpt_that_sees_the_target_learns_nothing():
    """Its loss is lower than the language allows, and it cannot generate on its own."""

    everything = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool)
    model, loss = trained("causal", 250, rate=4e-3, attention_mask=everything)
    assert loss < 0.1 and continuation_accuracy(model) < 0.5
