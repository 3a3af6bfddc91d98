"""Both ways to compute the loss agree with torch, and the one for large vocabularies keeps no logits."""

import pytest
import torch
from torch import nn

from hf_tfm.models import cross_entropy
from hf_tfm.models.cross_entropy import IGNORE_INDEX, label_smoothed_cross_entropy, linear_cross_entropy

N, D, V = 50, 16, 97


@pytest.fixture
def problem(monkeypatch):
    """Hidden states, weight, labels; 16 rows per chunk, and rows 16 to 31 have no labels."""
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", {"cpu": 16, "other": 16})
    torch.manual_seed(0)
    labels = torch.randint(0, V, (N,))
    labels[3:9] = labels[16:32] = IGNORE_INDEX
    return torch.randn(N, D, requires_grad=True), torch.randn(V, D, requires_grad=True), labels


def by_torch(hidden, weight, labels, smoothing, bias=0.0):
    return nn.functional.cross_entropy(hidden @ weight.T + bias, labels, reduction="sum", label_smoothing=smoothing)


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
def test_logits_path_matches_torch(smoothing, problem):
    hidden, weight, labels = problem
    loss = label_smoothed_cross_entropy(hidden @ weight.T, labels, smoothing)
    torch.testing.assert_close(loss, by_torch(hidden, weight, labels, smoothing))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing_definition(smoothing):
    """(1 - e) * -log p[label] + e * mean over the vocabulary of -log p (Szegedy et al. 2015, section 7)."""
    logits, label = torch.randn(1, 5), torch.tensor([2])
    log_p = logits.log_softmax(-1)[0]
    expected = -(1 - smoothing) * log_p[2] - smoothing * log_p.mean()
    torch.testing.assert_close(label_smoothed_cross_entropy(logits, label, smoothing), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("scale", [1.0, 0.37], ids=["sum", "scaled"])
def test_linear_path_matches_torch(smoothing, scale, problem):
    hidden, weight, labels = problem
    expected = scale * by_torch(hidden, weight, labels, smoothing)
    got = scale * linear_cross_entropy(hidden, weight, labels, smoothing)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients(got, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("frozen", [(), ("hidden",), ("hidden", "weight"), ("bias",)], ids=str)
def test_bias_matches_torch(smoothing, frozen, problem):
    """Loss and gradients with a bias, also if only some gradients are requested."""
    hidden, weight, labels = problem
    inputs = {"hidden": hidden, "weight": weight, "bias": torch.randn(V, requires_grad=True)}
    inputs |= {name: inputs[name].detach() for name in frozen}
    hidden, weight, bias = inputs.values()
    expected = 0.37 * by_torch(hidden, weight, labels, smoothing, bias)
    got = 0.37 * linear_cross_entropy(hidden, weight, labels, smoothing, bias)
    assert got.item() == pytest.approx(expected.item(), rel=1e-6)
    assert abs(got.item() - 0.37 * linear_cross_entropy(hidden, weight, labels, smoothing).item()) > 0.1
    wanted = [value for value in inputs.values() if value.requires_grad]
    for ours, theirs in zip(gradients(got, *wanted), gradients(expected, *wanted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_chunk_size_does_not_matter(problem, monkeypatch):
    in_chunks = gradients(linear_cross_entropy(*problem, 0.1), *problem[:2])
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", {"cpu": N, "other": N})
    at_once = gradients(linear_cross_entropy(*problem, 0.1), *problem[:2])
    for ours, theirs in zip(in_chunks, at_once, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_positions_without_a_label_have_no_gradient(problem):
    hidden, weight, labels = problem
    gradient, _ = gradients(linear_cross_entropy(hidden, weight, labels, 0.1), hidden, weight)
    assert gradient[labels == IGNORE_INDEX].abs().max() == 0 and gradient[labels != IGNORE_INDEX].abs().min() > 0


def test_no_labels_at_all(problem):
    hidden, weight, labels = problem
    loss = linear_cross_entropy(hidden, weight, torch.full_like(labels, IGNORE_INDEX), 0.1)
    assert loss.item() == 0 and all(gradient.abs().max() == 0 for gradient in gradients(loss, hidden, weight))


def test_large_logits_do_not_overflow(problem):
    hidden, weight, labels = (problem[0].detach() * 300).requires_grad_(), problem[1], problem[2]
    got, expected = linear_cross_entropy(hidden, weight, labels, 0.1), by_torch(hidden, weight, labels, 0.1)
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, theirs in zip(gradients(got, hidden, weight), gradients(expected, hidden, weight), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-2)


def test_no_logits_are_saved_for_backward(problem):
    """autograd saves tensors of the size of the inputs; the plain loss saves N x V."""
    hidden, weight, labels = problem

    def kept(function) -> list[int]:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
            node = function(hidden, weight, labels, 0.1).grad_fn
        kept_by_hand = torch.utils._pytree.tree_leaves(getattr(node, "__dict__", {}))
        return sizes + [value.numel() for value in kept_by_hand if isinstance(value, torch.Tensor)]

    assert 0 < max(kept(linear_cross_entropy)) <= max(N * D, V * D) < N * V <= max(kept(by_torch))


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_only_requested_gradients_are_computed(frozen, problem):
    inputs = {"hidden": problem[0], "weight": problem[1]}
    inputs[frozen] = inputs[frozen].detach()
    other = next(value for name, value in inputs.items() if name != frozen)
    loss = linear_cross_entropy(inputs["hidden"], inputs["weight"], problem[2], 0.1)
    expected = by_torch(inputs["hidden"], inputs["weight"], problem[2], 0.1)
    torch.testing.assert_close(*(gradients(value, other)[0] for value in (loss, expected)), rtol=0, atol=1e-5)


def test_without_gradients(problem):
    with torch.no_grad():
        loss = linear_cross_entropy(*problem, 0.1)
    assert not loss.requires_grad and loss.item() == pytest.approx(by_torch(*problem, 0.1).item(), rel=1e-6)


def test_bfloat16_autocast(problem):
    """Matrix products in bfloat16, the rest in float32: as accurate as torch's own autocast."""
    hidden, weight, labels = problem
    bias = torch.randn(V, requires_grad=True)
    exact = by_torch(hidden, weight, labels, 0.1, bias)
    with torch.autocast("cpu", torch.bfloat16):
        ours = linear_cross_entropy(hidden, weight, labels, 0.1, bias)
        torchs = by_torch(hidden, weight, labels, 0.1, bias)
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exact.item(), rel=1e-2)
    for exactly, got, reference in zip(
        *(gradients(loss, hidden, weight, bias) for loss in (exact, ours, torchs)), strict=True
    ):
        assert got.dtype == torch.float32
        assert (got - exactly).norm() < 1.5 * (reference - exactly).norm() < 0.05 * exactly.norm()


def test_bfloat16_weights(problem):
    inputs = (*problem[:2], torch.randn(V))
    hidden, weight, bias = (value.detach().bfloat16().requires_grad_() for value in inputs)
    loss = linear_cross_entropy(hidden, weight, problem[2], 0.1, bias)
    expected = by_torch(hidden.float(), weight.float(), problem[2], 0.1, bias.float())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-2)
    assert all(gradient.dtype == torch.bfloat16 for gradient in gradients(loss, hidden, weight, bias))


def test_length_mismatch_is_refused(problem):
    hidden, weight, labels = problem
    with pytest.raises(ValueError, match="hidden has 50 rows but labels has 49"):
        linear_cross_entropy(hidden, weight, labels[:-1])
