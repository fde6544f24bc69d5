"""What happens on the time axis: where the field is called, where steps end, what is saved."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from conformance.problems import ALGORITHMS, EPS, KNOWN, dense_rounding
from torch import Tensor

import pysciml_node as psn

SPANS = [(0.0, 1.0), (0.1, 0.7), (1.3, -0.4), (-1e3, -999.7), (0.0, 1e-6)]


def oscillator(t: Tensor, u: Tensor) -> Tensor:
    return torch.stack((u[..., 1], -u[..., 0] + 0.1 * torch.cos(3 * t)), -1)


def start(dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor([[1.0, 0.0], [0.3, -0.5]], dtype=dtype)


def recorded(
    f: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Callable[[Tensor, Tensor], Tensor], list[float]]:
    """A field and the list of the times at which it is called."""
    times: list[float] = []

    def field(t: Tensor, u: Tensor) -> Tensor:
        times.append(t.item())
        return f(t, u)

    return field, times


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tspan", SPANS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_field_is_never_called_outside_the_interval(
    name: str, tspan: tuple[float, float], dtype: torch.dtype, engine: str
) -> None:
    """Fields with logarithms, roots or tabulated inputs end where the interval ends."""
    field, times = recorded(oscillator)
    problem = psn.ODEProblem(field, start(dtype), tspan)
    middle = tspan[0] + 0.37 * (tspan[1] - tspan[0])
    solution = psn.solve(
        problem, getattr(psn, name)(), rtol=1e-3, atol=1e-3, saveat=[middle], engine=engine
    )
    solution(middle)
    # The ends as the field sees them, in the state's precision.
    low, high = sorted(torch.tensor(tspan, dtype=dtype).tolist())
    assert low <= min(times)
    assert max(times) <= high


@pytest.mark.parametrize("tspan", SPANS)
def test_times_stay_inside_with_gradients_of_the_ends(
    tspan: tuple[float, float], engine: str
) -> None:
    field, times = recorded(oscillator)
    ends = tuple(torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in tspan)
    solution = psn.solve(psn.ODEProblem(field, start(), ends), psn.Tsit5(), engine=engine)
    solution.u1.sum().backward()
    low, high = sorted(tspan)
    assert low <= min(times)
    assert max(times) <= high


@pytest.mark.parametrize("tspan", SPANS)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_solve_ends_at_the_end(name: str, tspan: tuple[float, float], engine: str) -> None:
    problem = psn.ODEProblem(oscillator, start(), tspan)
    solution = psn.solve(problem, getattr(psn, name)(), rtol=1e-3, atol=1e-3, engine=engine)
    assert solution.retcode is psn.ReturnCode.Success
    assert solution.t[0].item() == tspan[0]
    assert solution.t[-1].item() == tspan[1]
    torch.testing.assert_close(solution.u[0], problem.u0, rtol=0, atol=0)
    torch.testing.assert_close(solution.u[-1], solution.u1, rtol=0, atol=0)
    torch.testing.assert_close(solution(tspan[1]), solution.u1, rtol=0, atol=0)
    steps = solution.t.diff() * math.copysign(1.0, tspan[1] - tspan[0])
    assert bool((steps > 0).all())


def test_the_state_at_the_end_is_the_last_steps_own_result(engine: str) -> None:
    """With a step of 0.4 over (0, 1), Euler's last step is one of 0.2."""
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1, dtype=torch.float64), (0.0, 1.0))
    solution = psn.solve(
        problem, psn.Euler(), controller=psn.FixedStep(), dt0=0.4, saveat=[1.0], engine=engine
    )
    expected = torch.tensor([0.6 * 0.6 * 0.8], dtype=torch.float64)
    # Three steps of a product and a sum.
    torch.testing.assert_close(solution.u1, expected, rtol=6 * EPS, atol=0)
    torch.testing.assert_close(solution.u, expected[None], rtol=6 * EPS, atol=0)


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_saved_states_are_the_dense_output(
    name: str, tspan: tuple[float, float], engine: str
) -> None:
    """And asking for them changes no step."""
    algorithm = getattr(psn, name)()
    problem = psn.ODEProblem(oscillator, start(), tspan)
    plain = psn.solve(problem, algorithm, rtol=1e-3, atol=1e-3, engine=engine)
    times = torch.linspace(*tspan, 23, dtype=torch.float64)
    saved = psn.solve(problem, algorithm, rtol=1e-3, atol=1e-3, saveat=times, engine=engine)
    assert torch.equal(saved.t, times)
    assert saved.u.shape == (23, 2, 2)
    with torch.no_grad():
        rates = torch.stack([oscillator(t, u) for t, u in zip(plain.t, plain.u, strict=True)])
        h = float(plain.t.diff().abs().max())
        bound = dense_rounding(algorithm.tableau, h, plain.u, rates)
        torch.testing.assert_close(saved.u, plain(times), rtol=0, atol=bound)
    assert torch.equal(saved.step_times, plain.t)
    assert torch.equal(saved.u1, plain.u1)
    assert saved.stats.naccept == plain.stats.naccept
    assert saved.stats.nreject == plain.stats.nreject


def test_saveat_takes_repeated_times_and_the_ends(engine: str) -> None:
    problem = psn.ODEProblem(oscillator, start(), (0.0, 1.0))
    solution = psn.solve(problem, saveat=[0.0, 0.0, 0.5, 0.5, 1.0, 1.0], engine=engine)
    assert torch.equal(solution.u[0], problem.u0)
    for first in (0, 2, 4):
        assert torch.equal(solution.u[first], solution.u[first + 1])
    assert torch.equal(solution.u[-1], solution.u1)


@pytest.mark.parametrize("tspan", [(0.0, 2.0), (2.0, 0.0)])
def test_steps_end_on_tstops(tspan: tuple[float, float], engine: str) -> None:
    stops = [0.3, 1.7, 1 / 3, 1.2345678901234567]
    problem = psn.ODEProblem(oscillator, start(), tspan)
    for controller in (None, psn.FixedStep()):
        solution = psn.solve(
            problem, psn.Tsit5(), tstops=stops, dt0=0.2, controller=controller, engine=engine
        )
        assert set(stops) <= set(solution.t.tolist())


def test_tstops_restore_the_order_at_a_kink(engine: str) -> None:
    """`u' = |t - 1/3|`: polynomials on either side, so that all but the solve's start is exact."""
    kink = 1 / 3
    problem = psn.ODEProblem(
        lambda t, u: (t - kink).abs() * torch.ones_like(u),
        torch.zeros(1, dtype=torch.float64),
        (0.0, 1.0),
    )
    exact = kink**2 / 2 + (1 - kink) ** 2 / 2
    options = {"rtol": 1e-9, "atol": 1e-9, "engine": engine}
    with_stop = psn.solve(problem, psn.Tsit5(), tstops=[kink], **options)
    without = psn.solve(problem, psn.Tsit5(), **options)
    # All terms are below 1, and each step adds seven.
    assert with_stop.u1.item() == pytest.approx(exact, abs=8 * EPS * with_stop.stats.naccept)
    assert with_stop.stats.nreject == 0
    assert without.stats.nreject > 0


def test_dt0_is_the_first_step(engine: str) -> None:
    problem = psn.ODEProblem(oscillator, start(), (0.0, 1.0))
    solution = psn.solve(problem, dt0=1e-3, engine=engine)
    assert solution.t[1].item() == 1e-3
    backward = psn.ODEProblem(oscillator, start(), (1.0, 0.0))
    assert psn.solve(backward, dt0=1e-3, engine=engine).t[1].item() == 1 - 1e-3
    long = psn.solve(problem, psn.Vern9(), dt0=7.0, rtol=1.0, atol=1.0, engine=engine)
    assert long.t.tolist() == [0.0, 1.0]


def test_fixed_steps_are_of_dt0(engine: str) -> None:
    problem = psn.ODEProblem(oscillator, start(), (0.0, 1.0))
    solution = psn.solve(problem, psn.RK4(), controller=psn.FixedStep(), dt0=0.15, engine=engine)
    expected = torch.tensor([0.15] * 6 + [0.1], dtype=torch.float64)
    torch.testing.assert_close(solution.t.diff(), expected)
    assert (solution.stats.naccept, solution.stats.nreject) == (7, 0)


def test_no_sliver_where_the_steps_fill_the_interval(engine: str) -> None:
    """0.1 added ten times is not 1; the tenth step ends there all the same."""
    problem = psn.ODEProblem(oscillator, start(), (0.0, 1.0))
    solution = psn.solve(problem, psn.RK4(), controller=psn.FixedStep(), dt0=0.1, engine=engine)
    assert solution.stats.naccept == 10
    assert solution.t[-1].item() == 1.0


def test_dtmax_bounds_the_steps(engine: str) -> None:
    problem = psn.ODEProblem(oscillator, start(), (0.0, 1.0))
    solution = psn.solve(problem, dtmax=0.01, engine=engine)
    assert solution.t.diff().max().item() <= 0.01 * (1 + 1e-7)
    assert solution.stats.naccept in (100, 101)


def test_dtmin_ends_a_solve_that_needs_smaller_steps(engine: str) -> None:
    problem = psn.ODEProblem(lambda t, u: torch.cos(200 * t) * u, start(), (0.0, 1.0))
    options = {"rtol": 1e-10, "atol": 1e-10, "engine": engine}
    free = psn.solve(problem, **options)
    smallest = free.t.diff()[:-1].min().item()
    assert psn.solve(problem, dtmin=0.5 * smallest, **options).success
    stopped = psn.solve(problem, dtmin=2 * smallest, throw=False, **options)
    assert stopped.retcode is psn.ReturnCode.DtLessThanMin
    steps = stopped.t.diff()
    assert steps.numel() == 0 or steps.min().item() >= 2 * smallest * (1 - 1e-7)


def test_a_last_step_may_be_shorter_than_dtmin(engine: str) -> None:
    problem = psn.ODEProblem(lambda t, u: 0 * u + 1, start(), (0.0, 1.0))
    solution = psn.solve(problem, dt0=0.7, dtmax=0.7, dtmin=0.6, engine=engine)
    assert solution.success


def test_max_steps_counts_attempts(engine: str) -> None:
    problem = psn.ODEProblem(oscillator, start(), (0.0, 1.0))
    free = psn.solve(problem, engine=engine)
    needed = free.stats.naccept + free.stats.nreject
    assert psn.solve(problem, max_steps=needed, engine=engine).success
    stopped = psn.solve(problem, max_steps=needed - 1, throw=False, engine=engine)
    assert stopped.retcode is psn.ReturnCode.MaxIters
    assert stopped.stats.naccept + stopped.stats.nreject == needed - 1


@pytest.mark.parametrize("name", ALGORITHMS)
def test_time_reversal_returns_to_the_start(name: str, engine: str) -> None:
    known = KNOWN["swirl"]
    tolerance = 1e-5 if getattr(psn, name)().order < 3 else 1e-8
    options = {"rtol": tolerance, "atol": tolerance, "engine": engine}
    algorithm = getattr(psn, name)()
    forward = psn.solve(psn.ODEProblem(known.f, known.u0, known.tspan), algorithm, **options)
    back = psn.ODEProblem(known.f, forward.u1, known.tspan[::-1])
    returned = psn.solve(back, algorithm, **options).u1
    bound = 1e2 * tolerance if name != "Euler" else 4 * tolerance**0.5
    torch.testing.assert_close(returned, known.u0, rtol=0, atol=bound)


def test_evaluations_are_counted(engine: str) -> None:
    """`nfe` is the number of calls: forward, with dense output, and backward."""
    if engine != "torch":
        pytest.skip("fields translated to Julia cannot count their calls")
    field, times = recorded(oscillator)
    for needs_gradient in (False, True):
        times.clear()
        u0 = start().requires_grad_(needs_gradient)
        solution = psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), engine=engine)
        assert solution.stats.nfe == len(times)
        solution(0.123)
        assert solution.stats.nfe == len(times)
    solution.u1.sum().backward()
    assert solution.stats.nfe + solution.stats.nfe_backward == len(times)
    with torch.no_grad():
        times.clear()
        solution = psn.solve(psn.ODEProblem(field, start(), (0.0, 1.0)), engine=engine)
    assert solution.stats.nfe == len(times)
