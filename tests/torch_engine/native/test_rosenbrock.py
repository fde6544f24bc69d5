"""Native Rosenbrock steps: mass matrices, second derivatives, and the code made for them."""

from __future__ import annotations

import math
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
from conformance import stiff_problems as known
from stiff_fields import (
    FIELDS,
    SAVEAT,
    STEPS,
    D,
    Decay,
    Driven,
    Ranked,
    assert_alike,
    driven,
    flat,
    random,
    solved,
    tensor,
)
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.translation import export

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

ALGORITHMS = (psn.Rosenbrock23(), psn.Rodas5P())
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)


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


def test_robertson_by_the_method_of_second_order() -> None:
    problem = psn.ODEProblem(known.robertson, known.ROBERTSON_START, (0.0, 40.0))
    with torch.no_grad():
        found = psn.solve(problem, psn.Rosenbrock23(), rtol=1e-6, atol=1e-10, compile=True)
    torch.testing.assert_close(found.u1, known.ROBERTSON_AT_40, rtol=1e-4, atol=0)


def test_training_needs_no_new_code() -> None:
    f, u0, p, _ = driven(1, 2)
    counts = []
    with mock.patch.object(export, "_translate", wraps=export._translate) as translated:
        for _ in range(3):
            solution = psn.solve(
                psn.ODEProblem(f, u0, (0.0, 0.5), p=p), psn.Rodas5P(), compile=True
            )
            gradients = torch.autograd.grad(solution.u1.sum(), [*f.parameters()])
            with torch.no_grad():
                for x, bar in zip(f.parameters(), gradients, strict=True):
                    x -= 0.01 * bar
            counts.append(translated.call_count)
    # The field, unless one that looks the same was translated before, and its pullback.
    assert counts[0] <= 2
    assert counts == counts[:1] * 3
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


def test_a_mass_matrix_is_seen_after_solves_without_it() -> None:
    field, u0 = Decay(), torch.ones(2)
    for _ in range(2):
        psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), psn.Rodas5P(), compile=True)
    for factor in (2.0, 4.0, 2.0):
        mass = factor * torch.eye(2)
        problem = psn.ODEProblem(field, u0, (0.0, 1.0), mass_matrix=mass)
        end = psn.solve(problem, psn.Rodas5P(), compile=True).u1
        torch.testing.assert_close(end, u0 * math.exp(-1 / factor), rtol=1e-4, atol=0)


def test_events_with_a_mass_matrix_are_refused_by_name() -> None:
    problem = psn.ODEProblem(Decay(), torch.ones(2), (0.0, 1.0), mass_matrix=2 * torch.eye(2))
    event = psn.Event(lambda t, u: u[0] - 0.5)
    with pytest.raises(psn.CompileError, match=r"events with mass_matrix[\s\S]*compile=False"):
        psn.solve(problem, psn.Rodas5P(), events=event, compile=True)
    attempt._told.clear()
    with pytest.warns(psn.PsnWarning, match="events with mass_matrix"):
        assert psn.solve(problem, psn.Rodas5P(), events=event, compile="auto").success


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


@by_algorithm
def test_gradients_of_fields_that_put_their_entries_into_zeros(algorithm: psn.Algorithm) -> None:
    """A chain of decays: `u0 = exp(-a t)`, `u1 = a / (b - a) (exp(-a t) - exp(-b t))`."""

    def chain(t: Tensor, u: Tensor, rates: Tensor) -> Tensor:
        out = torch.zeros_like(u)
        out[0] = -rates[0] * u[0]
        out[1:] = -out[:1] - rates[1] * u[1]
        return out

    rates = tensor(0.5, 20.0).requires_grad_()
    a, b = rates
    problem = psn.ODEProblem(chain, tensor(1.0, 0.0), (0.0, 2.0), p=rates)
    u1 = psn.solve(problem, algorithm, rtol=1e-9, atol=1e-11, compile=True).u1
    first, second = torch.exp(-2 * a), torch.exp(-2 * b)
    expected = torch.stack((first, a / (b - a) * (first - second)))
    torch.testing.assert_close(u1, expected, rtol=1e-6, atol=0)
    for found, wanted in zip(u1, expected, strict=True):
        gradients = [torch.autograd.grad(x, rates, retain_graph=True)[0] for x in (found, wanted)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=0)
