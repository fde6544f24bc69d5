"""A guard of graphs: what they have saved for backward must be what it was.

Torch refuses to go backward through an operation whose saved tensors have been changed, as far as
it counts the changes: it counts none by `.data`, or by memory that something else shares.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from pysciml_node.steps.contents import Contents, is_comparable
from pysciml_node.steps.first_graph import saved_by
from pysciml_node.steps.graph import newly_behind, nodes_behind
from pysciml_node.steps.surroundings import Surroundings


def guard(
    values: Iterable[Tensor | None],
    surroundings: Surroundings | None,
    start: Iterable[Tensor] | None = None,
) -> None:
    """Refuse to go backward from values, once something that their graph has saved is changed.

    Every backward pass through the graph has to come by one of them. Where such a pass makes a
    graph of its own, for further derivatives, that is guarded too.

    Args:
        values: those that gradients may arrive at.
        surroundings: what the graph may have been made of, where that is known.
        start: what a short graph begins at: it is looked at now, and what it has not saved is not
            compared.
    """
    given = [x for x in values if x is not None and x.grad_fn is not None]
    # Inside of transforms of `torch.func` tensors are other ones in backward.
    if surroundings is None or not given or not all(map(is_comparable, given)):
        return
    tensors, arrays = surroundings.tensors, surroundings.arrays
    if start is not None:
        nodes = nodes_behind({x.grad_fn for x in given}, {x.grad_fn for x in start})
        extents = sorted(_extent(x) for node in nodes for x in saved_by(node))
        tensors, arrays = _within(extents, tensors), _within(extents, arrays)
    if not (tensors or arrays):
        return
    look = _Guard(tensors, arrays, surroundings.names)
    for node in {x.grad_fn for x in given}:
        assert node is not None
        node.register_prehook(look)


class _Guard:
    """What is called before each of the nodes that values were made by."""

    def __init__(
        self, tensors: Sequence[Tensor], arrays: Sequence[Tensor], names: dict[int, str]
    ) -> None:
        self._contents = Contents((*tensors, *arrays))
        self._names = names
        # A graph does not keep alive what has been computed elsewhere, and the graphs behind that.
        self._tensors = [weakref.ref(x) for x in tensors]
        self._arrays = arrays
        self._passed = -1  # the backward pass that has looked
        self._changed: list[Tensor] = []

    def __call__(self, cotangents: Any) -> None:
        if self._passed != (this := torch._C._current_graph_task_id()):
            held = (reference() for reference in self._tensors)
            there = (*(x for x in held if x is not None), *self._arrays)
            self._passed, self._changed = this, self._contents.changed(there)
        node = torch._C._current_autograd_node()
        if self._changed:
            unseen = newly_behind(node, (self, "seen"), this)
            if (x := first_saved(unseen, self._changed)) is not None:
                raise RuntimeError(
                    f"{self._names[id(x)]} has been changed in place since the solve, and the "
                    "graph of the solve reads it: the gradient would be that of another value.\n"
                    "  Change a copy (x = 3 * x for x.mul_(3)), or go backward first."
                )
        if torch.is_grad_enabled():
            self._look_at_gradients(node)

    def _look_at_gradients(self, node: Any) -> None:
        """Guard the graphs of gradients, where the nodes behind one have saved what may change."""
        held = (*(reference() for reference in self._tensors), *self._arrays)
        outside = {x.untyped_storage().data_ptr() for x in held if x is not None and _has_memory(x)}
        for behind in newly_behind(node, (self, "guarded"), True):
            with suppress(RuntimeError):
                saved = (x for x in saved_by(behind) if _has_memory(x))
                if any(x.untyped_storage().data_ptr() in outside for x in saved):
                    behind.register_hook(self._guard_gradients)

    def _guard_gradients(self, gradients: Sequence[Tensor | None], _: Any) -> None:
        for x in gradients:
            if x is not None and x.grad_fn is not None:
                x.grad_fn.register_prehook(self)


def _has_memory(x: Tensor) -> bool:
    return is_comparable(x) and x.numel() > 0


def first_saved(nodes: Iterable[Any], tensors: Sequence[Tensor]) -> Tensor | None:
    """The first of some tensors that nodes have saved for backward, as far as that is there."""
    for node in nodes:
        # What a pass has let go of, the next one cannot use.
        with suppress(RuntimeError):
            for saved in saved_by(node):
                for x in tensors:
                    if _overlap(x, saved):
                        return x
    return None


def _within(extents: Sequence[tuple[int, int]], tensors: Iterable[Tensor]) -> list[Tensor]:
    """Those of some tensors that share memory with one of the extents, which are in order."""
    begins, ends = [x for x, _ in extents], [*accumulate((y for _, y in extents), max)]
    found = []
    for x in tensors:
        first, last = _extent(x)
        place = bisect_left(begins, last)
        if place and first < ends[place - 1]:
            found.append(x)
    return found


def _overlap(x: Tensor, y: Tensor) -> bool:
    """Whether tensors share memory."""
    (start, end), (first, last) = _extent(x), _extent(y)
    return start < last and first < end


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses that a tensor begins and ends at; an empty span if it has no memory."""
    if not is_comparable(x) or not x.numel():
        return 0, 0
    steps = zip(x.shape, x.stride(), strict=True)
    entries = 1 + sum((size - 1) * stride for size, stride in steps)
    return x.data_ptr(), x.data_ptr() + entries * x.element_size()
