"""What is read off a solve is the solve's, or refused, where torch has not counted a change."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.julia

D = torch.float64


class Pull(nn.Module):
    """`u' = -p tanh(w u)`, called back where it looks at numbers of the state."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, 0.5], dtype=D))
        self.called = called

    def forward(self, t: Tensor, u: Tensor, p: Any = 1.0) -> Tensor:
        sign = 1 if self.called and float(u.detach().sum()) > 1e9 else -1
        return sign * p * torch.tanh(self.w * u)


SOURCE = "(u, p, t) -> -p .* tanh.([1.0, 0.5] .* u)"
KINDS: dict[str, Callable[[], Any]] = {
    "called": lambda: Pull(called=True),
    "translated": lambda: Pull(called=False),
    "source": lambda: psn.JuliaField(SOURCE),
}
ADJOINTS: list[tuple[psn.Algorithm, psn.Adjoint]] = [
    (psn.Rodas5P(), psn.GaussAdjoint()),
    (psn.FBDF(), psn.InterpolatingAdjoint()),
    (psn.Tsit5(), psn.BacksolveAdjoint()),
    (psn.Tsit5(), psn.ForwardDiffSensitivity()),
    (psn.Euler(), psn.DiscreteAdjoint()),
]


def by_data(p: Tensor) -> None:
    p.data.mul_(3)


def by_numpy(p: Tensor) -> None:
    p.detach().numpy()[...] *= 3


def solved(
    kind: str, algorithm: psn.Algorithm, **options: Any
) -> tuple[psn.Solution, list[Tensor]]:
    u0, p = (torch.tensor(x, dtype=D, requires_grad=True) for x in ([1.0, 0.7], [0.8, 1.1]))
    t1 = torch.tensor(1.0, dtype=D, requires_grad=True)
    if isinstance(algorithm, psn.Euler):
        options |= {"controller": psn.FixedStep(), "dt0": 0.1}
    problem = psn.ODEProblem(KINDS[kind](), u0, (0.0, t1), p=p)
    return psn.solve(problem, algorithm, engine="julia", **options), [p, u0, t1]


TSIT5 = psn.Tsit5()


def estimate(solution: psn.Solution, pair: psn.Algorithm = TSIT5) -> Tensor:
    return solution.local_estimate(0.3, pair, dt=0.7, stop_gradient=False).error


@pytest.mark.parametrize("change", [by_data, by_numpy])
@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", [psn.Rodas5P(), psn.FBDF()], ids=lambda a: type(a).__name__)
def test_local_estimates(
    kind: str, algorithm: psn.Algorithm, recorded: bool, change: Callable[[Tensor], None]
) -> None:
    with torch.set_grad_enabled(recorded):
        solution, (p, *_) = solved(kind, algorithm)
        dense, before = solution(0.3), estimate(solution)
        change(p)
        torch.testing.assert_close(solution(0.3), dense, rtol=0, atol=0)
        if kind == "called":
            with pytest.raises(RuntimeError, match=r"^p has been changed in place"):
                estimate(solution)
            return
        torch.testing.assert_close(estimate(solution), before, rtol=1e-12, atol=0)
        if recorded:
            torch.testing.assert_close(
                torch.autograd.grad(estimate(solution), p),
                torch.autograd.grad(before, p),
                rtol=1e-10,
                atol=0,
            )


@pytest.mark.parametrize(
    ("name", "package"),
    [("BS5()", "OrdinaryDiffEqLowOrderRK"), ("RKV76IIa()", "OrdinaryDiffEqVerner")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_stages_that_only_dense_output_has(kind: str, name: str, package: str) -> None:
    """SciML would evaluate them where dense output is asked for."""
    algorithm = psn.SciMLAlgorithm(name, (package,))
    (changed, (p, *_)), (kept, _) = (solved(kind, algorithm) for _ in range(2))
    by_data(p)
    torch.testing.assert_close(changed(0.3), kept(0.3), rtol=0, atol=0)


def refusal(adjoint: psn.Adjoint) -> str:
    """The discrete adjoint takes the steps again, and compares them."""
    discrete = isinstance(adjoint, psn.DiscreteAdjoint)
    return "could not reproduce the solve" if discrete else "^p has been changed in place"


@pytest.mark.parametrize("kind", ["called", "translated"])
@pytest.mark.parametrize(("algorithm", "adjoint"), ADJOINTS, ids=lambda x: type(x).__name__)
def test_gradients(kind: str, algorithm: psn.Algorithm, adjoint: psn.Adjoint) -> None:
    """Of the first sweep and of a second one, by every adjoint; those of the end among them."""
    solution, inputs = solved(kind, algorithm, adjoint=adjoint, saveat=[0.25, 0.5])
    loss = solution.u.square().sum() + solution.u1.sum()

    def gradients() -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, inputs, retain_graph=True)

    before, p = gradients(), inputs[0].detach().clone()
    by_data(inputs[1])  # the initial state, of which the solve has a copy
    torch.testing.assert_close(gradients(), before, rtol=1e-12, atol=0)
    by_data(inputs[0])
    if kind == "called":
        with pytest.raises(RuntimeError, match=refusal(adjoint)):
            gradients()
        inputs[0].data.copy_(p)
    torch.testing.assert_close(gradients(), before, rtol=1e-12, atol=0)


@pytest.mark.parametrize("recorded", [True, False])
def test_estimates_of_members_are_those_of_their_own_solves(recorded: bool) -> None:
    u0 = torch.tensor([[1.0, 0.7], [0.4, 0.9]], dtype=D)
    p = torch.tensor([[0.8, 1.1], [1.3, 0.2]], dtype=D, requires_grad=True)
    field, algorithm = Pull(called=False), psn.Rodas5P()
    with torch.set_grad_enabled(recorded):
        problem = psn.ODEProblem(field, u0[0], (0.0, 1.0), p=p[0])
        many = psn.solve(psn.EnsembleProblem(problem, u0, p=p), algorithm, engine="julia")
        one = psn.solve(psn.ODEProblem(field, u0[1], (0.0, 1.0), p=p[1]), algorithm, engine="julia")
        expected = estimate(one)
        p.data.mul_(3)
        field.w.data.mul_(2)
        torch.testing.assert_close(estimate(many[1]), expected, rtol=1e-6, atol=0)


def test_estimates_beside_integral_regularizers() -> None:
    """Of the leading part of the state that was solved."""
    field, u0 = Pull(called=False), torch.tensor([[1.0, 0.7], [0.4, 0.9]], dtype=D)
    options: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9, "engine": "julia"}
    plain = psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)), psn.Rodas5P(), **options)
    node = psn.NeuralODE(field, psn.Rodas5P(), regularizers=(psn.KineticEnergy(),), **options)
    solution, expected = node(u0), estimate(plain)
    torch.testing.assert_close(estimate(solution), expected, rtol=1e-6, atol=0)
    field.w.data.mul_(2)
    torch.testing.assert_close(estimate(solution), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("algorithm", [psn.Rodas5P(), psn.Tsit5()], ids=lambda a: type(a).__name__)
def test_copies_in_single_precision(algorithm: psn.Algorithm, recorded: bool) -> None:
    """Steps in double precision are read in it."""
    with torch.set_grad_enabled(recorded):
        solution, _ = solved("translated", algorithm)
        copy = solution.to(torch.float32)
        assert copy(0.3).dtype == torch.float32
        torch.testing.assert_close(copy(0.3), solution(0.3).float())
        # Of low order, so that it is far above the rounding errors of single precision.
        found, expected = (estimate(x, psn.BS3()) for x in (copy, solution))
        torch.testing.assert_close(found, expected.float(), rtol=1e-3, atol=0)


def brief(t: Tensor) -> Tensor:
    """Nothing at both ends of the unit interval, and 1 in the middle."""
    return torch.exp(-200 * (t - 0.5) ** 2)


# The integral of `brief`.
AREA = math.sqrt(math.pi / 200) * math.erf(math.sqrt(50))


class Brief(nn.Module):
    """`u' = -(p_0 + p_1 brief(t)) u`, which counts its calls in NumPy's memory."""

    def __init__(self, called: bool) -> None:
        super().__init__()
        self.called, self.calls = called, np.zeros(1)

    def forward(self, t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        if self.called and float(u.detach().sum()) < 1e9:
            self.calls += 1
        return -(p[0] + p[1] * brief(t)) * u


def in_place(p: Tensor) -> None:
    with torch.no_grad():
        p.mul_(3)


@pytest.mark.parametrize("change", [by_data, by_numpy, in_place])
@pytest.mark.parametrize("kind", ["called", "translated"])
@pytest.mark.parametrize(("algorithm", "adjoint"), ADJOINTS, ids=lambda x: type(x).__name__)
def test_what_neither_end_shows(
    kind: str, algorithm: psn.Algorithm, adjoint: psn.Adjoint, change: Callable[[Tensor], None]
) -> None:
    """Only in the middle of the interval a changed number makes a difference."""
    u0 = torch.ones(1, dtype=D)
    p = torch.tensor([0.8, 0.5], dtype=D, requires_grad=True)
    options: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8, "dt0": 0.01}
    if isinstance(algorithm, psn.Euler):
        algorithm, options = psn.RK4(), {"controller": psn.FixedStep(), "dt0": 0.01}
    problem = psn.ODEProblem(Brief(kind == "called"), u0, (0.0, 1.0), p=p)
    u1 = psn.solve(problem, algorithm, adjoint=adjoint, engine="julia", **options).u1

    def gradient() -> list[float]:
        (found,) = torch.autograd.grad(u1.sum(), p, retain_graph=True)
        return found.tolist()

    end = math.exp(-0.8 - 0.5 * AREA)
    right = pytest.approx([-end, -AREA * end], rel=1e-5)
    assert gradient() == right
    kept = p.detach().clone()
    change(p[1:])
    if change is in_place:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            gradient()
        return
    if kind == "called":
        with pytest.raises(RuntimeError, match=refusal(adjoint)):
            gradient()
        p.data.copy_(kept)
    assert gradient() == right


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("change", [by_data, in_place])
def test_estimates_in_the_middle(recorded: bool, change: Callable[[Tensor], None]) -> None:
    """Of steps that cannot be taken again: they do not take what the field counts for a change."""
    p = torch.tensor([0.8, 0.5], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(Brief(True), torch.ones(1, dtype=D), (0.0, 1.0), p=p)
    with torch.set_grad_enabled(recorded):
        solution = psn.solve(problem, psn.Rodas5P(), engine="julia")
        before = estimate(solution)
        torch.testing.assert_close(estimate(solution), before, rtol=0, atol=0)
        change(p[1:])
        with pytest.raises(RuntimeError, match=r"^p has been changed in place"):
            estimate(solution)
