"""Prepared solves: one crossing forward, one back; of the steps only what is asked for is read."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.julia_engine.forward import RETCODES
from pysciml_node.julia_engine.prepared import Prepared, Ready
from pysciml_node.julia_engine.process.buffers import address, integers, room_for
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.julia_engine.process.runtime import cross
from pysciml_node.problems.modes import uncompiled
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.parts import in_parts
from pysciml_node.solutions.solution import ReturnCode, Solution, Stats, Trajectory
from pysciml_node.steps.autograd import pulled
from pysciml_node.steps.finish import Solve
from pysciml_node.steps.record import Kept, Outcome, Record, finite_part


class States(NamedTuple):
    """The states that a solve leaves, with their graph where there is one.

    Attributes:
        saved: at the saved times that were reached, as the initial one was given; `None` where
            there is no such time.
        ends: the initial one, and those at the ends of the accepted steps, `(n + 1, N)`.
        last: the one that it got to.
    """

    saved: Tensor | None
    ends: Tensor
    last: Tensor


@dataclass
class Flight:
    """What a solve leaves besides states.

    Attributes:
        prepared: what was solved, and how.
        packed: memory with the parameters in one piece.
        log: as `fly!` of `julia/src/flight.jl` writes it.
        count: accepted steps.
        reached: saved times that were reached.
        nfe: evaluations.
        nreject: rejected steps.
        retcode: how it ended.
        finite: whether the last state is, and so all of them are.
    """

    prepared: Prepared
    packed: array[float]
    log: array[float]
    count: int
    reached: int
    nfe: int
    nreject: int
    retcode: ReturnCode
    finite: bool

    @cached_property
    def record(self) -> Record:
        """The accepted steps, and where the saved times lie in them."""
        departure = self.prepared.departure
        options, marks, asked = departure.options, departure.marks, departure.saves
        steps: list[float] = self.log[2 * asked : 2 * asked + 4 * self.count].tolist()
        record = Record(
            times=[marks[0], *steps[::4]],
            sizes=steps[1::4],
            errors=steps[2::4],
            stops=[None if stop < 0 else int(stop) for stop in steps[3::4]],
            saved=self.reached,
            naccept=self.count,
            nreject=self.nreject,
            retcode=self.retcode,
            marks=marks,
            t1_stop=len(options.tstops),
        )
        record.place(options.saveat or (), self._places)
        return record

    @property
    def _places(self) -> list[tuple[float, float]]:
        """Those of `Record.place`."""
        numbers = self.log[: 2 * self.reached].tolist()
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def good(self, ends: Tensor) -> tuple[int, int]:
        """As `finite_part`, which is asked where something is not.

        Args:
            ends: states at the ends of the steps, the initial one first.
        """
        if self.finite:
            return self.count, self.reached
        return finite_part(ends, self._places)


def _lying(x: Tensor) -> Tensor:
    """A tensor as Julia reads it; itself, where it is."""
    if x.is_contiguous() and not x.is_neg():
        return x
    return x.detach().resolve_neg().contiguous()


def fly(prepared: Prepared, u0: Tensor, parameters: list[Tensor]) -> tuple[Flight, States]:
    """Solve forward, where no gradients are taken.

    Args:
        prepared: what to solve, and how.
        u0: the state.
        parameters: of the field.
    """
    departure, start = prepared.departure, _lying(u0)
    size, room, saves = departure.size, departure.room, departure.saves
    ends, last = start.new_empty((room + 1, size)), start.new_empty(start.shape)
    saved = start.new_empty((saves, *start.shape)) if saves else None
    packed, log = room_for(prepared.doubles), room_for(2 * saves + 4 * room)
    read = list(map(_lying, parameters))
    tensors, report = integers([x.data_ptr() for x in read]), integers((0,) * 6)
    left = cross(
        "fly!",
        prepared.handle.number,
        start.data_ptr(),
        address(tensors),
        address(packed),
        0 if saved is None else saved.data_ptr(),
        last.data_ptr(),
        room,
        ends.data_ptr(),
        address(log),
        address(report),
    )
    count, reached, nfe, nreject, code, finite = report
    if left:
        ends = start.new_empty((count + 1, size))
        log, record = room_for(2 * saves + 4 * count), Handle(left)
        numbers = torch.frombuffer(log, dtype=torch.float64)
        enter("fetch_flight!", prepared=prepared.handle, record=record, ends=ends, log=numbers)
        record.forget()
    elif count < room:
        # In place: a view would keep what is not needed of the room in sight.
        ends.resize_(count + 1, size)
    if saved is not None and reached < saves:
        saved.resize_(reached, *start.shape)
    retcode = RETCODES[code]
    flight = Flight(prepared, packed, log, count, reached, nfe, nreject, retcode, bool(finite))
    return flight, States(saved, ends, last)


class PreparedSolve(Solve):
    """One prepared solve: its parts, and the ways to run it.

    Attributes:
        prepared: what it shares with others.
        parameters: the tensors that the program reads.
        flight: what has been flown.
    """

    problem: ODEProblem
    flight: Flight

    def __init__(
        self,
        problem: ODEProblem,
        algorithm: Algorithm,
        options: SolveOptions,
        engine: str,
        ready: Ready,
    ) -> None:
        super().__init__(problem, algorithm, options, engine)
        self.prepared, self.parameters, self._see = ready
        spec, u0 = problem.spec, problem.u0
        self.u0: Any = u0 if spec.keys is None else spec.flatten(u0)

    def fly(self, u0: Tensor) -> States:
        """Solve forward from a state, where no gradients are taken."""
        self.flight, states = fly(self.prepared, u0, self.parameters)
        self.stats.nfe = self.flight.nfe
        return states

    def _flown(self) -> States:
        if not torch.is_grad_enabled():
            return self.fly(self.u0)
        return States(*_as_node(self, self.u0, *self.parameters))

    @override
    def run(self) -> Outcome:
        return self._outcome(self._flown())

    def _outcome(self, states: States) -> Outcome:
        ends, saved = states.ends, states.saved
        flat = ends[:0] if saved is None else saved.reshape(len(saved), self.u0.numel())
        # Not the last state itself, which its owner may change.
        return Outcome(self.flight.record, list(ends.unbind()), flat)

    @override
    def trajectory(self, outcome: Outcome) -> Trajectory:
        return self._trajectory(Kept(outcome.record, outcome.states))

    def _trajectory(self, load: Callable[[], tuple[Record, list[Tensor]]]) -> Trajectory:
        spec = self.problem.spec
        assert isinstance(self.algorithm, ExplicitRungeKutta)
        return TorchTrajectory(
            self.problem,
            Method.all_of(self.algorithm.tableaus, spec.dtype, spec.device),
            load,
            self.stats,
            self.options,
            self.prepared.seen(self.parameters, self.flight.packed).flat,
            self._see(),
            rounded_times=True,
        )

    @override
    def solution(self) -> Solution:
        states = self._flown()
        flight = self.flight
        if not (flight.finite or self.watched):
            return self.looked_through(self._outcome(states))
        # Where nothing looks at the steps they stay as they are.
        self.stats.naccept, self.stats.nreject = flight.count, flight.nreject
        parts: dict[str, Any] = {
            "problem": self.problem,
            "algorithm": self.algorithm,
            "engine": self.engine,
            "retcode": flight.retcode,
            "stats": self.stats,
            "u1": self._shaped(states.last),
            "event": None,
        }
        if self.options.saveat is not None:
            saved = states.saved
            parts["saved"] = self._shaped(
                self.u0.new_empty((0, *self.u0.shape)) if saved is None else saved
            )
        return in_parts(Solution, partial(self._part, states), parts)

    def _shaped(self, x: Tensor) -> Any:
        """States in the structure of the initial one."""
        spec = self.problem.spec
        return x if spec.keys is None else spec.unflatten(x)

    def _part(self, states: States, name: str) -> Any:
        """The trajectory for a solution, or the times of its states."""
        flight = self.flight
        if name == "states":
            return torch.stack(self._outcome(states).states)
        if name == "trajectory":
            return self._trajectory(lambda: self._outcome(states)[:2])
        ends = flight.record.times if self.options.saveat is None else ()
        return self.times(flight.reached, ends)


class _Node(torch.autograd.Function):
    """A prepared solve in the graph: its `States`."""

    @staticmethod
    @override
    def forward(
        ctx: Any, solve: PreparedSolve, u0: Tensor, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        states = solve.fly(u0)
        ctx.flight, ctx.stats = solve.flight, solve.stats
        ctx.shape = u0.shape  # as it is now: `.data` may be given other data before the sweep
        ctx.save_for_backward(states.ends, u0, *parameters)
        ctx.set_materialize_grads(False)
        return states

    @staticmethod
    @override
    @uncompiled
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if all(x is None for x in cotangents):
            return (None,) * len(needed)
        # Read once: a checkpoint that saves nothing recomputes them, and gives them once.
        kept = ctx.saved_tensors
        pull = partial(_pull, ctx.flight, ctx.stats, kept[0], ctx.shape, needed[1:])
        return (None, *pulled(pull, kept, *cotangents))


def _pull(
    flight: Flight,
    stats: Stats,
    ends: Tensor,
    shape: torch.Size,
    wanted: tuple[bool, ...],
    *cotangents: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the initial state and of the parameters that are wanted.

    Args:
        flight: the solve.
        stats: its backward fields are filled.
        ends: the states at the ends of the steps, the initial one first.
        shape: of the initial state, when the solve began.
        wanted: which of them have gradients.
        *cotangents: of its `States`.
    """
    prepared, (count, reached) = flight.prepared, flight.good(ends)
    arriving = [None if x is None else _lying(x) for x in cotangents]
    if count < flight.count:
        arriving[-1] = None  # of a failed solve the last good state is the last of the steps'
    saved, at_ends, last = (0 if x is None else x.data_ptr() for x in arriving)
    size = prepared.departure.size
    bars, report = ends.new_empty(prepared.length + size), integers((0, 0))
    cross(
        "pull_flight!",
        prepared.handle.number,
        count,
        reached,
        address(flight.packed),
        ends.data_ptr(),
        address(flight.log),
        saved,
        at_ends,
        last,
        bars.data_ptr(),
        address(report),
    )
    replayed, evaluations = report
    stats.naccept_backward += replayed
    stats.nfe_backward += evaluations
    stats.nvjp += evaluations
    split = torch._utils._unflatten_dense_tensors(bars, prepared.forms)  # type: ignore[no-untyped-call]
    *parts, start = split
    of = zip(parts, wanted[1:], prepared.field.pulled, strict=True)
    return (
        start.view(shape) if wanted[0] else None,
        *(part if needed and pulls else None for part, needed, pulls in of),
    )


# Without what torch does for its transforms, in which solves are not prepared.
_as_node: Callable[..., Any] = super(torch.autograd.Function, _Node).apply
