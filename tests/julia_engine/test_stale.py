"""Julia solves the field as it is now, and what it keeps between solves is no older than that."""

from __future__ import annotations

import array
import math
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.julia_engine import prepared

pytestmark = [pytest.mark.julia, pytest.mark.usefixtures("looks_in_both")]

D = torch.float64
Way = Callable[[], tuple[Any, Callable[[float], Any]]]


class Rate(nn.Module):
    """Decay at a rate that may be kept anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.k: Any = 1.0
        self.scale = nn.Parameter(torch.ones(1, dtype=D))
        self.hidden = types.SimpleNamespace(k=1.0)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * self.hidden.k * self.scale * u


def by_attribute() -> tuple[Any, Callable[[float], Any]]:
    f = Rate()
    return f, lambda k: setattr(f, "k", k)


def by_object_in_an_attribute() -> tuple[Any, Callable[[float], Any]]:
    f = Rate()
    return f, lambda k: setattr(f.hidden, "k", k)


def by_parameter_in_place() -> tuple[Any, Callable[[float], Any]]:
    f = Rate()
    return f, lambda k: f.scale.data.fill_(k)


def by_new_parameter() -> tuple[Any, Callable[[float], Any]]:
    f = Rate()
    return f, lambda k: setattr(f, "scale", nn.Parameter(torch.full((1,), k, dtype=D)))


def by_class() -> tuple[Any, Callable[[float], Any]]:
    class Faster(Rate):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return 2 * super().forward(t, u)

    f = Rate()
    return f, lambda k: setattr(f, "__class__", {1.0: Rate, 2.0: Faster}[k])


def by_hook() -> tuple[Any, Callable[[float], Any]]:
    f, hooks = Rate(), []

    def change(k: float) -> None:
        while hooks:
            hooks.pop().remove()
        if k != 1.0:
            hooks.append(f.register_forward_hook(lambda module, given, out: k * out))

    return f, change


def by_closure() -> tuple[Any, Callable[[float], Any]]:
    held = array.array("d", [1.0])
    return lambda t, u: -held[0] * u, lambda k: held.__setitem__(0, k)


WAYS = [value for name, value in sorted(globals().items()) if name.startswith("by_")]


def solved(f: Any) -> psn.Solution:
    problem = psn.ODEProblem(f, torch.ones(1, dtype=D), (0.0, 1.0))
    return psn.solve(problem, rtol=1e-9, atol=1e-9, engine="julia")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_has_changed_is_seen_by_the_next_solve(way: Way) -> None:
    """And by nothing of the solve before: its dense output stays that of its own field."""
    f, change = way()
    solved(f)
    before = solved(f)  # by now everything that can be kept is
    for k in (2.0, 1.0):
        change(k)
        after = solved(f)
        assert float(after.u1.detach()) == pytest.approx(math.exp(-k), rel=1e-7)
        assert float(after(0.5).detach()) == pytest.approx(math.exp(-k / 2), rel=1e-7)
        if way is not by_parameter_in_place:  # which is refused
            assert float(before(0.5).detach()) == pytest.approx(math.exp(-0.5), rel=1e-7)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_what_has_changed_is_seen_by_the_next_ensemble(way: Way) -> None:
    f, change = way()
    u0 = torch.tensor([[1.0], [2.0]], dtype=D)
    problem = psn.EnsembleProblem(psn.ODEProblem(f, u0[0], (0.0, 1.0)), u0)
    for k in (1.0, 2.0, 1.0):
        change(k)
        found = psn.solve(problem, rtol=1e-9, atol=1e-9, engine="julia")
        torch.testing.assert_close(found.u1.detach(), u0 * math.exp(-k), rtol=1e-7, atol=0)
        assert float(found[1](0.5).detach()) == pytest.approx(2 * math.exp(-k / 2), rel=1e-7)


def test_a_parameter_that_is_frozen_and_set_free_again() -> None:
    f = Rate()
    for free in (True, False, True):
        f.scale.requires_grad_(free)
        end = solved(f).u1
        assert end.requires_grad == free
        if free:
            (gradient,) = torch.autograd.grad(end, f.scale)
            assert float(gradient) == pytest.approx(-math.exp(-1), rel=1e-6)


k: Any = 0.0


def test_a_global_with_the_name_of_an_attribute_has_nothing_prepared_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    field, made = Rate(), []
    solved(field)  # of a first solve nothing is prepared
    make = prepared._prepare
    monkeypatch.setattr(prepared, "_prepare", lambda *how: made.append(how) or make(*how))
    for i in range(5):
        monkeypatch.setitem(globals(), "k", float(i))
        assert float(solved(field).u1.detach()) == pytest.approx(math.exp(-1), rel=1e-7)
    assert len(made) == 1
