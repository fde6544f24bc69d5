"""Solves that go as earlier ones did: of a plain field, in fixed steps that have been noted.

Such a solve is short where it begins. All that the field can reach has been looked through before,
and the tensors that receive gradients have been found; so has what the graph of an evaluation
takes. The steps are taken in one graph. If it turns out that the field has changed something, or
has drawn random numbers, the solve begins again, and finds out all by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.kept import KeptSteps, keeping
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.apart import WentBack
from pysciml_node.steps.field import DifferentiableField, FlatField
from pysciml_node.steps.known import Known
from pysciml_node.steps.randomness import Streams
from pysciml_node.steps.record import Outcome
from pysciml_node.steps.surroundings import Glimpse, Surroundings, all_are_hooked
from pysciml_node.steps.usual import Usual, need_stand_in
from pysciml_node.torch_engine.timetable import Timetable

# The first evaluation alone has been measured, and those behind it may take more: so many times the
# room that they would take.
_ROOM = 8


def note_as_usual(field: DifferentiableField) -> None:
    """Have later solves of a field go as one that has run, if nothing has changed in that."""
    usual, surroundings = field.captured.usual, field.surroundings
    if usual is not None and surroundings.lasts:
        surroundings.memory.setdefault(AsBefore, usual)


class _Otherwise(Exception):
    """A solve does not go as earlier ones did."""


class AsBefore:
    """A solve that goes as earlier ones did.

    Args:
        field: that is evaluated.
        table: the steps.
        known: what earlier solves have found.
        glimpse: what the field can reach.
        usual: what they have found out about its tensors.

    Attributes:
        field: that is evaluated.
        glimpse: what it can reach.
        start: the state where the steps begin.
        keeps_shape: whether the states of the outcome have its own shape, and not `(N,)`.
        inputs: the outer tensors that receive gradients.
        kept: the steps with their graph.
    """

    start: Tensor
    keeps_shape: bool
    kept: KeptSteps

    def __init__(
        self, field: FlatField, table: Timetable, known: Known, glimpse: Glimpse, usual: Usual
    ) -> None:
        self.field, self.glimpse, self.inputs = field, glimpse, usual.trainable
        self._table, self._known, self._usual = table, known, usual
        field.plain = True

    @classmethod
    def of(cls, problem: ODEProblem, table: Timetable) -> AsBefore | None:
        """The solve; `None` where something has changed since, or not enough is known."""
        field = FlatField(problem)
        found = Glimpse.with_note(field.given, cls)
        if found is None:
            return None
        known, glimpse = found
        usual: Usual | None = known.memory[cls]  # another thread may have taken it back
        if usual is None or not usual.stands or all_are_hooked():
            return None
        return cls(field, table, known, glimpse, usual)

    def run(self, u: Tensor, memory: int) -> Outcome | None:
        """Take the steps.

        Args:
            u: the state where they begin, in its own shape where it is one tensor.
            memory: how many bytes graphs may take.

        Returns:
            What the solve leaves, without a graph; `None` if it has to begin again.
        """
        field, usual = self.field, self._usual
        self.keeps_shape = field.keeps_shape
        self.start = start = u if self.keeps_shape else u.view(-1)
        if not start.requires_grad:
            if not self.inputs:
                return None
            start = start.detach().requires_grad_()
        whole = _ROOM * self._table.evaluations * usual.bytes_of(((start,), (start,)))
        if not whole:
            return None
        self.kept = kept = KeptSteps(start, usual.reach, memory, whole)
        if not kept.room:
            return None
        try:
            with keeping:
                outcome = self._taken(start)
        except (_Otherwise, WentBack):
            self._known.memory[AsBefore] = None  # it would begin again each time
            return None
        finally:
            field.settle()
        record, (_, *ends), saved = outcome
        kept.keep_all(ends)
        return Outcome(record, [start.detach(), *(x.detach() for x in ends)], saved)

    def _taken(self, u: Tensor) -> Outcome:
        glimpse, table = self.glimpse, self._table
        evaluate = self.field.shaped if self.keeps_shape else self.field

        def derivative(t: Tensor, state: Tensor) -> Tensor:
            if state is not u:
                return evaluate(t, state)
            with Surroundings.undisturbed():
                streams = Streams(self._known.generators, u.device)
                k = evaluate(t, state)
            # What one evaluation changes the next one may change back.
            if (
                streams.moved()
                or not k.requires_grad
                or (table.evaluations > 1 and glimpse.changed)
            ):
                raise _Otherwise
            return k

        outcome = table.take_recorded(derivative, u)
        if glimpse.changed:
            raise _Otherwise
        return outcome

    def hand_on(
        self, stats: Stats, cotangents: Sequence[Tensor | None]
    ) -> list[Tensor | None] | None:
        """Hand what arrives at the ends of the steps on to their graph, if that is of a replay.

        Args:
            stats: its backward fields are filled.
            cotangents: of the ends.

        Returns:
            The cotangents in the graph; `None` where something has changed since.
        """
        with Surroundings.undisturbed():
            changed = self.glimpse.counted or need_stand_in(self.inputs)
            if changed or not self.kept.reads_same(self._usual.reach):
                return None
        tableau = self._table.method.tableau
        taken = max(n for n, x in enumerate(cotangents, 1) if x is not None)
        stats.nvjp += taken * (tableau.stages - tableau.fsal)
        stats.naccept_backward += taken
        return self.kept.hand_on(cotangents)

    def prepared(self, t: Tensor) -> DifferentiableField:
        """The field as the solve saw it, for a sweep that takes the steps again.

        Args:
            t: where they begin.
        """
        return DifferentiableField.of_usual(self.field, self.glimpse.surroundings(), self._usual, t)
