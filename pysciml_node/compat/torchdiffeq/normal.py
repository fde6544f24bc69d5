"""A call in normal form: a flat state, increasing times, a field that can be nudged.

Solvers that are classes with torchdiffeq's interface are given this; its own solvers are, too.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from pysciml_node.compat.torchdiffeq.control import (
    ADJOINT_CALLBACKS,
    CALLBACKS,
    GivenNorm,
    MixedNorm,
)
from pysciml_node.compat.torchdiffeq.states import Fitted, Layout, promoted, rms
from pysciml_node.errors import PsnWarning


class Perturb(Enum):
    """From which side of a time the field is looked at."""

    NONE = 0
    PREV = 1
    NEXT = 2


class NormalField:
    """The field in normal form, `field(t, y, perturb=Perturb.NONE)`, with its callbacks.

    Args:
        func: the field as it was given.
        y0: its state, brought to one dtype.
        layout: how the state lies in a flat vector; `None` where it stays as it is.
        sign: `-1.0` where time runs backward.
    """

    callback_step: Callable[..., None]
    callback_accept_step: Callable[..., None]
    callback_reject_step: Callable[..., None]

    def __init__(
        self, func: Callable[..., Any], y0: Any, layout: Layout | None, sign: float
    ) -> None:
        self.base_func, self.layout, self.sign = func, layout, sign
        self._fitted = Fitted(func, y0)
        self.real = (y0 if layout is None else y0[0]).dtype.to_real()
        for name in CALLBACKS:
            callback = getattr(func, name, None)
            setattr(self, name, _silent if callback is None else self._shaped(callback))
        for name in ADJOINT_CALLBACKS:
            if hasattr(func, name):
                setattr(self, name, getattr(func, name))

    def _shaped(self, callback: Callable[..., Any]) -> Callable[..., None]:
        def told(t: Any, y: Tensor, dt: Any) -> None:
            callback(self.sign * t, self.state(y), dt)

        return told

    def state(self, y: Tensor) -> Any:
        """The state as the field takes it."""
        return y if self.layout is None else self.layout.state(y)

    def __call__(self, t: Tensor, y: Tensor, *, perturb: Perturb = Perturb.NONE) -> Tensor:
        """Evaluate the derivative."""
        time = t if t.dtype == self.real else t.real.to(self.real)
        if perturb is not Perturb.NONE:
            side = 1.0 if perturb is Perturb.NEXT else -1.0
            beside = torch.nextafter(time.detach(), time.detach() + side)
            time = time + (beside - time.detach())
        state = self.state(y)
        if self.sign < 0:
            time = -time
        out = self._fitted(time, state)
        if self.layout is not None:
            out = self.layout.flat(out)
        result: Tensor = -out if self.sign < 0 else out
        return result


def _silent(*arguments: Any) -> None:
    """The callback of a field that has none."""


@dataclass(frozen=True)
class Normal:
    """A call in normal form.

    Attributes:
        layout: of a tuple state, else `None`.
        func: the field.
        y0: the initial state; flat where it was a tuple.
        t: increasing times.
        rtol: relative tolerance, flat where it was given by parts.
        atol: absolute tolerance, likewise.
        options: with `norm` a function of `y0`'s like.
        event_fn: positive at the start, a function of `y0`'s like and increasing time.
        reversed: whether time runs backward.
    """

    layout: Layout | None
    func: NormalField
    y0: Tensor
    t: Tensor
    rtol: Any
    atol: Any
    options: dict[str, Any]
    event_fn: Callable[[Tensor, Tensor], Tensor] | None
    reversed: bool


def normalize(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    rtol: Any,
    atol: Any,
    options: Mapping[str, Any] | None,
    event_fn: Callable[..., Tensor] | None,
) -> Normal:
    """Bring a call, whose arguments are known to be sound, into normal form."""
    y0 = promoted(y0)
    layout = None if isinstance(y0, Tensor) else Layout.of(y0)
    backward = len(t) > 1 and bool(t[0] > t[1])
    sign = -1.0 if backward else 1.0
    field = NormalField(func, y0, layout, sign)
    start = y0 if layout is None else layout.flat(y0)
    given = dict(options or {})
    norm = given.get("norm")
    if layout is None:
        given["norm"] = rms if norm is None else norm
    else:
        given["norm"] = MixedNorm(layout) if norm is None else GivenNorm(norm, layout)
    if backward:
        _turn(given)
    positive = None
    if event_fn is not None:
        positive = _positive(event_fn, field, sign, t[0], y0)
    if t.device != start.device:
        warnings.warn("t is not on the device of y0, and is moved there.", PsnWarning, 3)
        t = t.to(start.device)
    return Normal(
        layout=layout,
        func=field,
        y0=start,
        t=-t if backward else t,
        rtol=_by_entry(rtol, layout, start),
        atol=_by_entry(atol, layout, start),
        options=given,
        event_fn=positive,
        reversed=backward,
    )


def _turn(options: dict[str, Any]) -> None:
    """Options in terms of negated time."""
    for key in ("step_t", "jump_t"):
        if isinstance(options.get(key), Tensor):
            options[key] = -options[key]
    build = options.get("grid_constructor")
    if build is not None:
        options["grid_constructor"] = lambda func, y0, t: -build(func, y0, -t)


def _positive(
    event_fn: Callable[..., Tensor], field: NormalField, sign: float, t0: Tensor, y0: Any
) -> Callable[[Tensor, Tensor], Tensor]:
    """One condition that is positive at the start: the smallest of the event function's."""
    with torch.no_grad():
        signs = torch.sign(event_fn(t0, y0))

    def condition(t: Tensor, y: Tensor) -> Tensor:
        return torch.min(event_fn(sign * t, field.state(y)) * signs)

    return condition


def _by_entry(tolerance: Any, layout: Layout | None, like: Tensor) -> Any:
    """A tolerance that is a number, or has an entry for each of the state's."""
    if layout is None or isinstance(tolerance, int | float):
        return tolerance
    if isinstance(tolerance, Tensor) and tolerance.ndim == 0:
        return tolerance
    parts = [
        torch.as_tensor(part, device=like.device, dtype=like.dtype.to_real()).expand(shape)
        for part, shape in zip(tolerance, layout.shapes, strict=True)
    ]
    return layout.flat(tuple(parts))
