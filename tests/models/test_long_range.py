"""The encoder of the Long Range Arena: definition, padding, pairs, and every attention method trains in it."""

import pytest
import torch
from tiny_models import largest_difference
from torch import Tensor, nn

from hf_tfm import TfmLongRangeConfig, TfmLongRangeForSequenceClassification, TfmLongRangeModel
from hf_tfm.models.encoder_attention import METHODS

TINY = {
    **{"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 48, "max_position_embeddings": 41, "num_labels": 3},
    **{"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "activation_dropout": 0.0},
}
SMALL_PARTS = {
    "performer": {"num_features": 16},
    "linformer": {"rank": 8},
    "nystrom": {"num_landmarks": 8, "kernel_size": 5},
    "local": {"block_size": 8},
    "strided": {"stride": 4},
    "longformer": {"window": 8},
    "bigbird": {"block_size": 4, "num_random_blocks": 1},
    "reformer": {"chunk_size": 8, "num_buckets": 4},
}


def tiny(**fields) -> TfmLongRangeForSequenceClassification:
    torch.manual_seed(0)
    return TfmLongRangeForSequenceClassification(TfmLongRangeConfig(**{**TINY, **fields})).eval()


def ids(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(1, 20, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def test_forward_against_its_definition():
    """Pre-norm blocks of narrower attention without biases, written with torch's own functions."""
    model, given = tiny(qkv_size=16, position_embedding_type="learned"), ids(2, 10)
    encoder, functional = model.encoder, nn.functional
    states = torch.cat([encoder.class_token.expand(2, -1, -1), encoder.word_embeddings(given)], dim=1)
    states = states + encoder.position_embeddings.weight[:11]
    for layer in encoder.layers:
        normed = functional.layer_norm(states, (32,), *layer.self_attn_residual.norm.parameters(), eps=1e-6)
        projections = (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        assert all(one.weight.shape == (16, 32) and one.bias is None for one in projections)
        heads = [(normed @ one.weight.T).view(2, 11, 4, 4).transpose(1, 2) for one in projections]
        mixed = functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        states = states + layer.self_attn.out_proj(mixed)
        states = states + layer.feed_forward(layer.feed_forward_residual.norm(states))
    pooled = functional.layer_norm(states, (32,), *encoder.layernorm.parameters(), eps=1e-6)[:, 0]
    assert largest_difference(encoder(given).pooler_output, pooled) < 1e-5
    assert largest_difference(model(given).logits, model.classifier(model.dense(pooled).relu())) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, {"pooling": "mean", "position_embedding_type": "rotary"}, {"matching": True}])
def test_padding_changes_nothing(fields):
    model = tiny(**fields)
    given = ids(3, 2, 12) if "matching" in fields else ids(3, 12)
    mask = torch.ones_like(given)
    mask[0, ..., 7:] = 0
    logits = model(given, attention_mask=mask).logits
    assert torch.equal(model(given.masked_fill(mask == 0, 5), attention_mask=mask).logits, logits)
    assert largest_difference(model(given[:1, ..., :7]).logits, logits[:1]) < 1e-5
    assert model(given, attention_mask=mask, labels=torch.tensor([0, 1, 2])).loss.isfinite()


@torch.no_grad()
def test_pairs_are_encoded_separately():
    model, given = tiny(matching=True), ids(3, 2, 12)
    one, other = (TfmLongRangeModel.forward(model.encoder, given[:, side]).pooler_output for side in (0, 1))
    joint = torch.cat([one, other, one * other, one - other], dim=1)
    assert largest_difference(model(given).logits, model.classifier(model.dense(joint).relu())) < 1e-5
    with pytest.raises(ValueError, match=r"^input_ids must have shape \(batch, 2, tokens\), got \(3, 12\)$"):
        model(given[:, 0])


def test_too_long_inputs_are_refused():
    with pytest.raises(ValueError, match=r"^the input has 41 tokens, but the model takes 40, see max_position"):
        tiny()(ids(1, 41))
    assert tiny(pooling="mean")(ids(1, 41)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match=r"^qkv_size must be a multiple of 4 for num_attention_heads, got 18$"):
        TfmLongRangeConfig(**TINY, qkv_size=18)


@pytest.mark.parametrize(
    "method", [name if name == "linear" else pytest.param(name, marks=pytest.mark.slow) for name in METHODS]
)
def test_every_method_learns_where_a_token_is(method, tmp_path):
    """The class is the one of four tokens that occurs, which only attention brings to the class token."""
    torch.manual_seed(0)
    # By strides, the class token does not see most tokens.
    fields = {"num_labels": 4, "pooling": "mean" if method == "strided" else "cls"}
    fields |= {"encoder_attention": method, "encoder_attention_kwargs": SMALL_PARTS.get(method)}
    model = tiny(**fields).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)

    def batch(rows: int) -> tuple[Tensor, Tensor]:
        given = torch.randint(6, 20, (rows, 24), generator=generator)
        classes, places = (torch.randint(n, (rows,), generator=generator) for n in (4, 24))
        given[torch.arange(rows), places] = 2 + classes
        return given, classes

    for _ in range(150):
        given, labels = batch(64)
        loss = model(given, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    given, labels = batch(200)
    with torch.no_grad():
        logits = model(given).logits
    assert (logits.argmax(dim=1) == labels).float().mean() > 0.9, method
    model.save_pretrained(tmp_path)
    assert torch.equal(TfmLongRangeForSequenceClassification.from_pretrained(tmp_path)(given).logits, logits)
