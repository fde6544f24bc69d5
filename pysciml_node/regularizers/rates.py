"""What a regularizer reads along a solution: the field at a point, with its Jacobian products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class FieldPoint:
    """The field at one time and state, with its Jacobian products.

    Attributes:
        t: time, a 0-d tensor.
        u: the state.
        f: the derivative there.
        field: the field itself, as a function of time and state.
    """

    def __init__(
        self, t: Tensor, u: Any, f: Any, field: Callable[[Tensor, Any], Any], with_graph: bool
    ) -> None:
        self.t, self.u, self.f, self.field = t, u, f, field
        self._with_graph = with_graph
        self._pulled: dict[int, tuple[Tensor, Tensor]] = {}

    def pullback(self, vector: Tensor) -> Tensor:
        """`vector^T df/du` for a single-tensor state, in the state's shape; computed once."""
        pulled = self._pulled.get(id(vector))
        if pulled is None:
            if not isinstance(self.f, Tensor):
                raise TypeError(
                    "the Jacobian of a state of several tensors is not supported.\n"
                    "  Stack them into one tensor."
                )
            if self.f.requires_grad:
                (product,) = torch.autograd.grad(
                    self.f,
                    self.u,
                    vector,
                    create_graph=self._with_graph,
                    retain_graph=True,
                    allow_unused=True,
                )
                product = torch.zeros_like(self.u) if product is None else product
            else:
                product = torch.zeros_like(self.u)
            # The vector is kept, so that its id stays its own.
            pulled = self._pulled[id(vector)] = (vector, product)
        return pulled[1]


Rate = Callable[[FieldPoint], Tensor]
