"""Schedules, and the weights of regularizers that follow them."""

from __future__ import annotations

import math

import pytest
import torch

import pysciml_node as psn
from pysciml_node import schedules


def test_exponential_is_a_straight_line_of_logarithms() -> None:
    """`l0 exp(-ln(l0 / l1) step / steps)`, arXiv 2303.02262: 2.5 to 1 in 7500 steps."""
    schedule = schedules.Exponential(2.5, 1.0, 7500)
    assert schedule(0) == 2.5
    assert schedule(7500) == pytest.approx(1.0, rel=1e-14)
    assert schedule(3750) == pytest.approx(math.sqrt(2.5), rel=1e-14)
    assert schedule(1000) == pytest.approx(2.5 * math.exp(-math.log(2.5) * 1000 / 7500), rel=1e-14)
    assert schedule(100_000) == schedule(7500)


def test_exponential_may_grow() -> None:
    schedule = schedules.Exponential(0.1, 5.0, 10)
    assert [schedule(n) < schedule(n + 1) for n in range(10)] == [True] * 10


def test_cosine() -> None:
    schedule = schedules.Cosine(1.0, 0.2, 8)
    assert schedule(0) == 1.0
    assert schedule(4) == pytest.approx(0.6, rel=1e-14)
    assert schedule(8) == pytest.approx(0.2, rel=1e-14)
    assert schedule(99) == pytest.approx(0.2, rel=1e-14)


def test_inverse_decay_and_constant() -> None:
    assert schedules.InverseDecay(0.1, 1e-5)(100_000) == pytest.approx(0.05, rel=1e-14)
    assert {schedules.Constant(3.0)(n) for n in range(5)} == {3.0}


@pytest.mark.parametrize(
    "make",
    [
        lambda: schedules.Exponential(0.0, 1.0, 10),
        lambda: schedules.Exponential(1.0, -1.0, 10),
        lambda: schedules.Exponential(1.0, 1.0, 0),
        lambda: schedules.Cosine(1.0, 0.0, 0),
        lambda: schedules.InverseDecay(1.0, -1.0),
    ],
)
def test_bad_schedules(make: object) -> None:
    with pytest.raises(ValueError, match="must"):
        make()  # type: ignore[operator]


def node(weight: float | schedules.Schedule) -> psn.NeuralODE:
    regularizer = psn.LocalError(
        "unbiased", weight, generator=torch.Generator().manual_seed(0), name="local"
    )
    return psn.NeuralODE(torch.nn.Linear(2, 2), regularizers=[regularizer])


def test_a_weight_that_is_assigned() -> None:
    """Penalties are proportional to their weights."""
    length = psn.KineticEnergy(weight=3.0)
    solver = psn.NeuralODE(torch.nn.Linear(2, 2), regularizers=[length])
    u0 = torch.randn(4, 2)
    first = solver(u0).penalty
    length.weight = 1.5
    torch.testing.assert_close(2 * solver(u0).penalty, first)
    length.weight = schedules.Constant(0.0)
    assert float(solver(u0).penalty.detach()) == 0.0
    with pytest.raises(TypeError, match="weight must be a number or a schedule"):
        length.weight = "much"  # type: ignore[assignment]


def field_of_time(linear: torch.nn.Linear) -> object:
    return lambda t, u: torch.tanh(linear(u))


def test_the_weight_of_a_penalty_follows_its_schedule() -> None:
    linear = torch.nn.Linear(2, 2)
    schedule = schedules.Exponential(8.0, 1.0, 3)
    model = psn.NeuralODE(
        field_of_time(linear), regularizers=[psn.LocalError(weight=schedule, name="local")]
    )
    for expected in (8.0, 4.0, 2.0, 1.0, 1.0):
        solution = model(torch.ones(3, 2))
        ratio = solution.penalty / solution.penalties["local"]
        assert ratio.item() == pytest.approx(expected, rel=1e-6)
        model.step_schedules()


def test_the_position_of_a_schedule_is_part_of_the_state() -> None:
    schedule = schedules.Exponential(8.0, 1.0, 3)
    trained, fresh = node(schedule), node(schedule)
    trained.step_schedules()
    trained.step_schedules()
    state = trained.state_dict()
    fresh.load_state_dict(state)
    assert fresh.regularizers[0].current_weight == pytest.approx(2.0)
    assert fresh.regularizers[0].steps == 2
    torch.testing.assert_close(fresh.field.weight, trained.field.weight)


def test_a_checkpoint_can_be_read_without_its_code() -> None:
    """Saved and loaded as plain tensors."""
    import io

    trained = node(schedules.Exponential(8.0, 1.0, 3))
    trained.step_schedules()
    buffer = io.BytesIO()
    torch.save(trained.state_dict(), buffer)
    buffer.seek(0)
    fresh = node(schedules.Exponential(8.0, 1.0, 3))
    fresh.load_state_dict(torch.load(buffer, weights_only=True))
    assert fresh.regularizers[0].steps == 1
