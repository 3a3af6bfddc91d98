"""The backbone: frozen parameters, folded norms, and the sizes of the published models."""

import copy
import pickle
from functools import partial

import pytest
import torch
from tiny_detr import PLAIN, relative_difference, scramble_detr, tiny_detr, tiny_detr_config, tiny_labels, tiny_photos
from tiny_models import largest_difference
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import hf_tfm.models.backbones as backbones
from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation
from hf_tfm.models.backbones import FoldedConv2d, FrozenBatchNorm, GroupedConv2d, TimmFeatures, fold_norms

ALL = (-4, -3, -2, -1)


def names_of(parameters, prefix: str = "") -> set[str]:
    return {name.removeprefix(prefix) for name, _ in parameters}


def frozen_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not parameter.requires_grad}


def note_gradient(kept: list[bool], module: nn.Module, args: tuple, output: Tensor) -> None:
    kept.append(output.requires_grad)


@pytest.mark.parametrize("backbone", ["resnet50", "resnet101"])
@pytest.mark.parametrize("dilation", [False, True])
def test_stem_and_first_stage_are_frozen(backbone, dilation):
    """And nothing else: see appendix A.4 of the paper; transformers 5.23 does not freeze this part."""
    with torch.device("meta"):
        model = TfmDetrForObjectDetection(TfmDetrConfig(backbone=backbone, dilation=dilation))
    prefix = "model.backbone.body."
    first = {
        name
        for name, _ in model.named_parameters()
        if name.startswith((f"{prefix}conv1.", f"{prefix}bn1.", f"{prefix}layer1."))
    }
    assert frozen_names(model) == first and len(first) == 1 + 3 * 3 + 1
    # 7 x 7 stem; three bottlenecks of 1 x 1, 3 x 3, 1 x 1 convolutions, the first from 64 channels, with a projection.
    bottlenecks = (64 + 256 + 256) * 64 + 3 * 9 * 64 * 64 + 3 * 64 * 256 + 64 * 256
    parameters = dict(model.named_parameters())
    assert sum(parameters[name].numel() for name in first) == 7 * 7 * 3 * 64 + bottlenecks == 222_400
    assert not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert sum(isinstance(module, FrozenBatchNorm) for module in model.modules()) == {"resnet50": 53}.get(
        backbone, 104
    )


def test_frozen_parameters_get_no_gradient(tmp_path):
    """Also after loading: from_pretrained of transformers 5.23 resets requires_grad."""
    model = tiny_detr(backbone="resnet18", **PLAIN).train()
    model.save_pretrained(tmp_path)
    loaded, report = TfmDetrForObjectDetection.from_pretrained(tmp_path, output_loading_info=True)
    panoptic = TfmDetrForPanopticSegmentation.from_pretrained(tmp_path, encoder_attention_heads=8)
    assert not report["missing_keys"]
    frozen = frozen_names(model)
    assert (
        frozen == frozen_names(loaded) == names_of([(name, None) for name in frozen_names(panoptic)], "detr.")
        and "model.backbone.body.layer1.1.conv2.weight" in frozen
    )
    assert frozen_names(copy.deepcopy(loaded)) == frozen
    for each in (model, loaded.train()):
        kept = []
        each.model.backbone.body.layer1.register_forward_hook(partial(note_gradient, kept))
        each(tiny_photos(), labels=tiny_labels()).loss.backward()
        assert kept == [False], "no activations are saved for backward"
        for name, parameter in each.named_parameters():
            assert (parameter.grad is None) == (name in frozen), name
            # The first query states are zero, so the output of the first layer's attention has no gradient, and
            # a key bias shifts all scores of a query equally.
            if parameter.grad is not None and "decoder.layers.0.self_attn" not in name and "k_proj.bias" not in name:
                assert parameter.grad.abs().max() > 0, name


def test_number_of_frozen_stages_is_configurable():
    counts = []
    for stages in range(5):
        features = TimmFeatures("resnet18", 3, ALL, "frozen", stages)
        frozen = frozen_names(features.body)
        tops = {name.split(".")[0] for name in frozen}
        assert tops == ({"conv1", *(f"layer{i + 1}" for i in range(stages))} if stages else set())
        counts.append(len(frozen))
    assert counts == sorted(set(counts)) and counts[-1] == len(list(features.body.parameters()))
    with pytest.raises(ValueError, match="backbone_frozen_stages must be at most 4 for resnet18, got 5"):
        TimmFeatures("resnet18", 3, ALL, "frozen", 5)
    with pytest.raises(ValueError, match="hrnet_w18_small has no stages that could be frozen"):
        TimmFeatures("hrnet_w18_small", 3, ALL, "frozen", 1)


@pytest.mark.parametrize(
    ("backbone", "trained"),
    [
        ("resnet10t", "layer2"),
        ("mobilenetv3_small_050", "blocks.1"),
        ("convnext_atto", "stages_1"),
        ("densenet121", "features_denseblock2"),
        ("regnetx_002", "s2"),
        ("test_efficientnet", "blocks.2"),
    ],
)
def test_first_stage_of_other_architectures(backbone, trained):
    """All parameters up to the map at a quarter of the image size, and none of the next stage."""
    body = TimmFeatures(backbone, 3, ALL, "frozen", 1).body
    names = [name for name, _ in body.named_parameters()]
    learned = [name for name, parameter in body.named_parameters() if parameter.requires_grad]
    assert learned and learned == names[-len(learned) :] and len(learned) < len(names)
    assert any(name.startswith(trained) for name in learned)
    before = next(i for i, name in enumerate(names) if name.startswith(trained))
    # Between the stages there are at most a few weights that lead to the next size.
    assert len(names) - len(learned) >= before - 6 and frozen_names(body) == set(names[: -len(learned)])


def test_frozen_norm_equals_batch_norm_in_evaluation():
    norm, frozen = nn.BatchNorm2d(6, eps=1e-3), FrozenBatchNorm(6, eps=1e-3)
    scramble_detr(norm)
    report = frozen.load_state_dict(norm.state_dict(), strict=False)
    assert not report.missing_keys and report.unexpected_keys == ["num_batches_tracked"]
    features = tiny_photos(2, 5, 7, channels=6)
    assert largest_difference(frozen(features), norm(features)) < 1e-6
    frozen.train()(features)
    assert torch.equal(frozen.running_mean, norm.running_mean), "it does not learn statistics"
    assert not list(frozen.parameters())


FAMILIES = {
    # Norms of an architecture that follow a convolution of their own.
    "resnet18": (20, 20),
    "resnet10t": (14, 14),
    "densenet121": (121, 59),  # the others follow sums and concatenations
    "regnetx_002": (44, 44),
    "mobilenetv3_small_050": (34, 34),
    "convnext_atto": (0, 0),  # has layer norms
    "test_efficientnet": (12, 12),
    "test_byobnet": (14, 14),
    "repvgg_a0": (61, 44),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=() if name in ("resnet18", "densenet121", "convnext_atto", "repvgg_a0") else pytest.mark.slow
        )
        for name in FAMILIES
    ],
)
def test_folding_changes_no_output(name, monkeypatch):
    """Maps and gradients of a model with random statistics, with and without folding."""
    torch.manual_seed(0)
    folded = scramble_detr(TimmFeatures(name, 3, ALL, "frozen", 1))
    monkeypatch.setattr(backbones, "fold_norms", lambda body: [])
    plain = TimmFeatures(name, 3, ALL, "frozen", 1).eval()
    plain.load_state_dict(folded.state_dict())
    norms = [module for module in folded.modules() if isinstance(module, FrozenBatchNorm)]
    assert (len(norms), sum(norm.folded for norm in norms)) == FAMILIES[name]
    assert sum(isinstance(module, FoldedConv2d) for module in folded.modules()) == FAMILIES[name][1]
    assert not any(isinstance(module, FoldedConv2d) for module in plain.modules())
    images = tiny_photos(2, 64, 64)
    for one, other in zip(folded(images), plain(images), strict=True):
        assert other.std() > 1e-3 and relative_difference(one, other) < 1e-5
    found = []  # gradients in float64: rounding moves values across ReLU's kink
    for features in (folded.double(), plain.double()):
        sum(each.square().mean() for each in features(images.double())).backward()
        found.append({name: p.grad for name, p in features.named_parameters() if p.requires_grad})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 5
    for key, expected in found[1].items():
        assert relative_difference(found[0][key], expected) < 1e-9, key


@pytest.mark.slow
def test_folding_a_multi_resolution_model():
    torch.manual_seed(0)
    folded = scramble_detr(TimmFeatures("hrnet_w18_small", 3, ALL, "frozen"))
    plain = copy.deepcopy(folded)
    for module in plain.modules():
        if isinstance(module, FoldedConv2d):
            module.__class__ = nn.Conv2d
        elif isinstance(module, FrozenBatchNorm):
            module.folded = False
    for one, other in zip(folded(tiny_photos(1, 64, 64)), plain(tiny_photos(1, 64, 64)), strict=True):
        assert relative_difference(one, other) < 1e-5


class Unfoldable(nn.Module):
    """Norms that must not be folded, and one that may be."""

    def __init__(self):
        super().__init__()
        self.shared, self.read_twice, self.twice, self.own = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.first, self.second, self.third, self.fourth, self.fifth = (FrozenBatchNorm(3) for _ in range(5))

    def forward(self, features: Tensor) -> Tensor:
        one = self.first(self.shared(features)) + self.second(self.shared(features + 1))  # two norms, one convolution
        convolved = self.read_twice(features)
        two = self.third(convolved) + convolved  # the convolution has a second consumer
        three = self.fourth(self.twice(features)) + self.fourth(features)  # one norm used twice
        return one + two + three + self.fifth(self.own(features))


def test_unfoldable_norms_are_left_alone():
    model = scramble_detr(Unfoldable())
    images = tiny_photos(2, 4, 4)
    expected = model(images)
    fold_norms(model)
    norms = (model.first, model.second, model.third, model.fourth, model.fifth)
    assert [norm.folded for norm in norms] == [False] * 4 + [True]
    assert largest_difference(model(images), expected) < 1e-5


class Adapter(nn.Module):
    """A layer with a low-rank term added to its output, as in LoRA."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.layer, self.change = layer, nn.Conv2d(layer.in_channels, layer.out_channels, 3, layer.stride, 1)

    def forward(self, features: Tensor) -> Tensor:
        return self.layer(features) + self.change(features)


def test_norm_scales_the_output_of_an_adapter():
    """Folding would leave the adapter's term unscaled, and merging it would change the model."""
    features, images = tiny_detr(backbone="resnet18").model.backbone, tiny_photos(1)
    block = features.body.layer1[0]
    plain = features(images)
    assert block.bn1.folded
    block.conv1 = adapter = Adapter(block.conv1)
    found = features(images)
    assert not block.bn1.folded and block.bn2.folded and relative_difference(found[0], plain[0]) > 1e-2
    with torch.no_grad():
        adapter.layer.weight += adapter.change.weight
    adapter.layer.bias, block.conv1 = adapter.change.bias, adapter.layer
    merged = features(images)
    assert block.bn1.folded
    for one, other in zip(found, merged, strict=True):
        assert relative_difference(one, other) < 1e-5


@pytest.mark.parametrize(
    ("name", "size"), [("swin_tiny_patch4_window7_224", 224), ("mambaout_femto", 64), ("test_resnet", 64)]
)
def test_feature_maps_are_channels_first(name, size):
    """Also for backbones that return channels last."""
    features = TimmFeatures(name, 3, ALL).eval()
    with torch.no_grad():
        maps = features(tiny_photos(1, size, size))
    assert [each.shape[1] for each in maps] == features.channels
    sides = [-(-size // entry["reduction"]) for entry in features.body.feature_info.get_dicts()]
    assert [tuple(each.shape[2:]) for each in maps] == [(side, side) for side in sides]


def test_detector_with_a_channels_last_backbone():
    model, images = tiny_detr(backbone="mambaout_femto", backbone_frozen_stages=0), tiny_photos(1, 64, 64)
    body = model.model.backbone
    assert body.channels_last and model(images).pred_boxes.shape == (1, 7, 4)
    assert largest_difference(body(images)[-1], body.body(images)[-1].permute(0, 3, 1, 2)) == 0
    model.train()(images, labels=tiny_labels((2,))).loss.backward()
    assert all(p.grad is not None for p in body.parameters() if p.requires_grad)


def test_untraceable_model_is_left_alone():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), FrozenBatchNorm(3)

        def forward(self, features):
            return self.norm(self.conv(features)) if features.mean() > 0 else features

    model = Untraceable()
    fold_norms(model)
    assert not model.norm.folded and type(model.conv) is nn.Conv2d


def test_copies_of_a_folded_model(tmp_path):
    """A copy must use its own norms, not those of the original."""
    features, images = tiny_detr(backbone="resnet18").model.backbone, tiny_photos(1)
    expected = [each.clone() for each in features(images)]
    keys = set(features.state_dict())
    assert {key for key in keys if "bn1" in key and "layer1.0" in key} == {
        f"body.layer1.0.bn1.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }, "a norm is listed once"
    other = TimmFeatures("resnet18", 3, ALL, "frozen", 1)
    other.load_state_dict(features.state_dict())
    copies = [copy.deepcopy(features), pickle.loads(pickle.dumps(features)), other]
    with torch.no_grad():
        for module in features.modules():
            if isinstance(module, FrozenBatchNorm):
                module.running_mean.fill_(5.0)
    assert largest_difference(features(images)[-1], expected[-1]) > 1e-2, "the fold follows later changes"
    for each in copies:
        assert set(each.state_dict()) == keys
        for one, before in zip(each.eval()(images), expected, strict=True):
            assert torch.equal(one, before)


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_depthwise_convolutions_run_in_float32_under_autocast(norm):
    """Also those with a norm folded in and those of timm's own classes; outside of autocast nothing changes."""
    model = TimmFeatures("tf_efficientnet_lite0", out_indices=ALL, norm=norm).eval()
    grouped = [layer for layer in model.body.modules() if isinstance(layer, nn.Conv2d) and layer.groups > 1]
    assert len(grouped) == 16 and all(isinstance(layer, GroupedConv2d) for layer in grouped)
    dtypes = {"inside": set(), "outputs": set()}

    def convolve(self, features, _convolve=GroupedConv2d.convolve):
        if self.groups > 1:
            dtypes["inside"].add((features.dtype, torch.is_autocast_enabled("cpu")))
        return _convolve(self, features)

    for layer in grouped:
        layer.register_forward_hook(lambda layer, args, output: dtypes["outputs"].add(output.dtype))
    images = torch.randn(2, 3, 32, 40)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(TimmFeatures("tf_efficientnet_lite0", norm=norm)))]
    assert all(type(x) is type(y) for new in copies for x, y in zip(model.modules(), new.modules(), strict=False))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(GroupedConv2d, "convolve", convolve)
        exact = model(images)
        assert dtypes == {"inside": {(torch.float32, False)}, "outputs": {torch.float32}}
        with torch.autocast("cpu", torch.bfloat16):
            maps = model(images)
        assert dtypes == {"inside": {(torch.float32, False)}, "outputs": {torch.float32, torch.bfloat16}}
        model.train()
        assert model.arrange(images).is_contiguous(memory_format=torch.channels_last)
    for features, expected in zip(maps, exact, strict=True):
        assert relative_difference(features.float(), expected) < 0.1


def test_group_norm_and_batch_norm_are_trained():
    for kind, norm_class in (("group", nn.GroupNorm), ("batch", nn.BatchNorm2d)):
        features = TimmFeatures("test_resnet", 3, ALL, kind)
        norms = [module for module in features.modules() if isinstance(module, norm_class)]
        assert len(norms) == 15 and not any(isinstance(module, FoldedConv2d) for module in features.modules())
        images = tiny_photos(2)
        optimizer = torch.optim.SGD(features.parameters(), lr=0.1)
        losses = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = (features(images)[-1] - 1).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.8 * losses[0]
        assert all(norm.weight.grad.abs().max() > 0 for norm in norms)


def test_group_norm_and_batch_norm_settings():
    for name, widths in (("test_resnet", {32, 48, 96}), ("resnet18", {64, 512})):
        norms = [m for m in TimmFeatures(name, 3, ALL, "group").modules() if isinstance(m, nn.GroupNorm)]
        assert {norm.num_channels for norm in norms} >= widths
        assert all(norm.num_groups == min(norm.num_channels // 16, 32) for norm in norms)
    for momentum in (0.1, 0.02):
        config = tiny_detr_config(backbone_norm="batch", backbone_norm_momentum=momentum, backbone_frozen_stages=0)
        norms = [m for m in TfmDetrForObjectDetection(config).modules() if isinstance(m, nn.BatchNorm2d)]
        assert len(norms) == 15 and {norm.momentum for norm in norms} == {momentum}


@pytest.mark.parametrize("stages", [0, 1, 4])
def test_fixed_batch_norm_keeps_its_statistics(stages):
    features = TimmFeatures("test_resnet", 3, ALL, "batch", stages)
    assert features.training
    before = copy.deepcopy(features.state_dict())
    features(tiny_photos())
    learns = {name.rpartition(".")[0] for name, parameter in features.named_parameters() if parameter.requires_grad}
    for name, value in features.state_dict().items():
        if name.endswith("running_mean"):
            assert torch.equal(value, before[name]) != (name.rpartition(".")[0] in learns)
    assert bool(learns) == (stages < 4)
    assert not any(module.training for module in features.eval().modules())


def test_group_norm_treats_images_independently():
    """Also in training, where batch norm mixes them."""
    images = tiny_photos()
    for kind, mixes in (("group", False), ("batch", True)):
        features = TimmFeatures("test_resnet", 3, ALL, kind).train()
        assert (relative_difference(features(images)[-1][:1], features(images[:1])[-1]) > 1e-5) == mixes


@pytest.mark.parametrize(("backbone", "height", "width"), [("resnet18", 64, 96), ("resnet50", 65, 70)])
def test_dilation_keeps_the_resolution_of_the_last_map(backbone, height, width):
    plain, dilated = (TimmFeatures(backbone, 3, ALL, "frozen", 1, stride).eval() for stride in (None, 16))
    dilated.load_state_dict(plain.state_dict())  # the same kernel, dilated
    maps, larger = plain(tiny_photos(1, height, width)), dilated(tiny_photos(1, height, width))
    assert [x.shape for x in maps[:3]] == [x.shape for x in larger[:3]] and (plain.stride, dilated.stride) == (32, 16)
    assert larger[3].shape[2:] == larger[2].shape[2:] == dilated.grid(height, width)
    assert maps[3].shape[2:] == plain.grid(height, width) == (-(-height // 32), -(-width // 32))


PUBLISHED = {  # table 1 of the paper: parameters in millions, GFLOPs
    "R50": ({"backbone": "resnet50"}, 41, 86),
    "DC5": ({"backbone": "resnet50", "dilation": True}, 41, 187),
    "R101": ({"backbone": "resnet101"}, 60, 152),
    "DC5-R101": ({"backbone": "resnet101", "dilation": True}, 60, 253),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if "101" in name else ()) for name in PUBLISHED]
)
def test_published_sizes(name):
    """Parameters and multiply-adds of table 1.

    The paper averages over the first 100 validation images of COCO, which have 888,477 pixels on average after
    resizing; one image of 800 x 1110 represents them. Its tool also counts norms and the like, torch's only
    convolutions and matrix products: hence up to 4 % less here.
    """
    fields, millions, gflops = PUBLISHED[name]
    with torch.device("meta"):
        model = TfmDetrForObjectDetection(TfmDetrConfig(**fields, num_labels=91)).eval()
        image = torch.empty(1, 3, 800, 1110)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert 0 <= parameters - millions * 1e6 < 0.6e6
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    multiply_adds = counter.get_total_flops() / 2 / 1e9
    assert 0.96 * gflops < multiply_adds < gflops


@pytest.mark.parametrize("name", ["mambaout_femto", "ghostnet_050", "hrnet_w18_small"])
def test_fixed_stride_is_not_dilated(name):
    config = TfmDetrConfig.of_size("tiny", backbone=name, dilation=True)
    with pytest.raises(ValueError, match=f'"{name}" has a fixed stride, so dilation must be false'):
        TfmDetrForObjectDetection(config)


def test_unknown_timm_backbone_is_refused():
    with pytest.raises(ValueError, match=r'backbone must be the name of a timm model .* got "resnet_of_nobody"'):
        TfmDetrForObjectDetection(tiny_detr_config(backbone="resnet_of_nobody"))
