"""One solve of torchsde's functions: a stochastic solve of this package along a given motion."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.options import SolveOptions
from pysciml_node.compat.torchsde.brownian import BrownianInterval
from pysciml_node.compat.torchsde.words import in_torchsde_words
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.record import Record
from pysciml_node.steps.saver import Between, Saver
from pysciml_node.steps.step import Step
from pysciml_node.stochastic.brownian import Path
from pysciml_node.stochastic.fields import DifferentiableFields, Fields
from pysciml_node.stochastic.kept import KeptPullback
from pysciml_node.stochastic.march import SDEMarch, Start
from pysciml_node.stochastic.reversible import SparseSaver, reversible_sweep
from pysciml_node.stochastic.solve import Parts, SDESolve
from pysciml_node.stochastic.step import Motion, SDEMethod, Stepper, Taken
from pysciml_node.stochastic.virtual_tree import Increment
from pysciml_node.tableaus.stochastic import SDETableau


@dataclass(frozen=True)
class _IncrementWithArea(Increment):
    """An increment with Levy's area, `(B, m, m)`."""

    levy: Tensor


class GivenPath(Path):
    """A motion of torchsde's kind, as the steps of a solve ask for it.

    Args:
        bm: the motion.
        length: of the solve's interval.
        levy: whether Levy's area is asked for, too.
    """

    def __init__(self, bm: Any, length: float, levy: bool) -> None:
        self.bm, self.length, self._levy = bm, length, levy
        self._area = bm.levy_area_approximation != "none"

    @override
    def aligned(self, t: float, h: float, down: bool) -> float:
        if isinstance(self.bm, BrownianInterval):
            return self.bm.found_first(
                t + h * (0.75 if down else 0.875), t + h * (1 if down else 1.125)
            )
        unit = math.ldexp(1.0, math.floor(math.log2(h)) - 2)
        place = (t + h) / unit
        return (math.floor(place) if down else round(place)) * unit

    @override
    def increment(self, start: float, end: float) -> Increment:
        if isinstance(self.bm, BrownianInterval) and not self._levy:
            return self.bm.motion(start, end)
        found = self.bm(start, end, return_U=self._area, return_A=self._levy)
        w, *others = found if isinstance(found, tuple) else (found,)
        h = end - start
        area = others[0] / h - w / 2 if self._area and h > 0 else None
        # Copies: graphs of steps read them, and whoever made them may use their memory again.
        flat = w.reshape(-1).clone(), None if area is None else area.reshape(-1)
        if self._levy:
            return _IncrementWithArea(h, *flat, others[-1])
        return Increment(h, *flat)


class LogODE(Stepper):
    """The midpoint rule with the Lie brackets of the diffusion's columns, weighed by Levy's area.

    Adds `sum_kl A_kl (dg_l / dy) g_k` at the middle of the step.

    Reference: J. Foster, G. dos Reis, C. Strange, SIAM J. Numer. Anal. 62 (2024); T. Lyons, in
    Proceedings of the ICM 2014, volume 4, 163-184.
    """

    @override
    def take(
        self,
        t: float | Tensor,
        vector: Tensor,
        motion: Motion,
        with_error: bool = False,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Taken]:
        end, taken = super().take(t, vector, motion, with_error, first)
        # Other noise commutes.
        if isinstance(motion, _IncrementWithArea) and self.fields.problem.noise == "general":
            middle = taken.arguments[1]
            assert middle is not None
            time = self.method.like.new_full((), float(t) + motion.h / 2)
            end = end + self._brackets(time, middle, motion.levy)
        return end, taken

    def _brackets(self, time: Tensor, y: Tensor, levy: Tensor) -> Tensor:
        recording, layout = torch.is_grad_enabled(), self.fields.layout
        with torch.enable_grad():
            y = y if y.requires_grad else y.detach().requires_grad_()
            g = self.fields.diffusion(time, y).view(layout.samples, -1, layout.motions or 1)
            if not g.requires_grad:  # it does not depend on the state
                return torch.zeros_like(y)
            directions = g @ levy
            # Twice backward is forward: the product of the Jacobian with each direction.
            dual = torch.zeros_like(g, requires_grad=True)
            (pulled,) = torch.autograd.grad(g, y, dual, create_graph=True, materialize_grads=True)
            if not pulled.requires_grad:
                return torch.zeros_like(y)
            total = torch.zeros_like(directions[..., 0])
            for column in range(g.shape[-1]):
                direction = directions[..., column].reshape(-1)
                (pushed,) = torch.autograd.grad(
                    pulled,
                    dual,
                    direction,
                    create_graph=recording,
                    retain_graph=True,
                    materialize_grads=True,
                )
                total = total + pushed[..., column]
        flat = total.reshape(-1)
        return flat if recording else flat.detach()


class _Floored(SDEMarch):
    """Steps that are never shorter than a size: those of it are taken whatever their error is.

    Args:
        start: what they begin from.
        shortest: the size.
    """

    def __init__(self, start: Start, shortest: float) -> None:
        super().__init__(start)
        self._shortest, self._warned = shortest, False

    @override
    def take(self, proposed: float, lands: bool) -> Step:
        step = super().take(proposed if lands else max(proposed, self._shortest), lands)
        short = step.end - step.t <= 1.2 * self._shortest
        if not self.options.controller.adaptive or step.error <= 1 or not short:
            return step
        if not math.isfinite(step.error):
            return step
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"adaptive steps have reached dt_min={self._shortest} at t={step.t:.6g}: from "
                "there on errors are larger than the tolerances.",
                stacklevel=2,
            )
        return dataclasses.replace(step, error=1.0)

    @override
    def size_accepted(self, step: Step, proposed: float, cut: bool) -> float:
        return max(super().size_accepted(step, proposed, cut), self._shortest)


@functools.cache
def _by_step(tableau: SDETableau) -> SDETableau:
    """A tableau whose tolerances are for single steps, as torchsde's are, not for their sum."""
    return dataclasses.replace(tableau, per_root=False)


class GivenParts(Parts):
    """A stochastic solve along a given motion, with torchsde's control of adaptive steps.

    Args:
        path: returns the path of so many motions in all.
        carried: what is carried beside the state at the start (reversible methods), `(N,)`.
        levy: whether to take steps with Levy's area.
        shortest: adaptive steps are never shorter.
        reversing: whether gradients come from undoing the steps, whose states are not kept then.
    """

    def __init__(
        self,
        path: Callable[[int], Path],
        carried: Tensor | None,
        levy: bool,
        shortest: float,
        reversing: bool,
    ) -> None:
        self._path, self._carried, self._reversing = path, carried, reversing
        self._levy, self._shortest = levy, shortest
        # Of brackets graphs take much more than those of the fields that are measured.
        self.keeps = not levy

    @override
    def stepper(self, method: SDEMethod, fields: Fields) -> Stepper:
        spec = fields.spec
        own = SDEMethod.of(_by_step(method.tableau), 1.0, spec.dtype, spec.device)
        return LogODE(own, fields) if self._levy else Stepper(own, fields)

    @override
    def path(self, problem: SDEProblem, options: SolveOptions, size: int) -> Path:
        return self._path(size)

    @override
    def begin(self, stepper: Stepper, u0: Tensor) -> Tensor:
        return stepper.start(u0) if self._carried is None else torch.cat((u0, self._carried))

    @override
    def steps(self, start: Start) -> SDEMarch:
        return _Floored(start, self._shortest)

    @override
    def saver(
        self, record: Record, vector: Tensor, between: Between, times: Sequence[float]
    ) -> Saver:
        if not self._reversing:
            return super().saver(record, vector, between, times)
        saver = SparseSaver(record, vector, between, times)
        self._kept = saver.kept
        return saver

    @override
    def sweep(
        self,
        solve: SDESolve,
        prepared: DifferentiableFields,
        given: BackwardPass,
        kept: KeptPullback | None,
    ) -> Gradients:
        with in_torchsde_words():
            if not self._reversing:
                return super().sweep(solve, prepared, given, kept)
            stepper, path, stats = solve.stepper, solve.path, solve.stats
            return reversible_sweep(prepared, stepper, path, given, stats, self._kept)
