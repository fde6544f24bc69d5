"""Events of native solves: conditions as native code, which a loop looks at after each step."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.steps.event_search import Signs
from pysciml_node.torch_engine.members.crossings import Crossings
from pysciml_node.torch_engine.native.emit import Emitter
from pysciml_node.torch_engine.native.library import Code, header, source
from pysciml_node.torch_engine.native.structures import DOUBLE, INTEGER, POINTER, fields
from pysciml_node.torch_engine.native.text import padded
from pysciml_node.translation.export import TranslatedModule, translate_condition
from pysciml_node.translation.first import At
from pysciml_node.translation.program import Program


class EventRequest(ctypes.Structure):
    """`Event` of src/solve.h."""

    _fields_ = (
        *fields(POINTER, "condition packed memory"),
        ("width", DOUBLE),
        *fields(INTEGER, "direction open"),
        *fields(DOUBLE, "before after"),
    )


class Condition(Code):
    """Native code of an event's condition.

    Args:
        program: the condition.
        dtype: of the state.
    """

    def __init__(self, program: Program, dtype: torch.dtype) -> None:
        emitter = Emitter(program)
        emitted = emitter.emit()
        self.memory = padded(emitter.work.size)
        parts = (
            header(dtype),
            f"enum {{ ROW = {padded(1)} }};",
            emitted.source,
            source("condition.h"),
        )
        calls = {
            "condition": (DOUBLE, DOUBLE, POINTER, POINTER, POINTER),
            "prepare": (None, POINTER, POINTER),
        }
        super().__init__(dtype, "\n".join(parts), emitted.packed, calls)

    @property
    def address(self) -> int | None:
        """Where the function lies that gives its value."""
        return ctypes.cast(self.loaded.condition, POINTER).value


@functools.lru_cache(maxsize=256)
def _condition(json: str, dtype: torch.dtype) -> list[Condition]:
    """Room for a condition, found by what it is made of."""
    return []


def _condition_of(translated: TranslatedModule, dtype: torch.dtype) -> Condition:
    """The native code of a translated condition, made once in a process."""
    place = _condition(translated.json, dtype)
    if not place:
        place.append(Condition(translated.program, dtype))
    return place[0]


@dataclass(frozen=True)
class Watched:
    """An event whose condition is native code.

    Attributes:
        event: the event.
        condition: the code.
        parameters: the tensors that the condition reads.
    """

    event: Event
    condition: Condition
    parameters: list[Tensor]

    def request(self, packed: Tensor, memory: Tensor, eps: float) -> EventRequest:
        """What C is told of it.

        Args:
            packed: its parameters.
            memory: for its evaluations.
            eps: of the state's dtype.
        """
        return EventRequest(
            condition=self.condition.address,
            packed=packed.data_ptr(),
            memory=memory.data_ptr(),
            width=max(self.event.xtol or 0.0, 4 * eps),
            direction=self.event.direction,
        )

    def memory(self) -> Tensor:
        """Memory for evaluations in one thread."""
        return torch.zeros(self.condition.memory, dtype=self.condition.dtype, device="cpu")


def watched(event: Event, problem: ODEProblem) -> Watched:
    """An event of the solve of a problem.

    Raises:
        UnsupportedModule: its condition cannot be translated.
    """
    assert event.condition is not None
    spec = problem.spec
    translated = translate_condition(event.condition, spec, At.start_of(problem))
    return Watched(event, _condition_of(translated, spec.dtype), translated.parameters)


class Search:
    """What a loop in C is told of the events that it looks for; it keeps alive what C reads.

    Whether a condition is zero at the start is a question of the last bit, so Python answers it.

    Args:
        events: the events.
        problem: that is solved.
        fired: which events have just happened at the start.

    Attributes:
        count: how many there are.
    """

    def __init__(
        self, events: Sequence[Watched], problem: ODEProblem, fired: Sequence[int]
    ) -> None:
        signs = Signs(problem, [one.event for one in events], fired)
        eps = torch.finfo(problem.spec.real_dtype).eps
        self.count = len(events)
        self._requests = (EventRequest * self.count)()
        self._kept: list[Tensor] = []
        for i, one in enumerate(events):
            packed, memory = one.condition.pack(one.parameters), one.memory()
            self._kept += [packed, memory]
            request = one.request(packed, memory, eps)
            request.open, request.before = i in signs.unsettled, signs.before[i]
            self._requests[i] = request

    @property
    def address(self) -> int:
        """Where C finds them."""
        return ctypes.addressof(self._requests)


class MembersSearch:
    """What a loop over members in C is told of the events that it looks for.

    Args:
        events: the events.
        crossings: their signs at the starts; they are told which events have ended members.

    Attributes:
        count: how many there are.
        before: the conditions at the starts, `(M, E)`.
        open: whether it is not known with which signs they leave them, `(M, E)`.
        found: the event that has ended each member, or -1, `(M,)`.
    """

    def __init__(self, events: Sequence[Watched], crossings: Crossings) -> None:
        self._events, self.count = events, len(events)
        self.crossings = crossings
        self.before = np.array(crossings.before, order="C")  # C writes into it
        self.open = crossings.unsettled.astype(np.int64)
        self.found = crossings.first
        self._kept: list[Any] = []

    def requests(self, threads: int, lanes: int) -> int:
        """Where C finds the events of every lane of every thread; they are kept alive."""
        eps = torch.finfo(self.crossings.spec.real_dtype).eps
        requests = (EventRequest * (threads * lanes * self.count))()
        packed = [one.condition.pack(one.parameters) for one in self._events]
        self._kept = [requests, packed]
        for thread in range(threads):
            for i, one in enumerate(self._events):
                memory = one.memory()
                self._kept.append(memory)
                request = one.request(packed[i], memory, eps)
                first = thread * lanes * self.count + i
                for at in range(first, first + lanes * self.count, self.count):
                    requests[at] = request
        return ctypes.addressof(requests)
