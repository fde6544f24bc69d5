"""Numbers in a field's extra argument, read as tensors are: other ones need no other program."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from operator import is_
from typing import Any, TypeVar

import numpy as np
import torch

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec

Made = TypeVar("Made")


def ways_to_read(p: Any, spec: StateSpec) -> tuple[Any, ...]:
    """An extra argument with a tensor for each of its numbers, if it has any, and as it is.

    In double precision alone, which Python computes in too. Whole numbers stay: they count, and are
    indices and exponents.
    """
    if p is None or spec.dtype is not torch.float64:
        return (p,)
    read = _read(p, spec.device)
    return (p,) if read is p else (read, p)


def first_to_succeed(p: Any, spec: StateSpec, make: Callable[[Any], Made]) -> Made:
    """What is made of an extra argument, read in the first way in which that can be done.

    Where a field hands a number to Python, `math.sin(p)`, it is a part of the program.
    """
    *before, last = ways_to_read(p, spec)
    for read in before:
        with contextlib.suppress(UnsupportedModule):
            return make(read)
    return make(last)


def _read(x: Any, device: torch.device) -> Any:
    kind = type(x)
    if kind is float or kind is np.float64:
        return torch.tensor(x, dtype=torch.float64, device=device)
    if kind is dict:
        parts = _read(list(x.values()), device)
        return x if all(map(is_, parts, x.values())) else dict(zip(x, parts, strict=True))
    named = kind.__base__ is tuple and hasattr(kind, "_fields")
    if not (kind is list or kind is tuple or named):
        return x
    parts = [_read(part, device) for part in x]
    if all(map(is_, parts, x)):
        return x
    return kind._make(parts) if named else kind(parts)
