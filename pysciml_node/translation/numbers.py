"""Numbers in a field's extra argument, read as tensors are: other ones need no other program."""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from operator import is_
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from pysciml_node.errors import PsnWarning, UnsupportedModule
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.translation.check import has_values, have_same_values
from pysciml_node.translation.program import Program
from pysciml_node.translation.recent import Recent
from pysciml_node.translation.saved import numbers_put_back

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


class Compared:
    """For which numbers a program that reads them as tensors has its field's values.

    A field may ask what a number is, `isinstance(p, float) and p < 0`, look it up in a dict, or try
    what it does with a tensor in another way: a trace shows nothing of that. And beside truths
    alone, `(u > 0) * p`, torch rounds a number to single precision. So each other number is
    compared once.
    """

    def __init__(self, program: Program) -> None:
        self._program = program
        self._known: Recent[tuple[str, ...], bool] = Recent(256)

    def holds(
        self, f: Callable[..., Any], spec: StateSpec, p: Any, read: Any, parameters: list[Tensor]
    ) -> bool:
        """Whether the program has the field's values for the numbers of an extra argument.

        Args:
            f: the field.
            spec: structure of the state.
            p: the extra argument.
            read: the same as the program reads it.
            parameters: the tensors that the program reads, perhaps with others behind them.
        """
        if read is p:
            return True
        numbers = tuple(_numbers(p))
        known = self._known.get(numbers)
        if known is None:
            with Surroundings.undisturbed():
                known = self._known[numbers] = self._compare(f, spec, p, read, parameters)
        return known

    def has_held(self, p: Any) -> bool:
        """Whether it has been found to have them for the numbers of an extra argument."""
        return self._known.get(tuple(_numbers(p))) is True

    def _compare(
        self, f: Callable[..., Any], spec: StateSpec, p: Any, read: Any, parameters: list[Tensor]
    ) -> bool:
        def flat(given: Any, t: Tensor, u: Any) -> Tensor:
            out = f(t, u, given)
            return out.reshape(-1) if isinstance(out, Tensor) else spec.flatten(out)

        parameters = parameters[: len(self._program.parameters)]
        surroundings = Surroundings({"f": f, "p": p})
        try:
            with torch.no_grad(), numbers_put_back(surroundings.tensors):
                with_numbers, with_tensors = (partial(flat, x) for x in (p, read))
                return have_same_values(
                    with_numbers, with_tensors, spec, self._program
                ) and has_values(with_numbers, spec, self._program, parameters)
        except Exception:  # what it is, a solve with the number itself says
            return False
        finally:
            if not surroundings.lazy:
                surroundings.put_back()


def _numbers(x: Any) -> Iterator[str]:
    """The numbers of an extra argument that are read as tensors, with their signs."""
    kind = type(x)
    if kind is float or kind is np.float64:
        yield float(x).hex()
    elif kind is dict or isinstance(x, list | tuple):
        for part in x.values() if kind is dict else x:
            yield from _numbers(part)


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
