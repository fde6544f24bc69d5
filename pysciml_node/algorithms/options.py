"""The options of a solve, after they have been checked."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import Adjoint, _ContinuousAdjoint
from pysciml_node.algorithms.controllers import Controller, FixedStep

if TYPE_CHECKING:
    from pysciml_node.problems.event import Event

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Tolerances:
    """How large errors may be, `atol + rtol * |u|`, and in which entries of a state they count.

    Attributes:
        rtol: relative tolerance, a number or a flat tensor `(N,)`.
        atol: absolute tolerance, a number or a flat tensor `(N,)`; where it is `inf` the entry does
            not count.
        driven: how many leading entries of the flat state drive the step size.
    """

    rtol: float | Tensor
    atol: float | Tensor
    driven: int

    @property
    def counted(self) -> int:
        """How many entries count."""
        atol = self.atol
        return int(torch.isfinite(atol).sum()) if isinstance(atol, Tensor) else self.driven

    @property
    def tightest(self) -> tuple[float, float]:
        """The smallest of the relative and of the absolute tolerances."""

        def smallest(tolerance: float | Tensor) -> float:
            if not isinstance(tolerance, Tensor):
                return tolerance
            return float(tolerance[torch.isfinite(tolerance)].min())

        return smallest(self.rtol), smallest(self.atol)

    def leading(self, size: int) -> Tolerances:
        """Those of the leading entries of a state, all of which count."""

        def cut(tolerance: float | Tensor) -> float | Tensor:
            return tolerance[:size] if isinstance(tolerance, Tensor) else tolerance

        return Tolerances(cut(self.rtol), cut(self.atol), size)


@dataclass(frozen=True)
class SolveOptions:
    """The options of a solve, complete and checked, as `solve` hands them to an engine.

    Attributes:
        tolerances: how large errors may be, and of what.
        saveat: requested times as numbers in the order of integration, or `None`.
        saveat_tensor: the same as a tensor where it requires gradients, else `None`.
        adjoint: the method by which gradients are taken.
        dt0: size of the first (or of each fixed) step, positive, or `None`.
        dtmin: smallest step.
        dtmax: largest step.
        tstops: times the solver must step to, in the order of integration.
        max_steps: limit of accepted and rejected steps.
        controller: step size control.
        events: conditions to watch.
        fired: which of them have just happened at the start, and are looked at a little later.
        progress: show a progress bar.
        throw: raise on failure.
        compile: run native code: always, or where it can with `"auto"`.
        seed: of the Brownian motions; `None` for ordinary equations.
        defaulted: which of `adjoint` and `controller` were not given.
        unseeded: the options that these are but for the seed, by whose identity an engine finds
            what it has prepared for them; `None` where they have no seed, or were changed after it.
    """

    tolerances: Tolerances
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
    fired: tuple[int, ...] = ()
    defaulted: frozenset[str] = frozenset()
    unseeded: SolveOptions | None = field(default=None, init=False, compare=False, repr=False)

    def seeded(self, seed: int) -> SolveOptions:
        """The same with a seed."""
        made = object.__new__(SolveOptions)
        made.__dict__.update(self.__dict__, seed=seed, unseeded=self)
        return made

    def landings(self, direction: int) -> tuple[float, ...]:
        """Times that steps end on, in the order of integration: the stops, and those of a grid."""
        grid = self.controller.times if isinstance(self.controller, FixedStep) else ()
        if not grid or not self.tstops:
            return grid or self.tstops
        return tuple(sorted({*grid, *self.tstops}, reverse=direction < 0))


@dataclass(frozen=True)
class MemberOptions:
    """The options of an ensemble: what its members share, and what each has of its own.

    Attributes:
        common: what they share, and where they differ something that stands for all. Its stops may
            lie outside of the interval of a member, which then has nothing to do with them.
        spans: starts and ends of the intervals, each `(M,)` in float64.
        saveat: own times `(M, T)` in float64; `None` where those of `common` are for all.
        saveat_tensor: the same where they receive gradients.
        rtol: own relative tolerances, `(M, 1)` or `(M, N)`; `None` where those of `common` are for
            all.
        atol: own absolute tolerances, likewise.
        seeds: of the Brownian motions; empty for ordinary equations.
        fired: which events have just happened at the starts, `(M, E)`.
        spent: how many of `max_steps` each has spent before, `(M,)`.
    """

    common: SolveOptions
    spans: tuple[Array, Array]
    saveat: Array | None = None
    saveat_tensor: Tensor | None = None
    rtol: Tensor | None = None
    atol: Tensor | None = None
    seeds: tuple[int, ...] = ()
    fired: Array | None = None
    spent: Array | None = None

    @property
    def alike(self) -> bool:
        """Whether all members have the same times and tolerances."""
        return self.saveat is None and self.rtol is None and self.atol is None

    @property
    def times(self) -> int | None:
        """How many times are saved; `None` where none were named."""
        if self.saveat is not None:
            return int(self.saveat.shape[1])
        return None if self.common.saveat is None else len(self.common.saveat)

    def of(self, m: int) -> SolveOptions:
        """The options of one member."""
        common = self.common
        t0, t1 = (float(ends[m]) for ends in self.spans)
        own: dict[str, Any] = {
            name: _own(tolerance[m])
            for name in ("rtol", "atol")
            if (tolerance := getattr(self, name)) is not None
        }
        changes: dict[str, Any] = {}
        if own:
            changes["tolerances"] = replace(common.tolerances, **own)
        if self.saveat is not None:
            changes["saveat"] = tuple(self.saveat[m].tolist())
        if self.saveat_tensor is not None:
            changes["saveat_tensor"] = self.saveat_tensor[m]
        if self.seeds:
            changes["seed"] = self.seeds[m]
        if common.tstops:
            inside = (t for t in common.tstops if min(t0, t1) < t < max(t0, t1))
            changes["tstops"] = tuple(sorted(inside, reverse=t1 < t0))
        if isinstance(common.controller, FixedStep):
            changes["controller"] = common.controller.within(t0, t1)
        if common.dt0 is not None and common.dt0 > abs(t1 - t0):
            changes["dt0"] = abs(t1 - t0)
        return replace(common, **changes) if changes else common

    def part(self, members: slice) -> MemberOptions:
        """The options of some of the members."""
        own = {
            name: value[members]
            for name in ("saveat", "saveat_tensor", "rtol", "atol", "seeds")
            if (value := getattr(self, name)) is not None
        }
        t0, t1 = self.spans
        return replace(self, spans=(t0[members], t1[members]), **own)


def _own(tolerance: Tensor) -> float | Tensor:
    """The tolerance of one member: a number for all entries of its state, or a flat tensor."""
    return float(tolerance) if tolerance.numel() == 1 else tolerance


def without_closures(options: SolveOptions) -> SolveOptions:
    """The options without those that only a running solve needs: events, times with a graph."""
    return replace(options, events=(), saveat_tensor=None)


def backward_limits(adjoint: Adjoint, options: SolveOptions) -> tuple[float, float, int]:
    """Relative and absolute tolerance and step limit of a backward solve.

    Args:
        adjoint: its limits come first.
        options: of the forward solve, whose tightest tolerance counts where they differ.
    """
    limits = adjoint if isinstance(adjoint, _ContinuousAdjoint) else _ContinuousAdjoint()
    rtol, atol = options.tolerances.tightest
    return limits.rtol or rtol, limits.atol or atol, limits.max_steps or options.max_steps
