"""The Vision Transformer with the same weights matches timm's."""

import pytest
import timm
import torch
from torch import Tensor, nn

from hf_tfm import TfmViTConfig, TfmViTForImageClassification

D, LAYERS = 32, 3

# (our name, timm's name); "#" is the index of a block.
TABLE = (
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("vit.layers.#.self_attn_residual.norm", "blocks.#.norm1"),
    ("vit.layers.#.self_attn.out_proj", "blocks.#.attn.proj"),
    ("vit.layers.#.feed_forward_residual.norm", "blocks.#.norm2"),
    ("vit.layers.#.feed_forward.up_proj", "blocks.#.mlp.fc1"),
    ("vit.layers.#.feed_forward.down_proj", "blocks.#.mlp.fc2"),
    ("vit.layernorm", "norm"),
    ("vit.fc_norm", "fc_norm"),
    ("classifier", "head"),
)


def timm_weights(model: nn.Module) -> dict[str, Tensor]:
    """Our weights under timm's names; queries, keys and values of a block are one matrix."""
    ours, renamed = model.state_dict(), {}
    for name, value in ours.items():
        for own, theirs in TABLE:
            for layer in map(str, range(LAYERS)):
                prefix = own.replace("#", layer)
                if name == prefix or name.startswith(prefix + "."):
                    renamed[theirs.replace("#", layer) + name.removeprefix(prefix)] = value
    for layer in range(LAYERS):
        for kind in ("weight", "bias"):
            parts = [ours[f"vit.layers.{layer}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            renamed[f"blocks.{layer}.attn.qkv.{kind}"] = torch.cat(parts)
    return renamed


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (24, 12)], ids=str)
@pytest.mark.parametrize(
    ("fields", "timm_fields"),
    [
        ({"pooling": "cls"}, {"global_pool": "token"}),
        ({"pooling": "mean"}, {"global_pool": "avg", "fc_norm": True}),
        ({"drop_path_rate": 0.3, "position_embedding_type": "sincos_2d"}, {"drop_path_rate": 0.3}),
    ],
    ids=str,
)
def test_logits_match_timm(fields, timm_fields, size):
    torch.manual_seed(0)
    config = TfmViTConfig(
        image_size=list(size),
        patch_size=4,
        hidden_size=D,
        intermediate_size=4 * D,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_labels=7,
        **fields,
    )
    model = TfmViTForImageClassification(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.2)
    twin = timm.models.VisionTransformer(
        img_size=size, patch_size=4, embed_dim=D, depth=LAYERS, num_heads=4, num_classes=7, **timm_fields
    ).eval()
    twin.load_state_dict(timm_weights(model))
    images = torch.randn(3, 3, *size)
    expected = twin(images)
    assert expected.std() > 0.1
    torch.testing.assert_close(model(images).logits, expected, rtol=0, atol=1e-5)
    rates = [layer.feed_forward_residual.drop_path.rate for layer in model.vit.layers]
    assert rates == pytest.approx([getattr(block.drop_path2, "drop_prob", 0.0) for block in twin.blocks])


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large", "huge"])
def test_sizes_match_timm(size):
    patch = 14 if size == "huge" else 16
    with torch.device("meta"):
        model = TfmViTForImageClassification(TfmViTConfig.of_size(size, num_labels=1000))
        twin = timm.create_model(f"vit_{size}_patch{patch}_224", num_classes=1000)
    counts = [sum(parameter.numel() for parameter in one.parameters()) for one in (model, twin)]
    assert counts[0] == counts[1]
