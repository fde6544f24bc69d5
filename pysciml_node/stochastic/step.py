"""One step of a stochastic Runge-Kutta method, for any tableau."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.stochastic.fields import Fields
from pysciml_node.stochastic.virtual_tree import Increment
from pysciml_node.tableaus.stochastic import Integral, Row, Rows, SDETableau, Stage


def integral(kind: Integral, motion: Increment) -> Tensor | float:
    """An iterated integral of Brownian motion over a step, as `tableaus.Integral` names them."""
    h, w = motion.h, motion.w
    if kind == "sqrt_h":
        return math.sqrt(h)
    if kind == "w":
        return w
    if kind == "i10":
        assert motion.area is not None
        return w / 2 + motion.area
    if kind == "i11":
        return (w.square() - h) / (2 * math.sqrt(h))
    return (w**3 - 3 * h * w) / (6 * h)


class SDEMethod:
    """A tableau with its drift error weighed, and its nodes as a tensor."""

    _known: ClassVar[dict[tuple[int, float, torch.dtype, torch.device], SDEMethod]] = {}

    def __init__(
        self, tableau: SDETableau, delta: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tableau = tableau
        self.error_drift = tuple(delta * w for w in tableau.error_drift)
        nodes = [0.0 if s is None else s.c for s in (*tableau.drift, *tableau.diffusion)]
        self.nodes = torch.tensor(nodes, dtype=torch.float64).to(device, dtype)
        stages = [s for s in (*tableau.drift, *tableau.diffusion) if s is not None]
        rows = [*tableau.beta, *tableau.error_noise, *(r for s in stages for r in s.noise)]
        self.kinds = tuple(dict.fromkeys(kind for kind, _ in rows))
        self.for_step = _last_used(tableau, with_error=False)
        self.for_error = _last_used(tableau, with_error=True)

    @property
    def needed(self) -> tuple[list[Stage | None], list[Stage | None]]:
        """The stages of drift and of diffusion that the step itself needs."""
        drifts, diffusions = self.for_step
        tableau = self.tableau
        return list(tableau.drift[:drifts]), list(tableau.diffusion[:diffusions])

    @classmethod
    def of(
        cls, tableau: SDETableau, delta: float, dtype: torch.dtype, device: torch.device
    ) -> SDEMethod:
        """The method, built once for each dtype and device."""
        key = (id(tableau), delta, dtype, device)
        if key not in cls._known:
            # These outlive the call, so they must not be tensors of inference mode.
            with torch.inference_mode(False):
                cls._known[key] = cls(tableau, delta, dtype, device)
        return cls._known[key]


def _last_used(tableau: SDETableau, with_error: bool) -> tuple[int, int]:
    """The numbers of drift and diffusion stages that the step (and its error estimate) needs."""
    drifts = [tableau.alpha, *([tableau.error_drift] if with_error else [])]
    noises = [row for _, row in (*tableau.beta, *(tableau.error_noise if with_error else ()))]
    # Later stages use earlier ones, never the other way round.
    return (_longest(drifts), _longest(noises))


def _longest(rows: list[Row]) -> int:
    return max((i + 1 for row in rows for i, w in enumerate(row) if w), default=0)


@dataclass
class Taken:
    """The evaluations of a step: drifts and diffusions by stage, and their arguments."""

    f: list[Tensor | None] = field(default_factory=list)
    g: list[Tensor | None] = field(default_factory=list)
    arguments: list[Tensor | None] = field(default_factory=list)


def _weighted(weights: Row, vectors: list[Tensor | None]) -> Tensor | None:
    """The weighted sum of vectors, `None` where all weights are zero."""
    total: Tensor | None = None
    for weight, vector in zip(weights, vectors, strict=False):
        if weight == 0.0:
            continue
        assert vector is not None
        if total is None:
            total = vector if weight == 1.0 else vector * weight
        else:
            total = torch.add(total, vector, alpha=weight)
    return total


class Stepper:
    """Takes steps of one method with one pair of fields.

    States are flat, `(N,)`. Where the method carries a vector they are `(2 N,)`: the state, then
    the carried vector.

    Args:
        method: the method.
        fields: drift and diffusion.
    """

    def __init__(self, method: SDEMethod, fields: Fields) -> None:
        self.method, self.fields = method, fields
        self.span = fields.problem.t1 - fields.problem.t0
        self.entries = fields.layout.entries

    def start(self, u0: Tensor) -> Tensor:
        """The vector that is stepped, for an initial state."""
        return torch.cat((u0, u0)) if self.method.tableau.carry else u0

    def state(self, vector: Tensor) -> Tensor:
        """The state in a vector that is stepped."""
        return vector[..., : self.entries] if self.method.tableau.carry else vector

    def take(
        self,
        t: float,
        vector: Tensor,
        motion: Increment,
        with_error: bool = False,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Taken]:
        """Step from `t` by `motion.h`.

        Args:
            t: start.
            vector: the state there, and the carried vector if there is one.
            motion: the Brownian motion over the step.
            with_error: evaluate the stages that only the error estimate needs, too.
            first: drift and diffusion of the first stage, where they are known.

        Returns:
            The vector at the end, and the evaluations.
        """
        method, tableau, h = self.method, self.method.tableau, motion.h
        drifts, diffusions = method.for_error if with_error else method.for_step
        times = (method.nodes * h + t).unbind()
        integrals = self._integrals(motion)
        taken = Taken()
        last: Tensor | None = None
        for i in range(max(drifts, diffusions)):
            known = first is not None and i == 0
            argument: Tensor | None = None
            f: Tensor | None = None
            g: Tensor | None = None
            stage, noise = tableau.drift[i], tableau.diffusion[i]
            if stage is not None and i < drifts:
                argument = self._argument(stage, h, vector, taken, integrals)
                f = first[0] if known and first else self.fields.drift(times[i], argument)
            if noise is not None and i < diffusions:
                shared = stage == noise and argument is not None
                at = argument if shared else self._argument(noise, h, vector, taken, integrals)
                assert at is not None
                time = times[tableau.stages + i]
                g = first[1] if known and first else self.fields.diffusion(time, at)
            taken.f.append(f)
            taken.g.append(g)
            taken.arguments.append(argument)
            last = argument
        end = self.state(vector)
        drift = _weighted(tableau.alpha, taken.f)
        if drift is not None:
            end = torch.add(end, drift, alpha=h)
        end = self._add_noise(end, tableau.beta, taken, integrals)
        if tableau.carry:
            assert last is not None
            end = torch.cat((end, last))
        return end, taken

    def _integrals(self, motion: Increment) -> dict[Integral, Tensor | float]:
        return {kind: integral(kind, motion) for kind in self.method.kinds}

    def _argument(
        self,
        stage: Stage,
        h: float,
        vector: Tensor,
        taken: Taken,
        integrals: dict[Integral, Tensor | float],
    ) -> Tensor:
        argument = self.state(vector)
        if self.method.tableau.carry:
            share, carried = stage.base
            argument = share * argument + carried * vector[self.entries :]
        drift = _weighted(stage.a, taken.f)
        if drift is not None:
            argument = torch.add(argument, drift, alpha=h)
        return self._add_noise(argument, stage.noise, taken, integrals)

    def _add_noise(
        self, base: Tensor, rows: Rows, taken: Taken, integrals: dict[Integral, Tensor | float]
    ) -> Tensor:
        for kind, weights in rows:
            mixed = _weighted(weights, taken.g)
            if mixed is not None:
                base = base + self.fields.layout.apply(mixed, integrals[kind])
        return base

    def error(
        self, taken: Taken, start: Tensor, end: Tensor, motion: Increment, norm: ErrorNorm
    ) -> Tensor:
        """Scaled root-mean-square error estimate of a step taken `with_error`; 0-d."""
        vector = torch.zeros_like(self.state(start))
        drift = _weighted(self.method.error_drift, taken.f)
        if drift is not None:
            vector = torch.add(vector, drift, alpha=motion.h)
        integrals = self._integrals(motion)
        vector = self._add_noise(vector, self.method.tableau.error_noise, taken, integrals)
        raw = norm.raw(vector, norm.scale(self.state(start), self.state(end)))
        per_root = self.method.tableau.per_root
        return norm.complete(raw, math.sqrt(self.span / motion.h) if per_root else 1.0)

    def stiffness(self, taken: Taken) -> Tensor:
        """`|f_i - f_j| / |x_i - x_j|` for two stages of one node; NaN without such a pair."""
        pair = self.method.tableau.stiffness_stages
        if pair is None:
            return torch.full_like(self.method.nodes[0], math.nan)
        (f, x), (f2, x2) = ((taken.f[i], taken.arguments[i]) for i in pair)
        assert f is not None
        assert f2 is not None
        assert x is not None
        assert x2 is not None
        bottom = torch.linalg.vector_norm(x - x2)
        ratio: Tensor = torch.linalg.vector_norm(f - f2) / (bottom + torch.finfo(f.dtype).eps)
        return ratio


def initial_step(
    fields: Fields,
    method: SDEMethod,
    norm: ErrorNorm,
    t: float,
    u: Tensor,
    first: tuple[Tensor, Tensor],
    span: float,
) -> float:
    """A first step size: Hairer's rule, with three standard deviations of the noise in the slope.

    Args:
        fields: drift and diffusion.
        method: its order sets the size.
        norm: measures errors.
        t: where the step starts.
        u: the state there.
        first: drift and diffusion there.
        span: length of what is left of the interval.

    Returns:
        A step, at most `span`. Costs one evaluation of both fields and two host reads.

    Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, section II.4;
    the three deviations are StochasticDiffEq.jl's.
    """
    f, g = first[0], 3 * fields.layout.magnitude(first[1])
    scale = norm.scale(u)
    d0, d1 = norm.read_all(scale, u, f.abs() + g)
    if not math.isfinite(d1):
        return math.nan
    h0 = 1e-6 if d0 < 1e-5 or d1 < 1e-5 else 0.01 * d0 / d1
    h0 = min(h0, span)
    time, ahead = method.nodes.new_tensor(t + h0), torch.add(u, f, alpha=h0)
    f1, g1 = fields.drift(time, ahead), 3 * fields.layout.magnitude(fields.diffusion(time, ahead))
    change = norm.raw((f1 - f).abs() + (g1 - g).abs(), scale)
    d2 = norm.read(change) / h0
    largest = max(d1, d2)
    if not math.isfinite(largest):
        return h0
    if largest <= 1e-15:
        h1 = max(1e-6, h0 * 1e-3)
    else:
        h1 = (0.01 / largest) ** (1 / (method.tableau.strong_order + 0.5))
    return min(100 * h0, h1, span)
