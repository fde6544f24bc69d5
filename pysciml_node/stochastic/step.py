"""One step of a stochastic Runge-Kutta method, for any tableau."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from pysciml_node.steps.norms import ErrorNorm
from pysciml_node.stochastic.fields import Fields, NoiseLayout
from pysciml_node.stochastic.virtual_tree import Increment
from pysciml_node.tableaus.stochastic import Integral, Row, Rows, SDETableau, Stage


class Motion(Protocol):
    """Brownian motion over a step: an `Increment`, or one of many members that are mapped over."""

    @property
    def h(self) -> Any:
        """Length: a number, or a 0-d tensor."""

    @property
    def w(self) -> Tensor:
        """Increment, `(M,)`."""

    @property
    def area(self) -> Tensor | None:
        """Space-time Levy area, `(M,)`."""


def integral(kind: Integral, motion: Motion) -> Tensor | float:
    """An iterated integral of Brownian motion over a step, as `tableaus.Integral` names them."""
    h, w = motion.h, motion.w
    if kind == "sqrt_h":
        root: Tensor | float = _root(h)
        return root
    if kind == "w":
        return w
    if kind == "i10":
        assert motion.area is not None
        return w / 2 + motion.area
    if kind == "i11":
        return w.square().sub_(h).mul_(1 / (2 * _root(_positive(h))))
    return w.square().sub_(3 * h).mul_(w).mul_(1 / (6 * _positive(h)))


def _positive(h: Any) -> Any:
    """A length to divide by: no time at all, at the start of a step, has integrals of zero."""
    if isinstance(h, Tensor):
        return h.clamp_min(torch.finfo(h.dtype).tiny)
    return max(h, torch.finfo(torch.float32).tiny)


def _root(h: Any) -> Any:
    return h.sqrt() if isinstance(h, Tensor) else math.sqrt(h)


Terms = tuple[tuple[int, tuple[tuple[Integral, float], ...]], ...]
"""For each stage whose diffusion is used: integrals with weights that are not zero."""


def _by_stage(rows: Rows) -> Terms:
    count = max((len(weights) for _, weights in rows), default=0)
    found = (
        (i, tuple((kind, row[i]) for kind, row in rows if i < len(row) and row[i]))
        for i in range(count)
    )
    return tuple((i, terms) for i, terms in found if terms)


class SDEMethod:
    """A tableau with its drift error weighed, and its diffusions' weights by stage."""

    _known: ClassVar[dict[tuple[int, float, torch.dtype, torch.device], SDEMethod]] = {}

    def __init__(
        self, tableau: SDETableau, delta: float, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.tableau, self.delta = tableau, delta
        self.error_drift = tuple(delta * w for w in tableau.error_drift)
        # What new tensors are to be like.
        self.like = torch.zeros((), dtype=dtype, device=device)
        self.drift_noise = tuple(_by_stage(s.noise) if s else () for s in tableau.drift)
        self.diffusion_noise = tuple(_by_stage(s.noise) if s else () for s in tableau.diffusion)
        self.noise, self.error_noise = _by_stage(tableau.beta), _by_stage(tableau.error_noise)
        self.for_step = _last_used(tableau, with_error=False)
        self.for_error = _last_used(tableau, with_error=True)

    @property
    def starts_at_start(self) -> bool:
        """Whether the first stages of drift and diffusion do not depend on the step's size."""
        first = self.tableau.diffusion[0]
        return first is not None and first.c == 0.0

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


def _add_drift(base: Tensor, weights: Row, h: Any, drifts: list[Tensor | None]) -> Tensor:
    """`base + h sum_i weights_i f_i`, the sum first: few roundings of the size of the base."""
    used = [(f, w) for w, f in zip(weights, drifts, strict=False) if w]
    if not used:
        return base
    total, first = used[0]
    assert total is not None
    for f, w in used[1:]:
        assert f is not None
        total = total + f if w == first else torch.add(total, f, alpha=w / first)
    if isinstance(h, Tensor):
        return torch.addcmul(base, total, h, value=first)
    return torch.add(base, total, alpha=h * first)


class _Noise:
    """What the diffusions of a step add to a state, by integrals that are formed once.

    Args:
        layout: how motions act on the state.
        motion: the motion over the step.
        taken: the evaluations so far.
    """

    def __init__(self, layout: NoiseLayout, motion: Motion, taken: Taken) -> None:
        self._layout, self._motion, self._taken = layout, motion, taken
        self._integrals: dict[Integral, Tensor | float] = {}
        self._products: dict[tuple[int, Integral], Tensor] = {}

    def add(self, base: Tensor, terms: Terms) -> Tensor:
        """`base + sum_i (sum_k weight_ik I_k) g_i`."""
        layout = self._layout
        for i, parts in terms:
            g = self._taken.g[i]
            assert g is not None
            if len(parts) > 1:
                base = layout.add(base, g, self._mixed(parts))
                continue
            ((kind, weight),) = parts
            if layout.matrix:
                base = torch.add(base, self._product(i, kind, g), alpha=weight)
            else:
                base = layout.add(base, g, self._integral(kind), weight)
        return base

    def _integral(self, kind: Integral) -> Tensor | float:
        known = self._integrals.get(kind)
        if known is None:
            known = self._integrals[kind] = integral(kind, self._motion)
        return known

    def _product(self, i: int, kind: Integral, g: Tensor) -> Tensor:
        known = self._products.get((i, kind))
        if known is None:
            known = self._products[i, kind] = self._layout.apply(g, self._integral(kind))
        return known

    def _mixed(self, parts: tuple[tuple[Integral, float], ...]) -> Tensor | float:
        """The weighted sum of integrals, which needs no gradients."""
        total: Tensor | float = 0.0
        numbers = 0.0
        for kind, weight in parts:
            one = self._integral(kind)
            if isinstance(one, float):
                numbers += weight * one
            elif isinstance(total, float):
                total = one * weight
            else:
                total = torch.add(total, one, alpha=weight)
        return total + numbers if numbers else total


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

    def first_argument(self, vector: Tensor) -> Tensor:
        """The state at which the first stages are evaluated, where that is at the start."""
        first = self.method.tableau.diffusion[0]
        if first is None or not self.method.tableau.carry:
            return self.state(vector)
        share, carried = first.base
        return share * self.state(vector) + carried * vector[..., self.entries :]

    def begins_at_state(self, vector: Tensor) -> bool:
        """Whether the first stages are those of the state: a carried vector may be another one."""
        if not self.method.starts_at_start:
            return False
        carry = self.method.tableau.carry
        return not carry or torch.equal(self.first_argument(vector), self.state(vector))

    def take(
        self,
        t: float | Tensor,
        vector: Tensor,
        motion: Motion,
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
        taken = Taken()
        noise = _Noise(self.fields.layout, motion, taken)
        # Split once: each part of a recorded vector is a node of its own.
        parts = vector.chunk(2) if tableau.carry else (vector,)
        times: dict[float, Tensor] = {}
        last: Tensor | None = None
        for i in range(max(drifts, diffusions)):
            argument: Tensor | None = None
            f: Tensor | None = None
            g: Tensor | None = None
            stage, other = tableau.drift[i], tableau.diffusion[i]
            if stage is not None and i < drifts:
                argument = self._argument(stage, h, parts, noise, method.drift_noise[i], taken)
                if first is not None and i == 0:
                    f = first[0]
                else:
                    f = self.fields.drift(self._time(times, t, stage.c * h), argument)
            if other is not None and i < diffusions:
                if first is not None and i == 0:
                    g = first[1]
                else:
                    at = argument
                    if at is None or stage != other:
                        terms = method.diffusion_noise[i]
                        at = self._argument(other, h, parts, noise, terms, taken)
                    g = self.fields.diffusion(self._time(times, t, other.c * h), at)
            taken.f.append(f)
            taken.g.append(g)
            taken.arguments.append(argument)
            last = argument
        end = _add_drift(parts[0], tableau.alpha, h, taken.f)
        end = noise.add(end, method.noise)
        if tableau.carry:
            assert last is not None
            end = torch.cat((end, last))
        return end, taken

    def inside(self, t: float, vector: Tensor, motion: Motion) -> Tensor:
        """The vector inside of the step that was taken last, by a shorter one from its start."""
        return vector if motion.h <= 0 else self.take(t, vector, motion)[0]

    def leave(self) -> None:
        """Called behind an accepted step."""

    def _time(self, known: dict[float, Tensor], t: float | Tensor, ahead: Any) -> Tensor:
        """The time `t + ahead`, one tensor for all evaluations there."""
        if isinstance(t, Tensor):
            moved: Tensor = t + ahead
            return moved
        time = known.get(ahead)
        if time is None:
            time = known[ahead] = self.method.like.new_full((), t + ahead)
        return time

    def _argument(
        self,
        stage: Stage,
        h: Any,
        parts: tuple[Tensor, ...],
        noise: _Noise,
        terms: Terms,
        taken: Taken,
    ) -> Tensor:
        share, carried = stage.base
        if share == 0.0:
            argument = parts[1] * carried if carried != 1.0 else parts[1]
        elif carried:
            argument = torch.add(parts[1] * carried, parts[0], alpha=share)
        else:
            argument = parts[0]
        return noise.add(_add_drift(argument, stage.a, h, taken.f), terms)

    def error(
        self, taken: Taken, start: Tensor, end: Tensor, motion: Increment, norm: ErrorNorm
    ) -> Tensor:
        """Scaled root-mean-square error estimate of a step taken `with_error`; 0-d."""
        vector = self.error_vector(taken, start, motion)
        raw = norm.raw(vector, norm.scale(self.state(start), self.state(end)))
        # Between two stops that the path does not tell apart there is no time, and no error.
        per_root = self.method.tableau.per_root and motion.h > 0
        return norm.complete(raw, math.sqrt(self.span / motion.h) if per_root else 1.0)

    def error_vector(self, taken: Taken, start: Tensor, motion: Motion) -> Tensor:
        """The error estimate of a step taken `with_error`, `(N,)`."""
        vector = torch.zeros_like(self.state(start))
        vector = _add_drift(vector, self.method.error_drift, motion.h, taken.f)
        noise = _Noise(self.fields.layout, motion, taken)
        return noise.add(vector, self.method.error_noise)

    def stiffness(self, taken: Taken) -> Tensor:
        """`|f_i - f_j| / |x_i - x_j|` for two stages of one node; NaN without such a pair."""
        pair = self.method.tableau.stiffness_stages
        if pair is None:
            return torch.full_like(self.method.like, math.nan)
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
    time, ahead = method.like.new_full((), t + h0), torch.add(u, f, alpha=h0)
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
