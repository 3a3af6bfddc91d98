"""With the same weights Deformable DETR computes what transformers' does, and the two share their files.

Losses are compared with the authors' definition, computed with torchvision's focal loss and transformers' matcher:
transformers' own sum differs from it (5.24), see conversion/deformable_detr.py.
"""

from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, DeformableDetrModel, PreTrainedModel
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.loss.loss_for_object_detection import center_to_corners_format

from hf_tfm import TfmDeformableDetrForObjectDetection, TfmDeformableDetrModel
from hf_tfm.conversion.deformable_detr import with_every_class_head

TINY = {
    "num_queries": 7,
    "two_stage_num_proposals": 9,
    "d_model": 32,
    "encoder_layers": 11,  # layers 1 and 10 must not be taken for each other
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_n_points": 3,
    "decoder_n_points": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "num_labels": 5,
}
REFINE = {"with_box_refine": True}
TWO_STAGE = {"with_box_refine": True, "two_stage": True}
PAIRS = {
    DeformableDetrModel: TfmDeformableDetrModel,
    DeformableDetrForObjectDetection: TfmDeformableDetrForObjectDetection,
}
CASES = {
    "base": (DeformableDetrModel, {}),
    "single-scale": (DeformableDetrForObjectDetection, {"num_feature_levels": 1}),
    "DC5": (DeformableDetrForObjectDetection, {"num_feature_levels": 1, "dilation": True}),
    "two levels": (DeformableDetrForObjectDetection, {"num_feature_levels": 2}),
    "multi-scale": (DeformableDetrForObjectDetection, {}),
    "learned": (DeformableDetrForObjectDetection, {"num_feature_levels": 3, "position_embedding_type": "learned"}),
    "refinement": (DeformableDetrForObjectDetection, REFINE),
    "two-stage": (DeformableDetrForObjectDetection, {**TWO_STAGE, "num_feature_levels": 5}),
}
SLOW = ("DC5", "two levels", "learned", "single-scale")  # the others differ from them in more
EVERY = pytest.mark.parametrize(
    ("native_class", "fields"),
    [pytest.param(*case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in CASES.items()],
)


@torch.no_grad()
def native_model(native_class: type, **fields) -> PreTrainedModel:
    """A native model in evaluation mode whose every weight is random, statistics of norms too."""
    torch.manual_seed(0)
    levels, stride = fields.get("num_feature_levels", 4), {"output_stride": 16} if fields.get("dilation") else {}
    backbone = {
        "model_type": "timm_backbone",
        "backbone": "test_resnet",
        "out_indices": [1, 2, 3, 4][-min(levels, 3) :],
        "use_pretrained_backbone": False,
        **stride,
    }
    model = native_class(DeformableDetrConfig(**{**TINY, "backbone_config": backbone, **fields})).eval()
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            module.weight.uniform_(0.5, 1.5)
            module.bias.normal_(std=0.2)
        elif isinstance(module, nn.Linear | nn.Conv2d):
            module.weight.normal_(std=module.weight[0].numel() ** -0.5)
            if module.bias is not None:
                module.bias.normal_(std=0.2)
    model.tie_weights()
    return model


def load(model_class: type, folder: Path, **options) -> PreTrainedModel:
    """The model in a folder; every weight must be found, and none left over."""
    model, info = model_class.from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def saved_for_ours(native: PreTrainedModel, folder: Path) -> None:
    """Save a native model, with a class head for each layer if it refines: transformers stores one."""
    native.save_pretrained(folder)
    if native.config.with_box_refine:
        from safetensors.torch import save_file

        file = folder / "model.safetensors"
        save_file(with_every_class_head(load_file(file)), file, {"format": "pt"})


def inputs_of(padded: bool = True) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images, mask = torch.randn(2, 3, 96, 128, generator=generator), torch.ones(2, 96, 128)
    if padded:
        mask[1, 70:] = mask[1, :, 100:] = 0  # inside a cell of the last feature map
        images = images * mask[:, None]
    return {"pixel_values": images, "pixel_mask": mask.long()}


OUTPUTS = (
    *("logits", "pred_boxes", "last_hidden_state", "encoder_last_hidden_state", "init_reference_points"),
    *("intermediate_hidden_states", "intermediate_reference_points", "enc_outputs_class"),
)
MAPS = ("encoder_hidden_states", "decoder_hidden_states", "encoder_attentions", "cross_attentions")


def assert_same(got, expected, exactly: bool = False) -> None:
    """The fields that have a name in both, all hidden states and the weights of the points.

    Up to rounding, which the group norms enlarge here: a group is one channel of as few as two cells.
    """
    names = [name for name in OUTPUTS if expected.get(name) is not None]
    assert {"last_hidden_state", "encoder_last_hidden_state"} <= set(names)
    for name in names:
        assert expected[name].std() > 0.01, f"the comparison of {name} is of something"
        torch.testing.assert_close(got[name], expected[name], rtol=0, atol=0 if exactly else 5e-4, msg=name)
    for name in MAPS:
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0 if exactly else 5e-4, msg=name)


@torch.no_grad()
@EVERY
def test_outputs_and_files_are_the_same_both_ways(native_class, fields, tmp_path):
    native = native_model(native_class, **fields)
    saved_for_ours(native, tmp_path / "native")
    ours = load(PAIRS[native_class], tmp_path / "native")
    asked = {"output_hidden_states": True, "output_attentions": True}
    for padded in (True, False):
        inputs = inputs_of(padded)
        expected = native(**inputs, **asked)
        assert_same(ours(**inputs, **asked), expected)
    ours.save_pretrained(tmp_path / "ours", save_original_format=True)
    written, read = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "native"))
    read = {name: value for name, value in read.items() if not name.endswith("num_batches_tracked")}
    assert written.keys() == read.keys() and all(torch.equal(written[name], read[name]) for name in read)
    (tmp_path / "native" / "config.json").rename(tmp_path / "ours" / "config.json")
    back = load(native_class, tmp_path / "ours")
    assert_same(back(**inputs, **asked), native(**inputs, **asked), exactly=True)


def authors_loss(output, labels: list[dict[str, Tensor]], model: TfmDeformableDetrForObjectDetection) -> Tensor:
    """The loss of the authors' code, of the last layer and the others: focal loss over all queries and classes, L1 and
    GIoU of matched ones, all divided by the number of objects, weighted by 2, 5 and 2."""
    match = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    layers = [{"logits": output.logits, "pred_boxes": output.pred_boxes}, *output.auxiliary_outputs]
    pairs = [(layer, labels) for layer in layers]
    if output.enc_outputs_class is not None:
        proposals = {"logits": output.enc_outputs_class, "pred_boxes": output.enc_outputs_coord_logits.sigmoid()}
        pairs.append((proposals, [{**one, "class_labels": one["class_labels"] * 0} for one in labels]))
    total, count = 0.0, sum(len(label["boxes"]) for label in labels)
    for layer, targets in pairs:
        logits, boxes = layer["logits"], layer["pred_boxes"]
        hot, found, true = torch.zeros_like(logits), [], []
        for i, (queries, objects) in enumerate(match(layer, targets)):
            hot[i, queries, targets[i]["class_labels"][objects]] = 1
            found.append(boxes[i, queries])
            true.append(targets[i]["boxes"][objects])
        found, true = torch.cat(found), torch.cat(true)
        focal = torchvision.ops.sigmoid_focal_loss(logits, hot, alpha=0.25, gamma=2, reduction="sum")
        corners = (center_to_corners_format(each) for each in (found, true))
        overlap = torchvision.ops.generalized_box_iou_loss(*corners, reduction="sum")
        total = total + (2 * focal + 5 * (found - true).abs().sum() + 2 * overlap) / count
    return total


@pytest.mark.parametrize("fields", [{}, REFINE, TWO_STAGE], ids=["multi-scale", "refinement", "two-stage"])
def test_the_loss_is_the_authors(fields, tmp_path):
    native = native_model(DeformableDetrForObjectDetection, encoder_layers=1, **fields)
    saved_for_ours(native, tmp_path)
    model = load(TfmDeformableDetrForObjectDetection, tmp_path, auxiliary_loss=True, class_cost=2)
    generator = torch.Generator().manual_seed(2)
    labels = [
        {
            "class_labels": torch.randint(5, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.5 + 0.1,
        }
        for count in (4, 1)
    ]
    output = model(**inputs_of(), labels=labels)
    expected = authors_loss(output, labels, model)
    assert output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    gradients = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (output.loss, expected)]
    for name, ours, theirs in zip(names, *gradients, strict=True):
        assert (ours - theirs).norm() <= 1e-3 * theirs.norm() + 1e-4, name
