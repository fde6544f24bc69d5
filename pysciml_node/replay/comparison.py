"""The comparison of replayed steps with those of the solve."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from pysciml_node.steps.inputs import changed_message
from pysciml_node.steps.surroundings import Surroundings


class Comparison:
    """The largest difference between replayed steps and those of the solve.

    It stays on the states' device, and is read once. The bound is the square root of the precision,
    relative to the state. Kernels may round differently with gradients; a field that has changed
    differs by more.
    """

    def __init__(self) -> None:
        self._differences: list[Tensor] = []
        self._sizes: list[Tensor] = []
        self._start: Tensor | None = None
        self._relative: list[Tensor] = []

    def add(self, again: Tensor, recorded: Tensor, start: Tensor) -> None:
        """Compare the end of a replayed step with the solve's.

        Args:
            again: the state at its end, replayed.
            recorded: the state at its end in the solve.
            start: the state at its start, which is the end of the step that comes next.
        """
        self._differences.append(torch.dist(again, recorded, math.inf))
        self._sizes.append(_size(recorded))
        self._start = start

    def add_value(self, again: Tensor, first: Tensor) -> None:
        """Compare what is no state, relative to itself.

        Args:
            again: its value now.
            first: that in the solve.
        """
        difference = torch.dist(again, first, math.inf)
        self._relative.append(difference / _size(first).clamp_min(rounding(difference.dtype)))

    def expect_equal(self, suspects: Sequence[str]) -> None:
        """Read the comparison.

        Args:
            suspects: names of constants that are known to have been changed in place.

        Raises:
            RuntimeError: a step was not reproduced.
        """
        relative = [torch.stack(self._relative)] if self._relative else []
        if self._start is not None:
            sizes = torch.stack([*self._sizes, _size(self._start)])
            # Entries that ought to be zero may come out as rounding errors.
            scale = torch.maximum(sizes[1:], sizes[:-1]).clamp_min(rounding(sizes.dtype))
            relative.append(torch.stack(self._differences) / scale)
        if relative:
            worst = torch.nan_to_num(torch.cat(relative), nan=0.0).max()
            expect_reproduced(worst, suspects)


@contextmanager
def as_solved(
    surroundings: Surroundings, compare: Callable[[Comparison, int], None]
) -> Iterator[Callable[..., None]]:
    """Everything that a solve could reach, as it saw it.

    Yields a check of steps that follow one another: where tensors have been changed in place
    since, they are taken again, and refused if they do not come out as they did.

    Args:
        surroundings: of the solve.
        compare: takes a step again, and adds its end to a comparison.
    """
    changed = surroundings.changed_in_place()
    names = [surroundings.names[id(x)] for x in changed]

    def check(*steps: int) -> None:
        if names:
            comparison = Comparison()
            with torch.no_grad():
                for n in reversed(steps):
                    compare(comparison, n)
            comparison.expect_equal(names)

    with surroundings.as_seen():
        yield check


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
        f"the backward pass could not reproduce the solve: replayed steps end up to {gap:.2g} "
        "(relative) from where they ended before, so the field has changed since, draws random "
        "numbers, or remembers earlier calls.\n"
        "  Go backward before anything it uses is changed, make it a function of its arguments, "
        "or use adjoint=DirectAdjoint()."
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


def _size(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, ord=math.inf)
    return norm


@functools.cache
def rounding(dtype: torch.dtype) -> float:
    """The relative difference up to which states of a type count as equal."""
    bound: float = torch.finfo(dtype).eps ** 0.5
    return bound
