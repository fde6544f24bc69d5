"""Native solves by two methods in turn, beside the loop in Python."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from conformance import stiff_problems as known
from properties.native_cases import quick_turns
from stiff_fields import FIELDS, D, assert_alike, driven, solved, tensor
from torch import Tensor
from torch.autograd import gradcheck

import pysciml_node as psn
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.implicit import LARGEST

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

ALGORITHMS = (
    psn.AutoTsit5(),
    psn.AutoVern7(),
    psn.AutoTsit5(psn.Rosenbrock23()),
    psn.AutoVern7(psn.KenCarp4()),
    psn.AutoTsit5(psn.TRBDF2()),
)
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.expression)
SOME = (psn.AutoTsit5(psn.Rosenbrock23()), psn.AutoTsit5(psn.TRBDF2()))
by_some = pytest.mark.parametrize("algorithm", SOME, ids=lambda a: a.expression)


def pulsed(made: tuple[Any, Any, Any, list[Tensor]]) -> tuple[Any, Any, Any, list[Tensor]]:
    """A field that is stiff from time to time."""
    f, u0, p, wanted = made

    def g(t: Tensor, u: Any, *given: Any) -> Any:
        rate, value = 0.02 + 4 * torch.sin(16 * t) ** 4, f(t, u, *given)
        return (
            rate * value if isinstance(value, Tensor) else {k: rate * x for k, x in value.items()}
        )

    return g, u0, p, wanted


def methods(solution: psn.Solution) -> list[int]:
    """Which method took each step: 0 for the explicit one, 1 for the stiff one."""
    return solution.trajectory.record.methods


def changes(solution: psn.Solution) -> int:
    return sum(a != b for a, b in pairwise(methods(solution)))


def expect_alike(found: Any, expected: Any, *bounds: float) -> None:
    assert methods(found[0]) == methods(expected[0])
    assert_alike(found, expected, *bounds)


SAVEAT = (0.0, 0.03, 0.04, 0.1, 0.17, 0.3, 0.41, 0.45, 0.5)
STEPS: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.01}


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        (a, name)
        for a in ALGORITHMS
        for name in ("module", "parts", "linear", "normalized")
        if name == "module" or a in SOME
    ],
    ids=lambda x: x if isinstance(x, str) else x.expression,
)
def test_equal_steps_give_equal_states_and_gradients(algorithm: Any, name: str) -> None:
    made, saveat = pulsed(FIELDS[name]()), tensor(*SAVEAT)
    with quick_turns(0.02):
        found, expected = (
            solved(made, algorithm, compile, saveat=saveat, **STEPS) for compile in (True, False)
        )
    assert changes(found[0]) >= 3
    expect_alike(found, expected)


@by_some
@pytest.mark.parametrize("name", ["module", "parts"])
def test_gradients_of_times_are_those_of_the_loop(algorithm: Any, name: str) -> None:
    options = {
        "span": (tensor(0.01, gradient=True), tensor(0.5, gradient=True)),
        "saveat": tensor(0.01, 0.06, 0.2, 0.31, 0.5, gradient=True),
        "tstops": [0.2, 0.33],
        **STEPS,
    }
    made = pulsed(FIELDS[name]())
    with quick_turns(0.02):
        found, expected = (solved(made, algorithm, compile, **options) for compile in (True, False))
    assert changes(found[0]) >= 3
    expect_alike(found, expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "tight": {"rtol": 1e-6, "atol": 1e-8},
    "first step": {"dt0": 0.4},
    "longest step": {"dtmax": 0.02},
    "reversed": {"span": (0.5, 0.3), "saveat": tensor(0.49, 0.4, 0.3)},
    "integral": {"controller": psn.IController()},
    "derivative": {"controller": psn.PIDController()},
    "stops": {"tstops": [0.1, 0.33], "saveat": tensor(0.1, 0.2, 0.33)},
    "tolerances by entries": {
        "rtol": tensor(1e-5, 1e-3, 1e-4), "atol": tensor(1e-7, 1e-5, math.inf),
    },
}  # fmt: skip


@by_some
@pytest.mark.parametrize("name", OPTIONS)
def test_options(algorithm: Any, name: str) -> None:
    made = pulsed(driven(2, 3))
    options = {"rtol": 1e-4, "atol": 1e-5, "saveat": tensor(0.1, 0.3, 0.5)} | OPTIONS[name]
    with quick_turns(0.02):
        with torch.no_grad():  # where gradients are on the loop evaluates the field once more
            f, u0, p, _ = made
            span = options.get("span", (0.0, 0.5))
            plain = {name: x for name, x in options.items() if name != "span"}
            problem = psn.ODEProblem(f, u0, span, p=p)
            native, eager = (
                psn.solve(problem, algorithm, compile=c, **plain) for c in (True, False)
            )
        assert native.stats == eager.stats
        assert set(methods(native)) == {0, 1}
        found, expected = (solved(made, algorithm, compile, **options) for compile in (True, False))
    # Sizes of adaptive steps differ by what rounding is of an error estimate.
    expect_alike(found, expected, 1e-7, 1e-6)


def decay(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Fast decay for a while onto a curve that turns slowly."""
    fast = p[0] * torch.exp(-((t - 0.7) ** 4) * 20) + 4
    return -fast * (u - torch.stack((torch.cos(p[1] * t), torch.sin(t))))


@by_algorithm
def test_gradients_agree_with_finite_differences(algorithm: Any) -> None:
    """With fixed steps at the edge of stability."""
    radius = algorithm.explicit.tableau.stability_radius

    def states(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        solution = psn.solve(
            psn.ODEProblem(decay, u0, (t0, t1), p=p), algorithm, compile=True, saveat=saveat,
            controller=psn.FixedStep(), dt0=1 / 24,
        )  # fmt: skip
        assert set(methods(solution)) == {0, 1}
        assert changes(solution) == 2
        return solution.u, solution.u1

    inputs = (
        tensor(1.1, 0.5, gradient=True),
        tensor(radius * 0.95 * 24 - 4, 1.3, gradient=True),
        tensor(0.0, gradient=True),
        tensor(1.49, gradient=True),
        tensor(0.3, 0.71, 0.9, 1.2, gradient=True),
    )
    assert gradcheck(states, inputs, atol=1e-6, rtol=1e-5)


@by_some
def test_what_takes_over_begins_with_the_derivative(algorithm: Any) -> None:
    """Steps behind a change are those that the method takes from there alone, in both loops."""
    f, u0, p, _ = pulsed(driven(2, 3))
    problem = psn.ODEProblem(f, u0, (0.0, 0.5), p=p)
    for compile in (True, False):
        with torch.no_grad(), quick_turns(0.02):
            solution = psn.solve(problem, algorithm, rtol=1e-3, atol=1e-3, compile=compile)
        taken, times = methods(solution), solution.step_times.tolist()
        firsts = [n for n in range(1, len(taken)) if taken[n] != taken[n - 1]]
        assert {taken[n] for n in firsts} == {0, 1}
        for n in firsts:
            one = algorithm.stiff if taken[n] else algorithm.explicit
            again = psn.solve(
                psn.ODEProblem(f, solution.u[n], (times[n], times[n + 1]), p=p), one,
                controller=psn.FixedStep(), dt0=1.0, compile=False,
            )  # fmt: skip
            bound = 1e-4 if taken[n] else 1e-13  # what Newton's iteration leaves
            torch.testing.assert_close(again.u1, solution.u[n + 1], rtol=bound, atol=bound)


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[1], 1e3 * (1 - y[0] ** 2) * y[1] - y[0]))


@pytest.mark.parametrize("algorithm", [ALGORITHMS[0], *SOME], ids=lambda a: a.expression)
def test_van_der_pol_changes_its_method_where_the_loop_does(algorithm: Any) -> None:
    problem = psn.ODEProblem(van_der_pol, tensor(2.0, 0.0), (0.0, 900.0))
    with torch.no_grad():
        native, eager = (
            psn.solve(problem, algorithm, rtol=1e-5, atol=1e-7, compile=c) for c in (True, False)
        )
    assert native.stats == eager.stats
    assert methods(native) == methods(eager)
    assert changes(native) >= 3
    torch.testing.assert_close(native.u1, eager.u1, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("algorithm", ALGORITHMS[:2], ids=lambda a: a.expression)
def test_published_solutions(algorithm: Any) -> None:
    with torch.no_grad():
        for f, start, end, reference in (
            (van_der_pol, tensor(2.0, 0.0), 2000.0, tensor(1.706167732170483, -8.92809701e-4)),
            (known.robertson, known.ROBERTSON_START, 40.0, known.ROBERTSON_AT_40),
        ):
            problem = psn.ODEProblem(f, start, (0.0, end))
            found = psn.solve(problem, algorithm, rtol=1e-8, atol=1e-12, compile=True)
            assert set(methods(found)) == {0, 1}
            torch.testing.assert_close(found.u1, reference, rtol=1e-5, atol=0)


@by_some
def test_dense_output_and_estimates_are_those_of_the_loop(algorithm: Any) -> None:
    f, u0, p, _ = pulsed(driven(2, 3))
    problem = psn.ODEProblem(f, u0, (0.0, 0.5), p=p)
    with quick_turns(0.02):
        native, eager = (psn.solve(problem, algorithm, compile=c, **STEPS) for c in (True, False))
    assert changes(native) >= 3
    times = torch.linspace(0.0, 0.5, 37, dtype=D)
    torch.testing.assert_close(native(times), eager(times), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(native.step_stiffness, eager.step_stiffness, equal_nan=True)


@by_some
def test_an_event_in_a_stiff_step(algorithm: Any) -> None:
    problem = psn.ODEProblem(
        lambda t, u: -500.0 * (u - torch.cos(t)), torch.full((1,), 2.0).double(), (0.0, 3.0)
    )
    with torch.no_grad():
        native, eager = (
            psn.solve(
                problem, algorithm, rtol=1e-5, atol=1e-5, events=psn.Event(lambda t, u: u[0]),
                compile=c,
            )
            for c in (True, False)
        )  # fmt: skip
    assert methods(native) == methods(eager)
    assert methods(native)[-1] == 1
    # u = a cos t + b sin t once what the start has left has decayed.
    a, b = 500.0**2 / (1 + 500.0**2), 500.0 / (1 + 500.0**2)
    assert float(native.event_t) == pytest.approx(math.pi - math.atan(a / b), abs=1e-4)
    assert float(native.event_t) == pytest.approx(float(eager.event_t), abs=1e-9)


@by_some
def test_single_precision(algorithm: Any) -> None:
    net = known.StiffNetwork()
    u0 = torch.tensor([[1.0, 1.0], [-0.5, 0.3]])
    found = []
    for compile in (True, False):
        problem = psn.ODEProblem(net, u0, (0.0, 1.0))
        end = psn.solve(
            problem, algorithm, rtol=1e-2, atol=1e-4, compile=compile, saveat=[0.4, 1.0]
        )
        assert end.u.dtype is torch.float32
        assert set(methods(end)) == {0, 1}
        found.append([end.u.detach(), *torch.autograd.grad(end.u.sum(), [*net.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


@by_some
def test_solves_that_fail_at_any_step_do_as_the_loop_does(algorithm: Any) -> None:
    """Before a change, at it, where no attempt has been made since, and behind it."""
    f, u0, p, _ = pulsed(driven(2, 3))
    problem = psn.ODEProblem(f, u0, (0.0, 0.5), p=p)
    with torch.no_grad(), quick_turns(0.02):
        for most in range(1, 21):
            native, eager = (
                psn.solve(
                    problem, algorithm, rtol=1e-3, atol=1e-4, max_steps=most, throw=False, compile=c
                )
                for c in (True, False)
            )
            assert (native.retcode, native.stats) == (eager.retcode, eager.stats)
            assert methods(native) == methods(eager)
            if not native.success:
                one, other = (x.trajectory.record.last for x in (native, eager))
                assert (one.t, one.h) == pytest.approx((other.t, other.h), rel=1e-6)
                torch.testing.assert_close(one.u, other.u, rtol=1e-8, atol=1e-8)
                torch.testing.assert_close(one.u1, other.u1, rtol=1e-8, atol=1e-8)


@by_some
def test_a_blow_up_is_that_of_the_loop(algorithm: Any) -> None:
    problem = psn.ODEProblem(lambda t, u: u * u, tensor(1.0, 1.0), (0.0, 2.0))
    with torch.no_grad():
        native, eager = (
            psn.solve(problem, algorithm, throw=False, compile=c) for c in (True, False)
        )
    assert not native.success
    assert (native.retcode, native.stats) == (eager.retcode, eager.stats)


def test_methods_share_code_and_options_with_solves_by_one_of_them() -> None:
    """Each keeps to its own steps, whatever was solved before."""
    f, u0, p, _ = pulsed(driven(2, 3))
    problem = psn.ODEProblem(f, u0, (0.0, 0.5), p=p)
    algorithms = (psn.Tsit5(), psn.Rodas5P(), *ALGORITHMS[:3])
    with torch.no_grad(), quick_turns(0.02):
        alone = [
            psn.solve(problem, a, rtol=1e-6, atol=1e-8, compile=False).stats for a in algorithms
        ]
        for _ in range(3):
            for algorithm, stats in zip(algorithms, alone, strict=True):
                found = psn.solve(problem, algorithm, rtol=1e-6, atol=1e-8, compile=True)
                assert found.stats == stats


def test_states_of_later_solves_are_their_own() -> None:
    """A graph that is kept has the steps and the memory of its own solve."""
    f, u0, p, wanted = pulsed(driven(2, 3))
    gradients = []
    with quick_turns(0.02):
        for order in (False, True):
            solutions = [
                psn.solve(
                    psn.ODEProblem(f, start, (0.0, 0.5), p=p), psn.AutoTsit5(), compile=True,
                    rtol=1e-6, atol=1e-8,
                )
                for start in (u0, -u0)
            ]  # fmt: skip
            if order:
                solutions.reverse()
            found = [torch.autograd.grad(x.u1.sum(), wanted) for x in solutions]
            if order:
                found.reverse()
            gradients.append(found)
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


REFUSED: dict[str, tuple[Any, int, str]] = {
    "linsolve": (psn.AutoTsit5(psn.KenCarp4(linsolve=psn.GMRES())), 2, "linsolve"),
    "size": (psn.AutoVern7(), LARGEST + 1, f"more than {LARGEST} entries"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_native_code_is_named(name: str) -> None:
    algorithm, size, named = REFUSED[name]
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(size), (0.0, 1.0))
    with pytest.raises(psn.CompileError, match=named) as caught:
        psn.solve(problem, algorithm, compile=True)
    assert "compile=False" in str(caught.value)
    attempt._told.clear()
    with pytest.warns(psn.PsnWarning, match=named):
        assert psn.solve(problem, algorithm, compile="auto").success
