"""The masked autoencoder: visibility, loss, and reuse of its encoder."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import largest_difference
from tiny_vision import gradients, scramble, tiny_images, tiny_mae, tiny_mae_config, tiny_noise
from torch import nn

from hf_tfm import TfmMAEConfig, TfmMAEForPreTraining, TfmMAEModel, TfmViTForImageClassification
from hf_tfm.models.modeling_mae import normalize_patches, num_visible, random_masking
from hf_tfm.models.patches import patchify, unpatchify


@pytest.mark.parametrize(
    ("patches", "ratio", "visible"),
    [(196, 0.75, 49), (196, 0.0, 196), (100, 0.9, 10), (16, 0.99, 1), (10, 0.7, 3), (7, 0.5, 3)],
)
def test_number_of_visible_patches(patches, ratio, visible):
    """100 (1 - 0.9) is 9.99999999999999... in floating point but must give 10 patches."""
    assert num_visible(patches, ratio) == visible


def test_masking_with_given_noise():
    noise = torch.tensor([[0.3, 0.1, 0.9, 0.2], [0.5, 0.6, 0.4, 0.7]])
    keep, mask, restore = random_masking(2, 4, 0.5, noise)
    assert keep.tolist() == [[1, 3], [2, 0]], "patches with the smallest noise stay"
    assert mask.tolist() == [[1, 0, 1, 0], [0, 1, 0, 1]]
    patches = torch.arange(8.0).view(2, 4)
    shuffled = patches.gather(1, noise.argsort(dim=1))
    assert torch.equal(shuffled.gather(1, restore), patches), "restore undoes the shuffle"
    assert torch.equal(shuffled[:, :2], patches.gather(1, keep))


def test_masking_is_uniform_and_reproducible():
    torch.manual_seed(0)
    _, mask, _ = random_masking(4000, 8, 0.75)
    assert mask.sum(dim=1).eq(6).all()
    assert (mask.mean(dim=0) - 0.75).abs().max() < 0.03
    torch.manual_seed(0)
    assert torch.equal(random_masking(4000, 8, 0.75)[1], mask)
    with pytest.raises(ValueError, match=r"noise must have shape \(2, 4\), got \(2, 5\)"):
        random_masking(2, 4, 0.5, torch.rand(2, 5))


def test_shapes():
    model, images = tiny_mae(), tiny_images()
    output = model(images, output_hidden_states=True, output_attentions=True)
    assert output.loss.ndim == 0 and output.logits.shape == (3, 16, 48)
    assert output.mask.shape == (3, 16) and output.mask.sum(dim=1).eq(12).all()
    assert output.ids_restore.dtype == torch.int64
    assert [tuple(state.shape) for state in output.hidden_states] == [(3, 5, 32)] * 4
    assert [tuple(maps.shape) for maps in output.attentions] == [(3, 4, 5, 5)] * 3


@pytest.mark.parametrize("filling", [float("nan"), 1e30])
def test_masked_patches_never_reach_the_encoder(filling):
    model, images, noise = tiny_mae(), tiny_images(), tiny_noise()
    output = model(images, noise=noise)
    patches = patchify(images, 4)
    spoiled = unpatchify(patches.masked_fill(output.mask[..., None].bool(), filling), 4, 16)
    again = model(spoiled, noise=noise)
    assert torch.equal(again.logits, output.logits), "encoder and decoder see the visible patches alone"
    changed = unpatchify(patches + (1 - output.mask[..., None]), 4, 16)
    assert largest_difference(model(changed, noise=noise).logits, output.logits) > 1e-3


def test_mask_ratio_zero_masks_nothing():
    model, images = tiny_mae(mask_ratio=0.0), tiny_images()
    output = model(images)
    assert output.mask.eq(0).all() and output.loss == 0
    assert model.vit(images).last_hidden_state.shape == (3, 17, 32)


def test_order_of_visible_patches_does_not_matter():
    model, images, noise = tiny_mae(), tiny_images(), tiny_noise()
    output = model(images, noise=noise)
    order = noise.clone()
    visible = output.mask == 0
    order[visible] = -order[visible]  # visible patches in reverse order, still below the masked ones
    again = model(images, noise=order)
    assert torch.equal(again.mask, output.mask) and not torch.equal(again.ids_restore, output.ids_restore)
    assert largest_difference(again.logits, output.logits) < 1e-5


def test_masked_patches_of_a_fresh_model_get_different_predictions():
    """Without decoder positions all masked patches of an image get the same prediction and nothing is learned."""
    torch.manual_seed(0)
    model = TfmMAEForPreTraining(tiny_mae_config(decoder_hidden_size=32, hidden_size=64)).eval()
    output = model(tiny_images())
    for logits, mask in zip(output.logits, output.mask.bool(), strict=True):
        distances = torch.cdist(logits[mask], logits[mask]) + 1e3 * torch.eye(int(mask.sum()))
        assert distances.min() > 0.05 * logits[mask].norm(dim=-1).mean()
    model.decoder.decoder_pos_embed.zero_()
    output = model(tiny_images())
    hidden = output.logits[0][output.mask[0].bool()]
    assert largest_difference(hidden, hidden[:1].expand_as(hidden)) < 1e-5


@pytest.mark.parametrize("normalised", [False, True])
def test_loss_is_the_mean_over_masked_patches(normalised):
    model, images, noise = tiny_mae(norm_pix_loss=normalised), tiny_images(), tiny_noise()
    output = model(images, noise=noise)
    total, count = 0.0, 0
    for image, logits, mask in zip(images, output.logits, output.mask, strict=True):
        for row in range(4):
            for column in range(4):
                if not mask[row * 4 + column]:
                    continue
                target = image[:, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4].permute(1, 2, 0).flatten()
                if normalised:
                    target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
                total += (logits[row * 4 + column] - target).square().mean().item()
                count += 1
    assert count == 36 and output.loss.item() == pytest.approx(total / count, rel=1e-5)


def test_constant_patches_are_normalized_to_zero():
    patches, mean, deviation = normalize_patches(torch.full((1, 2, 12), 0.5))
    assert patches.abs().max() < 1e-3 and mean.eq(0.5).all() and deviation.isfinite().all()


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)], ids=str)
def test_reconstruct_keeps_visible_pixels_exactly(normalised, size):
    model, images = tiny_mae(norm_pix_loss=normalised), 3 + 2 * tiny_images(3, *size)
    output = model(images)
    pictures = model.reconstruct(images, output.logits, output.mask)
    hidden = output.mask[..., None].bool().expand_as(output.logits)
    assert pictures.shape == images.shape
    patches, originals = patchify(pictures, 4), patchify(images, 4)
    assert torch.equal(patches[~hidden], originals[~hidden])
    assert (patches[hidden] - originals[hidden]).abs().mean() > 0.1
    target = normalize_patches(originals)[0] if normalised else originals
    perfect = model.reconstruct(images, target, output.mask)
    assert largest_difference(perfect, images) < 1e-4, "a perfect prediction gives the image in its own scale"


def test_non_square_images_and_other_sizes():
    model = tiny_mae(image_size=[8, 32])
    assert model.vit.embeddings.grid == model.decoder.grid == (2, 8)
    for size in ((8, 32), (16, 16), (24, 8)):
        images, patches = tiny_images(2, *size), size[0] * size[1] // 16
        output = model(images, noise=tiny_noise(2, patches))
        assert output.logits.shape == (2, patches, 48) and output.loss.isfinite()
    with pytest.raises(ValueError, match="have 4 x 4 patches, but the model has positions for 2 x 8"):
        model(tiny_images(), interpolate_pos_encoding=False)
    with pytest.raises(ValueError, match=r"pixel_values must be a multiple of the patch .* got 10 x 16"):
        model(tiny_images(2, 10, 16))
    with pytest.raises(ValueError, match=r"noise must have shape \(3, 16\), got \(3, 9\)"):
        tiny_mae()(tiny_images(), noise=tiny_noise(3, 9))


def test_resizing_the_model():
    """Tables and configuration equal those of a model created at that size, and trained weights are kept."""
    model, again = tiny_mae(), tiny_mae(image_size=[8, 24])
    model.set_image_size((8, 24))
    assert model.config.image_size == (8, 24) and model.vit.embeddings.grid == model.decoder.grid == (2, 6)
    for name, table in again.named_buffers():
        assert torch.equal(model.get_buffer(name), table), name
    again.load_state_dict(model.state_dict())
    images, noise = tiny_images(2, 8, 24), tiny_noise(2, 12)
    assert torch.equal(model(images, noise=noise).logits, again(images, noise=noise).logits)
    with pytest.raises(ValueError, match="image_size must be a multiple of the patch"):
        model.set_image_size(18)


@pytest.mark.parametrize(("autocast", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_residual_stream_is_float32_under_autocast(autocast, dtype):
    """In encoder and decoder, as in transformers' ViTMAE; a half-precision model stays in its dtype."""
    model = tiny_mae() if autocast else tiny_mae().to(torch.bfloat16)
    seen = []
    for block in (*model.vit.layers, *model.decoder.decoder_layers):
        block.register_forward_hook(lambda module, given, output: seen.extend([given[0].dtype, output.dtype]))
    images = tiny_images() if autocast else tiny_images().to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(images, noise=tiny_noise())
    assert seen == [dtype] * 2 * 5 and output.logits.dtype == torch.bfloat16


def test_decoder_follows_the_configuration():
    """Its blocks read a view with the decoder sizes and all later changes of the model's configuration."""
    model = tiny_mae(attn_implementation="eager", hidden_dropout_prob=0.25, drop_path_rate=0.3)
    attention = model.decoder.decoder_layers[0].self_attn
    assert (attention.config.hidden_size, attention.config.num_attention_heads) == (16, 2)
    assert attention.config._attn_implementation == "eager" and attention.head_dim == 8
    model.set_attn_implementation("sdpa")
    assert attention.config._attn_implementation == "sdpa"
    rates = [layer.self_attn_residual.drop_path.rate for layer in model.decoder.decoder_layers]
    assert rates == [0, 0] and model.vit.layers[-1].self_attn_residual.drop_path.rate == 0.3
    assert model.decoder.decoder_layers[1].self_attn_residual.dropout.p == 0.25


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_deepcopy(copied):
    model, images, noise = tiny_mae(), tiny_images(), tiny_noise()
    twin = copied(model)
    assert torch.equal(twin(images, noise=noise).logits, model(images, noise=noise).logits)
    view = twin.decoder.decoder_layers[0].self_attn.config
    assert view.original is twin.config, "the copy's decoder follows the copy"
    twin.set_attn_implementation("eager")
    assert view._attn_implementation == "eager"
    assert model.decoder.decoder_layers[0].self_attn.config._attn_implementation == "sdpa"


def test_every_parameter_gets_a_gradient_except_positions():
    model = tiny_mae()
    model(tiny_images(), noise=tiny_noise()).loss.backward()
    names = {name for name, _ in model.named_parameters()}
    assert not any("pos" in name for name in names) and gradients(model).isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > (0 if "k_proj.bias" in name else 1e-7), name


def test_initial_weights():
    """Appendix A.1: Xavier uniform, with the patch embedding treated as a matrix; N(0, 0.02) for tokens."""
    torch.manual_seed(0)
    model = TfmMAEForPreTraining(tiny_mae_config(hidden_size=64, decoder_hidden_size=64))
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            fan_out, fan_in = module.weight.flatten(1).shape
            bound = (6 / (fan_in + fan_out)) ** 0.5
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
            assert module.bias.eq(0).all(), name
    for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
        assert 0.01 < token.std() < 0.03
    assert model.vit.embeddings.position_embeddings[0, 0].eq(0).all()


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_classifier_loads_the_encoder(pooling, tmp_path):
    """New weights are reported: the classifier, and the norm after mean pooling; the decoder is dropped."""
    mae = tiny_mae()
    mae.save_pretrained(tmp_path)
    model, info = TfmViTForImageClassification.from_pretrained(
        tmp_path, pooling=pooling, num_labels=5, output_loading_info=True
    )
    fresh = {"classifier.weight", "classifier.bias"}
    if pooling == "mean":
        fresh |= {"vit.fc_norm.weight", "vit.fc_norm.bias"}
    assert info["missing_keys"] == fresh
    assert info["unexpected_keys"] == ({"vit.layernorm.weight", "vit.layernorm.bias"} if pooling == "mean" else set())
    assert not info["mismatched_keys"] and model.config.position_embedding_type == "learned"
    images = tiny_images()
    mae.config.mask_ratio = 0.0
    seen = mae.vit(images, noise=torch.arange(16.0).expand(3, -1), output_hidden_states=True)
    expected = seen.hidden_states[-1]  # before the norm
    got = model.eval()(images, output_hidden_states=True).hidden_states[-1]
    assert largest_difference(got, expected) < 1e-5
    assert model.vit.embeddings.position_embeddings.requires_grad, "fine-tuning may train them"


def test_base_model_and_full_model_load_each_others_files(tmp_path):
    model, images, noise = tiny_mae(), tiny_images(), tiny_noise()
    model.save_pretrained(tmp_path / "whole")
    base = TfmMAEModel.from_pretrained(tmp_path / "whole").eval()
    expected = model.vit(images, noise=noise).last_hidden_state
    assert torch.equal(base(images, noise=noise).last_hidden_state, expected)
    base.save_pretrained(tmp_path / "base")
    again, info = TfmMAEForPreTraining.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert torch.equal(again.eval().vit(images, noise=noise).last_hidden_state, expected)
    assert info["missing_keys"] and all(name.startswith("decoder.") for name in info["missing_keys"])
    assert torch.equal(again.decoder.decoder_pos_embed, model.decoder.decoder_pos_embed)
    assert scramble(again)(images).loss.isfinite()


def test_fixed_positions_are_computed_if_missing_in_a_file(tmp_path):
    """transformers first builds the model on the meta device and would leave missing values uninitialized."""
    model = tiny_mae()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: value for name, value in load_file(file).items() if "pos" not in name}
    save_file(weights, file, metadata={"format": "pt"})
    loaded, info = TfmMAEForPreTraining.from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"] == {"vit.embeddings.position_embeddings", "decoder.decoder_pos_embed"}
    images, noise = tiny_images(), tiny_noise()
    assert torch.equal(loaded.eval()(images, noise=noise).logits, model(images, noise=noise).logits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"mask_ratio": -0.5}, r"mask_ratio must be in \[0, 1\), got -0.5"),
        ({"decoder_hidden_size": 18}, "decoder_hidden_size must be a multiple of 4 for 2-D sine-cosine .*, got 18"),
        ({"decoder_num_attention_heads": 3}, "decoder_hidden_size must be a multiple of 3 .*, got 16"),
        ({"decoder_num_hidden_layers": 0}, "decoder_num_hidden_layers must be at least 1, got 0"),
        ({"hidden_size": 30, "num_attention_heads": 5}, 'multiple of 4 for position_embedding_type="sincos_2d"'),
        ({"image_size": 18}, "image_size must be a multiple of the patch"),
    ],
    ids=str,
)
def test_errors_name_field_and_value(fields, message):
    with pytest.raises(Exception, match=message) as raised:
        tiny_mae_config(**fields)
    assert isinstance(raised.value, ValueError | TypeError) or "Validation" in type(raised.value).__name__


def test_defaults_match_the_paper():
    """ViT-B/16, mask ratio 0.75, and the default decoder of table 1: 8 blocks, width 512."""
    with torch.device("meta"):
        model = TfmMAEForPreTraining(TfmMAEConfig())
    encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (model.vit, model.decoder))
    assert encoder == pytest.approx(85.8e6, rel=0.005) and decoder == pytest.approx(26e6, rel=0.02)
    assert model.config.mask_ratio == 0.75
