"""Plain fields: what their code does and reads can be told from the names in it."""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, autograd, func, nn
from torch.autograd import grad as slope
from torch.nn import functional

import pysciml_node as psn
from pysciml_node.layers.timed import TimedField
from pysciml_node.steps.surroundings import Surroundings

D = torch.float64
WEIGHT = nn.Parameter(torch.full((3,), 0.7, dtype=D))


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = nn.Linear(3, 4, dtype=D), nn.Tanh(), nn.LayerNorm(4, dtype=D)
        self.net = nn.Sequential(*layers, nn.Linear(4, 3, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.sin(t) * self.net(u) - functional.softplus(u)


def inner(u: Tensor) -> Tensor:
    return torch.tanh(WEIGHT * u)


def energy(u: Tensor) -> Tensor:
    return (WEIGHT * u).square().sum()


PLAIN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a module": Plain(),
    "a function": lambda t, u: -WEIGHT * u,
    "a function of functions": lambda t, u: inner(u) + functional.relu(u),
    "a matrix": lambda t, u: torch.linspace(0, 1, 3, dtype=D) * torch.clamp(u, -1, 1),
}
KNOWN = {"slope": slope}


class Doubled(autograd.Function):
    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def forward(u: Tensor) -> Tensor:
        return 2 * u

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * cotangent


OTHERS: dict[str, Callable[..., Any]] = {
    "a function with a backward of its own": lambda t, u: Doubled.apply(u),  # type: ignore[no-untyped-call]
    "torch.autograd": lambda t, u: torch.autograd.grad(energy(u), u)[0],
    "its alias": lambda t, u: autograd.functional.vjp(energy, u)[1],
    "a function under another name": lambda t, u: slope(energy(u), u)[0],
    "the same in a dict": lambda t, u: KNOWN["slope"](energy(u), u)[0],
    "a part of it": partial(lambda take, t, u: take(energy(u), u)[0], slope),
    "backward": lambda t, u: energy(u).backward() or u,  # type: ignore[func-returns-value]
    "torch.func": lambda t, u: torch.func.vjp(energy, u)[0],
    "a module of torch under another name": lambda t, u: func.jacfwd(inner)(u).sum(0),
    "an attribute by a word": lambda t, u: getattr(energy(u), "back" + "ward")() or u,
    "a method by a word": lambda t, u: operator.methodcaller("x")(u),
    "code of words": lambda t, u: eval("WEIGHT") * u,
    "globals by words": lambda t, u: globals()["WEIGHT"] * u,
    "another solve": lambda t, u: psn.solve(psn.ODEProblem(inner, u, (0.0, 1.0))).u1,
}


@pytest.mark.parametrize("name", PLAIN)
def test_fields_that_are_plain(name: str) -> None:
    assert Surroundings({"f": PLAIN[name], "p": None}).plain


@pytest.mark.parametrize("name", OTHERS)
def test_fields_that_may_do_more_than_can_be_told(name: str) -> None:
    assert not Surroundings({"f": OTHERS[name], "p": None}).plain


def test_hooks_and_methods_that_are_reached_count_too() -> None:
    hooked = Plain()
    hooked.net[1].register_forward_hook(lambda m, x, out: out + slope(energy(x[0]), x[0])[0])
    assert not Surroundings({"f": hooked, "p": None}).plain

    class Hidden(Plain):
        def extra(self, u: Tensor) -> Tensor:
            return slope(energy(u), u)[0]

    assert not Surroundings({"f": Hidden(), "p": None}).plain


class Calls(type):
    def __call__(cls, u: Tensor) -> Tensor:
        return by_weight(u)


class Called(metaclass=Calls):
    pass


def by_weight(u: Tensor) -> Tensor:
    """`u cos(w u)`, as a derivative by the weight."""
    with torch.enable_grad():
        return slope(torch.sin(WEIGHT * u).sum(), WEIGHT, create_graph=True)[0]


def explicit(u: Tensor) -> Tensor:
    return u * torch.cos(WEIGHT * u)


class Marked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.inner(u)


HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a metaclass": lambda t, u: Called(u),  # type: ignore[call-arg, return-value]
    "a metaclass, later on": lambda t, u: Called(u) if t > 0.3 else explicit(u),  # type: ignore[call-arg, return-value]
    "a method put on tensors": lambda t, u: u.by_weight(),
    "a function put into torch": lambda t, u: torch.by_weight(u),
    "a hook of all modules": Marked(),
}


@pytest.mark.parametrize("adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint()])
@pytest.mark.parametrize("name", HIDDEN)
def test_derivatives_that_no_name_tells_of(
    name: str, adjoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are seen when they go back to the states before, and end at the state all the same."""
    monkeypatch.setattr(Tensor, "by_weight", by_weight, raising=False)
    monkeypatch.setattr(torch, "by_weight", by_weight, raising=False)

    def hook(module: nn.Module, given: Any, out: Any) -> Any:
        return by_weight(out) if isinstance(module, nn.Identity) else None

    found = []
    for field in (lambda t, u: explicit(u), HIDDEN[name]):
        handle = nn.modules.module.register_module_forward_hook(hook)
        u0 = torch.linspace(-1, 1, 3, dtype=D).requires_grad_()
        steps: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25, "engine": "torch"}
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        try:
            u1 = psn.solve(problem, psn.Euler(), adjoint=adjoint, **steps).u1
            gradients = torch.autograd.grad(u1.square().sum(), [u0, WEIGHT])
        finally:
            handle.remove()
        found.append((u1.detach(), *gradients))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


def test_a_field_that_has_turned_out_to_be_none_of_these_is_evaluated_again() -> None:
    u0 = torch.ones(3, dtype=D, requires_grad=True)
    steps: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25, "engine": "torch"}
    problem = psn.ODEProblem(HIDDEN["a metaclass, later on"], u0, (0.0, 1.0))
    solution = psn.solve(problem, psn.Euler(), **steps)
    solution.u1.sum().backward()
    assert solution.stats.nfe_backward == 2


@pytest.mark.parametrize("kind", ["ignore", "concat", "concatsquash"])
def test_the_fields_of_this_package_are_plain(kind: Any) -> None:
    field = TimedField.mlp(3, (5,), time=kind)
    assert Surroundings({"f": field, "p": None}).plain

    class Sloped(TimedField):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return slope(super().forward(t, u).sum(), u)[0]

    sloped = Sloped([*field.layers], torch.tanh)
    assert not Surroundings({"f": sloped, "p": None}).plain


@pytest.mark.parametrize("exact", [True, False])
def test_the_field_of_a_flow_is_plain(exact: bool) -> None:
    """Its rate is a derivative by the state, which is none by what that was computed from."""
    gradients, solved = [], list[Any]()
    for adjoint in (psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0), psn.DirectAdjoint()):
        torch.manual_seed(0)
        field = Plain()
        flow = psn.CNF(
            field,
            psn.DP5(),
            (0.0, 1.0),
            event_shape=3,
            exact=exact,
            adjoint=adjoint,
            rtol=1e-5,
            atol=1e-5,
        )
        flow.node.register_solve_hook(lambda layer, solution: solved.append(solution))
        x = torch.linspace(-1, 1, 12, dtype=D).reshape(4, 3).requires_grad_()
        flow.log_prob(x).sum().backward()
        assert solved[-1].stats.nfe_backward == 0 or adjoint == psn.DiscreteAdjoint(memory=0)
        gradients.append([y.grad for y in (x, *field.parameters())])
    for one, *others in zip(*gradients, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


LONG = (*range(5000), WEIGHT)
OBJECTS = np.empty(1, dtype=object)
OBJECTS[0] = WEIGHT
LAZY: Any = types.ModuleType("lazy")
LAZY.__getattr__ = lambda name: WEIGHT
OUT_OF_SIGHT: dict[str, Callable[..., Any]] = {
    "the end of a long tuple": lambda t, u: LONG[-1] * u,
    "an array of objects": lambda t, u: OBJECTS[0] * u,
    "what a module computes": lambda t, u: LAZY.weight * u,
    "a metaclass": lambda t, u: Called(u),  # type: ignore[call-arg]
}


@pytest.mark.parametrize("name", OUT_OF_SIGHT)
def test_fields_that_may_read_what_no_walk_meets(name: str) -> None:
    assert not Surroundings({"f": OUT_OF_SIGHT[name], "p": None}).plain


def test_a_plain_field_is_not_evaluated_again() -> None:
    """Every step is kept, and everything it has read has been compared."""
    fields = (PLAIN["a module"], 0), (lambda t, u: vars(torch)["tanh"](WEIGHT * u), 2)
    for field, nfe in fields:
        u0 = torch.ones(2, 3, dtype=D, requires_grad=True)
        solution = psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0)))
        solution.u1.sum().backward()
        assert solution.stats.nfe_backward == nfe
        assert solution.stats.nvjp > 0


def test_a_tensor_that_only_an_import_leads_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not known, and that it has changed is seen by evaluating the field again."""
    hidden: Any = types.ModuleType("hidden_numbers")
    hidden.factor = torch.full((3,), 2.0, dtype=D)
    monkeypatch.setitem(sys.modules, "hidden_numbers", hidden)

    def field(t: Tensor, u: Tensor) -> Tensor:
        import hidden_numbers  # type: ignore[import-not-found]

        return WEIGHT * torch.tanh(u * hidden_numbers.factor)

    solution = psn.solve(psn.ODEProblem(field, torch.ones(3, dtype=D), (0.0, 1.0)))
    hidden.factor.data.mul_(2)
    with pytest.raises(RuntimeError, match="could not reproduce the solve"):
        solution.u1.sum().backward()


# A place in torch, and a field that comes to what is put there; each `-u` times a factor.
PUT: dict[str, tuple[Any, str, Callable[[Tensor], Tensor]]] = {
    "a function": (torch, "sin", lambda u: torch.sin(u)),
    "one of a module inside": (torch.nn.functional, "silu", lambda u: torch.nn.functional.silu(u)),
    "one that a layer calls": (torch.nn.functional, "elu", nn.ELU()),
    "a method": (Tensor, "sin", lambda u: u.sin()),
    "the method of a layer": (nn.ELU, "forward", nn.ELU()),
}


@pytest.mark.parametrize(
    "adjoint", [psn.DirectAdjoint(), psn.DiscreteAdjoint(), psn.BacksolveAdjoint()]
)
@pytest.mark.parametrize("way", PUT)
def test_what_only_something_put_into_torch_reads_is_compared(
    way: str, adjoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`du/dt = -(a + x sin(pi t)^2) u`, so that `u1 = exp(-(a + x / 2))`; at the ends `x` is 0."""
    a, x = torch.tensor(0.5, dtype=D, requires_grad=True), torch.tensor(0.7, dtype=D)
    owner, name, function = PUT[way]
    monkeypatch.setattr(owner, name, lambda *given, **_: given[-1] * x)
    if owner is torch.nn.functional:
        monkeypatch.setattr(owner, name, lambda u, *_, **__: u * x)

    def within(t: Tensor) -> Tensor:
        return (1 - torch.cos(2 * torch.pi * t)) / 2

    problem = psn.ODEProblem(
        lambda t, u: -a * u - within(t) * function(u), torch.ones(1, dtype=D), (0.0, 1.0)
    )
    for _ in range(2):  # the second walk may be the first, looked at again
        u1 = psn.solve(problem, adjoint=adjoint, rtol=1e-5, atol=1e-5).u1.sum()
        (slope_of_a,) = torch.autograd.grad(u1, a, retain_graph=True)
        assert slope_of_a.item() == pytest.approx(-torch.exp(-a - x / 2).item(), rel=1e-4)
    x.data.fill_(3.0)
    with pytest.raises(RuntimeError, match=r"x has been changed in place|could not reproduce"):
        torch.autograd.grad(u1, a)


def test_what_is_put_into_torch_later_is_seen_by_the_next_walk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.sin(u) + u.cos()

    x = torch.ones(1)
    for owner, name in ((torch, "sin"), (Tensor, "cos")):
        assert not any(y is x for y in Surroundings({"f": field, "p": None}).tensors)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda u: u * x)
            assert any(y is x for y in Surroundings({"f": field, "p": None}).tensors)


class Reusing(Plain):
    """Writes into the memory of its last output at the next evaluation."""

    last: Tensor | None = None

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if self.last is not None:
            self.last.zero_()
        out = super().forward(t, u)
        self.last = out.detach()
        return out


class ReusingLater(Plain):
    """The same, by something that holds no tensor."""

    held: Any = None

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if self.held is not None:
            u.new_empty(0).set_(self.held, 0, (6,)).zero_()
        out = super().forward(t, u)
        self.held = out.untyped_storage()
        return out


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DirectAdjoint()])
@pytest.mark.parametrize("algorithm", [psn.Euler(), psn.RK4(), psn.Tsit5()])
def test_a_field_may_use_the_memory_of_its_output_again(algorithm: Any, adjoint: Any) -> None:
    found = []
    for kind in (Plain, Reusing, ReusingLater):
        torch.manual_seed(0)
        field, u0 = kind(), torch.linspace(-1, 1, 6, dtype=D).reshape(2, 3).requires_grad_()
        steps: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.25, "engine": "torch"}
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        u1 = psn.solve(problem, algorithm, adjoint=adjoint, **steps).u1
        gradients = torch.autograd.grad(u1.sum(), [u0, *field.parameters()])
        found.append((u1.detach(), *gradients))
    for one, *others in zip(*found, strict=True):
        for other in others:
            torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-14)
