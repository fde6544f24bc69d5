"""Fields that jump at a stop: each side of it is seen by its own steps alone."""

import math

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

STOP = 0.7
TIGHT = {"rtol": 1e-9, "atol": 1e-9}
ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]


def jumping(t: Tensor, u: Tensor) -> Tensor:
    """`u' = -u` before the stop, `u' = 5 - 3 u` after it."""
    return torch.where(t < STOP, -u, 5 - 3 * u)


def jumping_late(t: Tensor, u: Tensor) -> Tensor:
    """The same, with the stop itself on the other side."""
    return torch.where(t <= STOP, -u, 5 - 3 * u)


def exact(u0: float, t1: float) -> float:
    return 5 / 3 + (u0 * math.exp(-STOP) - 5 / 3) * math.exp(-3 * (t1 - STOP))


@pytest.mark.parametrize("field", [jumping, jumping_late])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_solution_and_gradient_across_a_jump(field: object, adjoint: object) -> None:
    u0 = torch.tensor([1.5], dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(field, u0, (0.0, 2.0))
    solution = psn.solve(problem, psn.Tsit5(), tstops=[STOP], adjoint=adjoint, **TIGHT)
    (gradient,) = torch.autograd.grad(solution.u1.sum(), u0)
    assert solution.u1.item() == pytest.approx(exact(1.5, 2.0), rel=1e-8)
    expected = math.exp(-STOP - 3 * (2 - STOP))
    assert gradient.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)])
def test_a_stop_saves_the_steps_that_a_jump_costs(tspan: tuple[float, float]) -> None:
    problem = psn.ODEProblem(jumping, torch.ones(1, dtype=torch.float64), tspan)

    def attempts(**options: object) -> int:
        stats = psn.solve(problem, psn.Tsit5(), **TIGHT, **options).stats
        return stats.naccept + stats.nreject

    assert attempts(tstops=[STOP]) < 0.8 * attempts()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_stage_crosses_a_stop(dtype: torch.dtype) -> None:
    """Times of the field never equal the stop, and each step's lie on one side of it."""
    seen: list[float] = []

    def field(t: Tensor, u: Tensor) -> Tensor:
        seen.append(float(t))
        return -u

    problem = psn.ODEProblem(field, torch.ones(1, dtype=dtype), (0.0, 1.0))
    psn.solve(problem, psn.DP8(), tstops=[STOP], rtol=1e-4, atol=1e-4)
    stop = float(torch.tensor(STOP, dtype=dtype))
    assert stop not in seen[2:]
    assert min(seen) == 0.0
    assert max(seen) <= 1.0


def test_dense_output_on_both_sides_of_a_jump() -> None:
    problem = psn.ODEProblem(jumping, torch.full((1,), 1.5, dtype=torch.float64), (0.0, 2.0))
    solution = psn.solve(problem, psn.Tsit5(), tstops=[STOP], **TIGHT)
    assert solution(0.65).item() == pytest.approx(1.5 * math.exp(-0.65), rel=1e-7)
    assert solution(0.75).item() == pytest.approx(exact(1.5, 0.75), rel=1e-7)
