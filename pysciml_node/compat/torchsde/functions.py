"""`sdeint` and `sdeint_adjoint`."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import Adjoint, DirectAdjoint, DiscreteAdjoint
from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.stochastic import (
    EM,
    SRA1,
    SRIW1,
    EulerHeun,
    ReversibleHeun,
    RKMil,
    StochasticRungeKutta,
    StratonovichMidpoint,
)
from pysciml_node.compat.torchsde.brownian import BrownianInterval, _FromPoint, as_time
from pysciml_node.compat.torchsde.sdes import Equation
from pysciml_node.compat.torchsde.settings import METHOD_OPTIONS, METHODS
from pysciml_node.compat.torchsde.solver import GivenParts
from pysciml_node.errors import SolverFailure
from pysciml_node.problems.modes import uncompiled
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.solutions.solution import Solution
from pysciml_node.solving.checks import check_options
from pysciml_node.solving.diagnosis import failure_message
from pysciml_node.solving.solve import outside_modes
from pysciml_node.steps.chosen import ForThese
from pysciml_node.stochastic.solve import SDESolve
from pysciml_node.stochastic.trajectory import SDETrajectory

Scalar = float | Tensor

# Which equations a method is for, and what solves them here.
_ITO: dict[str, StochasticRungeKutta] = {"euler": EM(), "milstein": RKMil(), "srk": SRIW1()}
_STRATONOVICH: dict[str, StochasticRungeKutta] = {
    "milstein": RKMil(),
    "midpoint": StratonovichMidpoint(),
    "heun": EulerHeun(),
    "euler_heun": EulerHeun(),
    "reversible_heun": ReversibleHeun(),
    "log_ode": StratonovichMidpoint(),
}
_ADDITIVE: dict[str, StochasticRungeKutta] = {"milstein": EM(), "srk": SRA1()}


class _WarnedEM(EM):
    """Euler-Maruyama whose steps may follow the path for any noise."""

    adapts_to = EM.noises


def sdeint(
    sde: Any,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    bm: Any = None,
    method: str | None = None,
    dt: Scalar = 1e-3,
    adaptive: bool = False,
    rtol: Scalar = 1e-5,
    atol: Scalar = 1e-4,
    dt_min: Scalar = 1e-5,
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    extra: bool = False,
    extra_solver_state: Sequence[Tensor] | None = None,
    **unused_kwargs: Any,
) -> Any:
    """Solve `dy = f(t, y) dt + g(t, y) dW` and differentiate through the solver's steps.

    Args:
        sde: object with the attributes `noise_type` and `sde_type` and methods `f(t, y)`, `(B, d)`,
            and `g(t, y)`, `(B, d)` for diagonal and `(B, d, m)` for other noise (`m = 1` for
            scalar); or `f_and_g`, `g_prod`, `f_and_g_prod`; with `logqp` also `h`, a prior's drift.
        y0: initial states, `(B, d)`, float32 or float64.
        ts: times of the output, `(T,)`, increasing; the first is that of `y0`.
        bm: Brownian motion of shape `(B, m)` over the interval; default a new `BrownianInterval`.
        method: for Ito SDEs `"euler"`, `"milstein"`, `"srk"`; for Stratonovich ones `"midpoint"`,
            `"heun"`, `"euler_heun"`, `"milstein"`, `"reversible_heun"`, `"log_ode"`. Default
            `"srk"` (general noise: `"euler"`) and `"midpoint"`.
        dt: size of the steps, or of the first where they adapt.
        adaptive: whether the size follows an error estimate.
        rtol: relative tolerance of adaptive steps.
        atol: absolute tolerance of adaptive steps.
        dt_min: adaptive steps are never shorter; a warning says where their errors are larger.
        options: `grad_free` of `"milstein"`, which is free of derivatives with either.
        names: other names of the sde's methods, by `"drift"`, `"diffusion"`, `"prior_drift"`,
            `"diffusion_prod"`, `"drift_and_diffusion"`, `"drift_and_diffusion_prod"`.
        logqp: return the relative entropy to the prior, too.
        extra: return the solver's own state at the end, too.
        extra_solver_state: such a state to begin with: `(f, g, z)` of `"reversible_heun"`.
        unused_kwargs: other arguments; a warning names them.

    Returns:
        The states, `(T, B, d)`. With `logqp` also the relative entropies of the intervals,
        `(T - 1, B)`, and with `extra` the solver's state, a tuple of tensors: `(f, g, z)` for
        `"reversible_heun"`, else empty.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, or a method that is not for the sde.
        SolverFailure: the last time was not reached.

    Examples:
        >>> import torch
        >>> from pysciml_node.compat import torchsde
        >>> class Geometric(torchsde.SDEIto):
        ...     def f(self, t, y):
        ...         return 0.1 * y
        ...
        ...     def g(self, t, y):
        ...         return 0.2 * y
        >>> ys = torchsde.sdeint(Geometric("diagonal"), torch.ones(4, 3), [0.0, 0.5, 1.0], dt=0.1)
        >>> ys.shape
        torch.Size([3, 4, 3])

    Reference: X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, arXiv 2001.01328.
    """
    _warn_of(unused_kwargs, "sdeint")
    call = _Call(sde, y0, ts, bm, method, names, logqp, adaptive)
    call.check_options(options)
    control = {"dt": dt, "rtol": rtol, "atol": atol, "dt_min": dt_min}
    return call.run(DirectAdjoint(), control, extra, extra_solver_state)


def sdeint_adjoint(
    sde: Any,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    bm: Any = None,
    method: str | None = None,
    adjoint_method: str | None = None,
    dt: Scalar = 1e-3,
    adaptive: bool = False,
    adjoint_adaptive: bool = False,
    rtol: Scalar = 1e-5,
    adjoint_rtol: Scalar = 1e-5,
    atol: Scalar = 1e-4,
    adjoint_atol: Scalar = 1e-4,
    dt_min: Scalar = 1e-5,
    options: Mapping[str, Any] | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    extra: bool = False,
    extra_solver_state: Sequence[Tensor] | None = None,
    **unused_kwargs: Any,
) -> Any:
    """`sdeint` that keeps one state a step, and takes the steps again backward.

    The gradient is that of the steps themselves, exact to rounding for every method and for
    adaptive steps too. torchsde solves an adjoint equation instead, whose error is that of its
    steps; its arguments `adjoint_method`, `adjoint_adaptive`, `adjoint_rtol`, `adjoint_atol` and
    `adjoint_options` are checked and have no effect.

    Args:
        sde: as in `sdeint`; need not be a module.
        y0: as in `sdeint`.
        ts: as in `sdeint`.
        bm: as in `sdeint`.
        method: as in `sdeint`.
        adjoint_method: one of torchsde's methods.
        dt: as in `sdeint`.
        adaptive: as in `sdeint`.
        adjoint_adaptive: a flag.
        rtol: as in `sdeint`.
        adjoint_rtol: a number.
        atol: as in `sdeint`.
        adjoint_atol: a number.
        dt_min: as in `sdeint`.
        options: as in `sdeint`.
        adjoint_options: a dict.
        adjoint_params: the tensors that receive gradients, beside `y0`; default all that the sde
            is found to use.
        names: as in `sdeint`.
        logqp: as in `sdeint`.
        extra: as in `sdeint`.
        extra_solver_state: as in `sdeint`.
        unused_kwargs: as in `sdeint`.

    Returns:
        As `sdeint`; the result allows one backward pass, not a second derivative.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: as in `sdeint`.
        SolverFailure: the last time was not reached.
    """
    _warn_of(unused_kwargs, "sdeint_adjoint")
    checks.flag("adjoint_adaptive", adjoint_adaptive)
    for name, value in (("adjoint_rtol", adjoint_rtol), ("adjoint_atol", adjoint_atol)):
        checks.number(name, value, at_least=0)
    if adjoint_method is not None:
        checks.choice("adjoint_method", adjoint_method, METHODS)
    if adjoint_options is not None and not isinstance(adjoint_options, Mapping):
        checks.refuse("adjoint_options", "a dict", adjoint_options, "Write {}.")
    call = _Call(sde, y0, ts, bm, method, names, logqp, adaptive)
    call.check_options(options)
    if adjoint_method == "adjoint_reversible_heun" and call.method != "reversible_heun":
        raise ValueError(
            'adjoint_method="adjoint_reversible_heun" is for method="reversible_heun", but the '
            f'method is "{call.method}".\n  Leave it out.'
        )
    chosen = None if adjoint_params is None else tuple(adjoint_params)
    control = {"dt": dt, "rtol": rtol, "atol": atol, "dt_min": dt_min}
    return call.run(DiscreteAdjoint(), control, extra, extra_solver_state, chosen)


def _warn_of(unused: dict[str, Any], who: str) -> None:
    if unused:
        warnings.warn(f"{who} takes no argument {', '.join(unused)}.", stacklevel=3)


class _Call:
    """A call of `sdeint`, its arguments checked.

    Attributes:
        method: torchsde's name of the method.
    """

    def __init__(
        self,
        sde: Any,
        y0: Tensor,
        ts: Any,
        bm: Any,
        method: str | None,
        names: Mapping[str, str] | None,
        logqp: bool,
        adaptive: bool,
    ) -> None:
        self.adaptive = checks.flag("adaptive", adaptive)
        self.logqp = checks.flag("logqp", logqp)
        self.equation = Equation(sde, names, self.logqp)
        y0 = checks.tensor("y0", y0, axes=2, precise=True)
        # The relative entropy so far is one more entry of the state.
        self.y0 = torch.cat((y0, torch.zeros_like(y0[:, :1])), 1) if self.logqp else y0
        self.times = _times(ts)
        self.bm = bm
        if bm is not None:
            self._check_motion()
        self.method, self.algorithm = self._select(method)
        self.equation.share(not isinstance(self.algorithm, SRA1))

    def _check_motion(self) -> None:
        bm = self.bm
        if not all(hasattr(bm, name) for name in ("shape", "levy_area_approximation")):
            checks.refuse("bm", "a Brownian motion", bm, "Write BrownianInterval(t0, t1, size).")
        if getattr(bm, "dtype", self.y0.dtype) != self.y0.dtype:
            raise TypeError(
                f"bm must have the dtype of y0, {self.y0.dtype}, but has {bm.dtype}.\n"
                "  Make it with dtype=y0.dtype."
            )
        if len(bm.shape) != 2 or bm.shape[0] != len(self.y0):
            raise ValueError(
                f"bm must have shape ({len(self.y0)}, m), one row for each sample, but has "
                f"{tuple(bm.shape)}.\n  Leave it out, or make it with that size."
            )
        self.equation.motions = bm.shape[1]
        interval = bm.interval if isinstance(bm, _FromPoint) else bm
        if isinstance(interval, BrownianInterval) and not (
            interval.t0 <= self.times[0] and self.times[-1] <= interval.t1
        ):
            raise ValueError(
                f"bm must cover ts, [{self.times[0]}, {self.times[-1]}], but covers "
                f"[{interval.t0}, {interval.t1}].\n  Make it with t0=ts[0] and t1=ts[-1]."
            )

    def _select(self, method: str | None) -> tuple[str, StochasticRungeKutta]:
        noise, interpretation = self.equation.noise, self.equation.interpretation
        if method is None:
            ito = "euler" if noise == "general" else "srk"
            method = ito if interpretation == "ito" else "midpoint"
        checks.choice("method", method, METHODS)
        if self.adaptive and method == "euler" and noise != "additive":
            warnings.warn(
                "adaptive steps of the Euler-Maruyama method with noise that is not additive may "
                "converge to another solution.",
                stacklevel=4,
            )
        known = _ITO if interpretation == "ito" else _STRATONOVICH
        if noise == "general":
            known = {name: one for name, one in known.items() if "general" in one.noises}
        if method not in known:
            raise ValueError(
                f'method "{method}" is not for {interpretation} SDEs with {noise} noise.\n'
                f"  Use one of {', '.join(known)}."
            )
        need = {"srk": ("space-time", "davie", "foster"), "log_ode": ("davie", "foster")}
        if self.bm is not None and method in need:
            checks.choice(
                f'bm.levy_area_approximation for method "{method}"',
                self.bm.levy_area_approximation,
                need[method],
            )
        return method, _ADDITIVE.get(method, known[method]) if noise == "additive" else known[
            method
        ]

    def check_options(self, options: Any) -> None:
        """Refuse options that the methods do not have.

        Raises:
            TypeError: no dict, or an unknown option.
        """
        if options is None:
            return
        if not isinstance(options, Mapping):
            checks.refuse("options", "a dict", options, "Write {}.")
        checks.keywords("options", options, METHOD_OPTIONS)

    def run(
        self,
        adjoint: Adjoint,
        control: dict[str, Any],
        extra: bool,
        begin: Sequence[Tensor] | None,
        chosen: tuple[Tensor, ...] | None = None,
    ) -> Any:
        """Solve, and return what was asked for."""
        extra = checks.flag("extra", extra)
        drift: Callable[..., Any] = self.equation.drift
        problem = SDEProblem(
            drift if chosen is None else ForThese(drift, chosen),
            self.equation.diffusion,
            self.y0,
            (self.times[0], self.times[-1]),
            noise=self.equation.noise,
            interpretation=self.equation.interpretation,  # type: ignore[arg-type]
        )
        given = self._control(problem, **control)
        solution, carried = _solve(
            problem, given.pop("algorithm"), self, begin, adjoint=adjoint, **given
        )
        ys = solution.u
        found: list[Any] = [ys]
        if self.logqp:
            found = [ys[..., :-1], ys[..., -1].diff(dim=0)]
        if extra:
            found.append(self._extra(problem, carried))
        return tuple(found) if len(found) > 1 else ys

    def _control(
        self,
        problem: SDEProblem,
        dt: Scalar,
        rtol: Scalar,
        atol: Scalar,
        dt_min: Scalar,
    ) -> dict[str, Any]:
        """Step control as `solve` takes it, and the algorithm that goes with it."""
        self.dt = checks.number("dt", as_time("dt", dt), above=0)
        algorithm = self.algorithm
        limits = {
            "rtol": checks.number("rtol", rtol, at_least=0),
            "atol": checks.number("atol", atol, at_least=0),
        }
        self.shortest = checks.number("dt_min", as_time("dt_min", dt_min), above=0)
        if not self.adaptive:
            return {"algorithm": algorithm, "dt0": self.dt, "controller": FixedStep(), **limits}
        if isinstance(algorithm, EM) and problem.noise != "additive":
            algorithm = _WarnedEM()
        first = min(self.dt, problem.t1 - problem.t0)
        return {"algorithm": algorithm, "dt0": first, **limits}

    def motion(self, size: int) -> Any:
        """The Brownian motion: the given one, or a new one for so many motions in all."""
        samples = len(self.y0)
        if self.bm is not None:
            if math.prod(self.bm.shape) != size:
                raise ValueError(
                    f"bm must have shape ({samples}, {size // samples}) for the sde's diffusion, "
                    f"but has {tuple(self.bm.shape)}.\n  Leave it out, or make it with that size."
                )
            return self.bm
        level = {"srk": "space-time", "log_ode": "foster"}.get(self.method, "none")
        return BrownianInterval(
            self.times[0],
            self.times[-1],
            (samples, size // samples),
            self.y0.dtype,
            self.y0.device,
            dt=None if self.adaptive else self.dt,
            levy_area_approximation=level,
        )

    def begin(self, given: Sequence[Tensor] | None) -> Tensor | None:
        """What is carried beside the state at the start."""
        if not given:
            return None
        if self.method != "reversible_heun" or len(given) != 3:
            raise ValueError(
                'extra_solver_state must be (f, g, z) of method="reversible_heun", but has '
                f'{len(given)} parts for method="{self.method}".\n  Leave it out.'
            )
        t = self.y0.new_tensor(self.times[0])
        f, g, z = given
        with torch.no_grad():
            values = self.equation.drift(t, z), self.equation.diffusion(t, z)
            parts = f, g.reshape(values[1].shape)
            if not all(
                torch.allclose(a, b, 1e-4, 1e-5) for a, b in zip(values, parts, strict=True)
            ):
                raise ValueError(
                    "extra_solver_state must be (f, g, z) with f and g the sde's values at z, but "
                    "they are others.\n  Pass what a solve with extra=True has returned."
                )
        return z.reshape(-1)

    def _extra(self, problem: SDEProblem, carried: Tensor | None) -> tuple[Tensor, ...]:
        if carried is None:
            return ()
        t, z = self.y0.new_tensor(self.times[-1]), carried.view(self.y0.shape)
        g = self.equation.diffusion(t, z)
        return self.equation.drift(t, z), g.unsqueeze(-1) if problem.noise == "scalar" else g, z


@uncompiled
@outside_modes
def _solve(
    problem: SDEProblem,
    algorithm: StochasticRungeKutta,
    call: _Call,
    begin: Sequence[Tensor] | None,
    **given: Any,
) -> tuple[Solution, Tensor | None]:
    """The solution, and what was carried beside the state at its end."""
    usual = {
        "dtmin": None,
        "dtmax": None,
        "tstops": (),
        "max_steps": 10**9,
        "controller": None,
        "events": (),
        "progress": False,
        "throw": True,
        "compile": False,
        "generator": None,
        "saveat": call.times,
    }
    options = check_options(problem, algorithm, **(usual | given))
    options = dataclasses.replace(options, seed=0)
    levy = call.method == "log_ode"
    parts = GivenParts(call.motion, call.begin(begin), levy, call.shortest)
    solution = SDESolve(problem, algorithm, options, "torch", parts).solution()
    if not solution.success:
        raise SolverFailure(failure_message(solution, options), solution)
    assert isinstance(solution.trajectory, SDETrajectory)
    last = solution.trajectory.vectors[-1]
    carried = last[problem.spec.sizes[0] :]
    return solution, carried if len(carried) else None


def _times(ts: Any) -> list[float]:
    """The times of the output as numbers.

    Raises:
        TypeError: no times.
        ValueError: they do not increase, or require gradients.
    """
    if isinstance(ts, Tensor):
        ts = checks.tensor("ts", ts, axes=1, real=True)
        if ts.requires_grad:
            raise ValueError(
                "ts must not require gradients: Brownian motion has no derivative in time.\n"
                "  Detach it: ts.detach()."
            )
        ts = ts.detach().cpu().unbind()
    elif not isinstance(ts, Sequence) or isinstance(ts, str | bytes):
        checks.refuse("ts", "a tensor of one axis, or a list of numbers", ts, "Write [0.0, 1.0].")
    times = [as_time(f"ts[{i}]", t) for i, t in enumerate(ts)]
    if len(times) < 2:
        raise ValueError(
            f"ts must have at least two times, but has {len(times)}.\n"
            "  Give the time of y0 and one behind it."
        )
    for i, (one, other) in enumerate(itertools.pairwise(times)):
        if other <= one:
            raise ValueError(
                f"ts must increase, but ts[{i + 1}] = {other} follows {one}.\n"
                "  Sort it; torchsde's way backward in time is ReverseBrownian."
            )
    return times
