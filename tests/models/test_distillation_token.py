"""DeiT's distillation token: equal to transformers' model with two classifiers; saving, resizing and training."""

import pytest
import torch
from tiny_models import largest_difference
from tiny_vision import TINY, scramble, tiny_backbone, tiny_images, tiny_vit, tiny_vit_config
from transformers import AutoModelForImageClassification, DeiTConfig, DeiTForImageClassificationWithTeacher

from hf_tfm import TfmViTForImageClassification
from hf_tfm.conversion import convert
from hf_tfm.hub.cost import measure_cost


def test_it_matches_transformers_and_converts_to_its_class(tmp_path):
    torch.manual_seed(0)
    theirs = scramble(DeiTForImageClassificationWithTeacher(DeiTConfig(num_labels=5, layer_norm_eps=1e-6, **TINY)))
    theirs.save_pretrained(tmp_path / "theirs")
    assert convert(tmp_path / "theirs", "tfm", tmp_path / "ours")["max_abs_difference"] < 1e-5
    ours, images = TfmViTForImageClassification.from_pretrained(tmp_path / "ours").eval(), tiny_images()
    with torch.no_grad():
        mine, expected = ours(images, output_hidden_states=True), theirs(images, output_hidden_states=True)
    for name in ("logits", "cls_logits", "distillation_logits"):
        assert mine[name].shape == (3, 5)
        assert largest_difference(mine[name], expected[name]) < 1e-5, name
    for own, other in zip(mine.hidden_states, expected.hidden_states, strict=True):
        assert own.shape == (3, 18, 32) and largest_difference(own, other) < 1e-5
    assert largest_difference(mine.cls_logits, mine.distillation_logits) > 0.1, "two classifiers, not one"

    found = convert(tmp_path / "ours", "deit", tmp_path / "again")
    assert {"logits", "cls_logits", "distillation_logits"} <= found["differences"].keys()
    again = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "again").eval()
    fields = DeiTConfig(**TINY).to_dict().keys() - {"_name_or_path", "transformers_version", "dtype"}
    assert {name: getattr(again.config, name) for name in fields} == {n: getattr(theirs.config, n) for n in fields}
    assert largest_difference(again(images).logits, expected.logits) < 1e-5
    tiny_vit().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="deit cannot express distillation_token=False"):
        convert(tmp_path / "plain", "deit", tmp_path / "refused")


def test_it_adds_one_token_and_one_classifier():
    def count(**fields) -> int:
        return sum(p.numel() for p in tiny_vit(**fields).parameters())

    assert count(distillation_token=True) - count() == 32 + 32 * 5 + 5
    assert "cls_logits" not in tiny_vit()(tiny_images())


def test_token_is_random_at_first_and_saved(tmp_path):
    torch.manual_seed(0)
    model = TfmViTForImageClassification(tiny_vit_config(num_labels=5, distillation_token=True)).eval()
    assert model.vit.distillation_token.std() > 0.01
    model.save_pretrained(tmp_path)
    again, images = AutoModelForImageClassification.from_pretrained(tmp_path).eval(), tiny_images()
    assert largest_difference(model(images).distillation_logits, again(images).distillation_logits) == 0.0
    # A checkpoint without the token gets a randomly initialized one.
    tiny_vit().save_pretrained(tmp_path / "plain")
    fresh, report = TfmViTForImageClassification.from_pretrained(
        tmp_path / "plain", distillation_token=True, output_loading_info=True
    )
    assert sorted(report["missing_keys"]) == [
        "distillation_classifier.bias",
        "distillation_classifier.weight",
        "vit.distillation_token",
    ]
    assert fresh.vit.distillation_token.std() > 0.01


def test_flops_can_be_counted():
    plain, token = (tiny_vit(distillation_token=given) for given in (False, True))
    costs = [measure_cost("", model, {"pixel_values": tiny_images(1)})["gflops"] for model in (plain, token)]
    assert costs[0] < costs[1] < costs[0] * 18 / 17 * 1.05  # one token more, of 17, and one classifier


def test_other_image_sizes_and_attention_maps():
    model = tiny_vit(distillation_token=True)
    assert model(tiny_images(2, 24, 32)).logits.shape == (2, 5)
    model.vit.set_image_size((24, 32))
    assert model(tiny_images(2, 24, 32), output_attentions=True).attentions[0].shape == (2, 4, 50, 50)
    backbone = tiny_backbone(distillation_token=True, out_features=["stage3"])
    states = backbone.vit(tiny_images(2)).last_hidden_state
    (found,) = backbone(tiny_images(2)).feature_maps
    assert largest_difference(found, states[:, 2:].transpose(1, 2).unflatten(2, (4, 4))) < 1e-6


def test_both_classifiers_and_the_token_get_gradients():
    model = tiny_vit(distillation_token=True).train()
    model(tiny_images(), labels=torch.tensor([0, 1, 2])).loss.backward()
    for part in (model.classifier.weight, model.distillation_classifier.weight, model.vit.distillation_token):
        assert part.grad.abs().max() > 0


def test_incompatible_options_are_refused(tmp_path):
    for fields in ({"pooling": "mean"}, {"representation_layer": True}):
        with pytest.raises(ValueError, match='distillation_token needs pooling "cls" and no representation_layer'):
            tiny_vit_config(distillation_token=True, **fields)
    tiny_vit(distillation_token=True).save_pretrained(tmp_path / "ours")
    for to in ("vit", "timm"):
        with pytest.raises(ValueError, match="distillation"):
            convert(tmp_path / "ours", to, tmp_path / to)
        assert not (tmp_path / to).exists()


@pytest.mark.parametrize(
    "fields", [{"position_embedding_type": "sincos_2d"}, {"image_size": (8, 32)}, {"num_labels": 1}], ids=str
)
def test_all_classifiers_with_the_token_convert_to_deit(fields, tmp_path):
    model = tiny_vit(distillation_token=True, **fields).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "ours")
    assert convert(tmp_path / "ours", "deit", tmp_path / "theirs")["max_abs_difference"] < 1e-5
    assert convert(tmp_path / "theirs", "tfm", tmp_path / "again")["max_abs_difference"] < 1e-5
