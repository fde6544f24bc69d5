"""The controller on a model of a training whose answer to a weight is known."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from budgets.plant import Plant, solve_of, train

import pysciml_node as psn
from pysciml_node.budgets.control import Average, DualWeight
from pysciml_node.budgets.costs import last_share


@pytest.mark.parametrize("lag", [10.0, 30.0, 150.0])
@pytest.mark.parametrize("target", [44.0, 62.0, 85.0])
def test_the_cost_converges_to_the_budget(target: float, lag: float) -> None:
    """Within the half step that counts are apart at least, whatever the lag."""
    budget = psn.Budget(nfe=target)
    found = train(budget, Plant(lag=lag), 1500)
    assert statistics.fmean(found[-200:]) == pytest.approx(target, abs=3.0)
    assert budget.reached == pytest.approx(target, abs=3.0)


@pytest.mark.parametrize("half", [0.05, 5.0, 500.0])
@pytest.mark.parametrize("slope", [0.5, 1.0, 2.0])
def test_the_scale_of_the_weight_need_not_be_known(half: float, slope: float) -> None:
    budget = psn.Budget(nfe=62, limit=100.0 if half > 5 else 1.0)
    found = train(budget, Plant(half=half, slope=slope), 1500)
    assert statistics.fmean(found[-200:]) == pytest.approx(62.0, abs=3.0)


def test_it_settles_within_a_short_training() -> None:
    """Ten times the lag: the mean of the last tenth is within a tenth of the target."""
    budget = psn.Budget(nfe=62, horizon=300)
    found = train(budget, Plant(lag=30.0), 300)
    assert statistics.fmean(found[-30:]) == pytest.approx(62.0, rel=0.1)


def test_the_weight_answers_to_the_share_of_the_last_step() -> None:
    """Two solves of as many evaluations, one of them about to lose its last step."""
    found = []
    for steps in (9.02, 9.98):
        budget = psn.Budget(nfe=50)
        for _ in range(10):
            budget.observe(budget, solve_of(steps))
            budget.charge(0.01)
        found.append(budget.weight)
    assert solve_of(9.02).stats.nfe == solve_of(9.98).stats.nfe
    assert found[0] < 0.9 * found[1]


def test_a_budget_that_is_not_exhausted_costs_nothing() -> None:
    """Complementary slackness: the weight is 0, not merely small."""
    budget = psn.Budget(nfe=150)
    train(budget, Plant(), 500)
    assert budget.weight == 0.0
    assert max(budget.history.weight) == 0.0


def test_no_windup_below() -> None:
    """After a long time within the budget the weight rises as fast as after none."""
    weights = []
    for idle in (0, 5000):
        control = DualWeight(response=50.0, limit=1.0)
        for _ in range(idle):
            control.update(-1.0, 0.0, 0.01)
        for _ in range(20):
            control.update(0.3, 0.0, 0.01)
        weights.append(control.weight)
    assert weights[0] == weights[1] > 0.0


def test_no_windup_above() -> None:
    """After a long time at its limit the weight falls as soon as the cost is within the budget."""
    control = DualWeight(response=50.0, limit=1.0)
    for _ in range(5000):
        control.update(0.5, 0.0, 0.01)
    assert control.weight == pytest.approx(100.0)
    after = []
    for _ in range(3):
        control.update(-0.1, 0.0, 0.01)
        after.append(control.weight)
    # By the proportional part at once, by the integral part from there on.
    assert after[0] < 0.7 * 100.0
    assert after[2] < after[1] < after[0]


def test_the_weight_rises_faster_while_the_cost_does_not_come_down() -> None:
    """By all of the violation up to 0.3, and by 0.1 once it comes down."""
    levels = []
    for now, trend in [(0.4, 0.05), (0.5, -0.05)]:
        control = DualWeight(response=50.0, limit=1.0)
        control.update(now, trend, 0.01)
        levels.append(control.level)
    assert levels[0] == pytest.approx(3.0 * levels[1])
    assert levels[1] == pytest.approx(5.0 * 0.1 / 50.0)


def test_the_weight_falls_fast_only_within_the_budget() -> None:
    """Not where the cost is above it and only foreseen to come below."""
    falls = []
    for now, trend in [(0.02, -0.07), (-0.05, 0.0)]:
        control = DualWeight(response=50.0, limit=1.0, level=2.0)
        control.update(now, trend, 0.01)
        falls.append(2.0 - control.level)
    assert falls[1] == pytest.approx(3.0 * falls[0])
    assert falls[0] == pytest.approx(5.0 * 0.05 / 50.0)


def test_the_weighted_penalty_stays_within_its_limit() -> None:
    budget = psn.Budget(nfe=10, limit=0.2)
    plant = Plant()
    with pytest.warns(psn.PsnWarning):
        train(budget, plant, 1500)
    usual = Average(budget.response)
    for weight, penalty in zip(budget.history.weight, budget.history.penalty, strict=True):
        usual.add(penalty)
        assert weight * usual.value <= 0.2 * (1 + 1e-9)


def test_a_budget_that_cannot_be_reached_is_said_once() -> None:
    budget = psn.Budget(nfe=20)
    with pytest.warns(psn.PsnWarning, match="has not been reached") as told:
        train(budget, Plant(), 3000)
    assert len(told) == 1
    message = str(told[0].message)
    assert "20 evaluations were asked for" in message
    assert "  Raise the budget or limit" in message
    # What is left of a step's share.
    assert budget.reached == pytest.approx(2 + 6 * 4.5, abs=3.5)


def test_it_is_said_at_the_end_too() -> None:
    with pytest.warns(psn.PsnWarning, match="has not been reached"):
        train(psn.Budget(nfe=30, horizon=40), Plant(lag=200.0), 40)


def test_the_weight_is_constant_near_the_end() -> None:
    budget = psn.Budget(nfe=62, horizon=400)
    train(budget, Plant(), 400)
    end = budget.history.weight[380:]
    assert len(set(end)) == 1
    before = [math.log(w) for w in budget.history.weight[340:380]]
    assert math.exp(statistics.fmean(before)) == pytest.approx(end[0], rel=0.3)


def test_a_cost_that_starts_above_the_budget_comes_down_evenly() -> None:
    """By a constant factor a step, until half of the training."""
    budget = psn.Budget(nfe=62, horizon=400)
    plant = Plant(lag=10.0)
    plant.steps = plant.dearest
    train(budget, plant, 400)
    for step in (100, 150):
        expected = 62.0 * (budget.history.smooth[0] / 62.0) ** (1 - step / 200)
        assert budget.history.smooth[step] == pytest.approx(expected, rel=0.1)
    assert statistics.fmean(budget.history.smooth[250:]) == pytest.approx(62.0, rel=0.03)


def test_a_fraction_is_of_the_cost_in_the_warmup() -> None:
    budget = psn.Budget(fraction=0.6, warmup=400)
    plant = Plant()
    train(budget, plant, 401)
    assert set(budget.history.weight[:399]) == {0.0}
    assert budget.target == pytest.approx(0.6 * (2 + 6 * 20.5), rel=0.03)
    found = train(budget, plant, 1500)
    assert statistics.fmean(found[-200:]) == pytest.approx(budget.target, abs=3.0)


@pytest.mark.parametrize(("kind", "target"), [("steps", 10.0), ("seconds", 0.01)])
def test_other_costs(kind: str, target: float) -> None:
    budget = psn.Budget(**{kind: target})
    plant = Plant()
    train(budget, plant, 1500)
    assert plant.steps == pytest.approx(9.5, abs=0.6)
    assert budget.reached == pytest.approx(target, rel=0.06)


def test_what_is_measured_is_what_counts() -> None:
    """Held-out solves at another tolerance take 1.5 times the training solves' evaluations."""
    plant = Plant()
    calls = []

    def measure() -> float:
        calls.append(1)
        return 1.5 * solve_of(plant.steps).stats.nfe

    budget = psn.Budget(nfe=93, measure=measure)
    train(budget, plant, 1500)
    assert len(calls) == 150
    assert 1.5 * (2 + 6 * (plant.steps + 0.5)) == pytest.approx(93.0, abs=4.5)


def test_sources_of_one_training_step_are_added() -> None:
    budget = psn.Budget(nfe=100)
    for _ in range(3):
        for source in ("first", "second"):
            budget.observe(source, solve_of(7.9))
            budget.charge(0.01)
    assert budget.history.cost == [100.0, 100.0]
    assert budget.history.penalty == [0.02, 0.02]


def test_a_state_resumes_bit_for_bit() -> None:
    def fresh() -> psn.Budget:
        return psn.Budget(nfe=62, horizon=600)

    whole, plant = fresh(), Plant()
    train(whole, plant, 200)
    first, again = fresh(), Plant()
    train(first, again, 120)
    second = fresh()
    second.load_state_dict(first.state_dict())
    train(second, again, 80)
    assert second.history == whole.history
    assert second.weight == whole.weight
    torch.testing.assert_close(
        second.state_dict()["control"], whole.state_dict()["control"], rtol=0, atol=0
    )
    train(whole, plant, 400)
    train(second, again, 400)
    assert second.history == whole.history


def test_a_resumed_budget_may_have_another_target() -> None:
    first = psn.Budget(nfe=62)
    train(first, Plant(), 100)
    second = psn.Budget(nfe=44)
    second.load_state_dict(first.state_dict())
    assert second.target == 44.0
    assert second.weight == first.weight


def test_the_average_is_right_from_the_start() -> None:
    average = Average(20.0)
    assert math.isnan(average.value)
    assert [average.add(3.0) for _ in range(5)] == pytest.approx([3.0] * 5)


@pytest.mark.parametrize(
    ("errors", "share"),
    [([0.3, 0.3], 1.0), ([0.2, 0.2 / 2**5], 0.5), ([0.2, 0.0], 0.0), ([0.1, 0.4], 1.0)],
)
def test_share_of_the_last_step(errors: list[float], share: float) -> None:
    assert last_share(errors, k=5) == pytest.approx(share)


def test_share_where_nothing_is_known() -> None:
    assert last_share([], k=5) == last_share([math.nan, math.nan], k=5) == 0.5
    assert last_share([1e-12], k=5) < 0.01
