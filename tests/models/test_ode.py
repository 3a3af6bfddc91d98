"""The integrator of FLOATER and its adjoint, against torchdiffeq and against automatic differentiation."""

import math

import pytest
import torch
from torch import nn

from hf_tfm.models import ode
from hf_tfm.models.ode import Dynamics
from hf_tfm.models.positions import sinusoidal

ROWS, DIM, COUNT, STEP = 5, 8, 7, 0.1


def make_dynamics(scale: float = 0.5, dtype: torch.dtype = torch.float64) -> Dynamics:
    torch.manual_seed(0)
    dynamics = Dynamics(DIM, 12).to(dtype)
    with torch.no_grad():
        for parameter in dynamics.parameters():
            parameter.copy_(scale * torch.randn_like(parameter))
    return dynamics


def gradients(dynamics: Dynamics, table: torch.Tensor, start: torch.Tensor) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad((table * torch.randn_like(table)).sum(), [start, *dynamics.parameters()]))


@pytest.fixture
def start():
    torch.manual_seed(2)
    return torch.randn(ROWS, DIM, dtype=torch.float64, requires_grad=True)


def test_a_new_field_is_zero(start):
    dynamics = Dynamics(DIM, 12).double()
    assert not dynamics(0.3, start).any()
    assert torch.equal(dynamics.integrate(start, COUNT, STEP), start.expand(COUNT, -1, -1))


@pytest.mark.parametrize("chunk", [ode.CHUNK, 1])
def test_adjoint_is_the_gradient_of_the_integrator(start, monkeypatch, chunk):
    """Also if it recomputes one interval at a time."""
    monkeypatch.setattr(ode, "CHUNK", chunk)
    dynamics = make_dynamics()
    found = [dynamics.integrate(start, COUNT, STEP, 3, adjoint) for adjoint in (True, False)]
    assert torch.equal(*found)
    for ours, autograd in zip(*(gradients(dynamics, table, start) for table in found), strict=True):
        torch.testing.assert_close(ours, autograd, rtol=1e-10, atol=1e-10)


def test_integration_can_be_continued(start):
    dynamics = make_dynamics()
    whole = dynamics.integrate(start, COUNT, STEP)
    rest = dynamics.integrate(whole[3], COUNT - 3, STEP, first=3)
    torch.testing.assert_close(rest, whole[3:], rtol=0, atol=1e-12)


def test_states_and_gradients_of_torchdiffeq(start):
    """Its Runge-Kutta method of order 4 on the same grid, and its adjoint, which integrates backwards."""
    torchdiffeq = pytest.importorskip("torchdiffeq", reason="needs pip install hf-tfm[test]")
    dynamics = make_dynamics(scale=0.2)
    times = torch.arange(COUNT, dtype=torch.float64) * STEP
    options = {"method": "rk4", "options": {"step_size": STEP / ode.SUBSTEPS}}
    ours = dynamics.integrate(start, COUNT, STEP)
    theirs = torchdiffeq.odeint_adjoint(dynamics, start, times, **options)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    for own, their in zip(gradients(dynamics, ours, start), gradients(dynamics, theirs, start), strict=True):
        torch.testing.assert_close(own, their, rtol=1e-5, atol=1e-6)


class SineField(nn.Module):
    """Derivative of the sinusoids of a position: the time of position i is ``step`` i."""

    def __init__(self, dim: int, step: float):
        super().__init__()
        self.rates = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim) / step
        self.turn = torch.cat([torch.zeros(dim // 2), torch.full((dim // 2,), math.pi / 2)])

    def forward(self, time: float) -> torch.Tensor:
        rates = self.rates.repeat(2)
        return rates * torch.cos(rates * time + self.turn)


def test_derivative_of_the_sinusoids_gives_the_sinusoidal_table(monkeypatch):
    """The stages are those of one Runge-Kutta method: the field at them is replaced by the derivative."""
    field, dim = SineField(DIM, STEP), DIM
    dynamics = make_dynamics()
    with torch.no_grad():
        dynamics.down_weight.zero_(), dynamics.down_bias.zero_()
    original = ode.Field.__init__

    def sinusoids(self, *args):
        original(self, *args)
        self.down_biases = torch.stack([field(float(time)) for time in self.times])

    monkeypatch.setattr(ode.Field, "__init__", sinusoids)
    table = dynamics.integrate(sinusoidal(torch.zeros(1), dim).double(), 40, STEP, adjoint=False)
    torch.testing.assert_close(table[:, 0].float(), sinusoidal(torch.arange(40), dim), rtol=0, atol=1e-5)


def test_autocast_does_not_round_the_states():
    dynamics = make_dynamics(dtype=torch.float32)
    start = torch.randn(ROWS, DIM)
    with torch.autocast("cpu", torch.bfloat16):
        found = dynamics.integrate(start, COUNT, STEP)
    assert found.dtype == torch.float32 and torch.equal(found, dynamics.integrate(start, COUNT, STEP))
