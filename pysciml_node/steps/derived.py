"""Fields that are made of another one and its derivatives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pysciml_node.problems.state import StateSpec


class DerivedField(ABC):
    """A field whose value is computed from that of another one, and from its derivatives.

    The other one can be translated by itself, and what is derived from it afterwards: no recording
    of torch's takes derivatives while it records.

    Attributes:
        inner: the other field, `inner(t, u)` or `inner(t, u, p)`.
        spec: structure of its state, whose parts are the first of this field's.
    """

    inner: Callable[..., Any]
    spec: StateSpec

    @abstractmethod
    def __call__(self, t: Tensor, state: Any, p: Any = None) -> Any:
        """The derivative of the state."""

    @abstractmethod
    def derive(self, t: Tensor, state: Any, field: Callable[[Tensor, Any], Any]) -> Any:
        """The derivative of the state where gradients are recorded.

        Args:
            t: the time.
            state: this field's.
            field: the other one, as a function of time and its own state.
        """
