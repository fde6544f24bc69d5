"""What is found out once about the tensors that a plain field can read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

from torch import Tensor

from pysciml_node.steps.contents import is_comparable
from pysciml_node.steps.first_graph import Evaluation, FirstGraph
from pysciml_node.steps.surroundings import Surroundings

_REQUIRES, _SHAPE = attrgetter("requires_grad"), attrgetter("shape")
_IS_LEAF, _HOOKS = attrgetter("is_leaf"), attrgetter("_backward_hooks")


class Usual(NamedTuple):
    """The tensors of a plain field, all of them leaves without hooks.

    Solves of one field begin with the same walk while nothing has changed (see `known`), and with
    this while the same tensors need gradients: a graph of the field leads to these, and to no
    others.

    Attributes:
        tensors: all that the field can read.
        flags: for each, whether it needs gradients.
        trainable: those that do.
        reach: all of them, and the arrays.
        graphs: the bytes that first evaluations take, by what these depend on; they
            call no function of others.
    """

    tensors: list[Tensor]
    flags: list[bool]
    trainable: list[Tensor]
    reach: list[Tensor]
    graphs: dict[Any, int]

    @property
    def stands(self) -> bool:
        """Whether the same tensors need gradients now."""
        return list(map(_REQUIRES, self.tensors)) == self.flags

    def bytes_of(self, evaluation: Evaluation) -> int:
        """The bytes that such an evaluation takes; 0 where earlier solves have had none."""
        return self.graphs.get(self._key(evaluation), 0)

    def has_graph(self, evaluation: Evaluation, graph: FirstGraph) -> bool:
        """Whether earlier solves have had such an evaluation, which is then kept."""
        measured = 0 if graph.refused else self.bytes_of(evaluation)
        if measured:
            graph.take(evaluation, measured)
        return measured > 0

    def note(self, evaluation: Evaluation, graph: FirstGraph) -> None:
        """Note how many bytes an evaluation takes that has been kept."""
        if graph.evaluation is not None:
            self.graphs[self._key(evaluation)] = graph.bytes

    def _key(self, evaluation: Evaluation) -> Any:
        """What these depend on: through `.data` a tensor is given another shape."""
        values, (start,) = evaluation
        return *(x.nbytes for x in values), start.is_leaf, *map(_SHAPE, self.tensors)


def usual_of(surroundings: Surroundings) -> Usual | None:
    """What earlier solves have found out; `None` where that is nothing, or does not hold."""
    usual: Usual | None = surroundings.memory.get(Usual)
    if usual is None or usual.tensors is not surroundings.tensors:
        return None
    return usual if usual.stands else None


def need_stand_in(tensors: Sequence[Tensor]) -> bool:
    """Whether a tensor that gets a gradient is not to be differentiated as it is."""
    # A parameter may have been frozen since the solve, which it was a part of.
    return not (
        all(map(_IS_LEAF, tensors))
        and all(map(_REQUIRES, tensors))
        and not any(map(_HOOKS, tensors))
    )


def note_usual(surroundings: Surroundings, leaves: Iterable[Tensor]) -> None:
    """Note what a solve has found out, where a later one can begin with it.

    Args:
        surroundings: of the field.
        leaves: the leaves without hooks among the tensors that need gradients.
    """
    tensors, reach, trainable = surroundings.tensors, surroundings.reach, [*leaves]
    flags = list(map(_REQUIRES, tensors))
    if (
        surroundings.lasts
        and surroundings.plain
        and surroundings.chosen is None
        and len(trainable) == sum(flags)
        and all(map(is_comparable, reach))
    ):
        surroundings.memory[Usual] = Usual(tensors, flags, trainable, reach, {})
