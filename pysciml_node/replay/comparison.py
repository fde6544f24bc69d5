"""The comparison of replayed steps with those of the solve."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pysciml_node.steps.inputs import changed_message
from pysciml_node.steps.surroundings import Surroundings


class Comparison:
    """The largest difference between replayed steps and those of the solve.

    It stays on the states' device, and is read once. The bound is the square root of the precision,
    relative to each entry; see `entry_sizes`. Kernels may round differently with gradients; a field
    that has changed differs by more.

    Args:
        precision: what states are compared in, where the solve's was less than theirs.
    """

    def __init__(self, precision: torch.dtype | None = None) -> None:
        self._precision = precision
        self._relative: list[Tensor] = []

    def add(
        self,
        again: Tensor,
        recorded: Tensor,
        start: Tensor,
        missing: float = 0.0,
        late: float | Tensor | None = None,
    ) -> None:
        """Compare the end of a replayed step with the solve's.

        Args:
            again: the state at its end, replayed.
            recorded: the state at its end in the solve.
            start: the state at its start.
            missing: as of `entry_sizes`.
            late: how many of its sizes a step is from time zero, a number or `(..., 1)`, where its
                times were as precise as states are; they have lost as much of their precision.
        """
        if self._precision is not None:
            again, recorded, start = (x.to(self._precision) for x in (again, recorded, start))
        if _at_hand(again) and torch.equal(again, recorded):
            return  # as most are, to the last bit
        sizes = entry_sizes(recorded, start, missing)
        if late is not None:
            sizes = sizes * torch.as_tensor(late).to(sizes).clamp_min(1).sqrt()
        self._relative.append(((again - recorded).abs() / sizes).amax())

    def add_value(self, again: Tensor, first: Tensor) -> None:
        """Compare what is no state, relative to itself.

        Args:
            again: its value now.
            first: that in the solve.
        """
        self.add(again, first, first)

    def expect_equal(self, suspects: Sequence[str]) -> None:
        """Read the comparison.

        Args:
            suspects: names of constants that are known to have been changed in place.

        Raises:
            RuntimeError: a step was not reproduced.
        """
        if self._relative:
            worst = torch.nan_to_num(torch.stack(self._relative), nan=0.0).max()
            expect_reproduced(worst, suspects)


def _at_hand(x: Tensor) -> bool:
    """Whether the host need not wait for what is asked of a tensor."""
    return x.device.type == "cpu"


@contextmanager
def as_solved(
    surroundings: Surroundings, precision: torch.dtype | None = None
) -> Iterator[Comparison]:
    """Everything that a solve could reach, as it saw it.

    Torch does not count every change: none by `.data`, or by memory that something else shares. So
    this yields a comparison for the steps that are taken there, which is read in the end.

    Args:
        surroundings: of the solve.
        precision: as of `Comparison`.

    Raises:
        RuntimeError: they do not come out as they did.
    """
    comparison = Comparison(precision)
    names = [surroundings.names[id(x)] for x in surroundings.changed_in_place()]
    with surroundings.as_seen():
        yield comparison
    comparison.expect_equal(names)


def expect_reproduced(worst: Tensor, suspects: Sequence[str]) -> None:
    """Look at the largest relative difference between replayed steps and those of the solve.

    Args:
        worst: the difference, a 0-d tensor.
        suspects: as of `Comparison.expect_equal`.

    Raises:
        RuntimeError: it is more than rounding.
    """
    gap = worst.item()
    if gap <= rounding(worst.dtype):
        return
    if suspects:
        raise RuntimeError(changed_message(suspects[0]))
    raise RuntimeError(
        f"a replay could not reproduce the solve: its steps end up to {gap:.2g} (relative) from "
        "where they ended before, so the field has changed since, draws random numbers, or "
        "remembers earlier calls.\n"
        "  Go backward, and ask for dense output and estimates, before anything it uses is "
        "changed, make it a function of its arguments, or for gradients use "
        "adjoint=DirectAdjoint()."
    )


def expect_same(again: Sequence[Tensor], first: Sequence[Tensor], suspects: Sequence[str]) -> None:
    """Compare the field at the start with its first evaluation, where no step is replayed.

    Args:
        again: its values now.
        first: those when the solve began.
        suspects: as of `Comparison.expect_equal`.

    Raises:
        RuntimeError: the field has changed.
    """
    comparison = Comparison()
    for now, then in zip(again, first, strict=True):
        comparison.add_value(now.detach(), then)
    comparison.expect_equal(suspects)


def coarser(first: torch.dtype, second: torch.dtype) -> torch.dtype:
    """Of two precisions the lower one."""
    return max(first, second, key=lambda dtype: torch.finfo(dtype).eps)


def entry_sizes(recorded: Tensor, start: Tensor, missing: float = 0.0) -> Tensor:
    """What the differences of replayed steps are relative to, entry by entry: `(..., N)`.

    Args:
        recorded: the states at the ends of the steps, `(..., N)`.
        start: those at their starts.
        missing: what an iteration may have left, beside the greatest entry.
    """
    sizes = torch.maximum(recorded.abs(), start.abs())
    bound = rounding(sizes.dtype)
    # Entries may come out as rounding errors of others, and what ought to be zero as one of 1.
    floor = min(max(1e4 * bound, missing / bound), 1.0)
    return (sizes + floor * _greatest(sizes)).clamp_min(bound)


def _greatest(x: Tensor) -> Tensor:
    """The greatest entry of each row, which broadcasts to them."""
    if x.ndim == 2 and 0 < x.shape[1] <= 16:
        # Torch's loops run along rows, which short ones do not pay for.
        return functools.reduce(torch.maximum, x.unbind(1)).unsqueeze(1)
    return x.amax(-1, keepdim=True)


@functools.cache
def rounding(dtype: torch.dtype) -> float:
    """The relative difference up to which states of a type count as equal."""
    bound: float = torch.finfo(dtype).eps ** 0.5
    return bound
