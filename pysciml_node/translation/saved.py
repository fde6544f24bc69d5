"""What autograd saves while a field is traced or computed, kept out of the hooks of others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

from pysciml_node.steps.autograd import saved_tensors_stay

Saved = tuple[Tensor, int | None]

# Entries of the largest tensors that are copied in case that a field changes them.
_MOST_COPIED = 1 << 16


def saved_by(saved: Callable[[Tensor], Saved]) -> AbstractContextManager[None]:
    """What is saved for derivatives stays here: a checkpoint around the solve counts it.

    Where nobody counts there are no hooks, which transforms of `torch.func` do not bear.
    """
    if saved_tensors_stay():
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(saved, _unchanged)


def as_it_is(x: Tensor) -> Saved:
    """What is traced: a graph would show a `detach`."""
    return x, None if x.is_inference() else x._version


def without_graph(x: Tensor) -> Saved:
    """What is computed: torch puts the graph back, and an output with its own would never go."""
    return as_it_is(x.detach())


def _unchanged(saved: Saved) -> Tensor:
    """What was saved; hooks do without the check of it that autograd makes otherwise."""
    x, version = saved
    if version is not None and version != x._version:
        raise RuntimeError(
            "a value that its derivative needs was changed in place.\n  Change a clone of it."
        )
    return x


class Numbers:
    """The numbers of tensors in which a field may count, or note something.

    Args:
        tensors: all that the field can reach.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._copies = [(x, x._version, x.detach().clone()) for x in tensors if _may_count(x)]

    @torch.no_grad()
    def put_back(self) -> None:
        """Put them back where they have changed."""
        for x, version, numbers in self._copies:
            if x._version != version:
                x.copy_(numbers)
            elif not torch.equal(x, numbers):
                # Torch counts no changes of running statistics.
                x.data.copy_(numbers)


@contextmanager
def numbers_put_back(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Tensors in which a field counts, or notes something, have their numbers back afterwards.

    What a field does with no tensor that is traced, such as to add one to a count, is done.
    """
    numbers = Numbers(tensors)
    try:
        yield
    finally:
        numbers.put_back()


def _may_count(x: Tensor) -> bool:
    small = x.numel() <= _MOST_COPIED and x.layout is torch.strided and 0 not in x.stride()
    return small and not (x.requires_grad or x.is_inference())
