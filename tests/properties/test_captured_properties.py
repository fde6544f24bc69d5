"""Random fields that reach their tensors in random ways: gradients against `DirectAdjoint`.

A field is a sum of terms. Each has a tensor of its own (a leaf or a computed one), kept in a random
place, and is used always or in one part of the interval alone.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pysciml_node as psn

D = torch.float64
STOPS = (0.3, 0.7)
ADJOINTS = {
    "discrete": psn.DiscreteAdjoint(),
    "interpolating": psn.InterpolatingAdjoint(),
    "backsolve": psn.BacksolveAdjoint(),
    "gauss": psn.GaussAdjoint(),
}
Term = Callable[[Tensor, Tensor, Any], Tensor]


class Holder(nn.Module):
    """Keeps a tensor as a parameter, a buffer, an attribute, or deeper down."""

    def __init__(self, x: Tensor, how: str) -> None:
        super().__init__()
        if how == "buffer":
            self.register_buffer("x", x)
        elif how == "nested":
            self.inner = nn.ModuleDict({"a": Holder(x, "attribute")})
        elif how == "containers":
            self.held = [{"a": (x, SimpleNamespace(x=x))}]
        else:
            self.x = x
        self.how = how

    def value(self) -> Tensor:
        if self.how == "nested":
            return self.inner["a"].value()
        found: Tensor = self.held[0]["a"][1].x if self.how == "containers" else self.x
        return found


def _of_holder(x: Tensor, how: str) -> Callable[[], Tensor]:
    return Holder(x, how).value


def _of_slots(x: Tensor) -> Callable[[], Tensor]:
    class Slots:
        __slots__ = ("x",)

        def get(self) -> Tensor:
            found: Tensor = self.x
            return found

    held = Slots()
    held.x = x
    return held.get


def _identity(x: Tensor) -> Tensor:
    return x


PLACES: dict[str, Callable[[Tensor], Callable[[], Tensor]]] = {
    "closure": lambda x: lambda: x,
    "closure of a closure": lambda x: lambda: (lambda: x)(),
    "partial": lambda x: functools.partial(_identity, x),
    "keyword": lambda x: functools.partial(_identity, x=x),
    "list": lambda x: (lambda held: lambda: held[0][0])([[x]]),
    "dict": lambda x: (lambda held: lambda: held["a"]["b"])({"a": {"b": x}}),
    "namespace": lambda x: (lambda held: lambda: held.a.b)(SimpleNamespace(a=SimpleNamespace(b=x))),
    "attribute": lambda x: _of_holder(x, "attribute"),
    "buffer": lambda x: _of_holder(x, "buffer"),
    "nested": lambda x: _of_holder(x, "nested"),
    "containers": lambda x: _of_holder(x, "containers"),
    "slots": _of_slots,
}
SHAPES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "rate": lambda t, u, x: -x * u,
    "force": lambda t, u, x: x * torch.cos(3 * t) + 0 * u,
    "inside": lambda t, u, x: torch.tanh(x * u),
    "own leaf": lambda t, u, x: x * u * torch.cos(t.detach().clone().requires_grad_()),
}
DESCRIPTIONS = st.lists(
    st.tuples(
        st.sampled_from([*PLACES]),
        st.sampled_from([*SHAPES]),
        st.booleans(),  # computed by something else
        st.sampled_from([None, 0, 1, 2]),  # the one part of the interval in which it is used
        st.booleans(),  # has a hook
    ),
    min_size=1,
    max_size=4,
)


def build(descriptions: list[Any]) -> tuple[list[Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """The sources, and a field of what is made of them."""
    sources, terms = [], []
    for i, (place, shape, computed, part, hooked) in enumerate(descriptions):
        source = torch.tensor([0.5 + 0.2 * i, 0.9 - 0.1 * i], dtype=D, requires_grad=True)
        sources.append(source)
        x = torch.sin(source) * 1.3 if computed else source
        if hooked:
            x.register_hook(lambda g: 3 * g)
        terms.append((PLACES[place](x), SHAPES[shape], part))

    def field(t: Tensor, u: Tensor) -> Tensor:
        now = sum(float(t.detach()) > stop for stop in STOPS)
        total = -0.1 * u
        for get, shape, part in terms:
            if part is None or part == now:
                total = total + shape(t, u, get())
        return total

    return sources, field


def gradients(descriptions: list[Any], adjoint: Any) -> tuple[Tensor, ...]:
    sources, field = build(descriptions)
    u0 = torch.tensor([0.4, -0.7], dtype=D, requires_grad=True)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    options: dict[str, Any] = {"rtol": 1e-8, "atol": 1e-8, "tstops": STOPS, "saveat": [0.5, 1.0]}
    solution = psn.solve(problem, adjoint=adjoint, **options)
    loss = (solution.u * torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=D)).sum()
    loss.backward()
    return tuple(torch.zeros_like(x) if x.grad is None else x.grad for x in (u0, *sources))


@pytest.mark.parametrize("adjoint", ADJOINTS.values(), ids=ADJOINTS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(descriptions=DESCRIPTIONS)
def test_gradients_are_those_of_autograd(adjoint: Any, descriptions: list[Any]) -> None:
    gc.collect()
    found, right = gradients(descriptions, adjoint), gradients(descriptions, psn.DirectAdjoint())
    exact = isinstance(adjoint, psn.DiscreteAdjoint)
    torch.testing.assert_close(
        found, right, rtol=1e-9 if exact else 1e-5, atol=1e-9 if exact else 1e-6
    )
