"""Shared helpers of the DETR conversion tests: small random models and their outputs."""

import torch
from convert_helpers import LABELS
from torch import Tensor, nn
from transformers import DetrForObjectDetection, DetrForSegmentation, DetrModel

from hf_tfm import TfmDetrConfig, TfmDetrForObjectDetection, TfmDetrForPanopticSegmentation, TfmDetrModel

TINY = {
    "backbone": "test_resnet",
    "num_queries": 7,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 8,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    **LABELS,
}
# Configurations that the authors' program can build.
AUTHORS = {**TINY, "backbone": "resnet18", "decoder_attention_heads": 8, "decoder_ffn_dim": 48}
PANOPTIC = {**AUTHORS, "backbone": "resnet50", "d_model": 128, "encoder_layers": 1, "num_queries": 3}
STOCK = {
    TfmDetrForObjectDetection: DetrForObjectDetection,
    TfmDetrForPanopticSegmentation: DetrForSegmentation,
    TfmDetrModel: DetrModel,
}
OUTPUTS = ("logits", "pred_boxes", "pred_masks", "last_hidden_state")


@torch.no_grad()
def drawn(model: nn.Module) -> nn.Module:
    """``model`` with all weights and norm statistics random, scaled to keep activations in range."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight")):
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5 if tensor.ndim > 1 else 0.2, generator=generator)
    return model.eval()


def ours(model_class=TfmDetrForObjectDetection, fields=TINY, **more) -> nn.Module:
    return drawn(model_class(TfmDetrConfig(**{**fields, **more})))


@torch.no_grad()
def outputs_of(model: nn.Module, channels: int = 3) -> dict[str, Tensor]:
    """Outputs on inputs that the conversion's own check does not use."""
    images = torch.randn(2, channels, 96, 64, generator=torch.Generator().manual_seed(7))
    mask = torch.ones(2, 96, 64)
    mask[1, 64:] = 0
    output = model.eval()(images, mask)
    return {name: output[name] for name in OUTPUTS if output.get(name) is not None}


def assert_same_outputs(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and len(expected) >= 1
    for name, value in expected.items():
        assert value.std() > 0.01, f"{name} too similar for a meaningful comparison"
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=2e-5, msg=name)


def authors_weights(model: nn.Module) -> dict[str, Tensor]:
    """Weights of ``model``, one of AUTHORS or PANOPTIC, under the authors' names, written out by hand."""
    state, weights, prefix = model.state_dict(), {}, ""
    if isinstance(model, TfmDetrForPanopticSegmentation):
        prefix = "detr."
        steps = {f"lay{i + 3}": f"steps.{i}.refine.conv" for i in range(3)}
        norms = {f"gn{i + 3}": f"steps.{i}.refine.norm" for i in range(3)}
        adapters = {f"adapter{i + 1}": f"steps.{i}.adapter" for i in range(3)}
        first = {"lay1": "first.conv", "gn1": "first.norm", "lay2": "second.conv", "gn2": "second.norm"}
        for theirs, mine in {**first, **steps, **norms, **adapters, "out_lay": "last"}.items():
            for kind in ("weight", "bias"):
                weights[f"mask_head.{theirs}.{kind}"] = state[f"mask_head.{mine}.{kind}"]
        for part in "qk":
            for kind in ("weight", "bias"):
                weights[f"bbox_attention.{part}_linear.{kind}"] = state[f"bbox_attention.{part}_proj.{kind}"]
    state = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    own = {}
    for kind in ("weight", "bias"):
        own[f"input_proj.{kind}"] = state[f"model.input_projection.{kind}"]
        own[f"class_embed.{kind}"] = state[f"class_labels_classifier.{kind}"]
        own[f"transformer.decoder.norm.{kind}"] = state[f"model.decoder.layernorm.{kind}"]
        for i in range(3):
            own[f"bbox_embed.layers.{i}.{kind}"] = state[f"bbox_predictor.layers.{i}.{kind}"]
        for stack, layers, residuals in (
            ("encoder", model.config.encoder_layers, ("self_attn", "feed_forward")),
            ("decoder", model.config.decoder_layers, ("self_attn", "cross_attn", "feed_forward")),
        ):
            for i in range(layers):
                old, new = f"model.{stack}.layers.{i}", f"transformer.{stack}.layers.{i}"
                own[f"{new}.linear1.{kind}"] = state[f"{old}.feed_forward.up_proj.{kind}"]
                own[f"{new}.linear2.{kind}"] = state[f"{old}.feed_forward.down_proj.{kind}"]
                for j, name in enumerate(residuals):
                    own[f"{new}.norm{j + 1}.{kind}"] = state[f"{old}.{name}_residual.norm.{kind}"]
                for name, theirs in (("self_attn", "self_attn"), ("cross_attn", "multihead_attn")):
                    if name in residuals:
                        fused = [state[f"{old}.{name}.{part}_proj.{kind}"] for part in "qkv"]
                        own[f"{new}.{theirs}.in_proj_{kind}"] = torch.cat(fused)
                        own[f"{new}.{theirs}.out_proj.{kind}"] = state[f"{old}.{name}.out_proj.{kind}"]
    own["query_embed.weight"] = state["model.query_position_embeddings.weight"]
    for name, value in state.items():
        if name.startswith("model.backbone."):
            own[name.replace("model.backbone.", "backbone.0.")] = value
    return {**{f"{prefix}{name}": value for name, value in own.items()}, **weights}
