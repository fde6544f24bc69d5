"""`solve(..., compile=True)`: from a checked problem to native code and back to a solution."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.adjoints import DiscreteAdjoint
from pysciml_node.algorithms.controllers import (
    FixedStep,
    IController,
    PIController,
    PIDController,
)
from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.switching import OneStepMethod
from pysciml_node.errors import CompileError, PsnWarning, UnsupportedModule
from pysciml_node.problems.modes import InModes
from pysciml_node.problems.ode import ODEProblem, Time
from pysciml_node.problems.state import moves, tensors_of
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.solution import Solution
from pysciml_node.steps.autograd import pulled
from pysciml_node.steps.cotangents import BackwardPass, Gradients, TimeCotangents
from pysciml_node.steps.derived import DerivedField
from pysciml_node.steps.field import FlatField
from pysciml_node.steps.finish import Ending, Solve
from pysciml_node.steps.progress import step_listener
from pysciml_node.steps.record import Kept, Outcome, Record
from pysciml_node.steps.step import Step
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.tableaus import RosenbrockTableau
from pysciml_node.torch_engine.end_times import complete_times
from pysciml_node.torch_engine.native.library import (
    REALS,
    Library,
    library_of,
    write_explicit,
)
from pysciml_node.torch_engine.native.pulled import pulled_program
from pysciml_node.torch_engine.native.rosenbrock import LARGEST, write_rosenbrock
from pysciml_node.torch_engine.native.run import (
    Flight,
    States,
    Swept,
    departure_of,
    fly,
    sweep_back,
)
from pysciml_node.translation.export import TranslatedModule, translate
from pysciml_node.translation.surrounded import surroundings_of

S = TypeVar("S")
_CONTROLS = (PIController, IController, PIDController, FixedStep)


def refusal(what: str, remedy: str = "compile=False") -> CompileError:
    """The error for something that native code does not have."""
    return CompileError(f"native code does not have {what}.\n  Solve with {remedy}.")


def check(problem: ODEProblem, algorithm: Algorithm, options: SolveOptions) -> None:
    """Refuse what cannot be native whatever the field is, by name.

    Raises:
        CompileError: as said.
    """
    spec = problem.spec
    if not isinstance(algorithm, ExplicitRungeKutta):
        _check_implicit(problem, algorithm)
    if spec.device.type != "cpu":
        raise refusal(f"states on {spec.device}")
    if spec.dtype not in REALS:
        raise refusal(f"states of {spec.dtype}", "float32 or float64, or compile=False")
    if options.events:
        raise refusal("events")
    if torch.is_grad_enabled() and not isinstance(options.adjoint, DiscreteAdjoint):
        name = type(options.adjoint).__name__
        raise refusal(name, "adjoint=DiscreteAdjoint(), or with compile=False")
    if type(options.controller) not in _CONTROLS:
        raise refusal(f"{type(options.controller).__name__}", "PIController() or compile=False")
    if torch._C._are_functorch_transforms_active():
        raise refusal("transforms of torch.func")
    if torch.autograd.forward_ad._current_level >= 0:
        raise refusal("forward-mode derivatives")
    inner = problem.f.inner if isinstance(problem.f, DerivedField) else problem.f
    if isinstance(inner, InModes):
        raise refusal("autocast" if inner.autocast else "a default device")


def _check_implicit(problem: ODEProblem, algorithm: Algorithm) -> None:
    """Refuse what is neither explicit nor a Rosenbrock method, and what is not for one."""
    if not isinstance(getattr(algorithm, "tableau", None), RosenbrockTableau):
        raise refusal(repr(algorithm), "Tsit5() or another explicit method, or compile=False")
    for what in ("mass_matrix", "jac", "jac_sparsity"):
        if getattr(problem, what) is not None:
            raise refusal(what)
    size = sum(problem.spec.sizes)
    if size > LARGEST:
        raise refusal(
            f"{algorithm!r} for more than {LARGEST} entries of a state, and u0 has {size}"
        )


def prepare(
    problem: ODEProblem, method: Method, saveat: Tensor | None
) -> tuple[Library, list[Tensor], Surroundings]:
    """The native code of a field with a method, the tensors that it reads, and its surroundings.

    Args:
        problem: gives the field.
        method: the method.
        saveat: saved times that may receive gradients.

    Raises:
        CompileError: the field cannot be translated, or there is no compiler.
    """
    try:
        translated = translate(problem.f, problem.spec, problem.p)
        library, tensors = _library(problem, translated, method, saveat)
    except UnsupportedModule as error:
        raise no_code(error) from error
    seen = surroundings_of(problem.f, problem.p, translated.snapshot)
    return library, tensors, seen


def _library(
    problem: ODEProblem, translated: TranslatedModule, method: Method, saveat: Tensor | None
) -> tuple[Library, list[Tensor]]:
    """The code of a translated field with a method, and the tensors that it reads."""
    json, program, dtype = translated.json, translated.program, problem.spec.dtype
    if not isinstance(method.tableau, RosenbrockTableau):
        library = library_of(json, method, dtype, lambda: write_explicit(program, method))
        return library, translated.parameters
    sources = (*tensors_of(problem.u0), *problem.tspan, saveat, *translated.parameters)
    if not (torch.is_grad_enabled() and any(map(moves, sources))):
        library = library_of(json, method, dtype, lambda: write_rosenbrock(program, None, method))
        return library, translated.parameters
    pulled = pulled_program(problem, translated)
    library = library_of(
        json + pulled.json,
        method,
        dtype,
        lambda: write_rosenbrock(program, pulled.program, method),
    )
    return library, [*translated.parameters, *pulled.parameters(translated.parameters)]


def no_code(error: UnsupportedModule) -> CompileError:
    """The error for a field that cannot be translated."""
    return CompileError(
        f"the field has no native code: {error.message}\n"
        "  Rewrite it with operations that programs have, or solve with compile=False."
    )


class FlownSolve(Solve):
    """What native code has solved.

    Args:
        problem: what was solved.
        algorithm: how.
        options: of the solve.
        engine: name of the engine.
        surroundings: the field as the solve saw it.
    """

    problem: ODEProblem
    algorithm: OneStepMethod

    def __init__(
        self,
        problem: ODEProblem,
        algorithm: OneStepMethod,
        options: SolveOptions,
        engine: str,
        surroundings: Surroundings,
    ) -> None:
        super().__init__(problem, algorithm, options, engine)
        self.surroundings = surroundings
        self.u0 = problem.spec.flatten(problem.u0)

    @abstractmethod
    def flown(self) -> tuple[Flight, States]:
        """What native code has left, with its graph."""

    def _steps(self, flight: Flight, states: States) -> _Steps:
        return _Steps(self.problem, self.options, flight, self.u0, states)

    @override
    def run(self) -> Outcome:
        flight, states = self.flown()
        return Outcome(*self._steps(flight, states)(), states.saved)

    @override
    def trajectory(self, outcome: Outcome) -> TorchTrajectory:
        return self._trajectory(Kept(outcome.record, outcome.states))

    def _trajectory(self, load: _Steps | Kept) -> TorchTrajectory:
        spec = self.problem.spec
        methods = Method.all_of(self.algorithm.tableaus, spec.dtype, spec.device)
        return TorchTrajectory(
            self.problem, methods, load, self.stats, self.options, surroundings=self.surroundings
        )

    @override
    def solution(self) -> Solution:
        flight, states = self.flown()
        steps = self._steps(flight, states)
        if not (self.watched or flight.finite):
            return self.looked_through(Outcome(*steps(), states.saved))
        # Where nothing looks at the steps they stay as they are.
        self.stats.naccept, self.stats.nreject = flight.count, flight.nreject
        times = () if flight.times is None else flight.times
        ending = Ending(flight.retcode, times, states.last, states.saved)
        return self.finish(ending, self._trajectory(steps))


class NativeSolve(FlownSolve):
    """One native solve: run by `_Node`, or alone where no gradient is asked for.

    Raises:
        CompileError: an option or the field has no native code, or there is no compiler.
    """

    def __init__(
        self, problem: ODEProblem, algorithm: Algorithm, options: SolveOptions, engine: str
    ) -> None:
        check(problem, algorithm, options)
        assert isinstance(algorithm, OneStepMethod)
        spec = problem.spec
        (tableau,) = algorithm.tableaus
        method = Method.of(tableau, spec.dtype, spec.device)
        self.error_order = tableau.error_order
        self.library, self.parameters, seen = prepare(problem, method, options.saveat_tensor)
        super().__init__(problem, algorithm, options, engine, seen)

    def fly(self, u0: Tensor) -> tuple[Flight, States]:
        """Solve forward from a flat state, contiguous and the solve's own."""
        options, problem, library = self.options, self.problem, self.library
        packed = library.pack(self.parameters)
        departure = departure_of(library, problem, options, self.error_order)
        if options.progress:
            with step_listener(True, problem) as on_step:
                flight, states = fly(library, departure, u0, packed, _turns(on_step))
        else:
            flight, states = fly(library, departure, u0, packed, None)
        self.stats.nfe = flight.nfe
        return flight, states

    @override
    def flown(self) -> tuple[Flight, States]:
        if not torch.is_grad_enabled():
            return self.fly(self.library.lying(self.u0))
        t0, t1 = self.problem.tspan
        keep: list[tuple[Flight, Tensor]] = []
        saved, ends, last = _Node.apply(  # type: ignore[no-untyped-call]
            self, keep, self.u0, t0, t1, self.options.saveat_tensor, *self.parameters
        )
        flight, nothing = keep[0]
        return flight, States(nothing if saved is None else saved, ends, last)


def _turns(on_step: Any) -> Any:
    def see(t: float, h: float, count: int) -> None:
        on_step(Step(t - h, h, t, None, None, 0.0, None, t - h, h))  # type: ignore[arg-type]

    return see


class _Node(torch.autograd.Function):
    """A native solve in the graph: saved states, states at the ends of the steps, the last one."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        solve: NativeSolve,
        keep: list[tuple[Flight, Tensor]],
        u0: Tensor,
        t0: Time,
        t1: Time,
        saveat: Tensor | None,
        *parameters: Tensor,
    ) -> tuple[Tensor | None, ...]:
        # An alias could be changed in place before it is replayed.
        flight, states = solve.fly(u0.clone(memory_format=torch.contiguous_format))
        keep.append((flight, states.saved))
        ctx.solve, ctx.flight = solve, flight
        times = (t if isinstance(t, Tensor) else None for t in (t0, t1))
        ctx.save_for_backward(states.ends, u0, *times, saveat, *parameters)
        ctx.set_materialize_grads(False)
        return (states.saved if flight.reached else None), states.ends, states.last

    @staticmethod
    @override
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        if all(cotangent is None for cotangent in cotangents):
            return (None,) * len(ctx.needs_input_grad)
        # Read once: a checkpoint that saves nothing recomputes them, and gives them once.
        kept = ctx.saved_tensors

        def pull(*arriving: Tensor | None) -> tuple[Tensor | None, ...]:
            return _pull(ctx.solve, ctx.flight, kept, arriving, ctx.needs_input_grad[2:])

        return (None, None, *pulled(pull, kept, *cotangents))


def _pull(
    solve: NativeSolve,
    flight: Flight,
    kept: tuple[Tensor | None, ...],
    arriving: tuple[Tensor | None, ...],
    wanted: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Gradients of the sources of a solve that are wanted: of `u0`, times and parameters."""
    ends, *sources = kept
    assert ends is not None
    with_times = any(wanted[1:4])
    library, stats = solve.library, solve.stats
    swept = sweep_back(library, flight, ends, arriving, with_times)
    stats.nfe_backward += swept.nfe
    stats.nvjp += swept.nfe
    stats.naccept_backward += swept.steps
    times: list[Tensor | None] = [None, None, None]
    if with_times:
        bars = _time_gradients(solve, flight, ends, swept, arriving[0])
        times = [
            bar.to(source).reshape(source.shape)
            if needed and bar is not None and source is not None
            else None
            for bar, source, needed in zip(bars, sources[1:4], wanted[1:4], strict=True)
        ]
    rest = library.cotangents(swept.packed, sources[4:], wanted[4:])
    return (swept.u0, *times, *rest)


def _time_gradients(
    solve: NativeSolve, flight: Flight, ends: Tensor, swept: Swept, saved: Tensor | None
) -> list[Tensor | None]:
    """Cotangents of `t0`, `t1` and `saveat` from those of the steps."""
    problem, record = solve.problem, flight.record(solve.problem, solve.options)
    t, h, thetas = swept.times
    times = TimeCotangents(record, flight.reached, t.new_zeros(()))
    for n in reversed(range(len(record.sizes))):
        places = record.inside.get(n)
        theta = None if places is None else thetas[places[0]]
        times.step(n, t[n], h[n], theta)
    gradients = Gradients(u0=swept.u0, inputs=[], t0=times.start, t1=times.end, saveat=times.saveat)
    states = (flight.u0, *ends.unbind())
    backward = BackwardPass(record, states, saved, [None] * len(states), with_times=True)
    # Times that are saved at ends which do not move; a field that hides time is not translated.
    complete_times(gradients, problem, FlatField(problem), backward, ends=False)
    assert gradients.saveat is not None
    asked = 0 if solve.options.saveat is None else len(solve.options.saveat)
    # Times that the solve did not reach have none.
    saveat = torch.nn.functional.pad(gradients.saveat, (0, asked - len(gradients.saveat)))
    return [gradients.t0, gradients.t1, saveat]


@dataclass
class _Steps:
    """The steps of a solve and the states at their ends, put together when something looks."""

    problem: ODEProblem
    options: SolveOptions
    flight: Flight
    u0: Tensor
    states: States

    def __call__(self) -> tuple[Record, list[Tensor]]:
        """Both."""
        ends, last = self.states.ends, self.states.last
        states = [self.u0, *ends[:-1].unbind(), last] if len(ends) else [self.u0]
        return self.flight.record(self.problem, self.options), states


_told: set[str] = set()


def attempted(solve: Callable[[], S], options: SolveOptions) -> S | None:
    """A native solve; with `compile="auto"` `None` where there is none, and a word about it, once.

    Raises:
        CompileError: with `compile=True`, as the solve.
    """
    try:
        return solve()
    except CompileError as error:
        if options.compile != "auto":
            raise
        reason = str(error).partition("\n")[0]
    if reason not in _told:
        _told.add(reason)
        warnings.warn(
            f"{reason}\n  The solve goes on without native code, as others like it will.",
            PsnWarning,
            stacklevel=6,
        )
    return None


def attempt_native(
    problem: ODEProblem, algorithm: Algorithm, options: SolveOptions, engine: str
) -> Solution | None:
    """The solution of a `NativeSolve`, as `compile` asks for it: see `attempted`.

    Raises:
        CompileError: with `compile=True`, as `NativeSolve`.
    """
    return attempted(lambda: NativeSolve(problem, algorithm, options, engine).solution(), options)
