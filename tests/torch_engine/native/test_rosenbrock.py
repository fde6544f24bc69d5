"""Native Rosenbrock steps beside the loop in Python, published solutions, finite differences."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from conformance import stiff_problems as known
from conformance.problems import KNOWN, observed_order
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.nn import functional

import pysciml_node as psn
from pysciml_node.torch_engine.native import engine
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.rosenbrock import LARGEST
from pysciml_node.translation import export

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
ALGORITHMS = (psn.Rosenbrock23(), psn.Rodas5P())
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)


def tensor(*values: float, gradient: bool = False) -> Tensor:
    made = torch.tensor(values, dtype=D)
    made = made if len(values) > 1 else made[0]
    return made.clone().requires_grad_(gradient)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


class Driven(nn.Module):
    """A stiff driven field of a module's parameters, a buffer and `p`."""

    shift: Tensor

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.matrix = nn.Parameter(random(width, width, seed=1) - 3 * torch.eye(width, dtype=D))
        self.net = nn.Sequential(nn.Linear(width, 7), nn.Tanh(), nn.Linear(7, width)).double()
        with torch.no_grad():
            for i, x in enumerate(self.net.parameters()):
                x.copy_(random(*x.shape, seed=i) / 2)
        self.register_buffer("shift", torch.linspace(-1, 1, width, dtype=D))

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Any]) -> Tensor:
        fast = u @ self.matrix.T * p["gain"]
        return fast + self.net(u) + p["n"] * self.shift * torch.sin(t * p["rate"])


def driven(batch: int, width: int) -> tuple[Any, Any, Any, list[Tensor]]:
    field = Driven(width)
    p = {
        "gain": tensor(3.0, gradient=True),
        "rate": tensor(*torch.linspace(1, 2, width).tolist(), gradient=True),
        "n": 2.0,
    }
    return field, random(batch, width), p, [*field.parameters(), p["gain"], p["rate"]]


def oscillator() -> tuple[Any, Any, Any, list[Tensor]]:
    """A function of two parts, with a closure, an index and a power of time."""
    stiffness = tensor(40.0, gradient=True)
    weights = tensor(0.3, 0.5, gradient=True)

    def f(t: Tensor, u: dict[str, Tensor], p: tuple[Tensor, ...]) -> dict[str, Tensor]:
        pull = -stiffness * torch.sin(u["x"]) - p[0] * u["v"]
        return {"v": pull + t**2 * weights[1], "x": u["v"] * torch.cosh(weights[0] * t)}

    p = (tensor(9.0, gradient=True),)
    return f, {"x": random(2), "v": random(2, seed=3)}, p, [stiffness, weights, p[0]]


def reactions() -> tuple[Any, Any, Any, list[Tensor]]:
    """POLLU with rates of like size as parameters, and twenty entries of a state."""
    rates = known._POLLU_RATES.log1p().requires_grad_()

    def f(t: Tensor, y: Tensor) -> Tensor:
        extended = torch.cat((y, y.new_ones(1)))
        return known._POLLU_BALANCE @ (
            rates * y[known._POLLU_FIRST] * extended[known._POLLU_SECOND]
        )

    return f, random(20).abs(), None, [rates]


def constant() -> tuple[Any, Any, Any, list[Tensor]]:
    """Nothing depends on the state."""
    rate = tensor(0.3, -2.0, gradient=True)
    return lambda t, u: rate * t, random(2), None, [rate]


def linear() -> tuple[Any, Any, Any, list[Tensor]]:
    """No second derivatives by the state, and none of anything by time."""
    matrix = (random(4, 4) - 20 * torch.eye(4, dtype=D)).requires_grad_()
    return lambda t, u: matrix @ u, random(4), None, [matrix]


def normalized() -> tuple[Any, Any, Any, list[Tensor]]:
    """Activations and normalizations, which change in time."""
    norm, cell = nn.LayerNorm(4).double(), nn.GRUCell(4, 4).double()
    with torch.no_grad():
        for i, x in enumerate(cell.parameters()):
            x.copy_(random(*x.shape, seed=i) / 2)

    def f(t: Tensor, u: Tensor) -> Tensor:
        gated = norm(cell(u, torch.cos(t) * u))
        kinks = functional.elu(9 * u) + functional.softplus(u.cumsum(1)) - u * functional.relu(u)
        return gated + 0.1 * kinks + u.detach() * u.sin() - 3 * u

    return f, random(2, 4), None, [*norm.parameters(), *cell.parameters()]


FIELDS: dict[str, Callable[[], tuple[Any, Any, Any, list[Tensor]]]] = {
    "module": lambda: driven(2, 3),
    "wide module": lambda: driven(3, 5),
    "one entry": lambda: driven(1, 1),
    "parts": oscillator,
    "reactions": reactions,
    "constant": constant,
    "linear": linear,
    "normalized": normalized,
}
STEPS: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.05}
SAVEAT = (0.0, 0.03, 0.04, 0.1, 0.17, 0.45, 0.5)


def flat(u: Any) -> Tensor:
    parts = u.values() if isinstance(u, dict) else (u,)
    return torch.cat([x.reshape(-1) for x in parts])


def solved(
    made: tuple[Any, Any, Any, list[Tensor]],
    algorithm: Any,
    compile: Any,
    span: Any = (0.0, 0.5),
    **options: Any,
) -> tuple[psn.Solution, list[Tensor]]:
    """A solution and its gradients to all inputs, of a loss of all that a solution has."""
    f, u0, p, wanted = made
    starts = {"u": u0} if isinstance(u0, Tensor) else u0
    starts = {key: x.clone().requires_grad_() for key, x in starts.items()}
    mass = options.pop("mass_matrix", None)
    start: Any = starts["u"] if isinstance(u0, Tensor) else starts
    problem = psn.ODEProblem(f, start, span, p=p, mass_matrix=mass)
    options = {"rtol": 1e-6, "atol": 1e-8, "engine": "torch"} | options
    solution = psn.solve(problem, algorithm, compile=compile, **options)
    states, end = flat(solution.u), flat(solution.u1)
    weights = torch.linspace(-1, 2, len(states), dtype=D)
    loss = (states * weights).sum() + (end**3).sum()
    times = [x for x in (*span, options.get("saveat")) if isinstance(x, Tensor)]
    inputs = [*starts.values(), *wanted, *(x for x in times if x.requires_grad)]
    return solution, [loss, *torch.autograd.grad(loss, inputs, allow_unused=True)]


def assert_alike(found: Any, expected: Any, values: float = 1e-12, bars: float = 1e-10) -> None:
    (native, gradients), (eager, others) = found, expected
    assert native.retcode is eager.retcode
    assert native.stats.naccept == eager.stats.naccept
    assert native.stats.nreject == eager.stats.nreject
    assert native.stats.naccept_backward == eager.stats.naccept_backward
    assert native.t.shape == eager.t.shape
    torch.testing.assert_close(flat(native.u), flat(eager.u), rtol=values, atol=values)
    torch.testing.assert_close(flat(native.u1), flat(eager.u1), rtol=values, atol=values)
    for one, other in zip(gradients, others, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            scale = float(other.detach().abs().max())
            torch.testing.assert_close(one, other, rtol=bars, atol=bars * max(scale, 1.0))


@by_algorithm
@pytest.mark.parametrize("name", FIELDS)
def test_equal_steps_give_equal_states_and_gradients(algorithm: Any, name: str) -> None:
    made, saveat = FIELDS[name](), tensor(*SAVEAT)
    found, expected = (
        solved(made, algorithm, compile, saveat=saveat, **STEPS) for compile in (True, False)
    )
    assert_alike(found, expected)


@by_algorithm
@pytest.mark.parametrize("name", ["module", "wide module", "parts", "constant", "linear"])
def test_mass_matrices(algorithm: Any, name: str) -> None:
    made = FIELDS[name]()
    size = len(flat(made[1]))
    mass = random(size, size, seed=5) / size + torch.eye(size, dtype=D)
    options = {**STEPS, "saveat": tensor(*SAVEAT), "mass_matrix": mass}
    found, expected = (solved(made, algorithm, compile, **options) for compile in (True, False))
    assert_alike(found, expected, 1e-11)
    if name == "linear":
        options["mass_matrix"] = torch.diag(tensor(0.0, 1.0, 1.0, 1.0))
        options["span"] = tensor(0.0, gradient=True), tensor(0.5, gradient=True)
        found, expected = (solved(made, algorithm, c, **options) for c in (True, False))
        assert_alike(found, expected, 1e-11)


def test_a_differential_algebraic_equation_has_its_published_solution() -> None:
    """Robertson's third rate replaced by the conservation of mass."""

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.cat((known.robertson(t, y)[:2], (y.sum() - 1).reshape(1)))

    mass = torch.diag(tensor(1.0, 1.0, 0.0))
    problem = psn.ODEProblem(f, known.ROBERTSON_START, (0.0, 40.0), mass_matrix=mass)
    end = psn.solve(problem, psn.Rodas5P(), rtol=1e-8, atol=1e-12, compile=True).u1
    torch.testing.assert_close(end, known.ROBERTSON_AT_40, rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_solutions(name: str) -> None:
    f, start, end, reference, atol = PUBLISHED[name]
    with torch.no_grad():
        found = psn.solve(
            psn.ODEProblem(f, start, (0.0, end)), psn.Rodas5P(), rtol=1e-9, atol=1e-9 * atol,
            compile=True,
        )  # fmt: skip
    torch.testing.assert_close(found.u1, reference, rtol=1e-5, atol=0)


def test_robertson_by_the_method_of_second_order() -> None:
    problem = psn.ODEProblem(known.robertson, known.ROBERTSON_START, (0.0, 40.0))
    with torch.no_grad():
        found = psn.solve(problem, psn.Rosenbrock23(), rtol=1e-6, atol=1e-10, compile=True)
    torch.testing.assert_close(found.u1, known.ROBERTSON_AT_40, rtol=1e-4, atol=0)


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


def test_gradients_of_robertsons_rates_agree_with_those_of_the_loop() -> None:
    rates = tensor(0.04, 3e7, 1e4, gradient=True)

    def f(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        slow, fast, medium = p[0] * y[0], p[1] * y[1] ** 2, p[2] * y[1] * y[2]
        return torch.stack((medium - slow, slow - medium - fast, fast))

    gradients = []
    for compile in (True, False):
        problem = psn.ODEProblem(f, known.ROBERTSON_START, (0.0, 40.0), p=rates)
        end = psn.solve(problem, psn.Rodas5P(), rtol=1e-6, atol=1e-10, compile=compile).u1
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


def test_dense_output_and_estimates_are_those_of_the_loop() -> None:
    f, u0, p, _ = driven(2, 3)
    problem = psn.ODEProblem(f, u0, (0.0, 0.5), p=p)
    native, eager = (psn.solve(problem, psn.Rodas5P(), compile=c, **STEPS) for c in (True, False))
    times = torch.linspace(0.0, 0.5, 17, dtype=D)
    torch.testing.assert_close(native(times), eager(times), rtol=1e-12, atol=1e-12)
    one, other = (x.local_estimate(0.3).error for x in (native, eager))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-9)


def test_training_needs_no_new_code() -> None:
    f, u0, p, _ = driven(1, 2)
    with mock.patch.object(export, "_translate", wraps=export._translate) as translated:
        for _ in range(3):
            solution = psn.solve(
                psn.ODEProblem(f, u0, (0.0, 0.5), p=p), psn.Rodas5P(), compile=True
            )
            gradients = torch.autograd.grad(solution.u1.sum(), [*f.parameters()])
            with torch.no_grad():
                for x, bar in zip(f.parameters(), gradients, strict=True):
                    x -= 0.01 * bar
    assert translated.call_count == 2  # the field and its pullback
    expected = psn.solve(psn.ODEProblem(f, u0, (0.0, 0.5), p=p), psn.Rodas5P()).u1
    found = psn.solve(psn.ODEProblem(f, u0, (0.0, 0.5), p=p), psn.Rodas5P(), compile=True).u1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_each_tensor_of_p_keeps_its_place() -> None:
    """A tensor that stands in two places may be two tensors in the next solve."""
    u0, both = tensor(1.0, 2.0), tensor(0.5, gradient=True)

    def f(t: Tensor, u: Tensor, p: list[Tensor]) -> Tensor:
        return -p[0] * u**2 + p[1] * t

    for p in ([both, both], [tensor(0.5, gradient=True), tensor(3.0, gradient=True)]):
        found = [
            torch.autograd.grad(
                psn.solve(psn.ODEProblem(f, u0, (0.0, 0.5), p=p), psn.Rodas5P(), compile=c,
                          **STEPS).u1.sum(), p, allow_unused=True,
            )
            for c in (True, False)
        ]  # fmt: skip
        torch.testing.assert_close(*found, rtol=1e-10, atol=1e-10)


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
    # I - h gamma J vanishes at the first step.
    "singular": (
        lambda t, u: u, tensor(1.0, 1.0),
        {"controller": psn.FixedStep(), "dt0": 1 / psn.Rodas5P().tableau.gamma},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAILING)
def test_failures_are_those_of_the_loop(name: str) -> None:
    f, u0, options = FAILING[name]
    problem = psn.ODEProblem(f, u0, (0.0, 20.0))
    words = []
    with torch.no_grad():
        native, eager = (
            psn.solve(problem, psn.Rodas5P(), throw=False, compile=c, **options)
            for c in (True, False)
        )
        assert (native.retcode, native.stats) == (eager.retcode, eager.stats)
        assert native.t.shape == eager.t.shape
        assert not native.success
        for compile in (True, False):
            with pytest.raises(psn.SolverFailure) as caught:
                psn.solve(problem, psn.Rodas5P(), compile=compile, **options)
            words.append(str(caught.value).partition(" at t=")[0])
    assert words[0] == words[1]


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


REFUSED: dict[str, tuple[dict[str, Any], int, dict[str, Any], str]] = {
    "jac": ({"jac": lambda t, u: -torch.eye(2)}, 2, {}, "jac"),
    "sparsity": ({"jac_sparsity": torch.eye(2, dtype=torch.bool)}, 2, {}, "jac_sparsity"),
    "events and mass": (
        {"mass_matrix": 2 * torch.eye(2)},
        2,
        {"events": psn.Event(lambda t, u: u[0] - 0.5)},
        "events with mass_matrix",
    ),
    "size": ({}, LARGEST + 1, {}, f"more than {LARGEST} entries"),
    "direct": ({}, 2, {"adjoint": psn.DirectAdjoint()}, "DirectAdjoint"),
    "continuous": ({}, 2, {"adjoint": psn.GaussAdjoint()}, "GaussAdjoint"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_native_code_is_named(name: str) -> None:
    given, size, options, named = REFUSED[name]
    problem = psn.ODEProblem(decay, torch.ones(size), (0.0, 1.0), **given)
    with pytest.raises(psn.CompileError, match=named) as caught:
        psn.solve(problem, psn.Rodas5P(), compile=True, **options)
    assert "compile=False" in str(caught.value)
    engine._told.clear()
    with pytest.warns(psn.PsnWarning, match=named):
        assert psn.solve(problem, psn.Rodas5P(), compile="auto", **options).success


class Decay(nn.Module):
    """A field of which all can be seen."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u


@pytest.mark.parametrize("name", ["jac", "sparsity"])
def test_what_a_problem_brings_is_seen_after_solves_without_it(name: str) -> None:
    given, _, _, named = REFUSED[name]
    field, u0 = Decay(), torch.ones(2)
    for _ in range(2):
        psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), psn.Rodas5P(), compile=True)
    with pytest.raises(psn.CompileError, match=named):
        psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0), **given), psn.Rodas5P(), compile=True)
    for factor in (2.0, 4.0, 2.0):
        mass = factor * torch.eye(2)
        problem = psn.ODEProblem(field, u0, (0.0, 1.0), mass_matrix=mass)
        end = psn.solve(problem, psn.Rodas5P(), compile=True).u1
        torch.testing.assert_close(end, u0 * math.exp(-1 / factor), rtol=1e-4, atol=0)


def test_gradients_that_are_asked_for_later_have_their_code() -> None:
    """The code of a solve without gradients has no adjoint."""
    field = Driven(2)
    p = {"gain": tensor(3.0), "rate": tensor(1.0, 2.0), "n": 2.0}
    ends = []
    for wanted in (False, True, False, True):
        field.requires_grad_(wanted)
        u0 = random(1, 2).requires_grad_(wanted)
        problem = psn.ODEProblem(field, u0, (0.0, 0.5), p=p)
        end = psn.solve(problem, psn.Rodas5P(), compile=True).u1
        assert end.requires_grad == wanted
        if wanted:
            (gradient,) = torch.autograd.grad(end.sum(), u0)
            assert bool(gradient.isfinite().all())
        ends.append(end.detach())
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=1e-12, atol=0)


class Ranked(nn.Module):
    """Its second derivative needs the place of the greatest entry, which programs do not have."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u * u.max(0, keepdim=True)[0]


def test_a_second_derivative_without_native_code_is_missed_by_gradients_alone() -> None:
    problem = psn.ODEProblem(Ranked(), tensor(1.0, 2.0), (0.0, 1.0))
    found, expected = (psn.solve(problem, psn.Rodas5P(), compile=c).u1 for c in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    problem = psn.ODEProblem(Ranked(), tensor(1.0, 2.0, gradient=True), (0.0, 1.0))
    with pytest.raises(psn.CompileError, match="second derivatives, and Ranked uses"):
        psn.solve(problem, psn.Rodas5P(), compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", psn.PsnWarning)
        assert psn.solve(problem, psn.Rodas5P(), compile="auto").success


def test_regularizers_integrate_beside_native_steps() -> None:
    """Without gradients; with them the integrand's second derivatives would be needed."""
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()

    def node(compile: Any) -> psn.NeuralODE:
        return psn.NeuralODE(
            lambda t, u: net(u), psn.Rodas5P(), regularizers=[psn.KineticEnergy()], compile=compile,
            rtol=1e-9, atol=1e-9,
        )  # fmt: skip

    with torch.no_grad():
        found, expected = (float(node(c)(random(3, 2)).penalty) for c in (True, False))
    assert found == pytest.approx(expected, rel=1e-7)
    with pytest.raises(psn.CompileError, match="regularizers"):
        node(True)(random(3, 2))
