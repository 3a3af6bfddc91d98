"""Backbones that are read from folders: the features of their models, freezing, padding, and the feature pyramid."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from tiny_deformable import tiny_deformable_config
from tiny_detr import PLAIN, relative_difference, tiny_detr_config, tiny_labels, tiny_padding, tiny_photos
from tiny_models import largest_difference
from tiny_swin import tiny_swin
from tiny_vision import TINY as VIT
from tiny_vision import scramble, tiny_backbone, tiny_encoder, tiny_mae, tiny_vit
from torch import nn
from transformers import (
    AutoModelForObjectDetection,
    BertConfig,
    ConvNextBackbone,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetBackbone,
    ResNetConfig,
    ResNetForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
)

from hf_tfm import (
    TfmDeformableDetrForObjectDetection,
    TfmDetrConfig,
    TfmDetrForObjectDetection,
    TfmDetrForPanopticSegmentation,
    TfmSwinBackbone,
)
from hf_tfm.arguments import TrainingArguments
from hf_tfm.models.image_backbones import SimpleFeaturePyramid, TransformersFeatures
from hf_tfm.tasks.detectors import load_backbone
from hf_tfm.training.optim import check_layers, layer_ids

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "layer_type": "basic"}
SWIN = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
DECODER = {"decoder_hidden_size": 16, "decoder_intermediate_size": 24, "decoder_num_hidden_layers": 1}
# Values that a detector of the paper needs, but not one with a random backbone.
FREE = {"backbone_norm": "batch", "backbone_frozen_stages": 0}


def timm_model(name: str = "test_resnet", **options) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(name, pretrained=False, num_classes=5, **options)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model.eval()


def save_timm(model: nn.Module, folder: Path, **options) -> None:
    timm.models.save_for_hf(model, folder, model_args=options or None, safe_serialization=True)


def stock(kind: type, config) -> nn.Module:
    torch.manual_seed(0)
    model = scramble(kind(config))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return model


MODELS = {
    "mae": tiny_mae,
    "vit": tiny_vit,
    "swin": lambda: tiny_swin(use_relative_position_bias=True),
    "stock_vit": lambda: stock(ViTForImageClassification, ViTConfig(**VIT)),
    "stock_mae": lambda: stock(ViTMAEForPreTraining, ViTMAEConfig(**VIT, **DECODER, decoder_num_attention_heads=2)),
    "stock_swin": lambda: stock(SwinForImageClassification, SwinConfig(**SWIN)),
    "stock_resnet": lambda: stock(ResNetForImageClassification, ResNetConfig(**RESNET)),
    "stock_convnext": lambda: stock(
        ConvNextForImageClassification, ConvNextConfig(hidden_sizes=RESNET["hidden_sizes"], depths=[1, 1, 1, 1])
    ),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folders of small models by name, and those of timm."""
    root = tmp_path_factory.mktemp("backbones")
    for name, build in MODELS.items():
        build().save_pretrained(root / name)
    save_timm(timm_model(), root / "timm")
    return root


def detector(folder, **fields) -> TfmDetrForObjectDetection:
    """A detector with the backbone of a folder, and its weights."""
    torch.manual_seed(1)
    model = TfmDetrForObjectDetection(tiny_detr_config(backbone=str(folder), **{**FREE, **fields}))
    load_backbone(model.model.backbone, str(folder).removeprefix("local-dir:"))
    return model.eval()


def features_of(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    return model.model.backbone(pixels)[-1]


# --- the features of the model in the folder


@pytest.mark.parametrize("name", ["vit", "mae", pytest.param("stock_vit", marks=pytest.mark.slow), "stock_mae"])
@torch.no_grad()
def test_features_of_a_plain_model(name, folders):
    """The patches of the last layer, normalised, without the class token."""
    pixels = tiny_photos(2, 16, 16)
    own = MODELS[name]()
    if "mae" in name:
        own.vit.config.mask_ratio = 0.0
        noise = torch.arange(16.0).expand(2, -1)  # keeps all patches, in order
        expected = own.vit(pixels, noise=noise).last_hidden_state[:, 1:]
    else:
        expected = own.vit(pixels).last_hidden_state[:, 1:]
    found = features_of(detector(folders / name), pixels)
    assert found.shape == (2, 32, 4, 4)
    assert largest_difference(found.flatten(2).transpose(1, 2), expected) < 1e-5


@pytest.mark.parametrize(
    "name, kind",
    [
        pytest.param("stock_resnet", ResNetBackbone, marks=pytest.mark.slow),
        ("stock_convnext", ConvNextBackbone),
        ("swin", TfmSwinBackbone),
        ("stock_swin", TfmSwinBackbone),
    ],
)
@torch.no_grad()
def test_features_of_a_hierarchical_model(name, kind, folders):
    """Those of its AutoBackbone class; frozen norms compute the same as batch norms in evaluation mode."""
    pixels = tiny_photos(2, 64, 96)
    expected = kind.from_pretrained(folders / name).eval()(pixels).feature_maps[-1]
    assert relative_difference(features_of(detector(folders / name, backbone_norm="frozen"), pixels), expected) < 1e-6
    assert torch.equal(features_of(detector(folders / name), pixels), expected)


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@torch.no_grad()
def test_features_of_a_timm_folder(prefix, folders):
    pixels = tiny_photos(2)
    expected = timm_model().forward_intermediates(pixels, indices=1, intermediates_only=True)[-1]
    model = detector(f"{prefix}{folders / 'timm'}", backbone_norm="frozen")
    assert model.config.backbone == "test_resnet" and model.config.backbone_config is None
    assert largest_difference(features_of(model, pixels), expected) < 1e-5


@torch.no_grad()
def test_arguments_of_a_timm_folder(tmp_path):
    """Those that the model was created with are kept, except those that only its classifier had."""
    source = timm_model("test_resnet", act_layer="silu")
    save_timm(source, tmp_path, act_layer="silu", num_classes=5)
    model = detector(tmp_path)
    assert model.config.backbone_kwargs == {"act_layer": "silu"}
    assert any(isinstance(module, nn.SiLU) for module in model.model.backbone.modules())
    expected = source.forward_intermediates(tiny_photos(), indices=1, intermediates_only=True)[-1]
    assert largest_difference(features_of(model, tiny_photos()), expected) < 1e-5


# --- saved detectors


@pytest.mark.parametrize("name", ["mae", "swin", "stock_resnet", "timm"])
@torch.no_grad()
def test_saved_detector_does_not_need_the_folder(name, folders, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(folders / name, source)
    model = detector(source, backbone_norm="frozen")
    model.save_pretrained(tmp_path / "detector")
    shutil.rmtree(source)
    assert str(tmp_path) not in (tmp_path / "detector" / "config.json").read_text()
    loaded = AutoModelForObjectDetection.from_pretrained(tmp_path / "detector").eval()
    assert type(loaded) is TfmDetrForObjectDetection
    assert torch.equal(loaded(tiny_photos()).logits, model(tiny_photos()).logits)
    again = TfmDetrConfig(**json.loads((tmp_path / "detector" / "config.json").read_text()))
    assert again.backbone_config == loaded.config.backbone_config == model.config.backbone_config


def test_configuration_of_a_backbone_instead_of_a_folder():
    """As a dict or as a configuration; stages are selected by the detector, and labels are not kept."""
    own = ViTConfig(**VIT, num_labels=7)
    configs = [tiny_detr_config(backbone_config=one, **FREE) for one in (own, own.to_dict())]
    assert configs[0].backbone_config == configs[1].backbone_config and configs[0].backbone is None
    fields = configs[0].backbone_config
    assert fields["model_type"] == "tfm_vit" and fields["layer_norm_eps"] == own.layer_norm_eps
    assert not {"id2label", "out_indices", "stage_names", "architectures"} & fields.keys()


def test_size_with_dilation_and_a_backbone_that_has_none(folders):
    assert TfmDetrConfig.of_size("tiny").dilation
    assert TfmDetrConfig.of_size("tiny", backbone=str(folders / "timm")).dilation
    assert not TfmDetrConfig.of_size("tiny", backbone=str(folders / "mae")).dilation


# --- freezing and gradients


@pytest.mark.parametrize("name, stages, frozen, trained", [
    ("mae", 1, ("vit.embeddings.", "vit.layers.0."), ("vit.layers.1.", "vit.layernorm.")),
    ("swin", 1, ("swin.embeddings.", "swin.encoder.layers.0.blocks."), ("swin.encoder.layers.1.", "hidden_states")),
    ("stock_resnet", 2, ("embedder.", "encoder.stages.0.", "encoder.stages.1."), ("encoder.stages.2.",)),
])  # fmt: skip
def test_frozen_stages_get_no_gradient(name, stages, frozen, trained, folders, tmp_path):
    """The stem and the first stages; a block of a plain model is a stage. Also after loading."""
    model = detector(folders / name, backbone_frozen_stages=stages, **PLAIN)
    model.save_pretrained(tmp_path)
    for each in (model, TfmDetrForObjectDetection.from_pretrained(tmp_path)):
        each.train()(tiny_photos(), labels=tiny_labels()).loss.backward()
        for path, parameter in each.model.backbone.body.named_parameters():
            if path.startswith(frozen):
                assert not parameter.requires_grad and parameter.grad is None, path
            if path.startswith(trained):
                assert parameter.requires_grad and parameter.grad is not None, path
    norms = [m for m in model.model.backbone.body.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(norm.training == norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize("name", ["mae", "swin", "stock_resnet", "stock_convnext"])
def test_every_weight_that_is_not_frozen_gets_a_gradient(name, folders):
    """A weight without one would stop training with several processes."""
    for model in (
        TfmDetrForObjectDetection(tiny_detr_config(backbone=str(folders / name), **FREE, **PLAIN)),
        TfmDeformableDetrForObjectDetection(
            tiny_deformable_config(backbone=str(folders / name), num_feature_levels=2, **FREE, **PLAIN)
        ),
    ):
        model.train()(tiny_photos(), labels=tiny_labels()).loss.backward()
        missing = [n for n, p in model.named_parameters() if "backbone" in n and p.requires_grad and p.grad is None]
        assert not missing and all(p.grad is not None for n, p in model.named_parameters() if "pyramid" in n)


def test_norms_of_a_backbone_are_converted(folders):
    """ "group" and "frozen" replace batch norms; a model without any ignores them."""
    for name, norm, kind, count in (
        ("stock_resnet", "group", nn.GroupNorm, 12),
        ("stock_resnet", "batch", nn.BatchNorm2d, 12),
        ("mae", "group", nn.GroupNorm, 0),
    ):
        config = tiny_detr_config(backbone=str(folders / name), **{**FREE, "backbone_norm": norm})
        found = TfmDetrForObjectDetection(config).model.backbone.modules()
        assert sum(isinstance(module, kind) for module in found) == count, (name, norm)


def test_layers_of_layer_wise_decay(folders):
    """Blocks of the backbone; the detector is above them."""
    model = TfmDetrForObjectDetection(tiny_detr_config(backbone=str(folders / "mae"), **FREE))
    ids = layer_ids(name for name, _ in model.named_parameters())
    prefix = "model.backbone.body.vit."
    assert ids[f"{prefix}embeddings.cls_token"] == 0 and ids[f"{prefix}layers.2.feed_forward.up_proj.weight"] == 3
    assert ids["model.encoder.layers.0.feed_forward.up_proj.weight"] == ids[f"{prefix}layernorm.weight"] == torch.inf


def test_layer_wise_decay_is_refused_for_blocks_in_stages(folders):
    """Their numbers start again in every stage."""
    model = TfmDetrForObjectDetection(tiny_detr_config(backbone=str(folders / "stock_convnext"), **FREE))
    check_layers(TrainingArguments(output_dir="x", max_steps=1), model)
    args = TrainingArguments(output_dir="x", max_steps=1, layer_wise_lr_decay=0.7)
    with pytest.raises(ValueError, match="must be 1 for a tfm_detr model with a convnext backbone"):
        check_layers(args, model)


def test_detector_learns_through_the_pyramid(folders):
    """It overfits an image."""
    torch.manual_seed(0)
    fields = {"num_feature_levels": 3, "encoder_layers": 1, "decoder_layers": 2, **FREE, **PLAIN}
    config = tiny_deformable_config(backbone=str(folders / "mae"), **fields)
    model = TfmDeformableDetrForObjectDetection(config).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=3e-3), []
    for _ in range(50):
        losses.append(model(tiny_photos(1, 16, 24), labels=tiny_labels((2,))).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0], losses


# --- sizes and padding of images


@pytest.mark.parametrize("positions", ["learned", "learned_2d", "sincos_2d"])
@torch.no_grad()
def test_features_do_not_depend_on_padding(positions):
    """Position embeddings are resized to the image without its padding, which is not attended to."""
    backbone = TransformersFeatures(tiny_backbone(position_embedding_type=positions).config.to_dict())
    scramble(backbone)
    sizes, pixels = ((30, 41), (50, 70)), tiny_photos(2, 50, 70)
    mask = tiny_padding(sizes, 50, 70)
    pixels = pixels * mask[:, None]
    together = backbone(pixels, mask)[-1]
    assert together.shape == (2, 32, 13, 18)
    for i, (height, width) in enumerate(sizes):
        alone = backbone(pixels[i : i + 1, :, :height, :width])[-1]
        assert alone.shape[2:] == backbone.grid(height, width)
        assert largest_difference(together[i : i + 1, :, : alone.shape[2], : alone.shape[3]], alone) < 1e-5
    assert largest_difference(backbone(pixels)[-1][:1, :, :8, :11], together[:1, :, :8, :11]) > 1e-3


@pytest.mark.parametrize("fields", [{}, {"pooling": "mean"}, {"distillation_token": True}], ids=str)
@torch.no_grad()
def test_encoder_ignores_padding(fields):
    model = tiny_encoder(**fields)
    pixels, mask = tiny_photos(1, 16, 24), tiny_padding(((16, 16),), 16, 24)
    alone, together = model(pixels[..., :16]).last_hidden_state, model(pixels, pixel_mask=mask).last_hidden_state
    prefix = model.num_prefix_tokens
    assert largest_difference(together[:, :prefix], alone[:, :prefix]) < 1e-5
    patches = together[:, prefix:].unflatten(1, (4, 6))[:, :, :4].flatten(1, 2)
    assert largest_difference(patches, alone[:, prefix:]) < 1e-5


@pytest.mark.parametrize("name", ["mae", "swin", "stock_resnet", "stock_convnext"])
@torch.no_grad()
def test_images_of_any_size(name, folders):
    """Sizes of maps are rounded up."""
    for height, width in ((64, 96), (37, 51), (33, 65)):
        backbone = detector(folders / name).model.backbone
        found = backbone(tiny_photos(1, height, width))
        assert [tuple(x.shape[2:]) for x in found] == [(-(-height // s), -(-width // s)) for s in backbone.strides]
        assert found[-1].shape[2:] == backbone.grid(height, width)


# --- levels


@pytest.mark.parametrize("levels, strides", [(1, [4]), (2, [4, 8]), (3, [2, 4, 8]), (4, [2, 4, 8])])
@torch.no_grad()
def test_levels_on_a_plain_backbone(levels, strides, folders):
    """Half of the patch side of 4 pixels, the patch side, and twice that; a fourth level is a convolution."""
    config = tiny_deformable_config(backbone=str(folders / "mae"), num_feature_levels=levels, **FREE)
    model = TfmDeformableDetrForObjectDetection(config).eval()
    maps = model.model.feature_maps(tiny_photos(1, 32, 48), None)
    assert [tuple(x.shape[2:]) for x in maps] == [(32 // s, 48 // s) for s in strides]
    assert model.model.stride == strides[0] and (model.model.pyramid is None) == (levels == 1)
    assert model(tiny_photos(1, 30, 47), pixel_mask=tiny_padding(((21, 33),), 30, 47)).logits.isfinite().all()


def test_levels_of_a_hierarchical_backbone(folders):
    config = tiny_deformable_config(backbone=str(folders / "stock_resnet"), num_feature_levels=4, **FREE)
    model = TfmDeformableDetrForObjectDetection(config)
    assert model.model.backbone.strides == [8, 16, 32] and model.model.pyramid is None
    assert model.model.backbone.channels == [16, 24, 32] and model.model.stride == 8


@torch.no_grad()
def test_simple_feature_pyramid():
    """Section 3 of the paper, computed step by step."""
    torch.manual_seed(0)
    pyramid = scramble(SimpleFeaturePyramid(channels=6, stride=16, width=4))
    features = torch.randn(2, 6, 5, 7)
    sources = [pyramid.levels[0][0](features), features, nn.functional.max_pool2d(features, 2, ceil_mode=True)]
    for level, source, found in zip(pyramid.levels, sources, pyramid(features), strict=True):
        expected = source
        for convolution, norm in (level[1][:2], level[1][2:]):
            expected = convolution(expected).movedim(1, -1)
            expected = nn.functional.layer_norm(expected, (4,), norm.weight, norm.bias, 1e-6).movedim(-1, 1)
        assert largest_difference(found, expected) < 1e-6
    assert pyramid.levels[0][0].weight.shape == (6, 3, 2, 2) and pyramid.strides == [8, 16, 32]


# --- refusals


def write(folder: Path, content) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


REFUSED = {
    "no_config": (None, "it has no config.json"),
    "no_json": ("{", "its config.json is not valid JSON"),
    "no_mapping": ("[]", "its config.json must be a mapping, got list"),
    "unknown": ({"model_type": "vtt"}, "model_type must be one of this package or of transformers, got vtt"),
    "remote_code": (
        {"model_type": "own", "auto_map": {"AutoModel": "code.Own"}},
        "a own model brings its own code, which a detector cannot carry",
    ),
    "text": (BertConfig().to_dict(), "a bert model has no feature maps"),
    "channels": ({**ViTConfig(**VIT).to_dict(), "num_channels": 1}, "num_channels must be 3, .* got 1"),
    "timm_channels": ({"architecture": "resnet18", "model_args": {"in_chans": 1}}, "num_channels must be 3, .* got 1"),
    "value": ({**ViTConfig(**VIT).to_dict(), "hidden_size": 30}, "hidden_size must be a multiple of .* got 30"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_are_no_backbone(name, tmp_path):
    content, message = REFUSED[name]
    folder = tmp_path / name
    folder.mkdir()
    if content is not None:
        write(folder, content)
    with pytest.raises(ValueError, match=f'backbone "{folder}": .*{message}') as raised:
        TfmDetrConfig(backbone=str(folder))
    assert "\n" not in str(raised.value)


def test_backbones_that_do_not_fit_the_detector(folders):
    mae, resnet = str(folders / "mae"), str(folders / "stock_resnet")
    swin = str(folders / "swin")
    for build, message in (
        (lambda: TfmDetrConfig(backbone=mae, dilation=True), "dilation must be false for a backbone of type tfm_vit"),
        (lambda: TfmDetrConfig(backbone=None), "backbone must be the name of a timm model, a folder or a Hub id"),
        (lambda: detector(mae, backbone_frozen_stages=4), "at most 3 for a tfm_vit backbone, got 4"),
        (lambda: detector(resnet, backbone_frozen_stages=5), "at most 4 for a resnet backbone, got 5"),
        (
            lambda: TfmDetrForPanopticSegmentation(tiny_detr_config(backbone=mae, **FREE)),
            "reads four feature maps, .* a backbone of type tfm_vit",
        ),
        (
            lambda: TfmDeformableDetrForObjectDetection(tiny_deformable_config(backbone=swin, **FREE)),
            "a tfm_swin backbone has 2 feature maps of different sizes, 3 are needed",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            build()


def test_folders_without_their_weights(folders, tmp_path):
    """Missing files, and weights of another model."""
    for name in ("mae", "timm"):
        shutil.copytree(folders / name, tmp_path / name)
        (tmp_path / name / "model.safetensors").unlink()
        with pytest.raises(ValueError, match=f'backbone "{tmp_path / name}".*model.safetensors') as raised:
            detector(tmp_path / name)
        assert "\n" not in str(raised.value)
    shutil.copy(folders / "swin" / "model.safetensors", tmp_path / "mae")
    with pytest.raises(ValueError, match=r'backbone ".*": it has no weights for .* and [0-9]+ more'):
        detector(tmp_path / "mae")
    save_timm(timm_model("test_resnet", act_layer="silu"), tmp_path / "other")
    shutil.copy(folders / "swin" / "model.safetensors", tmp_path / "other")
    with pytest.raises(ValueError, match=r'backbone ".*other": .*conv1\.weight') as raised:
        detector(tmp_path / "other")
    assert "\n" not in str(raised.value)
