"""What enters and leaves a backward sweep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from pysciml_node.steps.memory import later_steps
from pysciml_node.steps.record import Record


@dataclass(slots=True)
class BackwardPass:
    """A solve that has run, and the cotangents that arrive at it; `None` stands for zero."""

    record: Record  # the n accepted steps
    # (N,) each, n + 1 of them, at `record.times`; of reversible steps the first and the last.
    states: tuple[Tensor, ...]
    saved: Tensor | None  # (saved, N), cotangents of the saved states
    at_steps: Sequence[Tensor | None]  # (N,) each, n + 1 of them, cotangents of `states`
    with_times: bool  # whether `t0`, `t1` and `saveat` need gradients
    # Whether what it returns goes on through graphs that were kept, and not to the inputs alone.
    goes_on: bool = False

    def flat(self) -> BackwardPass:
        """The same, of states and cotangents that may have another shape."""
        states = tuple(x.reshape(-1) for x in self.states)
        at_steps = [None if x is None else x.reshape(-1) for x in self.at_steps]
        return replace(self, states=states, at_steps=at_steps)

    @property
    def saved_count(self) -> int:
        """How many saved states have cotangents."""
        return 0 if self.saved is None else self.saved.shape[0]

    def later_starts(self) -> Iterator[tuple[float, Tensor]]:
        """Times and states, `(N,)`, at which some steps begin, but for the first.

        Of steps that are undone on the way back no states are kept: then it is the end.
        """
        times, states = self.record.times, self.states
        if len(states) < len(times):
            yield times[-1], states[-1]
            return
        for n in later_steps(len(self.record.sizes)):
            yield times[n], states[n]

    def entering(self, n: int) -> list[Tensor]:
        """The cotangents that enter at `record.times[n]`, `(N,)` each."""
        entering = []
        direct = self.at_steps[n]
        if direct is not None:
            entering.append(direct)
        indices = self.record.at_end.get(n)
        if indices and self.saved is not None:
            rows = self._rows(indices)
            entering.append(rows[0] if len(indices) == 1 else rows.sum(0))
        return entering

    def inside(self, n: int) -> Tensor | None:
        """The cotangents of the states saved inside step `n`, `(m, N)`."""
        if self.saved is None or n not in self.record.inside:
            return None
        return self._rows(self.record.inside[n][0])

    def _rows(self, indices: list[int]) -> Tensor:
        """Cotangents of some of the saved states, mostly of neighbours."""
        assert self.saved is not None
        first, last = indices[0], indices[-1] + 1
        return self.saved[first:last] if last - first == len(indices) else self.saved[indices]

    def saved_inside(self, n: int) -> Iterator[tuple[float, Tensor]]:
        """The times saved inside step `n`, and the cotangents of the states there, `(N,)` each."""
        if self.saved is not None and n in self.record.inside:
            for i, t in zip(*self.record.inside[n], strict=True):
                yield t, self.saved[i]


@dataclass(kw_only=True, slots=True)
class Gradients:
    """What a backward sweep returns; `None` stands for zero."""

    u0: Tensor | None  # (N,)
    inputs: list[Tensor | None]  # each of its input's shape
    kept: list[Tensor | None] = field(default_factory=list)  # (N,) each, of values with a graph
    t0: Tensor | None = None  # ()
    t1: Tensor | None = None  # ()
    saveat: Tensor | None = None  # (saved,)


class StepBack(NamedTuple):
    """An accepted step to be pulled back, and the cotangents that arrive at it."""

    t: float  # its start
    h: float  # its size
    u: Tensor  # (N,), the state at its start
    u1: Tensor  # (N,), the state at its end, as the solve found it
    end: Tensor  # (N,), cotangent of the state at its end
    inside: Tensor | None  # (m, N), cotangents of its dense outputs
    theta: Tensor  # (m,) in float64, where these lie
    joined: bool = False  # whether the step before evaluates the field where this one starts, too


class StepCotangents(NamedTuple):
    """What a step pulls back."""

    u: Tensor  # (N,), of the state at its start
    t: Tensor | None = None  # (), of its start
    h: Tensor | None = None  # (), of its size
    theta: Tensor | None = None  # (m,), of the places of its dense outputs


class TimeCotangents:
    """Cotangents of the ends of the interval and of saved times, from those of single steps.

    The steps are taken backward. One that ends on no stop moves with its start; where the end is
    fixed, the start changes the size.

    Args:
        record: the accepted steps.
        saved: number of saved times.
        zero: a 0-d tensor of the times' dtype.

    Attributes:
        start: cotangent of the time at which the last step given starts.
        end: cotangent of `t1`.
        saveat: cotangents of the saved times inside steps, `(saved,)`.
    """

    def __init__(self, record: Record, saved: int, zero: Tensor) -> None:
        self.record = record
        self.start, self.end = zero, zero
        self.saveat = zero.new_zeros(saved)

    def step(
        self, n: int, t_bar: Tensor | None, h_bar: Tensor | None, theta_bar: Tensor | None
    ) -> None:
        """Take in step `n`: cotangents of its start and size, and of its dense outputs' places."""
        h = self.record.sizes[n]
        t = torch.zeros_like(self.start) if t_bar is None else t_bar
        size = torch.zeros_like(self.start) if h_bar is None else h_bar
        if theta_bar is not None:
            # theta = (s - t) / h, and a recorded step has it in float64
            theta_bar = theta_bar.to(self.saveat)
            theta = torch.tensor(self.record.fractions(n), dtype=torch.float64).to(theta_bar)
            self.saveat[self.record.inside[n][0]] = theta_bar / h
            t = t - theta_bar.sum() / h
            size = size - (theta_bar * theta).sum() / h
        if self.record.stops[n] is None:
            self.start = self.start + t
            return
        if self.record.stops[n] == self.record.t1_stop:
            self.end = self.start + size
        self.start = t - size

    def put_into(self, gradients: Gradients) -> None:
        """Complete the gradients of a sweep, all steps having been taken in."""
        gradients.t0, gradients.t1 = self.start, self.end
        if len(self.saveat):
            gradients.saveat = self.saveat
