"""Observed orders of the solution, the error estimate and the dense output, for every algorithm.

A method of order `p` with an interpolant of order `q` (no better than the step it spans, so
`q <= p`) and an embedded solution of order `e` shows, for small steps `h`,

* an error of `O(h^p)` at the ends of the steps;
* an error of `O(h^min(p, q + 1))` between them: the error of the step's start, and the
  interpolant's own local one, `O(h^(q + 1))`, which a single step from an exact state shows alone;
* an error estimate of `O(h^(e + 1))`.

Optimised methods make the leading term of the error small against the next one: their order shows
where the steps are short, and above rounding only on some problems. `RANGES` names, for each
method, two problems and the steps where it does. (The order-seven conditions of Vern7's interpolant
are off by 3e-7, as published; the `O(h^7)` this leaves stays below the step's own error.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import pytest
import torch
from conformance.problems import ALGORITHMS, KNOWN, Known, observed_order

import pysciml_node as psn


@dataclass(frozen=True)
class Range:
    """Numbers of steps for the global orders, sizes for the local ones, and the problems."""

    counts: tuple[int, ...]
    sizes: tuple[float, ...]
    problems: tuple[str, str] = ("riccati", "swirl")
    local_problems: tuple[str, str] = ("riccati", "swirl")


SHORT = (0.1, 0.07, 0.05, 0.03)
RANGES = {
    **dict.fromkeys(ALGORITHMS[:6], Range((48, 64, 96, 128), SHORT)),
    "Tsit5": Range((96, 128, 192), SHORT),
    "DP5": Range((96, 128, 192), SHORT),
    "DP8": Range(
        (12, 16, 24, 32), (0.2, 0.15, 0.1, 0.07), ("riccati", "spiral"), ("swirl", "spiral")
    ),
    "Vern7": Range((20, 24, 32, 48), (0.15, 0.1, 0.07, 0.05), local_problems=("riccati", "spiral")),
    "Vern9": Range(
        (10, 12, 14, 16), (0.3, 0.25, 0.2, 0.15), ("swing", "fast-swirl"), ("riccati", "fast-swirl")
    ),
}
GLOBAL = [(name, problem) for name, r in RANGES.items() for problem in r.problems]
LOCAL = [(name, problem) for name, r in RANGES.items() for problem in r.local_problems]
# Between the ends of a step. The weights of high-order interpolants lose digits near its end.
INSIDE = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)
TOLERANCE = 0.25


def orders(name: str) -> tuple[int, int, int]:
    """Nominal `p`, `q`, `e`."""
    tableau = getattr(psn, name).tableau
    return tableau.order, min(tableau.interpolant.order, tableau.order), tableau.error_order


def march(known: Known, name: str, count: int, engine: str) -> psn.Solution:
    """`count` equal steps over the whole interval."""
    problem = psn.ODEProblem(known.f, known.u0, known.tspan)
    return psn.solve(
        problem,
        getattr(psn, name)(),
        controller=psn.FixedStep(),
        dt0=known.length / count,
        engine=engine,
    )


def single_step(known: Known, name: str, t: float, h: float, engine: str) -> psn.Solution:
    """One step of size `h` from the exact state at `t`, its error estimate in units of 1000."""
    problem = psn.ODEProblem(known.f, known.at(t), (t, t + h))
    solution = psn.solve(problem, getattr(psn, name)(), dt0=h, rtol=0.0, atol=1e3, engine=engine)
    assert solution.stats.naccept == 1
    return solution


@pytest.mark.parametrize(("name", "problem"), GLOBAL)
def test_order_of_the_solution(name: str, problem: str, engine: str) -> None:
    known, counts = KNOWN[problem], RANGES[name].counts
    errors = []
    for count in counts:
        solution = march(known, name, count, engine)
        difference = solution.u - known.at(solution.t)
        errors.append(difference.norm(dim=-1).max().item())
    nominal, _, _ = orders(name)
    assert observed_order([1 / n for n in counts], errors) == pytest.approx(nominal, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "problem"), GLOBAL)
def test_order_of_the_dense_output(name: str, problem: str, engine: str) -> None:
    known, counts = KNOWN[problem], RANGES[name].counts
    errors = []
    for count in counts:
        solution = march(known, name, count, engine)
        inside = (solution.t[:-1, None] + known.length / count * INSIDE).reshape(-1)
        errors.append((solution(inside) - known.at(inside)).norm(dim=-1).max().item())
    p, q, _ = orders(name)
    nominal = min(p, q + 1)
    assert observed_order([1 / n for n in counts], errors) == pytest.approx(nominal, abs=TOLERANCE)


@pytest.mark.parametrize(("name", "problem"), LOCAL)
def test_order_of_the_interpolant_and_of_the_error_estimate(
    name: str, problem: str, engine: str
) -> None:
    """Root-mean-square over several starts, so that no sign change makes one step look good."""
    known, sizes = KNOWN[problem], RANGES[name].sizes
    dense, estimates = [], []
    for h in sizes:
        squares, estimated = 0.0, 0.0
        for t in torch.linspace(*known.tspan, 9).tolist():
            solution = single_step(known, name, t, h, engine)
            inside = t + h * INSIDE
            squares += (solution(inside) - known.at(inside)).square().sum().item()
            estimated += solution.step_errors.item() ** 2
        dense.append(sqrt(squares))
        estimates.append(sqrt(estimated))
    _, q, e = orders(name)
    assert observed_order(sizes, dense) == pytest.approx(q + 1, abs=TOLERANCE)
    assert observed_order(sizes, estimates) == pytest.approx(e + 1, abs=TOLERANCE)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_error_of_an_adaptive_solve_is_proportional_to_the_tolerance(
    name: str, engine: str
) -> None:
    """Steps of `h ~ tol^(1 / (e + 1))` leave an error of `h^p`: of `tol`, where `p = e + 1`.

    Euler's estimate is that of its own order, and leaves the square root of the tolerance.
    """
    known = KNOWN["spiral"]
    problem = psn.ODEProblem(known.f, known.u0, known.tspan)
    p, _, e = orders(name)
    exponents = range(3, 6) if p < 3 else range(5, 9) if p < 7 else range(7, 13)
    tolerances = [10.0**-k for k in exponents]
    errors = []
    for tolerance in tolerances:
        solution = psn.solve(
            problem, getattr(psn, name)(), rtol=tolerance, atol=tolerance, engine=engine
        )
        errors.append((solution.u - known.at(solution.t)).norm(dim=-1).max().item())
    assert observed_order(tolerances, errors) == pytest.approx(p / (e + 1), abs=TOLERANCE)
    if p == e + 1:
        assert all(error < 3 * tol for error, tol in zip(errors, tolerances, strict=True))
