"""The time loop of stochastic equations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.controllers import FixedStep
from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.replay.norms import Tolerance
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.step import SLIVER, Attempt, Step
from pysciml_node.stochastic.brownian import DEPTH, BrownianPath, Normals
from pysciml_node.stochastic.step import Stepper, Taken, initial_step


def path_for(problem: SDEProblem, options: SolveOptions, size: int) -> BrownianPath:
    """The Brownian motions of a solve.

    The root of the tree is the interval; with fixed steps it is the next `dt0 * 2**k`, so that
    their ends are found quickly and halving `dt0` keeps the path.
    """
    assert options.seed is not None
    span = problem.t1 - problem.t0
    length = span
    if isinstance(options.controller, FixedStep) and options.dt0 is not None:
        length = math.ldexp(options.dt0, max(0, math.ceil(math.log2(span / options.dt0) - 1e-9)))
        # A last step that is a sliver shorter than the others ends where the tree ends.
        length = max(length, span)
    normals = Normals(options.seed, size, problem.spec.dtype, problem.spec.device)
    return BrownianPath(normals, problem.t0, length)


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
    path: BrownianPath
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
        options, problem, slope = self.options, self.problem, self.slope
        if options.dt0 is not None:
            return options.dt0, slope
        stepper = self.stepper
        u = stepper.state(self.vector).detach()
        tolerance = Tolerance(options.rtol, options.atol, options.driven)
        with torch.no_grad():
            if slope is None:
                slope = starting_slope(stepper, problem.t0, u)
            span, fields = problem.t1 - problem.t0, stepper.fields
            size = initial_step(fields, stepper.method, tolerance, problem.t0, u, slope, span)
        return size, slope


class Steps(ABC):
    """Accepted steps from `t0` to `t1`: iterate to get them.

    Attributes:
        vector: what is stepped, at the end of the last one.
        naccept: how many there are.
        nreject: how many attempts were rejected.
        retcode: after the last step, how it ended.
        last: the last attempt, where it is known.
    """

    def __init__(self, start: Start) -> None:
        self.start = start
        self.vector = start.vector
        self.naccept = self.nreject = 0
        self.retcode = ReturnCode.Default
        self.last: Attempt | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[Step]:
        """The steps, once."""

    @property
    def evaluations(self) -> tuple[int, int]:
        """Of drift and diffusion, so far."""
        fields = self.start.stepper.fields
        return fields.nfe, fields.nfe_diffusion


class SDEMarch(Steps):
    """Steps that the torch engine takes.

    The path is what it is before the first step: a rejected step looks at it again over a shorter
    interval. Steps that are chosen so depend on the path. Methods that this biases are refused
    before (`StochasticRungeKutta.check_adaptive`).
    """

    @override
    def __iter__(self) -> Iterator[Step]:
        start = self.start
        options, problem, stepper, path = start.options, start.problem, start.stepper, start.path
        adaptive = options.controller.adaptive
        sizes = options.controller.start(stepper.method.tableau.error_order)
        tolerance = Tolerance(options.rtol, options.atol, options.driven)
        stops = (*options.landings(1), problem.t1)
        t, next_stop, rejecting = problem.t0, 0, False
        smallest = start.smallest
        h, slope = start.first_size()
        # Autograd has not recorded what the search for a first size has evaluated.
        first = None if torch.is_grad_enabled() or not self._first_is_at_start else slope
        while True:
            if not math.isfinite(h):
                self.retcode = ReturnCode.Unstable
                return
            if self.naccept + self.nreject >= options.max_steps:
                self.retcode = ReturnCode.MaxIters
                return
            proposed = min(h, options.dtmax)
            stop = stops[next_stop]
            lands = stop - t <= proposed * (1 + SLIVER)
            if adaptive and proposed < smallest and not lands:
                bad = self.last is not None and not math.isfinite(self.last.error)
                self.retcode = ReturnCode.Unstable if bad else ReturnCode.DtLessThanMin
                return
            end = stop if lands else t + proposed
            if adaptive and not lands:
                end = path.aligned(t, proposed, down=rejecting or proposed == options.dtmax)
                lands = end >= stop
                end = min(end, stop)
            motion = path.increment(t, end)
            u = self.vector
            u1, taken = stepper.take(t, u, motion, with_error=adaptive, first=first)
            error = math.nan
            if adaptive:
                with torch.no_grad():
                    # The one host read of a step.
                    error = stepper.error(taken, u, u1, motion, tolerance).item()
            self.last = Attempt(t, motion.h, u, u1, error)
            if adaptive and not error <= 1.0:
                self.nreject += 1
                rejecting = True
                if self._first_is_at_start:
                    first = _both(taken, 0)
                h = sizes.rejected(min(proposed, 1.125 * (end - t)), error)
                continue
            self.naccept += 1
            self.vector, rejecting = u1, False
            stop_index = next_stop if lands else None
            yield Step(t, motion.h, end, u, u1, error, stop_index, t, motion.h)
            # The fields may jump at a stop: their values there belong to the next step.
            first = _both(taken, -1) if stepper.method.tableau.fsal and not lands else None
            h = proposed
            if adaptive:
                # A step cut short by a stop says little: keep the size that was proposed. What the
                # alignment has changed is not fed back: small factors would be rounded away.
                cut = end - t < 0.7 * proposed
                following = sizes.accepted(end - t if cut else proposed, error)
                h = max(following, proposed) if cut else following
            t = end
            if lands:
                next_stop += 1
                if next_stop == len(stops):
                    self.retcode = ReturnCode.Success
                    return

    @property
    def _first_is_at_start(self) -> bool:
        """Whether the first stages of drift and diffusion do not depend on the step's size."""
        tableau = self.start.stepper.method.tableau
        first = tableau.diffusion[0]
        return first is not None and first.c == 0.0


def _both(taken: Taken, stage: int) -> tuple[Tensor, Tensor] | None:
    f, g = taken.f[stage], taken.g[stage]
    return None if f is None or g is None else (f, g)


def starting_slope(stepper: Stepper, t: float, u: Tensor) -> Slope:
    """Drift and diffusion at a time and state."""
    time = stepper.method.nodes.new_tensor(t)
    return stepper.fields.drift(time, u), stepper.fields.diffusion(time, u)
