"""A call of torchdiffeq's functions, in this package's terms."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import Adjoint
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.compat.torchdiffeq.arguments import check_call
from pysciml_node.compat.torchdiffeq.control import (
    CALLBACKS,
    Callbacks,
    Control,
    GivenNorm,
    GridControl,
    MixedNorm,
)
from pysciml_node.compat.torchdiffeq.methods import ADAPTIVE, FIXED
from pysciml_node.compat.torchdiffeq.states import Fitted, Layout, promoted
from pysciml_node.errors import PsnWarning, SolverFailure
from pysciml_node.problems.event import Event
from pysciml_node.problems.ode import ODEProblem, Time, time_number
from pysciml_node.problems.state import moves
from pysciml_node.solutions.solution import ReturnCode, Solution
from pysciml_node.solving.solve import solve
from pysciml_node.steps.chosen import ForThese

Tolerances = float | Tensor | Sequence[float | Tensor]
Options = Mapping[str, Any]

_ADAPTIVE_OPTIONS = (
    "first_step",
    "min_step",
    "max_step",
    "max_num_steps",
    "step_t",
    "jump_t",
    "safety",
    "ifactor",
    "dfactor",
    "dtype",
    "norm",
    "adjoint",
)
_FIXED_OPTIONS = ("step_size", "grid_constructor", "interp", "perturb", "norm", "adjoint")
_IMPLICIT_OPTIONS = (*_FIXED_OPTIONS, "max_iters")
# Accepted and rejected steps of one output interval.
_MAX_STEPS = 100_000
# Where a solve that waits for an event would end without one.
_HORIZON = 1e30


@dataclass(frozen=True)
class Plan:
    """A checked call: what to solve, and how.

    Attributes:
        field: the vector field.
        y0: the initial state.
        t: the requested times, `(T,)`.
        times: the same as numbers.
        algorithm: the method.
        cuts: times inside at which one solve ends and the next begins: where the field jumps, or
            the grid of fixed steps where it receives gradients or is not to be stepped on.
        jumps: whether the field is to be seen from inside at the ends of each solve.
        stops: times inside that steps end on.
        arguments: of `solve`.
    """

    field: Callable[..., Any]
    y0: Any
    t: Tensor
    times: tuple[float, ...]
    algorithm: Algorithm
    cuts: tuple[Time, ...]
    jumps: bool
    stops: tuple[float, ...]
    arguments: dict[str, Any]

    @property
    def sign(self) -> float:
        """Direction of time."""
        return math.copysign(1.0, self.times[-1] - self.times[0])

    @property
    def end(self) -> Time:
        """The last time, a tensor where it receives a gradient."""
        return self.t[-1] if moves(self.t) else self.times[-1]

    def at_times(self) -> Any:
        """The states at the requested times."""
        if len(self.times) == 1:
            return _each(lambda part: part.unsqueeze(0), self.y0)
        saveat = self.t if moves(self.t) else self.times
        rows = [solution.u for solution, asked in self.pieces(self.end, saveat) if asked]
        return rows[0] if len(rows) == 1 else _each(lambda *parts: torch.cat(parts), *rows)

    def until_event(self, event_fn: Callable[..., Tensor]) -> Any:
        """Time of the first event, and the states at the start and there."""
        with torch.no_grad():
            start = event_fn(as_time(self.times[0], self.y0), self.y0)
            signs = torch.sign(start)
        if bool((signs == 0).any()):
            return self.t[0], _each(lambda part: torch.stack((part, part)), self.y0)

        def condition(t: Tensor, y: Any) -> Tensor:
            return torch.min(event_fn(t, y) * signs)

        event = Event(condition, direction=-1)
        for solution, _ in self.pieces(self.times[0] + self.sign * _HORIZON, (), event):
            if solution.event_t is not None:
                both = _each(lambda *ends: torch.stack(ends), self.y0, solution.u1)
                return solution.event_t.to(self.t), both
        raise SolverFailure(
            f"event_fn did not change sign before t={solution.trajectory.times[-1]:.3g}.\n"
            "  Check its sign at the start and the direction of time; or solve over fixed times.",
            solution,
        )

    def pieces(
        self, end: Time, saveat: Tensor | Sequence[float], event: Event | None = None
    ) -> Iterator[tuple[Solution, bool]]:
        """The solves from cut to cut, each from where the one before has ended.

        Beside each stands whether any of the times in `saveat` lie in it.
        """
        state = self.y0
        start: Time = self.t[0] if moves(self.t) else self.times[0]
        done = 0
        for stop in (*self.cuts, end):
            low, high = sorted((time_number(start), time_number(stop)))
            upto = done
            while upto < len(saveat) and low <= self.times[upto] <= high:
                upto += 1
            asked = upto > done
            solution = solve(
                ODEProblem(self._field_between(low, high), state, (start, stop)),
                self.algorithm,
                saveat=saveat[done:upto] if asked else None,
                tstops=[t for t in self.stops if low < t < high],
                events=() if event is None else event,
                **self.arguments,
            )
            yield solution, asked
            if solution.retcode is ReturnCode.Terminated:
                return
            state, start, done = solution.u1, stop, upto

    def _field_between(self, low: float, high: float) -> Callable[..., Any]:
        """The field on a piece: where it jumps at the ends, its limits from inside."""
        if not self.jumps:
            return self.field
        ends = as_time(low, self.y0), as_time(high, self.y0)
        up, down = ends[0].new_tensor(math.inf), ends[0].new_tensor(-math.inf)
        return functools.partial(
            _inside, self.field, torch.nextafter(ends[0], up), torch.nextafter(ends[1], down)
        )


def _inside(field: Callable[..., Any], low: Tensor, high: Tensor, t: Tensor, y: Any) -> Any:
    """`field` at the time nearest to `t` in `[low, high]`, differentiable like `t`."""
    return field(t + (t.clamp(low, high) - t).detach(), y)


def _each(fn: Callable[..., Any], *states: Any) -> Any:
    """Apply `fn` to the corresponding parts of states."""
    if isinstance(states[0], Tensor):
        return fn(*states)
    return tuple(fn(*parts) for parts in zip(*states, strict=True))


def as_time(t: Tensor | float, y0: Any) -> Tensor:
    """A time as a 0-d tensor of the state's real dtype (a tensor keeps its own)."""
    if isinstance(t, Tensor):
        return t.reshape(())
    first = y0 if isinstance(y0, Tensor) else y0[0]
    return torch.tensor(t, dtype=first.dtype.to_real(), device=first.device)


def make_plan(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    rtol: Tolerances,
    atol: Tolerances,
    method: str | None,
    options: Options | None,
    adjoint: Adjoint,
    *,
    event: bool = False,
    params: Iterable[Tensor] | None = None,
) -> Plan:
    """Check a call, and say what is to be solved."""
    check_call(func, y0, method, options)
    times = check_times(t, event)
    name = "dopri5" if method is None else method
    given = known_options(name, options or {}, _options_of(name))
    y0 = promoted(y0)
    arguments = {
        "rtol": _tolerance(rtol, y0),
        "atol": _tolerance(atol, y0),
        "adjoint": given.get("adjoint", adjoint),
    }
    reach = math.inf if event else abs(times[-1] - times[0])
    cuts: tuple[Time, ...] = _ahead(given.get("jump_t"), times, reach)
    stops = _ahead(given.get("step_t"), times, reach)
    jumps = bool(cuts)
    layout = Layout.of(y0)
    if name in ADAPTIVE:
        callbacks = Callbacks.of(func, name, CALLBACKS, layout, torch.float64)
        intervals = max(1, len(times) - 1)
        arguments |= _adaptive_arguments(given, intervals, layout, callbacks)
    else:
        callbacks = Callbacks.of(func, name, CALLBACKS[:1], layout, t.dtype)
        grid, step_size = _grid(func, y0, t, given, event)
        jumps = bool(given.get("perturb"))
        pieces = moves(grid) or jumps
        arguments |= {
            "controller": GridControl(() if pieces else tuple(grid.tolist()), callbacks),
            "dt0": step_size or reach or None,
            "max_steps": _MAX_STEPS if event else 2**31 - 1,
        }
        cuts = grid[1:-1].unbind() if pieces else cuts
    field = Fitted(func, y0)
    return Plan(
        field=field if params is None else ForThese(field, params),
        y0=y0,
        t=t,
        times=times,
        algorithm=ADAPTIVE.get(name) or FIXED[name],
        cuts=cuts,
        jumps=jumps,
        stops=stops,
        arguments=arguments,
    )


def _options_of(method: str) -> tuple[str, ...]:
    if method in ADAPTIVE:
        return _ADAPTIVE_OPTIONS
    implicit = method in ("trbdf2", "sdirk2", "trapezoid") or method.startswith(
        ("implicit", "radau", "gl")
    )
    return _IMPLICIT_OPTIONS if implicit else _FIXED_OPTIONS


def _ahead(value: Any, times: Sequence[float], reach: float) -> tuple[float, ...]:
    """The times among `value` that lie inside the interval, in the order of integration."""
    if value is None:
        return ()
    single = checks.as_float(value)
    listed = torch.as_tensor(value if single is None else single).reshape(-1).tolist()
    forward = times[-1] >= times[0]
    inside = {x for x in listed if 0 < (x - times[0] if forward else times[0] - x) < reach}
    return tuple(sorted(inside, reverse=not forward))


def _adaptive_arguments(
    given: Options, intervals: int, layout: Layout, callbacks: Callbacks | None
) -> dict[str, Any]:
    """Step control of the adaptive methods, with torchdiffeq's constants."""

    def number(key: str, default: float | None = None) -> Any:
        return default if given.get(key) is None else checks.number(key, given[key], infinite=True)

    norm, smallest = given.get("norm"), number("min_step", 0.0)
    measure: MixedNorm | GivenNorm | None = None
    if norm is not None:
        measure = GivenNorm(norm, layout)
    elif len(layout.shapes) > 1:
        measure = MixedNorm(layout)
    return {
        "controller": Control(
            gamma=number("safety", 0.9),
            qmin=number("dfactor", 0.2),
            qmax=number("ifactor", 10.0),
            measure=measure,
            smallest=smallest,
            callbacks=callbacks,
        ),
        "dt0": number("first_step"),
        "dtmin": smallest or None,
        "dtmax": number("max_step"),
        "max_steps": int(given.get("max_num_steps") or _MAX_STEPS) * intervals,
    }


def _grid(
    func: Callable[..., Any], y0: Any, t: Tensor, given: Options, event: bool
) -> tuple[Tensor, float | None]:
    """The grid of a fixed-step method: times to step to, or (beside the ends) a step size."""
    step_size, constructor = given.get("step_size"), given.get("grid_constructor")
    if given.get("interp", "linear") not in ("linear", "cubic"):
        raise ValueError(
            f'options["interp"] must be linear or cubic, but is {given["interp"]!r}.\n'
            '  Write "interp": "cubic", or leave it out.'
        )
    if step_size is not None and constructor is not None:
        raise ValueError(
            'options has both "step_size" and "grid_constructor", which say the same.\n'
            "  Leave one out: give step_size or grid_constructor, not both."
        )
    if event and (step_size is None or given.get("perturb")):
        raise ValueError(
            'a fixed-step method with event_fn needs options["step_size"], for example 0.01, '
            "and no perturb.\n"
            '  Write options={"step_size": 0.01}, or take an adaptive method such as dopri5.'
        )
    if step_size is not None:
        size = abs(float(step_size))
        if not given.get("perturb"):
            return t[:0], size
        length = (t[-1] - t[0]).detach()
        steps = torch.arange(math.ceil(abs(length.item()) / size - 1e-8), device=t.device)
        return torch.cat((t[0] + steps * length.sign() * size, t[-1:])), None
    grid: Tensor = t if constructor is None else constructor(func, y0, t)
    ends, reached = ((times[0].item(), times[-1].item()) for times in (t, grid))
    if len(t) > 1 and reached != ends:
        raise ValueError(
            f"grid_constructor must return times from {ends[0]} to {ends[1]}, but those it "
            f"returned go from {reached[0]} to {reached[1]}.\n"
            "  Begin with t[0] and end with t[-1]."
        )
    return grid, None


def check_times(t: Tensor, event: bool) -> tuple[float, ...]:
    """The requested times as numbers."""
    if not isinstance(t, Tensor) or not t.is_floating_point():
        kind = t.dtype if isinstance(t, Tensor) else type(t).__name__
        raise TypeError(
            f"t must be a tensor of real times, but is {kind}.\n"
            "  Convert it: torch.as_tensor(t, dtype=torch.float64)."
        )
    if t.ndim != 1 or t.numel() < 1:
        raise ValueError(
            f"t must be one-dimensional, (T,), but has shape {tuple(t.shape)}.\n"
            "  Write torch.linspace(t0, t1, n), or t.reshape(-1)."
        )
    if event and t.numel() != 2:
        raise ValueError(
            f"with event_fn, t must be two times, but has {t.numel()}.\n"
            "  The first is the start, the second only gives the direction."
        )
    times = tuple(t.tolist())
    steps = [later - earlier for earlier, later in itertools.pairwise(times)]
    if not (all(step > 0 for step in steps) or all(step < 0 for step in steps)):
        raise ValueError("t must be strictly increasing or strictly decreasing.\n  Sort it first.")
    return times


def known_options(method: str, options: Options, known: Sequence[str]) -> Options:
    """The options that a method has; a warning names the others."""
    for key in options:
        if key not in known:
            warnings.warn(
                f"Unexpected argument {key!r}: it is not an option of method {method!r}.\n"
                f"  {checks.did_you_mean(key, known)} Its options are {', '.join(known)}.",
                PsnWarning,
                stacklevel=2,
            )
    return {key: value for key, value in options.items() if key in known}


def _tolerance(value: Tolerances, y0: Any) -> Any:
    """A tolerance in the form that `solve` takes."""
    if isinstance(y0, Tensor) or not isinstance(value, Sequence | Tensor):
        return value
    if isinstance(value, Tensor):
        return value.unbind() if value.ndim else value
    return tuple(value)
