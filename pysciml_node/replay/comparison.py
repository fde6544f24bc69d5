"""Whether a replay finds what the solve has found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pysciml_node.steps.inputs import changed_message


class Comparison:
    """The largest difference between replayed steps and those of the solve.

    It is added up where the states are, and read once. The bound is the square root of the
    precision, relative to the state and to what the step adds to it: kernels may round differently
    with gradients, and a field that has changed differs by more.
    """

    def __init__(self) -> None:
        self._worst: Tensor | None = None

    def add(self, again: Tensor, recorded: Tensor, start: Tensor) -> None:
        """Compare the end of a replayed step with the solve's, given where the step starts."""
        scale = torch.maximum(_size(recorded), _size(start))
        # Entries that ought to be zero may come out as rounding errors.
        scale = scale.clamp_min(torch.finfo(scale.dtype).eps ** 0.5)
        worst = torch.nan_to_num(_size(again - recorded) / scale, nan=0.0)
        self._worst = worst if self._worst is None else torch.maximum(self._worst, worst)

    def expect_equal(self, suspects: Sequence[str]) -> None:
        """Look at what has been compared.

        Args:
            suspects: names of what is known to have been changed in place.

        Raises:
            RuntimeError: a step was not reproduced.
        """
        if self._worst is None:
            return
        worst = self._worst.item()
        if worst > torch.finfo(self._worst.dtype).eps ** 0.5:
            if suspects:
                raise RuntimeError(changed_message(suspects[0]))
            raise RuntimeError(
                f"the backward pass could not reproduce the solve: replayed steps end up to "
                f"{worst:.2g} (relative) from where they ended before, so the field has changed "
                "since, draws random numbers, or remembers earlier calls.\n"
                "  Go backward before anything it uses is changed, make it a function of its "
                "arguments, or use adjoint=DirectAdjoint()."
            )


def _size(x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, ord=torch.inf)
    return norm
