"""A field that says which tensors receive its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor


class ForThese:
    """A field whose gradients go to chosen tensors alone (and to the state, the times and `p`).

    Args:
        field: the field.
        tensors: the chosen tensors.
    """

    def __init__(self, field: Callable[..., Any], tensors: Iterable[Tensor]) -> None:
        self.field, self.tensors = field, tuple(tensors)

    def __call__(self, *arguments: Any) -> Any:
        """Evaluate the field."""
        return self.field(*arguments)
