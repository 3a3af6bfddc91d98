"""Clustered attention: exact where every query is alone, close otherwise, blind to padding, differentiable."""

import pytest
import torch
from tiny_models import largest_difference
from torch import Tensor, nn

from hf_tfm.models.clustered_attention import PADDING, ClusteredAttention, hash_family

SHAPE = (2, 3, 40, 8)  # (B, H, T, Dh)
ALONE = ClusteredAttention(rounds=64, width=0.5)
COARSE = ClusteredAttention(rounds=4, width=2.0)


def heads(seed: int = 0, shape: tuple[int, ...] = SHAPE, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def exact(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    return nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def attend(method: ClusteredAttention, *tensors: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    return method(nn.Identity(), *tensors, mask, **options)[0]


def members(clusters: Tensor) -> list[set[int]]:
    """The clusters of one head as sets of queries."""
    return [set((clusters == number).nonzero()[:, 0].tolist()) for number in clusters.unique()]


def padding(*lengths: int) -> Tensor:
    """(B, 1, 1, T) bool, True at tokens."""
    return torch.arange(SHAPE[2])[None, None, None] < torch.tensor(lengths)[:, None, None, None]


@pytest.mark.parametrize("masked", [False, True])
def test_queries_that_are_alone_get_exact_attention(masked):
    tensors, mask = heads(), padding(40, 25) if masked else None
    assert ALONE.clusters(tensors[0], 8**-0.5)[1] == 40
    found = attend(ALONE, *tensors, mask=mask)
    expected = exact(*tensors, mask)
    assert largest_difference(found[0], expected[0]) < 1e-6
    assert largest_difference(found[1, :25], expected[1, :25]) < 1e-6


def test_identical_queries_form_one_cluster():
    query, key, value = heads()
    query[:, :, 5:30] = query[:, :, 5:6]
    clusters, count = ALONE.clusters(query, 8**-0.5)
    assert count == 40 - 24
    assert (clusters[:, :, 5:30] == clusters[:, :, 5:6]).all()
    assert largest_difference(attend(ALONE, query, key, value), exact(query, key, value)) < 1e-6


def test_clusters_are_the_queries_with_equal_hashes_in_every_round():
    """The joint hash separates exactly what the L hashes of the paper separate, also for large hashes."""
    method, (query, *_) = ClusteredAttention(rounds=6, width=0.05), heads()
    query = 50 * query.round(decimals=1)  # hashes of thousands, and some equal queries
    query[:, :, 20:] = query[:, :, :20]
    projections, offsets, _ = hash_family(6, 8, 0, torch.device("cpu"))
    rounds = (query @ projections.T * 8**-0.5 / 0.05 + offsets).floor()
    clusters, _ = method.clusters(query, 8**-0.5)
    for head, own in zip(rounds.flatten(0, 1), clusters.flatten(0, 1), strict=True):
        _, expected = head.unique(dim=0, return_inverse=True)
        assert sorted(map(sorted, members(own))) == sorted(map(sorted, members(expected)))
        assert len(members(own)) <= 20


def test_error_falls_with_the_number_of_rounds():
    tensors, errors, counts = heads(), [], []
    expected = exact(*tensors)
    for rounds in (1, 4, 16):
        methods = [ClusteredAttention(rounds, width=2.0, seed=seed) for seed in range(8)]
        errors.append(sum((attend(one, *tensors) - expected).square().mean().item() for one in methods))
        counts.append(sum(one.clusters(tensors[0], 8**-0.5)[1] for one in methods))
    assert errors[0] > 1.5 * errors[1] > 1.5**2 * errors[2] > 0, errors
    assert counts[0] < counts[1] < counts[2]


def test_every_query_gets_the_attention_of_its_clusters_mean():
    """The definition, one cluster at a time, with the probabilities."""
    query, key, value = heads()
    mask = padding(40, 25)
    mixed, probabilities = COARSE(nn.Identity(), query, key, value, mask, output_attentions=True)
    assert largest_difference(mixed, attend(COARSE, query, key, value, mask=mask)) < 1e-6
    clusters, count = COARSE.clusters(query, 8**-0.5, mask)
    assert 4 < count < 30
    for b in range(2):
        for h in range(3):
            for group in members(clusters[b, h]):
                rows = sorted(group)
                scores = query[b, h, rows].mean(dim=0) @ key[b, h].T * 8**-0.5
                expected = scores.masked_fill(~mask[b, 0, 0], -torch.inf).softmax(dim=-1)
                assert largest_difference(probabilities[b, h, rows], expected.expand(len(rows), -1)) < 1e-6
                assert largest_difference(mixed[b, rows, h], (expected @ value[b, h]).expand(len(rows), -1)) < 1e-6


@pytest.mark.parametrize("additive", [False, True])
def test_padding_changes_nothing(additive):
    query, key, value = heads()
    mask = padding(40, 25)
    if additive:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    clean = attend(COARSE, query, key, value, mask=mask)
    assert clean.isfinite().all()
    clusters, _ = COARSE.clusters(query, 8**-0.5, padding(40, 25))
    assert not set(clusters[1, 0, :25].tolist()) & set(clusters[1, 0, 25:].tolist())
    for tensor, noise in zip((query, key, value), heads(seed=1), strict=True):
        tensor[1, :, 25:] = noise[1, :, 25:]
    noisy = attend(COARSE, query, key, value, mask=mask)
    assert torch.equal(noisy[0], clean[0]) and torch.equal(noisy[1, :25], clean[1, :25])
    alone = attend(COARSE, *(tensor[1:, :, :25] for tensor in (query, key, value)))
    assert largest_difference(noisy[1:, :25], alone) < 1e-6


def test_other_rows_of_the_batch_change_nothing():
    tensors = heads(shape=(3, *SHAPE[1:]))
    tensors[0][0] *= 10  # as many clusters as tokens
    batch = attend(COARSE, *tensors)
    for row in range(3):
        alone = attend(COARSE, *(tensor[row : row + 1] for tensor in tensors))
        assert largest_difference(batch[row : row + 1], alone) < 1e-6


def test_gradients_equal_those_of_the_explicit_formula():
    """A membership matrix M (T, C) makes the means M^T q / sizes and the outputs M (softmax(...) v)."""
    tensors, gradients = heads(dtype=torch.float64), []
    clusters, count = COARSE.clusters(tensors[0], 8**-0.5)
    belongs = nn.functional.one_hot(clusters, count).double()  # (B, H, T, C)
    sizes = belongs.sum(dim=2).clamp(min=1.0)
    weights = torch.randn(2, 40, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(2))

    def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        means = belongs.transpose(2, 3) @ query / sizes[..., None]
        return (belongs @ ((means @ key.transpose(2, 3) * 8**-0.5).softmax(dim=-1) @ value)).transpose(1, 2)

    for function in (lambda *given: attend(COARSE, *given), explicit):
        given = [tensor.clone().requires_grad_() for tensor in tensors]
        (function(*given) * weights).sum().backward()
        gradients.append([tensor.grad for tensor in given])
    for found, expected in zip(*gradients, strict=True):
        assert expected.abs().max() > 1e-2 and largest_difference(found, expected) < 1e-6


def test_width_is_in_units_of_scaled_queries():
    query = heads()[0]
    wide = ClusteredAttention(rounds=4, width=1.0).clusters(query, 1.0)[0]
    assert torch.equal(wide, ClusteredAttention(rounds=4, width=0.25).clusters(query, 0.25)[0])
    assert not torch.equal(wide, ClusteredAttention(rounds=4, width=1.0, seed=1).clusters(query, 1.0)[0])


def test_half_precision():
    """Sums of clusters are in float32; under autocast the hashes are too."""
    tensors = heads()
    half = [tensor.bfloat16() for tensor in tensors]
    rounded = [tensor.float() for tensor in half]
    found = attend(COARSE, *half)
    assert found.dtype == torch.bfloat16
    assert largest_difference(found.float(), attend(COARSE, *rounded)) < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        hashes = COARSE.hashes(tensors[0], 8**-0.5)
    assert torch.equal(hashes, COARSE.hashes(tensors[0], 8**-0.5))


def test_hashes_do_not_meet_the_mark_of_padding():
    assert not (COARSE.hashes(heads()[0], 8**-0.5) == PADDING).any()
    first = hash_family(4, 8, 0, torch.device("cpu"))
    more = hash_family(9, 8, 0, torch.device("cpu"))
    assert all(torch.equal(part, whole[:4]) for part, whole in zip(first, more, strict=True))
    assert (more[2] % 2 == 1).all() and more[2].unique().numel() == 9


def test_dropout_of_the_probabilities():
    tensors = heads()
    torch.manual_seed(0)
    dropped = attend(COARSE, *tensors, dropout=0.5)
    assert largest_difference(dropped, attend(COARSE, *tensors)) > 1e-2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, r"^rounds must be an integer in \[1, 1024\], got 0$"),
        ({"rounds": 2.5}, "rounds must be an integer"),
        ({"rounds": True}, "rounds must be an integer"),
        ({"width": 0.0}, "^width must be a finite number above 0, got 0.0$"),
        ({"width": float("inf")}, "width must be a finite number"),
        ({"seed": -1}, r"^seed must be an integer in \[0, 4294967295\], got -1$"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ClusteredAttention(**options)
