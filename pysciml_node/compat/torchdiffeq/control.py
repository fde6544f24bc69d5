"""Step size control as torchdiffeq has it: its norms, its smallest step, its callbacks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.controllers import FixedStep, IController, Norm, StepSizes
from pysciml_node.compat.torchdiffeq.states import Layout, mixed
from pysciml_node.errors import PsnWarning

CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
ADJOINT_CALLBACKS = tuple(f"{name}_adjoint" for name in CALLBACKS)


@dataclass(frozen=True)
class MixedNorm:
    """The largest root-mean-square of the parts of a tuple: torchdiffeq's usual norm of tuples."""

    layout: Layout

    def __call__(self, scaled: Tensor) -> Tensor:
        """The norm of a flat vector, of which parts at the end may be missing."""
        parts = list(torch.split(scaled, self._sizes(scaled.numel())))
        return torch.as_tensor(mixed(parts))

    def _sizes(self, count: int) -> list[int]:
        sizes: list[int] = []
        for size in self.layout.sizes:
            if count <= 0:
                break
            sizes.append(size)
            count -= size
        return sizes


@dataclass(frozen=True, eq=False)
class GivenNorm:
    """`options["norm"]`: a function of the state's structure."""

    norm: Callable[[Any], Any]
    layout: Layout

    def __call__(self, scaled: Tensor) -> Tensor:
        """The norm of a flat vector."""
        missing = sum(self.layout.sizes) - scaled.numel()
        if missing:
            scaled = torch.cat((scaled, scaled.new_zeros(missing)))
        size = torch.as_tensor(self.norm(self.layout.state(scaled))).abs()
        if size.numel() != 1:
            raise ValueError(
                f'options["norm"] must return one number, but returned {tuple(size.shape)}.\n'
                "  Reduce it, for example by .max()."
            )
        return size.reshape(())


@dataclass(frozen=True, eq=False)
class Callbacks:
    """The field's methods that are told of steps, with the arguments that they take there."""

    functions: dict[str, Callable[..., Any]]
    layout: Layout
    dtype: torch.dtype

    @classmethod
    def of(
        cls, func: Any, method: str, known: Iterable[str], layout: Layout, dtype: torch.dtype
    ) -> Callbacks | None:
        """Those of a field that a method calls; a warning names the others."""
        written = {name: getattr(func, name) for name in CALLBACKS if hasattr(func, name)}
        known = set(known)
        if unknown := sorted(set(written) - known):
            warnings.warn(
                f"Solver {method!r} does not support callbacks {', '.join(unknown)}.",
                PsnWarning,
                stacklevel=2,
            )
        functions = {name: function for name, function in written.items() if name in known}
        return cls(functions, layout, dtype) if functions else None

    def tell(self, name: str, t: float, u: Tensor, h: float) -> None:
        """Call one of them, where there is such a one."""
        function = self.functions.get(name)
        if function is not None:
            time, size = torch.tensor((t, abs(h)), dtype=self.dtype, device=u.device).unbind()
            function(time, self.layout.state(u), size)


class _Told(StepSizes):
    """Step sizes that tell of themselves, and are never below a limit."""

    def __init__(self, sizes: StepSizes, callbacks: Callbacks | None, smallest: float) -> None:
        self.sizes, self.callbacks, self.smallest = sizes, callbacks, smallest
        self._attempt: tuple[float, Tensor, float] | None = None

    @override
    def attempts(self, t: float, u: Tensor, h: float) -> None:
        self._attempt = (t, u, h)
        self._tell("callback_step")

    @override
    def accepts(self, h: float, error: float) -> bool:
        return error <= 1.0 or (abs(h) <= self.smallest and math.isfinite(error))

    @override
    def accepted(self, h: float, error: float) -> float:
        self._tell("callback_accept_step")
        return self._limited(self.sizes.accepted(h, error))

    @override
    def rejected(self, h: float, error: float) -> float:
        self._tell("callback_reject_step")
        if abs(h) <= self.smallest:
            # Not finite: a smaller step is not allowed.
            return math.nan
        return self._limited(self.sizes.rejected(h, error))

    def _limited(self, h: float) -> float:
        return math.copysign(max(abs(h), self.smallest), h)

    def _tell(self, name: str) -> None:
        if self.callbacks is not None and self._attempt is not None:
            self.callbacks.tell(name, *self._attempt)


@dataclass(frozen=True)
class Control(IController):
    """`IController` with what torchdiffeq's options ask for beyond it.

    Args:
        measure: the norm of scaled errors, or `None` for the root-mean-square.
        smallest: steps of this size are taken whatever their error is.
        callbacks: told of steps.
    """

    measure: MixedNorm | GivenNorm | None = None
    smallest: float = 0.0
    callbacks: Callbacks | None = None

    @property
    @override
    def norm(self) -> Norm | None:
        return self.measure

    @override
    def start(self, error_order: float) -> StepSizes:
        sizes = super().start(error_order)
        if self.callbacks is None and not self.smallest:
            return sizes
        return _Told(sizes, self.callbacks, self.smallest)


@dataclass(frozen=True)
class GridControl(FixedStep):
    """`FixedStep` whose steps are told of."""

    callbacks: Callbacks | None = None

    @override
    def start(self, error_order: float) -> StepSizes:
        return _Told(super().start(error_order), self.callbacks, 0.0)
