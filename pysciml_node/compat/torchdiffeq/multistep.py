"""The Adams methods, on any grid."""

from __future__ import annotations

import functools
import warnings
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.compat.torchdiffeq.explicit import runge_kutta_step, weighted
from pysciml_node.compat.torchdiffeq.grid import Field, FixedGridODESolver
from pysciml_node.compat.torchdiffeq.methods import FIXED
from pysciml_node.compat.torchdiffeq.normal import Perturb
from pysciml_node.errors import PsnWarning

# As in torchdiffeq: fewer values than this are not enough to begin with, and no more than that
# are used.
_FEWEST, _MOST_ORDER = 3, 12
# Times are taken for equally spaced where only rounding says otherwise.
_DIGITS, _DIGITS_SINGLE = 12, 4


def adams_weights(places: Tensor) -> Tensor:
    """`w` with `int_0^1 p(s) ds = sum_j w_j p(s_j)` for polynomials through these places.

    Args:
        places: where the derivative is known, `(k,)` in double precision, in units of the step
            from its start: `0` is the start, `1` the end, `-1` the step before.
    """
    count = len(places)
    each = torch.eye(count, dtype=torch.bool, device=places.device).unsqueeze(-1)
    # Row j becomes the coefficients of the product of s - s_i over all i but j.
    products = torch.zeros(count, count, dtype=places.dtype, device=places.device)
    products[:, 0] = 1.0
    for i, place in enumerate(places):
        shifted = torch.nn.functional.pad(products, (1, 0))[:, :-1]
        products = torch.where(each[i], products, shifted - place * products)
    integrals = products / torch.arange(1, count + 1, device=places.device)
    gaps = (places.unsqueeze(1) - places).masked_fill(each.squeeze(-1), 1.0)
    return integrals.sum(1) / gaps.prod(1)


@functools.lru_cache(maxsize=1024)
def _known_weights(places: tuple[float, ...]) -> tuple[float, ...]:
    return tuple(adams_weights(torch.tensor(places, dtype=torch.float64)).tolist())


class AdamsBashforthMoulton(FixedGridODESolver):
    """Adams methods whose order grows with the values at hand; the corrector is iterated.

    The weights are those of the grid as it is: also where its steps differ in size.

    Args:
        func: as in `FixedGridODESolver`.
        y0: as in `FixedGridODESolver`.
        rtol: the corrector has converged where its change is below `rtol |dy| + atol`.
        atol: likewise.
        implicit: whether there is a corrector.
        max_iters: its most iterations.
        max_order: the largest order, at most 12; below 4 the method is `rk4`.
        options: of `FixedGridODESolver`.

    Reference: Hairer, Norsett and Wanner, Solving Ordinary Differential Equations I, III.1.
    """

    order = 4

    def __init__(
        self,
        func: Field,
        y0: Tensor,
        rtol: Any = 1e-3,
        atol: Any = 1e-4,
        implicit: bool = True,
        max_iters: int = 4,
        max_order: int = _MOST_ORDER,
        **options: Any,
    ) -> None:
        super().__init__(func, y0, rtol=rtol, atol=atol, **options)
        if max_order > _MOST_ORDER:
            raise ValueError(
                f'options["max_order"] must be at most {_MOST_ORDER}, but is {max_order}.\n'
                f"  Leave it out for {_MOST_ORDER}."
            )
        if max_order <= _FEWEST:
            warnings.warn(f"max_order is {max_order}: the method is `rk4`.", PsnWarning, 3)
        self.rtol, self.implicit, self.max_iters = rtol, implicit, max_iters
        self.max_order = int(max_order)
        # The derivatives at the starts of the last steps, the newest first.
        self._past: deque[tuple[Tensor, Tensor]] = deque(maxlen=max(1, self.max_order - 1))

    @override
    def _step_func(
        self, func: Field, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        f0 = func(t0, y0, perturb=Perturb.NEXT if self.perturb else Perturb.NONE)
        self._past.appendleft((t0, f0))
        if len(self._past) < _FEWEST:
            tableau = FIXED["rk4"].tableau  # type: ignore[attr-defined]
            return runge_kutta_step(tableau, func, t0, dt, t1, y0, f0=f0, perturb=self.perturb)
        values = [value for _, value in self._past]
        change = dt * _combined(self._weights(t0, dt), values)
        if self.implicit:
            newest, *weights = self._weights(t0, dt, 1.0)
            known = dt * _combined(weights, values)
            change = self._corrected(func, t1, y0, change, known, dt * newest)
        return change.to(y0.dtype), f0

    def _weights(self, t0: Tensor, dt: Tensor, *others: float) -> Sequence[float | Tensor]:
        """Those of other places in the step, and of the starts of the last ones."""
        times = [time for time, _ in self._past]
        if dt.requires_grad:
            # The weights move with the grid.
            places = torch.stack([*map(dt.new_tensor, others), *((t - t0) / dt for t in times)])
            return adams_weights(places.double()).to(dt).unbind()
        start, size = t0.item(), dt.item()
        digits = _DIGITS if dt.dtype == torch.float64 else _DIGITS_SINGLE
        inner = (round((time.item() - start) / size, digits) for time in times)
        return _known_weights((*others, *inner))

    def _corrected(
        self,
        func: Field,
        t1: Tensor,
        y0: Tensor,
        change: Tensor,
        known: Tensor,
        size: Tensor,
    ) -> Tensor:
        """The change `d` that the corrector settles on, `d = known + size f(t1, y0 + d)`."""
        side = Perturb.PREV if self.perturb else Perturb.NONE
        for _ in range(self.max_iters):
            before = change
            change = known + size * func(t1, y0 + before, perturb=side)
            largest = torch.maximum(before.detach().abs(), change.detach().abs())
            scale = self.atol + self.rtol * largest
            if bool(((change - before).detach().abs() <= scale).all()):
                return change
        warnings.warn(
            f"the corrector has not converged in {self.max_iters} iterations at "
            f"t={t1.item():.6g}: the solution may be wrong.\n"
            '  Take smaller steps, or a larger options["max_iters"].',
            PsnWarning,
            stacklevel=2,
        )
        # A lower order is more stable.
        self._past.pop()
        return change


def _combined(weights: Sequence[float | Tensor], values: Sequence[Tensor]) -> Tensor:
    """The weighted sum; of weights with gradients, too."""
    if isinstance(weights[0], Tensor):
        terms = [w * x for w, x in zip(weights, values, strict=True)]
        return functools.reduce(torch.add, terms)
    return weighted([float(w) for w in weights], values)


class AdamsBashforth(AdamsBashforthMoulton):
    """The Adams methods without their corrector."""

    def __init__(self, func: Field, y0: Tensor, **options: Any) -> None:
        super().__init__(func, y0, implicit=False, **options)
