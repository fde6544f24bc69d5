"""Runs steps to their end and keeps what was asked for."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import takewhile
from operator import neg

import torch
from torch import Tensor

from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.loop import Steps
from pysciml_node.steps.record import Outcome, Record, check_finite, detached
from pysciml_node.steps.step import Step

Between = Callable[[Step, Sequence[float], Tensor | None], Tensor]
"""The states `(m, N)` at `m` times inside a step; where these receive gradients, they come as a
tensor too."""


class Saver:
    """Collects the states at requested times from the steps that pass over them.

    Args:
        record: told where the saved times lie; empty as yet.
        u0: the state at its first time, `(N,)`.
        between: the states inside a step.
        times: requested times in the order of integration.
        time_tensor: the same as a tensor where it receives gradients through the dense output.
        moving: whether the ends of the interval receive gradients. Free steps then move with the
            start, and the times that are asked for do not.
    """

    def __init__(
        self,
        record: Record,
        u0: Tensor,
        between: Between,
        times: Sequence[float],
        time_tensor: Tensor | None = None,
        moving: bool = False,
    ) -> None:
        self.record, self.between = record, between
        self.times, self.time_tensor, self.moving = times, time_tensor, moving
        self.states = [u0]
        # With the number of the state that each is at, or in front of.
        self._pieces: list[tuple[int, Tensor]] = []
        at_start = list(takewhile(lambda i: times[i] == record.times[0], range(len(times))))
        self._keep_end(0, at_start, u0)

    def _keep_end(self, state: int, indices: list[int], u: Tensor) -> None:
        if indices:
            self.record.at_end[state] = indices
            self._pieces.append((state, u.expand(len(indices), -1)))
            self.record.saved += len(indices)

    def see(self, step: Step) -> None:
        """Keep an accepted step, and save what lies in it."""
        record = self.record
        if record.saved < len(self.times):
            self._save(step)
        record.times.append(step.end)
        record.sizes.append(step.h)
        record.errors.append(step.error)
        record.stops.append(step.stop)
        record.methods.append(step.method)
        self.states.append(step.u1)

    def _save(self, step: Step) -> None:
        record, times, end, forward = self.record, self.times, step.end, step.h > 0
        done = record.saved
        # A time that receives a gradient moves along the dense output, also where a step ends; only
        # the end of the interval has a gradient of its own.
        closed = (self.time_tensor is not None and step.stop != record.t1_stop) or (
            self.moving and step.stop is None
        )
        if forward:
            last = (bisect_right if closed else bisect_left)(times, end, done)
        else:
            last = (bisect_right if closed else bisect_left)(times, -end, done, key=neg)
        if last > done:
            inside = list(times[done:last])
            record.inside[len(record.sizes)] = (list(range(done, last)), inside)
            moving = None if self.time_tensor is None else self.time_tensor[done:last]
            self._pieces.append((len(record.sizes) + 1, self.between(step, inside, moving)))
            record.saved = last
        at_end = []
        while last < len(times) and times[last] == end:
            at_end.append(last)
            last += 1
        self._keep_end(len(record.sizes) + 1, at_end, step.u1)

    def saved(self) -> Tensor:
        """The saved states, shape `(saved, N)`."""
        like = self.states[0]
        pieces = [x for n, x in self._pieces if n <= len(self.record.sizes)]
        return torch.cat(pieces) if pieces else like.new_empty((0, like.numel()))


def may_thin(states: Sequence[Tensor]) -> bool:
    """Whether states take so much memory that those which nobody has asked for are let go."""
    return len(states) * states[-1].nbytes > _MOST_KEPT


# States of steps that nobody has asked for are kept up to this many bytes.
_MOST_KEPT = 2**25


def follow(
    steps: Steps,
    saver: Saver,
    on_step: Callable[[Step], None] | None = None,
    find_event: Callable[[Step], Step | None] | None = None,
    recorded: bool = True,
    watched: bool = False,
) -> Outcome:
    """Run steps to their end.

    Args:
        steps: the steps.
        saver: keeps them.
        on_step: is told of each step.
        find_event: cuts a step at an event.
        recorded: whether gradients may be taken; else the states of the steps are let go where
            other times are asked for and they take more than `_MOST_KEPT` bytes.
        watched: as of `check_finite`.
    """
    record, states = saver.record, saver.states
    thins = bool(saver.times) and not recorded
    for step in steps:
        cut = find_event(step) if find_event is not None else None
        if cut is not None:
            step = cut
        saver.see(step)
        if thins and may_thin(states):
            del states[1:-1]
            record.thinned = True
        if on_step is not None:
            on_step(step)
        if cut is not None:
            steps.retcode = ReturnCode.Terminated
            break
    record.naccept, record.nreject = steps.naccept, steps.nreject
    record.retcode = steps.retcode
    if steps.last is not None and not steps.retcode.successful:
        record.last = detached(steps.last)
    if states[-1].requires_grad:
        # The graph of saved states is to have no part that is not finite: its derivatives times
        # zero, which arrives there where the saved states are cut back, may be NaN.
        check_finite(record, states, watched)
    return Outcome(record, states, saver.saved())
