"""Native stages by Newton's iteration: when it ends, and what gradients take of it."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from stiff_fields import STEPS, D, Decay, Ranked, assert_alike, driven, random, solved, tensor
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.replay.implicit import ImplicitStages
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

ALGORITHMS = (psn.KenCarp4(), psn.TRBDF2())
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: type(a).__name__)


def strong() -> tuple[Any, Any, Any, list[Tensor]]:
    """A decay so far from linear that the start's Jacobian says little of a stage."""
    rates = tensor(1.0, 1.2, gradient=True)
    return lambda t, u: -rates * u**5 + torch.cos(3 * t), tensor(2.0, -1.5), None, [rates]


@by_algorithm
def test_evaluations_of_a_linear_field(algorithm: Any) -> None:
    """The first change is exact, and the second one says so: two evaluations a stage."""
    matrix = random(3, 3) - 9 * torch.eye(3, dtype=D)
    problem = psn.ODEProblem(lambda t, u: matrix @ u, random(3), (0.0, 1.0))
    options = {"controller": psn.FixedStep(), "dt0": 0.125, "compile": True}
    with torch.no_grad():
        found = psn.solve(problem, algorithm, **options)
    assert found.stats.nfe == 8 * (1 + 2 * (algorithm.tableau.stages - 1))


@by_algorithm
def test_a_jacobian_at_the_stage_is_taken_where_the_first_one_does_not_do(algorithm: Any) -> None:
    f, u0, _, _ = strong()
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1}
    problem = psn.ODEProblem(f, u0, (0.0, 0.5))
    with torch.no_grad():
        native = psn.solve(problem, algorithm, compile=True, **options)
        with mock.patch.object(
            ImplicitStages, "_local", autospec=True, side_effect=ImplicitStages._local
        ) as taken:
            eager = psn.solve(problem, algorithm, **options)
    assert taken.call_count > 0
    assert native.stats == eager.stats
    found, expected = (solved(strong(), algorithm, c, **options) for c in (True, False))
    # Newton's iteration ends with a change of eps**0.75 = 2e-12 of the argument. Both take the same
    # iterates, and end at the same one, so that they differ by rounding and not by that.
    assert_alike(found, expected)


@by_algorithm
def test_gradients_take_no_second_derivatives(algorithm: Any) -> None:
    """The implicit function theorem has the Jacobian alone: a field without more has gradients."""
    made = Ranked(), tensor(1.0, 2.0), None, []
    found, expected = (solved(made, algorithm, c, **STEPS) for c in (True, False))
    assert_alike(found, expected)


@by_algorithm
def test_regularizers_integrate_beside_native_steps_with_gradients(algorithm: Any) -> None:
    net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    found = []
    for compile in (True, False):
        node = psn.NeuralODE(
            lambda t, u: net(u), algorithm, regularizers=[psn.KineticEnergy()], compile=compile,
            rtol=1e-8, atol=1e-8,
        )  # fmt: skip
        penalty = node(random(3, 2)).penalty
        found.append([penalty, *torch.autograd.grad(penalty, [*net.parameters()])])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@by_algorithm
def test_events(algorithm: Any) -> None:
    """`u' = -k u` crosses 1/2 at `log(2) / k`; its derivative is `-log(2) / k**2`."""
    k = tensor(1.5, gradient=True)
    problem = psn.ODEProblem(lambda t, u, k: -k * u, tensor(1.0, 1.0), (0.0, 3.0), p=k)
    event = psn.Event(lambda t, u: u[0] - 0.5)
    exact = torch.log(tensor(2.0)) / k
    (slope,) = torch.autograd.grad(exact, k)
    times = []
    for compile in (True, False):
        found = psn.solve(problem, algorithm, rtol=1e-8, atol=1e-8, events=event, compile=compile)
        rtol = 1e-5 if algorithm.order == 2 else 1e-7
        torch.testing.assert_close(found.event_t, exact, rtol=rtol, atol=0)
        (gradient,) = torch.autograd.grad(found.event_t, k)
        torch.testing.assert_close(gradient, slope, rtol=10 * rtol, atol=0)
        times.append(found.event_t.detach())
    torch.testing.assert_close(*times, rtol=1e-11, atol=0)


def test_settings_of_gmres_are_refused_by_name_even_after_a_solve_without_them() -> None:
    problem = psn.ODEProblem(Decay(), torch.ones(2), (0.0, 1.0))
    given = psn.KenCarp4(linsolve=psn.GMRES())
    for _ in range(2):
        psn.solve(problem, psn.KenCarp4(), compile=True)
    with pytest.raises(psn.CompileError, match=r"linsolve[\s\S]*KenCarp4\(\)[\s\S]*compile=False"):
        psn.solve(problem, given, compile=True)
    attempt._told.clear()
    with pytest.warns(psn.PsnWarning, match="linsolve"):
        assert psn.solve(problem, given, compile="auto").success


@by_algorithm
def test_a_mass_matrix_is_refused_as_in_the_loop(algorithm: Any) -> None:
    problem = psn.ODEProblem(Decay(), torch.ones(2), (0.0, 1.0), mass_matrix=2 * torch.eye(2))
    for compile in (True, False):
        with pytest.raises(psn.EngineUnavailable, match=r"mass matrix[\s\S]*Rodas5P"):
            psn.solve(problem, algorithm, engine="torch", compile=compile)


def test_members_are_exact_with_events_too() -> None:
    one = psn.ODEProblem(Decay(), torch.ones(2), (0.0, 1.0))
    many = psn.EnsembleProblem(one, torch.stack((torch.ones(2), 2 * torch.ones(2))))
    exact = many.u0 * torch.exp(torch.tensor(-1.0))
    for algorithm in (psn.KenCarp4(), psn.AutoTsit5(psn.KenCarp4())):
        ends = psn.solve(many, algorithm, compile=True).u1
        torch.testing.assert_close(ends, exact, rtol=1e-3, atol=1e-4)
    event = psn.Event(lambda t, u: u[0] - 0.5)
    found, expected = (
        psn.solve(many, psn.KenCarp4(), events=event, compile=c).u1 for c in (True, False)
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_code_of_a_solve_without_gradients_serves_one_with_them() -> None:
    f, u0, p, _ = driven(1, 2)
    problem = psn.ODEProblem(f, u0, (0.0, 0.5), p=p)
    with torch.no_grad():
        first = psn.solve(problem, psn.KenCarp4(), compile=True).u1
    second = psn.solve(problem, psn.KenCarp4(), compile=True).u1
    assert torch.equal(first, second)
    assert second.requires_grad
