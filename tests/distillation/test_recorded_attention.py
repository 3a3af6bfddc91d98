"""Recording of attention scores, attention probabilities and other signals, by name, for any model."""

import pytest
import torch
from distillation_helpers import bert, classifier, detr, randomize, vit
from torch import nn
from transformers import DistilBertConfig, DistilBertForMaskedLM, GPT2Config, GPT2LMHeadModel

from hf_tfm import TfmGPTConfig, TfmGPTForCausalLM
from hf_tfm.distillation.attention import record_attention
from hf_tfm.distillation.signals import collect
from hf_tfm.distillation.student import student_of

IDS = torch.randint(5, 60, (2, 7), generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])


def gpt(native):
    torch.manual_seed(0)
    if native:
        ids = {"bos_token_id": 0, "eos_token_id": 0}
        return randomize(GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=3, n_head=4, **ids)))
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    return randomize(TfmGPTForCausalLM(TfmGPTConfig(vocab_size=60, max_position_embeddings=20, **sizes)))


def distilbert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
    return randomize(DistilBertForMaskedLM(DistilBertConfig(**sizes)))


TEXT_MODELS = {
    "ours": lambda: bert(3),
    "native": lambda: bert(3, native=True),
    "distilbert": distilbert,
    "gpt": lambda: gpt(False),
    "gpt2": lambda: gpt(True),
}


@pytest.mark.parametrize("mask", [MASK, None], ids=["padded", "whole"])
@pytest.mark.parametrize("name", TEXT_MODELS)
def test_probabilities_equal_eager_attention(name, mask):
    model = TEXT_MODELS[name]().eval()
    inputs = {"input_ids": IDS, "attention_mask": mask}
    with torch.no_grad(), record_attention(model) as recorded:
        again = model(**inputs).logits
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(**inputs, output_attentions=True)
    real = MASK.bool() if mask is not None else torch.ones_like(MASK).bool()
    assert len(recorded.scores) == 3
    for scores, probabilities, attention in zip(
        recorded.scores.values(), recorded.probabilities.values(), expected.attentions, strict=True
    ):
        for found in (probabilities, scores.softmax(-1)):
            assert (found - attention)[real[:, None].expand(-1, 4, -1)].abs().max() < 1e-5
        assert ((scores == -torch.inf) == (attention == 0))[real[:, None].expand(-1, 4, -1)].all()
    assert (again - expected.logits)[real].abs().max() < 1e-4


def test_recording_does_not_change_the_output():
    model = bert(2).eval()
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError), record_attention(model):
        raise RuntimeError
    assert model.config._attn_implementation == before == "sdpa"


def test_recordings_of_two_models_are_separate():
    first, second = bert(2).eval(), bert(3, seed=1).eval()
    with record_attention(first) as outer, record_attention(second) as inner:
        second(input_ids=IDS)
        first(input_ids=IDS)
    assert len(inner.scores) == 3 and len(outer.scores) == 2
    with torch.no_grad(), record_attention(first) as alone:
        first(input_ids=IDS)
    assert all(torch.allclose(outer.scores[name], scores, atol=1e-6) for name, scores in alone.scores.items())


def test_only_requested_layers_are_kept():
    model = bert(3).eval()
    with torch.no_grad(), record_attention(model, lambda stack, layer: layer == 2) as recorded:
        model(input_ids=IDS)
    assert list(recorded.scores) == ["bert.layers.1.self_attn"] and len(recorded.of("")) == 3


def test_model_without_the_attention_interface_is_refused():
    with pytest.raises(ValueError, match="does not use transformers' attention interface"):
        collect(vit(2, kind="timm"), {"pixel_values": torch.randn(1, 3, 16, 16)}, ["score/1"])


def test_gradients_flow_through_recorded_scores():
    model = bert(2).train()
    found, _ = collect(model, {"input_ids": IDS}, ["score/2"])
    found["score/2"].square().sum().backward()
    layers = model.bert.layers
    assert all(layer.self_attn.q_proj.weight.grad.abs().sum() > 0 for layer in layers)
    assert layers[1].self_attn.v_proj.weight.grad is None  # scores do not depend on the values


@pytest.mark.parametrize("name", TEXT_MODELS)
def test_head_runs_only_on_rows_with_a_target(name):
    model = TEXT_MODELS[name]().eval()
    positions = torch.tensor([1, 3, 8])
    seen = []
    handle = model.get_output_embeddings().register_forward_hook(lambda _, given, __: seen.append(given[0].shape))
    with torch.no_grad():
        found, output = collect(model, {"input_ids": IDS, "attention_mask": MASK}, ["logits"], positions)
        handle.remove()
        full = model(input_ids=IDS, attention_mask=MASK).logits.flatten(0, 1)[positions]
    assert seen == [(3, 32)] and output.logits.shape == (3, 60)
    assert (found["logits"] - full).abs().max() < 1e-5


def test_hidden_states_start_with_the_first_block_input():
    model = bert(3).eval()
    names = [f"hidden/{i}" for i in range(4)]
    with torch.no_grad():
        found, _ = collect(model, {"input_ids": IDS}, names)
        expected = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert all(torch.equal(found[name], states) for name, states in zip(names, expected, strict=True))


def test_timm_hidden_states_include_the_class_token():
    model = vit(3, kind="timm").eval()
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found, _ = collect(model, {"pixel_values": pixels}, [f"hidden/{i}" for i in range(4)])
        timm = model.timm_model
        states = timm.norm_pre(timm._pos_embed(timm.patch_embed(pixels)))
        for i in range(4):
            assert (found[f"hidden/{i}"] - states).abs().max() < 1e-5
            states = timm.blocks[i](states) if i < 3 else states
    assert found["hidden/0"].shape == (2, 17, 32)


def test_detector_has_encoder_and_decoder_stacks():
    model = detr(3).eval()
    names = ["encoder/hidden/1", "decoder/hidden/3", "encoder/score/1", "decoder/score/3", "cross/score/3"]
    names += ["boxes", "logits", "set_logits", "set_boxes", "map/model.input_projection"]
    with torch.no_grad():
        found, _ = collect(model, {"pixel_values": torch.randn(2, 3, 64, 96)}, names)
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    assert shapes["encoder/hidden/1"] == (2, 6, 32) and shapes["decoder/hidden/3"] == (2, 6, 32)
    assert shapes["encoder/score/1"] == (2, 4, 6, 6) and shapes["cross/score/3"] == (2, 4, 6, 6)
    assert shapes["map/model.input_projection"] == (2, 32, 2, 3)
    assert torch.equal(found["set_boxes"][-1], found["boxes"])
    assert not torch.equal(found["decoder/score/3"], found["cross/score/3"])


def test_blocks_of_a_backbone_belong_to_no_stack():
    """Not to the encoder of the detector, whose blocks are named like those of a Vision Transformer."""
    vit = {"model_type": "tfm_vit", "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    fields = {"backbone_config": {**vit, "num_hidden_layers": 3, "patch_size": 32, "image_size": 64}}
    model = detr(2, **fields, backbone_frozen_stages=0).eval()
    with torch.no_grad(), record_attention(model) as recorded:
        model(torch.randn(2, 3, 64, 96))
    assert {stack: len(names) for stack, names in recorded.layers.items()} == {
        **{"backbone": 3, "encoder": model.config.encoder_layers},
        **dict.fromkeys(("decoder", "cross"), 2),
    }
    student = student_of(model, {"decoder": [1]}).eval()
    images = torch.randn(1, 3, 64, 64)
    assert torch.equal(student.model.backbone(images)[-1], model.model.backbone(images)[-1])


def test_missing_signal_is_named():
    text, pixels = {"input_ids": IDS}, {"pixel_values": torch.randn(1, 3, 16, 16)}
    for model, inputs, name, words in (
        (bert(2), text, "hidden/3", 'no signal "hidden/3": it has 3'),
        (bert(2), text, "decoder/hidden/1", "it has 0"),
        (bert(2).bert, text, "logits", "TfmBertModel gives no logits"),
        (vit(2), pixels, "boxes", "gives no pred_boxes"),
        (vit(2), pixels, "map/nothing", '"nothing" is not a module'),
        (bert(2), text, "map/lm_head.activation.nothing", "is not a module"),
    ):
        with pytest.raises(ValueError, match=words):
            collect(model, inputs, [name])
    model = bert(2)
    model.idle = nn.Linear(2, 2)
    with pytest.raises(ValueError, match='"idle" of TfmBertForMaskedLM does not run'):
        collect(model, text, ["map/idle"])


def test_unsupported_segments_are_dropped():
    segments = torch.zeros_like(IDS)
    collect(distilbert(), {"input_ids": IDS, "token_type_ids": segments}, ["logits"])
    seen = collect(classifier(2).eval(), {"input_ids": IDS, "token_type_ids": segments + 1}, ["logits"])[0]["logits"]
    assert not torch.equal(seen, collect(classifier(2).eval(), {"input_ids": IDS}, ["logits"])[0]["logits"])
