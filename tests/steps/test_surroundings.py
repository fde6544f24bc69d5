"""A replay sees what the solve saw, or says that it cannot."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.steps.surroundings import Surroundings

D = torch.float64
TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
ADJOINTS = {
    "discrete": psn.DiscreteAdjoint(),
    "direct": psn.DirectAdjoint(),
    "interpolating": psn.InterpolatingAdjoint(),
    "backsolve": psn.BacksolveAdjoint(),
    "gauss": psn.GaussAdjoint(),
}
any_adjoint = pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
any_replay = pytest.mark.parametrize(
    "adjoint",
    [x for n, x in ADJOINTS.items() if n != "direct"],
    ids=[*ADJOINTS][:1] + [*ADJOINTS][2:],
)


class Scaled(nn.Module):
    """`u' = -k g u`, with `g` kept in a way of the test's choice."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=D))
        self.way = way
        self.plain: Any = None
        self.listed: list[Any] = []
        self.keyed: dict[str, Any] = {}
        self.inner = SimpleNamespace(g=None)
        self.register_buffer("buffer", torch.tensor(0.0, dtype=D))

    def set(self, g: Any) -> None:
        if self.way == "attribute":
            self.plain = g
        elif self.way == "list":
            self.listed[:] = [g]
        elif self.way == "longer list":
            self.listed.append(g - sum(self.listed))
        elif self.way == "dict":
            self.keyed["g"] = g
        elif self.way == "new key":
            self.keyed[f"g{len(self.keyed)}"] = g - sum(self.keyed.values())
        elif self.way == "object":
            self.inner.g = g
        elif self.way == "tuple":
            self.plain = (g, "name")
        elif self.way == "buffer":
            self.buffer = torch.as_tensor(g, dtype=D)

    def get(self) -> Any:
        if self.way == "attribute":
            return self.plain
        if self.way in ("list", "longer list"):
            return sum(self.listed)
        if self.way in ("dict", "new key"):
            return sum(self.keyed.values())
        if self.way == "object":
            return self.inner.g
        return self.plain[0] if self.way == "tuple" else self.buffer

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * self.get() * u


WAYS = ("attribute", "list", "longer list", "dict", "new key", "object", "tuple", "buffer")


def decay_gradient(g: float) -> float:
    """`d/dk exp(-k g)` at `k = 1`."""
    return -g * math.exp(-g)


@pytest.mark.parametrize(
    ("adjoint", "way", "kind"),
    [
        pytest.param(adjoint, way, kind, id=f"{name}-{way}-{kind}")
        for name, adjoint in ADJOINTS.items()
        for way in (WAYS if name == "discrete" else WAYS[:1])
        for kind in ("number", "constant", "computed")
        if (way, kind) != ("buffer", "number")
    ],
)
def test_a_context_set_between_two_solves(
    adjoint: psn.DiscreteAdjoint, way: str, kind: str
) -> None:
    """Both solves are in one loss: each gets the gradient of its own context."""
    field = Scaled(way)
    node = psn.NeuralODE(field, adjoint=adjoint, **TIGHT)
    u0, e = torch.ones(1, dtype=D), torch.tensor([0.5], dtype=D, requires_grad=True)
    make: Callable[[float], Any] = {
        "number": lambda x: 0.5 * x,
        "constant": lambda x: e.detach() * x,
        "computed": lambda x: e * x,
    }[kind]
    first, second = make(1.0), make(3.0)
    field.set(first)
    x = node(u0)
    field.set(second)
    y = node(u0)
    (x.u1 - y.u1).sum().backward()
    assert field.k.grad is not None
    right = decay_gradient(0.5) - decay_gradient(1.5)
    assert field.k.grad.item() == pytest.approx(right, rel=1e-6)
    if kind == "computed":
        assert e.grad is not None
        assert e.grad.item() == pytest.approx(right * 2, rel=1e-6)
    # Everything stands where its owner has put it, and the first solution is still the first.
    torch.testing.assert_close(
        torch.as_tensor(field.get()).detach(), torch.as_tensor(second).detach()
    )
    with torch.no_grad():
        middle = x(torch.tensor(0.3, dtype=D))
    assert middle.item() == pytest.approx(math.exp(-0.15), rel=1e-6)
    slopes = x.trajectory.stiffness()
    assert slopes.max().item() == pytest.approx(0.5, rel=0.1)


@any_replay
@pytest.mark.parametrize("way", ["p", "closure", "buffer"])
def test_constants_changed_in_place_are_noticed(adjoint: psn.DiscreteAdjoint, way: str) -> None:
    w, c = torch.tensor(2.0, dtype=D, requires_grad=True), torch.tensor(1.0, dtype=D)
    module = nn.Module()
    module.register_buffer("c", c)
    field, p, name = {
        "p": (lambda t, u, p: -p["w"] * p["c"] * u, {"w": w, "c": c}, r"p\['c'\]"),
        "closure": (lambda t, u: -w * c * u, None, "c"),
        "buffer": (lambda t, u: -w * module.c * u, None, r"module\.c"),
    }[way]
    problem = psn.ODEProblem(field, torch.tensor([1.0, 0.5], dtype=D), (0.0, 1.0), p=p)
    solution = psn.solve(problem, adjoint=adjoint)
    c.mul_(3.0)
    with pytest.raises(RuntimeError, match=rf"^{name} has been changed in place(.|\n)*\n  "):
        solution.u1.sum().backward()


def test_constants_that_the_field_does_not_use_may_change() -> None:
    """A network trained beside the field, and its statistics."""
    w = torch.tensor(2.0, dtype=D, requires_grad=True)

    class Both:
        def __init__(self) -> None:
            self.critic = nn.BatchNorm1d(2).double()
            self.w = w

        def field(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.w * u

    both = Both()
    solution = psn.solve(psn.ODEProblem(both.field, torch.ones(1, dtype=D), (0.0, 1.0)), **TIGHT)
    both.critic(torch.randn(5, 2, dtype=D, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        both.critic.weight.mul_(2)
    solution.u1.sum().backward()
    assert w.grad is not None
    assert w.grad.item() == pytest.approx(-math.exp(-2), rel=1e-6)


@any_adjoint
def test_statistics_that_the_field_does_not_use_are_left_by_dense_output(
    adjoint: psn.DiscreteAdjoint,
) -> None:
    """Putting them back behind a replay is no change, which a later sweep would refuse."""
    model = nn.ModuleDict({"field": nn.Linear(1, 1, bias=False), "norm": nn.BatchNorm1d(2)}).to(D)
    weight = model["field"].weight
    problem = psn.ODEProblem(lambda t, u: model["field"](u), torch.ones(1, dtype=D), (0.0, 1.0))
    solution = psn.solve(problem, adjoint=adjoint, **TIGHT)
    half = solution(0.5)
    (found,) = torch.autograd.grad(solution.u1.sum(), weight)
    w = weight.item()
    assert half.item() == pytest.approx(math.exp(w / 2), rel=1e-6)
    assert found.item() == pytest.approx(math.exp(w), rel=1e-6)


@any_adjoint
def test_training_and_evaluation_mode(adjoint: psn.DiscreteAdjoint) -> None:
    """The mode of the solve is that of its replay; running statistics are updated once."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)).double()
    u0 = torch.randn(5, 2, dtype=D)

    def run(adjoint: psn.DiscreteAdjoint) -> tuple[tuple[Tensor, ...], list[Tensor], psn.Stats]:
        net.train()
        net[1].reset_running_stats()
        problem = psn.ODEProblem(lambda t, u: torch.tanh(net(u)), u0, (0.0, 1.0))
        solution = psn.solve(problem, adjoint=adjoint, **TIGHT)
        net.eval()
        found = torch.autograd.grad(solution.u1[:, 0].square().sum(), list(net.parameters()))
        assert not net[1].training
        return found, [x.clone() for x in net.buffers()], solution.stats

    found, statistics, stats = run(adjoint)
    right, right_statistics, _ = run(psn.DirectAdjoint())
    torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-8)
    assert statistics[2].item() == stats.nfe
    torch.testing.assert_close(statistics, right_statistics)


@any_adjoint
@pytest.mark.parametrize("recorded", [True, False])
def test_random_fields_are_refused_by_name(adjoint: psn.DiscreteAdjoint, recorded: bool) -> None:
    net = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    problem = psn.ODEProblem(lambda t, u: net(u), torch.ones(3, 1, dtype=D), (0.0, 1.0))
    with torch.set_grad_enabled(recorded):
        with pytest.raises(ValueError, match=r"random numbers \(net\.1: Dropout\)(.|\n)*eval\(\)"):
            psn.solve(problem, adjoint=adjoint)
        # With steps that need each evaluation once it runs.
        if not recorded or isinstance(adjoint, psn.DirectAdjoint):
            fixed = psn.solve(
                problem, psn.Euler(), controller=psn.FixedStep(), dt0=0.1, adjoint=adjoint
            )
            assert fixed.retcode.successful
        net.eval()
        assert psn.solve(problem, adjoint=adjoint).retcode.successful


@any_replay
def test_generators_of_the_fields_own_are_watched(adjoint: psn.DiscreteAdjoint) -> None:
    generator = torch.Generator().manual_seed(0)
    k = torch.tensor(1.0, dtype=D, requires_grad=True)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return -k * u + torch.randn(u.shape, dtype=D, generator=generator)

    with pytest.raises(ValueError, match="draws random numbers"):
        psn.solve(psn.ODEProblem(field, torch.ones(3, dtype=D), (0.0, 1.0)), adjoint=adjoint)


def test_fields_that_draw_and_do_not_use_it_run() -> None:
    k = torch.tensor(1.0, dtype=D, requires_grad=True)

    def field(t: Tensor, u: Tensor) -> Tensor:
        torch.rand(())
        return -k * u

    u1 = psn.solve(psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0)), **TIGHT).u1
    (found,) = torch.autograd.grad(u1, k)
    assert found.item() == pytest.approx(-math.exp(-1), rel=1e-6)


def test_replays_that_do_not_come_out_again_are_refused() -> None:
    """A field with a memory, which no look at its surroundings can tell from a counter."""
    k = torch.tensor(1.0, dtype=D, requires_grad=True)

    class Tired:
        calls = 0

        def __call__(self, t: Tensor, u: Tensor) -> Tensor:
            self.calls += 1
            return -k * u / (1 + 1e-3 * self.calls)

    fixed: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.1}
    solution = psn.solve(psn.ODEProblem(Tired(), torch.ones(1, dtype=D), (0.0, 1.0)), **fixed)
    with pytest.raises(RuntimeError, match=r"could not reproduce the solve(.|\n)*\n  "):
        solution.u1.backward()


def test_places_are_put_back_when_the_sweep_fails() -> None:
    field = Scaled("attribute")
    e = torch.tensor([0.5], dtype=D, requires_grad=True)
    field.set(e * 1)
    problem = psn.ODEProblem(lambda t, u: field(t, u) + hook(u), torch.ones(1, dtype=D), (0.0, 1.0))
    hidden = threading.local()
    hidden.failing = False

    def hook(u: Tensor) -> Tensor:
        if hidden.failing:
            raise KeyError("mine")
        return 0 * u

    solution = psn.solve(problem)
    now = e * 3
    field.set(now)
    hidden.failing = True
    with pytest.raises(KeyError, match="mine"):
        solution.u1.backward()
    assert field.plain is now


def test_what_is_found_and_how_it_is_called() -> None:
    weight = torch.ones(1)
    module = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    found = Surroundings({"f": lambda t, u: module(u) * weight, "p": {"a": [torch.ones(2)]}})
    assert set(found.names.values()) == {
        *("weight", "p['a'][0]"),
        *(f"module.{i}.{name}" for i in (0, 1) for name in ("weight", "bias")),
    }


def test_assertions_lead_nowhere() -> None:
    """pytest has them look at what it knows of all tests, by globals of the module."""
    weight = torch.ones(1)

    def field(t: Tensor, u: Tensor) -> Tensor:
        assert u.shape == (1,), "of one entry"
        return u * weight

    found = Surroundings({"f": field})
    assert set(found.names.values()) == {"weight"}
    assert len(found._places) < 10


@any_adjoint
@pytest.mark.parametrize("kept", ["solution", "state", "list", "tuple"])
def test_solutions_kept_by_the_field_do_not_pile_up(
    adjoint: psn.DiscreteAdjoint, kept: str
) -> None:
    """What a solve remembers of an attribute must not hold the solve before it."""
    field = Remembering()
    found = []
    for _ in range(6):
        problem = psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0))
        solution = psn.solve(problem, adjoint=adjoint)
        solution.u1.sum().backward()
        field.last = {
            "solution": solution,
            "state": solution.u1,
            "list": [solution, solution.u1],
            "tuple": (solution.u1, solution),
        }[kept]
        found.append(weakref.ref(solution.trajectory))
    del solution
    gc.collect()
    assert sum(reference() is not None for reference in found) <= 1


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(1.0, dtype=D))
        self.last: Any = None

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * u


@any_adjoint
def test_dense_output_after_a_step_of_the_optimizer_is_refused(
    adjoint: psn.DiscreteAdjoint,
) -> None:
    """States of one field and stages of another make no interpolant."""
    field = Remembering()
    unused = nn.Parameter(torch.ones(1))
    field.beside = unused
    solution = psn.solve(psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0)), adjoint=adjoint)
    middle, times = solution(torch.tensor(0.3, dtype=D)), solution.t
    with torch.no_grad():
        unused.mul_(2)
        torch.testing.assert_close(solution(torch.tensor(0.3, dtype=D)), middle)
        field.k.mul_(2)
        for look in (
            lambda: solution(torch.tensor(0.3, dtype=D)),
            solution.trajectory.stiffness,
        ):
            with pytest.raises(RuntimeError, match=r"has been changed in place"):
                look()
        # What was stored needs no field.
        torch.testing.assert_close(solution(times), solution.u)


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize("adjoint", [ADJOINTS["discrete"], ADJOINTS["direct"]])
def test_estimates_after_a_step_of_the_optimizer_are_refused(
    adjoint: psn.DiscreteAdjoint, recorded: bool
) -> None:
    field = Remembering()
    solution = psn.solve(psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0)), adjoint=adjoint)
    with torch.no_grad():
        field.k.mul_(2)
    with torch.set_grad_enabled(recorded):
        for look in (solution.step_estimates, lambda: solution.local_estimate(0.3)):
            with pytest.raises(RuntimeError, match=r"has been changed in place"):
                look()


@pytest.mark.parametrize(
    "adjoint",
    [
        psn.DiscreteAdjoint(),
        psn.InterpolatingAdjoint(),
        psn.GaussAdjoint(),
        psn.BacksolveAdjoint(),
    ],
    ids=lambda adjoint: type(adjoint).__name__,
)
def test_a_change_that_torch_does_not_count_is_noticed(adjoint: Any) -> None:
    """Assignments to `.data` leave a parameter's version alone."""
    linear = nn.Linear(2, 2).double()
    problem = psn.ODEProblem(lambda t, u: linear(u), torch.ones(2).double(), (0.0, 1.0))
    solution = psn.solve(problem, adjoint=adjoint)
    linear.weight.data = linear.weight.data * 2
    # Where steps are replayed they are compared, and else what the field can reach.
    message = (
        "could not reproduce the solve" if adjoint.discrete else "linear.weight has been changed"
    )
    with pytest.raises(RuntimeError, match=rf"{message}(.|\n)*\n  "):
        solution.u1.sum().backward()
