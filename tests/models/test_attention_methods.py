"""Attention methods: exact in their limits, blind to padding and other rows, equal to references, linear in memory."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import largest_difference
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from hf_tfm.models.attention_method import AttentionMethod
from hf_tfm.models.encoder_attention import METHODS, make_method
from hf_tfm.models.kernel_attention import random_directions

SHAPE = (3, 2, 45, 8)  # (B, H, T, Dh)
# Small parts, so that 45 tokens are many blocks, segments, chunks and features; no size divides 45.
OPTIONS = {
    "linear": {},
    "performer": {"num_features": 20},
    "linformer": {"rank": 7, "length": 64},
    "nystrom": {"num_landmarks": 6, "kernel_size": 5},
    "synthesizer": {"rank": 4, "length": 64},
    "local": {"block_size": 4},
    "strided": {"stride": 4},
    "longformer": {"window": 8, "num_global_tokens": 2},
    "bigbird": {"block_size": 4, "num_random_blocks": 1},
    "reformer": {"num_buckets": 6, "chunk_size": 4},
    "clustered": {"rounds": 4, "width": 2.0},
}
CAUSAL = [name for name, method in METHODS.items() if method.causal]
METHOD = pytest.mark.parametrize("name", OPTIONS)


def heads(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(3)]


def layer_of(method: AttentionMethod, causal: bool = False, length: int | None = None) -> SimpleNamespace:
    """An attention layer with the weights of a method, which differ from the initial ones."""
    torch.manual_seed(0)
    weights = method.weights(SHAPE[1], SHAPE[3], length)
    for weight in () if weights is None else weights.parameters():
        nn.init.normal_(weight, std=0.5)
    return SimpleNamespace(is_causal=causal, attention_weights=weights)


def attend(method: AttentionMethod, *tensors: Tensor, mask: Tensor | None = None, layer=None, **options) -> Tensor:
    """(B, H, T, Dh) -> (B, H, T, Dh)."""
    return method(layer or layer_of(method), *tensors, mask, **options)[0].transpose(1, 2)


def padding(*lengths: int) -> Tensor:
    """(B, 1, 1, T) bool, True at tokens."""
    return torch.arange(SHAPE[2])[None, None, None] < torch.tensor(lengths)[:, None, None, None]


def test_every_method_is_tested():
    assert list(METHODS) == list(OPTIONS)


@torch.no_grad()
@METHOD
def test_padding_and_other_rows_change_nothing(name):
    """Bit for bit where only values of padding change; each row alone and unpadded gives the same to rounding."""
    method, tensors, noise = make_method(name, OPTIONS[name]), heads(), heads(1)
    layer, mask = layer_of(method), padding(45, 21, 3)
    clean = attend(method, *tensors, mask=mask, layer=layer)
    rows = mask.transpose(2, 3)
    noisy = attend(
        method, *(a.where(rows, 100 * b) for a, b in zip(tensors, noise, strict=True)), mask=mask, layer=layer
    )
    assert torch.equal(noisy.where(rows, 0), clean.where(rows, 0))
    for row, length in enumerate((45, 21, 3)):
        alone = attend(method, *(part[row : row + 1, :, :length] for part in tensors), layer=layer)
        assert largest_difference(alone, clean[row : row + 1, :, :length]) < 1e-5, row


@torch.no_grad()
@METHOD
def test_maps_are_the_weights_of_the_values(name):
    method, tensors = make_method(name, OPTIONS[name]), heads()
    layer, mask = layer_of(method), padding(45, 21, 3)
    mixed, maps = method(layer, *tensors, mask, output_attentions=True)
    assert maps.shape == (*SHAPE[:2], 45, 45)
    assert largest_difference((maps @ tensors[2]).transpose(1, 2), mixed) < 1e-4
    there = mask.transpose(2, 3)  # queries that are tokens
    if name not in ("linformer", "nystrom"):
        sums = maps.sum(dim=-1, keepdim=True).where(there, 1.0)
        assert largest_difference(sums, torch.ones_like(sums)) < 1e-5
    assert not maps.where(there & ~mask, 0.0).any(), "a value of padding has a weight"


def gradients(method: AttentionMethod, layer: SimpleNamespace, mask: Tensor | None) -> dict[str, Tensor]:
    tensors = [part.requires_grad_() for part in heads()]
    (attend(method, *tensors, mask=mask, layer=layer) * torch.linspace(-1, 1, SHAPE[2])[:, None]).sum().backward()
    weights = {} if layer.attention_weights is None else dict(layer.attention_weights.named_parameters())
    return {key: part.grad for key, part in ({"q": tensors[0], "k": tensors[1], "v": tensors[2]} | weights).items()}


@METHOD
def test_gradients_reach_everything_that_is_used(name):
    method = make_method(name, OPTIONS[name])
    found = gradients(method, layer_of(method), padding(45, 21, 3))
    unused = {projection[0] for projection in method.unused}
    for key, gradient in found.items():
        assert (gradient is None) == (key in unused), key
        if gradient is not None:
            assert gradient.isfinite().all() and gradient.abs().max() > 0, key


@torch.no_grad()
@METHOD
def test_bf16_changes_little(name):
    """Under autocast too, where projections are bf16; hashes are those of the same vectors in float32."""
    method, rounded, mask = make_method(name, OPTIONS[name]), [part.bfloat16() for part in heads()], padding(45, 21, 3)
    layer = layer_of(method)
    expected = attend(method, *(part.float() for part in rounded), mask=mask, layer=layer)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(method, *rounded, mask=mask, layer=layer)
    assert found.dtype == torch.bfloat16
    there = mask.transpose(2, 3)
    difference = (found.float() - expected).where(there, 0).square().mean().sqrt()
    assert difference < 0.03 * expected.where(there, 0).square().mean().sqrt(), name


# --- limits in which a method is exact


def identity(weights: nn.Module, **tables: Tensor) -> nn.Module:
    with torch.no_grad():
        for name, table in tables.items():
            getattr(weights, name).copy_(table)
    return weights


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("local", {"block_size": 45}),
        ("local", {"block_size": 8, "neighbours": 6}),
        ("strided", {"stride": 1}),
        ("longformer", {"window": 90, "num_global_tokens": 0}),
        ("longformer", {"window": 88, "num_global_tokens": 3}),
        ("longformer", {"window": 2, "num_global_tokens": 45}),
        ("bigbird", {"block_size": 9, "num_random_blocks": 5}),
        ("bigbird", {"block_size": 23}),
        ("nystrom", {"num_landmarks": 45, "iterations": 40, "kernel_size": 0}),
        ("clustered", {"rounds": 64, "width": 0.5}),
    ],
)
def test_exact_in_the_limit(name, options, masked):
    """Window, blocks or landmarks for all tokens: equal to softmax attention."""
    method, tensors, mask = make_method(name, options), heads(), padding(45, 21, 3) if masked else None
    weights = method.weights(SHAPE[1], SHAPE[3], None)  # the initial ones
    layer = SimpleNamespace(is_causal=False, attention_weights=weights)
    found = attend(method, *tensors, mask=mask, layer=layer)
    expected = scaled_dot_product_attention(*tensors, attn_mask=mask)
    rows = padding(45, 21, 3).transpose(2, 3) if masked else torch.ones(1, 1, 45, 1, dtype=torch.bool)
    assert largest_difference(found.where(rows, 0), expected.where(rows, 0)) < (1e-3 if name == "nystrom" else 1e-5)


@torch.no_grad()
def test_linformer_with_the_identity_as_projection_is_exact():
    method, tensors = make_method("linformer", {"rank": 45, "length": 45}), heads()
    layer = layer_of(method)
    identity(layer.attention_weights, keys=torch.eye(45))
    assert largest_difference(attend(method, *tensors, layer=layer), scaled_dot_product_attention(*tensors)) < 1e-6
    layer = layer_of(make_method("linformer", {"rank": 7, "length": 64, "share": False}))
    assert layer.attention_weights.values.shape == (7, 64)


@torch.no_grad()
def test_reformer_with_one_bucket_is_attention_without_the_token_itself():
    method, (query, _, value) = make_method("reformer", {"num_buckets": 1, "chunk_size": 45, "num_hashes": 3}), heads()
    keys = nn.functional.normalize(query, dim=-1)
    others = ~torch.eye(45, dtype=torch.bool)
    expected = scaled_dot_product_attention(query, keys, value, attn_mask=others)
    assert largest_difference(attend(method, query, query, value), expected) < 1e-5
    alone = attend(method, *(part[:, :, :1] for part in (query, query, value)))
    assert largest_difference(alone, value[:, :, :1]) < 1e-6


@torch.no_grad()
def test_features_of_performers_are_unbiased():
    """The mean of phi(x) . phi(y) over seeds is exp(x . y) within three standard errors."""
    x, y = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0)) / 4
    estimates = []
    for seed in range(64):
        directions = random_directions(40, 8, seed, x.device)
        phi_x, phi_y = ((part @ directions.T - part.square().sum(dim=1, keepdim=True) / 2).exp() for part in (x, y))
        estimates.append(phi_x @ phi_y.T / 40)
    estimates = torch.stack(estimates)
    errors = (estimates.mean(dim=0) - (x @ y.T).exp()) / (estimates.std(dim=0) / 8)
    assert errors.square().mean().sqrt() < 1.3 and errors.abs().max() < 6


@torch.no_grad()
@pytest.mark.parametrize("causal", [False, True])
def test_performer_approaches_softmax_attention(causal):
    """The error falls with the number of features M as 1 / sqrt(M)."""
    query, key, value = heads(shape=(1, 2, 30, 8))
    query, key, errors = query * 0.4, key * 0.4, {}
    expected = scaled_dot_product_attention(query, key, value, is_causal=causal)
    for features in (64, 1024):
        methods = [make_method("performer", {"num_features": features, "seed": seed}) for seed in range(8)]
        found = [attend(method, query, key, value, layer=layer_of(method, causal)) for method in methods]
        errors[features] = (torch.stack(found) - expected).square().mean().sqrt().item()
    assert 3 < errors[64] / errors[1024] < 5.5 and errors[1024] < 0.02, errors


# --- definitions and references


@torch.no_grad()
def test_linear_attention_against_its_equation():
    query, key, value = heads()
    phi_q, phi_k = nn.functional.elu(query) + 1, nn.functional.elu(key) + 1
    weights = phi_q @ phi_k.transpose(2, 3)
    expected = (weights / weights.sum(dim=-1, keepdim=True)) @ value
    assert largest_difference(attend(make_method("linear"), query, key, value), expected) < 1e-5


@torch.no_grad()
def test_masks_of_the_sparse_methods():
    """The keys of each query, read from the maps, are those of the definitions."""
    tensors, place = heads(), torch.arange(45)
    distance = (place[:, None] - place).abs()

    def seen(name: str) -> Tensor:
        method = make_method(name, OPTIONS[name])
        return method(layer_of(method), *tensors, None, output_attentions=True)[1][0, 0] > 0

    block = place // 4
    assert torch.equal(seen("local"), (block[:, None] - block).abs() <= 1)
    assert torch.equal(seen("strided"), distance % 4 == 0)
    either = (place[:, None] < 2) | (place < 2)
    assert torch.equal(seen("longformer"), (distance <= 4) | either)
    fixed = ((block[:, None] - block).abs() <= 1) | (block == 0) | (block == 11) | (block[:, None] == 0)
    fixed |= block[:, None] == 11
    bigbird = seen("bigbird")
    assert (bigbird | ~fixed).all()
    extra = (bigbird & ~fixed).view(45, 45)[:, : 44 // 4 * 4].unflatten(1, (-1, 4)).any(dim=2).sum(dim=1)
    assert extra[(block > 0) & (block < 11)].tolist() == [1] * 40


@torch.no_grad()
@pytest.mark.parametrize("kind", ["factorized", "random", "dense"])
def test_synthesizer_against_its_equations(kind):
    method, (query, key, value) = make_method("synthesizer", {"kind": kind, "rank": 4, "length": 64}), heads()
    layer, mask = layer_of(method), padding(45, 21, 3)
    weights = layer.attention_weights
    if kind == "factorized":
        scores = weights.rows[:, :45] @ weights.columns[:, :45].transpose(1, 2)
    else:
        scores = (
            query.relu() @ weights.columns[:, :45].transpose(1, 2) if kind == "dense" else weights.scores[:, :45, :45]
        )
    expected = scores.expand(3, 2, 45, 45).masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value
    assert largest_difference(attend(method, query, key, value, mask=mask, layer=layer), expected) < 1e-5


# --- causal


@torch.no_grad()
@pytest.mark.parametrize("name", CAUSAL)
def test_causal_methods_do_not_see_later_tokens_and_work_with_a_cache(name):
    method, tensors, noise = make_method(name, OPTIONS[name]), heads(), heads(1)
    layer = layer_of(method, causal=True)
    whole = attend(method, *tensors, layer=layer)
    earlier = torch.arange(45)[:, None] < 30
    other = attend(method, *(a.where(earlier, b) for a, b in zip(tensors, noise, strict=True)), layer=layer)
    assert torch.equal(other[:, :, :30], whole[:, :, :30])
    query, key, value = tensors
    for start, end in ((0, 7), (7, 8), (8, 29), (29, 45)):
        part = attend(method, query[:, :, start:end], key[:, :, :end], value[:, :, :end], layer=layer)
        assert largest_difference(part, whole[:, :, start:end]) < 1e-5
        slots = torch.arange(45) <= torch.arange(start, end)[:, None]  # a static cache, with empty slots
        static = attend(method, query[:, :, start:end], key, value, mask=slots.expand(3, 1, -1, -1), layer=layer)
        assert largest_difference(static, part) < 1e-5


@torch.no_grad()
def test_causal_methods_against_their_definitions():
    tensors = heads()
    method = make_method("local", {"block_size": 45})
    expected = scaled_dot_product_attention(*tensors, is_causal=True)
    assert largest_difference(attend(method, *tensors, layer=layer_of(method, causal=True)), expected) < 1e-6
    weights = (nn.functional.elu(tensors[0]) + 1) @ (nn.functional.elu(tensors[1]) + 1).transpose(2, 3)
    weights = weights.tril()
    found = attend(make_method("linear"), *tensors, layer=layer_of(make_method("linear"), causal=True))
    assert largest_difference(found, (weights / weights.sum(dim=-1, keepdim=True)) @ tensors[2]) < 1e-5


# --- memory


class Largest(torch.utils._python_dispatch.TorchDispatchMode):
    """Records the largest tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(one, Tensor):
                self.size = max(self.size, one.untyped_storage().nbytes())
        return result


@torch.no_grad()
@METHOD
def test_memory_is_linear_in_the_number_of_tokens(name):
    """No operation returns more than c T numbers: twice the tokens need at most twice the memory, not four times."""
    sizes = []
    options = OPTIONS[name] | ({"length": 2048} if "length" in OPTIONS[name] else {})
    options = {"stride": 256} if name == "strided" else options  # by itself it has T / stride keys a token
    for length in (1024, 2048):
        method = make_method(name, options)
        layer, tensors = layer_of(method), heads(shape=(1, 2, length, 8))
        with Largest() as largest:
            attend(method, *tensors, layer=layer)
        sizes.append(largest.size)
    assert sizes[1] <= 2.05 * sizes[0], sizes


# --- options


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("performer", {"num_features": 0}, r"num_features must be an integer in \[1, 65536\], got 0"),
        ("performer", {"num_features": 2.0}, r"num_features must be an integer in \[1, 65536\], got 2.0"),
        ("linformer", {"share": 1}, "share must be true or false, got 1"),
        ("longformer", {"window": 5}, "window must be even, got 5"),
        ("nystrom", {"kernel_size": 4}, "kernel_size must be odd or 0, got 4"),
        ("reformer", {"num_buckets": 5}, "num_buckets must be even or 1, got 5"),
        ("clustered", {"width": 0}, "width must be a finite number above 0, got 0"),
        ("synthesizer", {"kind": "fast"}, "kind must be one of factorized, random, dense, got 'fast'"),
        ("linformer", {"heads": 2}, '"linformer" has the options rank, share, length, got "heads"'),
    ],
)
def test_options_are_validated(name, options, message):
    with pytest.raises(ValueError, match=f"^encoder_attention_kwargs: {message}$"):
        make_method(name, options)


def test_lengths_are_checked():
    method = make_method("linformer", {"rank": 4})
    with pytest.raises(ValueError, match=r'^length is needed: "linformer" has weights for each position, and'):
        method.weights(2, 8, None)
    with pytest.raises(ValueError, match=r"^the input has 45 tokens, but the weights of its attention end at 40: "):
        attend(method, *heads(), layer=layer_of(method, length=40))
    with pytest.raises(ValueError, match=r"^decoder_attention must be one of full, linear, .*since later tokens are"):
        make_method("bigbird", causal=True, field="decoder_attention")
