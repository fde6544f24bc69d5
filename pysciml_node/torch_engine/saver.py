"""Runs a march to its end and keeps what was asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pysciml_node.replay.stages import Stages
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.record import Record, detached
from pysciml_node.steps.step import Step
from pysciml_node.torch_engine.march import March


class Saver:
    """Collects the states at requested times from the steps that pass over them.

    Args:
        times: requested times in the order of integration.
        time_tensor: the same as a tensor where it receives gradients through the dense output.
        t0: start of the march.
        u0: state there.
        record: told where the saved times lie.
        moving: whether the ends of the interval receive gradients. Free steps then move with the
            start, and the times that are asked for do not.
    """

    def __init__(
        self,
        times: Sequence[float],
        time_tensor: Tensor | None,
        t0: float,
        u0: Tensor,
        record: Record,
        moving: bool,
    ) -> None:
        self.times, self.time_tensor, self.record = times, time_tensor, record
        self.moving = moving
        self.pieces: list[Tensor] = []
        at_start = [i for i, t in enumerate(times) if t == t0]
        self._keep_end(0, at_start, u0)

    def _keep_end(self, state: int, indices: list[int], u: Tensor) -> None:
        if indices:
            self.record.at_end[state] = indices
            self.pieces.append(u.expand(len(indices), -1))
            self.record.saved += len(indices)

    def see(self, step: Step, march: March) -> None:
        """Save what lies in an accepted step."""
        done = self.record.saved
        if done == len(self.times):
            return
        end, forward = step.end, step.h > 0
        last = done
        # A time that receives a gradient moves along the dense output, also where a step ends; only
        # the end of the interval has a gradient of its own.
        closed = (self.time_tensor is not None and step.end != march.t1) or (
            self.moving and step.stop is None
        )
        while last < len(self.times) and (
            (self.times[last] < end if forward else self.times[last] > end)
            or (closed and self.times[last] == end)
        ):
            last += 1
        if last > done:
            indices = list(range(done, last))
            theta = [(t - step.t) / step.h for t in self.times[done:last]]
            inside = list(self.times[done:last])
            self.record.inside[len(self.record.sizes)] = (indices, inside)
            at = torch.tensor(theta, dtype=torch.float64)
            if self.time_tensor is not None:
                at = (self.time_tensor[done:last] - step.time) / step.size
            elif isinstance(step.time, Tensor) or isinstance(step.size, Tensor):
                asked = torch.tensor(self.times[done:last], dtype=torch.float64)
                at = (asked - step.time) / step.size
            self.pieces.append(march.stages.dense(step.time, step.size, step.u, at))
            self.record.saved = last
        at_end = []
        while last < len(self.times) and self.times[last] == end:
            at_end.append(last)
            last += 1
        self._keep_end(len(self.record.sizes) + 1, at_end, step.u1)

    def result(self, like: Tensor) -> Tensor:
        """The saved states, shape `(saved, N)`."""
        return torch.cat(self.pieces) if self.pieces else like.new_empty((0, like.numel()))


# States of steps that nobody has asked for are kept up to this many bytes.
_MOST_KEPT = 2**25


def follow(
    march: March,
    saveat: Sequence[float],
    saveat_tensor: Tensor | None,
    find_event: Callable[[Step, Stages], Step | None] | None,
    on_step: Callable[[Step], None] | None,
    moving: bool = False,
    recorded: bool = True,
) -> tuple[Record, list[Tensor], Tensor]:
    """Run a march to its end.

    Args:
        march: the steps.
        saveat: the times that were asked for.
        saveat_tensor: the same where they receive gradients.
        find_event: cuts a step at an event.
        on_step: is told of each step.
        moving: whether the ends of the interval receive gradients.
        recorded: whether gradients may be taken; else the states of the steps are let go where
            other times are asked for and they take more than `_MOST_KEPT` bytes.

    Returns:
        The record; the states at its times; the saved states `(saved, N)`.
    """
    tstops = march.options.tstops
    record = Record(times=[march.t0], t1_stop=len(tstops), marks=march.stages.marks)
    states = [march.u]
    spare = bool(saveat) and not recorded
    saver = Saver(saveat, saveat_tensor, march.t0, march.u, record, moving)
    for step in march:
        cut = find_event(step, march.stages) if find_event is not None else None
        if cut is not None:
            step = cut
        saver.see(step, march)
        record.times.append(step.end)
        record.sizes.append(step.h)
        record.errors.append(step.error)
        record.stops.append(step.stop)
        states.append(step.u1)
        if spare and len(states) * march.u.nbytes > _MOST_KEPT:
            del states[1:-1]
            record.thinned = True
        if on_step is not None:
            on_step(step)
        if cut is not None:
            march.retcode = ReturnCode.Terminated
            break
    record.naccept, record.nreject = march.naccept, march.nreject
    record.retcode = march.retcode
    if march.last is not None and not march.retcode.successful:
        record.last = detached(march.last)
    return record, states, saver.result(march.u)
