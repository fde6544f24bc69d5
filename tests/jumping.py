"""Members with events: closed forms, and each as it would be alone."""

from __future__ import annotations

from typing import Any

import torch
from bouncing import TIGHT, D, leaf
from torch import Tensor

import pysciml_node as psn
from pysciml_node.solutions.joined_members import JoinedMembers


def fall(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    """Height and velocity under gravity, `p[0]`."""
    return torch.stack((u[1], -p[0]))


def balls(heights: Tensor, g: Tensor, e: Tensor, end: float) -> psn.EnsembleProblem:
    """Each has a height, a gravity and a restitution of its own."""
    start = torch.stack((heights, torch.zeros_like(heights)), dim=1)
    problem = psn.ODEProblem(fall, start[0].detach(), (0.0, end), p=torch.ones(2, dtype=D))
    return psn.EnsembleProblem(problem, start, torch.stack((g, e), dim=1))


BOUNCE = psn.Event(
    lambda t, u: u[0], direction=-1, affect=lambda t, u, p: torch.stack((u[0], -p[1] * u[1]))
)


def assert_twenty_bounces_of_each(**options: Any) -> None:
    """Times, ends and gradients of three balls are those of the closed form."""
    h, g, e = leaf(2.0, 1.0, 1.5), leaf(9.81, 5.0, 8.0), leaf(0.9, 0.9, 0.91)
    times = [torch.sqrt(2 * h / g)]
    speed = torch.sqrt(2 * g * h) * e
    for _ in range(19):
        times.append(times[-1] + 2 * speed / g)
        speed = speed * e
    exact = torch.stack(times, dim=1)
    ends = exact[:, -1].detach() + 0.4 * speed.detach() / g.detach()
    spans = torch.stack((torch.zeros_like(ends), ends), dim=1)
    many = psn.EnsembleProblem(
        balls(h, g, e, 20.0).problem, balls(h, g, e, 20.0).u0, torch.stack((g, e), 1), spans
    )
    solution = psn.solve(many, events=BOUNCE, **TIGHT | options)
    assert isinstance(solution.members, JoinedMembers)
    assert [len(member.jumps) for member in solution] == [20] * 3
    found = torch.stack([torch.stack([jump.t for jump in member.jumps]) for member in solution])
    torch.testing.assert_close(found, exact, rtol=1e-9, atol=0)
    rest = ends - exact[:, -1]
    end = torch.stack((speed * rest - g * rest**2 / 2, speed - g * rest), dim=1)
    torch.testing.assert_close(solution.u1, end, rtol=1e-8, atol=1e-8)
    weights = torch.tensor([1.0, -2.0], dtype=D)
    one = torch.autograd.grad(found.sum() + (solution.u1 @ weights).sum(), (h, g, e))
    other = torch.autograd.grad(exact.sum() + (end @ weights).sum(), (h, g, e))
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


def assert_ten_doses_of_each(**options: Any) -> None:
    """Concentrations of three patients and their gradients are those of the closed form."""
    times = leaf(0.0, 1.0, 2.0, 3.0, 3.0, 4.5, 5.0, 6.0, 7.5, 9.0)
    rate, dose = leaf(0.3, 0.7, 1.1), leaf(1.5, 1.0, 2.0)
    saveat = torch.tensor([0.0, 0.5, 3.0, 4.0, 9.0, 10.0], dtype=D)
    problem = psn.ODEProblem(
        lambda t, u, p: -p[0] * u, torch.zeros(1, dtype=D), (0.0, 10.0), p=torch.ones(2, dtype=D)
    )
    many = psn.EnsembleProblem(problem, p=torch.stack((rate, dose), dim=1))
    event = psn.Event(at=times, affect=lambda t, u, p: u + p[1])
    solution = psn.solve(many, events=event, saveat=saveat, **TIGHT | options)
    assert isinstance(solution.members, JoinedMembers)
    since = saveat[:, None] - times
    share = torch.where(since >= 0, torch.exp(-rate[:, None, None] * since), 0.0)
    exact = dose[:, None] * share.sum(2)
    torch.testing.assert_close(solution.u[..., 0], exact, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(solution.u1, solution.u[:, -1])
    weights = torch.linspace(-1.0, 1.0, 18, dtype=D).view(3, 6)
    # The one at the start moves out of the interval, which has no derivative from both sides.
    inputs = (times, rate, dose)
    one = torch.autograd.grad((solution.u[..., 0] * weights).sum(), inputs)
    # Times that a dose and a saved time share have one on each side of the jump.
    apart = torch.tensor([1, 2, 5, 6, 7, 8])
    other = torch.autograd.grad((exact * weights).sum(), inputs)
    torch.testing.assert_close(one[0][apart], other[0][apart], rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(one[1:], other[1:], rtol=1e-8, atol=1e-9)


def swing(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return torch.stack((u[1], -(p[0] ** 2) * torch.sin(u[0]) + torch.cos(p[1] * t)))


def pendulums(span: tuple[float, float] = (0.0, 3.0)) -> psn.EnsembleProblem:
    generator = torch.Generator().manual_seed(4)
    u0 = torch.randn(4, 2, generator=generator, dtype=D).requires_grad_()
    p = 1 + 2 * torch.rand(4, 2, generator=generator, dtype=D)
    problem = psn.ODEProblem(swing, torch.zeros(2, dtype=D), span, p=torch.ones(2, dtype=D))
    return psn.EnsembleProblem(problem, u0, p.requires_grad_())


def compare(
    many: psn.EnsembleProblem, events: Any, tight: float = 1e-9, **options: Any
) -> psn.EnsembleSolution:
    """What members find at once is what single solves find, and their gradients are theirs."""
    options = {"rtol": 1e-6, "atol": 1e-6, **options}
    together = psn.solve(many, events=events, **options)
    assert isinstance(together.members, JoinedMembers)
    alone = [psn.solve(problem, events=events, **options) for problem in many.members()]
    near: dict[str, float] = {"rtol": tight, "atol": tight}
    saves = "saveat" in options
    assert together.retcodes == tuple(s.retcode for s in alone)
    for batched, single in zip(together.member_stats, (s.stats for s in alone), strict=True):
        assert (batched.naccept, batched.nreject) == (single.naccept, single.nreject)
        # A stage that only the search has evaluated does not serve the step that follows.
        cuts = sum(len(member.jumps) for member in together) + len(together.members.rounds)
        assert 0 <= batched.nfe - single.nfe <= cuts
    losses: list[list[Tensor]] = [[], []]
    for one, other in zip(together, alone, strict=True):
        assert one.event == other.event
        assert [jump.event for jump in one.jumps] == [jump.event for jump in other.jumps]
        for s, terms in zip((one, other), losses, strict=True):
            flat = s.problem.spec.flatten
            middle = 0.7 * s.problem.t0 + 0.3 * s.problem.t1
            terms += [s(middle).sum()] if s.success and s.event is None else []
            terms += [(s.u1**3).sum()] if s.success else []
            terms += [(s.saved**2).sum()] if saves else []
            terms += [jump.t.sin() for jump in s.jumps]
            terms += [(flat(jump.before) * flat(jump.after)).sum() for jump in s.jumps]
            terms += [] if s.event_t is None else [s.event_t]
        # Sizes follow from error estimates, which are differences.
        apart: dict[str, float] = {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(one.step_times, other.step_times, **apart)
        torch.testing.assert_close(one.t, other.t, **apart)
        torch.testing.assert_close(one.u, other.u, **(near if saves else apart))
    states = torch.stack([s.u1 if s.success else s.u1 * torch.nan for s in alone])
    torch.testing.assert_close(together.u1, states, **near, equal_nan=True)
    if saves:
        for one, row in zip(together, together.u, strict=True):
            torch.testing.assert_close(row[: len(one.u)], one.u)
            assert bool(row[len(one.u) :].isnan().all())
    values = [torch.stack(terms) for terms in losses]
    torch.testing.assert_close(*values, rtol=10 * tight, atol=10 * tight)
    inputs = [x for x in (many.u0, many.p, many.tspan) if isinstance(x, Tensor) and x.requires_grad]
    found, expected = (torch.autograd.grad(x.sum(), inputs) for x in values)
    torch.testing.assert_close(found, expected, rtol=100 * tight, atol=100 * tight)
    return together


def kick(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
    return torch.stack((u[0], -0.7 * u[1] + 0.1 * p[0] + 0.1 * t))


RISING = psn.Event(lambda t, u: u[1] - 0.1 * t, direction=1, affect=kick)
SEVERAL = [
    psn.Event(lambda t, u: u[0] - 0.2, affect=kick),
    psn.Event(at=[0.5, 1.0, 1.0], affect=lambda t, u, p: u + p[1] * 0.1),
    psn.Event(lambda t, u: u[1], direction=-1, terminal=False),
    psn.Event(at=[1.0, 2.5], affect=lambda t, u, p: 1.1 * u),
]
OPTIONS: list[dict[str, Any]] = [
    {"saveat": [0.0, 0.5, 0.9, 1.0, 2.5, 3.0]},
    {"tstops": [0.7, 1.0, 2.9]},
    {"controller": psn.FixedStep(), "dt0": 0.05, "saveat": [0.2, 0.25]},
    {"controller": psn.FixedStep((0.1, 0.5, 1.1, 1.2, 2.0))},
    {"dt0": 0.3, "dtmax": 0.4},
    {"max_steps": 30, "throw": False},
]
