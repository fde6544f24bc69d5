"""Native stiff solves beside the loop in Python, published solutions, finite differences."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from conformance import stiff_problems as known
from conformance.problems import KNOWN, observed_order
from stiff_fields import (
    FIELDS,
    SAVEAT,
    STEPS,
    D,
    assert_alike,
    driven,
    random,
    solved,
    tensor,
)
from torch import Tensor
from torch.autograd import gradcheck

import pysciml_node as psn
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.implicit import LARGEST

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

ALGORITHMS = (psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2())
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)
of_high_order = pytest.mark.parametrize(
    "algorithm", [psn.Rodas5P(), psn.KenCarp4()], ids=lambda a: type(a).__name__
)


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [
        (algorithm, name)
        for algorithm in ALGORITHMS
        for name in FIELDS
        # Its code differs from KenCarp4's by the tableau alone.
        if not isinstance(algorithm, psn.TRBDF2) or name in ("module", "parts")
    ],
    ids=lambda x: x if isinstance(x, str) else type(x).__name__,
)
def test_equal_steps_give_equal_states_and_gradients(algorithm: Any, name: str) -> None:
    made, saveat = FIELDS[name](), tensor(*SAVEAT)
    found, expected = (
        solved(made, algorithm, compile, saveat=saveat, **STEPS) for compile in (True, False)
    )
    assert_alike(found, expected)


@by_algorithm
@pytest.mark.parametrize("name", ["module", "parts", "constant"])
def test_gradients_of_times_are_those_of_the_loop(algorithm: Any, name: str) -> None:
    made = FIELDS[name]()
    options = {
        "span": (tensor(0.01, gradient=True), tensor(0.5, gradient=True)),
        "saveat": tensor(0.01, 0.06, 0.2, 0.31, 0.5, gradient=True),
        "tstops": [0.2, 0.33],
        **STEPS,
    }
    found, expected = (solved(made, algorithm, compile, **options) for compile in (True, False))
    assert_alike(found, expected)


OPTIONS: dict[str, dict[str, Any]] = {
    "steps": {},
    "loose": {"rtol": 1e-3, "atol": 1e-3},
    "first step": {"dt0": 0.4},
    "longest step": {"dtmax": 0.02},
    "reversed": {"span": (0.5, 0.3), "saveat": tensor(0.49, 0.4, 0.3)},
    "integral": {"controller": psn.IController(), "saveat": tensor(0.1, 0.5)},
    "derivative": {"controller": psn.PIDController(), "saveat": tensor(0.1, 0.5)},
    "stops": {"tstops": [0.1, 0.33], "saveat": tensor(0.1, 0.2, 0.33)},
    "tolerances by entries": {
        "rtol": tensor(1e-6, 1e-4, 1e-5), "atol": tensor(1e-8, 1e-6, math.inf),
    },
    "absolute only": {"rtol": 0.0, "atol": 1e-5},
}  # fmt: skip


@by_algorithm
@pytest.mark.parametrize("name", OPTIONS)
def test_options(algorithm: Any, name: str) -> None:
    made, options = driven(2, 3), OPTIONS[name]
    with torch.no_grad():  # where gradients are on the loop evaluates the field once more
        f, u0, p, _ = made
        plain = {"rtol": 1e-6, "atol": 1e-8} | options
        problem = psn.ODEProblem(f, u0, plain.pop("span", (0.0, 0.5)), p=p)
        native, eager = (psn.solve(problem, algorithm, compile=c, **plain) for c in (True, False))
    assert native.stats == eager.stats
    torch.testing.assert_close(native.step_errors, eager.step_errors, rtol=1e-4, atol=1e-6)
    found, expected = (solved(made, algorithm, compile, **options) for compile in (True, False))
    assert_alike(found, expected, 1e-8, 1e-6)


@by_algorithm
@pytest.mark.parametrize("case", ["riccati", "swirl"])
def test_orders_of_solution_and_dense_output(algorithm: Any, case: str) -> None:
    exact = KNOWN[case]
    problem = psn.ODEProblem(exact.f, exact.u0, exact.tspan)
    times = torch.linspace(*exact.tspan, 23, dtype=D)
    counts = [16, 32, 64]
    ends, between = [], []
    with torch.no_grad():
        for count in counts:
            options = {"controller": psn.FixedStep(), "dt0": exact.length / count}
            solution = psn.solve(problem, algorithm, compile=True, saveat=times, **options)
            ends.append(float((solution.u1 - exact.at(exact.tspan[1])).norm()))
            between.append(float((solution.u - exact.at(times)).norm(dim=1).max()))
    sizes = [1 / count for count in counts]
    assert observed_order(sizes, ends) > algorithm.order - 0.35
    interpolant = algorithm.tableau.interpolant
    assert observed_order(sizes, between) > min(algorithm.order, interpolant.order) - 0.35


@pytest.mark.parametrize(
    ("algorithm", "order"),
    list(zip(ALGORITHMS, (2, 3, 2, 2), strict=True)),
    ids=lambda x: type(x).__name__,
)
def test_order_that_stiffness_leaves(algorithm: Any, order: int) -> None:
    """Prothero and Robinson's `u' = z (u - phi) + phi'`, with steps far beyond `1 / |z|`."""
    u0, exact = tensor(0.5, -0.3).sin(), tensor(2.5, 1.7).sin()
    shift = tensor(0.5, -0.3)
    problem = psn.ODEProblem(
        lambda t, u: -1e3 * (u - torch.sin(t + shift)) + torch.cos(t + shift), u0, (0.0, 2.0)
    )
    errors, sizes = [], [1 / 4, 1 / 8, 1 / 16]
    with torch.no_grad():
        for size in sizes:
            options = {"controller": psn.FixedStep(), "dt0": size}
            end = psn.solve(problem, algorithm, compile=True, **options).u1
            errors.append(float((end - exact).norm()))
    assert observed_order(sizes, errors) > order - 0.35


@by_algorithm
def test_l_stability(algorithm: Any) -> None:
    for rate, bound in ((1e4, 2e-3), (1e8, 1e-6)):
        k = torch.tensor(rate, dtype=D)
        problem = psn.ODEProblem(lambda t, u, k: -k * u, tensor(1.0, 1.0), (0.0, 1.0), p=k)
        end = psn.solve(problem, algorithm, compile=True, controller=psn.FixedStep(), dt0=1.0).u1
        assert float(end.abs().max()) < bound


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    """`mu = 1000` on its slow time scale."""
    return torch.stack((y[1], ((1 - y[0] ** 2) * y[1] - y[0]) * 1e6))


PUBLISHED: dict[str, tuple[Any, Tensor, float, Tensor, float]] = {
    "Robertson": (known.robertson, known.ROBERTSON_START, 40.0, known.ROBERTSON_AT_40, 1e-4),
    "Van der Pol": (
        van_der_pol, tensor(2.0, 0.0), 2.0, tensor(0.1706167732170483e1, -0.8928097010247975), 1.0,
    ),
    "HIRES": (known.hires, known.HIRES_START, 321.8122, known.HIRES_AT_321, 1e-4),
    "OREGO": (known.orego, known.OREGO_START, 360.0, known.OREGO_AT_360, 1.0),
    "POLLU": (known.pollu, known.POLLU_START, 60.0, known.POLLU_AT_60, 1e-8),
}  # fmt: skip


@of_high_order
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_solutions(algorithm: Any, name: str) -> None:
    f, start, end, reference, atol = PUBLISHED[name]
    with torch.no_grad():
        found = psn.solve(
            psn.ODEProblem(f, start, (0.0, end)), algorithm, rtol=1e-9, atol=1e-9 * atol,
            compile=True,
        )  # fmt: skip
    torch.testing.assert_close(found.u1, reference, rtol=1e-5, atol=0)


@by_algorithm
def test_gradients_agree_with_finite_differences(algorithm: Any) -> None:
    matrix = random(2, 2)

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.tanh(u @ matrix) * p[0] - p[1] * u + torch.sin(t * p[2]) * u.flip(-1)

    def states(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        solution = psn.solve(
            psn.ODEProblem(f, u0, (t0, t1), p=p), algorithm, compile=True, saveat=saveat,
            controller=psn.FixedStep(), dt0=0.3,
        )  # fmt: skip
        return solution.u, solution.u1

    inputs = (
        random(2).requires_grad_(),
        tensor(0.7, 8.0, 1.3, gradient=True),
        tensor(0.1, gradient=True),
        tensor(0.9, gradient=True),
        tensor(0.2, 0.81, gradient=True),
    )
    assert gradcheck(states, inputs, atol=1e-6, rtol=1e-5)


@of_high_order
def test_gradients_of_robertsons_rates_agree_with_those_of_the_loop(algorithm: Any) -> None:
    rates = tensor(0.04, 3e7, 1e4, gradient=True)

    def f(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        slow, fast, medium = p[0] * y[0], p[1] * y[1] ** 2, p[2] * y[1] * y[2]
        return torch.stack((medium - slow, slow - medium - fast, fast))

    gradients = []
    for compile in (True, False):
        problem = psn.ODEProblem(f, known.ROBERTSON_START, (0.0, 40.0), p=rates)
        end = psn.solve(problem, algorithm, rtol=1e-6, atol=1e-10, compile=compile).u1
        # In units in which all have the same size.
        (gradient,) = torch.autograd.grad(end[0] + 1e5 * end[1], rates)
        gradients.append(gradient * rates.detach())
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=0)


@by_algorithm
def test_single_precision(algorithm: Any) -> None:
    net = known.StiffNetwork()
    u0 = torch.tensor([[1.0, 1.0], [-0.5, 0.3]])
    found = []
    for compile in (True, False):
        problem = psn.ODEProblem(net, u0, (0.0, 1.0))
        end = psn.solve(
            problem, algorithm, rtol=1e-4, atol=1e-6, compile=compile, saveat=[0.4, 1.0]
        )
        assert end.u.dtype is torch.float32
        found.append([end.u.detach(), *torch.autograd.grad(end.u.sum(), [*net.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-3, atol=2e-4)


@by_algorithm
def test_dense_output_and_estimates_are_those_of_the_loop(algorithm: Any) -> None:
    f, u0, p, _ = driven(2, 3)
    problem = psn.ODEProblem(f, u0, (0.0, 0.5), p=p)
    native, eager = (psn.solve(problem, algorithm, compile=c, **STEPS) for c in (True, False))
    times = torch.linspace(0.0, 0.5, 17, dtype=D)
    torch.testing.assert_close(native(times), eager(times), rtol=1e-12, atol=1e-12)
    one, other = (x.local_estimate(0.3).error for x in (native, eager))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def growing(t: Tensor, u: Tensor) -> Tensor:
    return u * u


FAILING: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "too many steps": (known.robertson, known.ROBERTSON_START, {"max_steps": 3}),
    "smallest step": (known.robertson, known.ROBERTSON_START, {"dtmin": 0.5, "dt0": 0.6}),
    "blow-up": (growing, tensor(1.0, 1.0), {}),
    "blow-up at fixed steps": (
        growing, tensor(1.0, 1.0), {"controller": psn.FixedStep(), "dt0": 0.05},
    ),
    "not a number": (growing, tensor(math.nan, 1.0), {}),
    "an infinite derivative": (lambda t, u: torch.sqrt(u), tensor(0.0, 1.0), {}),
    # The equations of KenCarp4's stages have no solution.
    "no solution of a stage": (growing, tensor(1.0, 1.0), {"dt0": 2.0, "dtmin": 1.0}),
}  # fmt: skip


@of_high_order
@pytest.mark.parametrize("name", [*FAILING, "singular"])
def test_failures_are_those_of_the_loop(algorithm: Any, name: str) -> None:
    # I - h gamma J vanishes at the first step.
    singular = {"controller": psn.FixedStep(), "dt0": 1 / algorithm.tableau.gamma}
    f, u0, options = (FAILING | {"singular": (lambda t, u: u, tensor(1.0, 1.0), singular)})[name]
    problem = psn.ODEProblem(f, u0, (0.0, 20.0))
    words = []
    with torch.no_grad():
        native, eager = (
            psn.solve(problem, algorithm, throw=False, compile=c, **options) for c in (True, False)
        )
        assert (native.retcode, native.stats) == (eager.retcode, eager.stats)
        assert native.t.shape == eager.t.shape
        assert not native.success
        for compile in (True, False):
            with pytest.raises(psn.SolverFailure) as caught:
                psn.solve(problem, algorithm, compile=compile, **options)
            words.append(str(caught.value).partition(" at t=")[0])
    assert words[0] == words[1]


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


REFUSED: dict[str, tuple[int, dict[str, Any], str]] = {
    "size": (LARGEST + 1, {}, f"more than {LARGEST} entries"),
    "direct": (2, {"adjoint": psn.DirectAdjoint()}, "DirectAdjoint"),
    "continuous": (2, {"adjoint": psn.GaussAdjoint()}, "GaussAdjoint"),
}


@of_high_order
@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_native_code_is_named(algorithm: Any, name: str) -> None:
    size, options, named = REFUSED[name]
    problem = psn.ODEProblem(decay, torch.ones(size), (0.0, 1.0))
    with pytest.raises(psn.CompileError, match=named) as caught:
        psn.solve(problem, algorithm, compile=True, **options)
    assert "compile=False" in str(caught.value)
    attempt._told.clear()
    with pytest.warns(psn.PsnWarning, match=named):
        assert psn.solve(problem, algorithm, compile="auto", **options).success


@pytest.mark.parametrize("atol", [1e-2, 1e-60])
def test_tolerances_that_are_numbers_are_those_of_every_entry(atol: float) -> None:
    """To the last bit; and an entry that stays zero has no error, however small its tolerance."""
    given = {"rtol": 0.0 if atol > 1e-9 else 1e-10, "atol": atol}
    each = {name: torch.full((2,), x, dtype=D) for name, x in given.items()}
    problem = psn.ODEProblem(lambda t, u: -u * (1 + t), tensor(1.0, 0.0), (0.0, 1.0))
    for algorithm in (psn.Rodas5P(), psn.Tsit5()):
        one, other = (psn.solve(problem, algorithm, compile=True, **x) for x in (given, each))
        assert torch.equal(one.t, other.t)
        assert torch.equal(one.u, other.u)
        assert one.u1[0].item() == pytest.approx(math.exp(-1.5), rel=max(atol, 1e-8))
