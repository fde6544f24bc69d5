"""Solves with events that change the state: pieces, and what happens between them.

Between two events the solve is an ordinary one, by any engine, with any adjoint. An event ends a
piece, its `affect` is an operation like any other, and the next piece starts at the event's time.
So gradients go through jumps, their times and what they do by the rules that hold for initial
states and ends of intervals, and need none of their own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem, Problem, Time, time_number
from pysciml_node.problems.state import StateSpec, map_tensors, tensors_of
from pysciml_node.solutions.joined import JoinedStats, joined_trajectory
from pysciml_node.solutions.jump import Jump
from pysciml_node.solutions.solution import ReturnCode, Solution
from pysciml_node.solving.engines import Engine
from pysciml_node.steps.apart import apart
from pysciml_node.steps.event_gradient import differentiable_event
from pysciml_node.steps.event_search import condition_value
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.guard import guard
from pysciml_node.steps.surroundings import Surroundings

Run = Callable[[ODEProblem, SolveOptions], Solution]


def run(engine: Engine, problem: Problem, algorithm: Algorithm, options: SolveOptions) -> Solution:
    """Solve by an engine that has been chosen, from event to event.

    Args:
        engine: runs the pieces.
        problem: what is solved.
        algorithm: how.
        options: of the whole solve.

    Returns:
        The solution; of several pieces with `jumps`.

    Raises:
        TypeError: an `affect` that takes other arguments than there are.
        ValueError: times of events outside of the interval, or a terminal event at its start.
    """

    if not options.events:
        return engine.solve(problem, algorithm, options)

    def piece(problem: Problem, options: SolveOptions) -> Solution:
        solution = engine.solve(problem, algorithm, options)
        if solution.event is not None:
            differentiable_event(solution, options.events[solution.event], options.tstops)
        return solution

    if all(event.stops for event in options.events):
        return piece(problem, options)
    assert isinstance(problem, ODEProblem)
    _check(problem, options.events)
    return _Solve(problem, options, piece).result()


def _check(problem: ODEProblem, events: tuple[Event, ...]) -> None:
    """Refuse events that do not go with a problem."""
    low, high = sorted((problem.t0, problem.t1))
    for i, event in enumerate(events):
        if event.affect is not None and not checks.takes(event.affect, 2 + (problem.p is not None)):
            arguments = ("t", "u") if problem.p is None else ("t", "u", "p")
            hint = "" if problem.p is None else "p is given: let affect take (t, u, p)."
            checks.function(f"events[{i}].affect", event.affect, *arguments, hint=hint)
        for t in checks.numbers("at", event.at) if event.at is not None else ():
            if not low <= t <= high:
                raise ValueError(
                    f"events[{i}] must happen inside tspan ({problem.t0}, {problem.t1}), but has "
                    f"the time {t}.\n  Widen tspan, or drop the times beyond it."
                )


class _Solve:
    """One solve in pieces."""

    def __init__(self, problem: ODEProblem, options: SolveOptions, run: Run) -> None:
        self.problem, self.options, self.run = problem, options, run
        self.events = options.events
        self.conditions = [i for i, e in enumerate(self.events) if e.condition is not None]
        self.schedule = _schedule(problem, self.events)
        self.pieces: list[Solution] = []
        self.rows: list[tuple[Tensor, Any]] = []
        self.jumps: list[Jump] = []
        self.fired: list[int] = []
        self.changed = False
        self.stopped: int | None = None
        self.failure: ReturnCode | None = None
        self.given = list(options.saveat or ())

    def result(self) -> Solution:
        """Solve, and join the pieces.

        Raises:
            ValueError: a terminal event at the start.
        """
        now, u = self.problem.tspan[0], self.problem.u0
        happening = self._due(now)
        if happening and self.options.saveat is None:
            self._keep(now, u)
        u = self._happen(happening, now, u)
        if self.stopped is not None:
            raise ValueError(
                f"events[{self.stopped}] ends the solve at its start: there is nothing to solve.\n"
                "  Leave the event out, or start before it."
            )
        while self.stopped is None and time_number(now) != self.problem.t1:
            end = self.schedule[0][0] if self.schedule else self.problem.tspan[1]
            if _distinct(time_number(now), time_number(end)):
                piece, start = self._piece(now, end, u), now
                self.pieces.append(piece)
                u, now, happening = self._arrived(piece, end)
                self._save(piece, whole=not happening)
                self.failure = self._failed(start, now, happening)
                if self.failure is not None:
                    self.changed = False
                    break
            else:
                now, happening = end, self._due(end)
            u = self._happen(happening, now, u)
        if self.changed or self.given:
            self._keep(now, u)
        return self._join(u)

    def _failed(self, start: Time, now: Time, happening: list[int]) -> ReturnCode | None:
        """Why the solve does not go on, having arrived at `now`."""
        last = self.pieces[-1].retcode
        if not last.successful:
            return last
        # An event that keeps happening may leave no time for a step, as a ball's bounces do.
        again = any(i in self.fired for i in happening if i in self.conditions)
        if again and not _distinct(time_number(start), time_number(now)):
            return ReturnCode.DtLessThanMin
        unfinished = happening and time_number(now) != self.problem.t1
        if unfinished and self._taken() >= self.options.max_steps:
            return ReturnCode.MaxIters
        return None

    def _taken(self) -> int:
        return sum(p.stats.naccept + p.stats.nreject for p in self.pieces)

    def _due(self, t: Time) -> list[int]:
        """The events that are scheduled for a time; they are taken off the schedule."""
        due = []
        while self.schedule and time_number(self.schedule[0][0]) == time_number(t):
            due.append(self.schedule.pop(0)[1])
        return due

    def _piece(self, start: Time, end: Time, u: Any) -> Solution:
        options, t0, t1 = self.options, time_number(start), time_number(end)
        low, high = min(t0, t1), max(t0, t1)
        sign = self.problem.direction
        times = tuple(t for t in self.given if sign * t <= sign * t1)
        tensor = options.saveat_tensor
        if tensor is not None:
            first = len(tensor) - len(self.given)
            tensor = tensor[first : first + len(times)]
        controller, dt0 = options.controller, options.dt0
        if isinstance(controller, FixedStep):
            controller = controller.within(t0, t1)
        elif self.pieces:
            dt0 = None
        own = dataclasses.replace(
            options,
            saveat=times or None,
            saveat_tensor=tensor if times else None,
            tstops=tuple(t for t in options.tstops if low < t < high),
            controller=controller,
            dt0=None if dt0 is None else min(dt0, high - low),
            max_steps=options.max_steps - self._taken(),
            events=tuple(self.events[i] for i in self.conditions),
            fired=tuple(self.conditions.index(i) for i in self.fired if i in self.conditions),
        )
        return self.run(self.problem.part(start, end, u), own)

    def _arrived(self, piece: Solution, end: Time) -> tuple[Any, Time, list[int]]:
        """State, time, and what happens where a piece has ended."""
        if not piece.success:
            return piece.u1, piece.trajectory.times[-1], []
        if piece.event is None:
            return piece.u1, end, self._due(end)
        first = self.conditions[piece.event]
        others = [i for i in self.conditions if i != first and self._crosses_too(piece, i)]
        t: Time = piece.trajectory.times[-1]
        assert piece.event_t is not None
        if piece.event_t.requires_grad:
            # Times of steps are double, whatever the state is.
            moving = (piece.event_t - piece.event_t.detach()).double()
            t = torch.tensor(t, dtype=torch.float64, device=moving.device) + moving
        return piece.u1, t, [*self._due(t), *sorted([first, *others])]

    def _crosses_too(self, piece: Solution, i: int) -> bool:
        """Whether a condition crosses zero where another event has ended a piece."""
        event, trajectory = self.events[i], piece.trajectory
        before, after = (
            condition_value(event, self.problem, trajectory.times[n], trajectory.flat_states[n])
            for n in (-2, -1)
        )
        rounding = torch.finfo(self.problem.spec.real_dtype).eps ** 0.75
        touches = abs(after) <= rounding * abs(before)
        return event.crosses(before, after) or (touches and event.crosses(before, -before))

    def _happen(self, events: list[int], t: Time, u: Any) -> Any:
        """Let events happen, one after the other; the state that they leave."""
        self.fired, self.changed = events, False
        time = self._time(t)
        for i in events:
            event = self.events[i]
            after = u if event.affect is None else self._affected(i, event, time, u)
            self.jumps.append(Jump(i, time, u, after))
            self.changed = self.changed or after is not u
            u = after
            if event.terminal and self.stopped is None:
                self.stopped = i
        return u

    def _affected(self, i: int, event: Event, t: Tensor, u: Any) -> Any:
        assert event.affect is not None
        # What is changed in place is not what the solution keeps.
        given = map_tensors(torch.clone, u)
        extra = () if self.problem.p is None else (self.problem.p,)
        with apart(f"events[{i}].affect", (t, *tensors_of(given))):
            after = event.affect(t, given, *extra)
        spec = self.problem.spec
        try:
            made = StateSpec.of(after)
        except (TypeError, ValueError):
            made = None
        if made != spec:
            raise ValueError(
                f"events[{i}].affect must return a state like u0, {_described(spec)}, but returned "
                f"{checks.shown(after) if made is None else _described(made)}.\n"
                "  Return the new state; a state that is changed in place has to be returned too."
            )
        if torch.is_grad_enabled():
            reach = Surroundings({"affect": event.affect, "p": self.problem.p})
            guard(tensors_of(after), reach, (t, *tensors_of(given)))
        return after

    def _time(self, t: Time) -> Tensor:
        if isinstance(t, Tensor):
            return t.to(self.problem.spec.device, self.problem.spec.real_dtype)
        return self.problem.time_tensor([t])[0]

    def _save(self, piece: Solution, *, whole: bool) -> None:
        """Take what a piece has saved; at a jump the state after it counts."""
        if self.options.saveat is None:
            # The start of a piece is the end of the one before, unless the state has jumped.
            first = int(len(self.pieces) > 1 and not self.changed)
            self.rows.append((piece.t[first:], map_tensors(lambda x: x[first:], piece.u)))
            return
        sign, end = self.problem.direction, piece.trajectory.times[-1]
        count = sum(sign * t < sign * end or (whole and t == end) for t in self.given)
        self.rows.append((piece.t[:count], map_tensors(lambda x: x[:count], piece.u)))
        del self.given[:count]

    def _keep(self, now: Time, u: Any) -> None:
        """Keep a state that no piece has saved: one side of a jump at an end of the interval."""
        sign = self.problem.direction
        here = [t for t in self.given if sign * t <= sign * time_number(now)]
        if self.options.saveat is None:
            here = [time_number(now)]
        if here:
            rows = map_tensors(lambda x: x.expand(len(here), *x.shape), u)
            times, moving = self.problem.time_tensor(here), self.options.saveat_tensor
            if moving is not None:
                first = len(moving) - len(self.given)
                moving = moving[first : first + len(here)].to(times)
                rows = self._along(rows, now, u, moving - moving.detach())
            self.rows.append((times, rows))

    def _along(self, rows: Any, now: Time, u: Any, moves: Tensor) -> Any:
        """States at a jump, which move along the field with the times that asked for them."""
        spec = self.problem.spec
        with torch.no_grad():
            rate = FlatField(self.problem)(self._time(now), spec.flatten(u))
        flat = torch.cat([x.reshape(len(moves), -1) for x in spec.parts(rows)], dim=1)
        return spec.unflatten(flat + moves[:, None] * rate)

    def _join(self, u: Any) -> Solution:
        last = self.pieces[-1]
        retcode = self.failure or ReturnCode.Success
        if self.stopped is not None:
            retcode = ReturnCode.Terminated
        spec = self.problem.spec
        parts = [spec.parts(rows) for _, rows in self.rows]
        return dataclasses.replace(
            last,
            problem=self.problem,
            retcode=retcode,
            stats=JoinedStats([piece.stats for piece in self.pieces]),
            t=torch.cat([t for t, _ in self.rows]),
            u1=u,
            trajectory=joined_trajectory(self.pieces, spec.flatten(u) if self.changed else None),
            saved=spec.assemble([torch.cat(rows) for rows in zip(*parts, strict=True)]),
            event=self.stopped,
            event_t=None if self.stopped is None else self.jumps[-1].t,
            jumps=tuple(self.jumps),
        )


def _schedule(problem: ODEProblem, events: tuple[Event, ...]) -> list[tuple[Time, int]]:
    """The times that events name, in the order of integration, and of the events among equals."""
    named: list[tuple[Time, int]] = []
    for i, event in enumerate(events):
        if isinstance(event.at, Tensor):
            moving = event.at.double()
            named += [(t if t.requires_grad else float(t), i) for t in moving.unbind()]
        elif event.at is not None:
            named += [(float(t), i) for t in event.at]
    return sorted(named, key=lambda item: problem.direction * time_number(item[0]))


def _distinct(t0: float, t1: float) -> bool:
    """Whether there is room for a step between two times."""
    return abs(t1 - t0) > 16 * math.ulp(max(abs(t0), abs(t1)))


def _described(spec: StateSpec) -> str:
    shapes = ", ".join(str(tuple(shape)) for shape in spec.shapes)
    structure = "" if spec.keys is None else f"parts {list(spec.keys)} "
    return f"{structure}of shape {shapes} and {spec.dtype}"
