"""Native code sees the dict of an object exchanged, and an order changed without an entry."""

from __future__ import annotations

import collections
import math
from typing import Any

import pytest
import torch
from decaying import D, end
from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("looks_in_both")


def exchange(x: Any, k: float) -> None:
    """Another dict with another number; the one before stays as it was."""
    x.__dict__ = {**x.__dict__, "k": k}


class Module(nn.Module):
    k = 1.0

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * u


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Module()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.inner(t, u)  # type: ignore[no-any-return]


class Plain:
    k = 1.0

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.k * u


def with_k(x: Any) -> Any:
    x.k = 1.0
    return x


def of_the_field() -> tuple[Any, Any]:
    field = Module()
    return field, field


def of_an_object() -> tuple[Any, Any]:
    field = with_k(Plain())
    return field, field


def of_an_inner_module() -> tuple[Any, Any]:
    field = Outer()
    return field, field.inner


def of_the_owner_of_a_method() -> tuple[Any, Any]:
    owner = with_k(Plain())
    return owner.__call__, owner


def of_what_is_captured() -> tuple[Any, Any]:
    held = with_k(Plain())
    return lambda t, u: -held.k * u, held


def of_a_function() -> tuple[Any, Any]:
    held = with_k(lambda: None)
    return lambda t, u: -held.k * u, held


def of_a_tensor() -> tuple[Any, Any]:
    held = with_k(torch.ones(1, dtype=D))
    return lambda t, u: -held.k * held * u, held


@pytest.mark.parametrize(
    "way",
    [
        of_the_field,
        of_an_object,
        of_an_inner_module,
        of_the_owner_of_a_method,
        of_what_is_captured,
        of_a_function,
        of_a_tensor,
    ],
    ids=lambda way: way.__name__,
)
def test_an_exchanged_dict_is_seen(way: Any) -> None:
    f, owner = way()
    assert end(f) == pytest.approx(math.exp(-1), rel=1e-6)
    assert end(f) == pytest.approx(math.exp(-1), rel=1e-6)
    exchange(owner, 2.0)
    assert end(f) == pytest.approx(math.exp(-2), rel=1e-6)
    owner.k = 3.0
    assert end(f) == pytest.approx(math.exp(-3), rel=1e-6)


@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_an_order_that_has_changed_is_seen(kind: Any) -> None:
    rates = kind(a=1.0, b=2.0)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return -next(iter(rates.values())) * u

    assert end(field) == pytest.approx(math.exp(-1), rel=1e-6)
    assert end(field) == pytest.approx(math.exp(-1), rel=1e-6)
    if kind is dict:
        rates["a"] = rates.pop("a")
    else:
        rates.move_to_end("a")
    assert end(field) == pytest.approx(math.exp(-2), rel=1e-6)
    rates["b"] = 3.0
    assert end(field) == pytest.approx(math.exp(-3), rel=1e-6)


def test_a_dict_that_is_as_it_was_after_changes_needs_no_new_look() -> None:
    held = {"k": 1.0, "other": 2.0}

    def field(t: Tensor, u: Tensor) -> Tensor:
        return -held["k"] * u

    assert end(field) == pytest.approx(math.exp(-1), rel=1e-6)
    kept = held["k"]
    for k in (4.0, kept, 5.0, kept):
        held["k"] = k
        assert end(field) == pytest.approx(math.exp(-k), rel=1e-6)
