"""Calls of the loops in C, whose requests are filled in C too."""

from __future__ import annotations

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pysciml_node.torch_engine.native.structures import INTEGER, POINTER
from pysciml_node.translation.stable_abi import function_of

IN_REQUEST, BEHIND = -2, -1
"""Numbers of what is not given: an address in the request, or behind it."""

RUNNING = 0
"""What a loop or a sweep returns that has not gone through."""

ALIGNED = 64
"""What is behind a request begins at a multiple of so many bytes, as vectors of C do best."""

# Functions of Python's stable ABI, and objects, in the order of src/crossing.c.
_FUNCTIONS = (
    *("PyBytes_AsString", "PyByteArray_FromStringAndSize", "PyByteArray_AsString"),
    *("PyObject_Type", "PyObject_GetAttr", "PyObject_CallOneArg", "PyLong_AsSsize_t"),
    *("PyErr_Occurred", "PyErr_CheckSignals", "PyEval_SaveThread", "PyEval_RestoreThread"),
    *("PyObject_Size", "PyTuple_GetItem", "PyList_GetItem", "PyList_SetSlice", "PyList_Append"),
    *("PyTuple_New", "PyTuple_SetItem", "PyObject_CallObject", "PyTuple_Pack"),
    *("PyLong_FromSsize_t", "PyByteArray_Resize", "Py_IncRef", "Py_DecRef"),
)
_OBJECTS = (
    *(None, True, False, int, bytearray),
    *("dtype", Tensor.data_ptr, Tensor.is_contiguous, Tensor.is_neg),
    *(Tensor.contiguous, Tensor.new_empty),
)

Block = bytearray
Call = Callable[..., Block | None]
"""A call in C: is given tensors, numbers, blocks of other calls, or `None`, in the order in which
holes name them, and returns the block of its request; `None` where a tensor does not lie as C reads
it."""

TakeSteps = Callable[
    ..., tuple[Block, tuple[Tensor, ...], Tensor | None, Tensor | None, Block | None, int] | None
]
"""A loop that runs to its end: is given for how many steps there is to be room, for how many it is
to keep what a sweep can use, or `None` where there will be none, how many threads may take parts of
a batch, the parts of the initial state, and the parameters. It returns the block of its request,
the parts of the last state, the saved states, for a sweep those at the ends of steps and what is
kept of them, and the number of steps; `None` where it is not for it, or does not end well."""

GIVEN_TO_STEPS = ("saved", "memory", "kept", "kept_room", "threads")
"""What holes of such a loop number, by the names of its request; behind them are the parameters."""

PullBack = Callable[..., tuple[Block, tuple[Tensor | None, ...]] | None]
"""A sweep to its end: is given the shapes of the parts of the initial state, which gradients are
wanted, the states at the ends of steps and the parameters in a tuple, the cotangents that have
arrived, those of the parts of the last state in a tuple, what is kept, seven numbers, and the log.
It returns the block of its request and the gradients of the parts of the initial state and of the
parameters; `None` where it is not for it."""

_cross: Callable[..., Block | None] | None = None
_take_steps: Callable[..., Any] | None = None
_pull_back: Callable[..., Any] | None = None


def use(library: ctypes.CDLL) -> None:
    """Fill requests by a library from now on; where there is no interpreter's lock, in Python.

    Args:
        library: made of src/crossing.c.
    """
    global _cross, _take_steps, _pull_back
    _cross, _take_steps, _pull_back = (
        function_of(library, name, _FUNCTIONS, _OBJECTS)
        for name in ("cross", "take_steps", "pull_back")
    )


class Hole(NamedTuple):
    """A place in a request that each call fills with an address or a number.

    Attributes:
        at: bytes in front of it.
        of: the number of what is given, `IN_REQUEST` or `BEHIND`.
        added: to its address.
        own: whether a tensor is one made for such calls, which lies as C reads it.
    """

    at: int
    of: int
    added: int = 0
    own: bool = False


class Result(NamedTuple):
    """What a sweep writes to a tensor made for it, or to `None`, once it has gone through.

    Attributes:
        to: the number of what is given.
        start: where it lies, in bytes from the first address of the block that is aligned.
        size: in bytes.
    """

    to: int
    start: int
    size: int


class Left(NamedTuple):
    """How what a loop leaves lies in its block, in bytes.

    Attributes:
        status: where the request says how it has ended.
        finite: where it says whether its states are finite.
        accepted: where it has the number of accepted steps.
        first: where it has the address of the initial state.
        last: where it has that of the last one.
        ends: where it has that of the states at the ends of steps, which are behind the steps.
        room: where it has the room for steps, a number.
        steps: where these begin, from the first address that is aligned.
        entries: of a state, a number.
        row: size of a state.
        slot: size of what is kept of a step.
    """

    status: int
    finite: int
    accepted: int
    first: int
    last: int
    ends: int
    room: int
    steps: int
    entries: int
    row: int
    slot: int


def call_of(
    function: Any, start: bytes, dtype: torch.dtype, holes: Sequence[Hole], behind: int = 0
) -> Call:
    """A call of a function of C, which is made once.

    Args:
        function: the function, of ctypes.
        start: the request, which each call begins with a copy of.
        dtype: of the tensors that are given.
        holes: what it lacks.
        behind: bytes behind the request, where `BEHIND` is.
    """
    if _cross is None:
        room = first_behind(len(start)) + behind + ALIGNED
        return partial(_call, function, start, dtype, holes, room)
    return partial(_cross, _packed(function, start, dtype, holes, behind))


def steps_of(
    function: Any,
    start: bytes,
    dtype: torch.dtype,
    holes: Sequence[Hole],
    behind: int,
    left: Left,
    memories: list[Tensor],
    parts: Sequence[tuple[int, ...]],
    saved: tuple[int, ...] | None,
) -> TakeSteps | None:
    """A loop that runs to its end, with what it leaves; `None` where there is no C for it.

    Args:
        function, start, dtype, holes: as of `call_of`.
        behind: bytes between the request and its steps.
        left: how what it leaves lies.
        memories: where memory of the loop is taken from, and given back to.
        parts: shapes of those of a state.
        saved: shape of the saved states, where there are any.
    """
    if _take_steps is None:
        return None
    call = _packed(function, start, dtype, holes, behind)
    item = left.row // left.entries
    laid_out = *left, *(item * math.prod(shape) for shape in parts)
    places = struct.pack(f"{len(laid_out)}n", *laid_out)
    return partial(_take_steps, call, places, memories, tuple(parts), saved)


def pull_of(
    function: Any,
    start: bytes,
    dtype: torch.dtype,
    holes: Sequence[Hole],
    behind: int,
    results: Sequence[Result],
    memories: list[Tensor],
    shapes: Sequence[Sequence[int] | None],
) -> PullBack | None:
    """A sweep that runs to its end, with the gradients; `None` where there is no C for it.

    Args:
        function, start, dtype, holes, behind: as of `call_of`. The holes number the states at the
            ends of steps, three cotangents, memory, what is kept, seven numbers, the log, and the
            gradients.
        results: what it writes to the gradients in the end, those of the parts of the initial
            state first.
        memories: where memory of the sweep is taken from, and given back to.
        shapes: of the parameters that gradients go to, and `None`.
    """
    if _pull_back is None:
        return None
    call = _packed(function, start, dtype, holes, behind, results)
    return partial(_pull_back, call, memories, tuple(shapes))


def _packed(
    function: Any,
    start: bytes,
    dtype: torch.dtype,
    holes: Sequence[Hole],
    behind: int,
    results: Sequence[Result] = (),
) -> bytes:
    """A call as C reads it: `Call` of src/crossing.c."""
    room = first_behind(len(start)) + behind + ALIGNED
    address, counts = ctypes.cast(function, POINTER).value, (len(holes), len(results))
    numbers = [x for row in (*holes, *results) for x in row]
    head = struct.pack(
        f"P2nP2n{len(numbers)}n", address, room, len(start), id(dtype), *counts, *numbers
    )
    return head + start


def first_behind(size: int) -> int:
    """Where what is behind a request of a size begins, counted from an address that is aligned."""
    return -(-size // ALIGNED) * ALIGNED


def aligned(block: Block) -> int:
    """Where the first address in a block lies that is aligned, from its start."""
    return -ctypes.addressof(ctypes.c_char.from_buffer(block)) % ALIGNED


def _call(
    function: Any,
    start: bytes,
    dtype: torch.dtype,
    holes: Sequence[Hole],
    room: int,
    *given: Tensor | Block | int | None,
) -> Block | None:
    """What `cross` of src/crossing.c does."""
    block = Block(room)
    block[: len(start)] = start
    request = ctypes.addressof(ctypes.c_char.from_buffer(block))
    own = {IN_REQUEST: request, BEHIND: request + aligned(block)}
    for at, of, added, _ in holes:
        place = own[of] if of < 0 else _place(given[of], dtype)
        if place is None:
            return None
        INTEGER.from_buffer(block, at).value = place + added
    function(request)
    return block


def _place(x: Tensor | Block | int | None, dtype: torch.dtype) -> int | None:
    if isinstance(x, Tensor):
        lies = x.dtype is dtype and x.is_contiguous() and not x.is_neg()
        return x.data_ptr() if lies else None
    if isinstance(x, Block):
        return ctypes.addressof(ctypes.c_char.from_buffer(x)) + aligned(x)
    return x or 0
