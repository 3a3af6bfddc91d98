"""The recurrence of a convolutional LSTM as one differentiable operation.

autograd would keep some twenty operations of every step, and compute the gradient of the weights in every step. Here
the backward pass has eleven elementwise operations a step, without copies, and one gradient of the weights for all
steps.

Shapes: T steps; B videos; D channels of the states; h, w cells of a map. Gates are in the order i, f, o, g.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import conv2d


def conv_gradient(gradient: Tensor, inputs: Tensor, weight: Tensor, mask: tuple[bool, bool]) -> tuple[Tensor, ...]:
    """Return the gradients of the input and the weight of a convolution of stride 1 that keeps the size.

    Args:
        mask: which of the two are computed; the others are None.
    """
    padding = [side // 2 for side in weight.shape[2:]]
    found = torch.ops.aten.convolution_backward(
        gradient, inputs, weight, None, [1, 1], padding, [1, 1], False, [0, 0], 1, [*mask, False]
    )
    return found[:2]


class ConvLSTMScan(torch.autograd.Function):
    """The hidden states of all steps, and the last cell; see `scan`."""

    @staticmethod
    def forward(ctx: Any, driven, weight, bias, peephole, hidden, cell, steps):
        """See `scan`; without a state, hidden and cell are None."""
        D = weight.shape[1]
        start = hidden is None
        shape = (driven.shape[1], D, *driven.shape[3:]) if start else hidden.shape
        empty = weight.new_empty
        gates, squashed = empty(steps, shape[0], 4 * D, *shape[2:]), empty(steps, *shape)
        hiddens, cells = empty(steps + 1, *shape), empty(steps + 1, *shape)
        for states, first in ((hiddens, hidden), (cells, cell)):
            states[0] = 0.0 if start else first
        padding = [side // 2 for side in weight.shape[2:]]
        for t in range(steps):
            now = gates[t]
            if start and t == 0:
                now.copy_(driven[t])
            elif driven is None:
                now.copy_(conv2d(hiddens[t], weight, bias, padding=padding))
            else:
                torch.add(conv2d(hiddens[t], weight, bias, padding=padding), driven[t], out=now)
            write, keep, output, new = now.chunk(4, dim=1)
            if peephole is not None:
                write.addcmul_(peephole[0], cells[t])
                keep.addcmul_(peephole[1], cells[t])
                now[:, : 2 * D].sigmoid_()
            else:
                now[:, : 3 * D].sigmoid_()
            new.tanh_()
            after = torch.mul(write, new, out=cells[t + 1])
            after.addcmul_(keep, cells[t])
            if peephole is not None:
                output.addcmul_(peephole[2], after).sigmoid_()
            torch.tanh(after, out=squashed[t])
            torch.mul(output, squashed[t], out=hiddens[t + 1])
        ctx.save_for_backward(weight, peephole, gates, squashed, hiddens, cells)
        ctx.start, ctx.is_driven, ctx.has_bias = start, driven is not None, bias is not None
        return hiddens[1:], cells[-1].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_hiddens: Tensor, d_cell: Tensor):
        """Gradients of the arguments of `forward`."""
        weight, peephole, gates, squashed, hiddens, cells = ctx.saved_tensors
        D, steps = weight.shape[1], len(gates)
        d_gates, d_cell, d_hidden = torch.empty_like(gates), d_cell.clone(), None
        for t in reversed(range(steps)):
            d_out = d_hiddens[t] if d_hidden is None else d_hidden.add_(d_hiddens[t])
            write, keep, output, new = gates[t].chunk(4, dim=1)
            d_now = d_gates[t]
            d_write, d_keep, d_output, d_new = d_now.chunk(4, dim=1)
            torch.mul(d_out, squashed[t], out=d_output)
            d_cell += torch.ops.aten.tanh_backward(d_out * output, squashed[t])
            if peephole is not None:
                sigmoid_backward(d_output, output)
                d_cell.addcmul_(d_output, peephole[2])
            torch.mul(d_cell, new, out=d_write)
            torch.mul(d_cell, cells[t], out=d_keep)
            torch.mul(d_cell, write, out=d_new)
            squeezed = slice(0, 3 * D if peephole is None else 2 * D)
            sigmoid_backward(d_now[:, squeezed], gates[t][:, squeezed])
            torch.ops.aten.tanh_backward.grad_input(d_new, new, grad_input=d_new)
            d_cell *= keep
            if peephole is not None:
                d_cell.addcmul_(d_write, peephole[0]).addcmul_(d_keep, peephole[1])
            if t or not ctx.start:
                d_hidden, _ = conv_gradient(d_now, hiddens[t], weight, (True, False))
        first = int(ctx.start)
        _, d_weight = conv_gradient(
            d_gates[first:].flatten(0, 1), hiddens[first:-1].flatten(0, 1), weight, (False, True)
        )
        d_peephole = None
        if peephole is not None:
            parts = d_gates.unflatten(2, (4, D))
            each = [parts[:, :, 0] * cells[:-1], parts[:, :, 1] * cells[:-1], parts[:, :, 2] * cells[1:]]
            d_peephole = torch.stack([part.sum(dim=(0, 1)).sum_to_size(peephole.shape[1:]) for part in each])
        d_bias = d_gates.sum(dim=(0, 1, 3, 4)) if ctx.has_bias else None
        d_driven = d_gates if ctx.is_driven else None
        d_state = (None, None) if ctx.start else (d_hidden, d_cell)
        return d_driven, d_weight, d_bias, d_peephole, *d_state, None


def sigmoid_backward(gradient: Tensor, value: Tensor) -> None:
    """Replace the gradient of a sigmoid by that of its argument."""
    torch.ops.aten.sigmoid_backward.grad_input(gradient, value, grad_input=gradient)


def scan(
    driven: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    peephole: Tensor | None,
    hidden: Tensor | None,
    cell: Tensor | None,
    steps: int,
) -> tuple[Tensor, Tensor]:
    """Compute the hidden states (T, B, D, h, w) of all steps, and the last cell (B, D, h, w).

    Args:
        driven: (T, B, 4 D, h, w), the input's part of the gates; None if there is no input.
        weight, bias: of the convolution of the hidden state.
        peephole: (3, D, h or 1, w or 1) weights of the cell in i, f and o.
        hidden, cell: state before the first step, (B, D, h, w); None for zeros, if there is input.
    """
    return ConvLSTMScan.apply(driven, weight, bias, peephole, hidden, cell, steps)
