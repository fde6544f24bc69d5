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
from pysciml_node.translation.repeated import is_looked_at


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
    if not (problem.p is None and is_looked_at(problem.u0)) and _is_special(problem):
        return None
    ready = prepared_again(problem, algorithm, options)
    if ready is None:
        return None
    flown = _Flown(problem, engine, *ready)
    left = _take_steps(flown)
    if left is None:
        return flown.made().solution()
    saved, _, *last = left
    spec = problem.spec
    parts: dict[str, Any] = {
        "problem": problem,
        "algorithm": algorithm,
        "engine": engine,
        "retcode": ReturnCode.Success,
        "u1": spec.assemble(last),
        "event": None,
    }
    if saved is not None:
        parts["saved"] = saved if spec.keys is None else spec.unflatten(saved)
    return in_parts(Solution, partial(_part, flown, left), parts)


def _is_special(problem: ODEProblem) -> bool:
    """Whether a state, or an extra argument, is not as others of the problem's kind are."""
    u0 = problem.u0
    return has_inference(problem) or foreign_class(u0) is not None or not problem.spec.fits(u0)


_Left = tuple[Any, ...]
"""The saved states, those at the ends of the steps, where they have a graph, and the parts of the
last one."""


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
    given = *map(_unwrap, problem.spec.parts(problem.u0)), *flown.parameters
    try:
        if recorded:
            left: _Left = _as_node(flown, *given)
            return left
        return flown.fly(None, given)
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

    def fly(self, kept: int | None, given: Sequence[Tensor]) -> _Left:
        """Solve.

        Args:
            kept: steps whose stages are kept, or `None` where there will be no sweep.
            given: the parts of the initial state, and the tensors that the code reads.

        Raises:
            _NotAtOnce: it takes more than one call, or does not end well.
        """
        prepared = self.prepared
        take_steps = prepared.take_steps
        threads = prepared.departure.libraries[0].threads
        left = take_steps and take_steps(self.room, kept, threads, *given)
        if left is None:
            raise _NotAtOnce
        self.block, last, saved, ends, self.kept, self.count = left
        prepared.departure.libraries[0].lately = self.count
        return saved, ends, *last

    def pull(
        self,
        wanted: tuple[bool, ...],
        saved: tuple[Tensor, ...],
        cotangents: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...] | None:
        """Gradients of the parts of the initial state, and of the parameters; `None` where it takes
        more.

        Args:
            wanted: which of them.
            saved: the states at the ends of steps, and the parameters.
            cotangents: of what `fly` has returned.
        """
        prepared = self.prepared
        swept = pull_back(
            prepared.pull,
            self.log,
            (self.count, prepared.departure.save_count),
            (prepared.spec.shapes, wanted, saved, *cotangents[:2], cotangents[2:]),
            (self.kept, self.kept_room),
        )
        if swept is None:
            return None
        gradients, counts = swept
        self.note_sweep(*counts)
        return gradients

    def pull_in_turns(
        self,
        wanted: tuple[bool, ...],
        saved: tuple[Tensor, ...],
        cotangents: tuple[Tensor | None, ...],
    ) -> tuple[Tensor | None, ...]:
        """The same by the solve itself, whose state is in one piece; arguments as of `pull`."""
        spec, solve = self.prepared.spec, self.solved()
        if spec.keys is None:
            return pulled_back(solve, saved, wanted, cotangents)
        count, (at_saved, at_ends, *at_parts) = len(spec.shapes), cotangents
        last = None
        if any(x is not None for x in at_parts):
            pairs = zip(at_parts, spec.shapes, strict=True)
            zero = saved[0].new_zeros
            last = spec.flatten(spec.assemble([zero(y) if x is None else x for x, y in pairs]))
        needed = any(wanted[:count]), *wanted[count:]
        start, *others = pulled_back(solve, saved, needed, (at_saved, at_ends, last))
        parts = [None] * count if start is None else spec.parts(spec.unflatten(start))
        return (*(x if y else None for x, y in zip(parts, wanted, strict=False)), *others)

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
    def forward(ctx: Any, flown: _Flown, *given: Tensor) -> _Left:
        if saved_tensors_stay() and any(ctx.needs_input_grad):
            departure = flown.prepared.departure
            flown.kept_room = departure.kept_room(departure.libraries[0].lately)
        states = flown.fly(flown.kept_room, given)
        ctx.flown = flown
        ctx.save_for_backward(states[1], *given[len(states) - 2 :])
        ctx.set_materialize_grads(False)
        return states

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        needed, flown = ctx.needs_input_grad, ctx.flown
        if cotangents[-1] is None and all(x is None for x in cotangents):
            return (None,) * len(needed)
        # Read once: a checkpoint that saves nothing recomputes them, and gives them once.
        kept, wanted = ctx.saved_tensors, needed[1:]
        gradients = None if is_recorded(cotangents) else flown.pull(wanted, kept, cotangents)
        if gradients is None:
            gradients = flown.pull_in_turns(wanted, kept, cotangents)
        if flown.kept is not None and not graph_is_retained():
            flown.forget_stages()
        return (None, *gradients)


# Without what torch does for its transforms, in which native solves are refused.
_as_node: Callable[..., Any] = super(torch.autograd.Function, _Node).apply


def _part(flown: _Flown, left: _Left, name: str) -> Any:
    """A part of the solution of a solve, as of `Steps`."""
    if name == "stats":
        return flown.stats
    saved, ends, *_ = left
    ends = flown.log.ends(flown.count) if ends is None else ends
    if name == "states":
        return ends.clone()
    solve = flown.solved()
    saved = solve.departure.nothing if saved is None else saved
    return Steps(solve, solve.flight, States(saved, ends, ends[-1])).part(name)
