"""Fields that differentiate something by their own parameters.

With `e = rate sum(u)` the derivative of `e` by `rate` is `sum(u)`, so that the equation
`du/dt = -rate u (de/drate) / sum(u)` is `du/dt = -rate u`: what `u` itself comes from, which
depends on `rate` too, has no part in it.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pysciml_node as psn
from pysciml_node.steps.apart import Lookout, WentBack

D = torch.float64
RATE = 0.8
START = 2.0
END = START * math.exp(-RATE)


class Decay:
    """`-rate u`, by a derivative inside.

    Args:
        late: from which time on.
        keeps: what that derivative does with its graph.
    """

    def __init__(self, late: float = 0.0, **keeps: bool) -> None:
        self.rate = torch.tensor(RATE, dtype=D, requires_grad=True)
        self.late, self.keeps = late, keeps or {"create_graph": True}

    def inside(self, u: Tensor) -> Tensor:
        with torch.enable_grad():
            (slope,) = torch.autograd.grad((self.rate * u).sum(), self.rate, **self.keeps)
        return u * (slope / u.sum())

    def __call__(self, t: Tensor, u: Tensor, *_: Any) -> Tensor:
        return -self.rate * (u if t.amax() < self.late else self.inside(u))


def start() -> Tensor:
    return torch.full((1,), START, dtype=D, requires_grad=True)


def expect_decay(u1: Tensor, rate: Tensor, u0: Tensor, tolerance: float) -> None:
    assert u1.item() == pytest.approx(END, rel=tolerance)
    slopes = torch.autograd.grad(u1.sum(), (rate, u0))
    assert slopes[0].item() == pytest.approx(-END, rel=10 * tolerance)
    assert slopes[1].item() == pytest.approx(math.exp(-RATE), rel=10 * tolerance)


ALGORITHMS: list[Any] = [
    *(psn.Tsit5(), psn.BS3(), psn.Vern9()),
    *(psn.Rosenbrock23(), psn.Rodas5P(), psn.KenCarp4(), psn.TRBDF2(linsolve=psn.GMRES())),
    psn.AutoTsit5(),
]


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda x: type(x).__name__)
@pytest.mark.parametrize("adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint()])
def test_derivatives_inside_end_at_the_state(algorithm: Any, adjoint: Any) -> None:
    field, u0 = Decay(), start()
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    options: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1, "adjoint": adjoint}
    u1 = psn.solve(problem, algorithm, **options).u1
    with torch.no_grad():
        plain = psn.solve(problem, algorithm, **options).u1
    torch.testing.assert_close(u1.detach(), plain, rtol=1e-9, atol=0)
    expect_decay(u1, field.rate, u0, 1e-3)


def test_the_second_derivative_is_that_of_the_decay() -> None:
    field = Decay()
    problem = psn.ODEProblem(field, start(), (0.0, 1.0))
    u1 = psn.solve(problem, rtol=1e-9, atol=1e-9, adjoint=psn.DirectAdjoint()).u1
    (first,) = torch.autograd.grad(u1.sum(), field.rate, create_graph=True)
    (second,) = torch.autograd.grad(first, field.rate)
    assert second.item() == pytest.approx(END, rel=1e-7)


def test_a_transform_of_the_solve_sees_the_same() -> None:
    def end(rate: Tensor) -> Tensor:
        field = Decay()
        field.rate = rate
        problem = psn.ODEProblem(field, torch.full((1,), START, dtype=D), (0.0, 1.0))
        return psn.solve(problem, rtol=1e-7, atol=1e-7, adjoint=psn.DirectAdjoint()).u1.sum()

    slope = torch.func.grad(end)(torch.tensor(RATE, dtype=D))
    assert slope.item() == pytest.approx(-END, rel=1e-6)


def test_a_start_that_is_computed_by_the_same_parameter() -> None:
    field = Decay()
    problem = psn.ODEProblem(field, field.rate.view(1) * 3, (0.0, 1.0))
    u1 = psn.solve(problem, rtol=1e-9, atol=1e-9, adjoint=psn.DirectAdjoint()).u1
    end = 3 * RATE * math.exp(-RATE)
    assert u1.item() == pytest.approx(end, rel=1e-7)
    (slope,) = torch.autograd.grad(u1.sum(), field.rate)
    assert slope.item() == pytest.approx(end * (1 / RATE - 1), rel=1e-7)


def test_a_derivative_inside_is_seen_where_it_goes_back_to_the_first_value() -> None:
    lookout, t, rate = Lookout(), torch.tensor(0.0), torch.tensor(RATE, requires_grad=True)

    def plain(t: Tensor, u: Tensor) -> Tensor:
        return -rate * u

    def hidden(t: Tensor, u: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad((rate * u).sum(), rate, create_graph=True)
        return -rate * slope

    start = torch.ones(1)  # has no graph, but the state of the second call has one
    first = lookout(plain, t, start)
    with pytest.raises(WentBack):
        lookout(hidden, t, start + first)
    assert lookout(plain, t, start + first).item() == pytest.approx(RATE**2 - RATE)
    # Behind the solve torch may go back there.
    (slope,) = torch.autograd.grad(first.sum(), rate)
    assert slope.item() == -1


def test_the_first_value_is_let_go_without_the_garbage_collector() -> None:
    lookout, rate = Lookout(), torch.tensor(RATE, requires_grad=True)
    start = 1.0 * rate.view(1)
    value = lookout(lambda t, u: u * rate, torch.tensor(0.0), start)
    gone = weakref.ref(value)
    gc.disable()
    try:
        lookout.let_go()
        del value
        assert gone() is None
        value = Lookout()(lambda t, u: u * rate, torch.tensor(0.0), start)
        gone = weakref.ref(value)
        del value
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("algorithm", [psn.Tsit5(), psn.TRBDF2()])
def test_members(batched: bool, algorithm: Any) -> None:
    field = Decay()
    u0 = torch.tensor([[1.0], [START]], dtype=D, requires_grad=True)
    ensemble = psn.EnsembleProblem(
        psn.ODEProblem(field, u0[0].detach(), (0.0, 1.0)), u0=u0, batched=batched
    )
    steps = {"controller": psn.FixedStep(), "dt0": 0.1}
    solved = psn.solve(ensemble, algorithm, **steps, adjoint=psn.DirectAdjoint())
    torch.testing.assert_close(solved.u1, u0 * math.exp(-RATE), rtol=1e-3, atol=0)
    (slope,) = torch.autograd.grad(solved.u1.sum(), field.rate)
    assert slope.item() == pytest.approx(-3 * math.exp(-RATE), rel=1e-3)


@pytest.mark.parametrize("adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint()])
@pytest.mark.parametrize("where", ["drift", "diffusion"])
def test_stochastic_equations(adjoint: Any, where: str) -> None:
    """Of either part; the other one is plain. Compared with both of them plain."""
    found = []
    for inside in (True, False):
        decay = Decay()
        parts: dict[str, Callable[..., Tensor]] = dict.fromkeys(
            ("drift", "diffusion"), lambda t, u, decay=decay: -decay.rate * u
        )
        if inside:
            parts[where] = decay
        u0 = start()
        problem = psn.SDEProblem(parts["drift"], parts["diffusion"], u0, (0.0, 1.0))
        u1 = psn.solve(
            problem,
            psn.SRIW1(),
            dt0=0.05,
            controller=psn.FixedStep(),
            adjoint=adjoint,
            generator=torch.Generator().manual_seed(3),
        ).u1
        found.append((u1.detach(), *torch.autograd.grad(u1.sum(), (decay.rate, u0))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    "adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint(), psn.GaussAdjoint()]
)
def test_what_an_event_does_to_the_state(adjoint: Any) -> None:
    """At 0.5 the state is halved, by a derivative inside."""
    decay, u0 = Decay(), start()
    rate = decay.rate
    event = psn.Event(at=[0.5], affect=lambda t, u: decay.inside(u) / 2)
    problem = psn.ODEProblem(lambda t, u: -rate * u, u0, (0.0, 1.0))
    u1 = psn.solve(problem, events=[event], rtol=1e-8, atol=1e-8, adjoint=adjoint).u1
    expect_decay(2 * u1, rate, u0, 1e-6)


def test_the_time_of_an_event() -> None:
    """`exp(-rate t)` falls to a half at `log(2) / rate`; the condition sees it by a derivative."""
    decay = Decay()
    problem = psn.ODEProblem(lambda t, u: -decay.rate * u, torch.ones(1, dtype=D), (0.0, 5.0))
    event = psn.Event(lambda t, u: decay.inside(u).sum() - 0.5)
    for adjoint in (psn.DirectAdjoint(), psn.DiscreteAdjoint()):
        t = psn.solve(problem, events=[event], rtol=1e-9, atol=1e-9, adjoint=adjoint).event_t
        assert t is not None
        (slope,) = torch.autograd.grad(t, decay.rate)
        assert slope.item() == pytest.approx(-math.log(2) / RATE**2, rel=1e-6)


def test_a_graph_that_is_let_go_of_is_refused_where_the_solve_needs_it() -> None:
    problem = psn.ODEProblem(Decay(create_graph=False), start(), (0.0, 1.0))
    with pytest.raises(RuntimeError, match=r"retain_graph=True"):
        psn.solve(problem, adjoint=psn.DirectAdjoint())


@pytest.mark.parametrize("late", [0.0, 0.4])
@pytest.mark.parametrize("keeps", ["create_graph", "retain_graph", "neither"])
def test_steps_that_are_kept_stay_whole(late: float, keeps: str) -> None:
    """The derivative's graph may be let go of: then `rate` is a constant in it."""
    found = []
    for memory in (2**26, 0):
        field, u0 = Decay(late, **{keeps: True} if keeps != "neither" else {}), start()
        if keeps == "neither":
            field.keeps = {}
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        adjoint = psn.DiscreteAdjoint(memory=memory)
        u1 = psn.solve(problem, adjoint=adjoint, rtol=1e-6, atol=1e-6, engine="torch").u1
        assert u1.item() == pytest.approx(END, rel=1e-4)
        found.append(torch.autograd.grad(u1.sum(), (field.rate, u0)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=0)
