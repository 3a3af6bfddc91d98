"""Files with the names used by the authors of the masked autoencoder."""

import argparse

import pytest
import timm
import torch
from convert_helpers import (
    assert_same_outputs,
    authors_weights,
    config_of,
    ours,
    outputs_of,
    timm_vit,
)
from safetensors.torch import load_file
from test_convert import assert_same_weights

from hf_tfm import (
    TfmMAEForPreTraining,
    TfmMAEModel,
    TfmViTForImageClassification,
)
from hf_tfm.conversion import convert

# A width of a published model, so that the number of heads is known; the decoder always has 16.
PUBLISHED = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 64}
PUBLISHED_DECODER = {"decoder_num_attention_heads": 16, "decoder_hidden_size": 64, "decoder_intermediate_size": 32}


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_file_of_the_authors(tmp_path, norm_pix_loss):
    model = ours(TfmMAEForPreTraining, **PUBLISHED, **PUBLISHED_DECODER, norm_pix_loss=norm_pix_loss)
    arguments = argparse.Namespace(norm_pix_loss=norm_pix_loss, blr=1.5e-4)
    torch.save({"model": authors_weights(model), "args": arguments, "epoch": 800}, tmp_path / "mae.pth")
    certificate = convert(tmp_path / "mae.pth", "tfm", tmp_path / "ours")
    assert certificate["source"]["model"] == "mae.pth" and list(certificate["source"]["weights"]) == ["mae.pth"]
    assert certificate["differences"].keys() == {"logits", "loss", "mask"}
    converted = TfmMAEForPreTraining.from_pretrained(tmp_path / "ours")
    assert converted.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in converted.state_dict().items())
    assert converted.config.norm_pix_loss is norm_pix_loss
    assert_same_outputs(outputs_of(converted, (3, 32, 32), True), outputs_of(model, (3, 32, 32), True))


def test_ours_to_the_authors_names_and_back(tmp_path):
    model = ours(TfmMAEForPreTraining, mask_ratio=0.6)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "mae_authors", tmp_path / "theirs")
    assert {path.name for path in (tmp_path / "theirs").iterdir()} == {
        "config.json",
        "model.safetensors",
        "parity_certificate.json",
    }
    found, expected = load_file(tmp_path / "theirs" / "model.safetensors"), authors_weights(model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    convert(tmp_path / "theirs", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    assert config_of(tmp_path / "ours") == config_of(tmp_path / "back")
    # As a pickle next to a config.json that gives the number of heads.
    torch.save({"model": found}, tmp_path / "theirs" / "checkpoint.pth")
    convert(tmp_path / "theirs" / "checkpoint.pth", "tfm", tmp_path / "again")
    assert_same_weights(tmp_path / "ours", tmp_path / "again")


def test_the_authors_encoder_loads_in_timm(tmp_path):
    """timm reads their files, which confirms the order of queries, keys and values independently."""
    model = ours(TfmMAEModel, mask_ratio=0.0)
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "mae_authors", tmp_path / "theirs")
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    arguments = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 1.5}
    reader = timm.create_model("vit_base_patch16_224", num_classes=0, **arguments)
    reader.load_state_dict(weights, strict=True)
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(2, 3, 32, 32, generator=generator)
    in_order = torch.arange(16.0).expand(2, -1)
    with torch.no_grad():
        expected = reader.eval().forward_features(images)
        found = model(images, noise=in_order).last_hidden_state
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    convert(tmp_path / "theirs", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_fine_tuned_file_of_the_authors_is_a_classifier(tmp_path, pooling):
    arguments = {"embed_dim": 192, "num_heads": 3, "global_pool": "avg" if pooling == "mean" else "token"}
    model = timm_vit(**arguments)
    torch.save({"model": model.state_dict()}, tmp_path / "tuned.pth")
    convert(tmp_path / "tuned.pth", "tfm", tmp_path / "ours")
    converted = TfmViTForImageClassification.from_pretrained(tmp_path / "ours")
    assert converted.config.pooling == pooling
    assert_same_outputs(outputs_of(converted, (3, 64, 64)), outputs_of(model, (3, 64, 64)))
