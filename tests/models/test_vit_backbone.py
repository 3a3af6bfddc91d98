"""The hybrid's convolutional stem, and the Vision Transformer as a backbone."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import largest_difference
from tiny_vision import HYBRID, gradients, tiny_backbone, tiny_images, tiny_vit, tiny_vit_config
from torch import Tensor, nn
from transformers import AutoBackbone

from hf_tfm import TfmViTBackbone, TfmViTForImageClassification, TfmViTModel
from hf_tfm.models.backbones import TimmFeatures


def stem_of(model: TfmViTForImageClassification) -> dict[str, Tensor]:
    return model.vit.embeddings.backbone.state_dict()


def test_hybrid_reads_a_feature_map():
    model, images = tiny_vit(**HYBRID), tiny_images(2, 64, 64)
    embeddings = model.vit.embeddings
    features = embeddings.backbone(images)[-1]
    assert features.shape == (2, 512, 2, 2) and embeddings.grid == (2, 2)
    _, positions = embeddings.positions((2, 2))
    tokens = features.flatten(2).transpose(1, 2) @ embeddings.patch_embeddings.projection.weight.flatten(1).T
    tokens = tokens + embeddings.patch_embeddings.projection.bias + positions
    assert largest_difference(embeddings(images)[:, 1:], tokens) < 1e-5
    assert model(tiny_images(2, 96, 64)).logits.shape == (2, 5), "positions are resized"


@pytest.mark.parametrize(("index", "channels", "stride"), [(-1, 512, 32), (-2, 256, 16)])
@pytest.mark.parametrize("size", [(64, 64), (65, 90)], ids=str)
def test_grid_is_computed_without_running_the_stem(index, channels, stride, size):
    features = TimmFeatures("resnet18", 1, (index,))
    assert (features.channels, features.stride) == ([channels], stride)
    assert features.eval()(tiny_images(1, *size, channels=1))[-1].shape == (1, channels, *features.grid(*size))


def test_other_feature_maps_with_larger_patches():
    model = tiny_vit(backbone="resnet18", backbone_out_index=-2, image_size=64, patch_size=2, num_channels=1)
    assert model.vit.embeddings.grid == (2, 2)
    assert model(tiny_images(2, 64, 64, channels=1)).logits.shape == (2, 5)
    with pytest.raises(ValueError, match=r"pixel_values must be a multiple of the patch .* got 5 x 4 .* of 2 x 2"):
        model(tiny_images(2, 80, 64, channels=1))
    with pytest.raises(ValueError, match=r"image_size must be a multiple of the patch .* got 4 x 3"):
        tiny_vit(backbone="resnet18", backbone_out_index=-2, image_size=[64, 48], patch_size=2)


def test_stem_is_saved_and_loaded(tmp_path):
    model, images = tiny_vit(**HYBRID), tiny_images(2, 64, 64)
    model.save_pretrained(tmp_path / "whole")
    loaded, info = TfmViTForImageClassification.from_pretrained(tmp_path / "whole", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded.eval()(images).logits, model(images).logits)
    model.vit.save_pretrained(tmp_path / "encoder")
    loaded, info = TfmViTForImageClassification.from_pretrained(tmp_path / "encoder", output_loading_info=True)
    assert info["missing_keys"] == {"classifier.weight", "classifier.bias"}
    assert all(torch.equal(value, stem_of(model)[name]) for name, value in stem_of(loaded).items())


def test_missing_stem_is_initialized(tmp_path):
    """By torch's default initialization, as in a model created from its configuration, not left uninitialized."""
    tiny_vit(**HYBRID).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if ".backbone." not in k}, file, metadata={"format": "pt"})
    loaded, info = TfmViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] and all(".backbone." in name for name in info["missing_keys"])
    for model in (loaded, TfmViTForImageClassification(tiny_vit_config(**HYBRID))):
        stem = dict(model.vit.embeddings.backbone.named_modules())
        assert sum(isinstance(module, nn.GroupNorm) for module in stem.values()) == 20
        for name, module in stem.items():
            if isinstance(module, nn.GroupNorm):
                assert module.weight.eq(1).all() and module.bias.eq(0).all(), name
            elif isinstance(module, nn.Conv2d):
                bound = module.weight[0].numel() ** -0.5
                assert 0.9 * bound < module.weight.abs().max() <= bound, name


def test_micro_batches_of_a_hybrid_equal_one_batch():
    """Loss, gradients and saved statistics do not depend on which images share a batch, also in training."""
    images, labels, found = tiny_images(4, 64, 64), torch.tensor([0, 1, 2, 3]), []
    for size in (4, 2, 1):
        model = tiny_vit(**HYBRID).train()
        before = {name: value.clone() for name, value in model.named_buffers()}
        losses = [
            model(part, labels=classes).loss * len(part) / 4
            for part, classes in zip(images.split(size), labels.split(size), strict=True)
        ]
        sum(losses).backward()
        found.append((sum(losses).item(), gradients(model)))
        assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    (loss, whole), *others = found
    for other, parts in others:
        assert other == pytest.approx(loss, rel=1e-5)
        assert (whole - parts).norm() < 1e-5 * whole.norm()


def test_stem_is_trained():
    model = tiny_vit(**HYBRID).train()
    model(tiny_images(4, 64, 64), labels=torch.tensor([0, 1, 2, 3])).loss.backward()
    assert gradients(model.vit.embeddings.backbone).abs().max() > 1e-4


def test_backbone_returns_feature_maps_of_chosen_blocks():
    model, images = tiny_backbone(out_indices=[0, 2, 3]), tiny_images(2, 24, 8)
    output = model(images)
    assert [tuple(features.shape) for features in output.feature_maps] == [(2, 32, 6, 2)] * 3
    assert model.out_features == ["stem", "stage2", "stage3"] and model.channels == [32] * 3
    assert output.hidden_states is None and output.attentions is None
    last = model.vit(images).last_hidden_state[:, 1:]
    for row in range(6):
        for column in range(2):
            assert largest_difference(output.feature_maps[-1][:, :, row, column], last[:, row * 2 + column]) < 1e-6
    assert len(model(images, output_hidden_states=True).hidden_states) == 4
    assert len(model(images, output_attentions=True).attentions) == 3


def test_backbone_returns_the_last_block_by_default():
    model = tiny_backbone()
    assert model.out_features == ["stage3"] and len(model(tiny_images()).feature_maps) == 1
    names = tiny_backbone(out_features=["stage1", "stage3"])
    assert names.out_indices == [1, 3] and len(names(tiny_images()).feature_maps) == 2


def test_backbone_of_a_mean_pooling_model_uses_its_norm():
    model = tiny_backbone(pooling="mean")
    features = model(tiny_images()).feature_maps[0]
    states = model(tiny_images(), output_hidden_states=True).hidden_states[-1]
    expected = model.vit.fc_norm(states)[:, 1:].transpose(1, 2).unflatten(2, (4, 4))
    assert largest_difference(features, expected) < 1e-6
    features.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "no unexpected weights"


def test_hybrid_backbone():
    model = tiny_backbone(**HYBRID)
    assert model(tiny_images(2, 64, 96)).feature_maps[0].shape == (2, 32, 2, 3)


def test_auto_backbone(tmp_path):
    model = AutoBackbone.from_config(tiny_vit_config(out_indices=[1, 3]))
    assert isinstance(model, TfmViTBackbone) and model.out_indices == [1, 3]
    model.save_pretrained(tmp_path / "backbone")
    again = TfmViTBackbone.from_pretrained(tmp_path / "backbone").eval()  # AutoBackbone loads only from repositories
    images = tiny_images()
    for one, other in zip(again(images).feature_maps, model.eval()(images).feature_maps, strict=True):
        assert torch.equal(one, other)
    classifier = tiny_vit()
    classifier.save_pretrained(tmp_path / "classifier")
    chosen = TfmViTBackbone.from_pretrained(tmp_path / "classifier", out_features=["stage2"]).eval()
    assert chosen.out_features == ["stage2"]
    states = classifier(images, output_hidden_states=True).hidden_states[2]
    expected = classifier.vit.layernorm(states)[:, 1:].transpose(1, 2).flatten(2)
    assert largest_difference(chosen(images).feature_maps[0].flatten(2), expected) < 1e-6
    base = TfmViTModel.from_pretrained(tmp_path / "backbone", add_pooling_layer=False).eval()
    assert torch.equal(base(images).last_hidden_state, model.vit(images).last_hidden_state)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"out_features": ["stage9"]}, "out_features must be a subset of stage_names"),
        ({"out_indices": [3, 1]}, "out_indices must be in the same order as stage_names"),
        ({"out_indices": [4]}, "out_indices must be valid indices"),
    ],
    ids=str,
)
def test_unknown_stages_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_vit_config(**fields)


def test_unknown_timm_stem_is_refused():
    with pytest.raises(ValueError, match=r'backbone must be the name of a timm model .* got "resnet_of_nobody"'):
        tiny_vit(**{**HYBRID, "backbone": "resnet_of_nobody"})
