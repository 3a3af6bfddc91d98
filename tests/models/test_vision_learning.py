"""Trained from scratch on scikit-learn's handwritten digits, both models learn, but not with a planted bug."""

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining, TfmViTConfig, TfmViTForImageClassification
from hf_tfm.models.modeling_mae import normalize_patches
from hf_tfm.models.patches import patchify

TRAIN = 1500  # of 1797 images; the rest is for testing
SIZES = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "intermediate_size": 64}
ENCODER = {"num_hidden_layers": 2, "num_attention_heads": 4}
MAE = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 64,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "mask_ratio": 0.25,
}


def digits() -> tuple[Tensor, Tensor]:
    """Images (1797, 1, 8, 8) with mean 0 and variance 1, and their labels (1797,)."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None]
    return (images - images.mean()) / images.std(), torch.tensor(data.target)


def fit(model: nn.Module, steps: int, lr: float, images: Tensor, **more: Tensor) -> nn.Module:
    optimizer = torch.optim.Adam(model.parameters(), betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(0, TRAIN, (64,), generator=generator)
        optimizer.zero_grad()
        model(images[rows], **{name: value[rows] for name, value in more.items()}).loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def classifier_accuracy(steps: int, forget_positions: bool = False, **fields) -> float:
    images, labels = digits()
    torch.manual_seed(0)
    model = TfmViTForImageClassification(TfmViTConfig(**SIZES, **ENCODER, num_labels=10, **fields))
    if forget_positions:
        model.vit.embeddings.positions = lambda grid, sizes: (torch.zeros(1, 1, 32), torch.zeros(1, 16, 32))
    with torch.enable_grad():
        fit(model, steps, 5e-3, images, labels=labels)
    return (model(images[TRAIN:]).logits.argmax(dim=-1) == labels[TRAIN:]).float().mean().item()


@pytest.mark.parametrize(
    "fields",
    [
        # The classifiers of test_swin_learning.py and of tests/recipes/test_vision_recipes.py learn, too.
        pytest.param({"position_embedding_type": "learned"}, marks=pytest.mark.slow),
        pytest.param({"position_embedding_type": "learned_2d", "pooling": "mean"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_classifier_learns_digits(fields):
    assert classifier_accuracy(450, **fields) > 0.75


@pytest.mark.slow
def test_without_positions_it_learns_little():
    """A bag of 2 x 2 patches still identifies some digits."""
    assert classifier_accuracy(450, forget_positions=True) < 0.6


def masked_losses(steps: int, forget_positions: bool = False, **fields) -> tuple[float, float, float]:
    """Loss on test images; the variance of their targets; the loss of predicting the mean image."""
    images, _ = digits()
    torch.manual_seed(0)
    model = TfmMAEForPreTraining(TfmMAEConfig(**{**SIZES, **MAE, **fields}))
    if forget_positions:
        model.decoder.decoder_pos_embed.zero_()
    fit(model, steps, 1e-2, images)
    targets = patchify(images, 2)
    if model.config.norm_pix_loss:
        targets = normalize_patches(targets)[0]
    mean_image = (targets[TRAIN:] - targets[:TRAIN].mean(dim=0)).square().mean()
    with torch.no_grad():
        loss = model(images[TRAIN:].repeat(4, 1, 1, 1)).loss  # four random masks of each
    return loss.item(), targets[TRAIN:].var().item(), mean_image.item()


@pytest.mark.parametrize(("normalised", "steps"), [pytest.param(False, 700, marks=pytest.mark.slow), (True, 320)])
def test_masked_autoencoder_learns_digits(normalised, steps):
    """It must beat the mean image, which positions alone would give, so it must use the visible patches."""
    loss, variance, mean_image = masked_losses(steps, norm_pix_loss=normalised)
    assert loss < 0.75 * variance and loss < 0.9 * mean_image


@pytest.mark.slow
@pytest.mark.parametrize(("normalised", "limit"), [(False, 0.6), (True, 0.85)])
def test_it_learns_at_the_mask_ratio_of_the_paper(normalised, limit):
    """With 4 of 16 patches visible, the measured loss is 0.50 of the variance, and 0.76 with normalized patches."""
    loss, variance, _ = masked_losses(400, norm_pix_loss=normalised, mask_ratio=0.75)
    assert loss < limit * variance


@pytest.mark.slow
def test_without_decoder_positions_it_learns_nothing():
    """All masked patches of an image then get the same prediction."""
    for ratio in (0.25, 0.75):
        loss, variance, mean_image = masked_losses(150, forget_positions=True, mask_ratio=ratio)
        assert loss > 0.8 * variance and loss > 1.5 * mean_image
