"""What a field makes at its first evaluation and keeps: tables, masks, cached properties."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.translation.check import point
from pysciml_node.translation.saved import numbers_put_back, saved_by, without_graph
from pysciml_node.translation.tracing import full_precision, quietly


def has_made_what_it_keeps(f: Callable[..., Any], spec: StateSpec, p: Any) -> bool:
    """Evaluate a field before it is traced, and leave it what it has made once and for all.

    A trace has no numbers: a table that it makes would stay with the field, of no use to anybody.
    What another evaluation changes again, such as a count, and what depends on the state or on
    weights is put back.

    Args:
        f: called with the time, a 0-d tensor, and the state, and with `p` if there is one.
        spec: structure of the state.
        p: extra argument.

    Returns:
        Whether anything that the field can reach is another than before.
    """
    before = Surroundings({"f": f, "p": p})
    if before.lazy or before.generators:
        return False
    further = () if p is None else (p,)

    def value(scale: float) -> list[Any]:
        t, u, _, _ = point(scale, spec)
        return pytree.tree_leaves(f(t, spec.unflatten(u), *further))

    with ExitStack() as stack:
        for context in (
            *(torch.inference_mode(False), full_precision(spec.device), torch.enable_grad()),
            *(saved_by(without_graph), torch.random.fork_rng(devices=[])),
            *(numbers_put_back(before.tensors), quietly()),
        ):
            stack.enter_context(context)
        try:
            value(1.0)
            if not before.changed():
                return False
            after = Surroundings({"f": f, "p": p})
            kept = value(0.01)
            if not (after.changed() or _depend_on_weights(after.tensors, before.tensors)):
                before.put_back()
                if _are_same(kept, value(0.01)):
                    return True
        except Exception:  # what it is, the trace says
            pass
        before.put_back()
    return False


def _depend_on_weights(now: list[Tensor], before: list[Tensor]) -> bool:
    known = set(map(id, before))
    return any(x.requires_grad for x in now if id(x) not in known)


def _are_same(one: list[Any], other: list[Any]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(isinstance(x, Tensor) and isinstance(y, Tensor) for x, y in pairs) and all(
        torch.allclose(x, y, rtol=0, atol=0, equal_nan=True) for x, y in pairs
    )
