"""Events of native members: closed forms, each as a native solve of its own, and refusals."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from bouncing import D, Level, leaf
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
from torch.autograd import gradcheck
from torch_threads import threads

import pysciml_node as psn
from pysciml_node.solutions.joined_members import JoinedMembers
from pysciml_node.solutions.members import ListedMembers
from pysciml_node.torch_engine.native import attempt
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.members import NativeMembers

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.05}


def assert_native(solution: psn.EnsembleSolution) -> None:
    """All members have gone from event to event in native code."""
    assert isinstance(solution.members, JoinedMembers)
    assert all(isinstance(one.members, NativeMembers) for one in solution.members.rounds)


def test_twenty_bounces_of_each_ball_with_their_gradients() -> None:
    assert_twenty_bounces_of_each(compile=True)


def test_ten_doses_of_each_patient_with_their_gradients() -> None:
    assert_ten_doses_of_each(compile=True)


ALGORITHMS = [
    psn.Tsit5(), psn.BS3(), psn.Vern7(), psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(),
    psn.TRBDF2(),
]  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_equal_steps_give_equal_events_states_and_gradients(algorithm: psn.Algorithm) -> None:
    options = {"algorithm": algorithm, "saveat": [0.2, 0.25, 1.0, 2.9], **FIXED}
    assert_native(compare(pendulums(), SEVERAL, 1e-12, compile=True, **options))


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=repr)
def test_several_events_of_each(algorithm: psn.Algorithm) -> None:
    assert_native(compare(pendulums(), SEVERAL, algorithm=algorithm, compile=True))


@pytest.mark.parametrize("options", OPTIONS, ids="-".join)
def test_options_hold_for_each(options: dict[str, Any]) -> None:
    assert_native(compare(pendulums(), SEVERAL, compile=True, **options))


def test_members_that_end_at_different_times_and_others_without_events() -> None:
    """Terminal events end some; one has none before the end of its interval."""
    stop = psn.Event(lambda t, u: u[0] - 0.3)
    late = psn.Event(lambda t, u: u[0] - 0.3, affect=kick, terminal=True)
    for events in (stop, [RISING, late], [stop, psn.Event(lambda t, u: u[1] + 0.2)]):
        for options in ({}, {"saveat": [0.1, 0.5, 1.5]}):
            assert_native(compare(pendulums(), events, compile=True, **options))
    seldom = psn.Event(lambda t, u: u[0] - 1.4, affect=lambda t, u, p: -0.5 * u)
    found = compare(pendulums(), seldom, compile=True)
    counts = [len(member.jumps) for member in found]
    assert min(counts) == 0 < max(counts)


def test_own_intervals_that_move_and_backward_in_time() -> None:
    one = pendulums()
    spans = torch.tensor([[0.0, 3.0], [0.1, 2.7], [-0.2, 3.0], [0.3, 2.6]], dtype=D)
    own = psn.EnsembleProblem(one.problem, one.u0, one.p, spans.requires_grad_())
    assert_native(compare(own, SEVERAL, compile=True))
    assert_native(compare(own, SEVERAL, 1e-12, compile=True, saveat=[0.4, 0.5], **FIXED))
    backward = [*SEVERAL[::2], psn.Event(at=[2.0, 0.5], affect=kick)]
    assert_native(compare(pendulums((3.0, 0.0)), backward, saveat=[2.0, 0.1], compile=True))


def test_neural_conditions_in_several_threads() -> None:
    """Gradients of the condition's weights too, and the same bits in any number of threads."""
    level = Level(0.5)
    event, results = psn.Event(level, affect=kick), []
    compare(pendulums(), event, compile=True)
    generator = torch.Generator().manual_seed(0)
    u0 = torch.randn(200, 2, dtype=D, generator=generator).requires_grad_()
    p = (1 + torch.rand(200, 2, dtype=D, generator=generator)).requires_grad_()
    many = psn.EnsembleProblem(pendulums().problem, u0, p)
    for count in (1, 3):
        with threads(count):
            solution = psn.solve(many, events=event, compile=True)
            assert_native(solution)
            inputs = [u0, p, *level.parameters()]
            results.append([solution.u1, *torch.autograd.grad(solution.u1.sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.equal(results[0][0], results[1][0])
    assert solution.members.jumps


@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.Rodas5P()], ids=repr)
def test_gradients_agree_with_finite_differences(algorithm: psn.Algorithm) -> None:
    """Of states behind jumps, and of the times of events, to all that they depend on."""
    start = torch.tensor([[0.9, 0.1], [0.4, -0.3], [-0.2, 0.5]], dtype=D, requires_grad=True)
    p = torch.tensor([[2.0, 1.1], [1.5, 0.7], [2.4, 0.4]], dtype=D, requires_grad=True)

    def outcome(u0: Tensor, p: Tensor, level: Tensor) -> Tensor:
        event = psn.Event(
            lambda t, u: u[0] - level * torch.cos(t), affect=lambda t, u, p: u * p[1] + 0.1 * t
        )
        many = psn.EnsembleProblem(pendulums((0.0, 1.3)).problem, u0, p)
        solution = psn.solve(
            many, algorithm, events=event, compile=True, rtol=1e-9, atol=1e-9, saveat=[0.7, 1.3]
        )
        assert_native(solution)
        times = [jump.t for member in solution for jump in member.jumps]
        assert times
        return torch.cat((solution.u.reshape(-1), torch.stack(times)))

    level = torch.tensor(0.2, dtype=D, requires_grad=True)
    assert gradcheck(outcome, (start, p, level), eps=1e-5, atol=1e-5, rtol=1e-4)


def test_single_precision_and_states_of_parts() -> None:
    u0 = {"x": torch.linspace(1.0, 2.0, 3)[:, None], "v": torch.zeros(3, 2)}
    problem = psn.ODEProblem(
        lambda t, u: {"x": -u["x"], "v": torch.cat((u["x"], t * u["x"]))},
        {name: x[0] for name, x in u0.items()},
        (0.0, 2.0),
    )
    event = psn.Event(
        lambda t, u: u["x"].sum() - 0.8, affect=lambda t, u: {"x": u["x"] + 1.0, "v": -u["v"]}
    )
    together = psn.solve(psn.EnsembleProblem(problem, u0), events=event, compile=True)
    assert_native(together)
    for one, alone in zip(together, psn.EnsembleProblem(problem, u0).members(), strict=True):
        other = psn.solve(alone, events=event, compile=True)
        assert len(one.jumps) == len(other.jumps) > 0
        for name in u0:
            torch.testing.assert_close(one.u1[name], other.u1[name], rtol=1e-4, atol=1e-5)


def test_bounces_that_pile_up_fail_for_their_own_ball() -> None:
    h, g, e = (torch.tensor(x, dtype=D) for x in ([1.0, 1.0], [9.81, 9.81], [0.2, 0.9]))
    solution = psn.solve(balls(h, g, e, 1.5), events=BOUNCE, throw=False, compile=True)
    assert_native(solution)
    assert solution.retcodes == (psn.ReturnCode.DtLessThanMin, psn.ReturnCode.Success)
    assert bool(solution.u1[0].isnan().all())
    assert bool(solution.u1[1].isfinite().all())
    with pytest.raises(psn.EnsembleFailure, match="1 of 2 members failed: 0"):
        psn.solve(balls(h, g, e, 1.5), events=BOUNCE, compile=True)


def test_steps_of_all_pieces_count_for_a_member() -> None:
    """The fast pendulum, which meets many events, has no more steps left."""
    one = pendulums()
    p = one.p.detach().clone()
    p[2] = torch.tensor([60.0, 1.0], dtype=D)
    many = psn.EnsembleProblem(one.problem, one.u0, p)
    options: dict[str, Any] = {"events": RISING, "compile": True, "rtol": 1e-6, "max_steps": 150}
    found = psn.solve(many, throw=False, **options)
    assert_native(found)
    assert [m for m, code in enumerate(found.retcodes) if not code.successful] == [2]
    assert found.retcodes[2] is psn.ReturnCode.MaxIters
    assert found.member_stats[2].naccept + found.member_stats[2].nreject == 150
    with pytest.raises(psn.EnsembleFailure, match="1 of 4 members failed: 2"):
        psn.solve(many, **options)


# Borders ---------------------------------------------------------------------------------------


def test_what_members_do_not_have_goes_one_by_one() -> None:
    """Solves of one member each have it, natively; what these have not either they name."""
    times = torch.tensor([0.5], dtype=D, requires_grad=True)
    found = psn.solve(pendulums(), events=RISING, saveat=times, compile=True)
    assert isinstance(found.members, ListedMembers)

    def floor(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        """Hides its time, and so what moves it behind an event."""
        return torch.stack((u[1], -p[0] * u[0] + torch.sin(t.detach())))

    hiding = psn.EnsembleProblem(
        psn.ODEProblem(floor, torch.zeros(2, dtype=D), (0.0, 2.0), p=torch.ones(2, dtype=D)),
        pendulums().u0,
        pendulums().p,
    )
    compiled, eager = (psn.solve(hiding, events=RISING, compile=c) for c in (True, False))
    bars, others = (torch.autograd.grad(s.u1.sum(), hiding.u0) for s in (compiled, eager))
    torch.testing.assert_close(bars, others, rtol=1e-7, atol=1e-8)
    seen: list[Any] = []
    prints = psn.Event(lambda t, u: seen.append(t) or u[0] - 0.5)
    with pytest.raises(psn.CompileError, match="an event's condition has no native code"):
        psn.solve(pendulums(), events=prints, compile=True)


def test_what_compiles_by_itself_says_once_why_it_does_not() -> None:
    event = psn.Event(lambda t, u: torch.linalg.det(u.diag()) - 0.05, affect=kick)
    expected = psn.solve(pendulums(), events=event)
    attempt._told.clear()
    with pytest.warns(psn.PsnWarning, match="an event's condition has no native code"):
        found = psn.solve(pendulums(), events=event, compile="auto")
    assert isinstance(found.members, JoinedMembers)
    assert torch.equal(found.u1, expected.u1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        psn.solve(pendulums(), events=event, compile="auto")


def test_a_mass_matrix_with_events_is_named() -> None:
    one = pendulums()
    problem = psn.ODEProblem(
        one.problem.f,
        one.problem.u0,
        (0.0, 3.0),
        p=one.problem.p,
        mass_matrix=2 * torch.eye(2, dtype=D),
    )
    many = psn.EnsembleProblem(problem, one.u0, one.p)
    with pytest.raises(psn.CompileError, match="events with mass_matrix"):
        psn.solve(many, psn.Rodas5P(), events=RISING, compile=True)


def test_times_of_doses_receive_gradients() -> None:
    times = leaf(0.5, 2.0)
    many = pendulums()
    event = psn.Event(at=times, affect=lambda t, u, p: 1.5 * u + t)
    found, expected = (psn.solve(many, events=[event, RISING], compile=c) for c in (True, False))
    assert_native(found)
    one, other = (torch.autograd.grad(s.u1.sum(), times)[0] for s in (found, expected))
    torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-8)
