"""Methods of encoder self-attention: chosen by configuration or by a call, saved with the model, in stock DETR too."""

from dataclasses import dataclass

import pytest
import torch
from tiny_detr import (
    PLAIN,
    TINY,
    relative_difference,
    scramble_detr,
    tiny_detr,
    tiny_labels,
    tiny_padding,
    tiny_photos,
)
from tiny_models import largest_difference, tiny_model
from tiny_text import text_batch, tiny_text
from transformers import DetrConfig, DetrForObjectDetection

from hf_tfm import TfmDeformableDetrConfig, TfmDeformableDetrModel, TfmDetrConfig, TfmDetrForObjectDetection
from hf_tfm.models import encoder_attention
from hf_tfm.models.attention_method import AttentionMethod, option
from hf_tfm.models.clustered_attention import ClusteredAttention
from hf_tfm.models.encoder_attention import encoder_layers, make_method, register_method, set_encoder_attention

STRIDE_8 = {"backbone_output_stride": 8}  # 8 x 12 cells of the tiny photos
COARSE = {"rounds": 4, "width": 2.0}
FIELDS = {**STRIDE_8, "encoder_attention": "clustered", "encoder_attention_kwargs": COARSE}
SIZES = ((64, 96), (32, 64), (64, 32))


@dataclass(frozen=True)
class MeanAttention(AttentionMethod):
    """Every token gets the mean of all values, to a power."""

    power: int = option(1, 1)

    def attend(self, given):
        value = given.value
        seen = torch.ones(len(value), value.shape[2]) if given.tokens is None else given.tokens.float()
        mean = (seen[:, None, None] @ value) / seen.sum(dim=1)[:, None, None, None]
        return (mean**self.power).expand(-1, -1, given.query.shape[2], -1)


def stock_detr() -> DetrForObjectDetection:
    torch.manual_seed(0)
    timm = {"model_type": "timm_backbone", "backbone": "test_resnet", "out_indices": [4], "output_stride": 8}
    fields = {name: value for name, value in TINY.items() if name != "backbone"}
    return scramble_detr(DetrForObjectDetection(DetrConfig(backbone_config=timm, **fields)))


BUILDS = pytest.mark.parametrize("build", [lambda: tiny_detr(**STRIDE_8), stock_detr], ids=["ours", "stock"])


@torch.no_grad()
@BUILDS
def test_attention_of_a_model_is_changed_and_restored(build):
    """Coarse clusters change the predictions, clusters of one query do not; only the encoder has the method."""
    model, inputs = build(), {"pixel_values": tiny_photos(), "pixel_mask": tiny_padding(SIZES)}
    exact = model(**inputs).logits
    assert set_encoder_attention(model, "clustered", **COARSE) is model
    layers = encoder_layers(model)
    assert [layer.attention_method for layer in layers] == [ClusteredAttention(**COARSE)] * 2
    clustered = model(**inputs).logits
    assert largest_difference(clustered, exact) > 1e-4
    for layer in layers:
        layer.attention_method = None  # in a stock model, "per_module" without a method is SDPA
    assert largest_difference(model(**inputs).logits, exact) < 1e-5
    set_encoder_attention(model, "clustered", rounds=64, width=0.01)
    assert largest_difference(model(**inputs).logits, exact) < 1e-4
    set_encoder_attention(model, "full")
    assert torch.equal(model(**inputs).logits, exact)


@torch.no_grad()
def test_every_method_runs_in_a_stock_model():
    """Each changes the predictions, and exact attention restores them."""
    model, inputs = stock_detr(), {"pixel_values": tiny_photos(), "pixel_mask": tiny_padding(SIZES)}
    exact = model(**inputs).logits
    for name, method in encoder_attention.METHODS.items():
        options = {"length": 96} if "length" in method.__dataclass_fields__ else {}
        options |= {"block_size": 8} if name in ("local", "bigbird") else {}
        changed = set_encoder_attention(model, name, **options)(**inputs).logits
        assert changed.isfinite().all() and largest_difference(changed, exact) > 1e-4, name
    assert torch.equal(set_encoder_attention(model, "full")(**inputs).logits, exact)


@torch.no_grad()
@BUILDS
def test_padding_changes_nothing(build):
    encoder = set_encoder_attention(build(), "clustered", **COARSE).model.encoder
    generator = torch.Generator().manual_seed(0)
    cells, noise = torch.randn(2, 3, 96, 32, generator=generator).unbind()
    mask = torch.arange(96) < torch.tensor([[96], [50], [70]])
    clean = encoder(inputs_embeds=cells, attention_mask=mask).last_hidden_state
    noisy = encoder(inputs_embeds=torch.where(mask[..., None], cells, noise), attention_mask=mask).last_hidden_state
    assert torch.equal(noisy[mask], clean[mask])
    alone = encoder(inputs_embeds=cells[1:2, :50]).last_hidden_state
    assert largest_difference(clean[1:2, :50], alone) < 1e-5


@torch.no_grad()
def test_choice_is_saved(tmp_path):
    images = tiny_photos()
    model = set_encoder_attention(tiny_detr(**STRIDE_8), "clustered", **COARSE)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "clustered_attention.py").is_file() and (tmp_path / "encoder_attention.py").is_file()
    loaded = TfmDetrForObjectDetection.from_pretrained(tmp_path)
    assert loaded.config.encoder_attention_kwargs == COARSE
    assert torch.equal(loaded(images).logits, model(images).logits)
    full = TfmDetrForObjectDetection.from_pretrained(tmp_path, encoder_attention="full", encoder_attention_kwargs=None)
    assert torch.equal(full(images).logits, tiny_detr(**STRIDE_8)(images).logits)


@torch.no_grad()
def test_attention_maps_are_those_of_the_prototypes():
    model = tiny_detr(**FIELDS)
    images, mask = tiny_photos(), tiny_padding(SIZES)
    output = model(images, mask, output_attentions=True)
    assert largest_difference(output.logits, model(images, mask).logits) < 1e-5
    assert [maps.shape for maps in output.encoder_attentions] == [(3, 4, 96, 96)] * 2
    sums = output.encoder_attentions[0].sum(dim=-1)
    assert largest_difference(sums, torch.ones_like(sums)) < 1e-5
    assert len(output.encoder_attentions[0][0, 0].unique(dim=0)) < 60


def test_training_reaches_all_weights_of_the_encoder():
    model = tiny_detr(**FIELDS, **PLAIN).train()
    gradients = []
    for method in ("full", "clustered"):
        set_encoder_attention(model, method, **({} if method == "full" else {"rounds": 16, "width": 0.5}))
        model.zero_grad()
        model(tiny_photos(), labels=tiny_labels()).loss.backward()
        encoder = dict(model.model.encoder.named_parameters())
        gradients.append({name: parameter.grad.clone() for name, parameter in encoder.items()})
    for name, exact in gradients[0].items():
        if "k_proj.bias" not in name:  # without effect on the softmax
            assert exact.abs().max() > 0 and relative_difference(gradients[1][name], exact) < 0.5, name


@torch.no_grad()
def test_layer_compiles_in_one_graph():
    torch.compiler.reset()
    layer = encoder_layers(tiny_detr(**FIELDS))[0]
    cells = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch._dynamo.config.patch(capture_scalar_outputs=True):  # reading the number of clusters
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for states in (cells, 10 * cells):  # another number of clusters
            assert largest_difference(compiled(states)[0], layer(states)[0]) < 1e-5


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_onnx(tmp_path):
    """ONNX Runtime finds the same clusters, in another number than in the export."""
    pytest.importorskip("onnxscript", reason="needs pip install hf-tfm[onnx]")
    onnxruntime = pytest.importorskip("onnxruntime", reason="needs pip install hf-tfm[onnx]")

    class Layer(torch.nn.Module):
        def forward(self, query, key, value, mask):
            return ClusteredAttention(**COARSE)(self, query, key, value, mask)[0]

    tensors = torch.randn(3, 2, 2, 40, 8, generator=torch.Generator().manual_seed(0)).unbind()
    mask = (torch.arange(40) < torch.tensor([[40], [25]]))[:, None, None]
    program = torch.onnx.export(Layer(), (*tensors, mask), dynamo=True, verbose=False)
    program.save(tmp_path / "layer.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", providers=["CPUExecutionProvider"])
    for factor in (1, 4):
        given = (factor * tensors[0], *tensors[1:], mask)
        names = [each.name for each in session.get_inputs()]
        (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
        assert largest_difference(torch.from_numpy(found), Layer()(*given)) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("name", ["masked", "causal"])
def test_text_models_with_weights_of_a_method(name, tmp_path):
    """Saved with the model; new for a model that is loaded with another method, which keeps all other weights."""
    field = "decoder_attention" if name == "causal" else "encoder_attention"
    method, options = ("linear", {}) if name == "causal" else ("linformer", {"rank": 6})
    chosen = {field: method, f"{field}_kwargs": options}
    model, batch = tiny_text(name, **chosen), text_batch(name)
    model.save_pretrained(tmp_path / "saved")
    loaded = type(model).from_pretrained(tmp_path / "saved")
    expected = model(**batch).logits
    assert torch.equal(loaded(**batch).logits, expected)
    plain = tiny_text(name)
    plain.save_pretrained(tmp_path / "plain")
    changed, report = type(model).from_pretrained(tmp_path / "plain", **chosen, output_loading_info=True)
    new = {key for key in changed.state_dict() if "attention_weights" in key}
    assert report["missing_keys"] == new and len(new) == (0 if name == "causal" else 2)
    assert all(changed.state_dict()[key].std() > 0.1 for key in new)
    assert largest_difference(changed(**batch).logits, plain(**batch).logits) > 1e-3
    padding = batch["attention_mask"] == 0
    noisy = {**batch, "input_ids": batch["input_ids"].masked_fill(padding, 7)}
    assert torch.equal(model(**noisy).logits[~padding], expected[~padding])


@torch.no_grad()
@pytest.mark.parametrize("method", ["linear", pytest.param("performer", marks=pytest.mark.slow), "local"])
def test_generation_with_a_cache_gives_the_same_tokens(method):
    options = {"block_size": 4} if method == "local" else None
    model = tiny_text("causal", decoder_attention=method, decoder_attention_kwargs=options)
    prompts = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13]])
    given = {"attention_mask": (prompts > 0).long(), "max_new_tokens": 12, "do_sample": False}
    cached, plain = (model.generate(prompts, **given, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached, plain)
    scores = model.generate(prompts, **given, num_beams=3, return_dict_in_generate=True, output_scores=True)
    again = model.generate(prompts, **given, num_beams=3, use_cache=False)
    assert torch.equal(scores.sequences, again)


@torch.no_grad()
def test_method_of_a_user(monkeypatch):
    monkeypatch.setattr(encoder_attention, "METHODS", dict(encoder_attention.METHODS))
    register_method("mean", MeanAttention)
    images = tiny_photos()
    for model in (tiny_detr(**STRIDE_8, encoder_attention="mean"), set_encoder_attention(stock_detr(), "mean")):
        assert model(images).logits.isfinite().all()
    with pytest.raises(ValueError, match=r'^encoder_attention_kwargs: "mean" has the options power, got "rounds"$'):
        TfmDetrConfig(**{**TINY, "encoder_attention": "mean", "encoder_attention_kwargs": {"rounds": 2}})
    with pytest.raises(ValueError, match=r'^encoder_attention "clustered" exists already$'):
        register_method("clustered", MeanAttention)
    with pytest.raises(ValueError, match=r'^encoder_attention "other": dict is not a subclass of AttentionMethod$'):
        register_method("other", dict)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder_attention": "fast"}, '^encoder_attention must be one of full, linear(, [a-z]+)*, got "fast"$'),
        (
            {"encoder_attention": "clustered", "encoder_attention_kwargs": {"width": 0}},
            "^encoder_attention_kwargs: width must be a finite number above 0, got 0$",
        ),
        (
            {"encoder_attention_kwargs": {"rounds": 4}},
            '^encoder_attention_kwargs: "full" has no options, got "rounds"$',
        ),
        ({"backbone_output_stride": 4}, "^backbone_output_stride must be 8, 16 or null, got 4$"),
    ],
)
def test_configurations_are_validated(fields, message):
    with pytest.raises(ValueError, match=message):
        TfmDetrConfig(**{**TINY, **fields})


def test_models_and_backends_without_the_method_are_refused():
    assert make_method("full") is None
    deformable = TfmDeformableDetrModel(TfmDeformableDetrConfig.of_size("tiny", encoder_layers=1, decoder_layers=1))
    with pytest.raises(ValueError, match=r"^TfmDeformableDetrModel has no encoder with self-attention over queries"):
        set_encoder_attention(deformable, "clustered")
    with pytest.raises(ValueError, match=r'^encoder_attention "clustered" needs attention_score="dot_product"'):
        set_encoder_attention(tiny_model(attention_score="additive"), "clustered")
    for build in (
        lambda: tiny_model(position_embedding_type="alibi", encoder_attention="linear"),
        lambda: set_encoder_attention(tiny_model(position_embedding_type="alibi"), "linear"),
    ):
        with pytest.raises(
            ValueError, match=r'^encoder_attention must be "full" with position_embedding_type="alibi"'
        ):
            build()
    layer = encoder_layers(tiny_detr(**FIELDS, attn_implementation="flex_attention"))[0]
    with pytest.raises(ValueError, match=r'runs with attn_implementation="sdpa", got "flex_attention"$'):
        layer(torch.zeros(1, 4, 32))
