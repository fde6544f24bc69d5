"""Dense output and estimates of native stiff and switching solves, beside those in Python."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from properties.native_cases import quick_turns
from steps_again import assert_alike, errors_of_steps, in_python, natively
from stiff_fields import FIELDS, STEPS, D, Driven, Ranked, driven, flat, random, tensor
from torch import Tensor

import pysciml_node as psn
from pysciml_node.solutions.solution import Solution
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

STIFF = (psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2())
SWITCHING = (
    psn.AutoTsit5(psn.Rosenbrock23()), psn.AutoVern7(psn.Rodas5P()), psn.AutoTsit5(psn.TRBDF2()),
)  # fmt: skip
ALGORITHMS = (*STIFF, *SWITCHING)
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.expression)
by_some = pytest.mark.parametrize(
    "algorithm", [STIFF[1], STIFF[2], SWITCHING[0]], ids=lambda a: a.expression
)
TIMES = (0.31, 0.0, 0.02, 0.05, 0.49, 0.499, 0.5, 0.06, 0.19)


def solve(name: str, algorithm: Any, **options: Any) -> tuple[Solution, list[Tensor]]:
    """A native solution and what it depends on; of two methods both have taken steps."""
    f, u0, p, wanted = FIELDS[name]()
    parts = {"u": u0} if isinstance(u0, Tensor) else u0
    parts = {key: x.clone().requires_grad_() for key, x in parts.items()}
    start: Any = parts["u"] if isinstance(u0, Tensor) else parts
    switching = isinstance(algorithm, (psn.AutoTsit5, psn.AutoVern7))

    def field(t: Tensor, u: Any, *given: Any) -> Any:
        value, rate = f(t, u, *given), 0.02 + 4 * torch.sin(16 * t) ** 4
        if isinstance(value, Tensor):
            return rate * value
        return {key: rate * x for key, x in value.items()}

    problem = psn.ODEProblem(
        field if switching else f, start, options.pop("span", (0.0, 0.5)), p=p,
        mass_matrix=options.pop("mass_matrix", None),
    )  # fmt: skip
    size = {"dt0": 0.01} if switching else {}
    chosen = {"rtol": 1e-3, "atol": 1e-3} | STEPS | size | options
    with quick_turns(0.02):
        solution = psn.solve(problem, algorithm, compile=True, engine="torch", **chosen)
    methods = solution.trajectory.record.methods
    assert sum(one != other for one, other in pairwise(methods)) >= (3 if switching else 0)
    return solution, [*parts.values(), *wanted]


def dense(solution: Solution) -> tuple[Tensor, ...]:
    return (flat(solution(tensor(*TIMES))), flat(solution(0.123)))


def local(solution: Solution) -> tuple[Tensor, ...]:
    step = solution.local_estimate(0.37, psn.Tsit5(), dt=0.02, stop_gradient=False)
    return step.error, step.stiffness


@by_algorithm
@pytest.mark.parametrize("name", ["module", "parts", "linear"])
def test_values_and_gradients_are_those_of_steps_in_python(algorithm: Any, name: str) -> None:
    solution, inputs = solve(name, algorithm)
    assert_alike(solution, inputs, dense, 1e-11)
    # Errors are small differences of stages.
    assert_alike(solution, inputs, errors_of_steps, 1e-7)
    assert_alike(solution, inputs, local, 1e-8)


@by_algorithm
@pytest.mark.parametrize("name", ["module", "normalized", "reactions", "one entry"])
def test_values_without_gradients(algorithm: Any, name: str) -> None:
    with torch.no_grad():
        solution, _ = solve(name, algorithm)
        assert_alike(solution, [], dense, 1e-12)
        assert_alike(solution, [], errors_of_steps, 1e-7)
        expected = in_python(solution)
        torch.testing.assert_close(
            solution.step_stiffness, expected.step_stiffness, rtol=1e-7, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("pair", [psn.Tsit5(), *STIFF], ids=repr)
@pytest.mark.parametrize("algorithm", [psn.Tsit5(), *STIFF[1:3]], ids=repr)
def test_local_steps_from_the_ends_of_others(algorithm: Any, pair: Any) -> None:
    """Those of an implicit pair are taken in Python, from states that native code has left."""
    solution, inputs = solve("module", algorithm)
    for t in (0.0, 0.05, 0.3, 0.31):
        for stop_gradient in (True, "state", False):
            found, expected = (
                x.local_estimate(t, pair, stop_gradient=stop_gradient, dt=0.02).error
                for x in (solution, in_python(solution))
            )
            torch.testing.assert_close(found, expected, rtol=1e-7, atol=0)
            bars = [
                torch.autograd.grad(x, inputs[1], retain_graph=True)[0] for x in (found, expected)
            ]
            torch.testing.assert_close(*bars, rtol=1e-6, atol=1e-9)


OPTIONS: dict[str, dict[str, Any]] = {
    "backward in time": {"span": (0.5, 0.3)},
    "stops": {"tstops": [0.07, 0.33]},
    "adaptive steps": {"controller": psn.PIController(), "dt0": None},
    "saved times": {"saveat": [0.1, 0.2]},
    "tolerances by entries": {
        "controller": psn.PIController(), "dt0": None,
        "rtol": tensor(1e-4, 1e-3, 1e-4), "atol": tensor(1e-5, 1e-4, 1e-5),
    },
}  # fmt: skip


@by_some
@pytest.mark.parametrize("options", OPTIONS)
def test_options(algorithm: Any, options: str) -> None:
    solution, inputs = solve("module", algorithm, **OPTIONS[options])
    # With a tolerance an iteration leaves more missing than rounding.
    bound = 1e-11 if "rtol" not in OPTIONS[options] and options != "adaptive steps" else 1e-5
    inside = tensor(0.31, 0.33, 0.47)
    assert_alike(solution, inputs, lambda s: (flat(s(inside)),), bound)


@pytest.mark.parametrize("algorithm", STIFF[:2], ids=lambda a: a.expression)
def test_mass_matrices(algorithm: Any) -> None:
    mass = random(6, 6, seed=5) / 6 + torch.eye(6, dtype=D)
    solution, inputs = solve("module", algorithm, mass_matrix=mass)
    assert_alike(solution, inputs, dense, 1e-11)
    assert_alike(solution, inputs, errors_of_steps, 1e-7)


@by_some
def test_derivatives_are_those_of_finite_differences(algorithm: Any) -> None:
    matrix = random(2, 2)

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.tanh(u @ matrix) * p[0] - p[1] * u + torch.sin(t * p[2]) * u.flip(-1)

    def read(u0: Tensor, p: Tensor) -> Tensor:
        problem = psn.ODEProblem(f, u0, (0.1, 0.9), p=p)
        solution = psn.solve(
            problem, algorithm, compile=True, controller=psn.FixedStep(), dt0=0.3, rtol=1e-2,
            atol=1e-3,
        )  # fmt: skip
        errors = torch.stack([x.error for x in solution.step_estimates()])
        return torch.cat([errors, flat(solution([0.2, 0.55, 0.88]))])

    inputs = random(2).requires_grad_(), tensor(0.7, 8.0, 1.3, gradient=True)
    with natively():
        assert torch.autograd.gradcheck(read, inputs, atol=1e-6, rtol=1e-5)


@by_some
def test_derivatives_in_time_and_second_ones_are_had_in_python(algorithm: Any) -> None:
    solution, _ = solve("module", algorithm)
    t = tensor(0.123, gradient=True)
    (slope,) = torch.autograd.grad(solution(t).sum(), t)
    ahead, behind = (solution(0.123 + h).detach().sum() for h in (1e-6, -1e-6))
    torch.testing.assert_close(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-8)
    solution, inputs = solve("module", algorithm)
    (bar,) = torch.autograd.grad(solution(0.31).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="second derivative through a solve"):
        torch.autograd.grad(bar.sum(), inputs[0])


@by_some
@pytest.mark.parametrize("read", [lambda s: s(0.31), lambda s: s.step_estimates()])
def test_weights_that_have_changed_since_are_refused(algorithm: Any, read: Any) -> None:
    solution, inputs = solve("module", algorithm)
    read(solution)
    inputs[1].data.mul_(1.1)
    with pytest.raises(RuntimeError, match="could not reproduce"):
        read(solution)


@by_some
def test_gradients_of_what_was_solved_without_any(algorithm: Any) -> None:
    """The code of a Rosenbrock solve without gradients has no adjoint."""
    with torch.no_grad():
        solution, (_, *weights) = solve("module", algorithm)
    expected = in_python(solution)
    found = [torch.autograd.grad(s(0.31).sum(), weights[0])[0] for s in (solution, expected)]
    torch.testing.assert_close(*found, rtol=1e-10, atol=1e-12)


def test_a_field_without_native_second_derivatives_has_dense_output() -> None:
    problem = psn.ODEProblem(Ranked(), tensor(1.0, 2.0), (0.0, 1.0))
    with natively():
        found = psn.solve(problem, psn.Rodas5P(), compile=True)(0.4)
    expected = psn.solve(problem, psn.Rodas5P(), compile=False)(0.4)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("algorithm", STIFF[1:3], ids=lambda a: a.expression)
def test_members(algorithm: Any) -> None:
    field = Driven(3)
    gain = tensor(1.0, 2.0, 3.0, gradient=True)
    rate = torch.ones(3, 3, dtype=D, requires_grad=True)
    n = torch.full((3,), 2.0, dtype=D)
    u0 = random(3, 2, 3)
    one = psn.ODEProblem(field, u0[0], (0.0, 0.5), p={"gain": gain[0], "rate": rate[0], "n": n[0]})
    many = psn.EnsembleProblem(one, u0, p={"gain": gain, "rate": rate, "n": n})
    solution = psn.solve(many, algorithm, compile=True, engine="torch", **STEPS)
    for m in (0, 2):
        inputs = [*field.parameters(), gain, rate]
        assert_alike(solution[m], inputs, lambda s: (s([0.13, 0.41]),), 1e-10)
        assert_alike(solution[m], inputs, errors_of_steps, 1e-7)


def test_a_state_beside_which_rates_are_integrated() -> None:
    """The state alone is stepped again, by the equations of its own."""
    field, found = Driven(3), []
    p = {"gain": tensor(3.0), "rate": tensor(1.0, 2.0, 3.0), "n": 2.0}
    for compile in (True, False):
        node = psn.NeuralODE(
            lambda t, u: field(t, u, p), psn.KenCarp4(), regularizers=[psn.KineticEnergy()],
            compile=compile, rtol=1e-2, atol=1e-2, tspan=(0.0, 0.5), **STEPS,
        )  # fmt: skip
        solution = node(random(2, 3))
        value = solution([0.11, 0.4]).square().sum()
        found.append([value, *torch.autograd.grad(value, list(field.parameters()))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11)


@by_some
def test_evaluations_are_counted(algorithm: Any) -> None:
    """Of each step as many as when it was solved, at most."""
    with torch.no_grad():
        solution, _ = solve("module", algorithm)
        before = solution.stats.nfe
        solution.step_estimates()
    count = solution.stats.nfe - before
    assert len(solution.step_errors) <= count <= before + 2 * len(solution.step_errors)


def test_single_precision() -> None:
    f, u0, p, _ = driven(2, 3)
    found = []
    for dtype in (torch.float32, D):
        field = f.to(dtype)
        given = {k: x.detach().to(dtype) if isinstance(x, Tensor) else x for k, x in p.items()}
        problem = psn.ODEProblem(field, u0.to(dtype), (0.0, 0.5), p=given)
        for algorithm in STIFF[1:3]:
            solution = psn.solve(problem, algorithm, compile=True, **STEPS)
            with natively():
                value = solution([0.12, 0.33])
            (bar,) = torch.autograd.grad(value.sum(), field.matrix)
            found.append([value.detach(), bar])
    half = len(found) // 2
    for one, other in zip(found[:half], found[half:], strict=True):
        for x, y in zip(one, other, strict=True):
            assert x.dtype == torch.float32
            torch.testing.assert_close(x.double(), y, rtol=2e-4, atol=2e-4)
