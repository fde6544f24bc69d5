"""What a function differentiates inside of itself, apart from what its arguments come from.

A field may differentiate something by its parameters. Its state comes from earlier evaluations,
which depend on them as well, and a derivative inside must not go back through these: with gradients
the field would be another function than without.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.steps.autograd import graph_is_retained

_NOTHING = nullcontext()
_is_batched = torch._C._functorch.is_batchedtensor


class WentBack(RuntimeError):
    """A derivative inside of a function has come to what its arguments were computed from."""


def apart(
    what: str, given: Iterable[Tensor], *, always_refused: bool = False
) -> AbstractContextManager[None]:
    """A context for a call of a function: derivatives inside of it end at its arguments.

    Args:
        what: the function, in messages.
        given: its arguments.
        always_refused: raise where one would go on, even if it could end there.

    Raises:
        WentBack: inside, where a derivative frees the graph that it would have to end at.
    """
    # Inside of torch.vmap nothing is seen to have a graph.
    found = [x for x in given if x.grad_fn is not None and not _is_batched(x)]
    return _Apart(what, found, always_refused) if found else _NOTHING


class _Apart(AbstractContextManager[None]):
    """Holds back what arrives at the graph nodes of tensors, for its duration."""

    def __init__(self, what: str, tensors: list[Tensor], always_refused: bool) -> None:
        self._what, self._tensors, self._always_refused = what, tensors, always_refused

    @override
    def __enter__(self) -> None:
        self._handles = [
            x.grad_fn.register_prehook(partial(self._hold_back, x.output_nr))
            for x in self._tensors
            if x.grad_fn is not None
        ]

    @override
    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hold_back(
        self, place: int, gradients: Sequence[Tensor | None]
    ) -> tuple[Tensor | None, ...]:
        # The pass goes on with nothing in hand, and may let go of what the nodes behind hold.
        if self._always_refused or not graph_is_retained():
            raise WentBack(
                f"{self._what} differentiates something by a tensor that its state was computed "
                "from, such as a parameter, and lets go of the graph, which the solve needs.\n"
                "  Keep it: torch.autograd.grad(..., retain_graph=True); or use "
                "adjoint=DiscreteAdjoint()."
            )
        return tuple(None if i == place else x for i, x in enumerate(gradients))
