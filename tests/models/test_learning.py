"""Trained from scratch, a model learns to reverse a sequence of digits, but not with a planted bug."""

import pytest
import torch
from tiny_models import tiny_config
from torch import nn

from hf_tfm import TfmTransformerForConditionalGeneration
from hf_tfm.models.cross_entropy import IGNORE_INDEX

PAD, EOS, FIRST_DIGIT, LONGEST = 0, 2, 5, 4


def words(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Random sequences of 2 to `LONGEST` digits, labelled with the reversed sequence and EOS."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LONGEST + 1, (rows, 1), generator=generator)
    digits = torch.randint(FIRST_DIGIT, FIRST_DIGIT + 10, (rows, LONGEST), generator=generator)
    positions = torch.arange(LONGEST + 1)
    backwards = digits.gather(1, (lengths - 1 - positions).clamp_min(0).clamp_max(LONGEST - 1))
    labels = backwards.masked_fill(positions == lengths, EOS).masked_fill(positions > lengths, IGNORE_INDEX)
    mask = positions[:-1] < lengths
    return {"input_ids": digits.masked_fill(~mask, PAD), "attention_mask": mask.long(), "labels": labels}


def trained(steps: int, plant=lambda model: None, **fields) -> TfmTransformerForConditionalGeneration:
    torch.manual_seed(0)
    fields = {"vocab_size": 16, "hidden_size": 48, "max_length_offset": 4, "label_smoothing": 0.0, **fields}
    model = TfmTransformerForConditionalGeneration(tiny_config(**fields))
    plant(model)
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.2)
    for step in range(steps):
        optimizer.zero_grad()
        model(**words(32, seed=1000 + step)).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


def accuracy(model: TfmTransformerForConditionalGeneration) -> float:
    """Token accuracy on 200 sequences not seen in training."""
    batch = words(200, seed=1)
    labels = batch.pop("labels")
    got = model.generate(**batch, max_length=LONGEST + 2)[:, 1:]
    got = nn.functional.pad(got, (0, labels.shape[1] - got.shape[1]))
    real = labels != IGNORE_INDEX
    return (got[real] == labels[real]).float().mean().item()


@pytest.mark.parametrize(
    ("decoding", "steps", "norm_first"),
    [
        ("autoregressive", 250, False),
        pytest.param("mask_predict", 330, True, marks=pytest.mark.slow),  # see tests/clients/test_seq2seq_trainer.py
        pytest.param("autoregressive", 250, True, marks=pytest.mark.slow),
        pytest.param("mask_predict", 330, False, marks=pytest.mark.slow),
    ],
)
def test_model_learns(decoding, steps, norm_first):
    assert accuracy(trained(steps, decoding=decoding, norm_first=norm_first)) > 0.95


@pytest.mark.slow
def test_without_a_causal_mask_loss_is_low_but_nothing_is_learned():
    """A decoder that sees the next token copies the answer and fails without it; the test above would detect this."""

    def look_ahead(model, sees_all: bool = True):
        for layer in model.get_decoder().layers:
            layer.self_attn.is_causal = not sees_all
        model.get_decoder().is_causal = not sees_all

    model = trained(200, plant=look_ahead)
    assert model(**words(200, seed=1)).loss < 0.1
    look_ahead(model, sees_all=False)
    assert accuracy(model) < 0.5


@pytest.mark.slow
def test_without_positions_nothing_is_learned():
    def forget(model):
        for stack in (model.get_encoder(), model.get_decoder()):
            stack.embedding.positions.table.zero_()

    assert accuracy(trained(150, plant=forget)) < 0.6
