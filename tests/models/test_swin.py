"""The Swin Transformer: sizes, windows of every shape, position biases, dropped paths, and clear errors."""

import pytest
import torch
from tiny_models import largest_difference
from tiny_swin import tiny_swin, tiny_swin_backbone, tiny_swin_config, tiny_swin_encoder
from tiny_vision import gradients, tiny_images
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoBackbone, SwinConfig, SwinForImageClassification

from hf_tfm import TfmSwinBackbone, TfmSwinConfig, TfmSwinForImageClassification, TfmSwinModel
from hf_tfm.models.modeling_swin import RelativePositionBias, WindowAttention, drop_path_rates
from hf_tfm.models.windows import (
    FITS,
    MASKED,
    arrange,
    arrange_back,
    fit_windows,
    from_windows,
    relative_index,
    shift_mask,
    to_windows,
)
from hf_tfm.training import TrainingArguments
from hf_tfm.training.optim import layer_ids, parameter_groups

CPU = torch.device("cpu")
LABELS = torch.tensor([0, 4, 2])


@pytest.mark.parametrize(
    ("size", "image_size", "millions", "gflops"),
    [
        ("tiny", 224, 28, 4.5),
        pytest.param("small", 224, 50, 8.7, marks=pytest.mark.slow),
        pytest.param("base", 224, 88, 15.4, marks=pytest.mark.slow),
        pytest.param("large", 224, 197, 34.5, marks=pytest.mark.slow),
        ("base", 384, 88, 47.1),
    ],
)
def test_published_sizes(size, image_size, millions, gflops):
    """Parameters and FLOPs (a multiply-add counts once) of the authors' README; 384 pixels have windows of 12."""
    window = 12 if image_size == 384 else 7
    config = TfmSwinConfig.of_size(size, image_size=image_size, window_size=window, num_labels=1000)
    with torch.device("meta"):
        model = TfmSwinForImageClassification(config).eval()
        model.set_attn_implementation("eager")
        with FlopCounterMode(display=False) as counter:
            model(torch.zeros(1, 3, image_size, image_size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters == pytest.approx(millions * 1e6, rel=0.013)  # whole millions, rounded down for small and base
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.011)


def by_definition(grid, size, shift, pad_first):
    """Windows of numbered tokens, one pixel at a time; 0 is padding."""
    h, w = grid
    H, W = (-(-side // M) * M for side, M in zip(grid, size, strict=True))
    placed = {}
    for y in range(h):
        for x in range(w):
            height, width = (H, W) if pad_first else (h, w)
            placed[(y - shift[0]) % height, (x - shift[1]) % width] = 1 + y * w + x
    return torch.tensor(
        [
            [placed.get((top + y, left + x), 0) for y in range(size[0]) for x in range(size[1])]
            for top in range(0, H, size[0])
            for left in range(0, W, size[1])
        ]
    )


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("grid", [(8, 8), (8, 12), (9, 7), (4, 4), (3, 3), (3, 10), (4, 9), (1, 1)], ids=str)
@pytest.mark.parametrize("shifted", [False, True])
def test_windows_hold_the_tokens_they_should(grid, fit, shifted):
    windows = fit_windows(grid, 4, shifted, fit)
    expected = by_definition(grid, windows.size, windows.shift, fit != "timm")
    tokens = 1 + torch.arange(grid[0] * grid[1])
    found = to_windows(tokens.view(1, -1, 1).expand(2, -1, 3), windows)
    assert found.shape == (2 * windows.count, windows.tokens, 3)
    assert torch.equal(found[: windows.count, :, 0], expected) and torch.equal(found[windows.count :, :, 2], expected)
    assert torch.equal(from_windows(found, windows), tokens.view(1, -1, 1).expand(2, -1, 3))


@pytest.mark.parametrize("fit", FITS)
def test_gradients_of_windows(fit):
    """Of padded and shifted windows, also a second time; and what torch traces is the same function."""
    windows = fit_windows((3, 5), 2, True, fit)
    tokens = torch.randn(1, 15, 1, dtype=torch.float64, requires_grad=True)
    states = torch.randn(windows.count, 4, 1, dtype=torch.float64, requires_grad=True)
    for function, traced, given in ((to_windows, arrange, tokens), (from_windows, arrange_back, states)):
        assert torch.equal(function(given, windows), traced(given, windows))
        assert torch.autograd.gradcheck(lambda x: function(x, windows) ** 2, given)  # noqa: B023
        assert torch.autograd.gradgradcheck(lambda x: function(x, windows) ** 2, given)  # noqa: B023
        assert torch.equal(torch.func.vmap(lambda x: function(x, windows))(given[None])[0], function(given, windows))  # noqa: B023


@pytest.mark.parametrize(
    ("grid", "fit", "always", "size", "shift"),
    [
        ((8, 12), "transformers", False, (4, 4), (2, 2)),
        ((4, 12), "transformers", False, (4, 4), (0, 0)),
        ((3, 12), "transformers", False, (3, 3), (0, 0)),
        ((3, 12), "timm", False, (3, 4), (0, 2)),
        ((3, 12), "torchvision", False, (4, 4), (0, 2)),
        ((4, 4), "torchvision", False, (4, 4), (0, 0)),
        ((3, 12), "transformers", True, (4, 4), (2, 2)),
        ((3, 12), "timm", True, (4, 4), (2, 2)),
    ],
)
def test_windows_of_small_feature_maps(grid, fit, always, size, shift):
    windows = fit_windows(grid, 4, True, fit, always)
    assert (windows.size, windows.shift) == (size, shift)
    assert fit_windows(grid, 4, False, fit, always).shift == (0, 0)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("grid", [(8, 8), (3, 12), (12, 8)], ids=str)
def test_the_mask_parts_what_the_shift_brought_together(grid, fit):
    """Of maps that the windows divide: tokens of a shifted window may attend where they are close in the image."""
    windows = fit_windows(grid, 4, True, fit)
    if windows.padded != grid:
        pytest.skip("padded")
    mask = shift_mask(windows, CPU, torch.float32)
    position = torch.arange(grid[0] * grid[1])
    rows, columns = (
        to_windows(axis.view(1, -1, 1), windows)[..., 0] for axis in (position // grid[1], position % grid[1])
    )
    near = ((rows[:, :, None] - rows[:, None]).abs() < 4) & ((columns[:, :, None] - columns[:, None]).abs() < 4)
    assert set(mask.unique().tolist()) == ({0.0, MASKED} if windows.is_shifted else {0.0})
    assert torch.equal(mask == 0, near)


@pytest.mark.parametrize("size", [(4, 4), (3, 3), (2, 4), (1, 1)], ids=str)
def test_position_biases_are_looked_up_by_offset(size):
    """Smaller windows use the middle of the table."""
    bias = RelativePositionBias(4, 2)
    nn.init.normal_(bias.relative_position_bias_table)
    table, found = bias.relative_position_bias_table.view(7, 7, 2), bias(size)
    for i in range(size[0] * size[1]):
        for j in range(size[0] * size[1]):
            dy, dx = i // size[1] - j // size[1], i % size[1] - j % size[1]
            assert torch.equal(found[:, i, j], table[dy + 3, dx + 3])


def test_resized_windows(tmp_path):
    """By the bicubic interpolation of the authors' fine-tuning."""
    model, images = tiny_swin(), tiny_images(2, 32, 32)
    same = model(images).logits
    model.set_window_size(4)
    assert torch.equal(model(images).logits, same)
    name = "swin.encoder.layers.1.blocks.0.attention.relative_position_bias.relative_position_bias_table"
    plane = model.get_parameter(name).detach().T.reshape(1, 4, 7, 7)  # 4 heads
    model.set_window_size(6)
    expected = nn.functional.interpolate(plane, size=(11, 11), mode="bicubic").reshape(4, 121).T
    assert largest_difference(model.get_parameter(name), expected) < 1e-6
    assert model.config.window_size == 6 and model(tiny_images(2, 48, 48)).logits.shape == (2, 5)
    model.save_pretrained(tmp_path)
    again = TfmSwinForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tiny_images()).logits, model(tiny_images()).logits)
    with pytest.raises(ValueError, match="window_size must be at least 1, got 0"):
        model.set_window_size(0)


@pytest.mark.parametrize("fit", FITS)
def test_images_of_every_size_in_any_order(fit):
    """An image leaves nothing behind: transformers keeps the smaller windows of a small one."""
    sizes = [(32, 32), (8, 8), (13, 30), (2, 2), (64, 16), (32, 32)]
    if fit == "torchvision":
        sizes.remove((13, 30))  # cropped, and so tested below
    fresh = [tiny_swin(window_fit=fit)(tiny_images(2, *size)).logits for size in sizes]
    model = tiny_swin(window_fit=fit)
    for size, expected in zip(sizes, fresh, strict=True):
        assert torch.equal(model(tiny_images(2, *size)).logits, expected)
    assert all(one.isfinite().all() for one in fresh)


def test_images_that_patches_do_not_divide():
    images = tiny_images(2, 13, 31)
    padded = nn.functional.pad(images, (0, 1, 0, 1))
    assert torch.equal(tiny_swin()(images).logits, tiny_swin()(padded).logits)
    cropping = tiny_swin(window_fit="torchvision")
    assert torch.equal(cropping(images).logits, cropping(images[:, :, :12, :30]).logits)
    with pytest.raises(ValueError, match="pixel_values must be at least as large as a patch"):
        cropping(tiny_images(2, 1, 8))
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, H, W\), got \(2, 1, 8, 8\)"):
        tiny_swin()(tiny_images(2, 8, 8, channels=1))


def test_a_window_that_training_follows_inference_with():
    """Masks cached in inference mode serve training."""
    model, images = tiny_swin(), tiny_images(3, 40, 40)
    shift_mask.cache_clear()
    relative_index.cache_clear()
    with torch.inference_mode():
        expected = model(images).logits.clone()
    output = model(images, labels=LABELS)
    output.loss.backward()
    assert largest_difference(output.logits, expected) < 1e-5 and gradients(model).abs().max() > 1e-4


def test_drop_path_rates_grow_linearly_over_all_stages():
    config = tiny_swin_config(depths=[2, 3], drop_path_rate=0.2)
    assert [rate for stage in drop_path_rates(config) for rate in stage] == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(tiny_swin_config(depths=[1, 1], drop_path_rate=0.2)) == [[0.0], [0.2]]


def test_both_branches_are_dropped():
    """Of a model whose last block always drops them: transformers drops attention alone."""
    model = tiny_swin_encoder(depths=[1, 1], drop_path_rate=0.5).train()
    block = model.encoder.layers[1].blocks[0]
    block.drop_path.rate = 1 - 1e-9
    images = tiny_images(2, 32, 32)
    output = model(images, output_hidden_states=True)
    assert torch.equal(output.hidden_states[2], output.hidden_states[1])
    assert not torch.equal(model.eval()(images, output_hidden_states=True).hidden_states[2], output.hidden_states[1])


def test_hidden_states_and_attentions():
    model, images = tiny_swin_encoder(), tiny_images(3, 32, 24)
    output = model(images, output_hidden_states=True, output_attentions=True)
    assert [tuple(states.shape) for states in output.hidden_states] == [(3, 192, 8), (3, 48, 16), (3, 48, 16)]
    for states, features in zip(output.hidden_states, output.reshaped_hidden_states, strict=True):
        assert torch.equal(features.flatten(2).transpose(1, 2), states)
    assert output.reshaped_hidden_states[1].shape == (3, 16, 8, 6)
    assert [tuple(maps.shape) for maps in output.attentions] == [
        (36, 2, 16, 16),  # 4 x 3 windows of each image
        (36, 2, 16, 16),
        (12, 4, 16, 16),  # 8 x 6 tokens, padded to 2 x 2 windows
        (12, 4, 16, 16),
    ]
    for maps in output.attentions:
        torch.testing.assert_close(maps.sum(dim=-1), torch.ones(maps.shape[:-1]))
    plain = model(images)
    assert plain.hidden_states is None and plain.attentions is None and plain.reshaped_hidden_states is None
    assert largest_difference(plain.last_hidden_state, output.last_hidden_state) < 1e-5
    assert torch.equal(plain.pooler_output, plain.last_hidden_state.mean(dim=1))


def test_a_shift_connects_windows():
    """Which tokens of the output depend on a pixel, in a stage of two blocks."""
    images = tiny_images(1, 16, 16).requires_grad_()
    for shift, reach in ((True, 8), (False, 4)):
        model = tiny_swin_encoder(depths=[2], num_heads=[2], patch_size=1, use_shift=shift)
        features = model(images, output_hidden_states=True).reshaped_hidden_states[1]
        (gradient,) = torch.autograd.grad(features[0, :, 5, 5].sum(), images)
        rows = gradient[0].abs().sum(dim=(0, 2)).nonzero()[:, 0]
        assert (rows.min(), rows.max()) == ((0, 7) if reach == 8 else (4, 7))


def test_without_position_biases_tokens_of_a_window_are_a_set():
    images = tiny_images(1, 4, 4)
    fields = {"depths": [1], "num_heads": [2], "patch_size": 1}
    for used in (True, False):
        model = tiny_swin(**fields, use_relative_position_bias=used)
        difference = largest_difference(model(images).logits, model(images.flip(-1)).logits)
        assert difference > 1e-4 if used else difference < 1e-6
    names = tiny_swin(use_relative_position_bias=False).state_dict()
    assert not any("relative_position" in name for name in names)


@pytest.mark.parametrize("sizes", [((32, 32),), ((30, 22),)], ids=str)
def test_a_backbone_gives_feature_maps_of_every_stride(sizes):
    fields = {"depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 4], "patch_size": 4, "out_indices": [1, 2, 3, 4]}
    model = tiny_swin_backbone(**fields)
    assert model.channels == [8, 16, 32, 64] and model.out_features == ["stage1", "stage2", "stage3", "stage4"]
    for height, width in sizes:
        output = model(tiny_images(2, height, width))
        for features, stride, channels in zip(output.feature_maps, (4, 8, 16, 32), model.channels, strict=True):
            assert features.shape == (2, channels, -(-height // stride), -(-width // stride))
        assert output.hidden_states is None and output.attentions is None
    sum(features.square().sum() for features in output.feature_maps).backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "none is left over"
    assert len(model(tiny_images(), output_attentions=True).attentions) == 5


def test_auto_backbone_reads_a_classifier(tmp_path):
    model = AutoBackbone.from_config(tiny_swin_config(out_indices=[1, 2]))
    assert isinstance(model, TfmSwinBackbone) and model.out_indices == [1, 2]
    classifier = tiny_swin()
    classifier.save_pretrained(tmp_path)
    chosen, info = TfmSwinBackbone.from_pretrained(tmp_path, out_features=["stage1"], output_loading_info=True)
    assert info["missing_keys"] == {f"hidden_states_norms.stage1.{kind}" for kind in ("weight", "bias")}
    assert not info["unexpected_keys"] or info["unexpected_keys"] == {"classifier.weight", "classifier.bias"}
    images = tiny_images(2, 32, 32)
    states = classifier.swin.embeddings(images)[0]
    for block in classifier.swin.encoder.layers[0].blocks:
        states = block(states, (16, 16), always_partition=True)
    expected = nn.functional.layer_norm(states, (8,), eps=1e-5)
    assert largest_difference(chosen.eval()(images).feature_maps[0].flatten(2).transpose(1, 2), expected) < 1e-5
    base = TfmSwinModel.from_pretrained(tmp_path, add_pooling_layer=False).eval()
    assert base(images).pooler_output is None


def test_fresh_weights_are_the_authors():
    """Truncated normal of 0.02 in linear layers and tables of biases; no bias is off."""
    torch.manual_seed(0)
    model = TfmSwinForImageClassification(TfmSwinConfig(embed_dim=32, depths=(1, 1), num_heads=(8, 8)))
    for module in model.modules():
        if isinstance(module, nn.Linear | RelativePositionBias):
            weight = next(p for name, p in module.named_parameters(recurse=False) if name != "bias")
            assert weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert weight.abs().max() > 0.04
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any()


def test_weight_decay_and_learning_rates():
    """Position biases do not decay; blocks are numbered through the stages."""
    model = TfmSwinForImageClassification(tiny_swin_config(depths=[2, 1], num_labels=5))
    args = TrainingArguments(output_dir=".", max_steps=1, weight_decay=0.1, layer_wise_lr_decay=0.5, learning_rate=1.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = {names[id(p)]: group for group in parameter_groups(model, args) for p in group["params"]}
    for name, group in groups.items():
        decays = name.endswith("weight") and "norm" not in name
        assert group["weight_decay"] == (0.1 if decays else 0.0), name
    rates = {
        "swin.embeddings.patch_embeddings.projection.weight": 0.5**4,
        "swin.encoder.layers.0.blocks.0.mlp.fc1.weight": 0.5**3,
        "swin.encoder.layers.0.blocks.1.mlp.fc1.weight": 0.5**2,
        "swin.encoder.layers.0.downsample.reduction.weight": 0.5**2,
        "swin.encoder.layers.1.blocks.0.attention.relative_position_bias.relative_position_bias_table": 0.5,
        "swin.layernorm.weight": 1.0,
        "classifier.weight": 1.0,
    }
    assert {name: groups[name]["lr"] for name in rates} == pytest.approx(rates)
    assert layer_ids(["layers.0.a", "layers.1.blocks.0.a", "embeddings.a"]) == {
        "layers.0.a": 1,
        "layers.1.blocks.0.a": 1,
        "embeddings.a": 0,
    }


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_backends_agree(backend):
    model, images = tiny_swin(), tiny_images(3, 28, 36)
    expected = model(images, output_attentions=True)
    model.set_attn_implementation(backend)
    assert largest_difference(model(images).logits, expected.logits) < 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        half = model(images, labels=LABELS)
    assert half.loss.item() == pytest.approx(model(images, labels=LABELS).loss.item(), rel=0.03)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    found = []
    for checkpointing in (False, True):
        model = tiny_swin(drop_path_rate=0.3, hidden_dropout_prob=0.1).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(3)
        output = model(tiny_images(3, 32, 32), labels=LABELS, output_attentions=True)
        assert len(output.attentions) == 4
        output.loss.backward()
        found.append(gradients(model))
    assert found[0].abs().max() > 1e-3 and largest_difference(*found) < 1e-6


@torch.no_grad()
def test_forward_compiles_and_exports_in_one_graph():
    """With padded and shifted windows."""
    torch.compiler.reset()
    model, images = tiny_swin(depths=[2], num_heads=[2]), tiny_images(3, 13, 30)
    expected = model(images).logits
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert largest_difference(compiled(images).logits, expected) < 1e-5
    B = torch.export.Dim("B", min=2)
    inputs = {"pixel_values": images}
    shapes = {"pixel_values": {0: B}}
    shift_mask.cache_clear()
    program = torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)
    for other in (images, tiny_images(5, 13, 30)):
        assert largest_difference(program.module()(pixel_values=other).logits, model(other).logits) < 1e-5


def test_every_parameter_gets_a_gradient():
    model = tiny_swin()
    model(tiny_images(3, 32, 32), labels=LABELS).loss.backward()
    for name, parameter in model.named_parameters():
        # A bias of the keys shifts all scores of a query alike, which softmax does not see.
        assert parameter.grad.abs().max() > (0 if "k_proj.bias" in name else 1e-7), name


def test_losses_and_labels():
    model, native = tiny_swin(), SwinForImageClassification(SwinConfig(embed_dim=6, depths=[1], num_heads=[1]))
    native.config.num_labels = 5
    output = model(tiny_images(), labels=LABELS)
    assert torch.equal(output.loss, native.loss_function(LABELS, output.logits, native.config))
    assert tiny_swin(num_labels=0)(tiny_images()).logits.shape == (3, 16)
    with pytest.raises(TypeError, match="unexpected keyword argument 'label'"):
        model(tiny_images(), label=LABELS)


def test_parallel_plans_name_real_parts():
    model = tiny_swin_encoder()
    modules = {name for name, _ in model.named_modules()}
    for plan in (type(model.config).base_model_tp_plan, type(model.config).base_model_fsdp_plan):
        assert plan and {pattern.replace("*", "1") for pattern in plan} <= modules
    assert sum(isinstance(module, WindowAttention) for module in model.modules()) == 4


def test_a_configuration_from_a_file_of_transformers():
    native = SwinConfig(embed_dim=48, depths=[2, 2, 2], num_heads=[3, 6, 12]).to_dict()
    native.pop("model_type")
    config = TfmSwinConfig.from_dict(native)
    assert (config.hidden_size, config.num_layers, config.num_attention_heads) == (192, 3, [3, 6, 12])
    with pytest.raises(ValueError, match="hidden_size must be 768, as embed_dim and depths imply, got 96"):
        TfmSwinConfig(hidden_size=96)
    assert TfmSwinConfig(hidden_size=768).hidden_size == 768


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"embed_dim": 30, "num_heads": [4, 4]}, "num_heads must divide the hidden sizes of the stages, got 4 for 30"),
        ({"num_heads": [2]}, r"num_heads must have a number for each of the 2 stages of depths, got \[2\]"),
        ({"depths": []}, r"depths must have a positive number for every stage, got \[\]"),
        ({"depths": [2, 0]}, r"depths must have a positive number for every stage, got \[2, 0\]"),
        ({"depths": [2, 5000]}, "depths must have at most 1000 blocks in total, got 5002"),
        ({"window_size": 0}, "window_size must be at least 1, got 0"),
        ({"mlp_ratio": 0.0}, "mlp_ratio must be at least"),
        ({"window_fit": "pytorch"}, 'window_fit must be one of transformers, timm, torchvision, got "pytorch"'),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"hidden_act": "sine"}, 'hidden_act must be one of .*, got "sine"'),
        ({"patch_size": 0}, r"patch_size must be a number or a \(height, width\) pair of pixels, got 0"),
        ({"image_size": [8, 8, 3]}, r"image_size must be a number or a \(height, width\) pair"),
        ({"window": 4}, None),
        ({"window_sise": 4}, 'did you mean "window_size"'),
        ({"out_features": ["stage9"]}, "out_features must be a subset of stage_names"),
    ],
    ids=str,
)
def test_errors_name_field_and_value(fields, message):
    if message is None:  # an unknown field that resembles none is kept, as everywhere in transformers
        assert tiny_swin_config(**fields).window == 4
        return
    with pytest.raises(ValueError, match=message):
        tiny_swin_config(
            **{"num_heads": [2, 4], **fields} if "embed_dim" not in fields else {**fields, "num_heads": [4, 4]}
        )


def test_an_unknown_size():
    with pytest.raises(ValueError, match='size must be one of tiny, small, base, large, got "huge"'):
        TfmSwinConfig.of_size("huge")
