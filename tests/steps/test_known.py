"""A field is walked through once, and again when anything has changed that it can reach."""

from __future__ import annotations

import gc
import math
import types
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.steps import known
from pysciml_node.steps.surroundings import Surroundings

D = torch.float64


def leaf(value: float) -> Tensor:
    return torch.tensor(value, dtype=D, requires_grad=True)


class Inner(nn.Module):
    """Adds up all that it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5, dtype=D))
        self.parts: list[Any] = []
        self.table: dict[str, Any] = {}
        self.unordered: set[Any] = set()

    def rate(self) -> Tensor:
        found = [self.weight, *self.parts, *self.table.values(), *self.unordered]
        found += [*self._buffers.values(), *vars(Inner).get("further", ())]
        return torch.stack([x for x in found if isinstance(x, Tensor)]).sum()

    def growth(self, t: Tensor, u: Tensor) -> Tensor:
        return self.rate() * u


class Faster(Inner):
    """Twice that."""

    def rate(self) -> Tensor:
        twice: Tensor = 2 * super().rate()
        return twice


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner: Any = Inner()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        rate = self.inner.rate()
        if "LATE" in globals():
            rate = rate + LATE  # type: ignore[name-defined]  # noqa: F821
        return -rate * u * (1 if t < 2 else 0)


def _swap(field: Field, x: Tensor) -> None:
    field.inner = Inner()
    field.inner.parts.append(x)


def _method(field: Field, x: Tensor) -> None:
    weight = field.inner.weight
    field.inner.rate = lambda: weight + x


WAYS: dict[str, Callable[[Field, Tensor], object]] = {
    "list": lambda field, x: field.inner.parts.append(x),
    "dict": lambda field, x: field.inner.table.update(x=x),
    "set": lambda field, x: field.inner.unordered.add(x),
    "buffer": lambda field, x: field.inner.register_buffer("extra", x),
    "module": _swap,
    "method": _method,
    "global": lambda field, x: globals().update(LATE=x),
    "class": lambda field, x: setattr(Inner, "further", (x,)),
    "attributes": lambda field, x: setattr(
        field.inner, "__dict__", {**field.inner.__dict__, "parts": [x]}
    ),
}


def gradient(field: Field, x: Tensor, adjoint: Any) -> Tensor | None:
    u1 = psn.solve(
        psn.ODEProblem(field, torch.ones(1, dtype=D), (0.0, 1.0)),
        rtol=1e-9,
        atol=1e-9,
        adjoint=adjoint,
    ).u1
    return torch.autograd.grad(u1.sum(), x, allow_unused=True)[0]


@pytest.mark.parametrize("adjoint", [psn.DiscreteAdjoint(), psn.DiscreteAdjoint(memory=0)])
@pytest.mark.parametrize("way", WAYS)
def test_what_has_been_added_since_the_last_solve_has_its_gradient(way: str, adjoint: Any) -> None:
    """`u1 = exp(-(w + x))`, whose derivative in `x` is `-u1`; without `x` there is none."""
    field, x = Field(), leaf(0.25)
    try:
        for _ in range(3):
            assert gradient(field, field.inner.weight, adjoint) is not None
        WAYS[way](field, x)
        for _ in range(3):
            found = gradient(field, x, adjoint)
            assert found is not None
            assert found.item() == pytest.approx(-math.exp(-0.75), rel=1e-7)
        # What is there is found by the walk, and so replays give it back.
        assert way in ("method",) or id(x) in Surroundings({"f": field, "p": None}).names
    finally:
        globals().pop("LATE", None)
        if "further" in vars(Inner):
            del Inner.further  # type: ignore[attr-defined]


def test_a_walk_is_kept_while_nothing_changes_and_the_field_lives() -> None:
    field, x = Field(), leaf(0.25)
    field.inner.__dict__.pop("unordered")
    field.inner.unordered = ()
    for _ in range(3):
        gradient(field, field.inner.weight, psn.DiscreteAdjoint())
    seen = known._known[id(field)]
    assert seen.stands({"f": field, "p": None})
    field.inner.parts.append(x)
    assert not seen.stands({"f": field, "p": None})
    gone, key = weakref.ref(field), id(field)
    del field, seen
    gc.collect()
    assert gone() is None
    assert key not in known._known


def test_what_a_method_reaches_is_walked_through_once() -> None:
    """Methods are made anew for each solve, and their object does not live on."""
    held = [Inner()]
    held[0].unordered = ()  # type: ignore[assignment]
    u0 = torch.ones(2, dtype=D)

    def end(grows: bool, factor: float = 1.0) -> Any:
        with torch.set_grad_enabled(grows):
            problem = psn.ODEProblem(held[0].growth, u0, (0.0, 1.0))
            solution = psn.solve(problem, psn.Euler(), controller=psn.FixedStep(), dt0=1.0)
            if grows:
                (slope,) = torch.autograd.grad(solution.u1[0], held[0].weight)
                assert slope.item() == factor
        return solution.u1[0].item()

    for grows in (False, True):
        for _ in range(3):
            assert end(grows) == 1.5
        held[0].parts.append(leaf(0.25))
        for _ in range(3):
            assert end(grows) == 1.75
        held[0].parts.clear()
        with torch.no_grad():
            held[0].weight.add_(1)
        assert end(grows) == 2.5
        held[0].weight = nn.Parameter(torch.tensor(0.5, dtype=D))
    method: Any = held[0].growth
    key, gone = (id(held[0]), id(method.__func__)), weakref.ref(held[0])
    del method
    assert end(True) == end(False) == 1.5
    assert key in known._known
    held[0].__class__ = Faster
    assert end(True, 2.0) == end(False) == 2.0
    held.clear()
    gc.collect()
    assert gone() is None
    assert key not in known._known


def test_objects_that_are_no_modules_are_known_by_their_methods_too() -> None:
    class Plain:
        def __init__(self) -> None:
            self.weight = leaf(0.5)

        def growth(self, t: Tensor, u: Tensor) -> Tensor:
            return self.weight * u

    class Slotted:
        __slots__ = ("weight",)

        def __init__(self) -> None:
            self.weight = leaf(0.5)

        growth = Plain.growth

    for kind in (Plain, Slotted):
        held: list[Any] = [kind()]
        for value in (0.5, 0.5, 0.25, 0.25, 2.0, 2.0):
            held[0].weight = leaf(value)
            for _ in range(2):
                problem = psn.ODEProblem(held[0].growth, torch.ones(1, dtype=D), (0.0, 1.0))
                solution = psn.solve(problem, psn.Euler(), controller=psn.FixedStep(), dt0=1.0)
                assert solution.u1.item() == 1 + value
                (slope,) = torch.autograd.grad(solution.u1, held[0].weight)
                assert slope.item() == 1.0
        key = id(held[0]), id(held[0].growth.__func__)
        assert (key in known._known) == (kind is Plain)
        held.clear()
        del problem, solution
        gc.collect()
        assert key not in known._known


def euler(f: Any, u0: Tensor | None = None) -> Any:
    """`1 + f(0, 1)` by one step."""
    u0 = torch.ones(1, dtype=D) if u0 is None else u0
    fixed: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 1.0, "engine": "torch"}
    return psn.solve(psn.ODEProblem(f, u0, (0.0, 1.0)), psn.Euler(), **fixed)


def middle(rate: float) -> float:
    """Of that step for `u' = rate * u`: Hermite's interpolant at a half."""
    end = 1 + rate
    return (1 + end) / 2 + (rate - rate * end) / 8


def made_of(*modules: Inner) -> Any:
    """A function of the same code each time."""
    first, *_ = modules
    return lambda t, u: first.rate() * u


@pytest.mark.parametrize("grows", [False, True])
def test_functions_that_are_made_anew_are_known_by_what_they_capture(grows: bool) -> None:
    fields = [Inner(), Faster()]
    for field in fields:
        field.unordered = ()  # type: ignore[assignment]

    def end(n: int) -> Any:
        with torch.set_grad_enabled(grows):
            return euler(made_of(fields[n])).u1.item()

    # They take turns, and each has its own.
    for _ in range(3):
        assert [end(0), end(1)] == [1.5, 2.0]
    fields[0].weight = nn.Parameter(torch.tensor(3.0, dtype=D))
    fields[1].parts.append(leaf(0.25))
    for _ in range(3):
        assert [end(0), end(1)] == [4.0, 2.5]
    fields[0].__class__ = Faster
    assert [end(0), end(1)] == [7.0, 2.5]
    known_there = {ref() for x in known._known.values() for ref in x.anchors}
    assert known_there.issuperset(fields)
    del known_there
    gone = [*map(weakref.ref, fields)]
    del field
    fields.clear()
    gc.collect()
    assert [reference() for reference in gone] == [None, None]


def test_numbers_that_a_function_captures_are_told_apart() -> None:
    """And so are globals of functions that share their code."""
    field = Inner()
    field.unordered = ()  # type: ignore[assignment]
    for _ in range(3):
        for k in (0.5, 2.0, 1e3, True, 1, None):
            assert euler(lambda t, u, k=k: u if k is None else k * u).u1.item() == 1 + (k or 1)

            def captured(t: Tensor, u: Tensor) -> Tensor:
                return field.rate() * (u if k is None else k * u)  # noqa: B023

            assert euler(captured).u1.item() == 1 + 0.5 * (k or 1)
    code = (lambda t, u: FACTOR * u).__code__  # type: ignore[name-defined]  # noqa: F821
    for _ in range(3):
        for factor in (2.0, 3.0):
            function = types.FunctionType(code, {"FACTOR": factor})
            assert euler(function).u1.item() == 1 + factor


def test_what_a_function_rebinds_is_left_to_it() -> None:
    """A captured count goes on, in the solve and in what is read off it later."""
    field = Inner()
    field.unordered = ()  # type: ignore[assignment]
    count = 0

    def counting(t: Tensor, u: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return field.rate() * u

    for _ in range(4):
        before = count
        with torch.no_grad():
            solution = euler(lambda t, u: counting(t, u))
            assert euler(counting).u1.item() == 1.5
        assert solution.u1.item() == 1.5
        assert count == before + 2
        assert solution(0.5).item() == middle(0.5)
        assert count > before + 2


def test_captured_objects_that_lead_to_one_another() -> None:
    class Holder:
        def __init__(self) -> None:
            self.inner = Inner()
            self.inner.unordered = ()  # type: ignore[assignment]

        def solve(self) -> Any:
            inner = self.inner
            return euler(lambda t, u: inner.weight * self.inner.rate() * u)

    holder = Holder()
    for value in (0.5, 2.0, 4.0):
        holder.inner.weight = nn.Parameter(torch.tensor(value, dtype=D))
        for _ in range(3):
            solution = holder.solve()
            assert solution.u1.item() == 1 + value**2
            (slope,) = torch.autograd.grad(solution.u1, holder.inner.weight)
            assert slope.item() == 2 * value
        with torch.no_grad():
            late = holder.solve()
        holder.inner.weight = nn.Parameter(torch.tensor(7.0, dtype=D))
        # The interpolant is that of the field that was solved.
        assert late(0.5).item() == middle(value**2)


def test_weights_are_frozen_and_thawed_between_solves() -> None:
    """Each solve has gradients of what needs them then, whatever earlier ones have found out."""
    field = nn.Sequential(nn.Linear(2, 3, dtype=D), nn.Tanh(), nn.Linear(3, 2, dtype=D))
    problem = psn.ODEProblem(Timed(field), torch.ones(4, 2, dtype=D), (0.0, 1.0))
    first = field[0].weight
    for frozen in (False, False, False, True, True, True, False, False):
        field.zero_grad()
        first.requires_grad_(not frozen)
        psn.solve(problem, engine="torch").u1.square().sum().backward()
        kept = [None if x.grad is None else x.grad.clone() for x in field.parameters()]
        field.zero_grad()
        direct = psn.solve(problem, engine="torch", adjoint=psn.DirectAdjoint())
        direct.u1.square().sum().backward()
        assert (kept[0] is None) == frozen
        for x, gradient in zip(field.parameters(), kept, strict=True):
            assert (gradient is None) == (x.grad is None)
            if gradient is not None and x.grad is not None:
                torch.testing.assert_close(gradient, x.grad, rtol=1e-10, atol=1e-13)


class Timed(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        out: Tensor = torch.sin(t) * self.inner(u)
        return out


class Wide(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.within = nn.Linear(1, width, dtype=D)
        self.back = nn.Linear(width, 1, dtype=D)

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.back(torch.tanh(self.within(u)))


def test_what_fits_into_memory_is_counted_again_for_weights_of_other_shapes() -> None:
    """Through `.data`, as when a net grows; as many evaluations are repeated as for a new one."""

    def repeated(field: Wide) -> int:
        u0 = torch.ones(10, 1, dtype=D, requires_grad=True)
        adjoint = psn.DiscreteAdjoint(memory=2**20)
        fixed: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.02}
        solution = psn.solve(
            psn.ODEProblem(field, u0, (0.0, 1.0)), psn.Tsit5(), adjoint=adjoint, **fixed
        )
        solution.u1.sum().backward()
        field.zero_grad()
        return solution.stats.nfe_backward

    field, larger = Wide(2), Wide(200)
    few = repeated(field)
    for x, y in zip(field.parameters(), larger.parameters(), strict=True):
        x.data = y.data
    assert repeated(field) == repeated(larger) > few


def _held_by_a_hook(field: Field) -> None:
    field.inner.weight.register_hook(lambda x: x if field.training else None)


def _held_once_solved(field: Field) -> None:
    gradient(field, field.inner.weight, psn.DiscreteAdjoint())
    _held_by_a_hook(field)


HOLDERS: dict[str, Callable[[Field], object]] = {
    "namespace": lambda field: field.inner.table.update(x=types.SimpleNamespace(field=[field])),
    "generator": lambda field: field.inner.table.update(x=(x for x in [field])),
    "iterator": lambda field: field.inner.table.update(x=iter([field])),
    "method": lambda field: field.inner.table.update(x=field.forward),
    "builtin": lambda field: field.inner.table.update(x=[field].append),
    "error": lambda field: field.inner.table.update(x=ValueError(field)),
    "weak keys": lambda field: field.inner.table.update(
        x=weakref.WeakKeyDictionary({field.inner: field})
    ),
    "slice": lambda field: field.inner.table.update(x=slice(field)),
    "attribute": lambda field: setattr(field.inner.weight, "owner", field),
    "hook": _held_by_a_hook,
    "late hook": _held_once_solved,
}


@pytest.mark.parametrize("way", HOLDERS)
def test_a_field_that_can_be_reached_from_itself_is_not_kept_alive(way: str) -> None:
    field = Field()
    HOLDERS[way](field)
    u0 = torch.ones(1, dtype=D, requires_grad=True)
    for _ in range(3):
        psn.solve(psn.ODEProblem(field, u0, (0.0, 1.0))).u1.sum().backward()
    gone = weakref.ref(field)
    del field
    gc.collect()
    assert gone() is None


class Slotted:
    """Holds a number in a slot."""

    __slots__ = ("k",)


Way = tuple[Callable[[Tensor, Tensor], Tensor], Callable[[], None]]


def by_class_attribute() -> Way:
    class Base:
        k = 1.0

    class Held(Base):
        k = 3.0

    held = Held()
    return lambda t, u: -held.k * u, lambda: delattr(Held, "k")


def by_slot() -> Way:
    held = Slotted()
    held.k = 3.0
    return lambda t, u: -getattr(held, "k", 1.0) * u, lambda: delattr(held, "k")


def by_cell() -> Way:
    k = 3.0

    def field(t: Tensor, u: Tensor) -> Tensor:
        try:
            return -k * u
        except NameError:
            return -u

    def empty() -> None:
        nonlocal k
        del k

    return field, empty


def by_cell_of_another() -> Way:
    field, empty = by_cell()
    return lambda t, u: field(t, u), empty


def by_number_in_a_cell() -> Way:
    k = 3.0

    def change() -> None:
        nonlocal k
        k = 1.0

    return lambda t, u: -k * u, change


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize(
    "way", [by_class_attribute, by_slot, by_cell, by_cell_of_another, by_number_in_a_cell]
)
def test_what_is_taken_out_is_put_back_for_a_replay_alone(
    way: Callable[[], Way], before: int
) -> None:
    """A place that is emptied stays empty, and the solves before and after have their own field."""
    field, empty = way()

    def solve(u0: Tensor, **options: Any) -> psn.Solution:
        problem = psn.ODEProblem(field, u0, (0.0, 1.0))
        return psn.solve(problem, psn.Euler(), controller=psn.FixedStep(), dt0=0.5, **options)

    u0, moving = torch.ones(2, dtype=D), torch.ones(2, dtype=D, requires_grad=True)
    for _ in range(before + 1):
        with torch.no_grad():
            solution = solve(u0)
        kept, replayed = solve(moving), solve(moving, adjoint=psn.DiscreteAdjoint(memory=0))
    empty()
    for x in (kept, replayed):
        (gradient,) = torch.autograd.grad(x.u1.sum(), moving)
        assert gradient.tolist() == [0.25, 0.25]
    # Hermite's cubic in the middle of a step of 1/2 from 1 to -1/2, with the slopes -3 and 3/2.
    middle = (1 - 0.5) / 2 + 0.5 * (-3 - 1.5) / 8
    assert solution(0.25).tolist() == pytest.approx([middle] * 2, rel=1e-14)
    for _ in range(2):
        with torch.no_grad():
            assert solve(u0).u1.tolist() == [0.25, 0.25]
        assert solve(moving, compile="auto").u1.tolist() == [0.25, 0.25]
