"""Label-smoothed cross-entropy straight from hidden states, without holding the logits (Szegedy et al. 2015).

    hidden (N, D) -> a chunk of rows at a time: logits (n, V) -> loss and its gradient -> forgotten

A vocabulary of V = 37,000 makes the logits the largest tensor of a translation step; here they exist for one chunk
only, and the gradients of hidden states, weight and bias are formed in the same pass. Label smoothing:
arXiv:1512.00567, section 7.

Shapes: N positions; D hidden size; V vocabulary.
"""

import torch
from torch import Tensor, nn

IGNORE_INDEX = -100
# Positions whose logits are held at once. On a CPU 256 rows of a 10,000-word vocabulary just fit its cache, and more
# rows would mean fewer passes over the weight's gradient; a GPU wants larger matrices.
CHUNK_ROWS = {"cpu": 256, "other": 1024}


def label_smoothed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum over the labelled positions of ``(1 - e) * -log p[label] + e * mean_v(-log p[v])``.

    Args:
        logits: (N, V).
        labels: (N,) int64; `IGNORE_INDEX` marks a position without a label.
        label_smoothing: e, in [0, 1).

    Returns:
        Scalar float32, a sum: divide by the number of labels for the usual mean.
    """
    return nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum"
    )


class _LinearCrossEntropy(torch.autograd.Function):
    """Forward forms the gradients chunk by chunk; backward only scales them."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_smoothing: float,
        dtype: torch.dtype,
    ):
        vocabulary = len(weight)
        matrix = weight.to(dtype)  # (V, D)
        offset = None if bias is None else bias.to(dtype)  # (V,)
        rows = hidden.to(dtype)  # (N, D)
        with_gradient = any(ctx.needs_input_grad[:3])
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        grad_bias = torch.zeros_like(bias) if ctx.needs_input_grad[2] else None
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["other"])
        for start in range(0, len(rows), chunk):
            part, label = rows[start : start + chunk], labels[start : start + chunk]
            labelled = (label != IGNORE_INDEX)[:, None]  # (n, 1)
            target = label.clamp_min(0)[:, None]  # (n, 1)
            scores = nn.functional.linear(part, matrix, offset).float()  # (n, V)
            term = (label_smoothing - 1.0) * scores.gather(1, target)  # (n, 1)
            if label_smoothing:
                term = term - label_smoothing * scores.mean(dim=1, keepdim=True)
            top = scores.amax(dim=1, keepdim=True)
            powers = scores.sub_(top).exp_()  # (n, V), in place: one pass of exp serves loss and gradient
            total = powers.sum(dim=1, keepdim=True)
            loss += torch.where(labelled, term + top + total.log(), 0.0).sum()
            if not with_gradient:
                continue
            # d loss / d scores = softmax - e / V - (1 - e) at the label; zero where there is no label.
            gradient = powers.mul_(labelled / total)
            if label_smoothing:
                gradient.sub_(labelled * (label_smoothing / vocabulary))
            gradient.scatter_add_(1, target, labelled * (label_smoothing - 1.0))
            if grad_bias is not None:
                grad_bias += gradient.sum(dim=0)
            gradient = gradient.to(dtype)
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = gradient @ matrix
            if grad_weight is None:
                continue
            if dtype == grad_weight.dtype:
                grad_weight.addmm_(gradient.t(), part)
            else:
                grad_weight += gradient.t() @ part
        ctx.gradients = grad_hidden, grad_weight, grad_bias
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the gradients of linear_cross_entropy are formed in its forward, for one backward")
        # Scaled in place, to hold the weight's gradient once; so they are given away here.
        gradients, ctx.gradients = ctx.gradients, None
        return *(None if g is None else g.mul_(grad_loss) for g in gradients), None, None, None


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, label_smoothing: float = 0.0, bias: Tensor | None = None
) -> Tensor:
    """`label_smoothed_cross_entropy` of ``hidden @ weight.T + bias``, without the logits.

    Matrix products run in the autocast dtype where autocast is on, sums and softmax in float32.

    Args:
        hidden: (N, D).
        weight: (V, D), the output embedding.
        labels: (N,) int64; `IGNORE_INDEX` marks a position without a label.
        label_smoothing: e, in [0, 1).
        bias: (V,), one number a token; default, none.

    Returns:
        Scalar float32, a sum over the labelled positions.

    Raises:
        ValueError: hidden and labels differ in length.
    """
    if len(hidden) != len(labels):
        raise ValueError(f"hidden has {len(hidden)} rows but labels has {len(labels)}")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    with torch.autocast(device, enabled=False):
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, label_smoothing, dtype)
