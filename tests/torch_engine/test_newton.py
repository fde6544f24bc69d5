"""When Newton's iteration ends: entries beside much greater ones have the error of the method."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance.problems import observed_order
from torch import Tensor

import pysciml_node as psn
from pysciml_node.compat.torchdiffeq import odeint
from pysciml_node.torch_engine.native.compiler import available

D = torch.float64
ALGORITHMS = (psn.KenCarp4(), psn.TRBDF2())
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)
native = pytest.param(
    True, marks=pytest.mark.skipif(not available()[0], reason=available()[1]), id="native"
)
either_way = pytest.mark.parametrize("compile", [pytest.param(False, id="eager"), native])
BIG = 1e12


def beside(t: Tensor, u: Tensor, rate: float = 20.0) -> Tensor:
    """A decay that is far from linear, and a linear one of any scale.

    From 1 the first is `1 / sqrt(1 + 2 rate t)`.
    """
    return torch.stack((-rate * u[0] ** 3, -0.5 * u[1]))


def start(big: float, dtype: torch.dtype = D) -> Tensor:
    return torch.tensor([1.0, big], dtype=dtype)


def fixed(big: float, algorithm: Any, steps: int, compile: bool, rate: float = 20.0) -> Tensor:
    problem = psn.ODEProblem(lambda t, u: beside(t, u, rate), start(big), (0.0, 2.0))
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 2 / steps}
    with torch.no_grad():
        return psn.solve(problem, algorithm, compile=compile, **options).u1


@either_way
@by_algorithm
def test_fixed_steps_are_those_of_the_entry_alone(algorithm: Any, compile: bool) -> None:
    alone = fixed(1.0, algorithm, 40, compile)
    for big in (1e6, BIG, 1e-12):
        found = fixed(big, algorithm, 40, compile)
        torch.testing.assert_close(found[0], alone[0], rtol=1e-10, atol=0)
        torch.testing.assert_close(found[1] / big, alone[1], rtol=1e-10, atol=0)


@either_way
@by_algorithm
def test_the_order_of_an_entry_beside_a_great_one(algorithm: Any, compile: bool) -> None:
    steps = [20, 40, 80]
    ends = [fixed(BIG, algorithm, n, compile, rate=2.0)[0] for n in steps]
    errors = [abs(float(end) - 1 / 3) for end in ends]
    assert observed_order([1 / n for n in steps], errors) > algorithm.order - 0.35


@either_way
@by_algorithm
def test_an_entry_that_counts_for_nothing_changes_nothing(algorithm: Any, compile: bool) -> None:
    """Without a say in the step sizes it leaves the others as they are, whatever its scale."""

    def solve(big: float) -> psn.Solution:
        u0 = torch.tensor([1.0], dtype=D), torch.tensor([big], dtype=D)
        problem = psn.ODEProblem(lambda t, u: (-20 * u[0] ** 3, -0.5 * u[1]), u0, (0.0, 2.0))
        with torch.no_grad():
            return psn.solve(
                problem, algorithm, rtol=1e-6, atol=(1e-6, math.inf), dt0=0.01, compile=compile
            )

    alone = solve(1.0)
    for big in (1e9, BIG):
        found = solve(big)
        assert found.stats.naccept == alone.stats.naccept
        torch.testing.assert_close(found.u1[0], alone.u1[0], rtol=0, atol=2e-7)


@by_algorithm
@pytest.mark.parametrize("fixed", [True, False])
def test_native_code_and_the_loop_take_the_same_steps(algorithm: Any, fixed: bool) -> None:
    if not available()[0]:
        pytest.skip(available()[1])
    options: dict[str, Any] = {"rtol": 1e-6, "atol": torch.tensor([1e-6, 1e3], dtype=D)}
    if fixed:
        options = {"controller": psn.FixedStep(), "dt0": 0.05}
    found = []
    for compile in (True, False):
        u0 = start(BIG).requires_grad_()
        solution = psn.solve(
            psn.ODEProblem(beside, u0, (0.0, 2.0)), algorithm, compile=compile, **options
        )
        (gradient,) = torch.autograd.grad(solution.u1[0], u0)
        found.append((solution.u1.detach(), gradient, solution.stats.naccept))
    assert found[0][2] == found[1][2]
    for one, other in zip(found[0][:2], found[1][:2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@either_way
@by_algorithm
def test_gradients_beside_a_great_entry(algorithm: Any, compile: bool) -> None:
    """`du(t)/du0 = (1 + 4 t u0^2)^(-3/2)`, and that of the steps by finite differences."""

    def end(x: float, gradient: bool = False) -> tuple[float, float]:
        first = torch.tensor(x, dtype=D, requires_grad=True)
        u0 = torch.stack((first, torch.tensor(BIG, dtype=D)))
        problem = psn.ODEProblem(lambda t, u: beside(t, u, 2.0), u0, (0.0, 2.0))
        options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.05}
        last = psn.solve(problem, algorithm, compile=compile, **options).u1[0]
        slope = torch.autograd.grad(last, first)[0] if gradient else last
        return float(last.detach()), float(slope.detach())

    slope, eps = end(1.0, gradient=True)[1], 1e-4
    assert slope == pytest.approx((end(1 + eps)[0] - end(1 - eps)[0]) / (2 * eps), rel=1e-6)
    assert slope == pytest.approx(9**-1.5, rel=0.01 if algorithm.order == 2 else 1e-4)


@by_algorithm
def test_members_beside_great_entries_are_those_that_are_solved_alone(algorithm: Any) -> None:
    """Each member has tolerances of its own, and ends its iterations by them."""
    u0 = torch.stack([start(1.0), start(1e6), start(BIG)])
    problem = psn.ODEProblem(beside, u0[0], (0.0, 2.0))
    ensemble = psn.EnsembleProblem(problem, u0)
    atol = torch.tensor([[1e-6, 1e-6], [1e-7, 1.0], [1e-6, 1e3]], dtype=D)
    for options in (
        {"rtol": 1e-6, "atol": atol},
        {"controller": psn.FixedStep(), "dt0": 0.05},
    ):
        with torch.no_grad():
            found = psn.solve(ensemble, algorithm, engine="torch", **options)
            for m in range(3):
                own = {k: v[m] if k == "atol" else v for k, v in options.items()}
                one = psn.solve(ensemble.member(m), algorithm, engine="torch", **own)
                torch.testing.assert_close(found.u1[m], one.u1, rtol=1e-10, atol=0)


@pytest.mark.parametrize("method", ["implicit_euler", "trapezoid", "radauIIA5", "gl4", "sdirk2"])
def test_stages_that_are_found_together(method: str) -> None:
    times = torch.linspace(0, 2, 41, dtype=D)
    with torch.no_grad():
        alone = odeint(beside, start(1.0), times, method=method)
        for big in (1e6, BIG):
            found = odeint(beside, start(big), times, method=method)
            torch.testing.assert_close(found[:, 0], alone[:, 0], rtol=1e-10, atol=0)
            torch.testing.assert_close(found[:, 1] / big, alone[:, 1], rtol=1e-10, atol=0)


@either_way
@by_algorithm
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_a_great_entry_does_not_keep_an_iteration_from_its_end(
    algorithm: Any, compile: bool, dtype: torch.dtype
) -> None:
    """A difference of great entries drives a small one: its rounding is above any tolerance."""

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.stack((-(u[0] ** 3) + (u[1] - u[2]), 0.0 * u[1], -0.1 * (u[2] - u[1])))

    eps = torch.finfo(dtype).eps
    u0 = torch.tensor([1.0, 1e-3 / eps, 1e-3 / eps], dtype=dtype)
    problem = psn.ODEProblem(f, u0, (0.0, 2.0))
    with torch.no_grad():
        solution = psn.solve(
            problem, algorithm, rtol=1e-6, atol=100 * eps, compile=compile, throw=False,
            max_steps=2000,
        )  # fmt: skip
    assert solution.success
    assert float(solution.u1[0]) == pytest.approx(1 / math.sqrt(5), rel=1e-2)
