"""The time loop of many members: each has its own time, step size, memory, stops and end."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.controllers import ManySizes
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.first_sizes import first_sizes, read
from pysciml_node.replay.members.norm import MembersNorm
from pysciml_node.replay.members.stages import StepOfMembers, spread
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.step import FAR, SLIVER
from pysciml_node.torch_engine.members.crossings import Steps
from pysciml_node.torch_engine.members.stops import Stops
from pysciml_node.torch_engine.members.tape import Attempts, Tape, Tried


def _sizes_between(t: Array, end: Array) -> Array:
    """Sizes `h` with which `t + h` is `end` to the last bit, where there are such."""
    h = end - t
    for toward in (-math.inf, math.inf):
        off = t + h != end
        if not off.any():
            break
        near = np.nextafter(end - t, toward)
        h = np.where(off & (t + near == end), near, h)
    return h


@dataclass
class _Live:
    """The members that are under way, an entry of each array for each of them."""

    rows: Array  # which they are
    t: Array
    h: Array  # the size that is tried next
    stop: Array  # which of its stops comes next
    naccept: Array
    error: Array  # of its last attempt

    def keep(self, staying: Array) -> _Live:
        columns = self.rows, self.t, self.h, self.stop, self.naccept, self.error
        return _Live(*(column[staying] for column in columns))


class MembersMarch(ABC):
    """Steps of all members from their starts to their ends, or to where they fail.

    A kind of step says how one begins, and what its first size follows from.

    Args:
        nodes: of the method; times have their dtype and device.
        error_order: order of the embedded solution, for the controller.
        field: the field of all members.
        options: step control.
        tape: is told of accepted steps, and of members that are done.
        stops: where steps end; default those of the options.

    Attributes:
        codes: how each member has ended.
        naccept: accepted steps of each, `(M,)`.
        nreject: rejected steps of each, `(M,)`.
    """

    def __init__(
        self,
        nodes: Tensor,
        error_order: float,
        field: MembersField,
        options: MemberOptions,
        tape: Tape,
        stops: Stops | None = None,
    ) -> None:
        self.nodes, self.field, self.options = nodes, field, options
        self.stops, self.tape = stops or Stops(options), tape
        count = len(field.nfe)
        self.codes = [ReturnCode.Default] * count
        self.naccept = np.zeros(count, dtype=np.int64)
        self.nreject = np.zeros(count, dtype=np.int64)
        common = options.common
        self.adaptive = common.controller.adaptive
        # So many steps each may try, and the fewest of these.
        self._most = np.full(count, common.max_steps)
        if options.spent is not None:
            self._most -= options.spent
        self._fewest = int(self._most.min())
        sizes = common.controller.start_many(error_order, count)
        assert sizes is not None
        self.sizes: ManySizes = sizes
        self.u: Tensor
        self.k: Tensor
        self.norm: MembersNorm
        self.live: _Live
        self.stages: StepOfMembers
        self._last: Attempts
        # Which of the steps under way end on stops.
        self._lands: Array
        # Members whose first stage has to be evaluated anew, if any.
        self._stale: Array | None = None
        # All members that are under way have tried so many steps.
        self._tries = 0
        # The next stop of each.
        self._stop: Array
        # No step of this size is too small.
        self._enough = 0.0
        # Which are far from zero, if any.
        t0, t1 = options.spans
        far = np.maximum(abs(t0), abs(t1)) > FAR * abs(t1 - t0)
        self._far = far if far.any() else None

    def run(self, u: Tensor, k: Tensor) -> None:
        """Step until all members are done.

        Args:
            u: initial states, `(M, N)`.
            k: derivatives there, `(M, N)`.
        """
        self.u, self.k = u, k
        t0 = self.options.spans[0]
        rows = np.arange(len(t0))
        zeros = np.zeros(len(t0), dtype=np.int64)
        self.norm = MembersNorm(self.options, u.detach())
        self.live = _Live(rows, t0, t0, zeros, zeros.copy(), 0.0 * t0)
        self._renew()
        self._stop = self.stops.next(zeros)
        with np.errstate(all="ignore"):
            if self.adaptive:
                self._enough = max(float(self._smallest(t).max()) for t in self.options.spans)
            self.live.h = self._first_sizes()
            while len(self.live.rows):
                self._attempt()

    # What kinds of steps do in ways of their own.

    def _place(self, proposed: Array, stop: Array, lands: Array) -> tuple[Array, Array, Array]:
        """Sizes and ends of the steps of proposed sizes, and which of them land on stops."""
        t = self.live.t
        if self._far is not None:
            # An end may be rounded to a stop.
            lands = lands | (self._far[self.live.rows] & (t + proposed == stop))
        h = self._sizes_from(self.live.rows, t, proposed)
        if not np.count_nonzero(lands):
            return h, t + h, lands
        h = np.where(lands, _sizes_between(t, stop), h)
        return h, np.where(lands, stop, t + h), lands

    def _sizes_from(self, rows: Array, t: Array, proposed: Array) -> Array:
        """As `size_from`, of members that are far from zero."""
        if self._far is None:
            return proposed
        h = t + proposed - t
        sizes: Array = np.where(self._far[rows] & (h != 0), h, proposed)
        return sizes

    @abstractmethod
    def _renew(self) -> None:
        """Make room for the stages of the members that are left."""

    @abstractmethod
    def _begin(self, h: Array, landing: bool) -> None:
        """Begin the steps; `landing` where some of them end on stops."""

    @property
    @abstractmethod
    def order(self) -> float:
        """Of the local error of a step, for the size of the first."""

    def _rate(self, k: Tensor) -> Tensor:
        """The derivative by which an Euler step goes, `(L, N)`."""
        return k

    def _speed(self, k: Tensor) -> Tensor:
        """How fast the state changes, entry by entry."""
        return k

    def _change(self, k: Tensor, ahead: Tensor) -> Tensor:
        """How much that is from one point to another."""
        return ahead - k

    def _smallest(self, t: Array) -> Array:
        """Sizes below which steps from `t` fail, but for those that a stop has cut short."""
        smallest: Array = np.maximum(self.options.common.dtmin, 4 * np.spacing(abs(t)))
        return smallest

    def _told(
        self, h: Array, end: Array, proposed: Array, accepted: Array
    ) -> tuple[Array, Array | None]:
        """The sizes that the controller is told, and which of them a stop has cut short, if any."""
        return h, None if h is proposed else abs(h) < 0.9 * abs(proposed)

    def _first_sizes(self) -> Array:
        options = self.options.common
        direction, length = self.stops.direction, self.stops.length
        if options.dt0 is not None:
            h = np.copysign(np.minimum(options.dt0, length), direction)
        else:
            with torch.no_grad():
                h = self._hairer(direction, length)
        smallest = np.copysign(options.dtmin, direction)
        # The first size is a guess: only the error of a step asks for less than the limit.
        sizes: Array = np.where(np.isfinite(h) & (abs(h) < options.dtmin), smallest, h)
        return sizes

    def _hairer(self, direction: Array, length: Array) -> Array:
        """First sizes from the field at the starts and one explicit Euler step."""
        u, k, rows = self.u.detach(), self.k.detach(), self.live.rows

        def change(sizes: Array) -> Tensor:
            h, t = (torch.from_numpy(x).to(self.nodes) for x in (sizes, self.live.t + sizes))
            ahead = u + h.unsqueeze(1) * self._rate(k)
            self.field.tally(rows)
            return self._change(k, self.field(t, ahead, self.field.parameters(rows)))

        speed = self._speed(k)
        return first_sizes(self.norm, u, speed, change, length, direction, self.order)

    def _attempt(self) -> None:
        """One attempt of each member, of its own size."""
        live = self.live
        proposed = self._proposed(live.h)
        size = abs(proposed)
        lands = abs(self._stop - live.t) <= size * (1 + SLIVER)
        failed = self._failures(proposed, size, lands)
        if failed is not None:
            self._retire(failed)
            return
        h, end, lands = self._place(proposed, self._stop, lands)
        self._lands, landing = lands, bool(np.count_nonzero(lands))
        self._begin(h, landing)
        stages = self.stages
        self._first_stages()
        stages.know(self.k)
        u1 = stages.solution(with_error=self.adaptive)
        error, accepted = self._judge(u1, h)
        self._last = Attempts(live.rows, live.t, h, self.u, u1, error)
        stops = np.where(lands, live.stop, -1) if landing else None
        ended = self._cut(u1, Steps(live.rows, np.arange(len(h)), live.t, h, end), accepted)
        whole = accepted if ended is None else accepted & ~ended
        tried = Tried(live.rows, live.t, h, end, error, stops, live.naccept, whole)
        if np.count_nonzero(whole):
            self._take(u1, tried, lands)
        live.naccept = live.naccept + accepted
        live.error = error
        self._tries += 1
        if self.adaptive:
            told, cut = self._told(h, end, proposed, accepted)
            live.h = self.sizes.following(told, error, accepted)
            if cut is not None:
                # A step cut short by a stop says little: keep the size that was proposed.
                cut = accepted & cut & (size > abs(live.h))
                live.h = np.where(cut, proposed, live.h)
        else:
            live.h = proposed
        if landing or ended is not None:
            self._arrive(whole & lands, ended)

    def _proposed(self, h: Array) -> Array:
        """The sizes to try, within the largest that are allowed."""
        largest = self.options.common.dtmax
        if not math.isfinite(largest):
            return h
        proposed: Array = np.copysign(np.minimum(abs(h), largest), h)
        return proposed

    def _arrive(self, there: Array, ended: Array | None) -> None:
        """Go on from the stops that some members have come to, without those that have ended."""
        live = self.live
        done = {ReturnCode.Success: there & self.stops.last(live.stop)}
        if ended is not None:
            done[ReturnCode.Terminated] = ended
        live.stop = live.stop + there
        if any(map(np.count_nonzero, done.values())):
            self._retire(done)
        self._stop = self.stops.next(self.live.stop)

    def _failures(
        self, proposed: Array, size: Array, lands: Array
    ) -> dict[ReturnCode, Array] | None:
        """The members that cannot go on, by the reason."""
        live, exhausted = self.live, self._tries >= self._fewest
        if not exhausted and size.min() >= self._enough and size.max() < math.inf:
            return None  # NaN is not
        unstable = ~np.isfinite(proposed)
        tried = self._tries >= self._most[live.rows]
        small = np.zeros_like(tried)
        if self.adaptive:
            # Steps cut short by a stop may be small; others below the limit mean failure.
            small = (size < self._smallest(live.t)) & ~lands
        if not (unstable | tried | small).any():
            return None
        tried &= ~unstable
        small &= ~(unstable | tried)
        bad = small & ~np.isfinite(live.error)
        return {
            ReturnCode.Unstable: unstable | bad,
            ReturnCode.MaxIters: tried,
            ReturnCode.DtLessThanMin: small & ~bad,
        }

    def _cut(self, u1: Tensor, steps: Steps, accepted: Array) -> Array | None:
        """End accepted steps at the events that lie in them; says which, `(L,)`, if any."""
        return None

    def _first_stages(self) -> None:
        """Evaluate the first stages that the steps before have not left."""
        stale, self._stale = self._stale, None
        if stale is None or not np.count_nonzero(stale):
            return
        rows, t = self.live.rows, self.stages.times[0]
        if stale.all():
            self.k = self.field(t, self.u, self.stages.p)
        else:
            places = np.flatnonzero(stale)
            index = torch.from_numpy(places).to(self.u.device)
            p = self.field.parameters(rows[places])
            u = self.u.index_select(0, index)
            k = self.field(t.index_select(0, index), u, p)
            self.k = self.k.index_copy(0, index, k)
        self.field.tally(rows[stale])

    def _judge(self, u1: Tensor, h: Array) -> tuple[Array, Array]:
        """Scaled errors of the attempts, and which of them are accepted."""
        if not self.adaptive:
            return np.full(len(h), math.nan), np.ones(len(h), dtype=bool)
        if not torch.is_grad_enabled():
            error = read(self.stages.error(u1, self.norm))
        else:
            with torch.no_grad():
                error = read(self.stages.error(u1.detach(), self.norm))
        return error, error <= 1.0

    def _take(self, u1: Tensor, tried: Tried, lands: Array) -> None:
        """Go on from the accepted steps, and tell of them."""
        live, accepted, k = self.live, tried.accepted, self.stages.end
        ends = self.tape.step(self.stages, u1, tried)
        if accepted.all():
            self.u = u1
            self.k = self.k if k is None else k
            live.t = tried.end
        else:
            mask = spread(accepted, u1, torch.bool)
            self.u = torch.where(mask, u1, self.u)
            self.k = self.k if k is None else torch.where(mask, k, self.k)
            live.t = np.where(accepted, tried.end, live.t)
        # The field may jump at a stop: its value there belongs to the next step.
        if k is not None:
            self._stale = accepted & lands if tried.stop is not None else None
            return
        self._stale = accepted
        if ends is not None:
            at, values = ends
            self.k = self.k.index_copy(0, torch.from_numpy(at).to(u1.device), values)
            self._stale = accepted & (lands | ~np.isin(np.arange(len(accepted)), at))

    def _retire(self, done: dict[ReturnCode, Array]) -> None:
        """Take members out of the batch."""
        live = self.live
        leaving = np.zeros(len(live.rows), dtype=bool)
        for code, which in done.items():
            leaving |= which
            for m in live.rows[which]:
                self.codes[m] = code
        places, staying = np.flatnonzero(leaving), np.flatnonzero(~leaving)
        rows = live.rows[places]
        self.naccept[rows] = live.naccept[places]
        self.nreject[rows] = self._tries - live.naccept[places]
        self.tape.leave(rows, self.u, places, self._failed(done))
        index = torch.from_numpy(staying).to(self.u.device)
        self.live = live.keep(staying)
        self.sizes.keep(staying)
        self.stops.keep(staying)
        self.norm.keep(staying)
        self._stop = self._stop[staying]
        if self._stale is not None:
            self._stale = self._stale[staying]
        self.u, self.k = self.u.index_select(0, index), self.k.index_select(0, index)
        if len(self.live.rows):
            self._renew()

    def _failed(self, done: dict[ReturnCode, Array]) -> Attempts | None:
        """The last attempts of the members that have failed."""
        rows = [self.live.rows[x] for code, x in done.items() if not code.successful]
        if not rows:
            return None
        tried = np.concatenate([*rows, np.empty(0, dtype=np.int64)])
        tried = np.sort(tried[self.naccept[tried] + self.nreject[tried] > 0])
        if not len(tried):
            return None
        last = self._last
        places = np.searchsorted(last.rows, tried)
        index = torch.from_numpy(places).to(self.u.device)
        u, u1 = (x.detach().index_select(0, index) for x in (last.u, last.u1))
        return Attempts(tried, last.t[places], last.h[places], u, u1, last.error[places])
