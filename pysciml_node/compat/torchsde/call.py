"""One call of `sdeint` or `sdeint_adjoint`: its arguments checked, its solve, what it returns."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import Adjoint, DirectAdjoint
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
from pysciml_node.compat.torchsde.solver import GivenParts, GivenPath
from pysciml_node.compat.torchsde.words import in_torchsde_words
from pysciml_node.errors import SolverFailure
from pysciml_node.problems.modes import in_ordinary_modes, uncompiled
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.solutions.solution import Solution
from pysciml_node.solving.checks import check_options
from pysciml_node.solving.diagnosis import failure_message
from pysciml_node.steps.chosen import ForThese
from pysciml_node.stochastic.brownian import BrownianPath, Path
from pysciml_node.stochastic.grid import GridPath
from pysciml_node.stochastic.normals import GeneratedNormals
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


class Call:
    """A call of `sdeint`, its arguments checked.

    Attributes:
        method: torchsde's name of the method.
        reversing: whether gradients come from undoing its steps.
    """

    reversing = False

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
        with in_torchsde_words():
            solution, carried = _solve(problem, adjoint, call=self, begin=begin, **given)
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

    def path(self, size: int) -> Path:
        """The Brownian motion: the given one, or a new one for so many motions in all."""
        samples, (start, end) = len(self.y0), (self.times[0], self.times[-1])
        levy, bm = self.method == "log_ode", self.bm
        if bm is None and not levy:
            seed, length = int(torch.randint(2**63 - 1, ())), end - start
            if not self.adaptive:
                area = self.method == "srk"
                return GridPath(seed, size, self.y0, start, self.dt, length, area=area)
            return BrownianPath(
                GeneratedNormals(seed, self.y0.dtype, self.y0.device), size, start, length
            )
        if bm is None:
            bm = BrownianInterval(
                start,
                end,
                (samples, size // samples),
                self.y0.dtype,
                self.y0.device,
                dt=None if self.adaptive else self.dt,
                levy_area_approximation="foster",
            )
        if math.prod(bm.shape) != size:
            raise ValueError(
                f"bm must have shape ({samples}, {size // samples}) for the sde's diffusion, "
                f"but has {tuple(bm.shape)}.\n  Leave it out, or make it with that size."
            )
        return GivenPath(bm, end - start, levy)

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
def _solve(problem: SDEProblem, adjoint: Adjoint, **given: Any) -> tuple[Solution, Tensor | None]:
    """The solution, and what was carried beside the state at its end."""
    run = partial(_solve_in_modes, adjoint=adjoint, **given)
    return in_ordinary_modes(run, problem, isinstance(adjoint, DirectAdjoint))


def _solve_in_modes(
    problem: SDEProblem,
    algorithm: StochasticRungeKutta,
    call: Call,
    begin: Sequence[Tensor] | None,
    **given: Any,
) -> tuple[Solution, Tensor | None]:
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
    parts = GivenParts(call.path, call.begin(begin), levy, call.shortest, call.reversing)
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
