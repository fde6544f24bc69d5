"""Single steps of a solve that are taken again by native code, as one node of the graph."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.problems.modes import ordinary_modes, uncompiled
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.autograd import graph_is_retained, pulled, saved_tensors_stay
from pysciml_node.torch_engine.native.departure import Departure
from pysciml_node.torch_engine.native.library import Library, addresses
from pysciml_node.torch_engine.native.run import RUNNING
from pysciml_node.torch_engine.native.structures import DOUBLE, INTEGER, POINTER, fields

Again = Callable[[Sequence[float]], Sequence[Tensor]]


class TakenRequest(ctypes.Structure):
    """`Taken` of src/taken.h."""

    _fields_ = (
        *fields(POINTER, "solve back starts steps norms errors stiffness"),
        *fields(POINTER, "errors_bar stiffness_bar starts_bar"),
        *fields(INTEGER, "count n anywhere constant"),
    )


@dataclass(eq=False)
class TakenSteps:
    """Steps from states that are given.

    Args:
        library: native code of the field and of a method.
        departure: how a solve with it begins.
        interval: where steps begin and end, and times are kept inside.
        steps: start and size of each. A size of NaN is Hairer's first one.
        places: of each output of dense output the step, in their order, and where in it it lies.
        estimated: whether error and stiffness of the steps are estimated, too.
        anywhere: whether the one step begins where no step of a solve did.
        constant: whether no gradients flow through the first stage.
        stats: count the evaluations.
        again: from their sizes to the outputs with a graph of torch's, which has further
            derivatives; without it, of states that a solve has left, and of weights that are
            tied, these are refused.

    Attributes:
        sizes: of the steps, once they are taken.
    """

    library: Library
    departure: Departure
    interval: tuple[float, float]
    steps: Sequence[tuple[float, float]]
    parameters: Sequence[Tensor]
    stats: Stats
    places: Sequence[tuple[int, float]] = ()
    estimated: bool = False
    anywhere: bool = False
    constant: bool = False
    again: Again | None = None
    sizes: list[float] = field(init=False)
    _taken: TakenRequest = field(init=False)
    _alive: tuple[Any, ...] = field(init=False)
    # The packed parameters, and the ends of the steps.
    _block: Tensor = field(init=False)
    _kept: Tensor | None = field(init=False, default=None)

    def __call__(self, states: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Take the steps.

        Args:
            states: at their starts, each `(N,)`.

        Returns:
            The outputs `(m, N)`; or error and stiffness of each step `(count,)`, of one that begins
            anywhere `()`.
        """
        if not torch.is_grad_enabled():
            return self.take(states, False)
        outputs: tuple[Tensor, ...] = _as_node(self, len(states), *states, *self.parameters)
        return outputs

    @property
    def ends(self) -> Tensor:
        """Where the steps have ended, `(count, N)`."""
        library = self.library
        return self._block[library.packed_size :].view(-1, library.size)

    def take(self, states: Sequence[Tensor], keeps: bool) -> tuple[Tensor, ...]:
        """The same without a graph.

        Args:
            states: at the starts.
            keeps: whether stages are kept for `pull`.
        """
        library, count, outputs = self.library, len(self.steps), len(self.places)
        starts, shape = self._starts(states), () if self.anywhere else (count,)
        kept_room = min(count, self.departure.most_kept) if keeps else 0
        kept = self._kept = starts.new_empty(kept_room * library.slot) if kept_room else None
        block = self._block = starts.new_empty(library.packed_size + count * library.size)
        found: tuple[Tensor, ...]
        if self.estimated:
            found = starts.new_empty(shape), starts.new_empty(shape)
        else:
            found = (starts.new_empty((outputs, library.size)),)
        at = [x.data_ptr() for x in found]
        saved, errors, stiffness = (0, *at) if self.estimated else (*at, 0, 0)
        steps = (DOUBLE * (2 * count))(*chain.from_iterable(self.steps))
        places = (DOUBLE * (2 * outputs))(*chain.from_iterable(self.places))
        norms = (DOUBLE * (4 * count))()
        lying = library.all_lying(self.parameters)
        tensors, memory = addresses(lying), library.take_memory(library.march_memory)
        request = self.departure.request()
        (request.t0, request.t1), request.dt0 = self.interval, math.nan
        request.save_count = outputs
        request.threads = library.threads
        packed = block.data_ptr()
        request.put(
            0,
            ctypes.addressof(tensors),
            packed,
            packed + library.start_at,
            saved,
            0,
            0,
            ctypes.addressof(places),
            memory.data_ptr(),
            0 if kept is None else kept.data_ptr(),
            0,
            kept_room,
        )
        self._alive = request, steps, places, norms
        self._taken = taken = TakenRequest(
            solve=ctypes.addressof(request),
            starts=starts.data_ptr(),
            steps=ctypes.addressof(steps),
            norms=ctypes.addressof(norms),
            errors=errors,
            stiffness=stiffness,
            count=count,
            anywhere=self.anywhere,
            constant=self.constant,
        )
        while library.take(taken) == RUNNING:
            pass
        library.give_memory(memory)
        self.sizes = steps[1::2]
        self.stats.nfe += request.evaluations
        return found

    def pull(
        self,
        states: Sequence[Tensor],
        parameters: Sequence[Tensor | None],
        wanted: Sequence[bool],
        *arriving: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        """Cotangents of states and parameters, of those that are wanted.

        Args:
            states: as those that the steps were taken from.
            parameters: likewise.
            wanted: of which there are any.
            arriving: cotangents of what `take` returns.
        """
        library, count, kept = self.library, len(self.steps), self._kept
        starts, (_, _, places, _) = self._starts(states), self._alive
        lying = [None if x is None else library.lying(x) for x in arriving]
        at = [0 if x is None else x.data_ptr() for x in lying]
        saved, errors, stiffness = (0, *at) if self.estimated else (*at, 0, 0)
        back = self.departure.request_back()
        back.t0, back.t1 = self.interval
        back.threads, back.reached = library.threads, len(self.places)
        bars = starts.new_empty(library.packed_size + count * library.size)
        left, memory = bars.data_ptr(), library.take_memory(library.sweep_memory)
        back.put(
            starts.data_ptr(),
            self._block.data_ptr(),
            0,
            ctypes.addressof(places),
            saved,
            0,
            0,
            0,
            left,
            0,
            0,
            0,
            memory.data_ptr(),
            0 if kept is None else kept.data_ptr(),
            count,
            0,
            count,
            len(self.places) - 1,
            0 if kept is None else len(kept) // library.slot,
        )
        # Each sweep has a request of its own: several threads may go through one graph.
        taken = TakenRequest.from_buffer_copy(self._taken)
        taken.back, taken.starts = ctypes.addressof(back), starts.data_ptr()
        taken.errors_bar, taken.stiffness_bar = errors, stiffness
        taken.starts_bar = left + library.start_at
        while library.pull_back(taken) == RUNNING:
            pass
        library.give_memory(memory)
        self.stats.nfe_backward += back.evaluations
        of_states: list[Tensor | None] = [None] * count
        if any(wanted[:count]):
            rows = bars[library.packed_size :].view(count, library.size)
            of_states = [x if needed else None for x, needed in zip(rows, wanted, strict=False)]
        return (*of_states, *library.cotangents(bars, parameters, wanted[count:]))

    def _starts(self, states: Sequence[Tensor]) -> Tensor:
        """The states in one piece."""
        if len(states) == 1:
            return self.library.lying(states[0])
        return torch.stack([x.detach() for x in states])

    def release(self) -> None:
        """Let go of what was kept for `pull`."""
        self._kept = None


class _Node(torch.autograd.Function):
    """Steps that are taken again, in the graph."""

    @staticmethod
    @override
    def forward(ctx: Any, steps: TakenSteps, count: int, *sources: Tensor) -> tuple[Tensor, ...]:
        keeps = any(ctx.needs_input_grad) and saved_tensors_stay()
        outputs = steps.take(sources[:count], keeps)
        ctx.steps, ctx.count = steps, count
        ctx.save_for_backward(*sources)
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *arriving: Tensor | None) -> tuple[Any, ...]:
        needed, steps = ctx.needs_input_grad, ctx.steps
        if all(x is None for x in arriving):
            return (None,) * len(needed)
        sources, wanted = ctx.saved_tensors, needed[2:]
        once = len(set(map(id, steps.parameters))) == len(steps.parameters)
        further = torch.is_grad_enabled() and once and _stand_apart(sources, wanted)
        if further and steps.again is not None:
            with ordinary_modes(sources[0].device):
                outputs = steps.again(steps.sizes)
                return (None, None, *_by_torch(outputs, sources, wanted, arriving))
        states, parameters = sources[: ctx.count], sources[ctx.count :]
        pull = partial(steps.pull, states, parameters, wanted)
        gradients = pulled(pull, sources, *arriving)
        if not graph_is_retained():
            steps.release()
        return (None, None, *gradients)


# Without what torch does for its transforms, in which steps are taken again in Python.
_as_node: Callable[..., Any] = super(torch.autograd.Function, _Node).apply


def _stand_apart(sources: Sequence[Tensor], wanted: Sequence[bool]) -> bool:
    """Whether none that is wanted depends on another, through which torch would count it twice."""
    followed = [x for x, needed in zip(sources, wanted, strict=True) if needed]
    return len(followed) == 1 or all(x.is_leaf for x in followed)


def _by_torch(
    outputs: Sequence[Tensor],
    sources: Sequence[Tensor],
    wanted: Sequence[bool],
    arriving: Sequence[Tensor | None],
) -> list[Tensor | None]:
    """Gradients that have a graph of their own."""
    pairs = zip(outputs, arriving, strict=True)
    known = [(x, bar) for x, bar in pairs if bar is not None and x.requires_grad]
    if not known:
        return [None] * len(sources)
    followed = [x for x, needed in zip(sources, wanted, strict=True) if needed]
    outputs, bars = zip(*known, strict=True)
    found = torch.autograd.grad(outputs, followed, bars, create_graph=True, allow_unused=True)
    gradients = iter(found)
    return [next(gradients) if needed else None for needed in wanted]
