"""Events of many members in one batch: closed forms, and each as it would be alone."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
from bouncing import D, leaf
from jumping import (
    BOUNCE,
    OPTIONS,
    RISING,
    SEVERAL,
    assert_ten_doses_of_each,
    assert_twenty_bounces_of_each,
    balls,
    compare,
    kick,
    pendulums,
)
from torch import Tensor
from torch.utils._pytree import tree_map_only

import pysciml_node as psn
from pysciml_node.solutions.joined_members import JoinedMembers
from pysciml_node.solutions.members import ListedMembers

ADJOINTS = [psn.DiscreteAdjoint(), psn.DirectAdjoint()]
CONTINUOUS = [psn.InterpolatingAdjoint(), psn.GaussAdjoint(), psn.BacksolveAdjoint()]
all_adjoints = pytest.mark.parametrize(
    "adjoint", [*ADJOINTS, *CONTINUOUS], ids=lambda a: type(a).__name__
)
both_adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)


@all_adjoints
def test_twenty_bounces_of_each_ball_with_their_gradients(adjoint: psn.Adjoint) -> None:
    assert_twenty_bounces_of_each(adjoint=adjoint)


@all_adjoints
def test_ten_doses_of_each_patient_with_their_gradients(adjoint: psn.Adjoint) -> None:
    assert_ten_doses_of_each(adjoint=adjoint)


@pytest.mark.parametrize(
    ("algorithm", "adjoint"),
    [
        *itertools.product([psn.Tsit5(), psn.Vern7(), psn.KenCarp4()], ADJOINTS),
        (psn.Rodas5P(), psn.DiscreteAdjoint()),
        *itertools.product([psn.Tsit5()], CONTINUOUS),
        (psn.Rodas5P(), psn.GaussAdjoint()),
    ],
)
def test_several_events_of_each(algorithm: psn.Algorithm, adjoint: psn.Adjoint) -> None:
    compare(pendulums(), SEVERAL, algorithm=algorithm, adjoint=adjoint)


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_options_hold_for_each(options: dict[str, Any]) -> None:
    compare(pendulums(), SEVERAL, **options)


def test_stops_and_terminal_events() -> None:
    stop = psn.Event(lambda t, u: u[0] - 0.3)
    for saveat in (None, [0.1, 0.5, 1.5]):
        given = {} if saveat is None else {"saveat": saveat}
        compare(pendulums(), stop, **given)
        compare(
            pendulums(),
            [RISING, psn.Event(lambda t, u: u[0] - 0.3, affect=kick, terminal=True)],
            **given,
        )
    compare(pendulums(), [stop, psn.Event(lambda t, u: u[1] + 0.2)])
    compare(pendulums(), psn.Event(at=[1.0], terminal=True))


def test_own_intervals_that_move_and_backward_in_time() -> None:
    one = pendulums()
    spans = torch.tensor([[0.0, 3.0], [0.1, 2.7], [-0.2, 3.0], [0.3, 2.6]], dtype=D)
    moving = spans.clone().requires_grad_()
    for adjoint in (psn.DiscreteAdjoint(), psn.GaussAdjoint()):
        own = psn.EnsembleProblem(one.problem, one.u0, one.p, moving)
        compare(own, SEVERAL, adjoint=adjoint)
    backward = pendulums((3.0, 0.0))
    compare(backward, [*SEVERAL[::2], psn.Event(at=[2.0, 0.5], affect=kick)], saveat=[2.0, 0.1])


def test_times_of_doses_move() -> None:
    times = leaf(0.5, 2.0)
    many = pendulums()
    event = psn.Event(at=times, affect=lambda t, u, p: 1.5 * u + t)
    together = psn.solve(many, events=[event, RISING])
    assert isinstance(together.members, JoinedMembers)
    alone = [psn.solve(problem, events=[event, RISING]) for problem in many.members()]
    (one,) = torch.autograd.grad(together.u1.sum(), times)
    (other,) = torch.autograd.grad(sum(s.u1.sum() for s in alone), times)
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex128])
def test_other_dtypes_and_states_of_parts(dtype: torch.dtype) -> None:
    u0 = {"x": torch.linspace(1.0, 2.0, 3).to(dtype)[:, None], "v": torch.zeros(3, 2, dtype=dtype)}
    problem = psn.ODEProblem(
        lambda t, u: {"x": -u["x"], "v": torch.cat((u["x"], t * u["x"]))},
        {name: x[0] for name, x in u0.items()},
        (0.0, 2.0),
    )
    event = psn.Event(
        lambda t, u: u["x"].real.sum() - 0.8,
        affect=lambda t, u: {"x": u["x"] + 1.0, "v": -u["v"]},
    )
    many = psn.EnsembleProblem(problem, u0)
    together = psn.solve(many, events=event)
    assert isinstance(together.members, JoinedMembers)
    alone = [psn.solve(problem, events=event) for problem in many.members()]
    for one, other in zip(together, alone, strict=True):
        assert len(one.jumps) == len(other.jumps) > 0
        for name in u0:
            torch.testing.assert_close(one.u1[name], other.u1[name], rtol=1e-4, atol=1e-5)
            before = [s.jumps[0].before[name] for s in (one, other)]
            torch.testing.assert_close(*before, rtol=1e-4, atol=1e-5)


def test_bounces_that_pile_up_fail_for_their_own_ball() -> None:
    h, g, e = (torch.tensor(x, dtype=D) for x in ([1.0, 1.0], [9.81, 9.81], [0.2, 0.9]))
    solution = psn.solve(balls(h, g, e, 1.5), events=BOUNCE, throw=False)
    assert isinstance(solution.members, JoinedMembers)
    assert solution.retcodes == (psn.ReturnCode.DtLessThanMin, psn.ReturnCode.Success)
    assert bool(solution.u1[0].isnan().all())
    assert bool(solution.u1[1].isfinite().all())
    with pytest.raises(psn.EnsembleFailure, match="1 of 2 members failed: 0"):
        psn.solve(balls(h, g, e, 1.5), events=BOUNCE)


def test_solutions_travel_and_lose_their_graph() -> None:
    solution = psn.solve(pendulums(), events=RISING, saveat=[1.0, 3.0])
    copies = [solution.detach(), tree_map_only(Tensor, Tensor.detach, solution)]
    for copy in copies:
        torch.testing.assert_close(copy.u, solution.u.detach())
        assert not copy[0].u1.requires_grad
        assert len(copy[0].jumps) == len(solution[0].jumps)
    ensemble = pickle.loads(pickle.dumps(psn.solve(pendulums(), events=psn.Event(at=[1.0]))))
    assert [len(member.jumps) for member in ensemble] == [1] * 4


def test_what_goes_one_by_one() -> None:
    many = pendulums()

    def branching(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -u if float(t) > 1 else u

    def hooking(t: Tensor, u: Tensor, p: Tensor | None = None) -> Tensor:
        twice = 2 * u
        if twice.requires_grad:
            twice.register_hook(torch.neg)  # which would not run in the batch
        return twice

    for options in (
        {"events": psn.Event(lambda t, u: torch.tensor(float(u[0]) - 0.2), affect=kick)},
        {"events": psn.Event(at=[0.5], affect=branching)},
        {"events": psn.Event(at=[0.5], affect=hooking)},
        {"events": psn.Event(lambda t, u: hooking(t, u)[0] - 0.2, affect=kick)},
        {"events": RISING, "adjoint": psn.InterpolatingAdjoint(), "algorithm": psn.Rodas5P()},
        {"events": RISING, "saveat": torch.tensor([0.5], dtype=D, requires_grad=True)},
    ):
        given: dict[str, Any] = options
        assert isinstance(psn.solve(many, **given).members, ListedMembers)


@pytest.mark.parametrize("fails", [False, True])
def test_effects_on_other_things_go_one_by_one(fails: bool) -> None:
    """A list of times has those of every member, whether or not the effect could be mapped."""
    times: list[Tensor] = []
    count = torch.zeros((), dtype=torch.int64)

    def noted(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        times.append(t.detach())
        count.add_(1)
        return u * float(t) if fails else u * t

    solution = psn.solve(pendulums(), events=psn.Event(at=[0.5, 1.0], affect=noted))
    assert isinstance(solution.members, ListedMembers)
    assert torch.stack(times).tolist() == [0.5, 1.0] * 4
    assert int(count) == 8


def test_a_time_without_slope_has_no_gradient() -> None:
    many = pendulums((0.0, 0.5))
    solution = psn.solve(many, events=psn.Event(lambda t, u: u[0] > 0.95, direction=-1))
    assert isinstance(solution.members, JoinedMembers)
    stopped = [m for m, one in enumerate(solution) if one.event is not None]
    assert 0 < len(stopped) < 4
    with pytest.raises(RuntimeError, match="no known derivative"):
        torch.autograd.grad(solution.u1.sum(), many.u0)
