"""A native solve of members in the graph, whatever their equation is."""

from __future__ import annotations

import dataclasses
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.options import Array, MemberOptions
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.modes import uncompiled
from pysciml_node.problems.state import moves
from pysciml_node.steps.autograd import pulled
from pysciml_node.torch_engine.native.events import MembersSearch
from pysciml_node.torch_engine.native.library import Library
from pysciml_node.torch_engine.native.member_library import MemberLibrary
from pysciml_node.torch_engine.native.member_run import (
    Flights,
    Passengers,
    Scales,
)
from pysciml_node.torch_engine.native.member_sweep import SweptMembers
from pysciml_node.torch_engine.native.prepared import refusal


def check_times(times: Iterable[Any], options: MemberOptions) -> None:
    """Refuse times that receive gradients, and a progress bar.

    Raises:
        CompileError: as said.
    """
    every = (*times, options.common.saveat_tensor)
    if torch.is_grad_enabled() and any(x is not None and moves(x) for x in every):
        raise refusal("gradients of times for members")
    if options.common.progress:
        raise refusal("a progress bar over members", "progress=False")


@dataclass
class MembersSolve:
    """A native solve of all members: run by `_Node`, or alone where no gradient is asked for.

    Attributes:
        ensemble: what is solved.
        options: of all, and of each.
        own: of each parameter of the code, whether it is each member's own.
        swept: what sweeps have cost each member, by the columns of `NativeMembers.swept`.
        search: the events that are watched.
        library: the code that reads all parameters.
    """

    ensemble: EnsembleProblem
    options: MemberOptions
    own: list[bool]
    swept: Array
    search: MembersSearch | None
    library: Library | MemberLibrary

    @abstractmethod
    def run(self, u0: Tensor, parameters: Sequence[Tensor]) -> Flights:
        """Solve forward."""

    @abstractmethod
    def sweep(self, flights: Flights, *arriving: Tensor | None) -> SweptMembers:
        """Pull the cotangents of saved states, of steps' ends and of the last states back."""

    def fly(
        self, u0: Tensor, parameters: Sequence[Tensor]
    ) -> tuple[Flights, tuple[Tensor, Tensor, Tensor]]:
        """Solve forward; with the saved states, those at the ends of steps and the last ones, in
        the graph where gradients are recorded.
        """
        if not torch.is_grad_enabled():
            flights = self.run(u0, parameters)
            return flights, (flights.saved, flights.ends, flights.last)
        keep: list[Flights] = []
        tensors = _Node.apply(  # type: ignore[no-untyped-call]
            self, keep, u0, self.ensemble.tspan, *parameters
        )
        return keep[0], tensors

    def passengers(
        self, u0: Tensor, own: Sequence[Tensor], size: int, free: bool = False
    ) -> Passengers:
        """What the members start with.

        Args:
            u0: what is stepped, `(M, N)`.
            own: the parameters that are their own, as C reads them.
            size: entries of a state, the first ones of what is stepped.
            free: whether the ends of the intervals receive gradients.
        """
        options, common, saveat = self.options, self.options.common, self.options.saveat
        # Aliases could be changed in place before they are replayed.
        start = u0.detach().clone(memory_format=torch.contiguous_format)
        spans = options.spans
        if self.ensemble.tspan is None:
            spans = (spans[0][:1], spans[1][:1])
        if saveat is None and common.saveat:
            saveat = np.array([common.saveat], dtype=np.float64)
        elif saveat is not None:
            saveat = np.ascontiguousarray(saveat)
        scales = Scales.of(common, options.rtol, options.atol, start[:, :size])
        return Passengers(start, *spans, saveat, scales, own, free, options.spent)


class _Node(torch.autograd.Function):
    """A solve of members in the graph: saved states, states at the ends of the steps, the last."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        solve: MembersSolve,
        keep: list[Flights],
        u0: Tensor,
        tspan: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor, ...]:
        flights = solve.run(u0, parameters)
        keep.append(flights)
        # Without the outputs, which hold on to this node.
        nothing = u0.new_empty(0)
        ctx.solve = solve
        ctx.flights = dataclasses.replace(flights, ends=nothing, saved=nothing, last=nothing)
        ctx.save_for_backward(flights.ends, u0, tspan, *parameters)
        ctx.set_materialize_grads(False)
        return flights.saved, flights.ends, flights.last

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        ends, *sources = ctx.saved_tensors
        solve: MembersSolve = ctx.solve
        flights = dataclasses.replace(ctx.flights, ends=ends)
        wanted = ctx.needs_input_grad[2:]

        def pull(*arriving: Tensor | None) -> tuple[Tensor | None, ...]:
            swept = solve.sweep(flights, *arriving)
            solve.swept += swept.costs
            own, shared = iter(swept.own), iter(swept.shared)
            rest = (next(own if mine else shared) for mine in solve.own)
            bars = [swept.u0, swept.spans, *rest]
            reached = (True, True, *solve.library.pulled)
            return tuple(
                bar.to(source).reshape(source.shape)
                if needed and is_reached and bar is not None
                else None
                for bar, source, needed, is_reached in zip(
                    bars, sources, wanted, reached, strict=True
                )
            )

        return (None, None, *pulled(pull, (ends, *sources), *cotangents))
