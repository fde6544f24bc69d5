"""The outside tensors that a field's result depends on, and their stand-ins during a sweep.

Most of them are leaves, such as parameters, and are differentiated as they are. A tensor that was
computed elsewhere (an encoder's output), or one that has hooks, is replaced in its places by a
detached stand-in while a backward sweep runs. Gradients stop there. The graph beyond runs once,
when their sum leaves the solve.
"""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from pysciml_node.errors import PsnWarning
from pysciml_node.problems.state import tensors_of
from pysciml_node.steps.contents import Contents, is_comparable
from pysciml_node.steps.first_graph import Evaluation, FirstGraph
from pysciml_node.steps.graph import Edge, edge_of, graph_leaves
from pysciml_node.steps.memory import Evaluate, Memory
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.steps.unread import unread
from pysciml_node.steps.usual import Usual, need_stand_in, note_usual, usual_of

_REQUIRES = attrgetter("requires_grad")


def _stand_in(x: Tensor) -> Tensor:
    """A leaf with the same values, of the same class."""
    inner = x.detach()
    return nn.Parameter(inner) if isinstance(x, nn.Parameter) else inner.requires_grad_()


def _is_bare_leaf(x: Tensor) -> bool:
    return x.is_leaf and not x._backward_hooks


def _trainable_in(surroundings: Surroundings) -> list[Tensor]:
    """The tensors that need gradients.

    Raises:
        RuntimeError: one was made in inference mode.
        TypeError: one is not dense.
    """
    trainable = [x for x in surroundings.tensors if x.requires_grad]
    for x in trainable:
        if x.is_inference():
            raise RuntimeError(
                f"{surroundings.names[id(x)]} requires a gradient, but was made in "
                "torch.inference_mode, where tensors can have none.\n"
                "  Make the field outside of it, or solve inside of torch.no_grad()."
            )
        if x.layout is not torch.strided:
            raise TypeError(
                f"{surroundings.names[id(x)]} requires a gradient and has the layout "
                f"{x.layout}, through which only DirectAdjoint hands gradients.\n"
                "  Make it inside of the field, from its indices and values; or solve with "
                "adjoint=DirectAdjoint()."
            )
    return trainable


class _OfGradients:
    """A hook of a tensor that is called where there is a gradient, as in graphs of torch's own."""

    def __init__(self, hook: Callable[[Tensor], Tensor | None]) -> None:
        self._hook = hook

    def __call__(self, gradient: Tensor | None) -> Tensor | None:
        return None if gradient is None else self._hook(gradient)


def _pass_over_nothing(x: Tensor) -> None:
    """Have the hooks of an input not be called where it turns out to have no gradient.

    The node of a solve is an input's, used or not, and torch calls hooks that were registered
    since with `None` there.
    """
    if hooks := x._backward_hooks:
        for key, hook in hooks.items():
            if not isinstance(hook, _OfGradients):
                hooks[key] = _OfGradients(hook)


class Inputs:
    """The tensors outside that receive gradients.

    They are the tensors in the surroundings that need gradients, and every other leaf that the
    first evaluation depends on and that outlives it. (A leaf that a field makes for itself does
    not.) A tensor that escapes this search and turns up in a sweep is refused.

    A computed tensor that the first evaluation does not use is doubtful: it may be left over from
    something else, its graph freed long ago. It becomes an input once the solve uses it.

    Args:
        surroundings: the objects that the field can reach.
        evaluate: the first evaluation.
        p: its tensors are inputs, used or not.
        graph: where it is given, that of the first evaluation is kept and measured.

    Attributes:
        inputs: the outer tensors, in the order of `leaves`.
        leaves: the tensors that stand for them inside a sweep.
        doubtful: tensors that have not been used so far, by their edges.
        first: the values of the first evaluation, detached.
        cut: whether these depend on nothing that has a gradient, not even on the state.
        suspects: in a sweep, the names of constants that have been changed in place. The comparison
            of the steps will tell whether the field uses them.
        changed: in a sweep, the tensors that torch has counted a change of.
        unchanged: in a sweep, whether graphs of the solve itself are those of a replay: nothing has
            been changed in place, and nothing has a stand-in.
    """

    def __init__(
        self,
        surroundings: Surroundings,
        evaluate: Evaluate,
        p: Any,
        graph: FirstGraph | None = None,
    ) -> None:
        usual = usual_of(surroundings)
        trainable = _trainable_in(surroundings) if usual is None else usual.trainable
        self._begin(surroundings, usual, trainable)
        # Leaves are told by themselves. What has hooks is doubtful, as computed tensors are.
        edges: dict[Edge, Tensor] = {}
        leaves = trainable
        if usual is None:
            leaves = [x for x in trainable if _is_bare_leaf(x)]
            edges = {edge_of(x): x for x in trainable if not _is_bare_leaf(x)}
        with surroundings.undisturbed():
            values, fresh = evaluate()
        self._memory = Memory(evaluate, written := surroundings.changed_in_place(), surroundings)
        if written and graph is not None:
            graph.refused = True  # the graphs of such fields serve no sweep
        self.first = tuple(map(Tensor.detach, values))
        self.cut = not any(map(_REQUIRES, values))
        if usual is None or graph is None or not usual.has_graph((values, fresh), graph):
            reached: set[Edge] = set()
            strangers = self._strangers_in((values, fresh), leaves, edges, reached, graph)
            del values, fresh
            self._sort(strangers, leaves, edges, reached, p)

    @classmethod
    def of_usual(cls, surroundings: Surroundings, usual: Usual) -> Inputs:
        """Those of a solve that has run, all of whose evaluations were as earlier ones.

        Args:
            surroundings: as the solve saw them. It has changed nothing there.
            usual: what earlier solves have found out.
        """
        made = cls.__new__(cls)
        made._begin(surroundings, usual, usual.trainable)
        made._memory, made.first, made.cut = Memory.idle(surroundings), (), False
        return made

    def _begin(
        self, surroundings: Surroundings, usual: Usual | None, trainable: list[Tensor]
    ) -> None:
        self._surroundings, self._usual = surroundings, usual
        self.inputs = self.leaves = self._trainable = trainable
        self.doubtful: dict[Edge, Tensor] = {}
        # Tensors that no place has, and those that the field may use, but that get no gradient.
        self._hidden: dict[int, tuple[Tensor, int]] = {}
        self._constants: list[Tensor] = []
        self.suspects: list[str] = []
        self.changed: list[Tensor] = []
        # The leaves that values depend on, in a sweep, by their identities.
        self._known: set[int] | None = None
        self._refused: dict[int, Tensor] = {}
        self._strangers: list[weakref.ref[Tensor]] = []
        self.unchanged = True
        self._contents: Contents | None = None

    def _sort(
        self,
        strangers: list[weakref.ref[Tensor]],
        leaves: Sequence[Tensor],
        edges: dict[Edge, Tensor],
        reached: set[Edge],
        p: Any,
    ) -> None:
        """Tell which tensors are inputs, the values of the first evaluation being let go."""
        surroundings, trainable = self._surroundings, self._trainable
        # Strangers that are still alive belong to somebody, but to no place that was found.
        hidden = [x for x in (reference() for reference in strangers) if x is not None]
        self._hidden = {id(x): (x, x._version) for x in hidden}
        self.inputs = hidden + trainable
        if edges:
            certain = {id(edges[edge]) for edge in reached if edge in edges} | set(map(id, leaves))
            certain |= {id(x) for x in tensors_of(p) if not x._backward_hooks}
            for edge, x in edges.items():
                if id(x) not in certain and surroundings.still_hold(x):
                    self.doubtful[edge] = x
            self.inputs = [*hidden, *(x for x in trainable if id(x) in certain)]
        if surroundings.chosen is not None:
            allowed = {id(x) for x in (*surroundings.chosen, *tensors_of(p))}
            every = (*self.inputs, *self.doubtful.values())
            self._constants = [x for x in every if id(x) not in allowed]
            self.inputs = [x for x in self.inputs if id(x) in allowed]
            self.doubtful = {e: x for e, x in self.doubtful.items() if id(x) in allowed}
        self.leaves = self.inputs
        if hidden:
            self._usual = None
        elif self._usual is None:
            note_usual(surroundings, leaves)

    def _strangers_in(
        self,
        evaluation: Evaluation,
        leaves: Sequence[Tensor],
        edges: dict[Edge, Tensor],
        reached: set[Edge],
        graph: FirstGraph | None,
    ) -> list[weakref.ref[Tensor]]:
        """The leaves that an evaluation depends on and that are not known; it may be kept."""
        values, fresh = evaluation
        known, nodes = {*map(id, leaves), *map(id, fresh)}, set[Any]()
        # What the state was computed from is not the field's.
        stops = edges.keys() | {edge_of(x) for x in fresh if x.grad_fn is not None}
        strangers = [x for x in graph_leaves(values, stops, reached, nodes) if id(x) not in known]
        if graph is not None and not strangers:
            graph.keep(evaluation, nodes, self._surroundings)
            if self._usual is not None:
                self._usual.note(evaluation, graph)
        return [weakref.ref(x) for x in strangers]

    def settle(self) -> None:
        """Called when the solve has run: tensors that it has not used are no inputs."""
        self._memory.settle()
        used = set(map(id, (*self.inputs, *self._constants))) if self._usual is None else None
        if used is not None and not used.issuperset(map(id, self._trainable)):
            unused = [x for x in self._trainable if id(x) not in used]
            # They would keep alive the graphs that computed them, and the solves in those.
            self._surroundings.forget(unused)
            self._trainable = [x for x in self._trainable if id(x) in used]
        self.doubtful = {}
        if self._contents is not None:
            self._contents.settle(self.within_reach())

    def tell_of_cut_graph(self, gradients: Sequence[Tensor | None]) -> None:
        """Warn where no input receives a gradient, which torch itself would raise an error for."""
        if self.cut and all(gradient is None for gradient in gradients):
            warnings.warn(
                "no evaluation of the field depends on a tensor that needs a gradient, so that "
                "none gets one.\n  If the field uses them, something in it cuts the graph: "
                "torch.tensor([...]) does, torch.stack([...]) does not.",
                PsnWarning,
                stacklevel=2,
            )

    @property
    def steady(self) -> bool:
        """Whether graphs of the solve itself can serve its sweep.

        They cannot where the sweep has stand-ins for tensors, where some that require gradients get
        none, where hooks of modules would see graphs, where those of what the field computes would
        be called with nothing in steps that no cotangent arrives at, and where the field keeps what
        it computes, which would then hold them.
        """
        replaced = self._usual is None and (
            self.doubtful
            or self._constants
            or need_stand_in(self._trainable)
            or need_stand_in([x for x, _ in self._hidden.values()])
        )
        return not (
            replaced
            or self._surroundings.hooked
            or self._surroundings.hooks
            or (self._memory.replaces and self._surroundings.keeps_graphs())
        )

    @property
    def usual(self) -> Usual | None:
        """What earlier solves have found out, where this one has run as they did.

        Nothing has changed in it, and its graphs are those of its sweep.
        """
        idle = self._memory.is_idle and not self._surroundings.hooked
        return self._usual if idle and not self._surroundings.hooks else None

    def within_reach(self) -> list[Tensor]:
        """All tensors and arrays that the field may read, as far as they are known."""
        if self._usual is not None:
            return self._usual.reach
        reach = self._surroundings.reach
        return [*reach, *(x for x, _ in self._hidden.values())] if self._hidden else reach

    @property
    def comparable(self) -> list[Tensor]:
        """Those whose values can be compared."""
        reach = self.within_reach()
        return reach if self._usual is not None else [x for x in reach if is_comparable(x)]

    @property
    def all_known(self) -> bool:
        """Whether `within_reach` has all that the field reads."""
        return self._surroundings.plain

    def are_known_unchanged(self) -> bool:
        """Whether all that the field reads is known, and torch has counted no change of it."""
        return (
            self.all_known
            and not (self._hidden or self._surroundings.written)
            and not need_stand_in(self._trainable)
            and not self._surroundings.changed_in_place()
        )

    def remember(self) -> None:
        """Remember the contents of these: the sweep does not take the steps again to compare."""
        self._contents = Contents(self.within_reach())

    def expect_contents(self, passed: Container[int] = ()) -> None:
        """Compare what was remembered with what is there.

        Args:
            passed: the identities of tensors that may have changed.

        Raises:
            RuntimeError: something holds other values.
        """
        if others := self._other_contents(passed):
            self._refuse(others[0])

    def _other_contents(self, passed: Container[int]) -> list[Tensor]:
        others = (x for x in self.within_reach() if id(x) not in passed)
        return [] if self._contents is None else self._contents.changed(others)

    def _refuse(self, x: Tensor) -> NoReturn:
        raise RuntimeError(changed_message(self.name_of(x)))

    @property
    def watch(self) -> Callable[[Tensor], None] | None:
        """Makes inputs of the doubtful tensors that a value depends on, where there are any."""
        return self._look if self.doubtful else None

    def _look(self, value: Tensor) -> None:
        reached: set[Edge] = set()
        graph_leaves((value,), self.doubtful, reached)
        for edge in reached:
            self.inputs.append(self.doubtful.pop(edge))

    def undisturbed(self) -> AbstractContextManager[object]:
        """As of the surroundings: a lock under which no other sweep changes them."""
        return self._surroundings.undisturbed()

    @contextmanager
    def sweep(
        self, replayed: bool, kept: bool = False, later: Iterable[Evaluate] = ()
    ) -> Iterator[None]:
        """Everything as the solve saw it, with leaves for the inputs.

        Args:
            replayed: whether the caller compares its steps with the recorded ones.
            kept: whether the caller may have the graphs of all steps; where it has not, it calls
                `expect_idle`.
            later: as of `expect_idle`.

        Raises:
            RuntimeError: a tensor has been changed in place and nobody compares, where the field
                reads it; an array was, read or not; or a gradient would be lost.
        """
        # One at a time: threads may go backward through one solve.
        with self._surroundings.undisturbed(), self._swept(replayed):
            if not kept:
                self.expect_idle(later, replayed)
            yield

    def expect_idle(self, later: Iterable[Evaluate], several: bool = True) -> None:
        """In a sweep: see `Memory.expect_idle`."""
        self._memory.expect_idle(self.leaves, later, several)

    @contextmanager
    def _swept(self, replayed: bool) -> Iterator[None]:
        """As `sweep`, in one thread."""
        surroundings = self._surroundings
        changed = {id(x): x for x in surroundings.changed_in_place()}
        changed |= {key: x for key, (x, version) in self._hidden.items() if version != x._version}
        constants = [x for x in changed.values() if not x.requires_grad]
        self.suspects, self.changed = [self.name_of(x) for x in constants], [*changed.values()]
        # What torch counts of those that have gradients is looked at where the field uses them.
        others = self._other_contents(changed.keys() | {id(x) for x in surroundings.written})
        for x in others:
            if any(x is array for array in surroundings.arrays):  # which NumPy may read
                self._refuse(x)
        others += [] if replayed else constants
        stand_ins = {id(x): _stand_in(x) for x in self._trainable if need_stand_in((x,))}
        hidden = [x for x, _ in self._hidden.values()]
        if not all(x.requires_grad for x in hidden):
            raise RuntimeError(
                "the field uses a tensor that needed gradients in the solve and does not any more, "
                "and that is in no place that can be found.\n  Pass it as p=, or go backward first."
            )
        if need_stand_in(hidden):
            raise RuntimeError(
                "the field uses a tensor with hooks that is in no place that can be found: they "
                "would run at every evaluation.\n  Pass it as p=."
            )
        self.unchanged = not (changed or stand_ins or surroundings.written)
        self.leaves = [stand_ins.get(id(x), x) for x in self.inputs] if stand_ins else self.inputs
        for x in self.inputs:
            _pass_over_nothing(x)
        self._refused, self._known = {}, set(map(id, self.leaves))
        for x, leaf in zip(self.inputs, self.leaves, strict=True) if changed else ():
            if id(x) in changed:
                self._refused[id(leaf)] = x
                self._known.discard(id(leaf))
        self._known.update(id(stand_ins.get(id(x), x)) for x in self._constants)
        try:
            with surroundings.as_seen(stand_ins), unread(others, self._refuse):
                yield
            self._expect_gone()
        finally:
            self.leaves, self._known, self._strangers = self.inputs, None, []

    def expect_known(self, value: Tensor, *fresh: Tensor) -> None:
        """Check that a value depends on nothing but the inputs.

        Args:
            value: of an evaluation in a sweep.
            fresh: leaves that were made for it.

        Raises:
            RuntimeError: it uses a tensor that was changed in place.
        """
        if self._known is None:
            return
        for leaf in graph_leaves((value,)):
            if id(leaf) in self._known or any(leaf is x for x in fresh):
                continue
            if id(leaf) in self._refused:
                raise RuntimeError(changed_message(self.name_of(self._refused[id(leaf)])))
            # The field may have made it: then it will not outlive the evaluation.
            self._strangers.append(weakref.ref(leaf))

    def _expect_gone(self) -> None:
        """Raise if leaves are left that the field did not make for an evaluation."""
        if all(reference() is None for reference in self._strangers):
            return
        gc.collect()
        late = {id(x): x for x in (reference() for reference in self._strangers) if x is not None}
        # A tensor that the field keeps from an evaluation, in an attribute, is not an input.
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

    def name_of(self, x: Tensor) -> str:
        """What a tensor is called in messages."""
        return self._surroundings.names.get(id(x), f"a tensor of shape {tuple(x.shape)}")


def changed_message(name: str) -> str:
    """The message that a tensor has been changed in place."""
    return (
        f"{name} has been changed in place since the solve, and the field is evaluated again: it "
        "would see another value.\n"
        "  Change a copy (x = 3 * x for x.mul_(3)), go backward first, or use "
        "adjoint=DirectAdjoint()."
    )
