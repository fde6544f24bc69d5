"""Rewriting small matrix products, whose calls cost more than their arithmetic.

A bias in a product's call is a copy of its own before the product; as an addition it becomes part
of whatever follows. A product with few columns is faster as a loop compiled with its surroundings
than as a library call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

_aten = torch.ops.aten
# Above these the library's arithmetic is worth its call.
_SMALL_OUTPUT = 2**16
_SMALL_WORK = 2**15
_FEW_COLUMNS = 8
_LONG_ROWS = 16


def rewrite_products(graph: fx.Graph) -> None:
    """Rewrite the small products of a graph, in place."""
    for target in (_aten.addmm.default, _aten.mm.default):
        for node in graph.find_nodes(op="call_function", target=target):
            if not node.kwargs:
                _rewrite(graph, node)


def _rewrite(graph: fx.Graph, node: fx.Node) -> None:
    *bias, a, b = node.args
    m, k = _shape(a)
    n = _shape(b)[1]
    if not all(isinstance(size, int) for size in (m, n, k)):
        return
    as_loop = n <= _FEW_COLUMNS and k >= _LONG_ROWS and m * n * k <= _SMALL_WORK
    if m * n > _SMALL_OUTPUT or not (as_loop or bias):
        return

    def call(target: Any, *arguments: Any) -> fx.Node:
        made = graph.call_function(target, arguments)
        values = [x.meta["val"] if isinstance(x, fx.Node) else x for x in arguments]
        made.meta["val"] = target(*values)
        return made

    with graph.inserting_before(node):
        if as_loop:
            rows = call(_aten.unsqueeze.default, a, 1)
            columns = call(_aten.unsqueeze.default, call(_aten.permute.default, b, [1, 0]), 0)
            terms = call(_aten.mul.Tensor, rows, columns)
            product = call(_aten.sum.dim_IntList, terms, [2])
        else:
            product = call(_aten.mm.default, a, b)
        found = call(_aten.add.Tensor, product, *bias) if bias else product
    node.replace_all_uses_with(found)
    graph.erase_node(node)


def _shape(node: Any) -> Any:
    return node.meta["val"].shape
