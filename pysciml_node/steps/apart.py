"""What a function differentiates inside of itself, apart from what its arguments come from.

A field may differentiate something by its parameters. Its state comes from earlier evaluations,
which depend on them as well, and a derivative inside must not go back through these: with gradients
the field would be another function than without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.steps.autograd import graph_is_retained

_NOTHING = nullcontext()
_is_batched = torch._C._functorch.is_batchedtensor


class WentBack(RuntimeError):
    """A derivative inside of a function has come to what its arguments were computed from."""


class During:
    """Whether one of the functions of a solve runs: what an earlier call was given ends there too.

    A field may keep what it computed, and differentiate that later. Without gradients of its own a
    state ends such a derivative, too.
    """

    def __init__(self) -> None:
        self.calls = 0


def apart(
    what: str,
    given: Iterable[Tensor],
    *,
    during: During | None = None,
    always_refused: bool = False,
) -> AbstractContextManager[None]:
    """A context for a call of a function: derivatives inside of it end at its arguments.

    Args:
        what: the function, in messages.
        given: its arguments.
        during: derivatives inside of later calls with it end at these arguments too.
        always_refused: raise where one would go on, even if it could end there.

    Raises:
        WentBack: inside, where a derivative frees the graph that it would have to end at.
    """
    found = [x for x in given if _has_graph(x)]
    return _Apart(what, found, during, always_refused) if found else _NOTHING


def _has_graph(x: Tensor) -> bool:
    # Inside of torch.vmap nothing is seen to have one.
    return x.grad_fn is not None and not _is_batched(x)


class _Apart(AbstractContextManager[None]):
    """Holds back what arrives at the graph nodes of tensors, for its duration."""

    def __init__(
        self, what: str, tensors: list[Tensor], during: During | None, always_refused: bool
    ) -> None:
        self._tensors, self._passing = tensors, during is None
        self._during = During() if during is None else during
        # Graphs hold it, and it holds none.
        self._hold_back = partial(_hold_back, self._during, what, always_refused)

    @override
    def __enter__(self) -> None:
        self._during.calls += 1
        self._handles = [
            x.grad_fn.register_prehook(partial(self._hold_back, x.output_nr))
            for x in self._tensors
            if x.grad_fn is not None
        ]

    @override
    def __exit__(self, *_: object) -> None:
        self._during.calls -= 1
        for handle in self._handles if self._passing else ():
            handle.remove()


def _hold_back(
    during: During, what: str, always_refused: bool, place: int, gradients: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...] | None:
    if not during.calls:
        return None
    # The pass goes on with nothing in hand, and may let go of what the nodes behind hold.
    if always_refused or not graph_is_retained():
        raise WentBack(
            f"{what} differentiates something by a tensor that its state was computed "
            "from, such as a parameter, and lets go of the graph, which the solve needs.\n"
            "  Keep it: torch.autograd.grad(..., retain_graph=True); or use "
            "adjoint=DiscreteAdjoint()."
        )
    return tuple(None if i == place else x for i, x in enumerate(gradients))


class Lookout:
    """Calls a function that is thought to take no derivatives inside, and sees one that goes back.

    Later calls cost nothing more: what goes back through the states was computed from the first
    state and the first value, and is stopped there. That of the value is seen to when there is a
    second call.
    """

    def __init__(self) -> None:
        # Graphs hold it, and it holds none.
        self._call = _Call()
        self._first: Tensor | None = None  # the first value, until there is a second call
        self._stands = False

    def let_go(self) -> None:
        """Called when the solve has run: states that come later have no graph."""
        self._first, self._stands = None, True

    def __call__(
        self, function: Callable[[Tensor, Tensor], Tensor], t: Tensor, u: Tensor
    ) -> Tensor:
        """A value of the function.

        Raises:
            WentBack: a derivative inside has come to the first state, or to the first value.
        """
        call = self._call
        if not self._stands:
            call.stop_at(u if self._first is None else self._first)
            self._stands = self._first is not None
        # Of a sweep states have no graph, and another thread may be in that of the solve.
        call.runs = not u.is_leaf
        try:
            value = function(t, u)
        finally:
            call.runs = False
        self._first = None if self._stands else value
        return value


class _Call:
    """Whether a function runs that must not go back to certain tensors."""

    def __init__(self) -> None:
        self.runs = False

    def stop_at(self, x: Tensor) -> None:
        """Have it raise an error where it comes to the graph node of a tensor."""
        if _has_graph(x) and x.grad_fn is not None:
            x.grad_fn.register_prehook(self._look)

    def _look(self, gradients: Any) -> None:
        if self.runs:
            raise WentBack(
                "the field differentiates something by a tensor that its state was computed from.\n"
                "  Let this error pass: the field is then called again, apart from that."
            )
