"""The paper's rule in one dimension, and what lies beyond its small-step theory."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from optim.flows import linear_closure, normal, scalar, solve_linear

from pysciml_node.optim import VarianceCorrected, scale_by_terminal_variance_

TARGET = -0.7
HORIZON = 1.5
X0 = normal(16, 1, seed=0)


def offset(a: torch.Tensor) -> float:
    return (a.item() - TARGET) * HORIZON


def start_at(u: float) -> torch.nn.Parameter:
    return scalar(TARGET + u / HORIZON)


def one_step(u: float, lr: float, **options: object) -> tuple[float, float]:
    """New offset and loss ratio after one step of the rule."""
    a = start_at(u)
    closure = linear_closure(a, X0, torch.tensor(TARGET, dtype=torch.float64), HORIZON)
    before = VarianceCorrected([a], lr=lr, **options).step(closure)
    return offset(a), float(closure()[0].detach() / before)


@pytest.mark.parametrize("u", [-4.0, -1.0, -0.01, 0.01, 1.0, 4.0])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 1.0])
def test_one_step_is_the_exact_map(u: float, lr: float) -> None:
    new, _ = one_step(u, lr)
    assert new == pytest.approx(u - lr * (1.0 - math.exp(-u)), abs=1e-12, rel=1e-12)


@pytest.mark.parametrize("u", [0.01, 0.5, 2.0, 6.0])
@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.5, 1.0])
def test_loss_ratio_lies_in_the_proved_interval(u: float, lr: float) -> None:
    _, ratio = one_step(u, lr)
    assert (1.0 - lr) ** 2 - 1e-12 <= ratio <= math.exp(-2.0 * lr) + 1e-12


@pytest.mark.parametrize("u", [-0.5, -1.0, -2.0, -4.0])
def test_learning_rates_at_which_the_rule_overshoots_and_at_which_the_loss_rises(u: float) -> None:
    d = math.expm1(-u)
    landed, _ = one_step(u, math.log1p(d) / d)
    assert landed == pytest.approx(0.0, abs=1e-12)
    _, ratio = one_step(u, math.log1p(2.0 * d) / d)
    assert ratio == pytest.approx(1.0, abs=1e-10)
    assert one_step(u, 0.99 * math.log1p(2.0 * d) / d)[1] < 1.0
    assert one_step(u, 1.01 * math.log1p(2.0 * d) / d)[1] > 1.0


def test_published_overshoot_of_the_first_step() -> None:
    assert one_step(-4.0, 0.1)[1] == pytest.approx(8.70, abs=0.005)


@pytest.mark.parametrize("safeguard", ["bound", "backtracking"])
@pytest.mark.parametrize("lr", [0.1, 1.0])
@pytest.mark.parametrize("u", [-8.0, -4.0, -1.0, -0.1, 0.1, 1.0, 4.0])
def test_safeguards_keep_the_loss_from_rising(safeguard: str, lr: float, u: float) -> None:
    a = start_at(u)
    closure = linear_closure(a, X0, torch.tensor(TARGET, dtype=torch.float64), HORIZON)
    optimizer = VarianceCorrected([a], lr=lr, safeguard=safeguard)
    losses = [float(optimizer.step(closure)) for _ in range(150)]
    floor = 1e-24 * float(closure()[1].u1.detach().square().mean())
    assert all(new <= old + floor for old, new in itertools.pairwise(losses))
    assert losses[-1] < 1e-10


@pytest.mark.parametrize("u", [-8.0, -2.0, -0.3])
@pytest.mark.parametrize("lr", [0.5, 1.0])
def test_bound_never_crosses_the_optimum_from_below(u: float, lr: float) -> None:
    assert one_step(u, lr, safeguard="bound")[0] <= 1e-12


@pytest.mark.parametrize("lr", [1e-3, 0.1, 0.69])
def test_bound_leaves_steps_from_above_alone(lr: float) -> None:
    assert one_step(3.0, lr, safeguard="bound") == one_step(3.0, lr)


def test_backtracking_gives_up_where_no_step_helps() -> None:
    a = scalar(1.0)

    def uphill_everywhere() -> tuple[torch.Tensor, torch.Tensor]:
        return (a.detach() - 1.0).abs() + 0.0 * a + a - a.detach(), a.reshape(1, 1)

    optimizer = VarianceCorrected([a], curvature="diagonal", safeguard="backtracking", max_trials=4)
    optimizer.step(uphill_everywhere)
    assert a.item() == 1.0


def test_numbers_take_the_place_of_the_solution() -> None:
    sol = solve_linear(torch.tensor(0.3, dtype=torch.float64), X0, HORIZON)
    moment = sol.u1.square().mean()
    results = []
    for kwargs in (
        {"solution": sol},
        {"solution": sol.u1, "horizon": HORIZON},
        {"horizon": HORIZON, "second_moment": moment},
        {"horizon": torch.tensor(HORIZON), "second_moment": moment.item()},
        {"solution": sol, "second_moment": moment},
    ):
        a = scalar(0.3)
        a.grad = torch.tensor(0.25, dtype=torch.float64)
        VarianceCorrected([a]).step(**kwargs)
        results.append(a.item())
    assert len(set(results)) == 1


def test_moment_sums_over_the_state_and_averages_over_the_batch() -> None:
    states = {"x": normal(5, 3, seed=1), "y": normal(5, 2, 2, seed=2)}

    class Solution:
        u1 = states

        class problem:
            tspan = (2.0, 0.0)

    a = scalar(0.0)
    a.grad = torch.ones_like(a)
    moment = sum(float(x.square().sum()) / 5 for x in states.values())
    assert scale_by_terminal_variance_([a], Solution()) == pytest.approx(1.0 / (4.0 * moment))


def test_gradient_transform_before_sgd_is_the_rule() -> None:
    target = torch.tensor(TARGET, dtype=torch.float64)
    a, b = scalar(0.4), scalar(0.4)
    sgd = torch.optim.SGD([a], lr=0.2)
    rule = VarianceCorrected([b], lr=0.2)
    closure, paired = linear_closure(a, X0, target, HORIZON), linear_closure(b, X0, target, HORIZON)
    for _ in range(20):
        sgd.zero_grad()
        loss, sol = closure()
        loss.backward()
        scale_by_terminal_variance_([a], sol)
        sgd.step()
        rule.step(paired)
    assert a.item() == pytest.approx(b.item(), rel=1e-13)


def test_gradient_transform_leaves_parameters_without_gradient_alone() -> None:
    a = scalar(1.0)
    assert scale_by_terminal_variance_(a, horizon=2.0, second_moment=1.0) == 0.25
    assert a.grad is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "horizon is unknown"),
        ({"solution": X0}, "horizon is unknown"),
        ({"horizon": 1.0}, "second moment is unknown"),
        ({"horizon": 0.0, "second_moment": 1.0}, "horizon must be positive"),
        ({"horizon": 1.0, "second_moment": math.nan}, "second_moment must be positive"),
        ({"horizon": 1.0, "solution": torch.full((2, 1), math.inf)}, "collapsed or blew up"),
    ],
)
def test_missing_or_impossible_moments_are_refused(kwargs: dict, message: str) -> None:
    a = scalar(0.0)
    a.grad = torch.ones_like(a)
    with pytest.raises(ValueError, match=message):
        VarianceCorrected([a]).step(**kwargs)
    with pytest.raises(ValueError, match=message):
        scale_by_terminal_variance_(a, **kwargs)
    assert a.item() == 0.0
    assert a.grad.item() == 1.0


def test_a_solution_without_terminal_state_is_refused() -> None:
    a = scalar(0.0)
    a.grad = torch.ones_like(a)
    with pytest.raises(TypeError, match="u1"):
        VarianceCorrected([a]).step(solution="sol", horizon=1.0)
