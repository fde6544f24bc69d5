"""The field at a point of a solution, with its Jacobian products, for regularizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


class FieldPoint:
    """The field at one time and state, with its Jacobian products.

    Args:
        t: time, a 0-d tensor.
        u: the state, as `f` was differentiated with respect to it.
        f: the derivative there.
        field: the field itself.
        pull: takes a vector, for a single-tensor state, to `vector^T df/du`.

    Attributes:
        t: time, a 0-d tensor.
        u: the state.
        f: the derivative there.
        field: the field itself, as a function of time and state.
    """

    def __init__(
        self,
        t: Tensor,
        u: Any,
        f: Any,
        field: Callable[[Tensor, Any], Any],
        pull: Callable[[Tensor], Tensor],
    ) -> None:
        self.t, self.u, self.f, self.field = t, u, f, field
        self._pull = pull
        self._pulled: dict[int, tuple[Tensor, Tensor]] = {}

    def pullback(self, vector: Tensor, alike: bool = False) -> Tensor:
        """`vector^T df/du` for a single-tensor state, in the state's shape; computed once.

        Args:
            vector: in the state's shape.
            alike: whether it is the same for all samples, so that products with it alone need be
                formed for one of them.
        """
        pulled = self._pulled.get(id(vector))
        if pulled is None:
            if not isinstance(self.f, Tensor):
                raise TypeError(
                    "the Jacobian of a state of several tensors is not supported.\n"
                    "  Stack them into one tensor."
                )
            # The vector is kept, so that its id stays its own.
            given = vector[:1].expand_as(vector) if alike else vector
            pulled = self._pulled[id(vector)] = (vector, self._pull(given))
        return pulled[1]


Rate = Callable[[FieldPoint], Tensor]
"""What is integrated along a solution. One with an attribute `lasting` that is true says that later
solves of states of the same kind are given this very object."""
