"""Fields that jump at a stop: each side of it is seen by its own steps alone."""

import math
import time

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


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
def test_gradients_of_the_values_of_a_table_in_time(adjoint: object) -> None:
    """`u' = c(t) - u` with `c` linear between knots: `du(1)/dc_k = int exp(t - 1) hat_k(t) dt`.

    The adjoint state is smooth there and its steps would go over the knots.
    """
    knots = torch.linspace(0, 1, 5, dtype=torch.float64)
    values = torch.tensor([0.3, -1.0, 0.8, 2.0, -0.4], dtype=torch.float64, requires_grad=True)
    slopes = values.diff() / knots.diff()

    def field(t: Tensor, u: Tensor, c: Tensor) -> Tensor:
        i = torch.searchsorted(knots, t.detach(), right=True).sub(1).clamp(0, 3)
        return c[i] + (t - knots[i]) / 0.25 * (c[i + 1] - c[i]) - u

    u0 = torch.zeros(1, dtype=torch.float64)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0), p=values)
    stops = knots[1:-1].tolist()
    u1 = psn.solve(problem, psn.Tsit5(), tstops=stops, adjoint=adjoint, **TIGHT).u1
    # By parts: `u = c - c'` solves the equation on a piece, up to a multiple of exp(-t).
    past = torch.exp(knots - 1)
    exact = values[-1] - past[0] * values[0] - (slopes * past.diff()).sum()
    torch.testing.assert_close(u1[0], exact, rtol=1e-8, atol=0)
    found, expected = (
        torch.autograd.grad(x.sum(), values, retain_graph=True)[0] for x in (u1, exact)
    )
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


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


def test_many_stops_cost_linear_time() -> None:
    def seconds(count: int) -> float:
        stops = [i / count for i in range(1, count)]
        problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2), (0.0, 1.0))
        start = time.process_time()
        psn.solve(problem, psn.BS3(), tstops=stops)
        return time.process_time() - start

    seconds(100)
    assert seconds(1600) < 16 * seconds(200)


def test_steps_end_on_stops_to_the_last_bit() -> None:
    """A stop is neither missed nor passed by what rounding leaves of a step."""
    stops = [0.1, 0.3, 1 / 3, 0.7]
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1, dtype=torch.float64), (-0.2, 0.9))
    solution = psn.solve(problem, psn.Euler(), controller=psn.FixedStep(), dt0=0.25, tstops=stops)
    assert set(stops) <= set(solution.step_times.tolist())


def test_a_grid_is_seen_as_it_is_and_a_stop_from_inside() -> None:
    """`FixedStep(times)`: the field's values at the grid's own times, from both sides."""
    table = torch.tensor([0.0, 1.0, 2.0, 3.5, 0.0], dtype=torch.float64)
    grid = (0.0, 0.25, 0.5, 0.75, 1.0)
    problem = psn.ODEProblem(
        lambda t, u: table[(t * 4).long()].expand(1), torch.zeros(1).double(), (0.0, 1.0)
    )
    fixed = {"controller": psn.FixedStep(grid), "saveat": grid}
    solution = psn.solve(problem, psn.Heun(), **fixed)
    # The trapezoidal rule on the table's values.
    assert solution.u1.item() == (0 + 1) / 8 + (1 + 2) / 8 + (2 + 3.5) / 8 + 3.5 / 8
    assert solution.step_times.tolist() == list(grid)
    stopped = psn.solve(problem, psn.Heun(), tstops=grid, **fixed)
    # The end of the interval is no stop.
    assert stopped.u1.item() == (0 + 1 + 2) / 4 + 3.5 / 8


def test_a_grid_that_is_out_of_order() -> None:
    with pytest.raises(ValueError, match="strictly increasing or strictly decreasing"):
        psn.FixedStep((0.0, 0.5, 0.4))
