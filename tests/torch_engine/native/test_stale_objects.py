"""Native code is that of the field as it is now, whatever Python's objects keep its numbers in."""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import enum
import functools
import gc
import importlib
import math
import operator
import queue
import sys
import threading
import types
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from decaying import D, Holder, decay, end
from torch import Tensor, nn

import pysciml_node as psn

pytestmark = pytest.mark.usefixtures("looks_in_both")

RATE = 1.0
Way = tuple[Callable[..., Any], Callable[[float], Any]]


class Real(float):
    """A number with a class of its own."""


class Pace(enum.IntEnum):
    """Rates by name."""

    SLOW = 1
    FAST = 2


class Words(str):
    """A string with a class of its own."""


def by_class_of_numbers() -> Way:
    holder = Holder()
    holder.k = Real(1.0)
    return lambda t, u: -float(holder.k) * u, lambda k: setattr(holder, "k", Real(k))


def by_class_of_words() -> Way:
    holder = Holder()
    holder.k = Words("1.0")
    return lambda t, u: -float(str(holder.k)) * u, lambda k: setattr(holder, "k", Words(k))


def by_user_list() -> Way:
    held = collections.UserList([1.0])
    return lambda t, u: -held[0] * u, lambda k: held.__setitem__(0, k)


def by_queue() -> Way:
    held: queue.Queue[float] = queue.Queue()
    held.put(1.0)
    return lambda t, u: -held.queue[0] * u, lambda k: held.queue.__setitem__(0, k)


def by_number_of_c() -> Way:
    held = ctypes.c_double(1.0)
    return lambda t, u: -held.value * u, lambda k: setattr(held, "value", k)


def by_numbers_of_c() -> Way:
    held = (ctypes.c_double * 2)(1.0, 0.0)
    return lambda t, u: -held[0] * u, lambda k: held.__setitem__(0, k)


def by_polynomial() -> Way:
    held = np.polynomial.Polynomial([0.0, 1.0])
    return lambda t, u: -held.coef[1] * u, lambda k: held.coef.__setitem__(1, k)


def by_attribute_of_an_array() -> Way:
    class Array(np.ndarray):  # type: ignore[type-arg]
        k = 1.0

    held = np.zeros(2).view(Array)
    held.k = 1.0
    return lambda t, u: -held.k * u, lambda k: setattr(held, "k", k)


def by_weak_set() -> Way:
    holder = Holder()
    held = weakref.WeakSet([holder])

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -sum(x.k for x in held) * u

    return f, lambda k: setattr(holder, "k", k)


def by_proxy() -> Way:
    holder = Holder()
    held = weakref.proxy(holder)
    return lambda t, u: -held.k * u, lambda k: setattr(holder, "k", k)


def by_function_in_a_partial_method() -> Way:
    class Field(nn.Module):
        forward = functools.partialmethod(lambda self, t, u: -RATE * u)

    return Field(), lambda k: globals().update(RATE=k)


def by_attribute_of_a_partial() -> Way:
    held = functools.partial(lambda k, u: -k * u, 1.0)
    held.k = 1.0  # type: ignore[attr-defined]
    return lambda t, u: held.k * held(u), lambda k: setattr(held, "k", k)  # type: ignore[attr-defined]


def by_partial_filled_again() -> Way:
    held = functools.partial(lambda k, u: -k * u, 1.0)
    fill = held.__setstate__  # type: ignore[attr-defined]
    return lambda t, u: held(u), lambda k: fill((held.func, (k,), {}, {}))


def by_base_class() -> Way:
    class One:
        k = 1.0

    class Two:
        k = 2.0

    class Held(One):
        pass

    return lambda t, u: -Held.k * u, lambda k: setattr(
        Held, "__bases__", (One if k == 1.0 else Two,)
    )


def module() -> Any:
    made: Any = types.ModuleType("users_settings")
    made.K = 1.0
    sys.modules["users_settings"] = made
    return made


def by_name_in_words() -> Way:
    config = module()
    return lambda t, u: -getattr(config, "K") * u, lambda k: setattr(config, "K", k)  # noqa: B009


def by_name_in_a_capture() -> Way:
    config, name = module(), "K"
    return lambda t, u: -getattr(config, name) * u, lambda k: setattr(config, "K", k)


def by_name_that_is_made() -> Way:
    config = module()
    config.K_1, i = 1.0, 1
    return lambda t, u: -getattr(config, f"K_{i}") * u, lambda k: setattr(config, "K_1", k)


def by_name_that_comes_later() -> Way:
    config, i = module(), 2
    return (
        lambda t, u: -getattr(config, f"K_{i}", 1.0) * u,
        lambda k: setattr(config, "K_2", k),
    )


def by_getter() -> Way:
    config, get = module(), operator.attrgetter("K")
    return lambda t, u: -get(config) * u, lambda k: setattr(config, "K", k)


def library(**attributes: Any) -> Any:
    """An object whose class is that of a library."""
    return type("Settings", (), {"__module__": "queue", **attributes})()


def by_slot_of_a_librarys_object() -> Way:
    held = library(__slots__=("k",))
    held.k = 1.0
    return lambda t, u: -held.k * u, lambda k: setattr(held, "k", k)


def by_configuration_in_a_librarys_object() -> Way:
    held = library()
    held.inner = dataclasses.make_dataclass("Inner", ["k"])(1.0)
    held.inner.__class__.__module__ = "queue"
    return lambda t, u: -held.inner.k * u, lambda k: setattr(held.inner, "k", k)


def by_list_in_a_librarys_object() -> Way:
    held = library()
    held.inner = [[1.0], held]
    return lambda t, u: -held.inner[0][0] * u, lambda k: held.inner[0].__setitem__(0, k)


def by_what_a_class_is_called_by() -> Way:
    class Field:
        __call__ = functools.partialmethod(lambda self, t, u: -RATE * u)

    return Field(), lambda k: globals().update(RATE=k)


def by_dict_of_a_module() -> Way:
    config = module()
    return lambda t, u: -vars(config)["K"] * u, lambda k: setattr(config, "K", k)


def by_import_in_words() -> Way:
    config = module()
    name = "users_settings"
    return lambda t, u: -importlib.import_module(name).K * u, lambda k: setattr(config, "K", k)


def by_loaded_modules() -> Way:
    config = module()
    return lambda t, u: -sys.modules["users_settings"].K * u, lambda k: setattr(config, "K", k)  # type: ignore[attr-defined]


def by_another_module_under_the_name() -> Way:
    module()

    def change(k: float) -> None:
        module().K = k

    return lambda t, u: -__import__("users_settings").K * u, change


def by_code_in_words() -> Way:
    return lambda t, u: -eval("RATE") * u, lambda k: globals().update(RATE=k)


def by_code_in_words_of_a_module() -> Way:
    config = module()
    text = "config.K"
    return lambda t, u: -eval(text, {"config": config}) * u, lambda k: setattr(config, "K", k)


def by_compiled_code() -> Way:
    code = compile("-RATE * u", "here", "eval")
    return lambda t, u: eval(code), lambda k: globals().update(RATE=k)


def by_function_of_a_library() -> Way:
    """A function of torch is another one for a while."""
    usual = torch.square

    def change(k: float) -> None:
        torch.square = usual if k == 1.0 else lambda x: k * usual(x)  # type: ignore[assignment]

    return lambda t, u: -torch.square(u.sqrt()), change


def by_class_of_a_library() -> Way:
    act, usual = nn.Identity(), nn.Identity.forward

    def change(k: float) -> None:
        forward = usual if k == 1.0 else lambda self, x: k * x
        nn.Identity.forward = forward  # type: ignore[method-assign]

    return lambda t, u: -act(u), change


def by_thread() -> Way:
    held = threading.local()
    held.k = 1.0
    return lambda t, u: -held.k * u, lambda k: setattr(held, "k", k)


WAYS = [value for name, value in sorted(globals().items()) if name.startswith("by_")]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_a_number_that_has_changed_is_seen(way: Any) -> None:
    globals()["RATE"] = 1.0
    f, change = way()
    for rate in (1.0, 2.0, 1.0):
        change(rate)
        for _ in range(2):  # the second one is prepared
            assert end(f) == decay(rate)


def test_an_object_that_is_met_again_is_not_taken_for_an_empty_one() -> None:
    class Field(nn.Module):
        held: Any = None

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -u * (1.0 if self.held == {} else 2.0)

    f = Field()
    for held, rate in (({}, 1.0), (f, 2.0), ({}, 1.0)):
        f.__dict__["held"] = held
        assert end(f) == decay(rate)


def test_objects_that_have_no_weak_references_go_with_the_field() -> None:
    def run() -> weakref.ref[Any]:
        f, inner = nn.Linear(1, 1, dtype=D), nn.Linear(1, 1, dtype=D)
        f.forward = lambda t, u: -u  # type: ignore[method-assign]
        f.beside = types.SimpleNamespace(inner=inner)  # type: ignore[assignment]
        assert end(f) == decay(1.0)
        return weakref.ref(inner)

    run()  # torch.export keeps the last tensor that it has seen
    gone = run()
    gc.collect()
    assert gone() is None


def test_objects_that_are_nested_too_deeply_are_refused_in_words() -> None:
    whole: list[Any] = []
    inner = whole
    for _ in range(3000):
        inner.append([])
        inner = inner[0]

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -u * len(whole)

    with pytest.raises(psn.CompileError, match="nested too deeply"):
        end(f)


def test_a_thread_sees_its_own() -> None:
    held = threading.local()

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -held.k * u

    def job(rate: float) -> list[float]:
        held.k = rate
        return [end(f) for _ in range(2)]

    assert job(1.0) == [decay(1.0)] * 2
    with ThreadPoolExecutor(1) as other:
        assert other.submit(job, 2.0).result() == [decay(2.0)] * 2
    assert end(f) == decay(1.0)


@pytest.mark.parametrize("kind", [set, dict.fromkeys], ids=["set", "keys"])
def test_zeros_of_either_sign_are_told_apart_in_containers(kind: Callable[..., Any]) -> None:
    holder = Holder()

    def f(t: Tensor, u: Tensor) -> Tensor:
        return torch.atan2(torch.full_like(u, next(iter(holder.k))), -torch.ones_like(u))

    for zero in (0.0, -0.0, 0.0):
        holder.k = kind([zero])
        assert end(f) == pytest.approx(1 + math.copysign(math.pi, zero), rel=1e-7)


READINGS: dict[str, Callable[[Tensor], float]] = {
    "item": lambda x: x.item(),
    "float": float,
    "int": int,
    "words": lambda x: float(f"{x.item():.3f}"),
    "list": lambda x: x.tolist()[0],
}


@pytest.mark.parametrize("used", [False, True], ids=["read", "used"])
@pytest.mark.parametrize("make", [torch.clone, nn.Parameter], ids=["tensor", "parameter"])
@pytest.mark.parametrize("reading", READINGS)
def test_a_tensor_that_python_reads(reading: str, make: Any, used: bool) -> None:
    """`du/dt = -k u`, or `-k^2 u` by an operation with the tensor and a number that is read."""
    k, read = make(torch.ones(1, dtype=D)), READINGS[reading]

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -read(k) * (k if used else 1.0) * u

    for rate in (1.0, 2.0, 2.0, 1.0):
        with torch.no_grad():
            k.fill_(rate)
        assert end(f) == decay(rate**2 if used else rate)


def test_an_argument_with_an_attribute() -> None:
    def f(t: Tensor, u: Tensor, p: Any) -> Tensor:
        return -getattr(p, "alpha", 1.0) * p * u

    p: Any = torch.ones(1, dtype=D)
    assert end(f, p) == decay(1.0)
    p.alpha = 2.0
    with pytest.raises(psn.CompileError, match="another value"):
        end(f, p)
    del p.alpha
    assert end(f, p) == decay(1.0)


def test_a_module_for_an_argument_is_refused_by_name() -> None:
    with pytest.raises(psn.CompileError, match="a p with a module, Linear"):
        end(lambda t, u, p: p(u), nn.Linear(1, 1, dtype=D))


def test_numbers_of_other_classes_in_an_argument() -> None:
    kinds = (np.float64, Real, float, np.float32, np.int64, Fraction, Decimal, complex, Pace)
    for kind in kinds:
        for rate in (1.0, 2.0, 1.0):
            for p in ([kind(rate)], (kind(rate), torch.ones(1, dtype=D))):
                assert end(lambda t, u, p: -float(p[0].real) * u, p) == decay(rate)


def test_zeros_of_either_sign_in_an_argument() -> None:
    for kind in (float, np.float64, np.float32, Decimal, Real):
        for sign in (1.0, -1.0, 1.0):
            zero = kind(math.copysign(0.0, sign))
            assert end(lambda t, u, p: -math.copysign(1.0, p) * u, zero) == decay(sign)


def test_an_object_with_attributes_in_an_argument_is_refused() -> None:
    rate = Real(1.0)
    rate.k = 2.0  # type: ignore[attr-defined]
    with pytest.raises(psn.CompileError, match="an object of the class Real"):
        end(lambda t, u, p: -p.k * u, rate)


def test_a_field_that_asks_how_a_tensor_lies_in_memory() -> None:
    """`du/dt = -u`, twice as fast where a tensor lies by rows."""
    holder = Holder()

    def f(t: Tensor, u: Tensor) -> Tensor:
        return -u * (2 if holder.k.is_contiguous() else 1)

    for rate in (1.0, 2.0, 1.0):
        holder.k = torch.ones(2, 3, dtype=D)
        holder.k = holder.k if rate == 2.0 else holder.k.T.contiguous().T
        for _ in range(2):
            assert end(f) == decay(rate)
