"""DETR's configuration, initial weights, and refused input."""

import copy

import pytest
import torch
from tiny_detr import tiny_detr, tiny_detr_config, tiny_labels, tiny_photos

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation, TfmDetrModel
from hf_tfm.models.positions import LearnedPositions2D


def test_the_authors_defaults():
    """transformers' configuration differs: dropout 0 in attention and feed-forward, no auxiliary loss."""
    config = TfmDetrConfig()
    assert (config.dropout, config.attention_dropout, config.activation_dropout) == (0.1, 0.1, 0.1)
    assert config.auxiliary_loss and config.eos_coefficient == 0.1 and config.num_queries == 100
    assert (config.class_cost, config.bbox_cost, config.giou_cost) == (1, 5, 2)
    assert (config.bbox_loss_coefficient, config.giou_loss_coefficient) == (5, 2)
    assert (config.mask_loss_coefficient, config.dice_loss_coefficient) == (1, 1)
    assert config.hidden_size == config.d_model == 256 and config.num_attention_heads == 8


def test_initial_weights_depend_on_the_seed():
    states = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        states.append(TfmDetrForPanopticSegmentation(tiny_detr_config(encoder_attention_heads=8)).state_dict())
    first, again, other = states
    assert all(torch.equal(first[name], again[name]) for name in first)
    drawn = {name for name in first if not torch.equal(first[name], other[name])}
    matrices = {name for name, value in first.items() if value.ndim > 1}
    assert drawn == matrices, "every matrix is drawn, and nothing else is"


def test_initial_weights():
    torch.manual_seed(0)
    model = TfmDetrModel(TfmDetrConfig(backbone="test_resnet", encoder_layers=1, decoder_layers=1))
    bound = (6 / (256 + 2048)) ** 0.5
    for name in ("encoder.layers.0.feed_forward.up_proj", "decoder.layers.0.feed_forward.down_proj"):
        layer = model.get_submodule(name)
        assert 0.99 * bound < layer.weight.abs().max() <= bound and layer.bias.eq(0).all()
    assert model.query_position_embeddings.weight.std().item() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"pixel_values": tiny_photos(channels=1)}, "pixel_values must have 3 channels, got 1"),
        (
            {"pixel_values": tiny_photos(), "pixel_mask": torch.ones(3, 32, 96)},
            r"pixel_mask must have shape \(3, 64, 96\), got \(3, 32, 96\)",
        ),
        (
            {"pixel_values": tiny_photos(), "labels": tiny_labels((1, 1))},
            "labels must have an entry for each of 3 images, got 2",
        ),
    ],
    ids=["channels", "mask", "labels"],
)
def test_invalid_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        tiny_detr()(**inputs)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 30}, "d_model must be a multiple of"),
        ({"d_model": 34, "encoder_attention_heads": 2, "decoder_attention_heads": 2}, "multiple of 4 for positions"),
        ({"num_queries": 0}, "num_queries must be at least 1, got 0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"backbone_norm": "layer"}, 'backbone_norm must be one of frozen, batch, group, got "layer"'),
        ({"eos_coefficient": 0.0}, r"eos_coefficient must be in \(0, 1\], got 0.0"),
        ({"class_cost": 0, "bbox_cost": 0, "giou_cost": 0}, "must not all be 0"),
        ({"bbox_cost": -1}, "bbox_cost must be at least 0, got -1"),
        ({"backbone_config": {"model_type": "bert"}}, "backbone_config: a bert model has no feature maps"),
    ],
    ids=str,
)
def test_invalid_configurations_are_refused(fields, message):
    with pytest.raises(Exception, match=message) as raised:
        tiny_detr_config(**fields)
    assert isinstance(raised.value, ValueError) or "Validation" in type(raised.value).__name__


def test_mask_head_needs_a_divisible_width():
    with pytest.raises(ValueError, match="multiple of 16 and, with encoder_attention_heads added, of 8, got 32 and 4"):
        TfmDetrForPanopticSegmentation(tiny_detr_config())


def test_feature_map_larger_than_learned_positions_is_refused():
    model = tiny_detr(position_embedding_type="learned")
    model.model.position_embedding = LearnedPositions2D(32, length=2)
    with pytest.raises(ValueError, match="2 x 3 cells, but learned positions end at 2"):
        model(tiny_photos())


def test_configurations_survive_saving(tmp_path):
    labels = {"num_labels": 2, "id2label": {0: "cat", 1: "dog"}}
    config = tiny_detr_config(dilation=True, norm_first=True, class_cost=2.5, **labels)
    config.save_pretrained(tmp_path)
    again = TfmDetrConfig.from_pretrained(tmp_path)
    assert again.to_dict() == {**config.to_dict(), "transformers_version": again.transformers_version}
    assert again.num_labels == 2 and copy.deepcopy(again).class_cost == 2.5
    assert TfmDetrForObjectDetection(again).class_labels_classifier.out_features == 3
