"""The time loop of stochastic equations."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.steps.loop import Loop, MarchOptions
from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.steps.step import Step
from pysciml_node.stochastic.brownian import DEPTH, BrownianPath, Path
from pysciml_node.stochastic.normals import PlacedNormals
from pysciml_node.stochastic.step import Stepper, Taken, initial_step


def path_for(problem: SDEProblem, options: SolveOptions, size: int) -> BrownianPath:
    """The Brownian motions of a solve.

    The root of the tree is the interval; with fixed steps it is the next `dt0 * 2**k`, so that
    their ends are found quickly and halving `dt0` keeps the path.
    """
    assert options.seed is not None
    length = root_length(problem.t1 - problem.t0, options)
    normals = PlacedNormals(options.seed, problem.spec.dtype, problem.spec.device)
    return BrownianPath(normals, size, problem.t0, length)


def root_length(span: float, options: SolveOptions) -> float:
    """Length of the tree's root interval, for a solve over a length of time."""
    if not isinstance(options.controller, FixedStep) or options.dt0 is None:
        return span
    dt0 = min(options.dt0, span)
    # A last step that is a sliver shorter than the others ends where the tree ends.
    return max(math.ldexp(dt0, max(0, math.ceil(math.log2(span / dt0) - 1e-9))), span)


Slope = tuple[Tensor, Tensor]
"""Drift and diffusion at a time and state."""


@dataclass(frozen=True)
class Start:
    """What the steps of a solve begin from.

    Args:
        stepper: method and fields.
        options: step control.
        path: the Brownian motions.
        vector: what is stepped, at `t0`.
        slope: drift and diffusion there, where they are known.
    """

    stepper: Stepper
    options: SolveOptions
    path: Path
    vector: Tensor
    slope: Slope | None

    @property
    def problem(self) -> SDEProblem:
        """What is solved."""
        return self.stepper.fields.problem

    @property
    def smallest(self) -> float:
        """The least size of a step: below it the path does not tell times apart."""
        resolved = math.ldexp(self.path.length, 4 - DEPTH)
        return max(self.options.dtmin, resolved, 8 * math.ulp(self.problem.t1))

    def first_size(self) -> tuple[float, Slope | None]:
        """The size that the first step should have; drift and diffusion at the start, if known."""
        size, slope = self._guess()
        # The first size is a guess: only the error of a step asks for less than the limit.
        return max(size, self.options.dtmin) if math.isfinite(size) else size, slope

    def _guess(self) -> tuple[float, Slope | None]:
        options, problem, slope = self.options, self.problem, self.slope
        if options.dt0 is not None:
            return options.dt0, slope
        stepper = self.stepper
        u = stepper.state(self.vector).detach()
        norm = ErrorNorm(options.tolerances)
        with torch.no_grad():
            if slope is None:
                slope = starting_slope(stepper, problem.t0, u)
            span, fields = problem.t1 - problem.t0, stepper.fields
            size = initial_step(fields, stepper.method, norm, problem.t0, u, slope, span)
        return size, slope


class SDEMarch(Loop):
    """Steps that the torch engine takes.

    The path is what it is before the first step: a rejected step looks at it again over a shorter
    interval. Steps that are chosen so depend on the path. Methods that this biases are refused
    before (`StochasticRungeKutta.check_adaptive`).

    Args:
        start: what the steps begin from.
    """

    whole = 0.7

    def __init__(self, start: Start) -> None:
        options, problem = start.options, start.problem
        control = MarchOptions(
            controller=options.controller,
            norm=ErrorNorm(options.tolerances),
            max_steps=options.max_steps,
            dtmax=options.dtmax,
            tstops=options.landings(1),
        )
        super().__init__(start.vector, problem.t0, problem.t1, control)
        self.start, self._smallest = start, start.smallest
        self._rejecting = False
        self._taken: Taken
        # Drift and diffusion of the next step's first stages, where they are known.
        self._first: Slope | None = None

    @property
    @override
    def error_order(self) -> float:
        return self.start.stepper.method.tableau.error_order

    @override
    def first_size(self) -> float:
        h, slope = self.start.first_size()
        # Autograd has not recorded what the search for a first size has evaluated.
        if self.start.stepper.begins_at_state(self.u) and not torch.is_grad_enabled():
            self._first = slope
        return h

    @override
    def smallest(self) -> float:
        return self._smallest

    @override
    def take(self, proposed: float, lands: bool) -> Step:
        options, stepper, path, t, u = (
            self.options,
            self.start.stepper,
            self.start.path,
            self.t,
            self.u,
        )
        adaptive, stop = options.controller.adaptive, self.stops[self.passed]
        end = stop if lands else t + proposed
        if adaptive and not lands:
            down = self._rejecting or proposed == options.dtmax
            end = min(path.aligned(t, proposed, down=down), stop)
        # Far from zero the end may be rounded to the stop.
        lands = end >= stop
        motion = path.increment(t, end)
        u1, self._taken = stepper.take(t, u, motion, with_error=adaptive, first=self._first)
        error = math.nan
        if adaptive:
            with torch.no_grad():
                # The one host read of a step.
                error = stepper.error(self._taken, u, u1, motion, options.norm).item()
        h = motion.h
        return Step(t, h, end, u, u1, error, self.passed if lands else None, t, h)

    @override
    def rejected(self, step: Step) -> None:
        self._rejecting = True
        if self.start.stepper.method.starts_at_start:
            self._first = _both(self._taken, 0)

    @override
    def accepted(self, step: Step) -> None:
        self._rejecting = False
        self.start.stepper.leave()
        # The fields may jump at a stop: their values there belong to the next step.
        again = self.start.stepper.method.tableau.fsal and step.stop is None
        self._first = _both(self._taken, -1) if again else None

    @override
    def size_accepted(self, step: Step, proposed: float, cut: bool) -> float:
        # What the alignment has changed is not fed back: small factors would be rounded away.
        return step.end - step.t if cut else proposed

    @override
    def size_rejected(self, step: Step, proposed: float) -> float:
        return min(proposed, 1.125 * (step.end - step.t))


def _both(taken: Taken, stage: int) -> tuple[Tensor, Tensor] | None:
    f, g = taken.f[stage], taken.g[stage]
    return None if f is None or g is None else (f, g)


def starting_slope(stepper: Stepper, t: float, u: Tensor) -> Slope:
    """Drift and diffusion at a time and state."""
    time = stepper.method.like.new_full((), t)
    return stepper.fields.drift(time, u), stepper.fields.diffusion(time, u)
