"""The laws of the variance-corrected rule through `solve` and `NeuralODE`."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial
from typing import Any

import pytest
import torch
from optim.flows import normal, paper_loss, scalar

import pysciml_node as psn
from pysciml_node.optim import VarianceCorrected, scale_by_terminal_variance_
from pysciml_node.optim.gauss_newton import GaussNewton

TIGHT = {"rtol": 1e-12, "atol": 1e-13}


class Scalar(torch.nn.Module):
    """`x' = a x`."""

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = scalar(a)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return self.a * u


class Network(torch.nn.Module):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.w1 = torch.nn.Parameter(normal(2, 6, seed=seed))
        self.w2 = torch.nn.Parameter(normal(6, 2, seed=seed + 1) / 6**0.5)

    def forward(self, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        return torch.tanh(u @ self.w1) @ self.w2


def draw(count: int) -> list[tuple[float, float, float, float, float]]:
    """Random `(u0, a*, t, sigma, lr)` with `|a t|` within the reach of tight tolerances."""
    source = random.Random(0)
    return [
        (
            source.uniform(-2.5, 2.5),
            source.uniform(-1.0, 1.0),
            10.0 ** source.uniform(-1.0, 0.5),
            10.0 ** source.uniform(-1.0, 1.0),
            10.0 ** source.uniform(-3.0, 0.0),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("engine", ["torch", pytest.param("julia", marks=pytest.mark.julia)])
def test_one_dimensional_law_for_200_random_problems(engine: str) -> None:
    """`u <- u - lr (1 - exp(-u))` to 1e-10, and the proved interval of the loss ratio."""
    x0, field = normal(4, 1, seed=0), Scalar(0.0)
    options: dict[str, Any] = {"engine": engine, **TIGHT}
    for index, (u, target, t, sigma, lr) in enumerate(draw(200)):
        with torch.no_grad():
            field.a.fill_(target + u / t)
        field.a.grad = None
        start = sigma * x0
        if index % 2:
            node = psn.NeuralODE(field, psn.Vern9(), tspan=(0.0, t), **options)
            solve = partial(node, start)
        else:
            problem = psn.ODEProblem(field, start, (0.0, t))
            solve = partial(psn.solve, problem, psn.Vern9(), **options)
        y = start * math.exp(target * t)
        sol = solve()
        loss = paper_loss(sol.u1, y)
        loss.backward()
        VarianceCorrected(field.parameters(), lr=lr).step(solution=sol)
        new = (field.a.item() - target) * t
        assert new == pytest.approx(u - lr * (1.0 - math.exp(-u)), rel=1e-10, abs=1e-10)
        if u > 1.0:
            ratio = float((paper_loss(solve().u1, y) / loss).detach())
            assert (1.0 - lr) ** 2 - 1e-9 <= ratio <= math.exp(-2.0 * lr) + 1e-9


ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda adjoint: type(adjoint).__name__)
@pytest.mark.parametrize("curvature", ["terminal", "diagonal", "gauss-newton"])
def test_every_adjoint_carries_every_curvature(adjoint: psn.DirectAdjoint, curvature: str) -> None:
    """One parameter, one state: all curvatures with all adjoints take the paper's step."""
    u, target, t, lr = 0.8, -0.4, 1.5, 0.3
    options: dict[str, Any] = {"curvature": curvature}
    if curvature == "diagonal":
        options |= {"probes": 4, "damping": 0.0}
    elif curvature == "gauss-newton":
        options |= {"damping": 0.0}
    field, start = Scalar(target + u / t), normal(4, 1, seed=0)
    node = psn.NeuralODE(field, psn.Tsit5(), tspan=(0.0, t), rtol=1e-9, atol=1e-9, adjoint=adjoint)

    def closure() -> tuple[torch.Tensor, psn.Solution]:
        sol = node(start)
        return paper_loss(sol.u1, start * math.exp(target * t)), sol

    VarianceCorrected(field.parameters(), lr=lr, **options).step(closure)
    new = (field.a.item() - target) * t
    assert new == pytest.approx(u - lr * (1.0 - math.exp(-u)), abs=1e-6)


def network_closure(adjoint: psn.DirectAdjoint) -> tuple[Network, Any]:
    """A student that starts near its teacher, and its loss at the end of the flow."""
    teacher, student = Network(3), Network(3)
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(0.8)
    x0 = normal(16, 2, seed=9)
    node = psn.NeuralODE(teacher, tspan=(0.0, 1.0), rtol=1e-6, atol=1e-6, adjoint=adjoint)
    y = node(x0).u1.detach()
    node.field = student

    def closure() -> tuple[torch.Tensor, psn.Solution]:
        sol = node(x0)
        return paper_loss(sol.u1, y), sol

    return student, closure


def test_finite_differences_and_double_backward_agree_on_a_network() -> None:
    """`C v` at solver tolerances of 1e-6, where differences see the steps' sizes change."""
    operators = []
    for adjoint in (psn.DiscreteAdjoint(), psn.DirectAdjoint()):
        student, closure = network_closure(adjoint)
        outputs = closure()[1].u1
        exact = isinstance(adjoint, psn.DirectAdjoint)
        evaluate = None if exact else lambda closure=closure: closure()[1].u1.detach()
        operators.append(GaussNewton(outputs, list(student.parameters()), evaluate, 1.2e-4))
    for seed in range(3):
        v = normal(24, seed=seed)
        differenced, exact_product = (
            operator.pull_back(operator.push_forward(v)) for operator in operators
        )
        torch.testing.assert_close(differenced, exact_product, rtol=1e-4, atol=1e-5)


def test_gauss_newton_fits_a_network_in_a_few_steps() -> None:
    student, closure = network_closure(psn.DiscreteAdjoint())
    optimizer = VarianceCorrected(student.parameters(), lr=1.0, curvature="gauss-newton")
    losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert all(new <= old for old, new in itertools.pairwise(losses))
    assert losses[-1] < 1e-4 * losses[0]


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.GaussAdjoint()])
def test_double_backward_without_direct_adjoint_names_the_remedy(
    adjoint: psn.DirectAdjoint,
) -> None:
    student, closure = network_closure(adjoint)
    optimizer = VarianceCorrected(
        student.parameters(), curvature="gauss-newton", jvp="double-backward"
    )
    with pytest.raises(ValueError, match="DirectAdjoint"):
        optimizer.step(closure)


def test_gradient_transform_reads_a_solution_before_adam() -> None:
    field, start = Scalar(0.5), normal(4, 1, seed=0)
    sol = psn.NeuralODE(field, tspan=(0.0, 2.0))(start)
    sol.u1.square().mean().backward()
    raw = field.a.grad.item()
    factor = scale_by_terminal_variance_(field.parameters(), sol)
    assert factor == pytest.approx(1.0 / (4.0 * float(sol.u1.detach().square().mean())))
    assert field.a.grad.item() == pytest.approx(raw * factor)
