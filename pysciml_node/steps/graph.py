"""Walks of autograd graphs, and gradients without torch's own checks."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Variable

Edge = tuple[Any, int]
"""A node of the autograd graph, and the number of one of its outputs."""


_made: Callable[[], int] | None = getattr(torch._C._autograd, "_get_sequence_nr", None)


def nodes_made() -> int | None:
    """How many nodes of graphs this thread has made; `None` where torch does not say."""
    return None if _made is None else _made()


def nodes_since(before: int | None) -> int | None:
    """How many since then."""
    return None if _made is None or before is None else _made() - before


class Grad:
    """`torch.enable_grad` or `torch.no_grad`: these take as long as an operation of torch.

    Args:
        enabled: whether operations are recorded inside.
    """

    __slots__ = ("_before", "_enabled")

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        torch._C._set_grad_enabled(self._enabled)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(self._before)


def edge_of(x: Tensor) -> Edge:
    """The edge by which a tensor's gradient enters the graph: a quicker `get_gradient_edge`."""
    node = x.grad_fn
    if node is not None:
        return node, x.output_nr
    if torch.is_grad_enabled():
        view = x.view_as(x).grad_fn
    else:
        with torch.enable_grad():
            view = x.view_as(x).grad_fn
    assert view is not None
    edge: Edge = view.next_functions[0]
    return edge


def graph_leaves(
    values: Sequence[Tensor],
    stops: Container[Edge] = (),
    reached: set[Edge] | None = None,
    seen: set[Any] | None = None,
) -> list[Tensor]:
    """The leaf tensors that autograd graphs end in.

    Args:
        values: the roots of the graphs.
        stops: edges beyond which not to look.
        reached: collects the stops that the graphs come to.
        seen: collects the nodes.
    """
    leaves: list[Tensor] = []
    seen = set() if seen is None else seen
    todo: list[Edge] = [edge_of(x) for x in values if x.requires_grad]
    while todo:
        edge = todo.pop()
        if edge in stops:
            if reached is not None:
                reached.add(edge)
            continue
        node = edge[0]
        if node is None or node in seen:
            continue
        seen.add(node)
        following = node.next_functions
        if following:
            todo.extend(following)
        elif hasattr(node, "variable"):
            leaves.append(node.variable)
    return leaves


def nodes_behind(nodes: Iterable[Any], stops: Container[Any] = ()) -> Iterator[Any]:
    """Nodes of autograd graphs and all that they lead to, as far as others, each once."""
    todo, seen = list(nodes), set[Any]()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen and node not in stops:
            seen.add(node)
            yield node
            todo.extend(following for following, _ in node.next_functions)


def newly_behind(node: Any, mark: object, value: object) -> Iterator[Any]:
    """A node of an autograd graph and all that it leads to, as far as they have no such mark yet.

    They are marked as they are passed: whoever comes by many nodes of a graph sees each once.

    Args:
        node: the node.
        mark, value: of whoever looks; with another value a node counts as unmarked.
    """
    todo = [node]
    while todo:
        node = todo.pop()
        if node is not None and node.metadata.get(mark) != value:
            node.metadata[mark] = value
            yield node
            todo.extend(following for following, _ in node.next_functions)


def pull_back(
    value: Tensor, inputs: Sequence[Tensor], cotangent: Tensor, create_graph: bool = False
) -> list[Tensor | None]:
    """Gradients of `cotangent . value`, `None` where it does not depend on an input.

    This is `torch.autograd.grad(..., retain_graph=True, allow_unused=True)` without its checks,
    which take a third of the time of a small field. The graph is kept, because parts of it may
    belong to the caller (a hidden tensor that was computed elsewhere).
    """
    return pull_back_all((value,), inputs, (cotangent,), create_graph)


def pull_back_all(
    values: Sequence[Tensor],
    inputs: Sequence[Tensor],
    cotangents: Sequence[Tensor],
    create_graph: bool = False,
) -> list[Tensor | None]:
    """The same for several values in one pass: gradients of the sum of `cotangent . value`."""
    pairs = [
        pair for pair in zip(values, cotangents, strict=True) if inputs and pair[0].requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    backward = Variable._execution_engine.run_backward
    gradients: Sequence[Tensor | None] = backward(
        *map(tuple, zip(*pairs, strict=True)),
        True,
        create_graph,
        tuple(inputs),
        True,
        accumulate_grad=False,
    )
    return list(gradients)
