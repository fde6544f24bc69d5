"""What enters and leaves a backward sweep."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pysciml_node.steps.record import Record


@dataclass
class Cotangents:
    """Gradients that arrive at, or leave, a solve.

    `None` stands for zero.
    """

    saved: Tensor | None
    states: list[Tensor | None]


@dataclass
class Gradients:
    """What a backward sweep returns."""

    u0: Tensor
    t0: Tensor | None
    t1: Tensor | None
    saveat: Tensor | None
    inputs: list[Tensor | None]


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
            # theta = (s - t) / h
            indices, places = self.record.inside[n]
            theta = torch.tensor(places, dtype=torch.float64).to(theta_bar)
            self.saveat[indices] = theta_bar / h
            t = t - theta_bar.sum() / h
            size = size - (theta_bar * theta).sum() / h
        if self.record.stops[n] is None:
            self.start = self.start + t
            return
        if self.record.stops[n] == self.record.t1_stop:
            self.end = self.start + size
        self.start = t - size


def arriving_at(state: int, record: Record, arriving: Cotangents) -> list[Tensor]:
    """Cotangents that enter at one of the record's times."""
    found = []
    direct = arriving.states[state]
    if direct is not None:
        found.append(direct)
    indices = record.at_end.get(state)
    if indices and arriving.saved is not None:
        found.append(arriving.saved[indices].sum(0))
    return found
