"""The Vision Transformer: sizes, positions, pooling, losses, and error messages."""

import math

import pytest
import torch
from tiny_models import largest_difference
from tiny_vision import HYBRID, gradients, tiny_encoder, tiny_images, tiny_vit, tiny_vit_config
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from hf_tfm import TfmViTConfig, TfmViTForImageClassification, TfmViTModel
from hf_tfm.models.blocks import DropPath
from hf_tfm.models.modeling_vit import drop_path_rates
from hf_tfm.models.patches import resize_grid

KINDS = pytest.mark.parametrize("kind", ["learned", "learned_2d", "sincos_2d"])


def closed_form(config: TfmViTConfig, classes: int) -> int:
    """Parameters, counted by hand from equations 1 to 4 and a linear classifier."""
    D, F = config.hidden_size, config.intermediate_size
    patches = (config.image_size // config.patch_size) ** 2
    embeddings = config.patch_size**2 * 3 * D + D + D + (1 + patches) * D
    block = 4 * (D * D + D) + (2 * D * F + F + D) + 2 * 2 * D
    return embeddings + config.num_hidden_layers * block + 2 * D + D * classes + classes


def count(model_class: type, config: TfmViTConfig) -> int:
    with torch.device("meta"):
        model = model_class(config)
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("size", "millions"), [("tiny", 5.7), ("small", 22), ("base", 86.6), ("large", 304.3), ("huge", 632)]
)
def test_published_parameter_counts(size, millions):
    """Tiny and small: DeiT, table 1. Base to huge: 86, 307 and 632 M in the paper's table 1, which rounds large up."""
    config = TfmViTConfig.of_size(size, num_labels=1000)
    parameters = count(TfmViTForImageClassification, config)
    assert parameters == closed_form(config, 1000) == pytest.approx(millions * 1e6, rel=0.005)
    published = {"base": 86, "large": 307, "huge": 632}.get(size)
    assert published is None or parameters == pytest.approx(published * 1e6, rel=0.01)


def test_parameters_of_options():
    D, P = 32, 16
    plain = count(TfmViTForImageClassification, tiny_vit_config(num_labels=5))

    def more(**fields) -> int:
        return count(TfmViTForImageClassification, tiny_vit_config(num_labels=5, **fields)) - plain

    assert more(position_embedding_type="sincos_2d") == -(1 + P) * D
    assert more(position_embedding_type="learned_2d") == 2 * 4 * D // 2 - (1 + P) * D
    assert more(pooling="mean") == 0  # the norm is after the pooling
    assert more(representation_layer=True, pooler_output_size=24) == (D * 24 + 24) - (D - 24) * 5
    assert more(qkv_bias=False) == -3 * 3 * D
    assert more(image_size=[8, 32]) == 0 and more(patch_size=2) != 0
    assert TfmViTConfig.of_size("huge").patch_size == 14


@KINDS
def test_positions_matter_and_are_added_once(kind):
    """Permuted patches are another image; without positions they would give the same output."""
    model = tiny_vit(position_embedding_type=kind)
    images = tiny_images()
    swapped = torch.cat([images[..., 8:], images[..., :8]], dim=-1)
    assert largest_difference(model(images).logits, model(swapped).logits) > 1e-3
    embeddings = model.vit.embeddings
    first, table = embeddings.positions((4, 4))
    assert table.shape == (1, 16, 32)
    tokens = embeddings(images) - torch.cat([first, table], dim=1)
    embeddings.positions = lambda grid, sizes: (torch.zeros(1, 1, 32), torch.zeros(1, 16, 32))
    assert largest_difference(embeddings(images), tokens) < 1e-5
    assert largest_difference(model(images).logits, model(swapped).logits) < 1e-5


@KINDS
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_initial_positions_distinguish_patches(kind, pooling):
    """Equal patches must get different embeddings in a model created from its configuration."""
    torch.manual_seed(0)
    model = TfmViTModel(tiny_vit_config(position_embedding_type=kind, pooling=pooling))
    tokens = model.embeddings(torch.ones(1, 3, 16, 16))[0]
    distances = torch.cdist(tokens, tokens) + torch.eye(17)
    assert distances.min() > 0.02
    assert (model.embeddings.cls_token != 0).all()


def test_learned_2d_positions_concatenate_column_and_row():
    model = tiny_encoder(position_embedding_type="learned_2d", image_size=[8, 16]).embeddings
    _, table = model.positions((2, 4))
    for row in range(2):
        for column in range(4):
            expected = torch.cat([model.column_embeddings[column], model.row_embeddings[row]])
            assert torch.equal(table[0, row * 4 + column], expected)


@KINDS
@pytest.mark.parametrize("size", [(16, 16), (32, 16), (8, 24)], ids=str)
def test_images_of_other_sizes(kind, size):
    model = tiny_vit(position_embedding_type=kind)
    images, grid = tiny_images(2, *size), (size[0] // 4, size[1] // 4)
    output = model(images, output_hidden_states=True)
    assert output.hidden_states[0].shape == (2, 1 + grid[0] * grid[1], 32)
    _, table = model.vit.embeddings.positions((4, 4))
    _, resized = model.vit.embeddings.positions(grid)
    assert torch.equal(resized, resize_grid(table, (4, 4), grid))
    if grid == (4, 4):
        assert torch.equal(model(images, interpolate_pos_encoding=False).logits, output.logits)
    else:
        with pytest.raises(ValueError, match=rf"have {grid[0]} x {grid[1]} patches, .* positions for 4 x 4"):
            model(images, interpolate_pos_encoding=False)


@pytest.mark.parametrize("patch", [4, 8, 14, 16, 32])
def test_published_patch_sizes(patch):
    """For an image of 2 x 3 patches, the linear layer equals the convolution in published checkpoints."""
    model = tiny_vit(image_size=[2 * patch, 3 * patch], patch_size=patch)
    images, embeddings = tiny_images(2, 2 * patch, 3 * patch), model.vit.embeddings
    assert embeddings.grid == (2, 3) and model(images).logits.shape == (2, 5)
    expected = embeddings.patch_embeddings.projection(images).flatten(2).transpose(1, 2)  # (B, 6, D)
    expected = expected + embeddings.position_embeddings[:, 1:]
    assert expected.abs().max() > 1 and largest_difference(embeddings(images)[:, 1:], expected) < 1e-4
    config = TfmViTConfig.of_size("base", patch_size=patch, image_size=32 * patch, num_labels=10)
    assert count(TfmViTForImageClassification, config) == closed_form(config, 10)


@KINDS
def test_non_square_images_and_patches(kind):
    model = tiny_vit(image_size=[8, 24], patch_size=[4, 2], position_embedding_type=kind)
    images = tiny_images(2, 8, 24)
    assert model.vit.embeddings.grid == (2, 12)
    assert model(images).logits.shape == (2, 5)
    assert largest_difference(model(images).logits, model(images.flip(-1)).logits) > 1e-3


def test_pooling():
    images = tiny_images()
    model = tiny_encoder(pooling="cls")
    model.pooler = None
    output = model(images)
    assert torch.equal(output.pooler_output, output.last_hidden_state[:, 0])
    averaging = tiny_encoder(pooling="mean")
    averaging.pooler = None
    output = averaging(images)
    mean = output.last_hidden_state[:, 1:].mean(dim=1)
    expected = nn.functional.layer_norm(mean, (32,), averaging.fc_norm.weight, averaging.fc_norm.bias, eps=1e-6)
    assert largest_difference(output.pooler_output, expected) < 1e-5
    assert isinstance(averaging.layernorm, nn.Identity), "nothing is normed before the mean"


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_representation_layer(pooling):
    model = tiny_vit(representation_layer=True, pooler_output_size=24, pooling=pooling)
    images = tiny_images()
    vit = model.vit
    features = vit.pooler.dense
    vit_output = vit(images)
    pooler, vit.pooler = vit.pooler, None
    plain = vit(images).pooler_output
    vit.pooler = pooler
    assert largest_difference(vit_output.pooler_output, torch.tanh(features(plain))) < 1e-6
    assert largest_difference(model(images).logits, model.classifier(vit_output.pooler_output)) < 1e-6


def test_drop_path_rates_grow_linearly():
    rates = drop_path_rates(tiny_vit_config(num_hidden_layers=5, drop_path_rate=0.2))
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    assert drop_path_rates(tiny_vit_config(num_hidden_layers=1, drop_path_rate=0.2)) == [0]
    model = tiny_vit(drop_path_rate=0.2)
    for layer, rate in zip(model.vit.layers, (0, 0.1, 0.2), strict=True):
        for residual in (layer.self_attn_residual, layer.feed_forward_residual):
            assert residual.drop_path.rate == pytest.approx(rate)


def test_drop_path_drops_whole_samples_and_keeps_the_mean():
    torch.manual_seed(0)
    drop, branch = DropPath(0.25).train(), torch.randn(1, 3, 8)
    batch = branch.expand(8000, -1, -1)
    dropped = drop(batch)
    lost = dropped.eq(0).flatten(1).all(dim=1)
    assert lost.float().mean().item() == pytest.approx(0.25, abs=0.02)
    assert largest_difference(dropped[~lost], (branch / 0.75).expand(int((~lost).sum()), -1, -1)) < 1e-6
    assert torch.equal(drop.eval()(batch), batch)


def test_drop_path_applies_in_training_only():
    images = tiny_images()
    model, plain = tiny_vit(drop_path_rate=0.5), tiny_vit()
    assert torch.equal(model(images).logits, plain(images).logits)
    torch.manual_seed(1)
    assert largest_difference(model.train()(images).logits, plain(images).logits) > 1e-3


def test_hidden_states():
    model = tiny_encoder()
    images = tiny_images()
    output = model(images, output_hidden_states=True)
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 17, 32)] * 4
    assert torch.equal(output.hidden_states[0], model.embeddings(images))
    assert torch.equal(model.layernorm(output.hidden_states[-1]), output.last_hidden_state)
    assert model(images).hidden_states is None


@pytest.mark.parametrize(
    ("problem", "classes", "labels"),
    [
        (None, 5, torch.tensor([0, 4, 2])),
        ("single_label_classification", 5, torch.tensor([0, 4, 2])),
        ("multi_label_classification", 5, torch.rand(3, 5).round()),
        (None, 5, torch.ones(3, 5)),
        ("regression", 1, torch.randn(3)),
        (None, 1, torch.randn(3)),
    ],
)
def test_losses_match_the_native_class(problem, classes, labels):
    """Also the problem_type that the first call writes into the configuration."""
    model = tiny_vit(num_labels=classes, problem_type=problem)
    native = ViTForImageClassification(ViTConfig(image_size=16, patch_size=4, hidden_size=12, num_hidden_layers=1))
    native.config.num_labels, native.config.problem_type = classes, problem
    output = model(tiny_images(), labels=labels)
    expected = native.loss_function(labels, output.logits, native.config)
    assert torch.equal(output.loss, expected) and model.config.problem_type == native.config.problem_type


def test_loss_with_soft_labels():
    model = tiny_vit(problem_type="single_label_classification")
    images, classes = tiny_images(), torch.tensor([0, 4, 2])
    hard = model(images, labels=classes).loss
    exact = nn.functional.one_hot(classes, 5).float()
    assert model(images, labels=exact).loss.item() == pytest.approx(hard.item(), abs=1e-5)
    mixed = 0.7 * exact + 0.3 * exact.roll(1, dims=0)
    expected = 0.7 * hard + 0.3 * model(images, labels=classes.roll(1)).loss
    assert model(images, labels=mixed).loss.item() == pytest.approx(expected.item(), abs=1e-5)
    parts = [
        model(images[part], labels=mixed[part], num_items_in_batch=torch.tensor(mixed.numel())).loss
        for part in (slice(0, 1), slice(1, 3))
    ]
    assert sum(parts).item() == pytest.approx(expected.item(), abs=1e-5), "micro-batches add up to the whole"
    half = tiny_vit(problem_type="single_label_classification").bfloat16()
    assert half(images.bfloat16(), labels=mixed).loss.item() == pytest.approx(expected.item(), rel=0.02)


def test_zero_labels_give_no_classifier():
    model = tiny_vit(num_labels=0)
    assert model(tiny_images()).logits.shape == (3, 32)


def test_every_parameter_gets_a_gradient():
    for fields in ({}, {"pooling": "mean"}, {"position_embedding_type": "learned_2d"}, {"representation_layer": True}):
        model = tiny_vit(**fields)
        model(tiny_images(), labels=torch.tensor([0, 1, 2])).loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            # A key bias shifts all scores of a query equally, which does not change the softmax.
            assert parameter.grad.abs().max() > (0 if "k_proj.bias" in name else 1e-7), name
        assert gradients(model).isfinite().all()


def test_parallel_plans_name_existing_modules():
    model = tiny_vit()
    modules = {name for name, _ in model.vit.named_modules()}
    for plan in (type(model.config).base_model_tp_plan, type(model.config).base_model_fsdp_plan):
        assert plan and {pattern.replace("*", "1") for pattern in plan} <= modules
    blocks = {f"vit.{name}" for name, module in model.vit.named_modules() if isinstance(module, nn.Linear)}
    planned = {pattern.replace("*", str(layer)) for pattern in model.tp_plan for layer in range(3)}
    assert {name for name in blocks if "layers" in name} <= planned


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": 30}, "hidden_size must be a multiple of 4 for num_attention_heads, got 30"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1, got 0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
        ({"hidden_dropout_prob": -0.1}, r"hidden_dropout_prob must be in \[0, 1\), got -0.1"),
        ({"hidden_act": "sine"}, 'hidden_act must be one of .*, got "sine"'),
        ({"pooling": "max"}, 'pooling must be one of cls, mean, got "max"'),
        ({"position_embedding_type": "rotary"}, 'position_embedding_type must be one of .*, got "rotary"'),
        ({"pooler_act": "sine"}, 'pooler_act must be one of .*, got "sine"'),
        ({"image_size": 18}, "image_size must be a multiple of the patch .* got 18 x 18 for patches of 4 x 4"),
        ({"image_size": [16, 16, 3]}, r"image_size must be a number or a \(height, width\) pair"),
        ({"patch_size": 0}, r"patch_size must be a number or a \(height, width\) pair of pixels, got 0"),
        ({"image_size": 0}, r"image_size must be a number or a \(height, width\) pair of pixels, got 0"),
        ({"hidden_size": "large"}, "hidden_size"),
        ({"num_hidden_layers": 2.5}, "num_hidden_layers"),
        (
            {"hidden_size": 30, "num_attention_heads": 3, "position_embedding_type": "sincos_2d"},
            'hidden_size must be a multiple of 4 for position_embedding_type="sincos_2d", got 30',
        ),
    ],
    ids=str,
)
def test_errors_name_field_and_value(fields, message):
    with pytest.raises(Exception, match=message) as raised:
        tiny_vit_config(**fields)
    assert isinstance(raised.value, ValueError | TypeError) or "Validation" in type(raised.value).__name__


def test_invalid_images_are_refused():
    model = tiny_vit()
    with pytest.raises(ValueError, match=r"pixel_values must have shape \(B, 3, H, W\), got \(2, 1, 16, 16\)"):
        model(tiny_images(2, channels=1))
    with pytest.raises(ValueError, match=r"pixel_values must be a multiple of the patch .* got 18 x 16"):
        model(tiny_images(2, 18, 16))
    with pytest.raises(ValueError, match=r'size must be one of tiny, .*, got "giant"'):
        TfmViTConfig.of_size("giant")


def test_hybrid_grid_is_that_of_the_feature_map():
    assert tiny_vit_config(**HYBRID).backbone == "resnet18"
    assert math.prod(tiny_encoder(**HYBRID).embeddings.grid) == 4


@pytest.mark.parametrize("kind", ["learned", "learned_2d", "sincos_2d"])
def test_resized_positions_equal_interpolation_in_forward(kind):
    """Learned tables give the same function at the new size. Fixed tables equal those of a model of that size."""
    model = tiny_vit(position_embedding_type=kind)
    images = torch.randn(2, 3, 24, 48)
    expected = model(images).logits
    model.vit.set_image_size((24, 48))
    again = tiny_vit(position_embedding_type=kind, image_size=(24, 48))
    shapes = {name: value.shape for name, value in again.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes
    assert model.config.image_size == (24, 48)
    if kind == "sincos_2d":
        table = again.vit.embeddings.position_embeddings
        assert torch.equal(model.vit.embeddings.position_embeddings, table)
    elif kind == "learned":
        torch.testing.assert_close(model(images, interpolate_pos_encoding=False).logits, expected)
    trained = {name for name, _ in model.named_parameters()}
    assert ("vit.embeddings.position_embeddings" in trained) == (kind == "learned")
    with pytest.raises(ValueError, match="image_size must be a multiple of the patch"):
        model.vit.set_image_size(25)
