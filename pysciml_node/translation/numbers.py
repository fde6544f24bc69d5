"""Numbers in a field's extra argument, read as tensors are: other ones need no other program."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable
from operator import is_
from typing import Any, TypeVar

import numpy as np
import torch

from pysciml_node.errors import PsnWarning, UnsupportedModule
from pysciml_node.problems.state import StateSpec

Made = TypeVar("Made")

_MANY = 8
"""Programs of a field that differ in numbers alone, after which its author is told."""

_NUMBER = re.compile(r"-?\d+(\.\d+(e[+-]?\d+)?|e[+-]?\d+)")
"""A real number in the text of a program."""


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


def tell_of_numbers(name: str, program: str, earlier: list[str]) -> None:
    """Warn where a field has become another program for each number that it captures.

    Args:
        name: of the field in messages.
        program: the one that has just been made, as text.
        earlier: those that were made of the field before.
    """
    form = _NUMBER.sub("", program)
    others = {text for text in earlier if text != program and _NUMBER.sub("", text) == form}
    if len(others) == _MANY - 1:
        warnings.warn(
            f"{name} has been translated {_MANY} times for other numbers each time, and code is "
            "made for each.\n  Write a tensor for a number that changes from solve to solve, in p "
            "or captured: its entries are read at each solve.",
            PsnWarning,
            stacklevel=2,
        )


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
