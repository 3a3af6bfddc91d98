"""Label-smoothed cross-entropy computed from hidden states without materialising the logits (Szegedy et al. 2015).

    hidden (N, D) -> for each chunk of rows: logits (n, V) -> loss and its gradient -> discard the logits

With a vocabulary of V = 37,000 the logits are the largest tensor of a translation step; here they exist for one chunk
at a time, and the gradients of hidden states, weight and bias are computed in the same pass. Label smoothing:
arXiv:1512.00567, section 7.

Shapes: N positions; D hidden size; V vocabulary size; n rows of a chunk.
"""

import torch
from torch import Tensor, nn

from .linear import embedding_table, is_plain

IGNORE_INDEX = -100  # marks a token, sequence, image or number without a label
# Rows per chunk of logits: fewer rows make the matrix products slower, more rows take more memory.
CHUNK_ROWS = {"cpu": 512, "other": 1024}


def label_smoothed_cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Sum ``(1 - e) * -log p[label] + e * mean_v(-log p[v])`` over the labelled positions.

    Args:
        logits: (N, V).
        labels: (N,) int64; `IGNORE_INDEX` marks a position without a label.
        label_smoothing: e, in [0, 1).

    Returns:
        Scalar float32 sum; divide by the number of labels for the usual mean.
    """
    return nn.functional.cross_entropy(
        logits.float(), labels, ignore_index=IGNORE_INDEX, label_smoothing=label_smoothing, reduction="sum"
    )


def sharp_loss(scores: Tensor, target: Tensor, label_smoothing: float, in_place: bool) -> tuple[Tensor, Tensor]:
    """Compute each row's loss without the uniform part, ``log sum exp scores - (1 - e) * scores[target]``.

    Args:
        scores: (n, V) float32; overwritten by the gradient if ``in_place``.
        target: (n, 1) int64.

    Returns:
        loss (n, 1) float32, and its gradient with respect to the scores, ``softmax - (1 - e) * onehot``, (n, V).
    """
    top = scores.amax(dim=1, keepdim=True)
    at_target = scores.gather(1, target)
    gradient = torch.softmax(scores, dim=1, out=scores if in_place else None)
    log_total = top - gradient.amax(dim=1, keepdim=True).log()  # the largest probability is exp(top - log_total)
    gradient.scatter_add_(1, target, torch.full_like(top, label_smoothing - 1.0))
    return log_total - (1.0 - label_smoothing) * at_target, gradient


class _LinearCrossEntropy(torch.autograd.Function):
    """Compute the gradients chunk by chunk in the forward pass; the backward pass only scales them.

    The gradient of a labelled row's loss with respect to its logits is ``softmax - (1 - e) * onehot - e / V``. The
    last term is the same for every token, so it is never added to a row of V numbers: it adds ``-e * mean of weight``
    to the gradient of a row's hidden state and ``-e / V * sum of rows`` to that of every token's weight.
    """

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        label_smoothing: float,
        dtype: torch.dtype,
        row_weights: Tensor | None,
    ):
        labelled = (labels != IGNORE_INDEX)[:, None]  # (N, 1)
        target = labels.clamp_min(0)[:, None]  # (N, 1)
        rows = torch.where(labelled, hidden, 0.0).to(dtype)  # (N, D), zero at positions without a label
        scale = None if row_weights is None else row_weights.float()[:, None]  # (N, 1)
        matrix = weight.to(dtype)  # (V, D)
        offset = None if bias is None else bias.to(dtype)  # (V,)
        mean_weight = matrix.mean(dim=0, dtype=torch.float32)  # (D,)
        mean_scores = (rows.float() @ mean_weight)[:, None]  # (N, 1)
        if bias is not None:
            mean_scores += bias.float().mean()
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        share = -label_smoothing / len(weight)  # contribution of the uniform part per row; the chunks add the rest
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = grad_bias = None
        if needs_weight:
            total = rows.sum(dim=0, dtype=torch.float32) if scale is None else (rows * scale).sum(dim=0)
            grad_weight = (total * share).to(weight.dtype).repeat(len(weight), 1)
        if needs_bias:
            count = labelled.sum() if scale is None else (labelled * scale).sum()
            grad_bias = (count * share).to(bias.dtype).repeat(len(bias))
        loss = torch.zeros((), dtype=torch.float32, device=hidden.device)
        chunk = max(1, min(len(rows), CHUNK_ROWS.get(hidden.device.type, CHUNK_ROWS["other"])))
        # All chunks share two buffers, one of them float32: allocating this much memory costs more than the work on
        # it. A compiled graph plans its own memory.
        reuse = not torch.compiler.is_compiling()
        products = rows.new_empty(chunk, len(weight)) if reuse else None
        wide = products.to(torch.float32) if reuse else None  # the same memory if products are float32
        for start in range(0, len(rows), chunk):
            here = slice(start, start + chunk)
            part, seen = rows[here], labelled[here]
            product = products[: len(part)] if reuse else None  # (n, V)
            if offset is None:
                product = torch.mm(part, matrix.t(), out=product)
            else:
                product = torch.addmm(offset, part, matrix.t(), out=product)
            score = wide[: len(part)].copy_(product) if reuse and dtype != torch.float32 else product.float()
            sharp, gradient = sharp_loss(score, target[here], label_smoothing, in_place=reuse)
            each = torch.where(seen, sharp - label_smoothing * mean_scores[here], 0.0)  # (n, 1)
            if scale is not None:
                each, gradient = each * scale[here], gradient * scale[here]
            # Not in place: torch 2.11 compiles a zero gradient for an output that is modified in place.
            loss = loss + each.sum()
            if not any(ctx.needs_input_grad[:3]):
                continue
            rounded = product.copy_(gradient) if reuse and dtype != torch.float32 else gradient.to(dtype)
            if needs_hidden:
                uniform = label_smoothing * mean_weight  # (D,)
                uniform = uniform if scale is None else uniform * scale[here]  # (n, D)
                grad_hidden[here] = torch.where(seen, rounded @ matrix - uniform, 0.0)
            if needs_weight and dtype == weight.dtype:
                grad_weight.addmm_(rounded.t(), part)
            elif needs_weight:
                grad_weight += rounded.t() @ part
            if needs_bias:
                grad_bias += gradient.t() @ seen[:, 0].float()
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        return loss

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        # Scale in place, to hold the weight's gradient only once; a second backward detects this and raises.
        gradients = ctx.saved_tensors
        return *(None if g is None else g.mul_(grad_loss) for g in gradients), None, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    label_smoothing: float = 0.0,
    bias: Tensor | None = None,
    row_weights: Tensor | None = None,
) -> Tensor:
    """Compute `label_smoothed_cross_entropy` of ``hidden @ weight.T + bias`` without materialising the logits.

    Matrix products run in the autocast dtype if autocast is enabled, sums and softmax in float32.

    Args:
        hidden: (N, D).
        weight: (V, D), the output embedding.
        labels: (N,) int64; `IGNORE_INDEX` marks a position without a label.
        label_smoothing: e, in [0, 1).
        bias: (V,); default: none.
        row_weights: (N,) weights of the row losses, without a gradient; default: 1.

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
        return _LinearCrossEntropy.apply(hidden, weight, bias, labels, label_smoothing, dtype, row_weights)


def head_cross_entropy(head: nn.Module, hidden: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Compute `linear_cross_entropy` for an output layer.

    A layer that is not plain (with an adapter, quantised, sharded, offloaded, hooked) is called once and its logits
    are materialised, as in a forward pass with logits, since only the layer itself can compute them.

    Args:
        head: (N, D) -> (N, V), an `nn.Linear` or its replacement; or the word embeddings of an output layer tied to
            them.
        hidden, labels, label_smoothing: see `linear_cross_entropy`.
    """
    if isinstance(head, nn.Embedding):
        return linear_cross_entropy(
            hidden, embedding_table(head, head.num_embeddings, hidden.device), labels, label_smoothing
        )
    if is_plain(head, nn.Linear):
        return linear_cross_entropy(hidden, head.weight, labels, label_smoothing, head.bias)
    return label_smoothed_cross_entropy(head(hidden), labels, label_smoothing)
