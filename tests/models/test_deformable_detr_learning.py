"""From scratch on drawn rectangles: Deformable DETR learns classes and boxes, and does not where a mistake is
planted."""

import pytest
import torch
from test_detr_learning import FIELDS, arbitrary_matching, fit, recall_without_false_positives

import hf_tfm.models.set_loss as set_loss
from hf_tfm import TfmDeformableDetrConfig, TfmDeformableDetrForObjectDetection

SMALL = {**FIELDS, "num_feature_levels": 2, "num_queries": 10, "decoder_attention_heads": 4}


def trained(steps: int = 60, lr: float = 3e-3, **fields) -> TfmDeformableDetrForObjectDetection:
    torch.manual_seed(0)
    return fit(TfmDeformableDetrForObjectDetection(TfmDeformableDetrConfig(**SMALL, **fields)), steps, lr)


def test_it_learns_eight_images_by_heart():
    """In half of the steps that DETR takes."""
    assert recall_without_false_positives(trained()) > 0.8


@pytest.mark.slow  # tests/models/test_deformable_detr.py checks the gradients of the proposals
def test_it_learns_in_two_stages():
    assert recall_without_false_positives(trained(100, 4e-3, with_box_refine=True, two_stage=True)) > 0.8


@pytest.mark.slow
def test_without_matching_it_learns_little(monkeypatch):
    monkeypatch.setattr(set_loss, "assign", arbitrary_matching)
    assert recall_without_false_positives(trained()) < 0.3
