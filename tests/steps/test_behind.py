"""What only an object that is not looked into holds: a change of it is refused all the same."""

from __future__ import annotations

import contextvars
import ctypes
import functools
import itertools
import math
import queue
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy.interpolate import PPoly
from torch import Tensor

import pysciml_node as psn
from pysciml_node.steps.known import walk_from

D = torch.float64
Read = Callable[[], Any]


def _again_and_again(x: Tensor) -> Iterator[Tensor]:
    while True:
        yield x


def _iterator(made: Iterator[Any]) -> Read:
    return lambda: next(made)


def _weak(x: Tensor) -> Read:
    reference = weakref.ref(x)
    return lambda: reference()


def _weak_values(x: Tensor) -> Read:
    table = weakref.WeakValueDictionary({"x": x})
    return lambda: table["x"]


def _proxy(x: Tensor) -> Read:
    table = types.MappingProxyType({"x": x})
    return lambda: table["x"]


def _frame(x: Tensor) -> Read:
    def made() -> types.FrameType:
        x.numel()
        return sys._getframe()

    frame = made()
    return lambda: frame.f_locals["x"]


def _local(x: Tensor) -> Read:
    local = threading.local()
    local.x = x
    return lambda: local.x


def _queue(x: Tensor) -> Read:
    line: queue.Queue[Tensor] = queue.Queue()
    line.put(x)
    return lambda: line.queue[0]


def _context(x: Tensor) -> Read:
    variable: contextvars.ContextVar[Tensor] = contextvars.ContextVar("x")
    variable.set(x)
    return variable.get


def _c_object(x: Tensor) -> Read:
    held = ctypes.py_object(x)
    return lambda: held.value


def _c_memory(x: Tensor) -> Read:
    held = (ctypes.c_double * 1).from_address(x.data_ptr())
    return lambda: held[0]


def _view(x: Tensor) -> Read:
    held = memoryview(x.numpy())
    return lambda: held[0]


def _storage(x: Tensor) -> Read:
    held = x.untyped_storage()
    return lambda: torch.empty(0, dtype=D).set_(held)


def _spline(x: Tensor) -> Read:
    constant = PPoly.construct_fast(x.numpy().reshape(1, 1), np.array([0.0, 1.0]))
    return lambda: float(constant(0.5))


def _in_class(x: Tensor) -> Read:
    class Holder:
        held = itertools.repeat(x)

    return lambda: next(Holder.held)


HOLDERS: dict[str, Callable[[Tensor], Read]] = {
    "partial": lambda x: functools.partial(torch.clone, x),
    "bound method": lambda x: x.clone,
    "method of a list": lambda x: functools.partial([x].__getitem__, 0),
    "repeat": lambda x: _iterator(itertools.repeat(x)),
    "cycle": lambda x: _iterator(itertools.cycle([x])),
    "map": lambda x: _iterator(map(torch.clone, itertools.repeat(x))),
    "chain": lambda x: _iterator(itertools.chain.from_iterable(itertools.repeat((x,)))),
    "generator": lambda x: _iterator(_again_and_again(x)),
    "weak reference": _weak,
    "weak values": _weak_values,
    "proxy of a dict": _proxy,
    "frame": _frame,
    "local of a thread": _local,
    "queue": _queue,
    "variable of a context": _context,
    "object of ctypes": _c_object,
    "memory of ctypes": _c_memory,
    "view of memory": _view,
    "storage": _storage,
    "spline": _spline,
    "attribute of a class": _in_class,
}

# Of these the field reads a copy, or a number, and a graph of the solve has kept that.
COPIES = ("partial", "bound method", "map", "memory of ctypes", "view of memory", "spline")


def field_of(read: Read, rate: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """What is read matters between the ends of the interval, and not at them."""

    def field(t: Tensor, u: Tensor) -> Tensor:
        within = torch.sin(math.pi * t) ** 2
        if within.ndim:
            within = within.unsqueeze(-1)
        return -(rate * u) - within * (read() * u)

    return field


WAYS = {
    "one, discrete": (False, psn.DiscreteAdjoint()),
    "one, direct": (False, psn.DirectAdjoint()),
    "one, back": (False, psn.BacksolveAdjoint()),
    "members, back": (True, psn.BacksolveAdjoint()),
    "members, Gauss": (True, psn.GaussAdjoint()),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("holder", HOLDERS)
def test_a_change_of_what_is_held_out_of_sight_is_refused(holder: str, way: str) -> None:
    """`u1 = exp(-(rate + x / 2))`, whose derivative in `rate` is `-u1`."""
    x, rate = torch.tensor([0.7], dtype=D), torch.tensor(0.5, dtype=D, requires_grad=True)
    field, u0 = field_of(HOLDERS[holder](x), rate), torch.ones(1, dtype=D)
    members, adjoint = WAYS[way]
    one = psn.ODEProblem(field, u0, (0.0, 1.0))
    problem = psn.EnsembleProblem(one, u0=u0.expand(2, 1)) if members else one
    u1 = psn.solve(problem, rtol=1e-4, atol=1e-4, adjoint=adjoint).u1
    (slope,) = torch.autograd.grad(u1[0].sum(), rate, retain_graph=True)
    assert slope.item() == pytest.approx(-math.exp(-0.85), rel=1e-3)
    x.data.fill_(3.0)
    if way == "one, direct" and holder in COPIES:
        (again,) = torch.autograd.grad(u1[0].sum(), rate)
        assert again.item() == slope.item()
        return
    with pytest.raises(RuntimeError, match=r"changed in place|could not reproduce"):
        torch.autograd.grad(u1[0].sum(), rate)


def test_what_is_found_there_is_neither_put_back_nor_kept_alive() -> None:
    x = torch.ones(1, requires_grad=True) * 2
    held = itertools.repeat([x])
    walk = walk_from({"f": lambda t, u: next(held)[0] * u, "p": None})
    assert not any(value is x for place in walk.places for value in place.values())
    assert [a.data_ptr() for a in walk.arrays] == [x.data_ptr()]
    assert not walk.arrays[0].requires_grad
    assert walk.names[id(walk.arrays[0])] == "held[0]"
