"""Shared helpers of the vision conversion tests: small random models and their outputs."""

import json

import timm
import torch
from hub_helpers import randomize

from hf_tfm import (
    TfmMAEConfig,
    TfmMAEForPreTraining,
    TfmViTForImageClassification,
)

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 3,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 24,
}
LABELS = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}
OTHER_SHAPE = {"image_size": [24, 40], "patch_size": [8, 4], "num_channels": 1}


def ours(model_class=TfmViTForImageClassification, **fields):
    """A random model of one of our classes."""
    mae = model_class.config_class is TfmMAEConfig
    fields = {**TINY, **(DECODER if mae else LABELS), **fields}
    return randomize(model_class(model_class.config_class(**fields)), std=0.3)


def timm_vit(**arguments):
    """A small random timm model."""
    arguments = {"depth": 2, "img_size": 64, "num_classes": 7, **arguments}
    model = randomize(timm.create_model("vit_tiny_patch16_224", **arguments), std=0.2)
    model.arguments = {name: value for name, value in arguments.items() if name != "num_classes"}
    return model


def save_timm(model, folder):
    """Save a `timm_vit` model as timm does; older timm versions require the arguments again."""
    timm.models.save_for_hf(model, folder, safe_serialization=True, model_args=model.arguments)


@torch.no_grad()
def outputs_of(model, size: tuple[int, ...], noise: bool = False) -> dict[str, torch.Tensor]:
    """Outputs on inputs that the conversion's own check does not use."""
    generator = torch.Generator().manual_seed(7)
    inputs = [torch.randn(2, *size, generator=generator)]
    if noise:
        inputs.append(torch.rand(2, 16, generator=generator))
    output = model.eval()(*inputs)
    if isinstance(output, torch.Tensor):
        return {"logits": output}
    names = ("logits", "loss", "last_hidden_state", "pooler_output", "mask")
    return {name: output[name] for name in names if output.get(name) is not None}


def assert_same_outputs(found: dict, expected: dict):
    """Outputs agree within 1e-5."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0.5, f"{name} too small for a meaningful comparison"
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-5)


def config_of(folder) -> dict:
    """The content of config.json."""
    return json.loads((folder / "config.json").read_text())


def timm_reads(folder):
    """Load the folder with timm alone; the test environment is offline."""
    return timm.create_model(f"local-dir:{folder}", pretrained=True)


def authors_weights(model: TfmMAEForPreTraining) -> dict[str, torch.Tensor]:
    """Weights of ``model`` under the authors' names, written out by hand."""
    state = model.state_dict()
    weights = {
        "cls_token": state["vit.embeddings.cls_token"],
        "pos_embed": state["vit.embeddings.position_embeddings"],
        "mask_token": state["decoder.mask_token"],
        "decoder_pos_embed": state["decoder.decoder_pos_embed"],
    }
    for kind in ("weight", "bias"):
        weights[f"patch_embed.proj.{kind}"] = state[f"vit.embeddings.patch_embeddings.projection.{kind}"]
        weights[f"norm.{kind}"] = state[f"vit.layernorm.{kind}"]
        for name in ("decoder_embed", "decoder_norm", "decoder_pred"):
            weights[f"{name}.{kind}"] = state[f"decoder.{name}.{kind}"]
        for theirs, mine, layers in (("blocks", "vit.layers", 2), ("decoder_blocks", "decoder.decoder_layers", 3)):
            for i in range(layers):
                new, old = f"{theirs}.{i}", f"{mine}.{i}"
                fused = [state[f"{old}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
                weights[f"{new}.attn.qkv.{kind}"] = torch.cat(fused)
                weights[f"{new}.attn.proj.{kind}"] = state[f"{old}.self_attn.out_proj.{kind}"]
                weights[f"{new}.norm1.{kind}"] = state[f"{old}.self_attn_residual.norm.{kind}"]
                weights[f"{new}.norm2.{kind}"] = state[f"{old}.feed_forward_residual.norm.{kind}"]
                weights[f"{new}.mlp.fc1.{kind}"] = state[f"{old}.feed_forward.up_proj.{kind}"]
                weights[f"{new}.mlp.fc2.{kind}"] = state[f"{old}.feed_forward.down_proj.{kind}"]
    return weights
