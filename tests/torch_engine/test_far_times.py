"""Times far from zero, such as seconds since 1970, where numbers lie 2.4e-7 apart."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn

D = torch.float64
START = 1.7e9
METHODS = [psn.Tsit5(), psn.Vern7(), psn.Rodas5P(), psn.AutoTsit5(), psn.KenCarp4()]
FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.03}
TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def clock(t: Tensor, u: Tensor) -> Tensor:
    return torch.ones_like(u)


def problem(f: Any, length: float = 1.0) -> psn.ODEProblem:
    return psn.ODEProblem(f, torch.zeros(1, dtype=D), (START, START + length))


@pytest.mark.parametrize("options", [FIXED, {}], ids=["fixed", "adaptive"])
@pytest.mark.parametrize(
    ("method", "compiled"), [*((x, False) for x in METHODS), *((x, True) for x in METHODS[::2])]
)
def test_a_clock_shows_the_time_that_has_passed(
    method: psn.Algorithm, compiled: bool, options: dict[str, Any]
) -> None:
    """`u' = 1`, which all methods solve to the last bit."""
    for length in (1.0, -1.0):
        solution = psn.solve(problem(clock, length), method, compile=compiled, **options)
        passed = solution.t - START
        assert len(passed) > 2
        torch.testing.assert_close(solution.u[:, 0], passed, rtol=0, atol=1e-13)


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("options", [FIXED, {}], ids=["fixed", "adaptive"])
def test_so_do_those_of_members(options: dict[str, Any], compiled: bool) -> None:
    lengths = torch.tensor([0.5, 1.0, 2.0], dtype=D)
    spans = START + torch.stack((torch.zeros(3, dtype=D), lengths), 1)
    members = psn.EnsembleProblem(problem(clock), torch.zeros(3, 1, dtype=D), tspan=spans)
    solutions = psn.solve(members, psn.Tsit5(), compile=compiled, **options)
    for solution in solutions:
        torch.testing.assert_close(solution.u[:, 0], solution.t - START, rtol=0, atol=1e-13)


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("members", [False, True])
def test_an_event_happens_when_the_clock_shows_it(members: bool, compiled: bool) -> None:
    event = psn.Event(lambda t, u: u[0] - 0.4, affect=None)
    one: Any = problem(clock)
    if members:
        one = psn.EnsembleProblem(one, torch.zeros(2, 1, dtype=D))
    found = psn.solve(one, psn.Tsit5(), events=[event], compile=compiled)
    solution = found[1] if members else found
    assert float(solution.t[-1]) - START == pytest.approx(float(solution.u1[0]), abs=1e-13)
    assert float(solution.u1[0]) == pytest.approx(0.4, abs=3e-7)


@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "native"])
@pytest.mark.parametrize("adaptive", [False, True])
def test_noise_is_added_to_the_time_that_has_passed(
    adaptive: bool, compiled: bool, members: bool
) -> None:
    """`du = dt + dW` less `du = dW` on the same path, whose times are billionths of it."""
    options: dict[str, Any] = {} if adaptive else FIXED
    ends = []
    for drift in (clock, lambda t, u: torch.zeros_like(u)):
        noisy: Any = psn.SDEProblem(
            drift, lambda t, u: torch.ones_like(u), torch.zeros(1, dtype=D), (START, START + 1)
        )
        if members:
            noisy = psn.EnsembleProblem(noisy, torch.zeros(2, 1, dtype=D))
        generator = torch.Generator().manual_seed(0)
        ends.append(
            psn.solve(noisy, psn.SRIW1(), generator=generator, compile=compiled, **options).u1
        )
    torch.testing.assert_close(ends[0] - ends[1], torch.ones_like(ends[0]), rtol=0, atol=5e-10)


@pytest.mark.parametrize("saved", [None, [START + 0.25, START + 0.5, START + 1.0]])
@pytest.mark.parametrize("method", METHODS[::2], ids=repr)
def test_exponential_growth_is_as_exact_as_elsewhere(
    method: psn.Algorithm, saved: list[float] | None
) -> None:
    one = psn.ODEProblem(lambda t, u: u, torch.ones(1, dtype=D), (START, START + 1))
    found = psn.solve(one, method, saveat=saved, **TIGHT)
    native = psn.solve(one, method, saveat=saved, compile=True, **TIGHT)
    for solution in (found, native):
        expected = torch.exp(solution.t - START)
        torch.testing.assert_close(solution.u[:, 0], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(native.u1, found.u1, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "adjoint",
    [
        psn.DirectAdjoint(),
        psn.DiscreteAdjoint(),
        psn.DiscreteAdjoint(memory=0),
        psn.InterpolatingAdjoint(),
        psn.GaussAdjoint(),
        psn.BacksolveAdjoint(),
    ],
    ids=repr,
)
@pytest.mark.parametrize("members", [False, True])
def test_so_are_gradients(members: bool, adjoint: psn.Adjoint) -> None:
    u0 = torch.ones(1, dtype=D, requires_grad=True)
    one: Any = psn.ODEProblem(lambda t, u: u, u0, (START, START + 1))
    if members:
        one = psn.EnsembleProblem(one, u0.expand(2, 1))
    end = psn.solve(one, psn.Tsit5(), adjoint=adjoint, **TIGHT).u1
    (slope,) = torch.autograd.grad(end.reshape(-1)[0], u0)
    assert float(slope) == pytest.approx(math.e, abs=1e-9)


def test_a_step_whose_end_is_rounded_to_a_stop_ends_on_it() -> None:
    """Both at a distance of half of that between numbers there."""
    gap = math.ulp(START)
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 999.6 * gap}
    for compiled in (False, True):
        one = psn.ODEProblem(clock, torch.zeros(1, dtype=D), (START, START + 1000 * gap))
        solution = psn.solve(one, psn.Tsit5(), compile=compiled, **options)
        assert solution.stats.naccept == 1
        assert float(solution.u1[0]) == pytest.approx(1000 * gap, rel=1e-12)
