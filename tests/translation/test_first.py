"""What a field makes at its first evaluation and keeps is made of numbers, or is not kept."""

from __future__ import annotations

import contextvars
import copy
import functools
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.errors import CompileError
from pysciml_node.problems.state import StateSpec
from pysciml_node.translation.first import At, make_what_it_keeps

D = torch.float64
TABLE: dict[str, Tensor] = {}


def twos(count: int = 2) -> Tensor:
    return torch.full((count,), 2.0, dtype=D)


@functools.lru_cache
def cached(count: int) -> Tensor:
    return twos(count)


@functools.cache
def cached_among_others(count: int) -> tuple[Tensor, int]:
    return twos(count), count


class Field(nn.Module):
    """`u' = -2 k u`, with the 2 kept where a subclass has it."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Parameter(torch.tensor(0.5, dtype=D))
        self.table: Any = None

    def two(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * u * self.two(u)


class InAttribute(Field):
    def two(self, u: Tensor) -> Tensor:
        if self.table is None:
            self.table = twos()
        return self.table


class InDict(Field):
    def __init__(self) -> None:
        super().__init__()
        self.table = {}

    def two(self, u: Tensor) -> Tensor:
        return self.table.setdefault((u.shape, u.dtype), twos())


class InList(Field):
    def __init__(self) -> None:
        super().__init__()
        self.table = []

    def two(self, u: Tensor) -> Tensor:
        if not self.table:
            self.table.append(twos())
        return self.table[0]


class InGlobal(Field):
    def two(self, u: Tensor) -> Tensor:
        return TABLE.setdefault("two", twos())


class InCache(Field):
    def two(self, u: Tensor) -> Tensor:
        return cached(2)


class InUnboundedCache(Field):
    def two(self, u: Tensor) -> Tensor:
        return cached_among_others(2)[0]


class InProperty(Field):
    @functools.cached_property
    def held(self) -> Tensor:
        return twos()

    def two(self, u: Tensor) -> Tensor:
        return self.held


class Counted(InAttribute):
    """The count goes on, so nothing of an evaluation before the trace is kept."""

    count = 0

    def two(self, u: Tensor) -> Tensor:
        self.count += 1
        return super().two(u)


KEPT = [InAttribute, InDict, InList, InGlobal, InCache, InUnboundedCache, InProperty]


@pytest.fixture(autouse=True)
def _nothing_is_cached() -> None:
    TABLE.clear()
    cached.cache_clear()
    cached_among_others.cache_clear()


def solved(field: Callable[..., Any], recorded: bool = True) -> Tensor:
    """The end of a native solve from 1 and 3 over a unit of time."""
    with torch.set_grad_enabled(recorded):
        problem = psn.ODEProblem(field, torch.tensor([1.0, 3.0], dtype=D), (0.0, 1.0))
        return psn.solve(problem, compile=True, rtol=1e-9, atol=1e-9).u1


@pytest.mark.parametrize("kind", [*KEPT, Counted])
@pytest.mark.parametrize("first", [True, False])
def test_a_table_is_made_once_by_any_means(kind: type[Field], first: bool) -> None:
    field = kind()
    for count in range(4):
        u1 = solved(field, recorded=first == (count % 2 == 0))
        expected = torch.exp(-2 * field.k.detach()) * torch.tensor([1.0, 3.0], dtype=D)
        torch.testing.assert_close(u1.detach(), expected, rtol=1e-8, atol=0)
        if u1.requires_grad:
            (slope,) = torch.autograd.grad(u1.sum(), field.k)
            torch.testing.assert_close(slope, -2 * expected.sum(), rtol=1e-7, atol=0)
        with torch.no_grad():
            field.k.add_(0.1)
    value = field(torch.zeros((), dtype=D), torch.ones(2, dtype=D))
    assert type(value) is Tensor
    torch.testing.assert_close(value.detach(), -2 * field.k.detach().expand(2))


def test_a_table_of_the_first_state_is_refused() -> None:
    """Of which solve it is the first one a program cannot know."""

    class OfItsState(InDict):
        def two(self, u: Tensor) -> Tensor:
            return self.table.setdefault("first", u.detach().clone())

    field = OfItsState()
    for _ in range(2):
        with pytest.raises(CompileError, match="has another value in torch"):
            solved(field)
        assert field.table == {}


def of_time(t: Tensor, u: Tensor) -> Any:
    return float(t)


def copy_of_time(t: Tensor, u: Tensor) -> Any:
    return t.detach().clone()


def signs(t: Tensor, u: Tensor) -> Any:
    return 2 * torch.sign(u.detach())


def mask(t: Tensor, u: Tensor) -> Any:
    return (u > 0).to(u)


def of_dlpack(t: Tensor, u: Tensor) -> Any:
    return float(np.from_dlpack(u.detach())[0])


def copied(t: Tensor, u: Tensor) -> Any:
    return copy.deepcopy(u.detach())


def largest(t: Tensor, u: Tensor) -> Any:
    return int(u.abs().argmax())


def far(t: Tensor, u: Tensor) -> Any:
    return torch.where(u.detach().norm() > 1e3, 1.0, 2.0)


def listed(t: Tensor, u: Tensor) -> Any:
    return sum(u.tolist())


def of_numpy(t: Tensor, u: Tensor) -> Any:
    return float(u.detach().numpy()[0])


def drawn(t: Tensor, u: Tensor) -> Any:
    return torch.rand((), dtype=D)


@pytest.mark.parametrize(
    "made",
    [
        *(of_time, copy_of_time, signs, mask, largest, far, listed, of_numpy, of_dlpack),
        *(copied, drawn),
    ],
)
def test_nothing_is_kept_of_the_evaluation_before_a_trace_that_a_solve_would_make_otherwise(
    made: Callable[[Tensor, Tensor], Any],
) -> None:
    class OfItsArguments(Field):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            if self.table is None:
                self.table = made(t, u)
            return -self.k * u * self.table

    field, u0 = OfItsArguments(), torch.tensor([-1.0, 3.0], dtype=D)
    state = torch.get_rng_state()
    make_what_it_keeps(field, StateSpec.of(u0), None, At(0.5, u0))
    assert field.table is None
    assert torch.equal(state, torch.get_rng_state())


def test_what_was_there_is_not_written_to() -> None:
    """A flag that said so would stay, and the table would have its zeros back."""

    class Filled(Field):
        tab: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("tab", torch.zeros(2, dtype=D))
            self.large: Tensor
            self.register_buffer("large", torch.zeros(100_000, dtype=D))
            self.ready = False

        def two(self, u: Tensor) -> Tensor:
            if not self.ready:
                self.large[:2] = u.detach()
                self.tab.fill_(2.0)
                self.ready = True
            return self.tab

    field = Filled()
    with pytest.raises(CompileError, match="changes its buffers"):
        solved(field)
    assert not field.ready
    assert not torch.cat((field.tab, field.large)).any()


class InClass:
    held: Any = None

    def get(self) -> Any:
        return type(self).held

    def put(self, x: Any) -> None:
        type(self).held = x


class OnlyInItsThread(InClass):
    def __init__(self) -> None:
        self.local = threading.local()

    def get(self) -> Any:
        return getattr(self.local, "held", None)

    def put(self, x: Any) -> None:
        self.local.held = x


class InContext(InClass):
    def __init__(self) -> None:
        self.variable = contextvars.ContextVar[Any]("held", default=None)

    def get(self) -> Any:
        return self.variable.get()

    def put(self, x: Any) -> None:
        self.variable.set(x)


class InSet(InClass):
    def __init__(self) -> None:
        self.held = set()

    def get(self) -> Any:
        return next(iter(self.held), None)

    def put(self, x: Any) -> None:
        self.held.add(x)


class InLongList(InClass):
    def __init__(self) -> None:
        self.held = [None] * 5_000

    def get(self) -> Any:
        return self.held[0]

    def put(self, x: Any) -> None:
        self.held[0] = x


class InWeakDict(InClass):
    def __init__(self) -> None:
        self.held = weakref.WeakKeyDictionary()

    def get(self) -> Any:
        return self.held.get(self)

    def put(self, x: Any) -> None:
        self.held[self] = x


class InFunction(InClass):
    def get(self) -> Any:
        return getattr(solved, "held", None)

    def put(self, x: Any) -> None:
        vars(solved)["held"] = x


class InNewGlobal(InClass):
    def get(self) -> Any:
        return globals().get("MADE")

    def put(self, x: Any) -> None:
        globals()["MADE"] = x


class Sent(InClass):
    def __init__(self) -> None:
        def hold() -> Generator[Any, Any, None]:
            held = None
            while True:
                x = yield held
                held = held if x is None else x

        self.held = hold()
        next(self.held)

    def get(self) -> Any:
        return self.held.send(None)

    def put(self, x: Any) -> None:
        self.held.send(x)


class Elsewhere(Field):
    """`u' = -k u v`, where `v` is made by the first evaluation."""

    def __init__(self, place: InClass, make: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.place, self.make = place, make

    def two(self, u: Tensor) -> Tensor:
        held = self.place.get()
        if held is None:
            held = self.make(u)
            self.place.put(held)
        return held


PLACES = [
    *(InClass, OnlyInItsThread, InContext, InSet, InLongList, InWeakDict, InFunction),
    *(InNewGlobal, Sent),
]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("of_state", [False, True])
def test_what_cannot_be_put_back_is_what_a_solve_in_python_leaves(
    place: type[InClass], of_state: bool
) -> None:
    """It was that of a random state, or of none, in later solves in Python too."""
    InClass.held = None
    vars(solved).pop("held", None)
    globals().pop("MADE", None)
    field = Elsewhere(place(), lambda u: u.detach().abs() if of_state else twos())
    first, second = (torch.tensor(x, dtype=D) for x in ([1.0, -3.0], [-2.0, 0.5]))
    for compiled in (True, False):
        for u0 in (first, second):
            problem = psn.ODEProblem(field, u0, (0.0, 1.0))
            u1 = psn.solve(problem, compile=compiled, rtol=1e-9, atol=1e-9).u1
            power = first.abs() if of_state else 2.0
            expected = u0 * torch.exp(-field.k.detach() * power)
            torch.testing.assert_close(u1.detach(), expected, rtol=1e-8, atol=0)
            (slope,) = torch.autograd.grad(u1.sum(), field.k)
            torch.testing.assert_close(slope, -(power * expected).sum(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("compiled", [True, "auto"])
def test_lazy_layers_are_made_as_in_python(compiled: Any) -> None:
    ends = []
    for mode in (False, compiled):
        torch.manual_seed(0)
        net = nn.Sequential(nn.LazyLinear(4, dtype=D), nn.Tanh(), nn.LazyLinear(2, dtype=D))
        problem = psn.ODEProblem(
            lambda t, u, net=net: net(u), torch.ones(3, 2).double(), (0.0, 1.0)
        )
        u1 = psn.solve(problem, compile=mode).u1
        u1.sum().backward()
        ends.append(torch.stack([u1.sum(), net[0].weight.grad.sum(), torch.rand((), dtype=D)]))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=0)


def test_a_registered_buffer_is_made_once() -> None:
    class Registering(Field):
        tab: Tensor

        def two(self, u: Tensor) -> Tensor:
            if not hasattr(self, "tab"):
                self.register_buffer("tab", twos())
            return self.tab

    field = Registering()
    torch.testing.assert_close(
        solved(field).detach(), torch.exp(-2 * field.k.detach()) * torch.tensor([1.0, 3.0]).double()
    )
    assert "tab" in dict(field.named_buffers())


def test_what_a_field_says_once_is_said() -> None:
    class Warning(Field):
        def two(self, u: Tensor) -> Tensor:
            if self.table is None:
                self.table = True
                warnings.warn("the width is odd", stacklevel=1)
            return twos()

    with pytest.warns(UserWarning, match="the width is odd"):
        solved(Warning())


def test_running_statistics_are_those_of_solves_alone() -> None:
    norm = nn.BatchNorm1d(2).double()
    with pytest.raises(CompileError):
        psn.solve(
            psn.ODEProblem(lambda t, u: -norm(u), torch.ones(3, 2).double(), (0.0, 1.0)),
            compile=True,
        )
    assert norm.running_mean is not None
    assert not norm.running_mean.any()


def test_a_table_of_weights_is_made_anew() -> None:
    """One that is kept would be that of the weights before."""

    class OfItsWeights(Field):
        def two(self, u: Tensor) -> Tensor:
            if self.table is None:
                self.table = 4 * self.k
            return self.table

    field = OfItsWeights()
    for k in (0.5, 0.25):
        with torch.no_grad():
            field.k.fill_(k)
        u1 = solved(field)
        (slope,) = torch.autograd.grad(u1[0], field.k)
        expected = torch.exp(torch.tensor(-4 * k * k, dtype=D))
        torch.testing.assert_close(u1[0].detach(), expected, rtol=1e-8, atol=0)
        torch.testing.assert_close(slope, -8 * k * expected, rtol=1e-7, atol=0)


def test_random_numbers_go_on_as_if_nothing_had_been_evaluated() -> None:
    class Drawn(InAttribute):
        def two(self, u: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.rand(2, dtype=D)
            return self.table

    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    with pytest.raises(CompileError):
        solved(Drawn())
    torch.testing.assert_close(torch.rand(3), expected)


class OfTheFirst(Field):
    """`u' = -2 m` with an `m` that it keeps of its first evaluation."""

    def two(self, u: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.sign(u.detach())
        return self.table

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -2 * self.k * self.two(u) * torch.ones_like(u)


class OfTheFirstInDict(OfTheFirst):
    def two(self, u: Tensor) -> Tensor:
        return TABLE.setdefault("sign", torch.sign(u.detach()))


class OfTheFirstInCache(OfTheFirst):
    """The cached function has no arguments: it reads an attribute that was made of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.sign = functools.lru_cache(lambda: self.table * 1.0)

    def two(self, u: Tensor) -> Tensor:
        self.table = torch.sign(u.detach())
        return self.sign()


class OfTheFirstTime(OfTheFirst):
    """Its `m` is 1."""

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        if self.table is None:
            self.table = t.detach() + 1.0
        return -2 * self.k * self.table * torch.ones_like(u)


@pytest.mark.parametrize("kind", [OfTheFirst, OfTheFirstInDict, OfTheFirstInCache, OfTheFirstTime])
def test_a_field_goes_on_with_what_it_keeps_of_the_state_where_a_solve_begins(
    kind: type[OfTheFirst],
) -> None:
    """A program would make it again at each evaluation: `u` did not go through zero."""
    field, u0 = kind(), torch.tensor([0.5, 1.0], dtype=D)
    problem = psn.ODEProblem(field, u0, (0.0, 1.0))
    with pytest.raises(CompileError, match="in torch than its operations have"):
        psn.solve(problem, compile=True)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", psn.PsnWarning)
            end = psn.solve(problem, compile="auto").u1.detach()
        torch.testing.assert_close(end, u0 - 1.0, rtol=1e-9, atol=1e-12)


def of_torch() -> Tensor:
    return torch.rand((), dtype=D)


def of_python() -> float:
    return random.random()


def of_the_old_numpy() -> float:
    return float(np.random.rand())  # noqa: NPY002


@pytest.mark.parametrize("cached", [False, True], ids=["attribute", "cache"])
@pytest.mark.parametrize("draw", [of_torch, of_python, of_the_old_numpy])
def test_numbers_that_are_drawn_once_are_those_of_the_stream(
    draw: Callable[[], Any], cached: bool
) -> None:
    """They stayed with the field, and the stream gave them to others again."""

    class Drawing(Field):
        def __init__(self) -> None:
            super().__init__()
            self.drawn = functools.lru_cache(draw)

        def two(self, u: Tensor) -> Any:
            if cached:
                return self.drawn()
            if self.table is None:
                self.table = draw()
            return self.table

    def seed() -> None:
        torch.manual_seed(0)
        random.seed(0)
        np.random.seed(0)  # noqa: NPY002

    seed()
    first, second = draw(), draw()
    seed()
    field = Drawing()
    with pytest.raises(CompileError):
        solved(field)
    field(torch.zeros((), dtype=D), torch.ones(2, dtype=D))
    assert (field.drawn() if cached else field.table) == first
    assert draw() == second
