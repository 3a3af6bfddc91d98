"""From scratch: a Swin Transformer learns digits, and what only shifted windows can tell, and else does not."""

import pytest
import torch
from test_vision_learning import TRAIN, digits, fit
from torch import Tensor

from hf_tfm import TfmSwinConfig, TfmSwinForImageClassification

DIGITS = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "embed_dim": 32,
    "depths": [2, 1],
    "num_heads": [2, 4],
    "window_size": 2,
    "mlp_ratio": 2.0,
    "drop_path_rate": 0.0,
}


def test_a_classifier_learns_digits():
    images, labels = digits()
    torch.manual_seed(0)
    model = TfmSwinForImageClassification(TfmSwinConfig(**DIGITS, num_labels=10))
    fit(model, 150, 4e-3, images, labels=labels)
    with torch.no_grad():
        found = model(images[TRAIN:]).logits.argmax(dim=-1)
    assert (found == labels[TRAIN:]).float().mean() > 0.75


def marks(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images of 4 x 4 pixels with a mark of +1 or -1 at (1, 1) and at (2, 2), in different windows; are they equal?"""
    signs = 2.0 * torch.randint(2, (rows, 2), generator=torch.Generator().manual_seed(seed)) - 1
    images = torch.zeros(rows, 1, 4, 4)
    images[:, 0, 1, 1], images[:, 0, 2, 2] = signs[:, 0], signs[:, 1]
    return images, (signs[:, 0] == signs[:, 1]).long()


@pytest.mark.parametrize("shift", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_only_a_shift_relates_two_windows(shift):
    """Without it the logits are a sum over windows, which cannot tell whether two marks are equal."""
    torch.manual_seed(0)
    fields = {**DIGITS, "image_size": 4, "patch_size": 1, "embed_dim": 16, "depths": [2], "num_heads": [2]}
    model = TfmSwinForImageClassification(TfmSwinConfig(**fields, num_labels=2, use_shift=shift))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for step in range(120):
        images, labels = marks(32, seed=1 + step)
        optimizer.zero_grad()
        model(images, labels=labels).loss.backward()
        optimizer.step()
    images, labels = marks(200, seed=0)
    with torch.no_grad():
        accuracy = (model.eval()(images).logits.argmax(dim=-1) == labels).float().mean()
    assert accuracy == 1 if shift else accuracy < 0.8
