"""What objects hold that are not looked into: those written in C, and those of libraries."""

from __future__ import annotations

import contextvars
import ctypes
import gc
import logging
import random
import threading
import types
import weakref
from collections.abc import Iterable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.errors import SolverFailure
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution
from pysciml_node.steps.record import Recorded

# They hold nothing.
SIMPLE = (
    *(int, float, complex, bool, str, bytes, type(None), type(Ellipsis), range, np.generic),
    *(torch.dtype, torch.device, torch.Size, torch.layout, types.ModuleType, types.CodeType),
)
# Large objects that a field does not read from, although it may reach them.
APART: tuple[type, ...] = (
    *(Solution, EnsembleSolution, Recorded, SolverFailure),
    torch.optim.Optimizer,
    torch.optim.lr_scheduler.LRScheduler,
    torch.utils.data.DataLoader,
    torch.utils.data.Dataset,
    torch.autograd.graph.Node,
)

# Memory that stays where it is as long as something else looks at it.
MEMORY: tuple[type[Any], ...] = (memoryview, ctypes.Array, ctypes.Structure, torch.UntypedStorage)

# What draws random numbers in Python and NumPy.
_STREAMS = (random.Random, np.random.RandomState, np.random.Generator)


def is_stream(value: Any) -> bool:
    """Whether random numbers are drawn from an object, and it can say how far it has come."""
    return isinstance(value, _STREAMS) and not isinstance(value, random.SystemRandom)


# They lead to all others of their kind.
_ALOOF = (logging.Filterer, threading.Thread)


def held_by(value: Any) -> Iterable[Any]:
    """The objects that an object holds, by what the garbage collector knows of it.

    Nothing is called that is not of Python itself. A module's dict is passed over: whoever holds a
    function holds that, too.
    """
    if isinstance(value, _ALOOF):
        return ()
    if isinstance(value, weakref.ReferenceType):
        return (weakref.ReferenceType.__call__(value),)
    if isinstance(value, contextvars.ContextVar):
        return (value.get(None),)
    if isinstance(value, threading.local):
        return tuple(vars(value).values())
    if isinstance(value, torch.UntypedStorage):
        with torch.no_grad():
            return (torch.empty(0, dtype=torch.uint8, device=value.device).set_(value),)
    if isinstance(value, MEMORY):
        with suppress(ValueError, BufferError):  # released, empty, or in pieces
            return (np.frombuffer(memoryview(value), np.uint8),)
        return ()
    return [x for x in gc.get_referents(value) if type(x) is not dict or "__builtins__" not in x]


def without_graph(x: Tensor) -> Tensor:
    """A tensor in the same memory that keeps no other object alive."""
    # Classes of others may run code at any operation.
    with torch._C.DisableTorchFunctionSubclass():
        return Tensor.detach(x)
