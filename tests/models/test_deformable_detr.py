"""Deformable DETR: sampling, padding, references, equal losses under micro-batching, initialisation, errors."""

import math
import re

import pytest
import torch
from test_detr import gradient_of, with_cells
from tiny_deformable import REFINE, TWO_STAGE, VARIANTS, tiny_deformable, tiny_deformable_config
from tiny_detr import PLAIN, relative_difference, tiny_labels, tiny_padding, tiny_photos
from tiny_models import largest_difference
from torch import Tensor, nn

from hf_tfm import TfmDeformableDetrConfig, TfmDeformableDetrForObjectDetection, TfmDeformableDetrModel
from hf_tfm.distillation.student import student_of
from hf_tfm.models.deformable_attention import DeformableAttention, reference_points, sample_levels
from hf_tfm.models.positions import sine_2d
from hf_tfm.tasks.detectors import resize_queries
from hf_tfm.tasks.model_fields import fresh_head

SIZES = ((64, 96), (32, 64), (64, 32))  # of the three images in the padded batch
EVERY = pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
SOME = pytest.mark.parametrize("fields", [{}, TWO_STAGE], ids=["one-stage", "two-stage"])


# --- attention


def plain_samples(value: Tensor, points: Tensor, weights: Tensor, sizes: tuple) -> Tensor:
    """Bilinear sampling in plain Python, one point at a time."""
    B, T, H, L, P = weights.shape
    width = value.shape[-1] // H
    found = torch.zeros(B, T, H, width)
    for b, t, k, level, p in torch.cartesian_prod(*map(torch.arange, (B, T, H, L, P))).tolist():
        h, w = sizes[level]
        first = sum(rows * columns for rows, columns in sizes[:level])
        x, y = (((points[b, t, k, level, p] + 1) / 2) * torch.tensor([w, h]) - 0.5).tolist()
        for row in (math.floor(y), math.floor(y) + 1):
            for column in (math.floor(x), math.floor(x) + 1):
                if 0 <= row < h and 0 <= column < w:
                    cell = value[b, first + row * w + column, k * width : (k + 1) * width]
                    share = (1 - abs(y - row)) * (1 - abs(x - column)) * weights[b, t, k, level, p]
                    found[b, t, k] += share * cell
    return found.flatten(2)


def sampled(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, tuple]:
    generator, sizes = torch.Generator().manual_seed(seed), ((3, 5), (2, 1))
    value = torch.randn(2, 17, 8, generator=generator)
    points = 2.4 * torch.rand(2, 4, 2, 2, 3, 2, generator=generator) - 1.2  # some beyond the edges
    weights = torch.rand(2, 4, 2, 6, generator=generator).softmax(-1).unflatten(-1, (2, 3))
    return value, points, weights, sizes


def test_sampling():
    value, points, weights, sizes = sampled()
    expected = plain_samples(value, points, weights, sizes)
    assert expected.std() > 0.1
    assert largest_difference(sample_levels(value, points, weights, sizes), expected) < 1e-5


def attention_in(dtype: torch.dtype, autocast: bool) -> Tensor:
    torch.manual_seed(0)
    layer = DeformableAttention(64, 4, 2, 4)
    layer.reset_parameters()
    with torch.no_grad():
        for linear in (layer.sampling_offsets, layer.attention_weights):
            linear.weight.normal_(std=0.05)
    memory, queries = torch.randn(1, 100 * 100 + 50 * 50, 64), torch.randn(1, 300, 64)
    references = reference_points(torch.rand(1, 300, 2), None, ((100, 100), (50, 50)))
    layer = layer.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return layer(queries.to(dtype), memory.to(dtype), references)[0].float()


def test_gradient_of_sampling():
    generator = torch.Generator().manual_seed(0)
    sizes = ((3, 4), (2, 2))
    inputs = [
        torch.randn(2, 16, 4, generator=generator, dtype=torch.float64, requires_grad=True),
        (torch.rand(2, 3, 2, 2, 2, 2, generator=generator, dtype=torch.float64) * 2 - 1).requires_grad_(),
        torch.rand(2, 3, 2, 2, 2, generator=generator, dtype=torch.float64, requires_grad=True),
    ]
    assert torch.autograd.gradcheck(lambda *tensors: sample_levels(*tensors, sizes), inputs)


@pytest.mark.parametrize("autocast", [True, False])
def test_sampling_in_bf16(autocast):
    """Coordinates in bf16 would be up to half a cell off on a map of 100 x 100 cells of noise."""
    expected = attention_in(torch.float32, False)
    found = attention_in(torch.float32 if autocast else torch.bfloat16, autocast)
    assert relative_difference(found, expected) < 1e-2


def test_positions_of_cells_are_those_of_their_centres():
    mask = torch.ones(1, 4, 4, dtype=torch.bool)
    first = sine_2d(mask, 32, -0.5)[0, 0]
    assert first[0].item() == pytest.approx(math.sin(0.5 / 4 * 2 * math.pi), abs=1e-5)


# --- predictions


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"num_feature_levels": 1, "position_embedding_type": "learned"}], ids=str)
def test_padding_does_not_change_predictions(fields):
    """An image alone, and the same image padded in a batch, whatever the padding holds."""
    model = with_cells(tiny_deformable(**{"num_feature_levels": 2, **fields}))
    keep_last(model)
    normless(model)
    images, mask = tiny_photos(), tiny_padding(SIZES)
    batch = model(images, mask)  # the padding is noise
    for i, (height, width) in enumerate(SIZES):
        alone = model(images[i : i + 1, :, :height, :width])
        assert alone.logits.std() > 0.1 and alone.pred_boxes.std() > 0.01
        assert largest_difference(batch.logits[i : i + 1], alone.logits) < 1e-4
        assert largest_difference(batch.pred_boxes[i : i + 1], alone.pred_boxes) < 1e-4
    assert largest_difference(model(images).logits[1:], batch.logits[1:]) > 1e-2, "the mask matters"


def keep_last(model: nn.Module) -> None:
    """Give the model the last feature maps alone, as its own backbone does."""
    body, count = model.model.backbone.body, len(model.model.input_proj)
    run = body.forward
    body.forward = lambda images: run(images)[-count:]


def normless(model: nn.Module) -> None:
    """Group norms of the levels read the padding, as the authors' do; without them it must not matter."""
    for layers in model.model.input_proj:
        layers[1] = nn.Identity()


@torch.no_grad()
@EVERY
def test_outputs(fields):
    model = tiny_deformable(**fields)
    images, mask = tiny_photos(), tiny_padding(SIZES)
    output = model(images, mask, output_hidden_states=True, output_attentions=True, output_sampling_points=True)
    assert output.logits.shape == (3, 7, 5) and output.pred_boxes.shape == (3, 7, 4)
    assert output.pred_boxes.min() >= 0 and output.pred_boxes.max() <= 1
    assert output.logits.std() > 0.1 and output.pred_boxes.std() > 0.01
    levels = model.config.num_feature_levels
    cells = {1: 6, 4: 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2}[levels] * (4 if "dilation" in fields else 1)
    assert [tuple(each.shape) for each in output.encoder_hidden_states] == [(3, cells, 32)] * 3
    assert [tuple(each.shape) for each in output.decoder_hidden_states] == [(3, 7, 32)] * 4
    assert torch.equal(output.decoder_hidden_states[-1], output.last_hidden_state)
    assert [tuple(each.shape) for each in output.encoder_attentions] == [(3, cells, 4, levels, 3)] * 2
    assert [tuple(each.shape) for each in output.decoder_attentions] == [(3, 8, 7, 7)] * 3
    assert [tuple(each.shape) for each in output.cross_attentions] == [(3, 7, 8, levels, 2)] * 3
    assert [tuple(each.shape) for each in output.sampling_points] == [(3, 7, 8, levels, 2, 2)] * 3
    for weights in (*output.encoder_attentions, *output.cross_attentions):
        torch.testing.assert_close(weights.sum((-1, -2)), torch.ones(weights.shape[:-2]))
    plain = model(images, mask)
    assert plain.decoder_hidden_states is plain.cross_attentions is plain.sampling_points is plain.loss is None
    assert largest_difference(plain.logits, output.logits) < 1e-5
    base = model.model(images, mask)
    assert torch.equal(base.last_hidden_state, plain.last_hidden_state), "heads that it needs are its own"


@torch.no_grad()
def test_no_mask_means_no_padding():
    for fields in ({}, TWO_STAGE):
        model, images = tiny_deformable(**fields), tiny_photos()
        without, ones = model(images), model(images, torch.ones(3, 64, 96))
        assert largest_difference(without.logits, ones.logits) < 1e-4
        assert largest_difference(without.pred_boxes, ones.pred_boxes) < 1e-5


@torch.no_grad()
def test_refinement_starts_at_the_box_of_the_layer_before():
    model = tiny_deformable(**REFINE)
    output = model(tiny_photos(), labels=tiny_labels())
    before = [each["pred_boxes"] for each in output.auxiliary_outputs]
    assert largest_difference(output.intermediate_reference_points[:, 0], before[0]) < 1e-6
    assert largest_difference(output.intermediate_reference_points[:, 2], output.pred_boxes) < 1e-6
    assert output.init_reference_points.shape[-1] == 2
    for head in model.model.decoder.bbox_embed:
        head.layers[-1].weight.zero_()
        head.layers[-1].bias.zero_()
    still = model(tiny_photos(), labels=tiny_labels())
    first = still.auxiliary_outputs[0]["pred_boxes"]
    assert largest_difference(first[..., :2], still.init_reference_points) < 1e-5
    assert largest_difference(still.pred_boxes, first) < 1e-5, "no layer changes it"


# --- losses


def micro_batches(model: nn.Module, labels: list, images: Tensor, mask: Tensor) -> tuple[float, Tensor]:
    """Loss and gradient of a step cut into an image and the rest, each divided by the items of the whole."""
    model.zero_grad()
    items = model.count_items(labels)
    parts = [model.count_items(labels[part]) for part in (slice(0, 1), slice(1, None))]
    assert items == {name: sum(part[name] for part in parts) for name in items}
    total = 0.0
    for part in (slice(0, 1), slice(1, None)):
        loss = model(images[part], mask[part], labels[part], num_items_in_batch=items).loss
        loss.backward()
        total += loss.item()
    return total, gradient_of(model)


@pytest.mark.parametrize("counts", [(3, 0, 2), (0, 5, 1), (9, 1, 1)], ids=str)
@pytest.mark.parametrize("fields", [{}, TWO_STAGE, {"query_groups": 2}], ids=["one-stage", "two-stage", "groups"])
def test_micro_batches_add_up_to_the_batch(fields, counts):
    """transformers' loss changes by half: every micro-batch divides by its own number of boxes there."""
    # In float64: rounding moves values over the kinks of ReLU and of bilinear samples.
    model = tiny_deformable(**PLAIN, **fields).double().train()
    images, mask, labels = tiny_photos().double(), tiny_padding(SIZES), tiny_labels(counts)
    whole = model(images, mask, labels)
    whole.loss.backward()
    expected = gradient_of(model)
    loss, gradient = micro_batches(model, labels, images, mask)
    assert loss == pytest.approx(whole.loss.item(), rel=1e-5)
    assert relative_difference(gradient, expected) < 1e-4
    assert expected.isfinite().all() and expected.norm() > 1e-3


def test_a_batch_without_objects():
    model = tiny_deformable(**PLAIN, **TWO_STAGE).train()
    output = model(tiny_photos(), labels=tiny_labels((0, 0, 0)))
    assert output.loss.item() == pytest.approx(output.loss_sums["loss_ce"].item()) and output.loss > 0
    output.loss.backward()
    assert gradient_of(model).isfinite().all()


@SOME
def test_the_loss_is_the_weighted_sum_of_its_terms(fields):
    weights = {"loss_ce": 2.5, "loss_bbox": 3, "loss_giou": 4}
    coefficients = {"class_loss_coefficient": 2.5, "bbox_loss_coefficient": 3, "giou_loss_coefficient": 4}
    model, labels = tiny_deformable(**fields, **coefficients), tiny_labels()
    output = model(tiny_photos(), labels=labels)
    suffixes = ["", "_0", "_1", *(["_enc"] if fields else [])]
    assert output.loss_dict.keys() == {n + end for n in (*weights, "cardinality_error") for end in suffixes}
    expected = sum(weight * output.loss_dict[name + end] for name, weight in weights.items() for end in suffixes)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    items = model.count_items(labels)
    parts = [total / items[name] for name, total in output.loss_sums.items()]
    assert output.loss_sums.keys() == weights.keys()
    assert output.loss.item() == pytest.approx(sum(parts).item(), rel=1e-5)
    model.config.auxiliary_loss = False
    alone = model(tiny_photos(), labels=labels)
    assert alone.auxiliary_outputs is None and not any(name[-1].isdigit() for name in alone.loss_dict)
    assert largest_difference(alone.logits, output.logits) < 1e-6, "auxiliary losses do not change predictions"


def test_groups_of_queries_are_trained_one_by_one():
    """Self-attention and matching see one group; the loss is the mean over groups."""
    model = tiny_deformable(**PLAIN, **REFINE, query_groups=3).train()
    model.model.group_query_embeddings.weight.data.normal_()
    images, mask, labels = tiny_photos(), tiny_padding(SIZES), tiny_labels()
    together = model(images, mask, labels)
    together.loss.backward()
    gradients = model.model.group_query_embeddings.weight.grad.unflatten(0, (2, 7)).abs().sum((1, 2))
    assert (gradients > 0).all()
    own = model.model.query_position_embeddings.weight.detach().clone()
    tables = [own, *model.model.group_query_embeddings.weight.detach().split(7)]
    single = tiny_deformable(**PLAIN, **REFINE).train()
    found = []
    for table in tables:
        weights = {name: model.state_dict()[name] for name in single.state_dict()}
        single.load_state_dict(weights | {"model.query_position_embeddings.weight": table})
        found.append(single(images, mask, labels))
    assert together.loss.item() == pytest.approx(sum(one.loss.item() for one in found) / 3, rel=1e-5)
    for name in ("loss_ce", "loss_giou_0"):
        mean = sum(one.loss_dict[name].item() for one in found) / 3
        assert together.loss_dict[name].item() == pytest.approx(mean, rel=1e-5), name
    assert len({round(one.loss.item(), 4) for one in found}) == 3
    assert together.logits.shape == (3, 7, 5) and len(together.auxiliary_outputs) == 2
    assert largest_difference(together.logits, found[0].logits) < 1e-5, "predictions are those of the first group"


@torch.no_grad()
def test_only_the_first_group_of_queries_predicts():
    model = tiny_deformable(query_groups=3)
    before = model(tiny_photos(), labels=tiny_labels())
    model.model.group_query_embeddings.weight.fill_(torch.nan)
    after = model(tiny_photos(), labels=tiny_labels())
    assert torch.equal(before.logits, after.logits) and torch.equal(before.loss, after.loss)


def test_groups_keep_their_number_when_the_queries_change():
    model = tiny_deformable(query_groups=3)
    first = model.model.query_position_embeddings.weight[:5].clone()
    assert resize_queries(model, 5) == set()
    assert torch.equal(model.model.query_position_embeddings.weight, first)
    assert len(model.model.group_query_embeddings.weight) == 10
    assert resize_queries(model, 6) == {
        "model.query_position_embeddings.weight",
        "model.group_query_embeddings.weight",
    }
    assert model.train()(tiny_photos(), labels=tiny_labels()).logits.shape == (3, 6, 5)


def test_proposals_learn():
    """In transformers 5.24 nothing reaches the heads of the first stage: it chooses proposals at random."""
    model = tiny_deformable(**PLAIN, **TWO_STAGE).train()
    labels = tiny_labels((3, 1, 2))
    output = model(tiny_photos(), labels=labels)
    output.loss.backward()
    for name in ("enc_output", "enc_output_norm", "decoder.class_embed.3", "decoder.bbox_embed.3", "pos_trans"):
        for parameter in model.model.get_submodule(name).parameters():
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, name
    # The first stage sees one class: with others in the labels its loss stays, unlike that of the decoder.
    other = [{**label, "class_labels": (label["class_labels"] + 1) % 5} for label in labels]
    again = model(tiny_photos(), labels=other)
    assert again.loss_dict["loss_ce_enc"].item() == output.loss_dict["loss_ce_enc"].item()
    assert again.loss_dict["loss_ce"].item() != output.loss_dict["loss_ce"].item()


def test_the_best_proposals_become_queries():
    model = tiny_deformable(**TWO_STAGE)
    with torch.no_grad():
        output = model(tiny_photos(), tiny_padding(SIZES))
    best = output.enc_outputs_class[..., 0].topk(7).indices[..., None].expand(-1, -1, 4)
    expected = output.enc_outputs_coord_logits.gather(1, best).sigmoid()
    assert torch.equal(output.init_reference_points, expected)
    rejected = output.enc_outputs_coord_logits.isinf().any(-1)
    assert not rejected[0].any()
    assert torch.equal(rejected[2, :96].view(8, 12)[:, 4:], torch.ones(8, 8, dtype=torch.bool)), "of padding"
    assert not rejected[2, :96].view(8, 12)[:, :4].any()
    with pytest.raises(ValueError, match=r"num_queries must be at most 128, the number of cells .* got 200"):
        tiny_deformable(**TWO_STAGE, num_queries=200)(tiny_photos())


@pytest.mark.parametrize(("where", "values"), [("bbox_embed", "boxes"), ("class_embed", "class logits")])
def test_predictions_that_are_not_finite_are_refused(where, values):
    """With the image's id where the labels have it."""
    model, images, labels = tiny_deformable(), tiny_photos(), tiny_labels((1, 2, 0))
    module = getattr(model, where)[0]
    module.register_forward_hook(lambda _, __, output: spoiled(output))
    with pytest.raises(ValueError, match=rf"the {values} predicted for labels\[1\], are not finite \(decoder layer 0"):
        model(images, labels=labels)
    known = [{**label, "image_id": torch.tensor([40 + i])} for i, label in enumerate(labels)]
    with pytest.raises(ValueError, match=rf"the {values} predicted for image 41, labels\[1\], are not finite"):
        model(images, labels=known)


def spoiled(output: Tensor) -> Tensor:
    """NaN for a query of the second of three images, in the first of three layers."""
    output = output.clone()
    output[1, 4] = math.nan
    return output


# --- first weights


def test_initial_weights_of_attention():
    """Of the authors: head k looks in direction 2 pi k / 8, point p at p + 1 cells, all points weigh the same."""
    torch.manual_seed(0)
    layer = TfmDeformableDetrModel(TfmDeformableDetrConfig(backbone="test_resnet", encoder_layers=1)).encoder.layers[0]
    offsets = layer.self_attn.sampling_offsets.bias.view(8, 4, 4, 2)
    directions = [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)]
    for k, (x, y) in enumerate(directions):
        for p in range(4):
            torch.testing.assert_close(offsets[k, :, p], torch.tensor([x, y]).mul(p + 1.0).expand(4, 2))
    zero = (layer.self_attn.sampling_offsets.weight, *layer.self_attn.attention_weights.parameters())
    assert all(parameter.eq(0).all() for parameter in zero)
    for matrix in (layer.self_attn.value_proj, layer.self_attn.output_proj, layer.feed_forward.up_proj):
        bound = (6 / sum(matrix.weight.shape)) ** 0.5
        assert 0.98 * bound < matrix.weight.abs().max() <= bound and matrix.bias.eq(0).all()


@EVERY
def test_initial_weights_of_heads(fields):
    """Probabilities of 0.01; boxes at their references, of 0.12 of the image in the first layer of one stage."""
    torch.manual_seed(0)
    model = TfmDeformableDetrForObjectDetection(tiny_deformable_config(**fields))
    heads = model.model.decoder.bbox_embed if "with_box_refine" in fields else model.bbox_embed
    classes = model.model.decoder.class_embed if "two_stage" in fields else model.class_embed
    count = {"with_box_refine": 3, "two_stage": 4}
    assert len(heads) == len(classes) == max([1, *(count[name] for name in fields if name in count)])
    for i, (head, own) in enumerate(zip(heads, classes, strict=True)):
        assert own.bias.detach().tolist() == pytest.approx([-math.log(99)] * 5)
        assert own.out_features == 5 and 0.9 * 32**-0.5 < own.weight.abs().max() <= 32**-0.5
        side = -2.0 if i == 0 and "two_stage" not in fields else 0.0
        assert head.layers[-1].weight.eq(0).all() and head.layers[-1].bias.tolist() == [0.0, 0.0, side, side]
        assert head.layers[0].weight.std() > 0.05
    assert model.model.level_embed.std() > 0.5
    if "two_stage" not in fields:
        assert model.model.reference_points.bias.eq(0).all()
        assert model.model.query_position_embeddings.weight.std().item() == pytest.approx(1, rel=0.15)


def test_class_heads_drawn_anew_start_at_the_same_probability(tmp_path):
    """For as many other classes, and for more than a saved model has."""
    model = tiny_deformable(**REFINE)
    fresh_head(model, "class_embed.1")
    model.save_pretrained(tmp_path)
    options = {"num_labels": 7, "ignore_mismatched_sizes": True}
    larger = TfmDeformableDetrForObjectDetection.from_pretrained(tmp_path, **options)
    for head in (model.class_embed[1], *larger.class_embed):
        assert head.bias.detach().tolist() == pytest.approx([-math.log(99)] * head.out_features)
    assert torch.equal(larger.model.decoder.bbox_embed[2].layers[0].weight, model.get_parameter(KEPT)), (
        "all else is kept"
    )


KEPT = "model.decoder.bbox_embed.2.layers.0.weight"


@torch.no_grad()
@pytest.mark.parametrize("norm", ["batch", "frozen", "group"])
def test_a_saved_model_keeps_every_weight(norm, tmp_path):
    """Also statistics of norms: initialising what transformers skips must not touch what was loaded."""
    model = tiny_deformable(backbone_norm=norm, **TWO_STAGE)
    model.save_pretrained(tmp_path)
    loaded = TfmDeformableDetrForObjectDetection.from_pretrained(tmp_path)
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded(tiny_photos()).logits, model(tiny_photos()).logits)


@SOME
def test_gradient_checkpointing_changes_nothing(fields):
    model, labels = tiny_deformable(**PLAIN, **fields).train(), tiny_labels()
    found = []
    for reentrant in (None, False, True):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.zero_grad()
        model(tiny_photos(), tiny_padding(SIZES), labels).loss.backward()
        found.append(gradient_of(model))
    assert relative_difference(found[1], found[0]) < 1e-6 and relative_difference(found[2], found[0]) < 1e-4


@torch.no_grad()
def test_level_of_a_single_cell():
    """torch's group norm refuses a batch of one image with one value per group."""
    model, photos = tiny_deformable(**PLAIN).train(), tiny_photos()[:, :, :, :64]
    assert model.model.features(photos).sizes[-1] == (1, 1)
    assert largest_difference(model(photos[:1]).logits, model(photos[:2]).logits[:1]) < 1e-4


def test_initial_weights_repeat_with_a_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(TfmDeformableDetrForObjectDetection(tiny_deformable_config(**REFINE)).state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    fixed = ("sampling_offsets.weight", "attention_weights.weight", "layers.2.weight")
    matrices = {name for name, value in first.items() if value.ndim > 1 and not name.endswith(fixed)}
    biases = {name for name in first if "bbox_embed" in name and name.endswith(("0.bias", "1.bias"))}
    assert drawn == matrices | biases, "torch's defaults draw the biases of the heads too"


@pytest.mark.parametrize("fields", [{}, REFINE, TWO_STAGE], ids=["shared-heads", "refinement", "two-stage"])
def test_student_decoder_layers_keep_their_heads(fields):
    """With refinement each decoder layer has its heads, and in two stages the proposals have the last ones."""
    teacher = tiny_deformable(**fields)
    student = student_of(teacher, {"decoder": [0, 2]})
    ours, theirs = student.state_dict(), teacher.state_dict()
    pairs = {0: 0, 1: 2, 2: 3} if fields else {0: 0}
    heads = [name for name in ours if "class_embed" in name or "bbox_embed" in name]
    assert len(heads) > 0 and {int(re.search(r"_embed\.(\d)", name)[1]) for name in heads} <= set(pairs)
    for name in heads:
        number = int(re.search(r"_embed\.(\d)", name)[1])
        assert torch.equal(ours[name], theirs[name.replace(f"_embed.{number}.", f"_embed.{pairs[number]}.")]), name


# --- configuration


def test_the_authors_defaults():
    """In which transformers' own configuration differs: dropout, class weights of 1, no auxiliary loss."""
    config = TfmDeformableDetrConfig()
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.1)
    assert config.auxiliary_loss and config.num_queries == 300 and config.encoder_ffn_dim == 1024
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (2, 5, 2)
    weights = (config.class_loss_coefficient, config.bbox_loss_coefficient, config.giou_loss_coefficient)
    assert weights == (2, 5, 2) and (config.focal_alpha, config.focal_gamma) == (0.25, 2)
    assert (config.num_feature_levels, config.encoder_n_points, config.decoder_n_points) == (4, 4, 4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 48}, "d_model must be a multiple of 32 for the group norm of the feature maps, got 48"),
        ({"num_feature_levels": 0}, "num_feature_levels must be at least 1, got 0"),
        ({"two_stage": True}, "two_stage needs with_box_refine=True, got False"),
        ({**TWO_STAGE, "query_groups": 2}, "query_groups must be 1 with two_stage, got 2"),
        ({"query_groups": 0}, "query_groups must be at least 1, got 0"),
        ({"focal_alpha": 0.0}, r"focal_alpha must be in \(0, 1\], got 0.0"),
        ({"nms_threshold": 0.0}, r"nms_threshold must be in \(0, 1\], got 0.0"),
        ({"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}, "must not all be 0"),
        ({"backbone_config": {"model_type": "bert"}}, "backbone_config: a bert model has no feature maps"),
    ],
    ids=str,
)
def test_configurations_that_cannot_be(fields, message):
    with pytest.raises(Exception, match=message) as raised:
        tiny_deformable_config(**fields)
    assert isinstance(raised.value, ValueError) or "Validation" in type(raised.value).__name__
