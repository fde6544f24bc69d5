"""Operations by smaller ones, as torch itself takes them apart."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions, decomposition_table
from torch.fx import Graph, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from pysciml_node.translation.forms import FORMS
from pysciml_node.translation.names import name_of


def decomposed(node: Node, known: Callable[[str], bool]) -> Graph | None:
    """What a call does in smaller operations, at the shapes that it has here.

    Args:
        node: the call, with the results that were noted at its arguments.
        known: whether an operation of a name is to be left as it is.

    Returns:
        A graph whose inputs are the tensors among the node's arguments, in their order; nothing
        where torch has no such form.
    """
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return None
    table = {op: f for op, f in _table().items() if not known(name_of(op))}
    form = FORMS.get(name_of(target)) or table.get(target, target)
    leaves, structure = pytree.tree_flatten((node.args, node.kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]
    examples = [leaves[i].meta.get("val") for i in places]
    if not all(isinstance(example, Tensor) for example in examples):
        return None

    def call(*tensors: Tensor) -> Any:
        filled = list(leaves)
        for i, x in zip(places, tensors, strict=True):
            filled[i] = x
        args, kwargs = pytree.tree_unflatten(filled, structure)
        return form(*args, **kwargs)

    try:
        with torch.no_grad():
            graph = make_fx(call, decomposition_table=table)(*examples).graph
    except Exception:
        # A form of torch's that does not work here is none: the operation is named as it stands.
        return None
    return None if any(inner.target is target for inner in graph.nodes) else graph


@functools.cache
def _table() -> dict[Any, Callable[..., Any]]:
    """Torch's decompositions, those to its core operations before others."""
    found = {**decomposition_table, **core_aten_decompositions()}
    # Those in place are written as others before they come here.
    return {
        op: f
        for op, f in found.items()
        if isinstance(op, torch._ops.OpOverload) and not name_of(op).endswith("_")
    }
