"""Native code is that of the classes of the extra argument as they are now."""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
import torch
from decaying import D, Holder, decay, end
from torch import Tensor, nn

import pysciml_node as psn

RATE = 1.0
CONSTANT = torch.ones(1, dtype=D)
NET = nn.Linear(1, 1, bias=False, dtype=D)
Way = tuple[Callable[..., Any], Any, Callable[[float], Any]]


class Pair(NamedTuple):
    """A tensor with methods."""

    k: Tensor

    def by_global(self) -> Any:
        """Reads a global number."""
        return self.k * RATE

    def by_tensor(self) -> Any:
        """Reads a global tensor."""
        return self.k * CONSTANT

    def by_network(self) -> Any:
        """Reads a network's weight."""
        return self.k * NET(self.k)

    @property
    def by_attribute(self) -> Any:
        """Reads an attribute of the class."""
        return self.k * getattr(type(self), "rate", 1.0)


class Placed(NamedTuple):
    """A tensor, and how it lies."""

    k: Tensor

    def by_layout(self) -> Any:
        """Asks how the tensor lies in memory."""
        return 2 if self.k.is_contiguous() else 1


class Called(NamedTuple):
    """A tensor, and how it is called."""

    k: Tensor

    def by_mode(self) -> Any:
        """Asks whether gradients are recorded."""
        return self.k if torch.is_grad_enabled() else 2 * self.k


class Number(float):
    """A number with a method."""

    rate = 1.0

    def by_attribute(self) -> float:
        """Reads an attribute of the class."""
        return self * self.rate


class Kind(enum.Enum):
    """Members whose values can change."""

    LIST = enum.member([1.0])
    OBJECT = enum.member(Holder())
    TENSOR = enum.member(torch.ones(1, dtype=D))
    NUMBER = 1.0

    def by_global(self) -> float:
        """Reads a global number."""
        return RATE


def unit() -> Tensor:
    return torch.ones(1, dtype=D)


def by_global_of_a_method() -> Way:
    return lambda t, u, p: -p.by_global() * u, Pair(unit()), lambda x: globals().update(RATE=x)


def by_global_tensor_of_a_method() -> Way:
    return lambda t, u, p: -p[0].by_tensor() * u, [Pair(unit())], lambda x: CONSTANT.fill_(x)


def by_attribute_of_a_named_tuple() -> Way:
    return lambda t, u, p: -p.by_attribute * u, Pair(unit()), lambda x: setattr(Pair, "rate", x)


def by_attribute_of_a_number() -> Way:
    p = {"k": Number(1.0)}
    return lambda t, u, p: -p["k"].by_attribute() * u, p, lambda x: setattr(Number, "rate", x)


def by_method_of_a_member() -> Way:
    return lambda t, u, p: -p.by_global() * u, Kind.NUMBER, lambda x: globals().update(RATE=x)


def by_list_of_a_member() -> Way:
    rates: Any = Kind.LIST.value
    return lambda t, u, p: -p.value[0] * u, Kind.LIST, lambda x: rates.__setitem__(0, x)


def by_object_of_a_member() -> Way:
    return lambda t, u, p: -p.value.k * u, Kind.OBJECT, lambda x: setattr(Kind.OBJECT.value, "k", x)


def by_tensor_of_a_member() -> Way:
    rate: Any = Kind.TENSOR.value
    return lambda t, u, p: -p.value * u, Kind.TENSOR, lambda x: rate.fill_(x)


def by_attribute_of_a_member() -> Way:
    f = lambda t, u, p: -getattr(p, "rate", 1.0) * u  # noqa: E731
    return f, Kind.NUMBER, lambda x: setattr(Kind.NUMBER, "rate", x)


WAYS = [way for name, way in list(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("way", WAYS)
def test_what_a_class_reads_has_changed(way: Callable[[], Way]) -> None:
    f, p, put = way()
    for rate in (1.0, 2.0, 2.0, 1.0):
        put(rate)
        for _ in range(2):
            assert end(f, p) == decay(rate)


def test_decimals_with_more_zeros() -> None:
    for words in ("1.0", "1.00", "1.0"):
        assert end(lambda t, u, p: -len(str(p)) * u, Decimal(words)) == decay(len(words))


def rows(by_columns: bool) -> Tensor:
    x = torch.ones(2, 3, dtype=D)
    return x.T.contiguous().T if by_columns else x


def leaf(made: bool) -> Tensor:
    x = torch.ones(1, dtype=D, requires_grad=True)
    return x * 1 if made else x


def version(changed: bool) -> Tensor:
    x = torch.ones(1, dtype=D)
    return x.add_(0.0) if changed else x


ASKED: dict[str, tuple[Callable[[Any], bool], Callable[[bool], Any]]] = {
    "layout": (lambda p: not p["k"].is_contiguous(), lambda x: {"k": rows(x)}),
    "layout, by a method": (lambda p: p.by_layout() == 1, lambda x: Placed(rows(x))),
    "stride": (lambda p: p.stride(0) == 1, rows),
    "leaf": (lambda p: not p.is_leaf, leaf),
    "graph": (lambda p: p.grad_fn is not None, leaf),
    "version": (lambda p: p._version > 0, version),
    "sign": (lambda p: p.is_neg(), lambda x: torch._neg_view(unit()) if x else unit()),
    "class": (
        lambda p: isinstance(p, nn.Parameter),
        lambda x: nn.Parameter(unit()) if x else unit().requires_grad_(),
    ),
    "itself": (lambda p: p["a"] is CONSTANT, lambda x: {"a": CONSTANT if x else unit()}),
}


LAYOUTS = ("layout", "layout, by a method", "stride")
"""Those that programs take; what they lose of a tensor is refused."""


@pytest.mark.parametrize("asked", ASKED)
def test_what_a_field_asks_of_tensors(asked: str) -> None:
    """`du/dt = -u`, twice as fast where the answer is yes."""
    ask, make = ASKED[asked]
    refusals = () if asked in LAYOUTS else (psn.CompileError,)
    for answer in (False, True, True, False):
        p = make(answer)
        for _ in range(2):
            with contextlib.suppress(*refusals):
                assert end(lambda t, u, p: -(2.0 if ask(p) else 1.0) * u, p) == decay(1.0 + answer)


def test_what_drift_and_diffusion_ask() -> None:
    """`du = -u dt` and no noise, twice as fast where a tensor lies by columns."""

    def drift(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return -u * (1 if p.is_contiguous() else 2)

    def diffusion(t: Tensor, u: Tensor, p: Tensor) -> Tensor:
        return 0 * u * (1 if p.is_contiguous() else 2)

    for by_columns in (False, True, True, False):
        problem = psn.SDEProblem(drift, diffusion, unit(), (0.0, 1.0), p=rows(by_columns))
        for _ in range(2):
            solution = psn.solve(problem, psn.SOSRI(), rtol=1e-4, atol=1e-4, compile=True)
            assert float(solution.u1) == pytest.approx(math.exp(-1.0 - by_columns), rel=1e-3)


def test_a_class_that_trains_or_asks_is_refused() -> None:
    with pytest.raises(psn.CompileError, match="trains a tensor"):
        end(lambda t, u, p: -p.by_network() * u, Pair(unit()))
    with pytest.raises(psn.CompileError, match="class Called, which asks"):
        end(lambda t, u, p: -p.by_mode() * u, Called(unit()))
