"""Neural ordinary differential equation, integrated with fixed steps, and its adjoint (Chen et al. 2018,
arXiv:1806.07366; FLOATER: Liu et al. 2020, arXiv:2003.09229, section 3).

    states at position 0 (R, D) -> Runge-Kutta steps of order 4 through positions 1, 2, ... -> states (N, R, D)

The method is the 3/8 rule, torchdiffeq's "rk4", which the authors of FLOATER use.

Shapes: R independent states that follow one vector field; N positions; D size of a state; F hidden size of the field.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.utils.generic import maybe_autocast

SUBSTEPS = 5  # Runge-Kutta steps between two positions (section 3.1)
STAGES = 4 * SUBSTEPS  # evaluations of the field between two positions
CHUNK = 2**22  # numbers of one kind that the adjoint recomputes at once


class Dynamics(nn.Module):
    """Vector field h(t, p): two linear layers with ReLU; the time is a further input of both (section 4.1).

    The last layer starts at zero, so that the states of a new model do not change with position.

    Args:
        dim: D.
        hidden_size: F.
    """

    def __init__(self, dim: int, hidden_size: int):
        super().__init__()
        # Not `nn.Linear`, because the integrator reads the weights: adapters and quantisers replace linear layers.
        self.up_weight = nn.Parameter(torch.empty(hidden_size, dim + 1))  # the last column is that of the time
        self.up_bias = nn.Parameter(torch.empty(hidden_size))
        self.down_weight = nn.Parameter(torch.empty(dim, hidden_size + 1))
        self.down_bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the first layer by Xavier normal, as the authors do, and the last one to zero."""
        init.xavier_normal_(self.up_weight)
        for parameter in (self.up_bias, self.down_weight, self.down_bias):
            init.zeros_(parameter)

    def forward(self, time: Tensor | float, states: Tensor) -> Tensor:
        """Evaluate the field: a scalar time and states (..., D) -> (..., D)."""
        time = torch.as_tensor(time, dtype=states.dtype, device=states.device).expand(*states.shape[:-1], 1)
        hidden = nn.functional.linear(torch.cat([states, time], dim=-1), self.up_weight, self.up_bias).relu()
        return nn.functional.linear(torch.cat([hidden, time], dim=-1), self.down_weight, self.down_bias)

    def integrate(self, start: Tensor, count: int, step: float, first: int = 0, adjoint: bool = True) -> Tensor:
        """Integrate from one position to the next ones, in float32 or above.

        The adjoint is that of the integrator itself, so both gradients are equal but for rounding. It keeps one state
        per position instead of 20 and their graph, and takes a fraction of the time: everything but the recursion over
        positions is a product of large matrices.

        Args:
            start: (R, D), states at position ``first``.
            count: N, number of positions, ``start`` included.
            step: time between two positions, Delta.
            first: number of the first position.
            adjoint: compute gradients by the adjoint instead of automatic differentiation of every evaluation.

        Returns:
            (N, R, D), states at positions ``first`` to ``first + N - 1``.
        """
        weights = (self.up_weight, self.up_bias, self.down_weight, self.down_bias)
        wide = torch.promote_types(start.dtype, torch.float32)
        with maybe_autocast(start.device.type, enabled=False):
            start, *weights = (tensor.to(wide) for tensor in (start, *weights))
            arguments = (start, *weights, count, step, first)
            return Trajectory.apply(*arguments) if adjoint else trajectory(*arguments)


class Field:
    """A vector field at the times of the Runge-Kutta stages; its layers without the time, whose part is a bias."""

    def __init__(self, weights: tuple[Tensor, ...], count: int, step: float, first: int):
        up, up_bias, down, down_bias = weights
        times = torch.arange(3 * SUBSTEPS * (count - 1) + 1, dtype=torch.float64, device=up.device)
        self.times = ((times + 3 * SUBSTEPS * first) * (step / (3 * SUBSTEPS))).to(up.dtype)  # (M,), thirds of steps
        self.up, self.down = up[:, :-1].t().contiguous(), down[:, :-1].t().contiguous()  # (D, F), (F, D)
        self.up_biases = up_bias + self.times[:, None] * up[:, -1]  # (M, F)
        self.down_biases = down_bias + self.times[:, None] * down[:, -1]  # (M, D)


def stage_times(count: int) -> Tensor:
    """Return the index into `Field.times` of every stage of every interval between positions, (N - 1, STAGES)."""
    offsets = torch.tensor([3 * substep + third for substep in range(SUBSTEPS) for third in range(4)])
    return 3 * SUBSTEPS * torch.arange(count - 1)[:, None] + offsets


def stage_input(states: Tensor, slopes: list[Tensor], width: float) -> Tensor:
    """Return the input of the next stage of a Runge-Kutta step, or after the last one, the states after the step.

    Args:
        states: before the step.
        slopes: outputs of the field in the stages so far.
        width: time of the step.
    """
    if not slopes:
        return states
    if len(slopes) == 1:
        return torch.add(states, slopes[0], alpha=width / 3)
    if len(slopes) == 2:
        return torch.add(states, torch.sub(slopes[1], slopes[0], alpha=1 / 3), alpha=width)
    if len(slopes) == 3:
        return torch.add(states, slopes[0] - slopes[1] + slopes[2], alpha=width)
    slope = torch.add(slopes[0] + slopes[3], slopes[1] + slopes[2], alpha=3.0)
    return torch.add(states, slope, alpha=width / 8)


def slope_gradient(after: Tensor, found: list[Tensor], zero: Tensor, out: Tensor) -> Tensor:
    """Return the gradient by the slope of a stage, the adjoint of `stage_input`, divided by the time of the step.

    Args:
        after: gradient by the states after the step.
        found: gradients by the inputs of the following stages, the last one first.
        zero: a zero of any shape; adding to it takes a third of the time of multiplying by a number.
        out: filled with the result.
    """
    if not found:
        return torch.add(zero, after, alpha=1 / 8, out=out)
    if len(found) == 1:
        return torch.add(found[0], after, alpha=3 / 8, out=out)
    if len(found) == 2:
        return torch.add(found[1] - found[0], after, alpha=3 / 8, out=out)
    inner = torch.add(found[0], found[2] - found[1], alpha=1 / 3)
    return torch.add(inner, after, alpha=1 / 8, out=out)


def trajectory(
    start: Tensor,
    up: Tensor,
    up_bias: Tensor,
    down: Tensor,
    down_bias: Tensor,
    count: int,
    step: float,
    first: int,
) -> Tensor:
    """Integrate, see `Dynamics.integrate`: (R, D) -> (N, R, D)."""
    field, width = Field((up, up_bias, down, down_bias), count, step, first), step / SUBSTEPS
    up_biases, down_biases = field.up_biases.unbind(), field.down_biases.unbind()

    def evaluate(time: int, states: Tensor) -> Tensor:
        return torch.addmm(down_biases[time], torch.addmm(up_biases[time], states, field.up).relu_(), field.down)

    states, found = start, [start]
    for position in range(count - 1):
        for substep in range(SUBSTEPS):
            time = 3 * (SUBSTEPS * position + substep)
            slopes: list[Tensor] = []
            for stage in range(4):
                slopes.append(evaluate(time + stage, stage_input(states, slopes, width)))
            states = stage_input(states, slopes, width)
        found.append(states)
    return torch.stack(found)


class Trajectory(torch.autograd.Function):
    """`trajectory`, differentiated by the adjoint of the Runge-Kutta steps."""

    @staticmethod
    def forward(ctx, start, up, up_bias, down, down_bias, count, step, first) -> Tensor:
        """See `trajectory`."""
        table = trajectory(start, up, up_bias, down, down_bias, count, step, first)
        ctx.save_for_backward(table, up, up_bias, down, down_bias)
        ctx.step, ctx.first = step, first
        return table

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Go back from the last position to the first, see `adjoint`."""
        table, *weights = ctx.saved_tensors
        return *adjoint(table, gradients, tuple(weights), ctx.step, ctx.first), None, None, None


def adjoint(
    table: Tensor, gradients: Tensor, weights: tuple[Tensor, ...], step: float, first: int
) -> tuple[Tensor, ...]:
    """Return the gradients of start and weights.

    The states at the positions are known, so the stages of many intervals are recomputed at once; only the gradient
    of the states, one matrix (R, D), goes through them one by one.

    Args:
        table, gradients: (N, R, D), states and gradients of the loss by them.
        weights: of `Dynamics`.
        step, first: see `Dynamics.integrate`.
    """
    (N, R, D), F = table.shape, len(weights[1])
    field, width, times = Field(weights, N, step, first), step / SUBSTEPS, stage_times(N).to(table.device)
    into_hidden, into_states = weights[2][:, :-1].contiguous(), weights[0][:, :-1].contiguous()  # (D, F), (F, D)
    into_hidden, zero = into_hidden * width, torch.zeros_like(table[0])  # `slope_gradient` is without the width
    totals = [torch.zeros_like(weight) for weight in weights]
    moving = gradients[-1]  # (R, D), gradient by the state at the current position
    size = max(1, CHUNK // (STAGES * R * max(D, F)))
    for end in range(N - 1, 0, -size):
        begin = max(0, end - size)
        inputs, hidden = stages(field, table[begin:end], times[begin:end], width)  # (STAGES, C, R, D), (..., F)
        slopes, sums = torch.empty_like(inputs), torch.empty_like(hidden)  # gradients by outputs and by sums of layers
        # Views of single matrices: [stage][interval].
        active, by_slope, by_sum = (
            [list(rows) for rows in tensor] for tensor in ((hidden > 0).to(hidden), slopes, sums)
        )
        for position in range(end - 1, begin - 1, -1):
            interval = position - begin
            for substep in range(SUBSTEPS - 1, -1, -1):
                found: list[Tensor] = []  # gradients by the inputs of the last stages, the last one first
                for stage in range(3, -1, -1):
                    place = 4 * substep + stage
                    slope = slope_gradient(moving, found, zero, by_slope[place][interval])
                    inside = torch.mm(slope, into_hidden, out=by_sum[place][interval]).mul_(active[place][interval])
                    found.append(inside @ into_states)
                moving = moving + (found[0] + found[1]) + (found[2] + found[3])
            moving = moving + gradients[position]
        of_stages = field.times[times[begin:end].t()][..., None, None].expand(-1, -1, R, 1)
        for weight, bias, errors, states in ((0, 1, sums, inputs), (2, 3, slopes.mul_(width), hidden)):
            errors = errors.flatten(0, -2)
            totals[weight] += errors.t() @ torch.cat([states, of_stages], dim=-1).flatten(0, -2)
            totals[bias] += errors.sum(dim=0)
    return moving, *totals


def stages(field: Field, states: Tensor, times: Tensor, width: float) -> tuple[Tensor, Tensor]:
    """Compute the inputs (STAGES, C, R, D) of the field and its hidden states (STAGES, C, R, F) in C intervals.

    Args:
        states: (C, R, D) at the beginning of each interval.
        times: (C, STAGES), of `stage_times`.
        width: of a Runge-Kutta step.
    """
    inputs, hiddens = [], []
    for substep in range(SUBSTEPS):
        slopes: list[Tensor] = []
        for stage in range(4):
            time = times[:, 4 * substep + stage]
            inputs.append(stage_input(states, slopes, width))
            hiddens.append((inputs[-1] @ field.up + field.up_biases[time][:, None]).relu_())
            slopes.append(hiddens[-1] @ field.down + field.down_biases[time][:, None])
        states = stage_input(states, slopes, width)
    return torch.stack(inputs), torch.stack(hiddens)
