"""What a forward solve leaves behind: the accepted steps and where the saved states lie in them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from pysciml_node.adjoints import Adjoint
from pysciml_node.solution import ReturnCode
from pysciml_node.torch_engine.march import Attempt, March, Step


@dataclass
class Record:
    """The accepted steps of a solve, as numbers; the states are kept beside it.

    Attributes:
        times: ends of the steps, `t0` first, length `n + 1`.
        sizes: signed step sizes, length `n`.
        errors: scaled error estimates, length `n`.
        stops: for each step the stop it ends on, or `None`.
        inside: for a step, the saved times that lie inside it: their indices and `theta`.
        at_end: for a state index, the saved times that coincide with it.
        saved: how many of the requested times were reached.
        last: of a failed solve, the last attempt.
        marks: start, stops and end that were asked for.
    """

    times: list[float]
    sizes: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    stops: list[int | None] = field(default_factory=list)
    inside: dict[int, tuple[list[int], list[float]]] = field(default_factory=dict)
    at_end: dict[int, list[int]] = field(default_factory=dict)
    saved: int = 0
    naccept: int = 0
    nreject: int = 0
    retcode: ReturnCode = ReturnCode.Default
    last: Attempt | None = None
    marks: tuple[float, ...] = ()
    event: int | None = None
    t1_stop: int = 0

    def truncate(self, count: int) -> None:
        """Keep the first `count` times, and what was saved up to there."""
        steps = count - 1
        del self.times[count:], self.sizes[steps:], self.errors[steps:], self.stops[steps:]
        self.inside = {n: found for n, found in self.inside.items() if n < steps}
        self.at_end = {n: found for n, found in self.at_end.items() if n < count}
        self.saved = sum(len(indices) for indices, _ in self.inside.values())
        self.saved += sum(len(indices) for indices in self.at_end.values())
        self.naccept = steps


class Saver:
    """Collects the states at requested times from the steps that pass over them.

    Args:
        times: requested times in the order of integration.
        time_tensor: the same as a tensor where it receives gradients through the dense output.
        t0: start of the march.
        u0: state there.
        record: told where the saved times lie.
    """

    def __init__(
        self,
        times: Sequence[float],
        time_tensor: Tensor | None,
        t0: float,
        u0: Tensor,
        record: Record,
    ) -> None:
        self.times, self.time_tensor, self.record = times, time_tensor, record
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
        closed = self.time_tensor is not None and step.end != march.t1
        while last < len(self.times) and (
            (self.times[last] < end if forward else self.times[last] > end)
            or (closed and self.times[last] == end)
        ):
            last += 1
        if last > done:
            indices = list(range(done, last))
            theta = [(self.times[i] - step.t) / step.h for i in indices]
            self.record.inside[len(self.record.sizes)] = (indices, theta)
            at = torch.tensor(theta, dtype=torch.float64)
            if self.time_tensor is not None:
                at = (self.time_tensor[done:last] - step.time) / step.size
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


def follow(
    march: March,
    saveat: Sequence[float],
    saveat_tensor: Tensor | None,
    find_event: Callable[[Step, March], Step | None] | None,
    on_step: Callable[[Step], None] | None,
) -> tuple[Record, list[Tensor], Tensor]:
    """Run a march to its end.

    Returns:
        The record; the states at its times; the saved states `(saved, N)`.
    """
    tstops = march.options.tstops
    marks = (march.t0, *tstops, march.t1)
    record = Record(times=[march.t0], t1_stop=len(tstops), marks=marks)
    states = [march.u]
    saver = Saver(saveat, saveat_tensor, march.t0, march.u, record)
    for step in march:
        cut = find_event(step, march) if find_event is not None else None
        if cut is not None:
            step = cut
        saver.see(step, march)
        record.times.append(step.end)
        record.sizes.append(step.h)
        record.errors.append(step.error)
        record.stops.append(step.stop)
        states.append(step.u1)
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


class Recorded:
    """What trajectories read off the accepted steps of a solve.

    `load` gives the steps and the states at their ends, when something looks at them.
    """

    load: Callable[[], tuple[Record, list[Tensor]]]

    @cached_property
    def _loaded(self) -> tuple[Record, list[Tensor]]:
        return self.load()

    @property
    def record(self) -> Record:
        """The accepted steps."""
        return self._loaded[0]

    @property
    def times(self) -> list[float]:
        """Ends of the accepted steps, `t0` first."""
        return self.record.times

    @property
    def errors(self) -> list[float]:
        """Scaled error estimates of the accepted steps."""
        return self.record.errors


def check_discrete(adjoint: Adjoint) -> None:
    """Estimates of all steps can be differentiated by the adjoints that see the steps.

    Raises:
        ValueError: the adjoint is a continuous one.
    """
    if not adjoint.discrete:
        raise ValueError(
            f"the estimates of all steps are not differentiable with {type(adjoint).__name__}: "
            "the stages of a step are not part of the continuous equation.\n"
            "  Use adjoint=DiscreteAdjoint(), or LocalError, which works with every adjoint."
        )


def detached(attempt: Attempt) -> Attempt:
    """An attempt for a record, which must not hold on to the graph that it is part of."""
    return replace(attempt, u=attempt.u.detach(), u1=attempt.u1.detach())


def check_finite(record: Record, states: list[Tensor], adaptive: bool) -> None:
    """Fixed steps see no error estimate: look once, at the end, for what has gone wrong."""
    code = record.retcode
    if adaptive or not (code.successful or code is ReturnCode.Unstable):
        return
    if math.isfinite(float(states[-1].detach().abs().sum())):
        return
    # u0 stays, whatever it is.
    good = next((n for n, u in enumerate(states) if n and not bool(torch.isfinite(u).all())), None)
    if good is None:
        return
    record.retcode = ReturnCode.Unstable
    record.truncate(good)
    del states[good:]
