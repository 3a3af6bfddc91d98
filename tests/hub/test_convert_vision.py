"""Vision models convert to transformers' classes and back; also cases common to all other libraries."""

import json
import shutil

import pytest
import torch
from convert_helpers import (
    DECODER,
    LABELS,
    OTHER_SHAPE,
    TINY,
    assert_same_outputs,
    config_of,
    ours,
    outputs_of,
    timm_reads,
)
from hub_helpers import randomize, run_python
from safetensors.torch import load_file, save_file
from test_card import RECORD
from test_convert import assert_same_weights
from transformers import (
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
    ViTModel,
)

from hf_tfm import (
    TfmMAEForPreTraining,
    TfmMAEModel,
    TfmViTForImageClassification,
    TfmViTModel,
)
from hf_tfm.conversion import conversions, convert, parity
from hf_tfm.hub.results import RunRecord
from hf_tfm.models.configuration_vit import ImageEncoderConfig
from hf_tfm.models.positions import sincos_2d

# Our class, native class, its configuration, fields.
STOCK = {
    "vit": (TfmViTForImageClassification, ViTForImageClassification, ViTConfig, {**TINY, **LABELS}),
    "vit base": (TfmViTModel, ViTModel, ViTConfig, {**TINY, "pooler_output_size": 24}),
    "vit_mae": (TfmMAEForPreTraining, ViTMAEForPreTraining, ViTMAEConfig, {**TINY, **DECODER}),
    "vit_mae base": (TfmMAEModel, ViTMAEModel, ViTMAEConfig, {**TINY, **DECODER}),
}
PAIRS = pytest.mark.parametrize("pair", STOCK)


@PAIRS
def test_ours_to_native_and_back(tmp_path, pair):
    our_class, their_class, _, _ = STOCK[pair]
    to, mae = pair.split()[0], "mae" in pair
    model = ours(our_class, drop_path_rate=0.1, activation_dropout=0.2, hidden_dropout_prob=0.3)
    model.save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", to, tmp_path / to)
    stock = their_class.from_pretrained(tmp_path / to)
    assert config_of(tmp_path / to)["architectures"] == [their_class.__name__]
    assert "auto_map" not in config_of(tmp_path / to) and not list((tmp_path / to).glob("*.py"))
    expected = outputs_of(model, (3, 32, 32), mae)
    assert_same_outputs(outputs_of(stock, (3, 32, 32), mae), expected)
    assert certificate["max_abs_difference"] <= certificate["tolerance"]
    assert certificate["differences"].keys() == expected.keys()
    assert certificate["target"]["class"] == their_class.__name__
    assert certificate["inputs"]["pixel_values"] == [3, 3, 32, 32]

    convert(tmp_path / to, "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    before, after = config_of(tmp_path / "ours"), config_of(tmp_path / "back")
    after.pop("encoder_stride", None)  # native fields without effect here
    assert before == after


@PAIRS
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"qkv_bias": False, "hidden_act": "relu", "layer_norm_eps": 1e-5},
    ],
)
def test_native_to_ours_and_back(tmp_path, pair, fields):
    our_class, their_class, config_class, plain = STOCK[pair]
    to, mae = pair.split()[0], "mae" in pair
    model = randomize(their_class(config_class(**plain, **fields)), std=0.3)
    if pair == "vit_mae":  # initialized with zeros by the class
        model.decoder.decoder_pos_embed.data[:, 1:] = sincos_2d(4, 4, 16)
    model.save_pretrained(tmp_path / to)
    convert(tmp_path / to, "tfm", tmp_path / "ours")
    converted = our_class.from_pretrained(tmp_path / "ours")
    assert_same_outputs(outputs_of(converted, (3, 32, 32), mae), outputs_of(model, (3, 32, 32), mae))
    assert converted.config.id2label == model.config.id2label
    convert(tmp_path / "ours", to, tmp_path / "back")
    assert_same_weights(tmp_path / to, tmp_path / "back")
    before, after = config_of(tmp_path / to), config_of(tmp_path / "back")
    for field in ("drop_path_rate", "activation_dropout"):  # our fields without effect there
        assert after.pop(field) == 0.0
    assert before == after


def test_non_square_images(tmp_path):
    model = ours(**OTHER_SHAPE)
    model.save_pretrained(tmp_path / "ours")
    for to in ("vit", "timm"):
        convert(tmp_path / "ours", to, tmp_path / to)
        convert(tmp_path / to, "tfm", tmp_path / f"{to}-back")
        assert_same_weights(tmp_path / "ours", tmp_path / f"{to}-back")
    expected = outputs_of(model, (1, 24, 40))
    assert_same_outputs(outputs_of(ViTForImageClassification.from_pretrained(tmp_path / "vit"), (1, 24, 40)), expected)
    assert_same_outputs(outputs_of(timm_reads(tmp_path / "timm"), (1, 24, 40)), expected)


@pytest.mark.parametrize("kind", ["sincos_2d", "learned_2d"])
@pytest.mark.parametrize("to", ["vit", "timm"])
def test_all_position_types_become_a_learned_table(tmp_path, kind, to):
    model = ours(position_embedding_type=kind, image_size=[24, 40])
    expected = outputs_of(model, (3, 24, 40))
    model.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", to, tmp_path / to)
    convert(tmp_path / to, "tfm", tmp_path / "back")
    back = TfmViTForImageClassification.from_pretrained(tmp_path / "back")
    assert back.config.position_embedding_type == "learned"
    assert_same_outputs(outputs_of(back, (3, 24, 40)), expected)
    back.vit.embeddings.position_embeddings.data.zero_()
    assert (outputs_of(back, (3, 24, 40))["logits"] - expected["logits"]).abs().max() > 0.01, "positions must matter"


def test_models_without_pooler_or_classifier(tmp_path):
    randomize(ViTModel(ViTConfig(**TINY), add_pooling_layer=False)).save_pretrained(tmp_path / "vit")
    convert(tmp_path / "vit", "tfm", tmp_path / "ours")
    convert(tmp_path / "ours", "vit", tmp_path / "back")
    assert_same_weights(tmp_path / "vit", tmp_path / "back")
    ours(num_labels=0, id2label=None, label2id=None).save_pretrained(tmp_path / "features")
    for to in ("vit", "timm"):
        convert(tmp_path / "features", to, tmp_path / f"features-{to}")
        certificate = convert(tmp_path / f"features-{to}", "tfm", tmp_path / f"features-{to}-back")
        assert certificate["max_abs_output"] > 0.5
        assert_same_weights(tmp_path / "features", tmp_path / f"features-{to}-back")


def test_names_in_older_vit_mae_files(tmp_path):
    """Files on the Hub name the decoder's blocks as the class does; transformers 5 writes other names."""
    ours(TfmMAEForPreTraining).save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", "vit_mae", tmp_path / "new")
    convert(tmp_path / "ours", "vit_mae", tmp_path / "old")
    path = tmp_path / "old" / "model.safetensors"
    weights = load_file(path)
    renamed = {name.replace("decoder_encoder.layer.", "decoder_layers."): w for name, w in weights.items()}
    assert sum("decoder.decoder_layers." in name for name in renamed) == 3 * 16
    save_file(renamed, path, metadata={"format": "pt"})
    convert(tmp_path / "old", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize("pair", ["vit", "vit_mae"])
def test_it_loads_as_a_native_class_without_the_package(tmp_path, pair):
    our_class, their_class, _, _ = STOCK[pair]
    model, mae = ours(our_class), pair == "vit_mae"
    model.save_pretrained(tmp_path / "ours")
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.1, 0.2, 0.3])
    processor.save_pretrained(tmp_path / "ours")
    convert(tmp_path / "ours", pair, tmp_path / "stock")
    auto_class = "AutoModelForPreTraining" if mae else "AutoModelForImageClassification"
    code = f"""
import json
import torch
from transformers import AutoImageProcessor, {auto_class}

try:
    import hf_tfm
    raise SystemExit("the package is importable")
except ModuleNotFoundError:
    pass
model = {auto_class}.from_pretrained("stock").eval()
generator = torch.Generator().manual_seed(7)
inputs = [torch.randn(2, 3, 32, 32, generator=generator)]
if {mae}:
    inputs.append(torch.rand(2, 16, generator=generator))
with torch.no_grad():
    logits = model(*inputs).logits
print(json.dumps({{
    "model": type(model).__module__ + "." + type(model).__name__,
    "labels": model.config.id2label if not {mae} else None,
    "mean": AutoImageProcessor.from_pretrained("stock").image_mean,
    "logits": logits.tolist(),
}}))
"""
    found = run_python(code, tmp_path, without_package=True)
    assert found["model"] == f"transformers.models.{pair}.modeling_{pair}.{their_class.__name__}"
    assert found["labels"] == (None if mae else {"0": "cat", "1": "dog", "2": "owl"})
    assert list(found["mean"]) == [0.1, 0.2, 0.3]
    expected = outputs_of(model, (3, 32, 32), mae)["logits"]
    torch.testing.assert_close(torch.tensor(found["logits"]), expected, rtol=1e-6, atol=1e-5)


def test_float32_position_table_is_kept(tmp_path):
    """As after training in bfloat16: from_pretrained keeps the fixed table in float32."""
    model = ours(TfmMAEForPreTraining).to(torch.bfloat16)
    tables = ("vit.embeddings.position_embeddings", "decoder.decoder_pos_embed")
    for name in tables:
        table = model.get_buffer(name)
        table.data = sincos_2d(4, 4, table.shape[-1]).new_zeros(1, 17, table.shape[-1])
        table.data[:, 1:] = sincos_2d(4, 4, table.shape[-1])
    model.save_pretrained(tmp_path / "ours")
    for to in ("vit_mae", "mae_authors"):
        convert(tmp_path / "ours", to, tmp_path / to)
        weights = load_file(tmp_path / to / "model.safetensors")
        exact = {name.split(".")[-1] for name, weight in weights.items() if weight.dtype == torch.float32}
        assert exact == {"decoder_pos_embed", "position_embeddings" if to == "vit_mae" else "pos_embed"}
        convert(tmp_path / to, "tfm", tmp_path / f"{to}-back")
        assert_same_weights(tmp_path / "ours", tmp_path / f"{to}-back")


@pytest.mark.parametrize(
    "conversion",
    [c for c in conversions() if issubclass(c.ours.config_class, ImageEncoderConfig) and c.name != "deit"],
    ids=lambda c: f"{c.name}-{c.ours.__name__}",
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)])
def test_dtype_and_values_are_kept(tmp_path, conversion, dtype):
    ours(conversion.ours).to(dtype).save_pretrained(tmp_path / "ours")
    certificate = convert(tmp_path / "ours", conversion.name, tmp_path / "theirs")
    assert certificate["inputs"]["dtype"] == "float32"
    weights = load_file(tmp_path / "theirs" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    convert(tmp_path / "theirs", "tfm", tmp_path / "back")
    assert_same_weights(tmp_path / "ours", tmp_path / "back")
    assert str(tmp_path) not in json.dumps(certificate)


def test_check_falls_back_to_float64(tmp_path, monkeypatch):
    """Rounding errors of a deep model can exceed the tolerance; a wrong weight fails in float64 too."""
    ours(hidden_size=128, intermediate_size=512, image_size=64, patch_size=16).save_pretrained(tmp_path / "ours")
    monkeypatch.setattr(parity, "TOLERANCE", 1e-12)
    certificate = convert(tmp_path / "ours", "timm", tmp_path / "timm")
    assert certificate["inputs"]["dtype"] == "float64"
    assert 0 < certificate["max_abs_difference"] < 1e-12
    monkeypatch.setattr(parity, "TOLERANCE", 1e-5)
    assert convert(tmp_path / "ours", "timm", tmp_path / "again")["inputs"]["dtype"] == "float32"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit", "vit_mae", "timm", "mae_authors"])
def test_realistic_sizes(tmp_path, name, monkeypatch):
    """ViT-B/16 with 1000 classes, and the masked autoencoder of that size: float32 is accurate enough both ways."""
    monkeypatch.setattr(parity, "IMAGES", 1)
    torch.manual_seed(0)
    our_class, fields = (
        (TfmMAEForPreTraining, {}) if "mae" in name else (TfmViTForImageClassification, {"num_labels": 1000})
    )
    model = our_class(our_class.config_class.of_size("base", **fields))
    model.save_pretrained(tmp_path / "ours")
    for source, to, target in (("ours", name, "theirs"), ("theirs", "tfm", "back")):
        certificate = convert(tmp_path / source, to, tmp_path / target)
        inputs = certificate["inputs"]
        assert inputs["dtype"] == "float32" and inputs["pixel_values"] == [1, 3, 224, 224]
        assert max(certificate["differences"].values()) < 1e-5
        assert certificate["max_abs_output"] > 0.5, "too small for a meaningful comparison"
        shutil.rmtree(tmp_path / source)
    again = load_file(tmp_path / "back" / "model.safetensors")
    expected = dict(our_class.from_pretrained(tmp_path / "back").state_dict())
    assert len(again) == len(expected) == len(model.state_dict())
    assert all(torch.equal(expected[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(("to", "carded"), [pytest.param("vit", True, marks=pytest.mark.slow), ("timm", False)])
def test_results_file_is_copied(tmp_path, to, carded):
    ours().save_pretrained(tmp_path / "ours")
    RunRecord.from_dict({**RECORD, "model_type": "tfm_vit"}).save(tmp_path / "ours")
    convert(tmp_path / "ours", to, tmp_path / to)
    assert RunRecord.load(tmp_path / to) == RunRecord.load(tmp_path / "ours")
    assert (tmp_path / to / "README.md").is_file() is carded
