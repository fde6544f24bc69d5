"""The graph of a field's first evaluation: whether later ones may be kept, and what they take."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from pysciml_node.steps.anatomy import is_library
from pysciml_node.steps.surroundings import Surroundings

Evaluation = tuple[Sequence[Tensor], Sequence[Tensor]]
"""Values that depend on the inputs, and the leaves made for them."""


def _count(x: Tensor, sizes: dict[int | None, int]) -> None:
    """Note the size of a tensor's memory by its address."""
    try:
        storage = x.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
    except RuntimeError:
        sizes[None] = 0


@functools.lru_cache(maxsize=1024)
def _saving(kind: type) -> tuple[str, ...]:
    """The attributes in which nodes of a kind show what they have saved for backward."""
    return tuple(name for name in dir(kind) if name.startswith("_raw_saved_"))


def saved_by(node: Any) -> Iterator[Tensor]:
    """The tensors that a node of the graph has saved for backward.

    They are looked at as they were saved: unpacking those of a checkpoint would run it.
    """
    for name in _saving(node.__class__):
        saved = getattr(node, name)
        for one in saved if isinstance(saved, list | tuple) else (saved,):
            if isinstance(one.data, Tensor):
                yield one.data


def memory_of(values: Iterable[Tensor], nodes: Collection[Any]) -> dict[int | None, int]:
    """The bytes of values, and of the tensors that nodes have saved for backward, by addresses.

    `None` stands for what has none, such as sparse tensors, or what is not there any more.
    """
    sizes: dict[int | None, int] = {}
    try:
        for x in chain(values, chain.from_iterable(map(saved_by, nodes))):
            _count(x, sizes)
    except (RuntimeError, AttributeError):
        # What was saved has been freed, or this version of torch does not show it.
        sizes[None] = 0
    return sizes


def are_of_others(nodes: Iterable[Any]) -> bool:
    """Whether a node of the graph is a `torch.autograd.Function` that belongs to no library.

    Where nothing arrives at it, torch calls it with zeros, for which it may return anything.
    """
    return any(map(_is_of_others, map(type, nodes)))


@functools.lru_cache(maxsize=1024)
def _is_of_others(kind: type) -> bool:
    function = getattr(kind, "_forward_cls", None)
    return function is not None and not is_library(function.__module__)


class FirstGraph:
    """The graph of the first evaluation, and the memory that it takes.

    It is measured when it is there: hooks of saved tensors would see it grow, but `torch.func`
    refuses to differentiate where there are any.

    Attributes:
        evaluation: the values, and what stands for the state; `None` where the graph leads to
            leaves that are not known.
        refused: whether the evaluation was one of a state without its graph, which is not kept.
        bytes: of the values, of the tensors saved for backward and of the nodes, without what lives
            outside.
        made: how many nodes of graphs the evaluation has made.
    """

    # What a node takes with its tensors' headers: 0.9 to 1.3 KB were measured.
    NODE = 1200

    def __init__(self) -> None:
        self.evaluation: Evaluation | None = None
        self.refused = False
        self.bytes = 0
        self.made: int | None = None

    def keep(
        self, evaluation: Evaluation, nodes: Collection[Any], surroundings: Surroundings
    ) -> None:
        """Keep an evaluation, where its graph can be measured.

        Args:
            evaluation: the values, and the leaves made for them.
            nodes: those of its graph.
            surroundings: have the tensors that live with and without it. As long as they and their
                shapes are the same, as large a graph of states of a size takes as many bytes.
        """
        if self.refused or are_of_others(nodes):
            return
        # Through `.data` a tensor is given another shape; nested ones have none.
        shapes = tuple(x.shape for x in surroundings.tensors if not x.is_nested)
        key = FirstGraph, *(x.nbytes for x in chain(*evaluation)), len(nodes), shapes
        known = surroundings.memory.get(key)
        if known is None:
            known = self._measured(evaluation, nodes, surroundings.tensors)
            surroundings.memory[key] = known
        if known:
            self.take(evaluation, known)

    def take(self, evaluation: Evaluation, measured: int) -> None:
        """Keep an evaluation that is known to take so many bytes."""
        self.evaluation, self.bytes = evaluation, measured

    def _measured(
        self, evaluation: Evaluation, nodes: Collection[Any], outside: list[Tensor]
    ) -> int:
        """The bytes that an evaluation takes; 0 where that is not known."""
        sizes = memory_of(chain(*evaluation), nodes)
        if None in sizes:
            return 0
        own = sum(sizes[address] for address in sizes.keys() - memory_of(outside, ()).keys())
        return own + self.NODE * len(nodes)
