"""Fixed steps are found once; later solves take them and notice all that has changed."""

from __future__ import annotations

import copy
import math
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.solving.plans import recent_plan
from pysciml_node.torch_engine import timetable

D = torch.float64
FIXED = psn.FixedStep()
METHODS = [psn.Euler(), psn.Heun(), psn.RK4(), psn.Tsit5(), psn.DP5()]


class Decay(nn.Module):
    """`du/dt = -rate u`."""

    def __init__(self, rate: float = 1.0) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.rate * u


def euler(f: Any, u0: Tensor, steps: int = 1, **options: Any) -> psn.Solution:
    """Over an interval of length one, without gradients."""
    problem = psn.ODEProblem(f, u0, (0.0, 1.0))
    with torch.no_grad():
        return psn.solve(problem, psn.Euler(), controller=FIXED, dt0=1 / steps, **options)


def rows(t: Tensor, u: Tensor) -> Tensor:
    """A field that depends on time, of no module."""
    return torch.sin(3 * t) * u - t


@pytest.mark.parametrize("algorithm", METHODS, ids=repr)
@pytest.mark.parametrize(
    ("tspan", "options"),
    [
        ((0.0, 1.0), {"dt0": 0.25}),
        ((1.0, -0.5), {"dt0": 0.4}),
        ((0.0, 1.0), {"dt0": 0.3, "tstops": (0.5,)}),
        ((0.0, 1.0), {"dt0": 0.3, "saveat": [0.0, 0.1, 0.3, 0.6, 1.0]}),
        ((0.0, 1.0), {"controller": psn.FixedStep((0.2, 0.7))}),
    ],
)
def test_later_solves_are_the_first(
    algorithm: Any, tspan: tuple[float, float], options: dict[str, Any]
) -> None:
    """To the last bit, whichever of them was recorded."""
    given, states = {"controller": FIXED, **options}, torch.linspace(-1, 1, 6, dtype=D)

    def solve(u0: Tensor, records: bool) -> psn.Solution:
        with torch.set_grad_enabled(records):
            return psn.solve(psn.ODEProblem(rows, u0, tspan), algorithm, **given)

    for records in (False, True):
        first = [solve(u, records) for u in states.view(3, 2)]
        for u, before in zip(states.view(3, 2), first, strict=True):
            again = solve(u.clone().requires_grad_(records), records)
            torch.testing.assert_close(again.u, before.u, rtol=0, atol=1e-15 if records else 0)
            assert torch.equal(again.u1, before.u1)
            assert torch.equal(again.t, before.t)
            assert torch.equal(again.step_times, before.step_times)
            assert again.stats.naccept == before.stats.naccept
            if not records:
                assert again.stats.nfe == before.stats.nfe
            between = [sum(tspan) / 2, tspan[1]]
            torch.testing.assert_close(again(between), before(between), rtol=0, atol=1e-14)


def test_what_changes_between_solves_is_noticed() -> None:
    """Weights replaced or written to, by whatever way, and the code of the field."""
    field, u0 = Decay(), torch.ones(2, dtype=D)

    def expect(rate: float) -> None:
        for _ in range(3):
            assert euler(field, u0).u1.tolist() == [1 - rate] * 2

    expect(1.0)
    with torch.no_grad():
        field.rate.fill_(0.5)
    expect(0.5)
    field.rate.data = torch.tensor(0.25, dtype=D)
    expect(0.25)
    field.rate.data.fill_(0.75)
    expect(0.75)
    field.rate = nn.Parameter(torch.tensor(0.125, dtype=D))
    expect(0.125)
    field.forward = lambda t, u: -0.375 * u  # type: ignore[method-assign]
    expect(0.375)
    del field.forward
    handle = field.register_forward_hook(lambda module, given, out: 2 * out)
    expect(0.25)
    handle.remove()
    expect(0.125)


def test_modes_are_noticed() -> None:
    field, u0 = nn.Dropout(0.5), torch.ones(64, dtype=D)
    timed = lambda t, u: field(u)  # noqa: E731
    field.eval()
    for _ in range(3):
        assert euler(timed, u0).u1.tolist() == [2.0] * 64
    field.train()
    assert set(euler(timed, u0).u1.tolist()) == {1.0, 3.0}


def test_autocast_and_inference_between_solves() -> None:
    field = nn.Linear(4, 4)
    timed = lambda t, u: field(u)  # noqa: E731
    u0 = torch.randn(3, 4)
    full = [euler(timed, u0).u1 for _ in range(3)][-1]
    with torch.autocast("cpu", torch.bfloat16):
        low = euler(timed, u0).u1
        with torch.no_grad():
            expected = u0 + field(u0).float()
    assert torch.equal(low, expected)
    assert not torch.equal(low, full)
    with torch.inference_mode():
        assert torch.equal(euler(timed, u0).u1, full)
        assert torch.equal(euler(timed, u0.clone()).u1, full)
    assert torch.equal(euler(timed, u0).u1, full)


def test_a_field_that_writes_to_its_output_again() -> None:
    out = torch.empty(2, dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.mul(u, -1, out=out)

    def fresh(t: Tensor, u: Tensor) -> Tensor:
        return -u

    u0 = torch.tensor([1.0, 2.0], dtype=D)
    problem, expected = psn.ODEProblem(field, u0, (0.0, 1.0)), psn.ODEProblem(fresh, u0, (0.0, 1.0))
    with torch.no_grad():
        for _ in range(3):
            found, wanted = (
                psn.solve(x, psn.RK4(), controller=FIXED, dt0=0.5) for x in (problem, expected)
            )
            assert torch.equal(found.u1, wanted.u1)


@pytest.mark.parametrize("write", [lambda t, u: t.mul_(2), lambda t, u: u.neg_()])
def test_writing_to_the_input_is_refused_at_each_solve(write: Callable[..., Tensor]) -> None:
    writes = [False]

    def field(t: Tensor, u: Tensor) -> Tensor:
        if writes[0]:
            write(t, u)
        return -u * (1 + t)

    u0 = torch.ones(2, dtype=D)
    good = [euler(field, u0, 4).u1 for _ in range(2)][-1]
    for _ in range(3):
        writes[0] = True
        with pytest.raises(RuntimeError, match="changed its input in place"):
            euler(field, u0, 4)
        writes[0] = False
        assert torch.equal(euler(field, u0, 4).u1, good)
        assert torch.equal(u0, torch.ones(2, dtype=D))


def test_what_a_field_returns_is_checked_at_each_solve() -> None:
    made: list[Callable[[Tensor], Any]] = [lambda u: -u]
    field = lambda t, u: made[0](u)  # noqa: E731
    u0 = torch.ones(3, dtype=D)
    for _ in range(2):
        euler(field, u0)
    for bad, error in (
        (lambda u: -u.float(), TypeError),
        (lambda u: -u[:2], ValueError),
        (lambda u: -u[None], ValueError),
        (lambda u: [-u], TypeError),
    ):
        made[0] = bad
        with pytest.raises(error, match="field"):
            euler(field, u0)
    made[0] = lambda u: -2 * u
    assert euler(field, u0).u1.tolist() == [-1.0] * 3


def test_what_is_not_finite_fails_and_the_next_solve_does_not() -> None:
    field = lambda t, u: torch.where(t > 0.4, u / 0 * u.sign(), -u)  # noqa: E731
    mild = lambda t, u: torch.where(u > 1.5, math.nan, -u)  # noqa: E731
    good, bad = torch.ones(2, dtype=D), torch.tensor([1.0, 2.0], dtype=D)
    for _ in range(2):
        assert euler(mild, good, 4).u1.tolist() == [0.75**4] * 2
    for _ in range(2):
        failed = euler(mild, bad, 4, throw=False)
        assert failed.retcode is psn.ReturnCode.Unstable
        assert failed.t.tolist() == [0.0]
        assert euler(mild, good, 4).success
        with pytest.raises(psn.SolverFailure):
            euler(field, good, 4)


def test_solves_inside_of_fields_and_in_threads() -> None:
    """Each has memory of its own for its stages."""
    u0 = torch.ones(2, dtype=D)

    def inner(t: Tensor, u: Tensor) -> Tensor:
        return -0.5 * u

    def outer(t: Tensor, u: Tensor) -> Tensor:
        problem = psn.ODEProblem(inner, u, (0.0, 1.0))
        rate: Tensor = psn.solve(problem, psn.RK4(), controller=FIXED, dt0=0.5).u1
        return -rate

    def solve(f: Any, scale: float) -> Tensor:
        with torch.no_grad():
            problem = psn.ODEProblem(f, scale * u0, (0.0, 1.0))
            found: Tensor = psn.solve(problem, psn.RK4(), controller=FIXED, dt0=0.5).u1
        return found

    def step(z: float) -> float:
        return 1 + z + z**2 / 2 + z**3 / 6 + z**4 / 24

    expected = step(-0.5 * step(-0.25) ** 2) ** 2
    found: dict[int, list[Tensor]] = {}

    def many(n: int) -> None:
        found[n] = [solve(outer, 1.0 + n) for _ in range(5)]

    threads = [threading.Thread(target=many, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for n, values in found.items():
        for value in values:
            torch.testing.assert_close(value, (1 + n) * expected * u0)


def test_an_exception_in_the_field_leaves_nothing_behind() -> None:
    fails = [False]

    def field(t: Tensor, u: Tensor) -> Tensor:
        if fails[0] and t > 0.3:
            raise KeyError("mine")
        return -u

    u0 = torch.ones(2, dtype=D)
    for _ in range(3):
        fails[0] = False
        assert euler(field, u0, 2).u1.tolist() == [0.25, 0.25]
        fails[0] = True
        with pytest.raises(KeyError, match="mine"):
            euler(field, u0, 2)


def test_dense_output_is_that_of_the_field_that_was_solved() -> None:
    """Parts of a later solution are made when they are asked for, of what it has seen."""
    field = Decay()
    u0 = torch.ones(2, dtype=D)
    solutions = [euler(field, u0, 2) for _ in range(3)]
    field.rate = nn.Parameter(torch.tensor(7.0, dtype=D))
    # The interpolant of a step of h/2 from 1 to 1/2, with the slopes there: -1 and -1/2.
    for solution in solutions:
        assert solution(0.25).tolist() == [0.71875, 0.71875]
    changed = euler(field, u0, 2)
    with torch.no_grad():
        field.rate.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        changed(0.25)


def test_counts_of_the_field_are_left_to_it() -> None:
    class Counting(Decay):
        calls = 0

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(t, u)

    field, u0 = Counting(), torch.ones(2, dtype=D)
    for n in range(1, 5):
        solution = euler(field, u0, 3)
        assert field.calls == 3 * n == n * solution.stats.nfe
    solution(0.5)
    assert field.calls > 12


def test_states_with_gradients_have_none_without() -> None:
    u0 = torch.ones(2, dtype=D, requires_grad=True)
    for _ in range(3):
        assert not euler(Decay(), u0).u1.requires_grad


def test_a_state_that_is_changed_afterwards_is_not_that_of_the_steps() -> None:
    u0, field = torch.ones(2, dtype=D), Decay()
    for _ in range(3):
        solution = euler(field, u0, 2)
        solution.u1.zero_()
        assert solution.u[-1].tolist() == [0.25, 0.25]
        assert u0.tolist() == [1.0, 1.0]


def test_options_are_copied_without_what_was_noted() -> None:
    field, algorithm, u0 = Decay(), psn.Euler(), torch.ones(2, dtype=D)
    problem, given = psn.ODEProblem(field, u0, (0.0, 1.0)), {"controller": FIXED, "dt0": 0.5}
    with torch.no_grad():
        for _ in range(2):
            psn.solve(problem, algorithm, controller=FIXED, dt0=0.5)
    plan = recent_plan(problem, algorithm, given)
    assert plan is not None
    assert timetable._noted.of(plan.options) is not None
    for other in (copy.deepcopy(plan.options), pickle.loads(pickle.dumps(plan.options))):
        assert timetable._noted.of(other) is None
        assert other == plan.options


def test_what_was_noted_goes_with_its_options() -> None:
    field, algorithm, u0 = Decay(), psn.Euler(), torch.ones(2, dtype=D)
    problem, given = psn.ODEProblem(field, u0, (0.0, 1.0)), {"controller": FIXED, "dt0": 0.5}
    with torch.no_grad():
        psn.solve(problem, algorithm, controller=FIXED, dt0=0.5)
    plan = recent_plan(problem, algorithm, given)
    assert plan is not None
    options, noted = copy.copy(plan.options), timetable._Noted()
    table = timetable._noted.of(plan.options)
    assert table is not None
    noted.add(options, table, 1)
    assert noted.of(options) is table
    del options
    assert not noted._tables


def test_no_more_steps_are_noted_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends of intervals that are drawn anew for each solve would fill the memory."""
    monkeypatch.setattr(timetable, "_MOST_NOTED", 130)
    monkeypatch.setattr(timetable, "_noted", timetable._Noted())
    algorithm, given = psn.Euler(), {"controller": FIXED, "dt0": 1 / 16}

    def problem(steps: int) -> psn.ODEProblem:
        return psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, steps / 16))

    def solve(steps: int) -> None:
        with torch.no_grad():
            u1 = psn.solve(problem(steps), algorithm, controller=FIXED, dt0=1 / 16).u1
        assert u1.item() == pytest.approx((15 / 16) ** steps, rel=1e-13)

    def has_table(steps: int) -> bool:
        plan = recent_plan(problem(steps), algorithm, given)
        return plan is not None and timetable._noted.of(plan.options) is not None

    field, lengths = Decay(), (40, 41, 120, 42)
    for steps in lengths:
        solve(steps)
    # One with more steps than there is room for is not noted, and no other is let go for it.
    assert [has_table(steps) for steps in lengths] == [False, True, False, True]
    for _ in range(2):
        solve(40)
    assert has_table(40)
