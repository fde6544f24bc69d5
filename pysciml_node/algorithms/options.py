"""The options of a solve, after they have been checked."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import Adjoint, _ContinuousAdjoint
from pysciml_node.algorithms.controllers import Controller, FixedStep

if TYPE_CHECKING:
    from pysciml_node.problems.event import Event


@dataclass(frozen=True)
class SolveOptions:
    """What `solve` hands to an engine: complete, and known to be valid.

    Attributes:
        rtol: relative tolerance, a number or a flat tensor `(N,)`.
        atol: absolute tolerance, a number or a flat tensor `(N,)`.
        driven: how many leading entries of the flat state drive the step size.
        saveat: requested times as numbers in the order of integration, or `None`.
        saveat_tensor: the same as a tensor where it requires gradients, else `None`.
        adjoint: how gradients are taken.
        dt0: size of the first (or of each fixed) step, positive, or `None`.
        dtmin: smallest step.
        dtmax: largest step.
        tstops: times the solver must step to, in the order of integration.
        max_steps: limit of accepted and rejected steps.
        controller: step size control.
        events: conditions to watch.
        progress: show a progress bar.
        throw: raise on failure.
        compile: run native code: always, or (`"auto"`) where that can be.
        seed: of the Brownian motions; `None` for ordinary equations.
        defaulted: which of `adjoint` and `controller` were not given.
    """

    rtol: float | Tensor
    atol: float | Tensor
    driven: int
    saveat: tuple[float, ...] | None
    saveat_tensor: Tensor | None
    adjoint: Adjoint
    dt0: float | None
    dtmin: float
    dtmax: float
    tstops: tuple[float, ...]
    max_steps: int
    controller: Controller
    events: tuple[Event, ...]
    progress: bool
    throw: bool
    compile: bool | Literal["auto"]
    seed: int | None = None
    defaulted: frozenset[str] = frozenset()

    def landings(self, direction: int) -> tuple[float, ...]:
        """Times that steps end on, in the order of integration: the stops, and those of a grid."""
        grid = self.controller.times if isinstance(self.controller, FixedStep) else ()
        if not grid or not self.tstops:
            return grid or self.tstops
        return tuple(sorted({*grid, *self.tstops}, reverse=direction < 0))


def without_closures(options: SolveOptions) -> SolveOptions:
    """The options without what only a running solve needs: events, and times with a graph."""
    return replace(options, events=(), saveat_tensor=None)


def backward_limits(adjoint: Adjoint, options: SolveOptions) -> tuple[float, float, int]:
    """Relative and absolute tolerance and step limit of a backward solve.

    Args:
        adjoint: its own ones come first.
        options: of the forward solve; of tolerances that differ the tightest.
    """

    def tightest(tolerance: float | Tensor) -> float:
        if not isinstance(tolerance, Tensor):
            return tolerance
        return float(tolerance[torch.isfinite(tolerance)].min())

    own = adjoint if isinstance(adjoint, _ContinuousAdjoint) else _ContinuousAdjoint()
    return (
        own.rtol or tightest(options.rtol),
        own.atol or tightest(options.atol),
        own.max_steps or options.max_steps,
    )
