"""The models with the same weights match `torch.nn.Transformer`."""

import math

import pytest
import torch
from torch import nn

from hf_tfm import TfmTransformerConfig, TfmTransformerForConditionalGeneration

D, FF, HEADS, LAYERS, V = 32, 64, 4, 2, 60


def copy_attention(ours: nn.Module, theirs: nn.MultiheadAttention) -> None:
    theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.k_proj.weight, ours.v_proj.weight]))
    theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.k_proj.bias, ours.v_proj.bias]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())


@torch.no_grad()
def torch_twin(model: TfmTransformerForConditionalGeneration) -> nn.Transformer:
    """`nn.Transformer` with the model's weights."""
    config = model.config
    layer = {
        "d_model": D,
        "nhead": HEADS,
        "dim_feedforward": FF,
        "dropout": 0.0,
        "activation": config.hidden_act,
        "batch_first": True,
        "norm_first": config.norm_first,
    }

    def final_norm() -> nn.LayerNorm | None:
        # nn.Transformer applies a final norm to both stacks; the paper does not after a post-norm layer.
        return nn.LayerNorm(D) if config.norm_first else None

    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), LAYERS, final_norm(), False)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), LAYERS, final_norm())
    twin = nn.Transformer(D, HEADS, custom_encoder=encoder, custom_decoder=decoder, batch_first=True)
    for ours, theirs in zip(model.model.encoder.layers, encoder.layers, strict=True):
        copy_attention(ours.self_attn, theirs.self_attn)
        theirs.norm1.load_state_dict(ours.self_attn_residual.norm.state_dict())
        theirs.norm2.load_state_dict(ours.feed_forward_residual.norm.state_dict())
    for ours, theirs in zip(model.model.decoder.layers, decoder.layers, strict=True):
        copy_attention(ours.self_attn, theirs.self_attn)
        copy_attention(ours.cross_attn, theirs.multihead_attn)
        theirs.norm1.load_state_dict(ours.self_attn_residual.norm.state_dict())
        theirs.norm2.load_state_dict(ours.cross_attn_residual.norm.state_dict())
        theirs.norm3.load_state_dict(ours.feed_forward_residual.norm.state_dict())
    for ours, theirs in ((model.model.encoder, encoder), (model.model.decoder, decoder)):
        for own_block, block in zip(ours.layers, theirs.layers, strict=True):
            block.linear1.load_state_dict(own_block.feed_forward.up_proj.state_dict())
            block.linear2.load_state_dict(own_block.feed_forward.down_proj.state_dict())
        if config.norm_first:
            theirs.norm.load_state_dict(ours.norm.state_dict())
    return twin


def embed(table: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Sections 3.4 and 3.5, written out with loops."""
    length = ids.shape[1]
    positions = torch.empty(length, D)
    for position in range(length):
        for i in range(D // 2):
            angle = position / 10000 ** (2 * i / D)
            positions[position, i], positions[position, D // 2 + i] = math.sin(angle), math.cos(angle)
    return table[ids] * math.sqrt(D) + positions


@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_equal_to_torch(norm_first, activation):
    torch.manual_seed(0)
    config = TfmTransformerConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=FF,
        num_attention_heads=HEADS,
        num_encoder_layers=LAYERS,
        num_decoder_layers=LAYERS,
        hidden_act=activation,
        norm_first=norm_first,
        dropout=0.0,
    )
    model = TfmTransformerForConditionalGeneration(config).eval()
    for parameter in model.parameters():  # biases of 0 and norms of 1 would hide swaps
        if parameter.dim() == 1:
            nn.init.normal_(parameter, std=0.3)
    twin = torch_twin(model)
    source, target = torch.randint(5, V, (3, 9)), torch.randint(5, V, (3, 7))
    source_mask = torch.arange(9) < torch.tensor([[9], [4], [6]])
    target_mask = torch.arange(7) < torch.tensor([[7], [5], [2]])
    ours = model(
        input_ids=source,
        attention_mask=source_mask.long(),
        decoder_input_ids=target,
        decoder_attention_mask=target_mask.long(),
        output_hidden_states=True,
    )
    table = model.model.shared.weight
    memory = twin.encoder(embed(table, source), src_key_padding_mask=~source_mask)
    hidden = twin.decoder(
        embed(table, target),
        memory,
        tgt_mask=~torch.ones(7, 7, dtype=torch.bool).tril(),
        tgt_key_padding_mask=~target_mask,
        memory_key_padding_mask=~source_mask,
    )
    for expected, got, mask in (
        (memory, ours.encoder_last_hidden_state, source_mask),
        (hidden, ours.decoder_hidden_states[-1], target_mask),
        (hidden @ table.T, ours.logits, target_mask),
    ):
        torch.testing.assert_close(got[mask], expected[mask], rtol=0, atol=1e-5)
    assert hidden[target_mask].std() > 0.1  # the comparison is of something
