"""`solve`: the one verb. All input is checked here, once."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import Adjoint, BacksolveAdjoint
from pysciml_node.algorithms.controllers import Controller, FixedStep
from pysciml_node.algorithms.explicit import Algorithm, Tsit5
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.algorithms.stochastic import StochasticRungeKutta, default_algorithm
from pysciml_node.errors import SolverFailure
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.solutions.ensemble import EnsembleSolution
from pysciml_node.solutions.solution import Solution
from pysciml_node.solving import engines
from pysciml_node.solving.diagnosis import failure_message
from pysciml_node.solving.members import solve_members
from pysciml_node.steps.event_gradient import differentiable_event


class _Usual:
    """A tolerance that is not given: what it is depends on the kind of problem."""

    def __repr__(self) -> str:
        return "1e-6, or 1e-2 for an SDEProblem"


_USUAL: Any = _Usual()


@overload
def solve(
    problem: Problem,
    algorithm: Algorithm | None = ...,
    *,
    rtol: Any = ...,
    atol: Any = ...,
    saveat: Sequence[float] | Tensor | None = ...,
    engine: str | None = ...,
    adjoint: Adjoint | None = ...,
    dt0: float | None = ...,
    dtmin: float | None = ...,
    dtmax: float | None = ...,
    tstops: Sequence[float] | Tensor = ...,
    max_steps: int = ...,
    controller: Controller | None = ...,
    events: Event | Sequence[Event] = ...,
    progress: bool = ...,
    throw: bool = ...,
    compile: bool = ...,
    generator: torch.Generator | None = ...,
) -> Solution: ...


@overload
def solve(
    problem: EnsembleProblem, algorithm: Algorithm | None = None, **options: Any
) -> EnsembleSolution: ...


# The options of an ensemble are those of a single problem.
def solve(  # type: ignore[misc]
    problem: Problem | EnsembleProblem,
    algorithm: Algorithm | None = None,
    *,
    rtol: Any = _USUAL,
    atol: Any = _USUAL,
    saveat: Sequence[float] | Tensor | None = None,
    engine: str | None = None,
    adjoint: Adjoint | None = None,
    dt0: float | None = None,
    dtmin: float | None = None,
    dtmax: float | None = None,
    tstops: Sequence[float] | Tensor = (),
    max_steps: int = 100_000,
    controller: Controller | None = None,
    events: Event | Sequence[Event] = (),
    progress: bool = False,
    throw: bool = True,
    compile: bool = False,
    generator: torch.Generator | None = None,
) -> Solution | EnsembleSolution:
    """Solve an initial value problem, or an ensemble of them.

    Args:
        problem: what to solve: an `ODEProblem` or an `SDEProblem`, or an `EnsembleProblem` of many.
        algorithm: how; default `Tsit5()`, and for an `SDEProblem` what its noise asks for:
            `SOSRI()`, `SOSRA()`, `LambaEM()`, or `EulerHeun()` for Stratonovich equations.
        rtol: relative tolerance on the root-mean-square of the local error; a number, a tensor that
            broadcasts to `u0`, or a tuple or dict of these like `u0`. Default 1e-6, and 1e-2 for an
            `SDEProblem`.
        atol: absolute tolerance, likewise; parts and entries of `inf` never drive the step size.
        saveat: times of the output, in the order of integration, inside `tspan`; a tensor that
            requires gradients receives them. Without it: the ends of the accepted steps.
        engine: `"torch"`, `"julia"` or `"auto"`; default the one set by `set_engine` or the
            environment variable `PYSCIML_NODE_ENGINE`, else `"auto"`.
        adjoint: how gradients are taken; default `DiscreteAdjoint()`.
        dt0: size of the first step (positive); with `FixedStep` of each step. Default: Hairer's.
        dtmin: the solve fails where an adaptive step would be smaller (positive).
        dtmax: steps are never larger (positive).
        tstops: times that steps must end on, for fields with discontinuities.
        max_steps: the solve fails after this many accepted and rejected steps.
        controller: step size control; default the algorithm's, `PIController()`.
        events: conditions that stop the solve where they cross zero.
        progress: draw a progress bar on stderr.
        throw: raise `SolverFailure` if the end is not reached; otherwise return what there is,
            with the reason in `retcode`.
        compile: run the solve and its discrete adjoint as compiled loops (see the docs, "Compiled
            solves"); without a C++ compiler it says so once and goes on uncompiled.
        generator: draws the seed of an `SDEProblem`'s Brownian motions, one number a solve; default
            torch's own. The seed and the interval give the path, whatever the algorithm, the
            tolerances and the steps are.

    Returns:
        The solution; time comes first in its states, `(T, *u0.shape)`. Of an `EnsembleProblem` an
        `EnsembleSolution`.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range.
        SolverFailure: the end of the interval was not reached (with `throw=True`); of an
            ensemble an `EnsembleFailure`.

    Example:
        >>> import torch, pysciml_node as psn
        >>> problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1).double(), (0.0, 1.0))
        >>> round(float(psn.solve(problem, psn.Tsit5(), rtol=1e-9, atol=1e-9).u1), 6)
        0.367879
    """
    ensemble = problem if isinstance(problem, EnsembleProblem) else None
    members: list[Problem] = []
    if isinstance(problem, EnsembleProblem):
        # Options are checked once: the members differ in values alone.
        members = problem.members()
        problem = members[0]
    if not isinstance(problem, ODEProblem | SDEProblem):
        raise TypeError(
            f"solve takes an ODEProblem or SDEProblem, but was given {type(problem).__name__}.\n"
            "  Make one: ODEProblem(f, u0, (t0, t1))."
        )
    default = partial(default_algorithm, problem) if isinstance(problem, SDEProblem) else Tsit5
    algorithm = _instance("algorithm", algorithm, Algorithm, default)
    _check_kind(problem, algorithm)
    adjoint = _instance("adjoint", adjoint, Adjoint, algorithm.default_adjoint)
    controller = _instance("controller", controller, Controller, algorithm.default_controller)
    events = _check_events(events)
    length = abs(problem.t1 - problem.t0)
    if isinstance(controller, FixedStep) and dt0 is None:
        raise ValueError("FixedStep takes steps of dt0: give dt0, for example dt0=0.05.")
    if isinstance(max_steps, bool) or not isinstance(max_steps, int) or max_steps < 1:
        raise ValueError(f"max_steps must be a positive whole number, but is {max_steps!r}.")
    times, time_tensor = _check_saveat(saveat, problem)
    usual = 1e-2 if isinstance(problem, SDEProblem) else 1e-6
    relative, _ = _check_tolerance("rtol", usual if rtol is _USUAL else rtol, problem)
    absolute, driven = _check_tolerance("atol", usual if atol is _USUAL else atol, problem)
    if isinstance(relative, Tensor) and driven < relative.numel():
        relative = relative[:driven]
    options = SolveOptions(
        rtol=relative,
        atol=absolute,
        driven=driven,
        saveat=times,
        saveat_tensor=time_tensor,
        adjoint=adjoint,
        dt0=None if dt0 is None else min(_positive("dt0", dt0), length),
        dtmin=0.0 if dtmin is None else _positive("dtmin", dtmin),
        dtmax=math.inf if dtmax is None else _positive("dtmax", dtmax, allow_inf=True),
        tstops=_check_tstops(tstops, problem),
        max_steps=max_steps,
        controller=controller,
        events=events,
        progress=progress,
        throw=throw,
        compile=compile,
    )
    if isinstance(problem, SDEProblem):
        options = _for_noise(problem, options, generator)
    elif generator is not None:
        raise ValueError(
            "generator draws Brownian motions, and an ODEProblem has none.\n  Leave it out."
        )
    if options.dtmin > options.dtmax:
        raise ValueError(f"dtmin={dtmin} must not be larger than dtmax={dtmax}.")
    _check_both_zero(options)
    chosen = engines.choose(engine, problem, algorithm, options)
    if ensemble is not None:
        several = [options, *(_another(options, generator) for _ in members[1:])]
        return solve_members(ensemble, members, chosen, algorithm, several)
    solution: Solution = chosen.solve(problem, algorithm, options)
    if solution.event is not None:
        differentiable_event(solution, events[solution.event], options.tstops)
    if throw and not solution.success:
        raise SolverFailure(failure_message(solution, options), solution)
    return solution


def _instance(name: str, value: Any, kind: type[Any], default: Any) -> Any:
    if value is None:
        return default()
    if isinstance(value, type) and issubclass(value, kind):
        raise TypeError(f"{name} must be an instance: write {value.__name__}().")
    if not isinstance(value, kind):
        raise TypeError(
            f"{name} must be one of this package's {kind.__name__.lower()}s, such as "
            f"{default().__class__.__name__}(), but is {value!r}."
        )
    return value


def _check_kind(problem: Problem, algorithm: Algorithm) -> None:
    """Ordinary methods for ordinary equations, stochastic ones for stochastic ones."""
    if isinstance(problem, SDEProblem) and isinstance(algorithm, StochasticRungeKutta):
        algorithm.check(problem)
    elif isinstance(problem, SDEProblem):
        raise ValueError(
            f"{algorithm!r} is for ordinary equations, but the problem is an SDEProblem.\n"
            f"  Use {default_algorithm(problem)!r}."
        )
    elif isinstance(algorithm, StochasticRungeKutta) and not isinstance(problem, SDEProblem):
        raise ValueError(
            f"{algorithm!r} is for stochastic equations, but the problem is an ODEProblem.\n"
            "  Use Tsit5(), or make an SDEProblem(drift, diffusion, u0, tspan)."
        )


def _for_noise(
    problem: SDEProblem, options: SolveOptions, generator: torch.Generator | None
) -> SolveOptions:
    """The options of a stochastic solve: with a seed, and without what does not fit."""
    if options.events:
        raise ValueError(
            "events are not found in stochastic solutions, which cross zero infinitely often.\n"
            "  Look for the crossing in solution.u, or in solution(t)."
        )
    if options.compile:
        raise ValueError("compile=True is for ODEProblems.\n  Leave it out.")
    if options.saveat_tensor is not None:
        raise ValueError(
            "saveat of an SDEProblem must not require gradients: Brownian motion has no "
            "derivative in time.\n  Detach it: saveat.detach()."
        )
    adjoint = options.adjoint
    if isinstance(adjoint, BacksolveAdjoint):
        if problem.interpretation == "ito" and problem.noise != "additive":
            raise ValueError(
                "BacksolveAdjoint goes backward in time, which only Stratonovich equations allow, "
                'but the problem\'s interpretation is "ito".\n'
                "  Use adjoint=DiscreteAdjoint(), or convert the drift (subtract (1/2) (dg/du) g)."
            )
    elif not adjoint.discrete:
        raise ValueError(
            f"{type(adjoint).__name__} is for ODEProblems.\n"
            "  Use DiscreteAdjoint(), DirectAdjoint(), or BacksolveAdjoint() for Stratonovich "
            "equations."
        )
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"generator must be a torch.Generator, but is {generator!r}.")
    return dataclasses.replace(options, seed=_draw_seed(generator))


def _another(options: SolveOptions, generator: torch.Generator | None) -> SolveOptions:
    """The options of another member of an ensemble: Brownian motions are its own."""
    if options.seed is None:
        return options
    return dataclasses.replace(options, seed=_draw_seed(generator))


def _draw_seed(generator: torch.Generator | None) -> int:
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(2**63 - 1, (), generator=generator, device=device))


def _positive(name: str, value: float, allow_inf: bool = False) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | Tensor):
        raise TypeError(f"{name} must be a number, but is {type(value).__name__}.")
    number = float(value)
    if not number > 0 or (math.isinf(number) and not allow_inf):
        raise ValueError(
            f"{name} must be positive and finite, but is {number}.\n"
            "  Sizes of steps are given without sign; the direction follows tspan."
        )
    return number


def _check_tolerance(name: str, value: Any, problem: Problem) -> tuple[float | Tensor, int]:
    """A tolerance as a number or flat tensor, and how many leading entries of the state it counts.

    The entries of a state behind the last finite absolute tolerance need not be looked at at all.
    """
    spec = problem.spec
    if spec.keys is None or not isinstance(value, tuple | list | dict):
        return _check_part(name, value, problem, spec.shapes[0]), sum(spec.sizes)
    try:
        given = spec.parts(value)
    except (KeyError, IndexError):
        raise ValueError(
            f"{name} must have the parts of u0, {list(spec.keys)}, but is {value!r}."
        ) from None
    parts = [
        _check_part(f"{name}[{key!r}]", part, problem, shape)
        for key, part, shape in zip(spec.keys, given, spec.shapes, strict=True)
    ]
    counted = len(parts)
    numbers = [part if isinstance(part, float) else None for part in parts]
    while counted > 1 and numbers[counted - 1] == math.inf:
        counted -= 1
    first = numbers[0]
    if first is not None and all(part == first for part in numbers[:counted]):
        return first, sum(spec.sizes[:counted])
    flat = [
        part if isinstance(part, Tensor) else torch.full((size,), part)
        for part, size in zip(parts, spec.sizes, strict=True)
    ]
    return torch.cat([part.to(spec.device, spec.real_dtype) for part in flat]), sum(spec.sizes)


def _check_part(name: str, value: Any, problem: Problem, shape: torch.Size) -> float | Tensor:
    """One tolerance of one part of the state."""
    if isinstance(value, str) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number or a tensor, but is {value!r}.")
    if not isinstance(value, Tensor) or value.ndim == 0:
        number = float(value)
        allowed = number >= 0 and (name.startswith("atol[") or not math.isinf(number))
        if not allowed:
            raise ValueError(f"{name} must be a finite number, at least 0, but is {number}.")
        return number
    spec = problem.spec
    if bool((~(value >= 0)).any()):
        raise ValueError(f"{name} must be at least 0 everywhere, but has {float(value.min())}.")
    try:
        full = value.to(spec.device, spec.real_dtype).expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name} of shape {tuple(value.shape)} does not broadcast to the state's "
            f"{tuple(shape)}."
        ) from None
    return full.reshape(-1)


_BOTH_ZERO = "rtol and atol must not both be 0: no step could be accepted."


def _check_both_zero(options: SolveOptions) -> None:
    if not options.controller.adaptive:
        return
    if isinstance(options.rtol, float) and isinstance(options.atol, float):
        if options.rtol == options.atol == 0:
            raise ValueError(_BOTH_ZERO)
        return
    both = torch.as_tensor(options.rtol == 0) & torch.as_tensor(options.atol == 0)
    if bool(both.any()):
        raise ValueError(_BOTH_ZERO)


def _numbers(name: str, values: Sequence[float] | Tensor) -> list[float]:
    if isinstance(values, Tensor):
        if values.ndim != 1:
            raise ValueError(f"{name} must be one-dimensional, but has shape {tuple(values.shape)}")
        return [float(x) for x in values.detach().tolist()]
    if isinstance(values, int | float | str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} must be a sequence of times, but is {values!r}.")
    return [float(x) for x in values]


def _check_saveat(
    saveat: Sequence[float] | Tensor | None, problem: Problem
) -> tuple[tuple[float, ...] | None, Tensor | None]:
    if saveat is None:
        return None, None
    times = _numbers("saveat", saveat)
    if not times:
        raise ValueError("saveat must name at least one time; leave it out to save every step.")
    low, high = sorted((problem.t0, problem.t1))
    # Times given in single precision may stand an ulp outside the interval they are meant to end.
    single = isinstance(saveat, Tensor) and saveat.dtype != torch.float64
    slack = 1e-6 * (high - low) if single else 0.0
    for i, t in enumerate(times):
        if not low - slack <= t <= high + slack:
            raise ValueError(
                f"saveat must lie inside tspan ({problem.t0}, {problem.t1}), "
                f"but saveat[{i}] is {t}.\n  Widen tspan, or drop the times beyond it."
            )
    times = [min(max(t, low), high) for t in times]
    sign = problem.direction
    for i in range(1, len(times)):
        if sign * times[i] < sign * times[i - 1]:
            raise ValueError(
                f"saveat must be in the order of integration ({'in' if sign > 0 else 'de'}creasing"
                f"), but saveat[{i}]={times[i]} follows {times[i - 1]}.\n  Sort it first."
            )
    tensor = saveat if isinstance(saveat, Tensor) and saveat.requires_grad else None
    return tuple(times), tensor


def _check_tstops(tstops: Sequence[float] | Tensor, problem: Problem) -> tuple[float, ...]:
    times = _numbers("tstops", tstops)
    low, high = sorted((problem.t0, problem.t1))
    for i, t in enumerate(times):
        if not low <= t <= high:
            raise ValueError(
                f"tstops must lie inside tspan ({problem.t0}, {problem.t1}), "
                f"but tstops[{i}] is {t}.\n  Drop the times beyond it."
            )
    inner = {t for t in times if low < t < high}
    return tuple(sorted(inner, reverse=problem.direction < 0))


def _check_events(events: Event | Sequence[Event]) -> tuple[Event, ...]:
    listed = (events,) if isinstance(events, Event) else tuple(events)
    for event in listed:
        if not isinstance(event, Event):
            raise TypeError(f"events must be Event(condition) objects, but one is {event!r}.")
    return listed
