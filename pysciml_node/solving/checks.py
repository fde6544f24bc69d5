"""What `solve` is given, checked once: complete options come out, or an error that says why not."""

from __future__ import annotations

import functools
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import Adjoint, BacksolveAdjoint
from pysciml_node.algorithms.controllers import Controller, FixedStep
from pysciml_node.algorithms.explicit import (
    RK4,
    Algorithm,
    Euler,
    Heun,
    Midpoint,
    Ralston,
    Tsit5,
)
from pysciml_node.algorithms.options import SolveOptions, Tolerances
from pysciml_node.algorithms.stochastic import (
    StochasticRungeKutta,
    default_algorithm,
    usual_algorithm,
)
from pysciml_node.errors import PsnWarning
from pysciml_node.problems.event import Event
from pysciml_node.problems.modes import left_out, uncompiled, watched_by_nobody
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import moves, tensors_of
from pysciml_node.solving.tolerances import check_together, check_tolerance

T = TypeVar("T")
_SINGLE = (ODEProblem, SDEProblem)


class _Usual:
    """A tolerance that is not given: what it is depends on the kind of problem."""

    def __repr__(self) -> str:
        return "1e-6, or 1e-2 for an SDEProblem"


USUAL: Any = _Usual()


# What other packages call the arguments of a solve, and of layers.
ELSEWHERE = {
    "method": "algorithm=Tsit5()",
    "solver": "algorithm=Tsit5()",
    "reltol": "rtol",
    "abstol": "atol",
    "tol": "rtol and atol",
    "t": "saveat",
    "ts": "saveat",
    "t_eval": "saveat",
    "t_span": "saveat",
    "dt": "dt0, with controller=FixedStep() for steps of one size",
    "step_size": "dt0, with controller=FixedStep()",
    "maxiters": "max_steps",
    "max_num_steps": "max_steps",
    "sensealg": "adjoint",
    "sensitivity": "adjoint=BacksolveAdjoint()",
    "callback": "events",
    "event_fn": "events=Event(condition)",
    "stepsize_controller": "controller",
    "seed": "generator=torch.Generator().manual_seed(0)",
    "options": "controller, dt0, max_steps",
}


# Methods of SciPy and of torchdiffeq whose names are unlike those here.
_METHODS = {
    "rk45": "DP5",
    "rk23": "BS3",
    "dop853": "DP8",
    "dopri8": "DP8",
    "bosh3": "BS3",
    "adaptive_heun": "Heun",
    "lsoda": "AutoTsit5",
    "radau": "Rodas5P",
    "bdf": "Rodas5P",
    "euler_maruyama": "EM",
    "milstein": "RKMil",
    "srk": "SOSRI",
}


def explain_calls(begin: Callable[..., T]) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Make `solve` say what was meant where it is called as other packages' functions are.

    It is left out by `torch.compile`.

    Args:
        begin: begins the solve from the options that were given, the problem and perhaps the
            algorithm. All options would take longer, and most calls name few of them.
    """

    def explained(solve: Callable[..., T]) -> Callable[..., T]:
        known = tuple(inspect.signature(solve).parameters)
        named = frozenset(known[2:])

        @uncompiled
        def carefully(*arguments: Any, **options: Any) -> T:
            if 0 < len(arguments) < 3 and options.keys() <= named:
                return begin(options, *arguments)
            if len(arguments) > 2:
                check_problem(arguments[0])
                given = ", ".join(checks.shown(argument) for argument in arguments[2:])
                raise TypeError(
                    "solve takes problem and algorithm by their places, but was also given "
                    f"{given}.\n"
                    "  Name the options: solve(problem, algorithm, saveat=..., rtol=...)."
                )
            checks.keywords("solve", options, known, ELSEWHERE)
            if not arguments and "problem" not in options:
                raise TypeError(
                    "solve needs a problem, but got none.\n"
                    "  Write solve(ODEProblem(f, u0, (t0, t1)))."
                )
            return solve(*arguments, **options)

        @functools.wraps(solve)
        def call(*arguments: Any, **options: Any) -> T:
            if 0 < len(arguments) < 3 and options.keys() <= named and watched_by_nobody():
                return begin(options, *arguments)
            return carefully(*arguments, **options)

        return left_out(call)

    return explained


def check_problem(problem: Any) -> Problem:
    """A single problem.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(problem, _SINGLE):
        hint = "Make one: ODEProblem(f, u0, (t0, t1))."
        if hasattr(problem, "register_solve_hook"):
            hint = "A layer is called: layer(u0)."
        elif callable(problem) and not isinstance(problem, type):
            hint = (
                "In place of solve(f, u0, t) write solve(ODEProblem(f, u0, (t[0], t[-1])), "
                "saveat=t), or use\n  pysciml_node.compat.torchdiffeq.odeint(f, u0, t)."
            )
        checks.refuse("problem", "an ODEProblem, SDEProblem or EnsembleProblem", problem, hint)
    problem.check_arguments()
    if not problem.spec.fits(problem.u0):
        shapes = ", ".join(str(tuple(x.shape)) for x in tensors_of(problem.u0))
        before = ", ".join(str(tuple(x)) for x in problem.spec.shapes)
        raise ValueError(
            f"u0 must have the shape that it had when the problem was made, {before}, but has "
            f"{shapes}.\n  Make the problem anew: ODEProblem(f, u0, (t0, t1))."
        )
    return problem


def check_algorithm(problem: Problem, algorithm: Algorithm | None) -> Algorithm:
    """The algorithm that was given, or the problem's usual one.

    Raises:
        TypeError: it is no algorithm.
        ValueError: it is for another kind of problem.
    """
    default = partial(default_algorithm, problem) if isinstance(problem, SDEProblem) else Tsit5
    method: Algorithm = chosen("algorithm", algorithm, Algorithm, default)
    _check_kind(problem, method)
    return method


def check_options(
    problem: Problem,
    algorithm: Algorithm,
    *,
    rtol: Any,
    atol: Any,
    saveat: Sequence[float] | Tensor | None,
    adjoint: Adjoint | None,
    dt0: float | None,
    dtmin: float | None,
    dtmax: float | None,
    tstops: Sequence[float] | Tensor,
    max_steps: int,
    controller: Controller | None,
    events: Event | Sequence[Event],
    progress: bool,
    throw: bool,
    compile: bool | Literal["auto"],
    generator: torch.Generator | None,
) -> SolveOptions:
    """The options of a solve, as they were given to it.

    Raises:
        TypeError: one is of the wrong kind.
        ValueError: one is out of range, or does not go with another.
    """
    given = {"adjoint": adjoint, "controller": controller}
    adjoint = chosen("adjoint", adjoint, Adjoint, algorithm.default_adjoint)
    controller = chosen("controller", controller, Controller, algorithm.default_controller)
    events = _check_events(events)
    length = abs(problem.t1 - problem.t0)
    if isinstance(controller, FixedStep):
        grid = bool(controller.times)
        controller = controller.within(problem.t0, problem.t1)
        if dt0 is None and not grid:
            raise ValueError(
                "FixedStep takes steps of dt0, but dt0 is not given.\n"
                f"  Write dt0={length / 100:.2g}, for example."
            )
        dt0 = length if dt0 is None else dt0
    times, time_tensor = _check_saveat(saveat, problem)
    usual = 1e-2 if isinstance(problem, SDEProblem) else 1e-6
    if dt0 is not None and given["controller"] is None:
        unsaid = all(
            value is USUAL or (isinstance(value, float) and value == usual)
            for value in (rtol, atol)
        )
        _tell_that_steps_adapt(algorithm, dt0, unsaid=unsaid)
    relative, _ = check_tolerance("rtol", usual if rtol is USUAL else rtol, problem)
    absolute, driven = check_tolerance("atol", usual if atol is USUAL else atol, problem)
    if isinstance(relative, Tensor) and driven < relative.numel():
        relative = relative[:driven]
    options = SolveOptions(
        tolerances=Tolerances(relative, absolute, driven),
        saveat=times,
        saveat_tensor=time_tensor,
        adjoint=adjoint,
        dt0=None if dt0 is None else min(_positive("dt0", dt0), length),
        dtmin=0.0 if dtmin is None else _positive("dtmin", dtmin),
        dtmax=math.inf if dtmax is None else _positive("dtmax", dtmax, infinite=True),
        tstops=_check_tstops(tstops, problem),
        max_steps=checks.whole("max_steps", max_steps),
        controller=controller,
        events=events,
        progress=checks.flag("progress", progress),
        throw=checks.flag("throw", throw),
        compile="auto" if compile == "auto" else checks.flag("compile", compile),
        defaulted=frozenset(name for name, value in given.items() if value is None),
    )
    if isinstance(problem, SDEProblem):
        _check_for_noise(problem, algorithm, options, generator)
    elif generator is not None:
        raise ValueError(
            "generator draws Brownian motions, and an ODEProblem has none.\n  Leave it out."
        )
    if options.dtmin > options.dtmax:
        raise ValueError(
            f"dtmin={dtmin} must not be larger than dtmax={dtmax}.\n  Swap them, or leave one out."
        )
    check_together(options)
    return options


_OF_FIXED_STEPS = (Euler, Midpoint, Heun, Ralston, RK4)


def _tell_that_steps_adapt(algorithm: Algorithm, dt0: float, *, unsaid: bool) -> None:
    """Other packages take fixed steps with these methods; nothing here says that they are meant."""
    kind = type(algorithm)
    if unsaid and kind in _OF_FIXED_STEPS and kind not in _told:
        _told.add(kind)
        warnings.warn(
            f"{kind.__name__} adapts its steps to the tolerances: dt0={dt0} is only the first "
            "size.\n  For steps of one size write controller=FixedStep(); to adapt them without "
            "this warning, name rtol or atol.",
            PsnWarning,
            stacklevel=9,
        )


_told: set[type[Algorithm]] = set()


def chosen(name: str, value: Any, kind: type[Any], default: Any) -> Any:
    """An object of one of this package's kinds, or the usual one.

    Args:
        name: of the argument.
        value: what was given; `None` asks for the usual one.
        kind: the base of what may be given.
        default: makes the usual one.

    Raises:
        TypeError: a class in place of its instance, a name, or anything else.
    """
    if value is None:
        return default()
    if isinstance(value, type) and issubclass(value, kind):
        checks.instance(name, value, kind, example=f"{value.__name__}()")
    if not isinstance(value, kind):
        usual = default().__class__.__name__
        expected = f"one of this package's {kind.__name__.lower()}s, such as {usual}()"
        near = checks.nearest(value, (x.__name__ for x in _kinds(kind)))
        if kind is Algorithm and isinstance(value, str):
            near = _METHODS.get(value.lower(), near)
        hint = f"Did you mean {near}()?" if near else f"Write {name}={usual}(), or leave it out."
        checks.refuse(name, expected, value, hint)
    return value


def _kinds(base: type[Any]) -> Iterator[type[Any]]:
    """The public classes below a base."""
    for kind in base.__subclasses__():
        if not kind.__name__.startswith("_"):
            yield kind
        yield from _kinds(kind)


def _check_kind(problem: Problem, algorithm: Algorithm) -> None:
    """Ordinary methods for ordinary equations, stochastic ones for stochastic ones."""
    if isinstance(problem, SDEProblem) and isinstance(algorithm, StochasticRungeKutta):
        algorithm.check(problem)
    elif isinstance(problem, SDEProblem):
        raise ValueError(
            f"algorithm {algorithm!r} is for ordinary equations, but the problem is an "
            f"SDEProblem.\n  Use {usual_algorithm(problem)}."
        )
    elif isinstance(algorithm, StochasticRungeKutta) and not isinstance(problem, SDEProblem):
        raise ValueError(
            f"algorithm {algorithm!r} is for stochastic equations, but the problem is an "
            "ODEProblem.\n  Use Tsit5(), or make an SDEProblem(drift, diffusion, u0, tspan)."
        )


def _check_for_noise(
    problem: SDEProblem,
    algorithm: Algorithm,
    options: SolveOptions,
    generator: torch.Generator | None,
) -> None:
    """The options of a stochastic solve have nothing that does not fit it."""
    if isinstance(algorithm, StochasticRungeKutta) and options.controller.adaptive:
        algorithm.check_adaptive(problem)
    if options.events:
        raise ValueError(
            "events are not found in stochastic solutions, which cross zero infinitely often.\n"
            "  Look for the crossing in solution.u, or in solution(t)."
        )
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
            f"adjoint={type(adjoint).__name__}() is for ODEProblems.\n"
            "  Use DiscreteAdjoint(), DirectAdjoint(), or BacksolveAdjoint() for Stratonovich "
            "equations."
        )
    checks.generator("generator", generator)


def _positive(name: str, value: float, infinite: bool = False) -> float:
    hint = "Sizes of steps are given without sign; the direction follows tspan."
    return checks.number(name, value, above=0, infinite=infinite, hint=hint)


def _check_saveat(
    saveat: Sequence[float] | Tensor | None, problem: Problem
) -> tuple[tuple[float, ...] | None, Tensor | None]:
    if saveat is None:
        return None, None
    times = checks.numbers("saveat", saveat)
    if not times:
        raise ValueError(
            "saveat must name at least one time, but is empty.\n"
            "  Leave it out to save every step; the end alone is solution.u1."
        )
    low, high = sorted((problem.t0, problem.t1))
    # Times may stand some ulps outside the interval that they are meant to end.
    single = isinstance(saveat, Tensor) and saveat.dtype != torch.float64
    slack = 1e-6 * (high - low) if single else 4 * math.ulp(max(abs(low), abs(high)))
    least, most = min(times), max(times)
    if least < low - slack or most > high + slack:
        beyond = least if least < low - slack else most
        raise ValueError(
            f"saveat must lie inside tspan ({problem.t0}, {problem.t1}), "
            f"but saveat[{times.index(beyond)}] is {beyond}.\n"
            "  Widen tspan, or drop the times beyond it."
        )
    if least < low or most > high:
        times = [min(max(t, low), high) for t in times]
    backward = problem.direction < 0
    if times != sorted(times, reverse=backward):
        i = next(i for i, (a, b) in enumerate(pairwise(times), 1) if (b > a if backward else b < a))
        raise ValueError(
            f"saveat must be in the order of integration ({'de' if backward else 'in'}creasing"
            f"), but saveat[{i}]={times[i]} follows {times[i - 1]}.\n  Sort it first."
        )
    tensor = saveat if isinstance(saveat, Tensor) and moves(saveat) else None
    return tuple(times), tensor


def _check_tstops(tstops: Sequence[float] | Tensor, problem: Problem) -> tuple[float, ...]:
    times = checks.numbers("tstops", tstops)
    listed = [tstops] if isinstance(tstops, Tensor) else tstops
    moving = any(isinstance(t, Tensor) and t.requires_grad for t in listed)
    if moving and torch.is_grad_enabled():
        raise ValueError(
            "tstops must not require gradients: a solve does not tell how its end moves with a "
            "stop.\n"
            "  Solve once up to the stop and once from it, with the stop as an end of tspan: both "
            "ends have gradients. Or detach it: stop.detach()."
        )
    low, high = sorted((problem.t0, problem.t1))
    slack = 4 * math.ulp(max(abs(low), abs(high)))
    for i, t in enumerate(times):
        if not low - slack <= t <= high + slack:
            raise ValueError(
                f"tstops must lie inside tspan ({problem.t0}, {problem.t1}), "
                f"but tstops[{i}] is {t}.\n  Drop the times beyond it."
            )
    inner = {t for t in times if low < t < high}
    return tuple(sorted(inner, reverse=problem.direction < 0))


def _check_events(events: Event | Sequence[Event]) -> tuple[Event, ...]:
    return tuple(checks.sequence("events", events, Event, example="Event(condition)"))
