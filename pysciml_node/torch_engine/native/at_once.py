"""Native solves that were before: a call of C looks whether they were, another takes the steps.

They leave a solution that knows its last state, and makes all else of the block of its request when
somebody asks. Where gradients are taken one more call makes them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.modes import has_inference
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.solutions.parts import in_parts
from pysciml_node.solutions.solution import ReturnCode, Solution
from pysciml_node.steps.autograd import graph_is_retained, is_recorded, saved_tensors_stay
from pysciml_node.torch_engine.native.cost import Costly
from pysciml_node.torch_engine.native.crossing import Block
from pysciml_node.torch_engine.native.engine import NativeSolve, Steps, pulled_back
from pysciml_node.torch_engine.native.flight import Log, States
from pysciml_node.torch_engine.native.library import SolveRequest
from pysciml_node.torch_engine.native.prepared import (
    Prepared,
    See,
    foreign_class,
    prepared_again,
)
from pysciml_node.torch_engine.native.run import flight_of, pull_back


def solve_again(
    problem: ODEProblem, algorithm: Algorithm, options: SolveOptions, engine: str
) -> Solution | None:
    """A native solve that was before but for its state and numbers; `None` where it was not.

    Args:
        problem: what is solved, as it was given.
        algorithm: how.
        options: of the solve.
        engine: name of the engine.
    """
    # What is a plain tensor has been looked at in C.
    if not (type(problem.u0) is Tensor and problem.p is None) and _is_special(problem):
        return None
    ready = prepared_again(problem, algorithm, options)
    if ready is None:
        return None
    flown = _Flown(problem, engine, *ready)
    left = _take_steps(flown)
    if left is None:
        return flown.made().solution()
    saved, _, last = left
    shaped = _as_it_is if problem.spec.keys is None else problem.spec.unflatten
    parts: dict[str, Any] = {
        "problem": problem,
        "algorithm": algorithm,
        "engine": engine,
        "retcode": ReturnCode.Success,
        "u1": shaped(last),
        "event": None,
    }
    if saved is not None:
        parts["saved"] = shaped(saved)
    return in_parts(Solution, partial(_part, flown, left), parts)


def _is_special(problem: ODEProblem) -> bool:
    """Whether a state, or an extra argument, is not as others of the problem's kind are."""
    u0 = problem.u0
    return has_inference(problem) or foreign_class(u0) is not None or not problem.spec.fits(u0)


def _as_it_is(state: Tensor) -> Tensor:
    return state


_Left = tuple[Tensor | None, Tensor | None, Tensor]
"""The saved states, those at the ends of the steps, where they have a graph, and the last one."""


def _take_steps(flown: _Flown) -> _Left | None:
    """Solve to the end; `None` where that takes more room than is made at first, or fails."""
    prepared, problem = flown.prepared, flown.problem
    recorded = torch.is_grad_enabled()
    # Of a field that jumps more is asked while it is as it was solved.
    if prepared.take_steps is None or (recorded and prepared.program.jumps):
        return None
    departure = prepared.departure
    flown.room = departure.room_at_once(departure.libraries[0].lately)
    if not flown.room:
        return None
    state: Any = problem.u0
    if problem.spec.keys is not None:
        state = problem.spec.flatten(state)
    u0, parameters = _unwrap(state), flown.parameters
    try:
        if recorded:
            left: _Left = _as_node(flown, u0, *parameters)
            return left
        return flown.fly(None, u0, parameters)
    except _NotAtOnce:
        return None


# Function transforms that have ended leave wrappers.
_unwrap: Callable[[Tensor], Tensor] = torch._C._functorch.unwrap_if_dead


class _NotAtOnce(Exception):
    """A solve takes more than the call of C."""


@dataclass(eq=False)
class _Flown(Costly):
    """What C has left of a solve, but for tensors.

    Attributes:
        problem: what is solved.
        engine: name of the engine.
        prepared: what it shares with others.
        parameters: the tensors that the code reads.
        see: gives the surroundings of the field as they are now.
        room: for steps.
        block: its request and its steps, with the states at their ends.
        count: accepted steps.
        kept: the stages of its first steps, for a sweep.
        kept_room: of how many steps there is room for them.
        solve: once something has needed it.
    """

    problem: ODEProblem
    engine: str
    prepared: Prepared
    parameters: list[Tensor]
    see: See
    room: int = 0
    block: Block = field(init=False)
    count: int = 0
    kept: Block | None = None
    kept_room: int = 0
    solve: NativeSolve | None = None

    @property
    def log(self) -> Log:
        """Its steps, with the states at their ends."""
        return Log(self.block, self.prepared.departure)

    @override
    def counted(self) -> tuple[int, int, int]:
        *_, accepted, rejected, evaluations, _, _ = SolveRequest.landed(self.block)
        return evaluations, accepted, rejected

    def made(self) -> NativeSolve:
        """The solve, which has not run."""
        prepared = self.prepared
        how = prepared.algorithm, prepared.departure.options, self.engine
        return NativeSolve(self.problem, *how, (prepared, self.parameters, self.see))

    def fly(self, kept: int | None, u0: Tensor, parameters: Sequence[Tensor]) -> _Left:
        """Solve.

        Args:
            kept: steps whose stages are kept, or `None` where there will be no sweep.
            u0: the initial state.
            parameters: the tensors that the code reads.

        Raises:
            _NotAtOnce: it takes more than one call, or does not end well.
        """
        prepared = self.prepared
        take_steps = prepared.take_steps
        threads = prepared.departure.libraries[0].threads
        left = take_steps and take_steps(self.room, kept, threads, u0, *parameters)
        if left is None:
            raise _NotAtOnce
        self.block, last, saved, ends, self.kept, self.count = left
        prepared.departure.libraries[0].lately = self.count
        return saved, ends, last

    def pull(
        self,
        wanted: tuple[bool, ...],
        saved: tuple[Tensor, ...],
        cotangents: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...] | None:
        """Gradients of the initial state and the parameters; `None` where it takes more.

        Args:
            wanted: which of them.
            saved: the states at the ends of steps, and the parameters.
            cotangents: of what `fly` has returned.
        """
        prepared = self.prepared
        swept = pull_back(
            self.log,
            (self.count, prepared.departure.save_count),
            (prepared.shape, wanted, saved, *cotangents),
            (self.kept, self.kept_room),
        )
        if swept is None:
            return None
        gradients, counts = swept
        self.note_sweep(*counts)
        return gradients

    def forget_stages(self) -> None:
        """There will be no further sweep."""
        self.kept, self.kept_room = None, 0
        if self.solve is not None:
            self.solve.flight.kept = None

    def solved(self) -> NativeSolve:
        """The solve."""
        if self.solve is None:
            with torch.no_grad():  # as when it was solved
                solve = self.made()
            found = SolveRequest.landed(self.block)
            solve.flight = flight = flight_of(self.log, found)
            flight.kept, flight.kept_room = self.kept, self.kept_room
            solve.shape, solve.stats = self.prepared.shape, self.stats
            self.solve = solve
        return self.solve


class _Node(torch.autograd.Function):
    """Such a solve in the graph."""

    @staticmethod
    @override
    def forward(
        ctx: Any, flown: _Flown, u0: Tensor, *parameters: Tensor
    ) -> tuple[Tensor | None, ...]:
        if saved_tensors_stay() and any(ctx.needs_input_grad):
            departure = flown.prepared.departure
            flown.kept_room = departure.kept_room(departure.libraries[0].lately)
        states = flown.fly(flown.kept_room, u0, parameters)
        ctx.flown = flown
        ctx.save_for_backward(states[1], *parameters)
        ctx.set_materialize_grads(False)
        return states

    @staticmethod
    @override
    def backward(
        ctx: Any, saved: Tensor | None, ends: Tensor | None, last: Tensor | None
    ) -> tuple[Any, ...]:
        needed, flown = ctx.needs_input_grad, ctx.flown
        if saved is ends is last is None:
            return (None,) * len(needed)
        # Read once: a checkpoint that saves nothing recomputes them, and gives them once.
        kept, wanted, cotangents = ctx.saved_tensors, needed[1:], (saved, ends, last)
        gradients = None if is_recorded(cotangents) else flown.pull(wanted, kept, cotangents)
        if gradients is None:
            gradients = pulled_back(flown.solved(), kept, wanted, cotangents)
        if flown.kept is not None and not graph_is_retained():
            flown.forget_stages()
        return (None, *gradients)


# Without what torch does for its transforms, in which native solves are refused.
_as_node: Callable[..., Any] = super(torch.autograd.Function, _Node).apply


def _part(flown: _Flown, left: _Left, name: str) -> Any:
    """A part of the solution of a solve, as of `Steps`."""
    if name == "stats":
        return flown.stats
    saved, ends, last = left
    ends = flown.log.ends(flown.count) if ends is None else ends
    if name == "states":
        return ends.clone()
    solve = flown.solved()
    saved = solve.departure.nothing if saved is None else saved
    return Steps(solve, solve.flight, States(saved, ends, last)).part(name)
