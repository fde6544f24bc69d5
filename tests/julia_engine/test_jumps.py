"""Fields that jump at a stop: each side of it is evaluated with the field of that side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

pytestmark = pytest.mark.julia

D = torch.float64
EXPLICIT = [
    psn.DiscreteAdjoint(),
    psn.ForwardDiffSensitivity(),
    psn.GaussAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.BacksolveAdjoint(),
    psn.QuadratureAdjoint(),
]
FIELDS: dict[str, Any] = {
    "source": psn.JuliaField("(u, p, t) -> t < 0.5 ? -p[1] .* u : p[2] .* sin.(u)"),
    "in place": psn.JuliaField(
        "(du, u, p, t) -> t < 0.5 ? (du .= .-p[1] .* u) : (du .= p[2] .* sin.(u))"
    ),
    "callback": lambda t, u, p: -p[0] * u if t < 0.5 else p[1] * torch.sin(u),
}


def exact(p: Tensor, u0: Tensor, t1: Tensor) -> Tensor:
    """`tan(u / 2)` grows by `exp(p1 (t1 - 1/2))` after the jump."""
    middle = u0 * torch.exp(-p[0] / 2)
    return 2 * torch.atan(torch.tan(middle / 2) * torch.exp(p[1] * (t1 - 0.5)))


@pytest.mark.parametrize("adjoint", EXPLICIT, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("field", FIELDS)
def test_gradients_across_a_jump(field: str, adjoint: Any) -> None:
    """Those of p are (-0.5121, 0.4708)."""
    p = torch.tensor([0.7, 1.3], dtype=D, requires_grad=True)
    u0 = torch.ones(1, dtype=D, requires_grad=True)
    t1 = torch.tensor(1.0, dtype=D, requires_grad=True)
    problem = psn.ODEProblem(FIELDS[field], u0, (0.0, t1), p=p)
    solution = psn.solve(
        problem, psn.Tsit5(), tstops=[0.5], engine="julia", rtol=1e-9, atol=1e-9, adjoint=adjoint
    )
    value = exact(p, u0, t1)
    torch.testing.assert_close(solution.u1, value, rtol=1e-8, atol=0)
    found = torch.autograd.grad(solution.u1.sum(), (p, u0, t1))
    expected = torch.autograd.grad(value.sum(), (p, u0, t1))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(
        found[0], torch.tensor([-0.5121, 0.4708], dtype=D), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    "adjoint", [psn.GaussAdjoint(), psn.QuadratureAdjoint()], ids=lambda a: type(a).__name__
)
def test_implicit_methods_across_a_jump(adjoint: Any) -> None:
    """States, dense output on both sides, and gradients."""
    p = torch.tensor([0.7, 1.3], dtype=D, requires_grad=True)
    u0 = torch.ones(1, dtype=D, requires_grad=True)
    t1 = torch.tensor(1.0, dtype=D)
    problem = psn.ODEProblem(FIELDS["source"], u0, (0.0, 1.0), p=p)
    solution = psn.solve(
        problem, psn.Rodas5P(), tstops=[0.5], saveat=[0.25, 0.5, 0.75], engine="julia",
        rtol=1e-10, atol=1e-10, adjoint=adjoint,
    )  # fmt: skip
    values = torch.stack(
        [u0 * torch.exp(-p[0] * t) for t in (0.25, 0.5)] + [exact(p, u0, t1 - 0.25)]
    )
    torch.testing.assert_close(solution.u, values, rtol=1e-8, atol=0)
    times = torch.tensor([0.1, 0.5, 0.9], dtype=D)
    between = torch.stack(
        [u0 * torch.exp(-p[0] * t) for t in (0.1, 0.5)] + [exact(p, u0, t1 - 0.1)]
    )
    torch.testing.assert_close(solution(times), between, rtol=1e-6, atol=0)
    for mine, other in ((solution.u, values), (solution(times), between)):
        found = torch.autograd.grad(mine.square().sum(), (p, u0), retain_graph=True)
        expected = torch.autograd.grad(other.square().sum(), (p, u0), retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_forward_sensitivities_without_parameters() -> None:
    u0 = torch.tensor([0.3, 1.1], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -t * u, u0, (0.0, 1.0))
    solution = psn.solve(
        problem, saveat=[0.5], adjoint=psn.ForwardDiffSensitivity(), engine="julia", rtol=1e-9,
        atol=1e-9,
    )  # fmt: skip
    (found,) = torch.autograd.grad(solution.u.sum() + solution.u1.sum(), u0)
    factor = torch.exp(torch.tensor(-0.125, dtype=D)) + torch.exp(torch.tensor(-0.5, dtype=D))
    torch.testing.assert_close(found, factor.expand(2), rtol=1e-7, atol=0)


@pytest.mark.parametrize("complex_state", [False, True])
def test_forward_sensitivities_are_the_replayed_ones(complex_state: bool) -> None:
    """To rounding: they are derivatives of the same steps."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    net = net.double()

    class Field(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return self.net(u) * t

    def gradients(adjoint: Any) -> tuple[Tensor, ...]:
        dtype = torch.complex128 if complex_state else D
        u0 = torch.tensor([[0.3, -0.2]], dtype=dtype, requires_grad=True)
        times = torch.tensor([0.3, 0.8], dtype=D, requires_grad=True)
        w = torch.tensor(0.7, dtype=dtype, requires_grad=True)
        module = Field()
        field: Any = (lambda t, u: -w * u * t) if complex_state else module
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        solution = psn.solve(problem, psn.Vern7(), saveat=times, adjoint=adjoint, engine="julia")
        loss = solution.u.abs().square().sum() + solution.u1.real.sum()
        sources = (w,) if complex_state else tuple(module.parameters())
        return torch.autograd.grad(loss, (u0, times, *sources))

    found, expected = (gradients(a) for a in (psn.ForwardDiffSensitivity(), psn.DiscreteAdjoint()))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
