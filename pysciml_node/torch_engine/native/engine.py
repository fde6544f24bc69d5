"""`solve(..., compile=True)`: from a checked problem to native code and back to a solution."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.switching import OneStepMethod
from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.modes import uncompiled
from pysciml_node.problems.ode import ODEProblem, Problem, ends_of
from pysciml_node.replay.end_times import complete_times, lacks_ends
from pysciml_node.replay.newton import Accuracy
from pysciml_node.replay.stages import Method
from pysciml_node.solutions.parts import in_parts
from pysciml_node.solutions.solution import Solution, Trajectory
from pysciml_node.steps.autograd import graph_is_retained, pulled, saved_tensors_stay
from pysciml_node.steps.cotangents import BackwardPass, Gradients, TimeCotangents
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.finish import Solve
from pysciml_node.steps.progress import step_listener
from pysciml_node.steps.record import Kept, Outcome, Record
from pysciml_node.steps.step import Step
from pysciml_node.torch_engine.native.brownian import Noise
from pysciml_node.torch_engine.native.cost import Costly
from pysciml_node.torch_engine.native.departure import Departure
from pysciml_node.torch_engine.native.events import Search, watched
from pysciml_node.torch_engine.native.flight import Flight, Log, States
from pysciml_node.torch_engine.native.prepared import Ready, See, no_code, prepare
from pysciml_node.torch_engine.native.run import (
    Swept,
    fly,
    pull_back,
    sweep_back,
)
from pysciml_node.torch_engine.native.trajectory import FieldProgram, NativeTrajectory


class FlownSolve(Solve):
    """What native code has solved.

    Args:
        problem: what was solved.
        algorithm: how.
        options: of the solve.
        engine: name of the engine.
        surroundings: gives the field as the solve saw it.

    Attributes:
        parameters: the tensors that the code reads.
    """

    # Whether the ends receive gradients that the steps do not have.
    fixed = False
    # Whether the field is translated where native code takes steps again, or is known.
    translated = True
    parameters: Sequence[Tensor] = ()

    def __init__(
        self,
        problem: Problem,
        algorithm: Algorithm,
        options: SolveOptions,
        engine: str,
        surroundings: See,
    ) -> None:
        super().__init__(problem, algorithm, options, engine)
        self.surroundings = surroundings
        # As they are now: an optimizer may go on and change tensors that gave them.
        self.interval = ends_of(problem)
        spec, u0 = problem.spec, problem.u0
        self.u0: Any = u0 if spec.keys is None else spec.flatten(u0)

    @property
    def program(self) -> FieldProgram | None:
        """The field, where native code takes steps again."""
        return None

    def record(self, flight: Flight) -> Record:
        """Its steps as the rest of the package reads them."""
        record = flight.record(self.interval, self.options)
        record.fixed = self.fixed
        return record

    @abstractmethod
    def flown(self) -> tuple[Flight, States]:
        """What native code has left, with its graph."""

    def stepped(self, states: States) -> list[Tensor]:
        """The initial state and those at the ends of the steps, flat."""
        # Not the last state itself, which its owner may change.
        return list(states.ends.unbind())

    @override
    def run(self) -> Outcome:
        flight, states = self.flown()
        return self._outcome(Steps(self, flight, states))

    def _outcome(self, steps: Steps) -> Outcome:
        saved = steps.states.saved
        return Outcome(*steps(), saved.reshape(len(saved), self.u0.numel()))

    @override
    def trajectory(self, outcome: Outcome) -> Trajectory:
        return self.trajectory_of(Kept(outcome.record, outcome.states))

    def trajectory_of(self, load: Steps | Kept) -> Trajectory:
        """Dense output and local estimates of steps that are at hand, or made when needed."""
        spec = self.problem.spec
        assert isinstance(self.problem, ODEProblem)
        assert isinstance(self.algorithm, OneStepMethod)
        accuracy = Accuracy.of(self.options, spec.dtype, sum(spec.sizes))
        methods = Method.all_of(self.algorithm.tableaus, spec.dtype, spec.device, accuracy=accuracy)
        return NativeTrajectory(
            self.problem,
            methods,
            load,
            self.stats,
            self.options,
            surroundings=self.surroundings(),
            program=self.program,
            translated=self.translated,
        )

    @override
    def solution(self) -> Solution:
        flight, states = self.flown()
        steps = Steps(self, flight, states)
        if not (flight.finite or self.watched):
            return self.looked_through(self._outcome(steps))
        # Where nothing looks at the steps they stay as they are.
        parts: dict[str, Any] = {
            "problem": self.problem,
            "algorithm": self.algorithm,
            "engine": self.engine,
            "retcode": flight.retcode,
            "u1": self._shaped(states.last),
            "event": flight.event,
        }
        if self.options.saveat is not None:
            parts["saved"] = self._shaped(states.saved, 1)
        if self.options.saveat_tensor is not None:
            parts["t"] = self.times(flight.reached, ())
        return in_parts(Solution, steps.part, parts)

    def _shaped(self, x: Tensor, leading: int = 0) -> Any:
        """States, flat or as the initial one was given, in its structure."""
        spec, x = self.problem.spec, self.state(x)
        if spec.keys is None and x.dim() == leading + len(spec.shapes[0]):
            return x
        return spec.unflatten(x)


class SingleSolve(Costly, FlownSolve):
    """One call of native code: run by `_Node`, or alone where no gradient is asked for.

    Attributes:
        departure: its code, and how it begins.
        search: the events that it looks for.
        flight: what has been flown.
        moving: the ends of the interval and the saved times, where any of them is a tensor.
        shape: of the initial state when the solve began.
    """

    departure: Departure
    shape: torch.Size
    search: Search | None = None
    flight: Flight
    moving: tuple[Any, ...] = ()

    def noise(self) -> Noise | None:
        """The Brownian motions of a stochastic equation."""
        return None

    def fly(self, u0: Tensor, keeps: bool = False) -> States:
        """Solve forward from a state, where no gradients are taken."""
        how = self.departure, u0, self.parameters, self.search
        noise = self.noise()
        if self.options.progress:
            with step_listener(True, self.problem) as on_step:
                flight, states = fly(*how, _turns(on_step), keeps, noise)
        else:
            flight, states = fly(*how, None, keeps, noise)
        self.flight = flight
        if noise is not None:
            self.stats.nfe_diffusion = noise.evaluations
        return states

    @override
    def counted(self) -> tuple[int, int, int]:
        flight = self.flight
        return flight.nfe, flight.count, flight.nreject

    @override
    def flown(self) -> tuple[Flight, States]:
        u0 = self.u0 = torch._C._functorch.unwrap_if_dead(self.u0)
        if not torch.is_grad_enabled():
            states = self.fly(u0)
            return self.flight, states
        (t0, t1), saveat = self.problem.tspan, self.options.saveat_tensor
        # Torch takes its time for each thing that a node is given.
        if not (type(t0) is type(t1) is float and saveat is None):
            self.moving = t0, t1, saveat
        saved, ends, last = _as_node(self, u0, *self.moving, *self.parameters)
        return self.flight, States(self.departure.nothing if saved is None else saved, ends, last)


class NativeSolve(SingleSolve):
    """One native solve of an ordinary equation.

    Raises:
        CompileError: an option or the field has no native code, or there is no compiler.
    """

    problem: ODEProblem

    def __init__(
        self,
        problem: ODEProblem,
        algorithm: Algorithm,
        options: SolveOptions,
        engine: str,
        ready: Ready | None = None,
    ) -> None:
        ready = ready or prepare(problem, algorithm, options)
        prepared, self.parameters, see = ready
        super().__init__(problem, algorithm, options, engine, see)
        self.prepared = prepared
        self.departure = prepared.departure
        # Only an operation without a derivative hides the time.
        if prepared.program.jumps and torch.is_grad_enabled():
            assert isinstance(algorithm, OneStepMethod)
            method = Method.of(algorithm.tableaus[0], problem.spec.dtype, problem.spec.device)
            self.fixed = lacks_ends(problem, method, self.u0.reshape(-1))
        self.search = self._search() if options.events else None

    @property
    @override
    def program(self) -> FieldProgram:
        known = self.prepared
        return FieldProgram(known.json, known.program, self.parameters, known.derivatives)

    def _search(self) -> Search:
        try:
            events = [watched(event, self.problem) for event in self.options.events]
        except UnsupportedModule as error:
            raise no_code(error, "an event's condition") from error
        return Search(events, self.problem, self.options.fired)


def _turns(on_step: Any) -> Any:
    def see(t: float, h: float, count: int) -> None:
        on_step(Step(t - h, h, t, None, None, 0.0, None, t - h, h))  # type: ignore[arg-type]

    return see


class _Node(torch.autograd.Function):
    """A native solve in the graph: its `States`."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        solve: SingleSolve,
        u0: Tensor,
        *sources: Any,
    ) -> tuple[Tensor | None, ...]:
        states = solve.fly(u0, any(ctx.needs_input_grad) and saved_tensors_stay())
        ctx.solve, solve.shape = solve, u0.shape
        if solve.moving:
            sources = tuple(x if isinstance(x, Tensor) else None for x in sources)
        ctx.save_for_backward(states.ends, *sources)
        ctx.set_materialize_grads(False)
        return (states.saved if solve.flight.reached else None), states.ends, states.last

    @staticmethod
    @override
    @uncompiled
    def backward(
        ctx: Any, saved: Tensor | None, ends: Tensor | None, last: Tensor | None
    ) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad
        if saved is ends is last is None:
            return (None,) * len(needed)
        # Read once: a checkpoint that saves nothing recomputes them, and gives them once.
        solve, kept, wanted = ctx.solve, ctx.saved_tensors, needed[1:]
        gradients = pulled_back(solve, kept, wanted, (saved, ends, last))
        flight = solve.flight
        if flight.kept is not None and not graph_is_retained():
            flight.kept = None
        return (None, *gradients)


# Without what torch does for its transforms, in which native solves are refused.
_as_node: Callable[..., Any] = super(torch.autograd.Function, _Node).apply


def pulled_back(
    solve: SingleSolve,
    kept: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    arriving: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the sources of a solve, in a backward pass.

    Args:
        solve: the solve.
        kept: the states at the ends of its steps, and its sources.
        wanted: which sources need gradients.
        arriving: cotangents of its `States`.
    """
    return pulled(partial(_pull, solve, kept, wanted), kept, *arriving)


def _pull(
    solve: SingleSolve,
    kept: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    *arriving: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients of the sources of a solve that are wanted: of `u0`, times and parameters."""
    found = _pull_at_once(solve, kept, wanted, arriving)
    if found is not None:
        return found
    ends, *sources = kept
    assert ends is not None
    moving = len(solve.moving)
    of_times = wanted[1 : 1 + moving]
    with_times = bool(moving) and any(of_times)
    flight = solve.flight
    swept = sweep_back(flight, ends, arriving, with_times, solve.noise())
    solve.note_sweep(swept.nfe, swept.nvjp, swept.steps)
    times: list[Tensor | None] = [None] * moving
    if with_times:
        bars = _time_gradients(solve, flight, ends, swept, arriving)
        times = [
            bar.to(source).reshape(source.shape)
            if needed and bar is not None and source is not None
            else None
            for bar, source, needed in zip(bars, sources[:moving], of_times, strict=True)
        ]
    rest = _of_parameters(solve, swept, sources[moving:], wanted[1 + moving :])
    u0 = swept.start_in(solve.shape) if wanted[0] else None
    return (u0, *times, *rest)


def _pull_at_once(
    solve: SingleSolve,
    kept: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
    arriving: tuple[Tensor | None, ...],
) -> tuple[Tensor | None, ...] | None:
    """The same by one call of C; `None` where that is not for it."""
    flight = solve.flight
    if solve.moving or not flight.finite:
        return None
    assert type(flight.log) is Log
    saved, ends, last = arriving
    found = pull_back(
        solve.departure.pull,
        flight.log,
        (flight.count, flight.reached),
        ((solve.shape,), wanted, kept, saved, ends, (last,)),
        (flight.kept, flight.kept_room),
        solve.noise(),
    )
    if found is None:
        return None
    gradients, counts = found
    solve.note_sweep(*counts)
    return gradients


def _of_parameters(
    solve: SingleSolve, swept: Swept, sources: list[Tensor | None], wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Cotangents of the parameters: of two methods the sums, where both have any."""
    libraries = solve.departure.libraries
    if len(libraries) == 1:
        return libraries[0].cotangents(swept.bars[0], sources, wanted)
    total: list[Tensor | None] = [None] * len(sources)
    for method, bars in swept.bars.items():
        library = libraries[method]
        count = len(library.places)
        for i, bar in enumerate(library.cotangents(bars, sources[:count], wanted[:count])):
            known = total[i]
            if bar is not None:
                total[i] = bar if known is None else known + bar
    return total


def _time_gradients(
    solve: SingleSolve,
    flight: Flight,
    ends: Tensor,
    swept: Swept,
    arriving: tuple[Tensor | None, ...],
) -> list[Tensor | None]:
    """Cotangents of `t0`, `t1` and `saveat` from those of the steps."""
    problem, record, (saved, at_steps, last) = solve.problem, solve.record(flight), arriving
    assert isinstance(problem, ODEProblem)
    t, h, thetas = swept.times
    if saved is not None:
        saved = saved.reshape(len(saved), ends.shape[1])
    times = TimeCotangents(record, flight.reached, t.new_zeros(()))
    for n in reversed(range(len(record.sizes))):
        places = record.inside.get(n)
        theta = None if places is None else thetas[places[0]]
        times.step(n, t[n], h[n], theta)
    gradients = Gradients(
        u0=swept.start, inputs=[], t0=times.start, t1=times.end, saveat=times.saveat
    )
    states = ends.unbind()
    entering: list[Tensor | None] = [None] * len(states)
    for index in (0, flight.count):
        given = (
            None if at_steps is None else at_steps[index],
            last if index == flight.count else None,
        )
        parts = [x.reshape(-1) for x in given if x is not None]
        entering[index] = torch.stack(parts).sum(0) if parts else None
    backward = BackwardPass(record, states, saved, entering, with_times=True)
    complete_times(gradients, problem, FlatField(problem), backward, ends=solve.fixed)
    assert gradients.saveat is not None
    asked = 0 if solve.options.saveat is None else len(solve.options.saveat)
    # Times that the solve did not reach have none.
    saveat = torch.nn.functional.pad(gradients.saveat, (0, asked - len(gradients.saveat)))
    return [gradients.t0, gradients.t1, saveat]


@dataclass(slots=True)
class Steps:
    """The steps of a solve and the states at their ends, put together when something looks."""

    solve: FlownSolve
    flight: Flight
    states: States

    def __call__(self) -> tuple[Record, list[Tensor]]:
        """Both."""
        return self.solve.record(self.flight), self.solve.stepped(self.states)

    def part(self, name: str) -> Any:
        """The trajectory for a solution, what it has cost, or the times of its states."""
        solve, flight = self.solve, self.flight
        if name == "stats":
            return solve.stats
        if name == "states":
            return solve.state(torch.stack(solve.stepped(self.states)))
        if name == "trajectory":
            return solve.trajectory_of(self)
        ends = flight.times(solve.interval[0]) if solve.options.saveat is None else ()
        return solve.times(flight.reached, ends)
