"""Events of many members: accepted steps in which conditions cross zero are cut there."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array, EnsembleProblem
from pysciml_node.replay.members.events import condition_values, crossings
from pysciml_node.replay.members.stages import MemberStages
from pysciml_node.steps.event_search import AFTER, BESIDE

# A bisection looks at all midpoints of so many halvings at once.
_HALVINGS = 4


class Cut(NamedTuple):
    """Where steps of some members end at an event, `(Q,)` each."""

    places: Array  # in the batch
    theta: Array  # the share of the step that is left


class Steps(NamedTuple):
    """Accepted steps of some members, `(A,)` each."""

    rows: Array  # which members
    places: Array  # in the batch
    t: Array
    h: Array
    end: Array

    def at(self, places: Array) -> Steps:
        """Some of them."""
        return Steps(*(column[places] for column in self))


class Crossings:
    """The signs of conditions of all members from step to step, as `Signs` and `EventSearch`.

    Args:
        ensemble: for the structure of a state.
        options: the events, and which have just happened.
        u0: flat states at the starts, `(M, N)`.

    Attributes:
        before: the conditions at the starts of the next steps, `(M, E)`.
        unsettled: those of which the signs there are not known, `(M, E)`.
        first: the event that has ended each member, or -1, `(M,)`.
        fired: all conditions that cross zero there, `(M, E)`.
    """

    def __init__(self, ensemble: EnsembleProblem, options: MemberOptions, u0: Tensor) -> None:
        self.events, self.spec = options.common.events, ensemble.problem.spec
        # With a mass matrix the derivative is another.
        self._explicit = ensemble.problem.mass is None
        self.first = np.full(len(ensemble), -1)
        self.fired = np.zeros((len(ensemble), len(self.events)), dtype=bool)
        self.before = self._values(options.spans[0], u0)
        self.unsettled = self.before == 0
        if options.fired is not None:
            self.unsettled |= options.fired
        eps = torch.finfo(self.spec.real_dtype).eps
        self._rounding = eps**0.75
        self._widths = np.array([max(event.xtol or 0.0, 4 * eps) for event in self.events])

    def _values(self, t: Array, u: Tensor) -> Array:
        return condition_values(self.events, self.spec, t, u)

    def look(self, stages: MemberStages, k: Tensor, u1: Tensor, steps: Steps) -> Cut | None:
        """Find where the first event of each step lies.

        Args:
            stages: of the steps of all members in the batch.
            k: derivatives at their starts, `(L, N)`.
            u1: the states at their ends, `(L, N)`.
            steps: the accepted ones.
        """
        device = u1.device
        after = self._values(steps.end, u1[torch.from_numpy(steps.places).to(device)])
        self._settle(stages, k, steps)
        before = self.before[steps.rows]
        self.before[steps.rows] = after
        crossed = crossings(self.events, before, after)
        hit = np.flatnonzero(crossed.any(1))
        if not len(hit):
            return None
        steps = steps.at(hit)
        at, event = np.nonzero(crossed[hit])
        inside = _Inside(self, stages, steps)
        theta = np.full(crossed[hit].shape, np.inf)
        theta[at, event] = inside.locate(at, event, before[hit][at, event])
        self.first[steps.rows] = theta.argmin(1)
        return Cut(steps.places, theta.min(1))

    def note(self, steps: Steps, u: Tensor, u1: Tensor) -> None:
        """See which other conditions cross zero in steps that have been cut.

        Args:
            steps: of these members, as they have been cut.
            u: their starts, `(Q, N)`.
            u1: their ends, `(Q, N)`.
        """
        before, after = self._values(steps.t, u), self._values(steps.end, u1)
        touches = abs(after) <= self._rounding * abs(before)
        too = crossings(self.events, before, after)
        too |= touches & crossings(self.events, before, -before)
        too[np.arange(len(too)), self.first[steps.rows]] = True
        self.fired[steps.rows] = too

    def _settle(self, stages: MemberStages, k: Tensor, steps: Steps) -> None:
        """Say with which signs conditions that are zero at the start leave it."""
        open_ = self.unsettled[steps.rows]
        some = np.flatnonzero(open_.any(1))
        if not len(some):
            return
        open_, steps = open_[some], steps.at(some)
        self.unsettled[steps.rows] = False
        every = np.arange(len(some))
        later = _Inside(self, stages, steps).values(every, np.full(len(some), AFTER))
        # What is back at zero before it is looked at, and leaves with the other sign, has crossed.
        index = torch.from_numpy(steps.places).to(k.device)
        u, rate = (x.detach().index_select(0, index) for x in (stages.u, k))
        dt = torch.from_numpy(BESIDE * steps.h).to(u.device, self.spec.real_dtype).unsqueeze(1)
        early = self._values(steps.t - BESIDE * steps.h, u - dt * rate)
        late = self._values(steps.t + BESIDE * steps.h, u + dt * rate)
        turned = crossings(self.events, -later, later) & (early * later > 0) & (late * later < 0)
        turned &= self._explicit
        leaving = np.where(turned, -later, later)
        self.before[steps.rows] = np.where(open_, leaving, self.before[steps.rows])

    @property
    def widths(self) -> Array:
        """At which shares of a step the search for each event ends, `(E,)`."""
        return self._widths


class _Inside:
    """Conditions inside the steps of some members, by dense output.

    Args:
        crossings: whose conditions.
        stages: of the steps of all members.
        steps: those that are looked at.
    """

    def __init__(self, crossings: Crossings, stages: MemberStages, steps: Steps) -> None:
        self.crossings, self.steps = crossings, steps
        with torch.no_grad():
            self.part = stages.some(steps.places)
            self.part.evaluate(self.part.method.all_stages)

    def values(self, rows: Array, theta: Array) -> Array:
        """All conditions at shares `(Q,)` of the steps `rows`, `(Q, E)`."""
        steps = self.steps
        with torch.no_grad():
            u = self.part.dense(rows, theta)
        return self.crossings._values(steps.t[rows] + theta * steps.h[rows], u)

    def locate(self, rows: Array, event: Array, before: Array) -> Array:
        """Where conditions cross zero, `(Q,)`: the bisection of `locate_crossing`.

        Args:
            rows: the steps.
            event: the conditions.
            before: their values at the starts of the steps.
        """
        sign = np.where(before > 0, 1.0, -1.0)
        low, high = np.zeros(len(rows)), np.ones(len(rows))
        width, count = self.crossings.widths[event], 2**_HALVINGS
        grid = np.arange(1, count) / count
        while (high - low > width).any():
            theta = low[:, None] + (high - low)[:, None] * grid
            found = self.values(np.repeat(rows, count - 1), theta.reshape(-1))
            own = found[np.arange(len(found)), np.repeat(event, count - 1)]
            ahead = (sign[:, None] * own.reshape(theta.shape)) > 0
            size = high - low
            left, right = np.zeros(len(rows), dtype=np.int64), np.full(len(rows), count)
            for _ in range(_HALVINGS):
                middle = (left + right) // 2
                narrow = size * (right - left) / count <= width
                goes = ahead[np.arange(len(rows)), middle - 1]
                left = np.where(goes & ~narrow, middle, left)
                right = np.where(~goes & ~narrow, middle, right)
            low, high = low + size * left / count, low + size * right / count
        return high
