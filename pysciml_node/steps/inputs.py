"""The tensors outside that a field's result depends on, and what stands for them in a sweep.

Most of them are leaves, such as parameters, and are differentiated as they are. A tensor that
something else has computed (an encoder's output), and one that has hooks, is replaced in its places
by a detached stand-in while a backward sweep runs: gradients stop there, and what lies beyond runs
once, when the sum of them leaves the solve.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from pysciml_node.problems.state import tensors_of
from pysciml_node.steps.surroundings import Surroundings

Edge = tuple[Any, int]
"""A node of the autograd graph, and which of its outputs."""

Evaluate = Callable[[], tuple[Sequence[Tensor], Sequence[Tensor]]]
"""Evaluates something that depends on the inputs: its values, and leaves made for that."""


def edge_of(x: Tensor) -> Edge:
    """Where the gradient of a tensor enters the graph (as `get_gradient_edge`, in less time)."""
    if x.grad_fn is not None:
        return x.grad_fn, x.output_nr
    with torch.enable_grad():
        view = x.view_as(x).grad_fn
    assert view is not None
    edge: Edge = view.next_functions[0]
    return edge


def graph_leaves(
    values: Sequence[Tensor], stops: Container[Edge] = (), reached: set[Edge] | None = None
) -> list[Tensor]:
    """The leaf tensors that autograd graphs end in.

    Args:
        values: the roots of the graphs.
        stops: edges beyond which not to look.
        reached: collects those of them that the graphs come to.
    """
    leaves: list[Tensor] = []
    seen: set[Any] = set()
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


def pull_back(value: Tensor, inputs: Sequence[Tensor], cotangent: Tensor) -> list[Tensor | None]:
    """Gradients of `cotangent . value`, `None` where it does not depend on an input.

    This is `torch.autograd.grad(..., retain_graph=True, allow_unused=True)` without its checks,
    which take a third of the time of a small field. The graph is kept, because parts of it may be
    the caller's own (a hidden tensor that something has computed).
    """
    if not (inputs and value.requires_grad):
        return [None] * len(inputs)
    backward = Variable._execution_engine.run_backward
    found: Sequence[Tensor | None] = backward(
        (value,), (cotangent,), True, False, tuple(inputs), True, accumulate_grad=False
    )
    return list(found)


def _stand_in(x: Tensor) -> Tensor:
    """A leaf with the same values, of the same class."""
    inner = x.detach()
    return nn.Parameter(inner) if isinstance(x, nn.Parameter) else inner.requires_grad_()


class Inputs:
    """The tensors outside that receive gradients.

    All that the surroundings hold and that need gradients, and every other leaf that one evaluation
    is found to depend on and that outlives it. (A leaf that a field makes for itself does not.)
    What could not be found like this and turns up in a sweep is refused.

    A computed tensor that the first evaluation does not use is doubtful: it may be left over from
    something else, its graph freed long ago. It becomes an input when the solve is seen to use it.

    Args:
        surroundings: what can be reached.
        evaluate: the first evaluation.
        p: its tensors are inputs, used or not.

    Attributes:
        inputs: the outer tensors, in the order of `leaves`.
        leaves: what stands for them inside.
        doubtful: those that have not been seen in use, by their edges.
        first: the values of the first evaluation, detached.
        suspects: in a sweep, the names of constants that have been changed in place. The field may
            not use them: whether it does, the comparison of the steps will tell.
    """

    def __init__(self, surroundings: Surroundings, evaluate: Evaluate, p: Any) -> None:
        self._surroundings = surroundings
        found = [x for x in surroundings.tensors if x.requires_grad]
        edges = {edge_of(x): x for x in found}
        reached: set[Edge] = set()
        with surroundings.undisturbed():
            values, own = evaluate()
        ours = {id(x) for x in own}
        strangers = [x for x in graph_leaves(values, edges, reached) if id(x) not in ours]
        self.first = tuple(x.detach() for x in values)
        references = [weakref.ref(x) for x in strangers]
        del values, own, strangers
        # Those that are still alive belong to somebody, though not to a place that can be found.
        hidden = [x for x in (reference() for reference in references) if x is not None]
        self._hidden = {id(x): (x, x._version) for x in hidden}
        certain = {id(edges[edge]) for edge in reached} | {
            id(x) for x in tensors_of(p) if not x._backward_hooks
        }
        self.inputs = list(hidden)
        self.doubtful: dict[Edge, Tensor] = {}
        for edge, x in edges.items():
            if id(x) in certain or (x.is_leaf and not x._backward_hooks):
                self.inputs.append(x)
            elif surroundings.still_hold(x):
                self.doubtful[edge] = x
        # What the field may use, and what gets no gradient all the same.
        self._constants: list[Tensor] = []
        if surroundings.chosen is not None:
            allowed = {id(x) for x in (*surroundings.chosen, *tensors_of(p))}
            every = (*self.inputs, *self.doubtful.values())
            self._constants = [x for x in every if id(x) not in allowed]
            self.inputs = [x for x in self.inputs if id(x) in allowed]
            self.doubtful = {e: x for e, x in self.doubtful.items() if id(x) in allowed}
        self.suspects: list[str] = []
        self._found = found
        self.leaves = self.inputs
        self._stops: set[Edge] | None = None
        self._refused: dict[int, Tensor] = {}
        self._strangers: list[weakref.ref[Tensor]] = []

    def settle(self) -> None:
        """Called when the solve has run: what it has not used so far is no input."""
        self._surroundings.settle()
        used = {id(x) for x in (*self.inputs, *self._constants)}
        unused = [x for x in self._found if id(x) not in used]
        if unused:
            # They would hold on to what has computed them, and to the solves in there.
            self._surroundings.forget(unused)
            self._found = [x for x in self._found if id(x) in used]
        self.doubtful = {}

    @property
    def watch(self) -> Callable[[Tensor], None] | None:
        """Makes inputs of the doubtful tensors that a value depends on, where there are any."""
        return self._look if self.doubtful else None

    def _look(self, value: Tensor) -> None:
        reached: set[Edge] = set()
        graph_leaves((value,), self.doubtful, reached)
        for edge in reached:
            self.inputs.append(self.doubtful.pop(edge))

    @contextmanager
    def sweep(self, replayed: bool) -> Iterator[None]:
        """Everything as the solve saw it, with leaves for the inputs.

        Args:
            replayed: whether the caller compares what it evaluates with what the solve found.

        Raises:
            RuntimeError: a tensor without gradients has been changed in place and nobody compares,
                or a gradient would be lost.
        """
        surroundings = self._surroundings
        changed = {id(x): x for x in surroundings.changed_in_place()}
        changed |= {key: x for key, (x, version) in self._hidden.items() if version != x._version}
        constants = [x for x in changed.values() if not x.requires_grad]
        self.suspects = [self._name(x) for x in constants]
        if constants and not replayed:
            raise RuntimeError(changed_message(self.suspects[0]))
        stand_ins = {id(x): _stand_in(x) for x in self._found if self._needs_stand_in(x)}
        if any(self._needs_stand_in(x) for x, _ in self._hidden.values()):
            raise RuntimeError(
                "the field uses a tensor with hooks that is in no place that can be found: they "
                "would run at every evaluation.\n  Pass it as p=."
            )
        leaves = [stand_ins.get(id(x), x) for x in self.inputs]
        pairs = list(zip(self.inputs, leaves, strict=True))
        self._refused = {id(leaf): x for x, leaf in pairs if id(x) in changed}
        self._stops = {edge_of(leaf) for x, leaf in pairs if id(x) not in changed}
        self._stops |= {edge_of(stand_ins.get(id(x), x)) for x in self._constants}
        self.leaves = leaves
        try:
            with surroundings.as_seen(stand_ins):
                yield
            self._expect_gone()
        finally:
            self.leaves, self._stops, self._strangers = self.inputs, None, []

    @staticmethod
    def _needs_stand_in(x: Tensor) -> bool:
        return not x.is_leaf or bool(x._backward_hooks)

    def expect_known(self, value: Tensor, *own: Tensor) -> None:
        """Check that a value depends on nothing but the inputs.

        Args:
            value: of an evaluation in a sweep.
            own: leaves that were made for it.

        Raises:
            RuntimeError: it uses a tensor that was changed in place.
        """
        if self._stops is None:
            return
        for leaf in graph_leaves((value,), self._stops):
            if any(leaf is x for x in own):
                continue
            if id(leaf) in self._refused:
                raise RuntimeError(changed_message(self._name(self._refused[id(leaf)])))
            # The field may have made it: then it will not outlive the evaluation.
            self._strangers.append(weakref.ref(leaf))

    def _expect_gone(self) -> None:
        """Raise when other leaves are left than those a field makes for an evaluation."""
        if not any(reference() is not None for reference in self._strangers):
            return
        gc.collect()
        late = {id(x): x for x in (reference() for reference in self._strangers) if x is not None}
        # What the field keeps of an evaluation, in an attribute of its own, is not an input.
        kept = [x for x in late.values() if self._surroundings.keeps(x)]
        for x in kept:
            del late[id(x)]
        if late:
            first = next(iter(late.values()))
            raise RuntimeError(
                f"the field uses {len(late)} tensor(s) that need gradients and were not seen at "
                f"t0, the first of shape {tuple(first.shape)}: the gradient would miss them.\n"
                "  Pass them as p=, make the field an nn.Module that owns them, or use "
                "adjoint=DirectAdjoint()."
            )

    def _name(self, x: Tensor) -> str:
        return self._surroundings.names.get(id(x), f"a tensor of shape {tuple(x.shape)}")


def changed_message(name: str) -> str:
    """Says that a tensor has been changed in place."""
    return (
        f"{name} has been changed in place since the solve, and the field is evaluated again: it "
        "would see another value.\n"
        "  Change a copy (x = 3 * x for x.mul_(3)), go backward first, or use "
        "adjoint=DirectAdjoint()."
    )
