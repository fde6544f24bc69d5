"""Implicit steps of the embedded engine: orders, stability, gradients, refusals."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from conformance.problems import KNOWN, observed_order
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import pysciml_node as psn

IMPLICIT = (psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2())
ROSENBROCK = IMPLICIT[:2]


def name(algorithm: Any) -> str:
    return type(algorithm).__name__


def fixed(problem: psn.ODEProblem, algorithm: Any, steps: int, **options: Any) -> psn.Solution:
    size = abs(problem.t1 - problem.t0) / steps
    return psn.solve(problem, algorithm, controller=psn.FixedStep(), dt0=size, **options)


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=name)
@pytest.mark.parametrize("case", ["riccati", "swirl"])
def test_orders_of_solution_and_dense_output(algorithm: Any, case: str) -> None:
    """Coupled, nonlinear and non-autonomous, so that every term of the step counts."""
    known = KNOWN[case]
    problem = psn.ODEProblem(known.f, known.u0, known.tspan)
    times = torch.linspace(*known.tspan, 23, dtype=torch.float64)
    steps = [16, 32, 64]
    ends, between = [], []
    with torch.no_grad():
        for count in steps:
            solution = fixed(problem, algorithm, count)
            ends.append(float((solution.u1 - known.at(known.tspan[1])).norm()))
            between.append(float((solution(times) - known.at(times)).norm(dim=1).max()))
    sizes = [1 / count for count in steps]
    assert observed_order(sizes, ends) > algorithm.order - 0.35
    interpolant = algorithm.tableau.interpolant
    assert observed_order(sizes, between) > min(algorithm.order, interpolant.order) - 0.35


@pytest.mark.parametrize("algorithm", ROSENBROCK, ids=name)
def test_a_rosenbrock_step_evaluates_the_field_once_a_stage(algorithm: Any) -> None:
    """The Jacobian at the start of a step is taken of the first stage."""
    known = KNOWN["swirl"]
    problem = psn.ODEProblem(known.f, known.u0, known.tspan)
    with torch.no_grad():
        assert fixed(problem, algorithm, 5).stats.nfe == 5 * algorithm.tableau.stages
        stats = psn.solve(problem, algorithm, rtol=1e-7, atol=1e-7, dt0=1.0).stats
    again = algorithm.tableau.stages - 1  # a rejected step keeps what it knows of its start
    assert stats.nreject > 0
    assert stats.nfe == stats.naccept * (again + 1) + stats.nreject * again


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=name)
def test_order_of_the_error_estimate(algorithm: Any) -> None:
    known = KNOWN["swirl"]
    start = known.at(0.3)
    sizes, estimates = [0.02, 0.01, 0.005], []
    for size in sizes:
        problem = psn.ODEProblem(known.f, start, (0.3, 1.0))
        with torch.no_grad():
            solution = psn.solve(problem, algorithm, rtol=1e-3, atol=1e-3)
            estimates.append(float(solution.local_estimate(0.3, dt=size).error))
    assert observed_order(sizes, estimates) == pytest.approx(
        algorithm.tableau.error_order + 1, abs=0.4
    )


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=name)
def test_l_stability(algorithm: Any) -> None:
    """One step of `u' = z u` goes to zero with `z` to minus infinity."""
    sizes = []
    for rate in (1e4, 1e8):
        problem = psn.ODEProblem(
            lambda t, u, rate=rate: -rate * u, torch.ones(1).double(), (0.0, 1.0)
        )
        with torch.no_grad():
            sizes.append(abs(float(fixed(problem, algorithm, 1).u1)))
    assert sizes[0] < 2e-3
    assert sizes[1] < 1e-6


@pytest.mark.parametrize("algorithm", [psn.KenCarp4(), psn.TRBDF2()], ids=name)
def test_diagonally_implicit_methods_are_stiffly_accurate(algorithm: Any) -> None:
    """The last stage is the end of the step, and the diagonal is one number."""
    tableau = algorithm.tableau
    assert tableau.a[-1] == tableau.b[:-1]
    assert tableau.b[-1] == tableau.gamma
    for node, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
        assert sum(row) + tableau.gamma == pytest.approx(node, abs=1e-14)


@pytest.mark.parametrize(
    ("algorithm", "order"),
    [(psn.Rodas5P(), 3), (psn.KenCarp4(), 2), (psn.TRBDF2(), 2), (psn.Rosenbrock23(), 2)],
    ids=name,
)
def test_order_that_stiffness_leaves(algorithm: Any, order: int) -> None:
    """Prothero and Robinson's `u' = z (u - phi) + phi'`, with steps far beyond `1 / |z|`."""
    errors, counts = [], [8, 16, 32]
    for count in counts:
        problem = psn.ODEProblem(
            lambda t, u: -1e3 * (u - torch.sin(t + 0.5)) + torch.cos(t + 0.5),
            torch.tensor([0.5], dtype=torch.float64).sin(),
            (0.0, 2.0),
        )
        with torch.no_grad():
            end = fixed(problem, algorithm, count).u1
        errors.append(abs(float(end - torch.tensor([2.5], dtype=torch.float64).sin())))
    assert observed_order([2 / count for count in counts], errors) > order - 0.35


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=name)
@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()], ids=name)
def test_gradients_of_states_times_and_parameters(algorithm: Any, adjoint: Any) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(2, 2, dtype=torch.float64)

    def f(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return torch.tanh(u @ matrix) * p[0] - p[1] * u + torch.sin(t * p[2]) * u.flip(-1)

    u0 = torch.randn(2, dtype=torch.float64, requires_grad=True)
    p = torch.tensor([0.7, 8.0, 1.3], dtype=torch.float64, requires_grad=True)
    t0, t1 = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in (0.1, 0.9))
    saveat = torch.tensor([0.2, 0.81], dtype=torch.float64, requires_grad=True)

    def states(u0: Tensor, p: Tensor, t0: Tensor, t1: Tensor, saveat: Tensor) -> Any:
        solution = psn.solve(
            psn.ODEProblem(f, u0, (t0, t1), p=p),
            algorithm,
            controller=psn.FixedStep(),
            dt0=0.3,
            saveat=saveat,
            adjoint=adjoint,
        )
        return solution.u, solution.u1

    assert gradcheck(states, (u0, p, t0, t1, saveat), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=name)
@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()], ids=name)
@pytest.mark.parametrize("norm", ["layer_norm", "batch_norm", "instance_norm"])
def test_gradients_through_normalizations_that_change_in_time(
    algorithm: Any, adjoint: Any, norm: str
) -> None:
    """Torch has their third derivatives wrong; no gradient of a solve needs them."""
    normalize = {
        "layer_norm": lambda u: torch.nn.functional.layer_norm(u, (3,)),
        "batch_norm": lambda u: torch.nn.functional.batch_norm(u, None, None, training=True),
        "instance_norm": lambda u: torch.nn.functional.instance_norm(u[None])[0],
    }[norm]

    def f(t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = normalize(u * t + torch.sin(u)) - u
        return out

    u0 = torch.tensor([[0.3, -0.8, 1.1], [0.5, 0.9, -0.2]], dtype=torch.float64)

    def end(u0: Tensor) -> Tensor:
        return fixed(psn.ODEProblem(f, u0, (0.1, 0.7)), algorithm, 2, adjoint=adjoint).u1

    assert gradcheck(end, u0.requires_grad_(), atol=1e-7, rtol=1e-6)
    if adjoint.discrete and norm == "layer_norm":
        one = psn.ODEProblem(f, u0[:1].detach(), (0.1, 0.7))

        def ends(starts: Tensor) -> Tensor:
            members = psn.EnsembleProblem(one, u0=starts)
            return psn.solve(members, algorithm, controller=psn.FixedStep(), dt0=0.3).u1

        assert gradcheck(ends, u0[:, None].detach().requires_grad_(), atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=name)
def test_second_derivatives_by_the_direct_adjoint(algorithm: Any) -> None:
    u0 = torch.tensor([0.4], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([1.3], dtype=torch.float64, requires_grad=True)

    def end(u0: Tensor, p: Tensor) -> Any:
        problem = psn.ODEProblem(lambda t, u, p: -p * torch.sin(3 * u), u0, (0.0, 0.6), p=p)
        return fixed(problem, algorithm, 2, adjoint=psn.DirectAdjoint()).u1

    assert gradgradcheck(end, (u0, p), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_and_both_directions_of_time(algorithm: Any, dtype: torch.dtype) -> None:
    rtol = 1e-4 if dtype == torch.float32 or algorithm.order == 2 else 1e-7

    def f(t: Tensor, u: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"x": u["v"], "v": -4 * u["x"]}

    start = {"x": torch.ones(2, 1, dtype=dtype), "v": torch.zeros(2, 1, dtype=dtype)}
    with torch.no_grad():
        there = psn.solve(
            psn.ODEProblem(f, start, (0.0, 1.0)), algorithm, rtol=rtol, atol=rtol, dtmax=0.2
        )
        back = psn.solve(
            psn.ODEProblem(f, there.u1, (1.0, 0.0)), algorithm, rtol=rtol, atol=rtol, dtmax=0.2
        )
    exact = torch.full((2, 1), 2.0, dtype=dtype).cos()
    torch.testing.assert_close(there.u1["x"], exact, rtol=100 * rtol, atol=0)
    torch.testing.assert_close(back.u1["x"], start["x"], rtol=200 * rtol, atol=0)


@pytest.mark.parametrize("algorithm", ROSENBROCK, ids=name)
def test_events_with_a_mass_matrix(algorithm: Any) -> None:
    """`2 u' = -2 k u` crosses 1/2 at `log(2) / k`; its derivative is `-log(2) / k**2`."""
    k = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    mass = 2 * torch.eye(1, dtype=torch.float64)
    problem = psn.ODEProblem(
        lambda t, u, k: -2 * k * u, torch.ones(1).double(), (0.0, 3.0), p=k, mass_matrix=mass
    )
    event = psn.Event(lambda t, u: u[0] - 0.5)
    solution = psn.solve(problem, algorithm, rtol=1e-8, atol=1e-8, events=event)
    exact = torch.log(torch.tensor(2.0, dtype=torch.float64)) / k
    rtol = 1e-5 if algorithm.order == 2 else 1e-7
    torch.testing.assert_close(solution.event_t, exact, rtol=rtol, atol=0)
    (found,) = torch.autograd.grad(solution.event_t, k)
    (expected,) = torch.autograd.grad(exact, k)
    torch.testing.assert_close(found, expected, rtol=10 * rtol, atol=0)


def test_nothing_that_needs_no_gradient_gets_one() -> None:
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2), (0.0, 1.0))
    solution = psn.solve(problem, psn.Rodas5P())
    assert not solution.u1.requires_grad
    assert not solution(0.5).requires_grad


def test_regularizers_read_implicit_steps() -> None:
    k = torch.tensor(30.0, dtype=torch.float64, requires_grad=True)
    problem = psn.ODEProblem(lambda t, u: -k * (u - torch.cos(t)), torch.ones(1).double(), (0, 2.0))
    solution = psn.solve(problem, psn.Rodas5P(), rtol=1e-4, atol=1e-4)
    estimate = solution.local_estimate(0.5, stop_gradient=False)
    (gradient,) = torch.autograd.grad(estimate.error, k)
    assert torch.isfinite(gradient)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"adjoint": psn.BacksolveAdjoint()}, "adjoint=DiscreteAdjoint"),
        ({"adjoint": psn.QuadratureAdjoint()}, "Julia"),
    ],
)
def test_refusals_name_the_remedy(options: dict[str, Any], words: str) -> None:
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(2), (0.0, 1.0))
    with pytest.raises(psn.EngineUnavailable, match=words):
        psn.solve(problem, psn.Rodas5P(), engine="torch", **options)


def test_states_that_are_too_large_or_complex_are_refused() -> None:
    large = psn.ODEProblem(lambda t, u: -u, torch.ones(4096), (0.0, 1.0))
    with pytest.raises(psn.EngineUnavailable, match="2048"):
        psn.solve(large, psn.Rodas5P(), engine="torch")
    turning = psn.ODEProblem(lambda t, u: 1j * u, torch.ones(2, dtype=torch.complex64), (0.0, 1.0))
    with pytest.raises(psn.EngineUnavailable, match="view_as_real"):
        psn.solve(turning, psn.Rodas5P(), engine="torch")


def test_julia_is_not_started() -> None:
    problem = psn.ODEProblem(lambda t, u: -1e3 * u, torch.ones(2), (0.0, 1.0))
    before = "juliacall" in sys.modules
    assert psn.solve(problem, psn.Rodas5P()).engine == "torch"
    assert ("juliacall" in sys.modules) == before


@pytest.mark.parametrize("algorithm", IMPLICIT, ids=name)
def test_a_step_after_a_rejected_one_is_a_step_of_the_method(algorithm: Any) -> None:
    """The same times as fixed steps give the same states; so does an end at an event."""

    def swing(t: Tensor, u: Tensor) -> Tensor:
        kick = 9 * torch.exp(-400 * (t - 1.5) ** 2)  # too short for the steps before it
        return torch.stack((u[1], kick - 3 * torch.sin(u[0]) - 0.1 * u[1]))

    u0 = torch.tensor([1.0, 0.3], dtype=torch.float64)
    problem = psn.ODEProblem(swing, u0, (0.0, 3.0))
    event = psn.Event(lambda t, u: u[1], terminal=False)
    with torch.no_grad():
        options: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-4, "events": event}
        found = psn.solve(problem, algorithm, **options)
        assert found.stats.nreject > 0
        assert len(found.jumps) > 0
        times = tuple(found.step_times.tolist())
        again = psn.solve(problem, algorithm, controller=psn.FixedStep(times))
    torch.testing.assert_close(found.u1, again.u1, rtol=1e-9, atol=1e-9)
