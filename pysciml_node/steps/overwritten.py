"""Tensors that a field overwrites at its evaluations without torch counting it, as by `.data`.

A graph that has saved one of them for backward reads there what a later evaluation has left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from pysciml_node.steps.contents import Contents, is_comparable
from pysciml_node.steps.graph import nodes_behind
from pysciml_node.steps.guard import first_saved
from pysciml_node.steps.surroundings import Surroundings

# Bytes of a tensor up to which it is copied, in case that an evaluation writes to it.
_COPIED = 2**16


def may_be_written(surroundings: Surroundings) -> list[Tensor]:
    """Small tensors and arrays that evaluations of a field may write to."""
    return [x for x in _writable(surroundings) if x.nbytes <= _COPIED]


class Large:
    """Larger tensors and arrays, of which no copies are kept.

    Args:
        surroundings: of the field. They hold what is not put back, if one of these changes.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        may = (x for x in _writable(surroundings) if not isinstance(x, nn.Parameter))
        self._seen = [(x, x._version) for x in may if x.nbytes > _COPIED]
        self._contents = Contents(x for x, _ in self._seen)
        self._surroundings = surroundings

    def overwritten(self) -> list[Tensor]:
        """Those that have changed, and torch has not counted it."""
        uncounted = (x for x, version in self._seen if x._version == version)
        changed = self._contents.changed(uncounted)
        self._surroundings.closed |= bool(changed)
        return changed


def _writable(surroundings: Surroundings) -> Iterable[Tensor]:
    if surroundings.plain:
        return ()
    return (
        x
        for x in surroundings.reach
        if is_comparable(x) and not (x.requires_grad or x.is_inference())
    )


class Overwritten:
    """Small tensors that a field can reach, as they are before it is evaluated.

    Args:
        surroundings: of the field.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        counted = set(map(id, surroundings.written))  # running statistics, which no graph reads
        may = [x for x in may_be_written(surroundings) if id(x) not in counted]
        self._seen = [(x, x._version, x.detach().clone()) for x in may]
        self._surroundings, self._large = surroundings, Large(surroundings)

    def expect_unread(self, values: Sequence[Tensor], again: Callable[[], object]) -> None:
        """Check that the graph of a solve reads nothing that is overwritten.

        Args:
            values: of the graph.
            again: evaluates the field at the start of the solve.

        Raises:
            RuntimeError: it does.
        """
        other = [(x, version, seen) for x, version, seen in self._seen if not torch.equal(x, seen)]
        self._surroundings.began = [(x, seen) for x, _, seen in other]
        uncounted = [x for x, version, _ in other if x._version == version]
        changed = [(x, x.detach().clone()) for x in (*uncounted, *self._large.overwritten())]
        if not changed:
            return
        # What is always the same may be read.
        with torch.no_grad():
            again()
            tensors = [x for x, last in changed if not torch.equal(x, last)]
            for x, last in changed:
                x.data.copy_(last)
        refuse_read(values, tensors, self._surroundings.names)


def refuse_read(values: Sequence[Tensor], tensors: Sequence[Tensor], names: dict[int, str]) -> None:
    """Refuse a graph that has saved one of some tensors for backward.

    Args:
        values: of the graph.
        tensors: what the field overwrites.
        names: of them, by their ids.

    Raises:
        RuntimeError: there is one.
    """
    if not tensors:
        return
    nodes = nodes_behind(value.grad_fn for value in values)
    if (x := first_saved(nodes, tensors)) is not None:
        raise RuntimeError(
            f"the field overwrites {names[id(x)]} at its evaluations, by .data or by memory that "
            "it shares, and multiplies by it or the like: the gradient of each would be that of "
            "the numbers which the last one has left.\n"
            "  Make a new tensor at each evaluation, or use a clone of it."
        )
