"""DETR: padding, attention maps, additive losses, and error messages."""

import pytest
import torch
from tiny_detr import (
    PLAIN,
    relative_difference,
    tiny_detr,
    tiny_labels,
    tiny_padding,
    tiny_panoptic,
    tiny_photos,
)
from tiny_models import largest_difference
from torch import Tensor, nn

from hf_tfm import TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation, TfmDetrModel
from hf_tfm.models.positions import sine_2d
from hf_tfm.models.set_loss import normalizers

SIZES = ((64, 96), (32, 64), (64, 32))  # of the three images in the padded batch


class Cells(nn.Module):
    """Feature maps of non-overlapping cells, so that padding does not leak into an image through convolutions."""

    def __init__(self, channels: list[int]):
        super().__init__()
        sides = (4, 2, 2, 2)
        pairs = zip([3, *channels], channels, sides, strict=False)
        self.steps = nn.ModuleList(nn.Conv2d(first, last, side, side) for first, last, side in pairs)

    def forward(self, images: Tensor) -> list[Tensor]:
        maps = []
        for step in self.steps:
            images = step(images).tanh()
            maps.append(images)
        return maps


def with_cells(model: nn.Module) -> nn.Module:
    torch.manual_seed(5)
    backbone = model.get_submodule("detr.model" if hasattr(model, "detr") else "model").backbone
    backbone.body = Cells(backbone.channels)
    return model


KINDS = pytest.mark.parametrize(
    "fields",
    [
        {},
        {"norm_first": True},
        {"position_embedding_type": "learned"},
        {"auxiliary_loss": False, "activation_function": "gelu"},
    ],
    ids=str,
)


@torch.no_grad()
@KINDS
def test_padding_does_not_change_predictions(fields):
    """An image alone gives the same result as padded in a batch, whatever the padding contains."""
    model = with_cells(tiny_detr(**fields))
    images, mask = tiny_photos(), tiny_padding(SIZES)
    batch = model(images, mask)  # the padding is noise
    for i, (height, width) in enumerate(SIZES):
        alone = model(images[i : i + 1, :, :height, :width])
        assert alone.logits.std() > 0.1 and alone.pred_boxes.std() > 0.01
        assert largest_difference(batch.logits[i : i + 1], alone.logits) < 1e-4
        assert largest_difference(batch.pred_boxes[i : i + 1], alone.pred_boxes) < 1e-4
    ignored = model(images)
    assert largest_difference(ignored.logits[1:], batch.logits[1:]) > 1e-2, "the mask matters"


@torch.no_grad()
def test_padding_does_not_change_attention_maps_of_boxes():
    """The maps that the mask head reads; its convolutions then mix cells across the edge, as in the authors' code."""
    model = with_cells(tiny_panoptic())
    images, mask = tiny_photos(), tiny_padding(SIZES)
    found = []
    model.bbox_attention.register_forward_hook(lambda module, args, maps: found.append(maps))
    model(images, mask)
    batch = found.pop().unflatten(-1, (2, 3))  # (B, Q, A, h, w)
    torch.testing.assert_close(batch.sum((2, 3, 4)), torch.ones(3, 7), msg="one softmax over heads and cells")
    for i, (height, width) in enumerate(SIZES):
        model(images[i : i + 1, :, :height, :width])
        rows, columns = height // 32, width // 32
        alone = found.pop()[0].unflatten(-1, (rows, columns))
        assert largest_difference(batch[i, :, :, :rows, :columns], alone) < 1e-5
        assert batch[i, :, :, rows:].eq(0).all() and batch[i, :, :, :, columns:].eq(0).all()


@torch.no_grad()
@pytest.mark.parametrize("build", [tiny_detr, tiny_panoptic])
def test_no_mask_means_no_padding(build):
    model, images = build(), tiny_photos()
    without, ones = model(images), model(images, torch.ones(3, 64, 96))
    assert largest_difference(without.logits, ones.logits) < 1e-5
    assert largest_difference(without.pred_boxes, ones.pred_boxes) < 1e-5
    if "pred_masks" in without:
        assert largest_difference(without.pred_masks, ones.pred_masks) < 1e-4


def test_positions_are_normalized_by_the_unpadded_size():
    mask = tiny_padding(((2, 3), (4, 6)), 4, 6).bool()
    positions = sine_2d(mask, 32).unflatten(1, (4, 6))
    alone = sine_2d(torch.ones(1, 2, 3, dtype=torch.bool), 32).unflatten(1, (2, 3))
    assert largest_difference(positions[0, :2, :3], alone[0]) < 1e-6
    # The last cell is at 2 pi in both, whatever the size.
    assert largest_difference(positions[0, 1, 2], positions[1, 3, 5]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"norm_first": True}], ids=str)
def test_outputs(fields):
    model = tiny_detr(**fields)
    images, mask = tiny_photos(), tiny_padding(SIZES)
    output = model(images, mask, output_hidden_states=True, output_attentions=True)
    assert output.logits.shape == (3, 7, 6) and output.pred_boxes.shape == (3, 7, 4)
    assert output.pred_boxes.min() > 0 and output.pred_boxes.max() < 1
    assert [tuple(each.shape) for each in output.encoder_hidden_states] == [(3, 6, 32)] * 3
    assert [tuple(each.shape) for each in output.decoder_hidden_states] == [(3, 7, 32)] * 4
    assert output.decoder_hidden_states[0].eq(0).all(), "query states start at zero"
    assert torch.equal(output.decoder_hidden_states[-1], output.last_hidden_state), "the last states are normed"
    assert torch.equal(output.encoder_hidden_states[-1], output.encoder_last_hidden_state)
    assert isinstance(model.model.encoder.layernorm, nn.LayerNorm) == bool(fields)
    plain = model(images, mask)
    assert plain.decoder_hidden_states is plain.cross_attentions is plain.loss is plain.auxiliary_outputs is None
    assert largest_difference(plain.logits, output.logits) < 1e-5
    every = model.model(images, mask).intermediate_hidden_states
    assert every.shape == (3, 3, 7, 32) and torch.equal(every[-1], plain.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_attention_maps_with_every_backend(backend):
    model = tiny_detr()
    model.set_attn_implementation(backend)
    images, mask = tiny_photos(), tiny_padding(SIZES)
    output = model(images, mask, output_attentions=True)
    shapes = {"encoder": (3, 4, 6, 6), "decoder": (3, 8, 7, 7), "cross": (3, 8, 7, 6)}
    maps = {
        "encoder": output.encoder_attentions,
        "decoder": output.decoder_attentions,
        "cross": output.cross_attentions,
    }
    for name, layers in maps.items():
        assert [tuple(each.shape) for each in layers] == [shapes[name]] * (2 if name == "encoder" else 3), name
        for each in layers:
            torch.testing.assert_close(each.sum(-1), torch.ones(each.shape[:-1]))
    padding = ~mask[:, ::32, ::32].flatten(1).bool()  # (B, N)
    for each in (*maps["encoder"], *maps["cross"]):
        assert each.permute(0, 3, 1, 2)[padding].abs().max() < 1e-12
    assert largest_difference(model(images, mask).logits, output.logits) < 1e-5
    assert model(images, mask).cross_attentions is None


@torch.no_grad()
def test_queries_and_positions_matter():
    """Both are added in every attention; without either the model could not distinguish objects or positions."""
    model, images = with_cells(tiny_detr()), tiny_photos()
    before = model(images).logits
    assert (before[:, 0] - before[:, 1]).abs().max() > 1e-2, "queries differ"
    # Permuted cells are another image...
    swapped = torch.cat([images[:, :, 32:], images[:, :, :32]], dim=2)
    assert largest_difference(model(swapped).logits, before) > 1e-2
    # ...but only because of the position embeddings.
    model.model.position_embedding = lambda mask: torch.zeros(1, mask.shape[1] * mask.shape[2], 32)
    model.config.position_embedding_type = "learned"
    assert largest_difference(model(swapped).logits, model(images).logits) < 1e-5
    model.model.query_position_embeddings.weight.zero_()
    alike = model(images).logits
    assert largest_difference(alike[:, :1].expand_as(alike), alike) < 1e-5


def micro_batches(model: nn.Module, labels: list, images: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient of a step in two micro-batches, each divided by the item counts of the whole batch."""
    model.zero_grad()
    items = normalizers([len(label["boxes"]) for label in labels], model.config)
    total = 0.0
    for part in (slice(0, 1), slice(1, None)):
        loss = model(images[part], mask[part], labels[part], num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    return total, gradient_of(model)


def gradient_of(model: nn.Module) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 5, 1), (0, 0, 0), (9, 1, 1)], ids=str)
@pytest.mark.parametrize("build", [tiny_detr, tiny_panoptic])
def test_micro_batches_add_up_to_the_batch(build, counts):
    """In transformers the loss changes, because every micro-batch is divided by its own number of boxes."""
    model = build(**PLAIN).train()
    images, mask = tiny_photos(), tiny_padding(SIZES)
    labels = tiny_labels(counts, size=(64, 96))
    whole = model(images, mask, labels)
    whole.loss.backward()
    expected = gradient_of(model)
    loss, gradient = micro_batches(model, labels, images, mask)
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)
    assert relative_difference(gradient, expected) < 1e-4
    assert expected.isfinite().all() and expected.norm() > 1e-3


def test_loss_is_the_weighted_sum_of_its_terms():
    weights = {"loss_ce": 1, "loss_bbox": 3, "loss_giou": 4, "loss_mask": 6, "loss_dice": 7}
    model = tiny_panoptic(
        bbox_loss_coefficient=3, giou_loss_coefficient=4, mask_loss_coefficient=6, dice_loss_coefficient=7
    )
    output = model(tiny_photos(), labels=tiny_labels(size=(64, 96)))
    terms = output.loss_dict
    assert terms.keys() == {
        *("loss_ce", "loss_bbox", "loss_giou", "cardinality_error", "loss_mask", "loss_dice"),
        *(f"{n}_{i}" for n in ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error") for i in range(2)),
    }, "masks of the last layer alone"
    expected = sum(weights.get(name.removesuffix("_0").removesuffix("_1"), 0) * term for name, term in terms.items())
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    items = model.count_items(tiny_labels(size=(64, 96)))
    assert output.loss_sums.keys() == weights.keys()
    parts = [total / items[name] for name, total in output.loss_sums.items()]
    assert output.loss.item() == pytest.approx(sum(parts).item(), rel=1e-5)
    assert len(output.auxiliary_outputs) == 2
    assert output.auxiliary_outputs[0]["logits"].shape == output.logits.shape
    last = model(tiny_photos(), labels=tiny_labels(size=(64, 96)))
    model.config.auxiliary_loss = model.detr.model.decoder.config.auxiliary_loss = False
    alone = model(tiny_photos(), labels=tiny_labels(size=(64, 96)))
    assert alone.auxiliary_outputs is None and not any(name[-1].isdigit() for name in alone.loss_dict)
    assert largest_difference(alone.logits, last.logits) == 0, "auxiliary losses do not change predictions"
    for name, term in alone.loss_dict.items():
        assert term.item() == pytest.approx(terms[name].item(), rel=1e-6)


def test_training_computes_masks_of_matched_queries_only():
    """The loss equals that of evaluation, where all masks are computed."""
    model = tiny_panoptic(**PLAIN)
    images, mask, labels = tiny_photos(), tiny_padding(SIZES), tiny_labels((3, 0, 2), size=(64, 96))
    found = []
    for training in (False, True):
        model.train(training).zero_grad()
        output = model(images, mask, labels)
        output.loss.backward()
        found.append((output, gradient_of(model)))
    (evaluated, expected), (trained, gradient) = found
    assert evaluated.pred_masks.shape == (3, 7, 16, 24) and trained.pred_masks is None
    assert trained.loss.item() == pytest.approx(evaluated.loss.item(), rel=1e-5)
    assert relative_difference(gradient, expected) < 1e-4
    assert model(images, mask).pred_masks.shape == (3, 7, 16, 24), "without labels there are masks in training too"


def test_every_weight_gets_a_gradient():
    for model in (tiny_detr(**PLAIN, backbone_frozen_stages=0), tiny_panoptic(**PLAIN)):
        model.train()(tiny_photos(), tiny_padding(SIZES), tiny_labels(size=(64, 96))).loss.backward()
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            assert parameter.grad is not None, name
            if "decoder.layers.0.self_attn." in name and "out_proj" not in name and "v_proj.bias" not in name:
                continue  # the first layer's values are all equal, so its attention weights have no effect
            # A key bias shifts all scores of a query, and a bias before a norm its whole input: neither has an effect.
            idle = name.endswith("bias") and ("k_proj" in name or "mask_head" in name)
            assert parameter.grad.abs().max() > (0 if idle else 1e-9), name


def test_all_three_dropout_rates_apply_in_training():
    images = tiny_photos()
    for name in PLAIN:
        model = tiny_detr(**{**PLAIN, name: 0.5})
        exact = model(images).logits
        torch.manual_seed(1)
        one = model.train()(images).logits
        assert largest_difference(one, exact) > 1e-3, name
    model = tiny_detr(**PLAIN)
    assert torch.equal(model(images).logits, model.train()(images).logits)


def test_labels_on_images_without_objects():
    for model in (tiny_detr(), tiny_panoptic()):
        output = model.train()(tiny_photos(), labels=tiny_labels((0, 0, 0), size=(64, 96)))
        output.loss.backward()
        assert output.loss.isfinite() and output.loss_dict["loss_bbox"] == output.loss_dict["loss_giou"] == 0


def test_more_objects_than_queries():
    for model in (tiny_detr(), tiny_panoptic()):
        output = model.train()(tiny_photos(), labels=tiny_labels((12, 1, 0), size=(64, 96)))
        output.loss.backward()
        assert output.loss.isfinite()


def test_other_channels_and_small_images():
    model = tiny_panoptic(num_channels=1)
    output = model(tiny_photos(2, 33, 40, channels=1), labels=tiny_labels((1, 2), size=(33, 40)))
    assert output.pred_masks.shape == (2, 7, 9, 10) and output.loss.isfinite()


def test_detector_loads_as_a_panoptic_model(tmp_path):
    detector = tiny_detr(encoder_attention_heads=8)
    detector.save_pretrained(tmp_path)
    model, report = TfmDetrForPanopticSegmentation.from_pretrained(tmp_path, output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"bbox_attention", "mask_head"}
    assert not report["unexpected_keys"]
    images = tiny_photos()
    assert torch.equal(model.eval()(images).logits, detector(images).logits)
    trained = tiny_panoptic(seed=3)
    trained.save_pretrained(tmp_path / "panoptic")
    for model_class, part in ((TfmDetrForObjectDetection, trained.detr), (TfmDetrModel, trained.detr.model)):
        found, report = model_class.from_pretrained(tmp_path / "panoptic", output_loading_info=True)
        assert not report["missing_keys"] and type(found) is model_class
        named = model_class.from_pretrained(pretrained_model_name_or_path=tmp_path / "panoptic", config=trained.config)
        assert type(named) is model_class and torch.equal(next(named.parameters()), next(found.parameters()))
        assert all(torch.equal(value, part.state_dict()[name]) for name, value in found.state_dict().items())
        found.save_pretrained(tmp_path / "again")
        again, report = model_class.from_pretrained(tmp_path / "again", output_loading_info=True)
        assert not report["missing_keys"] and not report["unexpected_keys"]
        assert again.config.architectures == [model_class.__name__]
    base, report = TfmDetrModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert torch.equal(base.eval()(images).last_hidden_state, detector.model(images).last_hidden_state)
