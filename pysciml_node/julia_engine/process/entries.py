"""The functions that Julia offers, called by the names of their arguments.

Their fields are written once, in `julia/src/entries.json`: in order, with the kind of each. Julia
checks its methods against that table when it compiles them.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import Tensor

from pysciml_node.julia_engine.process import env, runtime
from pysciml_node.julia_engine.process.handles import Handle

Field = tuple[str, Callable[[Any], Any]]


def _tensor(x: Tensor | None) -> int:
    """The address of a tensor's numbers; 0 for `None`."""
    if x is None:
        return 0
    if not x.is_contiguous():
        raise ValueError(f"Julia reads contiguous memory, but the strides are {x.stride()}.")
    return x.data_ptr()


def _array(code: str) -> Callable[[array[Any] | None], int]:
    """A function that gives the addresses of arrays of one type, and 0 for `None`."""

    def address(x: array[Any] | None) -> int:
        if x is None:
            return 0
        if x.typecode != code:
            raise ValueError(f"an array of type {code!r} is expected, but it is {x.typecode!r}.")
        return x.buffer_info()[0]

    return address


def _handle(x: Handle) -> int:
    return x.number


KINDS: dict[str, Callable[[Any], Any]] = {
    "handle": _handle,
    "whole": int,
    "number": float,
    "flag": bool,
    "text": str,
    "function": lambda x: x,
    "tensor": _tensor,
    "numbers": _array("d"),
    "integers": _array("q"),
}
"""How an argument of each kind crosses to Julia."""


@cache
def table() -> dict[str, tuple[bool, tuple[Field, ...]]]:
    """For each entry, whether it runs for long, and its fields."""
    text = (env.bundled_project() / "src" / "entries.json").read_text(encoding="utf-8")
    entries: dict[str, tuple[bool, tuple[Field, ...]]] = {}
    for name, kinds in json.loads(text).items():
        long = "descriptor" in kinds.values()
        fields = tuple((key, KINDS[kind]) for key, kind in kinds.items() if kind != "descriptor")
        entries[name] = (long, fields)
    return entries


def enter(
    entry: str,
    *,
    wrap: Callable[[Any], Any] | None = None,
    release: bool = True,
    **given: Any,
) -> Any:
    """Call an entry of the table.

    The arguments stay alive until Julia returns.

    Args:
        entry: its name.
        wrap: called with the result, before Ctrl-C can raise.
        release: whether other Python threads may run meanwhile, where the entry runs for long.
        **given: its fields, all of them.

    Raises:
        TypeError: fields are missing, or unknown.
        JuliaError: Julia raised.
        KeyboardInterrupt: Ctrl-C, once Julia has stopped.
    """
    long, fields = table()[entry]
    try:
        arguments = [convert(given[name]) for name, convert in fields]
    except KeyError:
        arguments = []
    if len(arguments) != len(given) or len(given) != len(fields):
        expected = ", ".join(name for name, _ in fields)
        raise TypeError(f"{entry} takes {expected}, but was given {', '.join(given)}.")
    if long:
        return runtime.call_released(entry, *arguments, wrap=wrap, release=release)
    result = runtime.call(entry, *arguments)
    return result if wrap is None else wrap(result)
