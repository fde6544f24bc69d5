"""Native members that change between two methods, each for itself, beside single solves."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from properties.native_cases import quick_turns
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch_threads import threads

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

D = torch.float64
M = 9  # more than go abreast, and no multiple of it
ALGORITHMS = (
    psn.AutoTsit5(),
    psn.AutoVern7(),
    psn.AutoTsit5(psn.Rosenbrock23()),
    psn.AutoVern7(psn.KenCarp4()),
    psn.AutoTsit5(psn.TRBDF2()),
)
by_algorithm = pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda a: a.expression)
SOME = (psn.AutoTsit5(psn.Rosenbrock23()), psn.AutoTsit5(psn.TRBDF2()))
by_some = pytest.mark.parametrize("algorithm", SOME, ids=lambda a: a.expression)
SAVEAT = [0.0, 0.03, 0.04, 0.1, 0.17, 0.3, 0.41, 0.45, 0.5]
STEPS: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.02}


def tensor(*numbers: Any) -> Tensor:
    return torch.tensor(numbers, dtype=D)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=D, generator=torch.Generator().manual_seed(seed))


class Pulsed(nn.Module):
    """Stiff from time to time, with shared weights; each member at other times."""

    def __init__(self, size: int = 3) -> None:
        super().__init__()
        self.matrix = nn.Parameter(random(size, size, seed=1) - 9 * torch.eye(size, dtype=D))
        self.net = nn.Sequential(nn.Linear(size, 5), nn.Tanh(), nn.Linear(5, size)).double()
        with torch.no_grad():
            for i, x in enumerate(self.net.parameters()):
                x.copy_(random(*x.shape, seed=i) / 2)

    def forward(self, t: Tensor, u: Tensor, p: dict[str, Tensor]) -> Tensor:
        rate = 0.02 + 4 * torch.sin(16 * t + p["phase"]) ** 4
        return rate * (self.matrix @ u * p["gain"] + self.net(u))


def pulsed(m: int = M) -> psn.EnsembleProblem:
    """Of the first member the pulses never come."""
    p = {
        "gain": torch.cat((tensor(1e-3), torch.linspace(1, 4, m - 1, dtype=D))).requires_grad_(),
        "phase": torch.linspace(0, 2, m, dtype=D).requires_grad_(),
    }
    u0 = random(m, 3, seed=7).requires_grad_()
    first = {name: x[0].detach() for name, x in p.items()}
    problem = psn.ODEProblem(Pulsed(), u0[0].detach(), (0.0, 0.5), p=first)
    return psn.EnsembleProblem(problem, u0, p)


def solve(
    ensemble: psn.EnsembleProblem, algorithm: Any, compile: Any = True, **options: Any
) -> Any:
    options = {"rtol": 1e-6, "atol": 1e-9, "engine": "torch"} | options
    return psn.solve(ensemble, algorithm, compile=compile, **options)


def methods(solution: psn.Solution) -> list[int]:
    """Which method took each step: 0 for the explicit one, 1 for the stiff one."""
    return solution.trajectory.record.methods


def changes(solution: psn.Solution) -> int:
    return sum(a != b for a, b in pairwise(methods(solution)))


def leaves(ensemble: psn.EnsembleProblem) -> list[Tensor]:
    found = [ensemble.u0, ensemble.tspan, *ensemble.p.values()]
    found += ensemble.problem.f.parameters()
    return [x for x in found if x is not None and x.requires_grad]


def loss_of(solution: Any) -> Tensor:
    """Of saved states, of last states and of states at the ends of steps."""
    weights = torch.linspace(-1, 2, solution.u.numel(), dtype=solution.u.dtype)
    last = (solution.u1**3).sum()
    return (solution.u.reshape(-1) * weights).sum() + last


def assert_alike(ensemble: psn.EnsembleProblem, algorithm: Any, **options: Any) -> Any:
    """Native members beside the loop in Python."""
    native, eager = (solve(ensemble, algorithm, compile, **options) for compile in (True, False))
    assert native.retcodes == eager.retcodes
    assert [methods(x) for x in native] == [methods(x) for x in eager]
    torch.testing.assert_close(native.u1, eager.u1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(native.u, eager.u, rtol=1e-12, atol=1e-12)
    wanted = leaves(ensemble)
    bars, others = (torch.autograd.grad(loss_of(s), wanted) for s in (native, eager))
    for bar, other in zip(bars, others, strict=True):
        scale = max(1.0, float(other.abs().max()))
        torch.testing.assert_close(bar, other, rtol=1e-12, atol=1e-12 * scale)
    return native


@by_algorithm
def test_equal_steps_give_equal_states_and_gradients(algorithm: Any) -> None:
    ensemble = pulsed()
    with quick_turns(0.02):
        found = assert_alike(ensemble, algorithm, saveat=SAVEAT, **STEPS)
        single = [solve(ensemble.member(m), algorithm, saveat=SAVEAT, **STEPS) for m in (0, 4, 8)]
    turns = [changes(x) for x in found]
    assert turns[0] == 0
    assert min(turns[1:]) >= 2
    assert len({tuple(methods(x)) for x in found}) > M // 2
    for m, one in zip((0, 4, 8), single, strict=True):
        mine, alone = found.member_stats[m], one.stats
        assert (mine.nfe, mine.naccept) == (alone.nfe, alone.naccept)


@by_some
def test_stops_and_intervals_of_their_own_and_their_gradients(algorithm: Any) -> None:
    """With outputs inside of steps, at stops, and where steps end that move with their starts."""
    ensemble = pulsed()
    start = torch.linspace(0, 0.1, M, dtype=D)
    tspan = torch.stack([start, 0.3 + start * 2], 1).requires_grad_()
    own = psn.EnsembleProblem(ensemble.problem, ensemble.u0, ensemble.p, tspan=tspan)
    saveat = start[:, None] + tensor(0.0, 0.05, 0.12, 0.2)
    with quick_turns(0.02):
        native = solve(own, algorithm, saveat=saveat, tstops=[0.22], **STEPS)
        bars = torch.autograd.grad(loss_of(native), leaves(own))
        for m in (1, 5, 8):
            # An ensemble of one is solved by a loop over steps in Python.
            p = {name: x[m : m + 1].detach().requires_grad_() for name, x in own.p.items()}
            u0, span = own.u0[m : m + 1].detach().requires_grad_(), tspan[m].detach()
            ends = [x.clone().requires_grad_() for x in span]
            problem = psn.ODEProblem(
                own.problem.f, u0[0], tuple(ends), p={name: x[0] for name, x in p.items()}
            )
            one = solve(
                problem, algorithm, False, saveat=saveat[m].tolist(), tstops=[0.22], **STEPS
            )
            assert methods(one) == methods(native[m])
            assert changes(one) >= 1
            torch.testing.assert_close(one.u, native.u[m], rtol=1e-12, atol=1e-12)
            weights = torch.linspace(-1, 2, native.u.numel(), dtype=D).reshape(native.u.shape)[m]
            loss = (one.u * weights).sum() + (one.u1**3).sum()
            others = torch.autograd.grad(loss, [u0, *ends, *p.values()])
            found = [bars[0][m : m + 1], *bars[1][m], *(x[m : m + 1] for x in bars[2:4])]
            for bar, other in zip(found, others, strict=True):
                torch.testing.assert_close(bar, other, rtol=1e-11, atol=1e-11)


def van_der_pol(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    return torch.stack((y[1], p * (1 - y[0] ** 2) * y[1] - y[0]))


def oscillators(m: int = M, end: float = 16.0) -> psn.EnsembleProblem:
    """From ones that are not stiff at all to ones that are from the beginning."""
    p = torch.cat((tensor(0.1), torch.logspace(1, 3, m - 1, dtype=D))).requires_grad_()
    problem = psn.ODEProblem(van_der_pol, tensor(2.0, 0.0), (0.0, end), p=p[0].detach())
    return psn.EnsembleProblem(problem, p=p)


@by_algorithm
def test_members_of_any_stiffness_change_where_they_do_alone(algorithm: Any) -> None:
    ensemble, options = oscillators(), {"rtol": 1e-4, "atol": 1e-6, "saveat": [3.3, 11.0, 16.0]}
    with torch.no_grad():
        native, eager = (solve(ensemble, algorithm, c, **options) for c in (True, False))
    turns = [changes(x) for x in native]
    assert turns[0] == 0
    assert turns[-1] == 1
    assert max(turns) >= 3
    assert [methods(x) for x in native] == [methods(x) for x in eager]
    for mine, other in zip(native.member_stats, eager.member_stats, strict=True):
        assert (mine.naccept, mine.nreject) == (other.naccept, other.nreject)
        assert mine.nfe == other.nfe
    # Sizes of adaptive steps differ by what rounding is of an error estimate.
    torch.testing.assert_close(native.u, eager.u, rtol=1e-6, atol=1e-6)


@by_algorithm
def test_gradients_agree_with_finite_differences(algorithm: Any) -> None:
    """With fixed steps at the edge of stability, fast decay onto a curve for a while."""
    radius = algorithm.explicit.tableau.stability_radius

    def decay(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        fast = p[0] * torch.exp(-((t - 0.7) ** 4) * 20) + 4
        return -fast * (u - torch.stack((torch.cos(p[1] * t), torch.sin(t))))

    def final(u0: Tensor, p: Tensor, tspan: Tensor) -> Tensor:
        problem = psn.ODEProblem(decay, u0[0].detach(), (0.0, 1.49), p=p[0].detach())
        ensemble = psn.EnsembleProblem(problem, u0, p, tspan=tspan)
        solution = solve(
            ensemble, algorithm, saveat=[0.3, 0.71, 0.9, 1.2], controller=psn.FixedStep(),
            dt0=1 / 24,
        )  # fmt: skip
        assert [changes(x) for x in solution] == [2, 0, 2]
        return torch.cat((solution.u, solution.u1[:, None]), 1)

    u0, p = random(3, 2), random(3, 2, seed=1) / 9
    p[:, 0] = tensor(0.95, 0.02, 0.96) * radius * 24 - 4
    # No saved time at the end of a step: there it changes from one step to the next.
    tspan = tensor([0.0, 1.49], [0.11, 1.5], [0.06, 1.43])
    inputs = [x.requires_grad_() for x in (u0, p, tspan)]
    assert gradcheck(final, inputs, atol=1e-6, rtol=1e-5)


# Each as alone ---------------------------------------------------------------------------------


@by_some
def test_any_number_of_threads_gives_the_same_bits(algorithm: Any) -> None:
    results = []
    for count in (1, 3):
        ensemble = pulsed(200)
        with threads(count), quick_turns(0.02):
            solution = solve(ensemble, algorithm, saveat=SAVEAT)
            bars = torch.autograd.grad(loss_of(solution), leaves(ensemble))
        assert sum(changes(solution[m]) for m in range(200)) > 200
        results.append([solution.u, *bars])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@by_algorithm
def test_a_member_is_as_alone_to_the_last_bit(algorithm: Any) -> None:
    ensemble = oscillators(19)
    together = solve(ensemble, algorithm, saveat=[7.0, 16.0])
    (bars,) = torch.autograd.grad(together.u[..., 0].sum(), ensemble.p)
    for m in (0, 7, 11, 18):
        own = ensemble.p[m : m + 1].detach().requires_grad_()
        one = psn.EnsembleProblem(ensemble.problem, p=own)
        alone = solve(one, algorithm, saveat=[7.0, 16.0])
        assert torch.equal(alone.u[0], together.u[m])
        assert alone.member_stats[0].nfe == together.member_stats[m].nfe
        (bar,) = torch.autograd.grad(alone.u[..., 0].sum(), own)
        assert torch.equal(bar[0], bars[m])


@by_some
def test_members_that_fail_at_any_step_do_as_the_loop_does(algorithm: Any) -> None:
    """Before a change, at it, where no attempt has been made since, and behind it."""
    ensemble = pulsed(3)
    with torch.no_grad(), quick_turns(0.02):
        for most in range(1, 16):
            native, eager = (
                solve(
                    ensemble, algorithm, c, rtol=1e-3, atol=1e-4, max_steps=most, throw=False
                )
                for c in (True, False)
            )  # fmt: skip
            assert native.retcodes == eager.retcodes
            assert [methods(x) for x in native] == [methods(x) for x in eager]
            for one, other in zip(native.member_stats, eager.member_stats, strict=True):
                assert (one.nfe, one.nreject) == (other.nfe, other.nreject)


@by_some
def test_a_member_that_blows_up_leaves_its_neighbours_alone(algorithm: Any) -> None:
    """u' = u^2 from 1 has no solution behind t = 1, and is stiff before."""
    u0 = torch.full((M, 1), 0.1, dtype=D)
    u0[4] = 1.0
    problem = psn.ODEProblem(lambda t, u: u * u, u0[0], (0.0, 2.0))
    found, eager = (
        solve(psn.EnsembleProblem(problem, u0), algorithm, c, throw=False) for c in (True, False)
    )
    assert found.retcodes == eager.retcodes
    assert not found.retcodes[4].successful
    calm = [m for m in range(M) if m != 4]
    torch.testing.assert_close(
        found.u1[calm], torch.full((M - 1, 1), 0.125, dtype=D), rtol=1e-5, atol=0
    )


# What is made of the steps ---------------------------------------------------------------------


@by_some
def test_dense_output_and_estimates_are_those_of_single_solves(algorithm: Any) -> None:
    ensemble, times = pulsed(), torch.linspace(0.0, 0.5, 37, dtype=D)
    with quick_turns(0.02):
        native = solve(ensemble, algorithm, **STEPS)
        single = solve(ensemble.member(3), algorithm, False, **STEPS)
    assert changes(native[3]) >= 3
    torch.testing.assert_close(native[3](times), single(times), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(native[3].u, single.u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        native[3].step_stiffness, single.step_stiffness, rtol=1e-9, atol=1e-9, equal_nan=True
    )


@by_some
def test_penalties_are_those_of_the_loop(algorithm: Any) -> None:
    penalty = psn.GlobalError()
    ensemble, found = pulsed(4), []
    with quick_turns(0.02):
        for compile in (True, False):
            value = penalty._over_members(solve(ensemble, algorithm, compile, **STEPS))
            found.append([value.detach(), *torch.autograd.grad(value.sum(), leaves(ensemble))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-8)


@by_some
def test_events_end_members_by_either_method(algorithm: Any) -> None:
    """u = cos t, reached at another speed by each member, crosses zero near pi / 2."""
    p = torch.logspace(0, 5, M, dtype=D)
    problem = psn.ODEProblem(
        lambda t, u, p: -p * (u - torch.cos(t)) - torch.sin(t), tensor(1.0), (0.0, 3.0), p=p[0]
    )
    ensemble, event = psn.EnsembleProblem(problem, p=p), psn.Event(lambda t, u: u[0])
    with torch.no_grad():
        native, eager = (
            solve(ensemble, algorithm, c, events=event, rtol=1e-5, atol=1e-5) for c in (True, False)
        )
    assert {methods(x)[-1] for x in native} == {0, 1}
    for one, other in zip(native, eager, strict=True):
        assert methods(one) == methods(other)
        assert float(one.event_t) == pytest.approx(math.pi / 2, abs=1e-4)
        assert float(one.event_t) == pytest.approx(float(other.event_t), abs=1e-7)


@by_some
def test_conditions_that_begin_at_zero_are_settled_behind_a_change(algorithm: Any) -> None:
    """u = sin t begins at the condition's zero. The first steps are far too long, so that the other
    method takes the first one that is accepted.
    """
    p = torch.logspace(0, 4, M, dtype=D)
    problem = psn.ODEProblem(
        lambda t, u, p: -p * (u - torch.sin(t)) + torch.cos(t), tensor(0.0), (0.0, 4.0), p=p[0]
    )
    ensemble, event = psn.EnsembleProblem(problem, p=p), psn.Event(lambda t, u: u[0])
    with torch.no_grad(), quick_turns(0.02):
        native, eager = (
            solve(ensemble, algorithm, c, events=event, rtol=1e-4, atol=1e-4, dt0=3.0)
            for c in (True, False)
        )
    assert methods(native[-1])[0] == 1
    assert [methods(x) for x in native] == [methods(x) for x in eager]
    for one in native:
        assert float(one.event_t) == pytest.approx(math.pi, abs=1e-3)


def test_a_jump_begins_anew_with_the_explicit_method() -> None:
    """An effect at a threshold, after which members go on from below it."""
    p = torch.logspace(0, 3, M, dtype=D)
    problem = psn.ODEProblem(
        lambda t, u, p: -p * (u - torch.cos(t)) - torch.sin(t), tensor(1.0), (0.0, 3.0), p=p[0]
    )
    ensemble = psn.EnsembleProblem(problem, p=p)
    event = psn.Event(lambda t, u: u[0], affect=lambda t, u, p: u - 0.5)
    with torch.no_grad():
        native, eager = (
            solve(ensemble, psn.AutoTsit5(), c, events=event, rtol=1e-5, atol=1e-5)
            for c in (True, False)
        )
    assert [len(x.jumps) for x in native] == [1] * M
    torch.testing.assert_close(native.u1, eager.u1, rtol=1e-6, atol=1e-6)


@by_some
def test_gradients_go_through_events_and_their_effects(algorithm: Any) -> None:
    results = []
    for compile in (True, False):
        p = torch.logspace(0, 2, 5, dtype=D).requires_grad_()
        problem = psn.ODEProblem(
            lambda t, u, p: -p * (u - torch.cos(t)) - torch.sin(t), tensor(1.0), (0.0, 3.0),
            p=p[0].detach(),
        )  # fmt: skip
        event = psn.Event(lambda t, u: u[0], affect=lambda t, u, p: u - 0.1 * p.log1p())
        with quick_turns(0.02):
            found = solve(
                psn.EnsembleProblem(problem, p=p), algorithm, compile, events=event,
                saveat=[0.5, 1.5, 1.7, 3.0], controller=psn.FixedStep(), dt0=0.013,
            )  # fmt: skip
        assert [len(x.jumps) for x in found] == [1] * 5
        (bar,) = torch.autograd.grad((found.u**2).sum() + found.u1.sum(), p)
        results.append([found.u.detach(), bar])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@by_some
def test_single_precision(algorithm: Any) -> None:
    p = torch.logspace(0, 3, 40).requires_grad_()
    problem = psn.ODEProblem(lambda t, u, p: -p * u, torch.ones(2), (0.0, 1.0), p=torch.tensor(1.0))
    with quick_turns(0.3):
        found = solve(psn.EnsembleProblem(problem, p=p), algorithm, rtol=1e-4, atol=1e-5)
    assert {m for x in found for m in methods(x)} == {0, 1}
    torch.testing.assert_close(found.u1[:, 0], torch.exp(-p), rtol=1e-3, atol=1e-3)
    (bar,) = torch.autograd.grad(found.u1.sum(), p)
    torch.testing.assert_close(bar, -2 * torch.exp(-p.detach()), rtol=1e-2, atol=1e-2)


def test_methods_share_code_with_members_by_one_of_them() -> None:
    """Each keeps to its own steps, whatever was solved before."""
    ensemble = pulsed()
    algorithms = (psn.Tsit5(), psn.Rodas5P(), *ALGORITHMS[:3])
    with torch.no_grad(), quick_turns(0.02):
        first = [solve(ensemble, a) for a in algorithms]
        for algorithm, known in zip(algorithms, first, strict=True):
            again = solve(ensemble, algorithm)
            assert torch.equal(again.u1, known.u1)
            assert [x.nfe for x in again.member_stats] == [x.nfe for x in known.member_stats]
