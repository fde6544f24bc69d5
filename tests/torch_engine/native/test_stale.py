"""Native code is that of the field as it is now, wherever the field keeps its numbers."""

from __future__ import annotations

import argparse
import array
import collections
import contextvars
import dataclasses
import functools
import math
import os
import string
import sys
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.usefixtures("looks_in_both")

D = torch.float64


class Holder:
    """A plain object that can be referred to weakly."""

    k = 1.0


def end(f: Callable[..., Any], compile: Any = True) -> float:
    problem = psn.ODEProblem(f, torch.ones(1, dtype=D), (0.0, 1.0))
    return float(psn.solve(problem, rtol=1e-9, atol=1e-9, compile=compile).u1.detach())


def by_namespace() -> tuple[Callable[..., Any], Callable[[float], None]]:
    args = argparse.Namespace(k=1.0)
    return lambda t, u: -args.k * u, lambda k: setattr(args, "k", k)


def by_user_dict() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held = collections.UserDict(k=1.0)
    return lambda t, u: -held["k"] * u, lambda k: held.update(k=k)


def by_chain_map() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held: Any = collections.ChainMap({}, {"k": 1.0})
    return lambda t, u: -held["k"] * u, lambda k: held.update(k=k)


def by_context_variable() -> tuple[Callable[..., Any], Callable[[float], Any]]:
    held: contextvars.ContextVar[float] = contextvars.ContextVar("k", default=1.0)
    held.set(1.0)
    return lambda t, u: -held.get() * u, held.set


def by_weak_reference() -> tuple[Callable[..., Any], Callable[[float], None]]:
    holder = Holder()
    reference = weakref.ref(holder)
    return lambda t, u: -reference().k * u, lambda k: setattr(holder, "k", k)  # type: ignore[union-attr]


def by_class_of_an_object() -> tuple[Callable[..., Any], Callable[[float], None]]:
    holder = Holder()
    return lambda t, u: -holder.k * u, lambda k: setattr(
        holder, "__class__", type("Other", (Holder,), {"k": k})
    )


def by_array() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held = array.array("d", [1.0])
    return lambda t, u: -held[0] * u, lambda k: held.__setitem__(0, k)


def by_bytearray() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held = bytearray([10])
    return lambda t, u: -held[0] / 10 * u, lambda k: held.__setitem__(0, round(10 * k))


def by_list_of_a_tensor() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held = torch.ones(1, dtype=D)
    return lambda t, u: -held.tolist()[0] * u, lambda k: held.fill_(k) and None


def by_list_of_a_tensor_used_too() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held = torch.ones(1, dtype=D)
    # Operations read one half of k, and Python the other.
    return (
        lambda t, u: -(held + held.tolist()[0]) / 2 * u,
        lambda k: held.fill_(k) and None,
    )


def by_function_attribute() -> tuple[Callable[..., Any], Callable[[float], None]]:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -f.k * u  # type: ignore[attr-defined]

    f.k = 1.0  # type: ignore[attr-defined]
    return f, lambda k: setattr(f, "k", k)


def by_module_in_a_closure() -> tuple[Callable[..., Any], Callable[[float], None]]:
    config: Any = types.ModuleType("users_config")
    config.K = 1.0
    return lambda t, u: -config.K * u, lambda k: setattr(config, "K", k)


def by_import_inside() -> tuple[Callable[..., Any], Callable[[float], None]]:
    config: Any = types.ModuleType("users_other_config")
    config.K = 1.0
    sys.modules["users_other_config"] = config

    def f(t: Tensor, u: Tensor) -> Tensor:
        import users_other_config as other  # type: ignore[import-not-found]

        return -other.K * u

    return f, lambda k: setattr(config, "K", k)


def by_late_global() -> tuple[Callable[..., Any], Callable[[float], None]]:
    def f(t: Tensor, u: Tensor) -> Tensor:
        return -(LATE if "LATE" in globals() else 1.0) * u  # type: ignore[name-defined] # noqa: F821

    return f, lambda k: globals().update(LATE=k)


def by_words() -> tuple[Callable[..., Any], Callable[[float], None]]:
    globals()["SPOKEN"] = 1.0
    # By its parts, so that no code names it.
    return lambda t, u: -globals()["SPO" + "KEN"] * u, lambda k: globals().update(SPOKEN=k)


def by_environment() -> tuple[Callable[..., Any], Callable[[float], None]]:
    def change(k: float) -> None:
        os.environ["PSN_TEST_RATE"] = str(k)

    change(1.0)
    return lambda t, u: -float(os.environ["PSN_TEST_RATE"]) * u, change


def by_what_a_function_keeps() -> tuple[Callable[..., Any], Callable[[float], None]]:
    rates = {"k": 1.0}
    kept = functools.cache(lambda: rates["k"])

    def change(k: float) -> None:
        rates["k"] = k
        # Until its memory is cleared it gives the old one.
        end(f)
        kept.cache_clear()

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -kept() * u

    return f, change


class Config(dict):  # type: ignore[type-arg]
    """A dict with an attribute."""

    k = 1.0


class Series(list):  # type: ignore[type-arg]
    """A list with a slot."""

    __slots__ = ("k",)


def by_attribute_of_a_dict() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held = Config(beside=3.0)
    return lambda t, u: -held.k * u, lambda k: setattr(held, "k", k)


def by_slot_of_a_list() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held = Series([3.0])
    held.k = 1.0
    return lambda t, u: -held.k * u, lambda k: setattr(held, "k", k)


def by_slot_of_a_module() -> tuple[Callable[..., Any], Callable[[float], None]]:
    class Slotted(nn.Module):
        __slots__ = ("k",)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.k * u

    f = Slotted()
    f.k = 1.0
    return f, lambda k: setattr(f, "k", k)


def by_tensor_attribute() -> tuple[Callable[..., Any], Callable[[float], None]]:
    w: Any = torch.ones(1, dtype=D)
    w.alpha = 1.0
    return lambda t, u: -w.alpha * w * u, lambda k: setattr(w, "alpha", k)


class Meta(type):
    """A class of classes that holds a number."""

    k = 1.0


def by_metaclass() -> tuple[Callable[..., Any], Callable[[float], None]]:
    class Held(metaclass=Meta):
        pass

    return lambda t, u: -Held.k * u, lambda k: setattr(Meta, "k", k)


def by_closure_of_a_librarys_function() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held = [1.0]

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -held[0] * u

    f.__module__ = "torch.users"
    return f, lambda k: held.__setitem__(0, k)


def by_object_of_a_library() -> tuple[Callable[..., Any], Callable[[float], None]]:
    held: Any = string.Template("")
    held.k = 1.0
    return lambda t, u: -held.k * u, lambda k: setattr(held, "k", k)


# Whether looking at these changes them is not known.
SEALED = [by_object_of_a_library, by_late_global, by_words]
WAYS = [value for name, value in sorted(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_number_that_has_changed_is_seen(way: Any) -> None:
    f, change = way()
    assert end(f) == pytest.approx(math.exp(-1), rel=1e-6)
    change(2.0)
    assert end(f) == pytest.approx(math.exp(-2), rel=1e-6)
    change(1.0)
    assert end(f) == pytest.approx(math.exp(-1), rel=1e-6)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_number_of_a_condition_that_has_changed_is_seen(way: Any) -> None:
    f, change = way()
    # `u = 1 - t` meets `1 / (2 k)`.
    problem = psn.ODEProblem(lambda t, u: 0 * u - 1, torch.ones(1, dtype=D), (0.0, 1.0))
    event = psn.Event(lambda t, u: f(t, u) + 0.5)

    def expect(k: float) -> None:
        time = psn.solve(problem, events=event, compile=True).event_t
        assert float(time) == pytest.approx(1 - 0.5 / k, abs=1e-12)

    if way in SEALED:
        with pytest.raises(psn.CompileError, match="may change Python's objects"):
            expect(1.0)
        return
    expect(1.0)
    change(2.0)
    expect(2.0)
    change(1.0)
    expect(1.0)


def test_what_an_effect_changes_is_seen_by_the_condition() -> None:
    levels = [0.8, 0.5, 0.1]

    def next_level(t: Tensor, u: Tensor) -> Tensor:
        levels.pop(0)
        return u

    problem = psn.ODEProblem(lambda t, u: 0 * u - 1, torch.ones(1, dtype=D), (0.0, 0.7))
    event = psn.Event(lambda t, u: u[0] - levels[0], direction=-1, affect=next_level)
    found = psn.solve(problem, events=event, compile=True)
    assert [float(jump.t) for jump in found.jumps] == pytest.approx([0.2, 0.5], abs=1e-12)


def test_a_field_whose_class_is_exchanged() -> None:
    class Decay(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -u

    class Growth(Decay):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return u

    f = Decay()
    for _ in range(3):  # the later ones find what the first has prepared
        assert end(f) == pytest.approx(math.exp(-1), rel=1e-7)
    f.__class__ = Growth
    assert end(f) == pytest.approx(math.e, rel=1e-7)


def test_a_field_that_reads_whether_its_parameters_are_frozen() -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (nn.Parameter(torch.ones(1, dtype=D)) for _ in range(2))

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -u * sum(x for x in (self.a, self.b) if x.requires_grad)

    f = Field()
    assert end(f) == pytest.approx(math.exp(-2), rel=1e-7)
    f.b.requires_grad_(False)
    assert end(f) == pytest.approx(math.exp(-1), rel=1e-7)
    f.b.requires_grad_(True)
    assert end(f) == pytest.approx(math.exp(-2), rel=1e-7)


@pytest.mark.parametrize("compile", [True, False])
def test_a_parameter_that_the_field_does_not_read_gets_no_gradient(compile: bool) -> None:
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.beside = (nn.Parameter(torch.ones(1, dtype=D)) for _ in range(2))

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.k * u

    f = Field()
    problem = psn.ODEProblem(f, torch.ones(1, dtype=D), (0.0, 1.0))
    psn.solve(problem, rtol=1e-9, atol=1e-9, compile=compile).u1.sum().backward()
    assert f.k.grad is not None
    assert float(f.k.grad) == pytest.approx(-math.exp(-1), rel=1e-6)
    assert f.beside.grad is None


@pytest.mark.parametrize("compile", [True, False])
def test_what_no_member_reads_gets_no_gradient(compile: bool) -> None:
    k, beside = (torch.ones(2, dtype=D, requires_grad=True) for _ in range(2))
    one = {"k": k[0].detach(), "beside": beside[0].detach()}
    problem = psn.ODEProblem(lambda t, u, p: -p["k"] * u, torch.ones(1, dtype=D), (0.0, 1.0), p=one)
    members = psn.EnsembleProblem(problem, p={"k": k, "beside": beside})
    solution = psn.solve(members, rtol=1e-9, atol=1e-9, compile=compile)
    sum(member.u1.sum() for member in solution).backward()
    assert k.grad is not None
    assert k.grad.tolist() == pytest.approx([-math.exp(-1)] * 2, rel=1e-6)
    assert beside.grad is None


def test_a_field_that_asks_whether_gradients_are_recorded_is_refused() -> None:
    def field(t: Tensor, u: Tensor) -> Tensor:
        return -u if torch.is_grad_enabled() else -2 * u

    with pytest.raises(psn.CompileError, match="asks whether gradients are recorded"):
        end(field)


def test_a_field_that_reads_the_gradients_of_its_parameters_is_refused() -> None:
    rate = torch.ones(1, dtype=D, requires_grad=True)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return -rate * u if rate.grad is None else -2 * rate * u

    with pytest.raises(psn.CompileError, match="reads the gradients of tensors"):
        end(field)


def test_a_field_may_have_a_part_that_is_called_grad() -> None:
    class Descent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grad = nn.Linear(1, 1, bias=False, dtype=D)
            nn.init.ones_(self.grad.weight)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            out: Tensor = -self.grad(u)
            return out

    assert end(Descent()) == pytest.approx(math.exp(-1), rel=1e-7)


@pytest.mark.parametrize("transform", ["grad", "jvp", "vjp", "jacrev", "jacfwd"])
def test_transforms_of_torch_func_are_translated_and_leave_torch_as_it_was(transform: str) -> None:
    weight = torch.eye(3, dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        if transform == "jvp":
            return torch.func.jvp(lambda x: -x @ weight, (u,), (u,))[1]
        if transform == "vjp":
            return torch.func.vjp(lambda x: -x @ weight, u)[1](u)[0]
        if transform in ("jacrev", "jacfwd"):
            return getattr(torch.func, transform)(lambda x: -x @ weight)(u) @ u
        return torch.func.grad(lambda x: -(x @ weight).square().sum() / 2)(u)

    problem = psn.ODEProblem(field, torch.ones(3, dtype=D), (0.0, 1.0))
    solution = psn.solve(problem, psn.Tsit5(), rtol=1e-8, atol=1e-8, compile=True)
    torch.testing.assert_close(solution.u1, torch.full((3,), math.exp(-1), dtype=D))
    # A transform that has begun and not ended would forbid this.
    assert torch.zeros(1).requires_grad_().requires_grad


class Turned(nn.Module):
    """A field of the state alone."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(2, 2, dtype=D)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.net(u))
        return out


def test_parameters_that_functional_call_lends_are_used_and_trained() -> None:
    field, found = Turned(), []
    lent = {f"field.{n}": (2 * x).detach().requires_grad_() for n, x in field.named_parameters()}
    for compile in (True, False):
        node = psn.NeuralODE(field, psn.Tsit5(), compile=compile)
        end = torch.func.functional_call(node, lent, (torch.ones(3, 2, dtype=D),)).u1
        found.append((end.detach(), *torch.autograd.grad(end.square().sum(), list(lent.values()))))
    for native, eager in zip(*found, strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("needs_gradient", [False, True])
@pytest.mark.parametrize("size", [3, 8, 20])
def test_a_square_tensor_and_its_transpose_in_one_field(size: int, needs_gradient: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(size, size, dtype=D).div(size).requires_grad_(needs_gradient)
    u0 = torch.randn(2, size, dtype=D, requires_grad=True)
    fields: list[Callable[..., Any]] = [
        lambda t, u: torch.tanh(u @ matrix) @ matrix.T - u,
        lambda t, u: u @ matrix - u @ matrix.T,
        lambda t, u: (u @ matrix) @ matrix.T,
    ]
    inputs = [u0, matrix] if needs_gradient else [u0]
    for f in fields:
        found = []
        for compile in (True, False):
            solution = psn.solve(psn.ODEProblem(f, u0, (0.0, 0.5)), compile=compile)
            gradients = torch.autograd.grad(solution.u1.square().sum(), inputs)
            found.append((solution.u1.detach(), *gradients))
        torch.testing.assert_close(found[0], found[1], rtol=1e-10, atol=1e-12)


def test_fields_that_compare_equal_or_have_slots() -> None:
    @dataclasses.dataclass
    class Equal:
        k: float

        def __call__(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.k * u

    class Slotted:
        __slots__ = ("k",)

        def __call__(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.k * u

    slotted: Any = Slotted()
    for f in (Equal(1.0), slotted):
        f.k = 1.0
        assert end(f, "auto") == pytest.approx(math.exp(-1), rel=1e-6)
        f.k = 2.0
        assert end(f, "auto") == pytest.approx(math.exp(-2), rel=1e-6)


def test_constants_that_a_field_makes_at_its_first_call() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2).double()
            self.eye: Tensor | None = None

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            if self.eye is None:
                self.eye = torch.eye(2, dtype=D)
            return self.layer(u) @ self.eye

    field = Lazy()
    problem = psn.ODEProblem(field, torch.ones(3, 2, dtype=D), (0.0, 1.0))
    first = psn.solve(problem, compile="auto").u1
    torch.testing.assert_close(first, psn.solve(problem).u1, rtol=1e-8, atol=1e-10)


def test_threads_translate_one_after_the_other() -> None:
    """And leave what is printed alone."""
    before = sys.stdout, sys.stderr
    nets = [nn.Sequential(nn.Linear(3, 4 + i), nn.Tanh(), nn.Linear(4 + i, 3)) for i in range(4)]

    def job(net: nn.Module) -> Tensor:
        problem = psn.ODEProblem(lambda t, u: net(u), torch.ones(2, 3), (0.0, 1.0))
        return psn.solve(problem, compile=True).u1.detach()

    with ThreadPoolExecutor(4) as executor:
        ends = list(executor.map(job, nets))
    assert (sys.stdout, sys.stderr) == before
    for net, u1 in zip(nets, ends, strict=True):
        torch.testing.assert_close(u1, job(net))
