"""The benchmark of Swin counts every product, and compares models of one size."""

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import swin_training, vision_peers
from hf_tfm import TfmSwinConfig, TfmSwinForImageClassification


def test_flops_count_every_product():
    """By torch's own count of a forward pass."""
    fields = {
        "image_size": 32,
        "patch_size": 2,
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    config = TfmSwinConfig(**fields, num_labels=vision_peers.CLASSES, attn_implementation="eager")
    model = TfmSwinForImageClassification(config).eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    assert 3 * counter.get_total_flops() == swin_training.training_flops(config)


def test_implementations_are_equal():
    """In their sizes and in the number of their outputs."""
    setting = swin_training.SwinSetting("swin", "tiny", 224, batch_size=1, compile=False, mae_authors=None)
    with torch.device("meta"):
        models = {name: make() for name, (make, _) in setting.implementations().items()}
    assert list(models) == ["ours", "transformers", "timm", "torchvision"]
    assert {sum(p.numel() for p in model.parameters()) for model in models.values()} == {28_288_354}
