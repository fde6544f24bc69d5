"""Solvers that are classes: torchdiffeq's interface for fixed steps, and what runs on it.

`odeint` runs its Runge-Kutta methods on this package's engine. This loop is for the methods whose
step is a function of more than its start (Adams), and for subclasses of one's own.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pysciml_node.errors import PsnWarning

Field = Callable[..., Tensor]
Interpolate = Callable[[Tensor], Tensor]
# Of a step: its ends, the state and its derivative at the first, the state at the second.
Walked = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
# Steps of a solve that waits for an event.
_MAX_STEPS = 100_000


class FixedGridODESolver(ABC):
    """Steps from each time of a grid to the next; a subclass says what a step is.

    Args:
        func: the field in normal form, `func(t, y, perturb=Perturb.NONE)`.
        y0: the initial state.
        step_size: size of the steps; default one from each time to the next.
        grid_constructor: makes the grid, `grid_constructor(func, y0, t)`.
        interp: `"linear"` or `"cubic"`, between the times of the grid.
        perturb: call `func` just inside each step instead of at its ends.
        atol: tolerance for the times of events.
        unused: other options, of which a warning tells.
    """

    order: int

    def __init__(
        self,
        func: Field,
        y0: Tensor,
        step_size: float | None = None,
        grid_constructor: Callable[..., Tensor] | None = None,
        interp: str = "linear",
        perturb: bool = False,
        *,
        atol: Any = 1e-9,
        rtol: Any = None,
        norm: Any = None,
        **unused: Any,
    ) -> None:
        if unused:
            warnings.warn(
                f"{type(self).__name__}: Unexpected arguments {', '.join(unused)}.", PsnWarning, 3
            )
        if interp not in ("linear", "cubic"):
            raise ValueError(
                f'options["interp"] must be linear or cubic, but is {interp!r}.\n'
                "  Leave it out for linear."
            )
        if step_size is not None and grid_constructor is not None:
            raise ValueError(
                "step_size and grid_constructor were both given.\n"
                "  Give one: a grid of equal steps needs no constructor."
            )
        self.func, self.y0, self.atol = func, y0, atol
        self.dtype, self.device = y0.dtype, y0.device
        self.step_size, self.interp, self.perturb = step_size, interp, perturb
        self.grid_constructor = grid_constructor or self._usual_grid

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """The callbacks that are called."""
        return {"callback_step"}

    @abstractmethod
    def _step_func(
        self, func: Field, t0: Tensor, dt: Tensor, t1: Tensor, y0: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The change of the state over a step, and the derivative at its start."""

    def _usual_grid(self, func: Field, y0: Tensor, t: Tensor) -> Tensor:
        if self.step_size is None:
            return t
        length = float((t[-1] - t[0]).detach())
        count = max(1, math.ceil(length / abs(float(self.step_size)) - 1e-8))
        steps = torch.arange(count, dtype=t.dtype, device=t.device) * abs(float(self.step_size))
        return torch.cat((t[0] + steps, t[-1:]))

    def integrate(self, t: Tensor) -> Tensor:
        """The states at increasing times, `(T, *y0.shape)`."""
        grid = self.grid_constructor(self.func, self.y0, t)
        ends, given = ((x[0].item(), x[-1].item()) for x in (t, grid))
        if given != ends:
            raise ValueError(
                f"grid_constructor must return times from {ends[0]} to {ends[1]}, but those it "
                f"returned go from {given[0]} to {given[1]}.\n"
                "  Begin with t[0] and end with t[-1]."
            )
        times, states = t.tolist(), [self.y0]
        # Times at the end of a step move within it, where that end is not made of them.
        moving = t.requires_grad and grid is not t
        for t0, t1, y, f0, y1 in self._walk(grid):
            passed, end = len(states), float(t1.detach())
            while passed < len(times) and times[passed] <= end:
                passed += 1
            if passed == len(states):
                continue
            if times[passed - 1] == end and passed == len(states) + 1 and not moving:
                states.append(y1)
                continue
            between = self._interpolant(t0, y, f0, t1, y1)
            states.extend(between(t[i]) for i in range(len(states), passed))
        return torch.stack(states)

    def _walk(self, grid: Tensor) -> Iterator[Walked]:
        """The steps on a grid."""
        y = self.y0
        for t0, t1 in itertools.pairwise(grid.unbind()):
            y1, f0 = self._step(t0, t1, y)
            yield t0, t1, y, f0, y1
            y = y1

    def integrate_until_event(
        self, t0: Tensor, event_fn: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The time at which `event_fn` changes sign, and the states at `t0` and there."""
        if self.step_size is None:
            raise ValueError(
                "a fixed-step method with event_fn needs a step size.\n"
                '  Give options["step_size"], for example 0.01.'
            )
        size, begin, y = abs(float(self.step_size)), t0.double(), self.y0
        start = begin
        with torch.no_grad():
            sign = torch.sign(event_fn(start, y))
        if sign == 0:
            return start, torch.stack((y, y))
        for n in range(1, _MAX_STEPS + 1):
            end = begin + n * size
            y1, f0 = self._step(start, end, y)
            with torch.no_grad():
                crossed = bool(torch.sign(event_fn(end, y1)) != sign)
            if crossed:
                between = self._interpolant(start, y, f0, end, y1)
                time = _bisect(between, event_fn, sign, start, end)
                return time, torch.stack((self.y0, between(time)))
            start, y = end, y1
        raise RuntimeError(
            f"event_fn did not change sign within {_MAX_STEPS} steps of {self.step_size}.\n"
            "  Check its sign at the start and the direction of time; or take larger steps."
        )

    def _step(self, t0: Tensor, t1: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        dt = t1 - t0
        self._tell(t0, y, dt)
        change, f0 = self._step_func(self.func, t0, dt, t1, y)
        return (y + change).to(y.dtype), f0

    def _tell(self, t0: Tensor, y: Tensor, dt: Tensor) -> None:
        """Call the field's callback, where it has one."""
        told = getattr(self.func, "callback_step", None)
        if told is not None:
            told(t0, y, dt)

    def _interpolant(
        self, t0: Tensor, y0: Tensor, f0: Tensor, t1: Tensor, y1: Tensor
    ) -> Interpolate:
        """The state inside a step as a function of time."""
        dt = t1 - t0
        f1 = self.func(t1, y1) if self.interp == "cubic" else None

        def between(t: Tensor) -> Tensor:
            if t.item() == t1.item():
                if not t.requires_grad:
                    return y1
                slope = (y1 - y0) / dt.to(y0.dtype) if f1 is None else f1
                return y1 + (t - t1).to(y0.dtype) * slope
            x = ((t - t0) / dt).to(y0.dtype)
            if f1 is None:
                return y0 + x * (y1 - y0)
            rise = x * x * (3 - 2 * x)
            slopes = x * (1 - x) * ((1 - x) * f0 - x * f1)
            return y0 + rise * (y1 - y0) + dt.to(y0.dtype) * slopes

        return between


@torch.no_grad()
def _bisect(
    between: Interpolate,
    event_fn: Callable[[Tensor, Tensor], Tensor],
    sign: Tensor,
    low: Tensor,
    high: Tensor,
) -> Tensor:
    """The time at which a condition changes sign, as near as floating point comes."""
    low, high = low.detach(), high.detach()
    while True:
        middle = (low + high) / 2
        if not low < middle < high:
            return high
        if torch.sign(event_fn(middle, between(middle))) == sign:
            low = middle
        else:
            high = middle
