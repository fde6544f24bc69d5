"""What a field writes to for its next evaluation, such as the vectors of spectral normalization."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pysciml_node.steps.first_graph import Evaluation


class Memory:
    """The tensors that the first evaluation of a field has written to.

    A replay begins with what the last evaluation has left there. Values may hardly tell: where an
    iteration has almost found a maximum they are stationary, and their derivatives are not.

    Args:
        evaluate: the first evaluation.
        written: the tensors, as it has left them.
        names: what they are called in messages, by their identities.
    """

    def __init__(
        self, evaluate: Callable[[], Evaluation], written: Sequence[Tensor], names: dict[int, str]
    ) -> None:
        self._evaluate, self._written, self._names = evaluate, written, names
        self._first = _copies(written)

    def expect_idle(self, leaves: Sequence[Tensor]) -> None:
        """Compare derivatives at the start by what the tensors held first, and by what they hold.

        Args:
            leaves: what stands for the inputs of the field.

        Raises:
            RuntimeError: they differ by more than rounding.
        """
        last = _copies(self._written)
        if all(map(torch.equal, self._first, last)):
            return
        now = self._derivatives(leaves)
        _write(self._written, self._first)
        then = self._derivatives(leaves)
        _write(self._written, last)
        # Small derivatives may be what is left of great ones that cancel.
        floor = 0.01 * max(map(_size, (*now, *then)), default=0.0)
        gaps = [
            _size(x - y) / max(_size(x), floor) for x, y in zip(now, then, strict=True) if floor
        ]
        gap = max(gaps, default=0.0)
        if not gap > max((torch.finfo(x.dtype).eps for x in now), default=0.0) ** 0.5:
            return
        raise RuntimeError(
            f"the field has written to {self._names[id(self._written[0])]}, and its derivatives "
            f"depend on what earlier evaluations have left there: they differ by up to "
            f"{gap:.2g} (relative).\n"
            "  Call eval() on it, as for spectral normalization; make it a function of its "
            "arguments; or use adjoint=DirectAdjoint()."
        )

    def _derivatives(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        """Of all values at once, in the state and in the inputs that they depend on."""
        with torch.enable_grad():
            values, fresh = self._evaluate()
        values = [x for x in values if x.requires_grad]
        if not values:
            return []
        cotangents = [torch.linspace(0.5, 1.5, x.numel()).to(x).view_as(x) for x in values]
        found = torch.autograd.grad(
            values, [*fresh, *leaves], cotangents, retain_graph=True, allow_unused=True
        )
        nothing = values[0].detach().new_zeros(())
        return [nothing if x is None or not x.numel() else x.detach() for x in found]


def _size(x: Tensor) -> float:
    """The size of the greatest entry."""
    return float(x.abs().max().nan_to_num(nan=0.0))


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors]


@torch.no_grad()
def _write(tensors: Sequence[Tensor], contents: Sequence[Tensor]) -> None:
    for x, value in zip(tensors, contents, strict=True):
        # Not counted as a change: what was there is put back.
        x.data.copy_(value)
