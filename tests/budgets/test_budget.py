"""Budgets in the training of real equations."""

from __future__ import annotations

import copy
import io
import itertools
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.budgets.costs import cost_of, smooth_cost_of
from pysciml_node.experiments.trainer.streams import streams

D = torch.float64


class Field(nn.Module):
    """A small network, its first weights large enough for a few steps."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.inner = nn.Parameter(torch.randn(2, 16, dtype=D, generator=generator))
        self.outer = nn.Parameter(0.3 * torch.randn(16, 2, dtype=D, generator=generator))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ self.inner + t) @ self.outer


def local_error(budget: psn.Budget, seed: int = 0) -> psn.LocalError:
    return psn.LocalError(
        "unbiased",
        weight=budget,
        step_size="solver",
        stop_gradient=False,
        generator=torch.Generator().manual_seed(seed),
    )


def layer(regularizers: Any, **options: Any) -> psn.NeuralODE:
    settings = {"rtol": 1e-6, "atol": 1e-6, **options}
    return psn.NeuralODE(Field(), psn.Tsit5(), regularizers=regularizers, **settings)


def points(count: int = 16) -> Tensor:
    return torch.randn(count, 2, dtype=D, generator=streams(0)["batches"])


def train(node: psn.NeuralODE, steps: int, rate: float = 1e-2) -> list[int]:
    """To rotate points by a right angle; evaluations of every step's solve."""
    optimizer = torch.optim.Adam(node.parameters(), lr=rate)
    x = points()
    y = torch.stack((-x[:, 1], x[:, 0]), 1)
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        solution = node(x)
        ((solution.u1 - y).square().mean() + solution.penalty).backward()
        optimizer.step()
        found.append(solution.stats.nfe)
    return found


def evaluations(node: psn.NeuralODE) -> int:
    node.eval()
    with torch.no_grad():
        found = int(node(points()).stats.nfe)
    node.train()
    return found


def test_a_training_keeps_to_its_budget() -> None:
    """Without a penalty it ends with 92 evaluations."""
    budget = psn.Budget(nfe=62, horizon=150)
    node = layer(local_error(budget), compile=True)
    train(node, 150)
    # Evaluations come six at a time.
    assert evaluations(node) == pytest.approx(62, abs=6)
    assert budget.history.cost[-1] == pytest.approx(62, abs=6)
    assert budget.weight > 0


def test_evaluations_for_penalties_are_not_counted() -> None:
    budget = psn.Budget(nfe=50)
    node = layer([local_error(budget), psn.GlobalError(0.1)])
    for _ in range(2):
        node(points())
    assert budget.history.cost == [evaluations(node)]


def test_only_training_is_watched() -> None:
    budget = psn.Budget(nfe=50)
    node = layer(local_error(budget))
    with torch.no_grad():
        node(points())
        node(points())
    node.eval()
    node(points())
    node(points())
    assert len(budget.history) == 0


def test_regularizers_share_a_budget_in_proportion() -> None:
    budget = psn.Budget(nfe=20)
    node = layer([local_error(budget), psn.KineticEnergy(0.25 * budget)])
    for _ in range(3):
        solution = node(points())
        solution.penalty.backward()
    assert len(budget.history) == 2
    values = solution.penalties
    assert budget.weight > 0
    expected = budget.weight * (values["LocalError"] + 0.25 * values["KineticEnergy"])
    torch.testing.assert_close(solution.penalty, expected)


def test_layers_share_a_budget() -> None:
    """Their evaluations are added."""
    budget = psn.Budget(nfe=20)
    first, second = layer(local_error(budget)), layer(psn.KineticEnergy(budget))
    for _ in range(2):
        first(points())
        second(points())
    assert budget.history.cost == [evaluations(first) + evaluations(second)]


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.InterpolatingAdjoint()])
@pytest.mark.parametrize("compile", [False, True])
def test_other_adjoints_and_native_code(adjoint: psn.DiscreteAdjoint, compile: bool) -> None:
    if compile and not isinstance(adjoint, psn.DiscreteAdjoint):
        return
    budget = psn.Budget(nfe=20)
    node = layer(local_error(budget), adjoint=adjoint, compile=compile)
    for _ in range(3):
        solution = node(points())
        (solution.u1.sum() + solution.penalty).backward()
    assert budget.history.cost == [evaluations(node)] * 2
    assert budget.weight > 0


def test_of_a_stochastic_equation() -> None:
    budget = psn.Budget(nfe=2)
    node = psn.NeuralSDE(
        Field(),
        lambda t, u: 0.1 * u,
        tspan=(0.0, 0.3),
        regularizers=psn.LocalError(weight=budget),
        generator=torch.Generator().manual_seed(0),
    )
    for _ in range(3):
        solution = node(points())
        (solution.u1.square().mean() + solution.penalty).backward()
    assert len(budget.history) == 2
    assert budget.weight > 0


def test_of_a_density() -> None:
    budget = psn.Budget(nfe=10)
    flow = psn.CNF(Field(), event_shape=2, regularizers=[psn.KineticEnergy(budget)])
    for _ in range(3):
        density = flow(points())
        (density.penalty - density.log_prob.mean()).backward()
    assert len(budget.history) == 2
    assert budget.weight > 0


def test_an_ensemble_costs_what_a_member_costs() -> None:
    problem = psn.ODEProblem(Field(), torch.ones(2, dtype=D), (0.0, 1.0))
    members = psn.EnsembleProblem(problem, u0=points(5))
    solution = psn.solve(members)
    expected = statistics.fmean(member.stats.nfe for member in solution)
    assert cost_of(solution, "nfe") == smooth_cost_of(solution, "nfe") == expected


@pytest.mark.parametrize("compile", [False, True])
def test_rows_with_steps_of_their_own_hold_a_budget_of_their_mean(compile: bool) -> None:
    budget = psn.Budget(nfe=20)
    node = layer(local_error(budget), independent=True, compile=compile)
    for _ in range(3):
        solution = node(points(4))
        solution.penalty.backward()
    with torch.no_grad():
        plain = node.eval()(points(4)).stats.nfe
    assert budget.history.cost == [plain / 4] * 2
    assert budget.history.penalty[0] > 0
    assert budget.weight > 0
    weighted = budget.weight * solution.penalties["LocalError"]
    assert torch.equal(solution.penalty, weighted)


@pytest.mark.julia
def test_on_the_julia_engine() -> None:
    budget = psn.Budget(nfe=20)
    node = layer(local_error(budget), engine="julia")
    for _ in range(3):
        solution = node(points())
        (solution.u1.sum() + solution.penalty).backward()
    assert budget.history.cost == [evaluations(node)] * 2
    assert budget.history.smooth[0] != budget.history.cost[0]


def test_the_smooth_cost_has_no_jumps() -> None:
    """While a rotation gets faster, evaluations grow by six at a time, and their stand-in does not.

    It stays within the three that a count can be off, and grows with the speed.
    """
    counts, smooth = [], []
    x = torch.tensor([[1.0, 0.0]], dtype=D)
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=D)
    for k in range(100):
        speed = 4.0 + 0.01 * k
        problem = psn.ODEProblem(lambda t, u, s=speed: s * (u @ turn), x, (0.0, 1.0))
        solution = psn.solve(problem, psn.Tsit5(), rtol=1e-6, atol=1e-6)
        assert solution.stats.nreject == 0
        counts.append(cost_of(solution, "nfe"))
        smooth.append(smooth_cost_of(solution, "nfe"))
    jumps = [b - a for a, b in itertools.pairwise(counts)]
    moves = [b - a for a, b in itertools.pairwise(smooth)]
    assert max(jumps) >= 6
    assert max(map(abs, moves)) < 0.5
    assert min(moves) > -0.1
    assert max(abs(a - b) for a, b in zip(counts, smooth, strict=True)) < 3.5


def test_fixed_steps_are_refused() -> None:
    node = layer(local_error(psn.Budget(nfe=20)), controller=psn.FixedStep(), dt0=0.1)
    with pytest.raises(ValueError, match=r"steps of this solve are fixed\.\n  Leave"):
        node(points())


def test_a_model_is_saved_with_its_budget() -> None:
    """Training goes on bit for bit, from plain tensors."""

    def fresh() -> psn.NeuralODE:
        return layer(psn.KineticEnergy(psn.Budget(nfe=26, horizon=50)))

    def budget_of(node: psn.NeuralODE) -> psn.Budget:
        return node.regularizers[0].weight  # type: ignore[union-attr, return-value]

    whole = fresh()
    train(whole, 8, rate=0.0)
    first = fresh()
    train(first, 5, rate=0.0)
    stream = io.BytesIO()
    torch.save(first.state_dict(), stream)
    stream.seek(0)
    second = fresh()
    second.load_state_dict(torch.load(stream, weights_only=True))
    train(second, 3, rate=0.0)
    assert budget_of(second).history == budget_of(whole).history
    assert budget_of(second).weight == budget_of(whole).weight > 0


def test_a_copy_goes_on_by_itself() -> None:
    node = layer([local_error(psn.Budget(nfe=20)), psn.KineticEnergy(psn.Budget(nfe=20))])
    shared = psn.Budget(nfe=20)
    node = layer([local_error(shared), psn.KineticEnergy(shared)])
    node(points())
    other = copy.deepcopy(node)
    first, second = (regularizer.weight for regularizer in other.regularizers)
    assert first is second is not shared
    other(points())
    assert len(first.history) == 1
    assert len(shared.history) == 0


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, TypeError, "one of nfe, steps, seconds and fraction, but none is given"),
        ({"nfe": 60, "steps": 3}, TypeError, "nfe, steps are given"),
        ({"nfe": 0}, ValueError, "nfe"),
        ({"fraction": 1.5}, ValueError, "fraction"),
        ({"fraction": 0.5, "warmup": 0}, ValueError, "warm-up"),
        ({"nfe": 60, "limit": 0}, ValueError, "limit"),
        ({"nfe": 60, "horizon": 0}, ValueError, "horizon"),
        ({"nfe": 60, "measure": 3}, TypeError, "measure"),
    ],
)
def test_bad_budgets(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        psn.Budget(**arguments)


def test_what_is_said_and_drawn() -> None:
    figures = pytest.importorskip("matplotlib.figure")
    budget = psn.Budget(nfe=20)
    node = layer(local_error(budget))
    for _ in range(4):
        node(points())
    assert "20 evaluations were asked for" in budget.report()
    assert repr(budget).startswith("Budget(nfe=20, weight=")
    axes = budget.plot(axes=figures.Figure().subplots())
    assert axes.get_ylabel() == "evaluations"
    measured, _, asked = axes.get_lines()
    assert list(measured.get_ydata()) == budget.history.cost
    assert set(asked.get_ydata()) == {20.0}
