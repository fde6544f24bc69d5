"""Steps of a forward solve whose graphs are kept for its backward sweep.

Each step has a graph of its own, from its state, and from its first stage where the step before has
evaluated it, to its end and its stages. A rejected attempt leaves nothing behind. A step whose
graph was not kept is taken again by the sweep.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.replay.adjoint_recorded import Totals
from pysciml_node.replay.stages import Method, Stages
from pysciml_node.replay.vectors import Real, RecordedVectors
from pysciml_node.steps.autograd import graph_is_retained
from pysciml_node.steps.cotangents import StepBack, StepCotangents
from pysciml_node.steps.field import DifferentiableField
from pysciml_node.steps.inputs import Evaluation, Inputs, pull_back_all

_solves = threading.local()


@contextmanager
def keeping() -> Iterator[None]:
    """A context for a solve whose graphs are kept: solves inside of its field keep none.

    Theirs would live in its own, as many times as it evaluates the field.
    """
    _solves.keeping = True
    try:
        yield
    finally:
        _solves.keeping = False


def may_keep() -> bool:
    """Whether no solve around this one keeps graphs, in this thread."""
    return not getattr(_solves, "keeping", False)


@dataclass(frozen=True)
class KeptStep:
    """An accepted step with its graph.

    Attributes:
        state: the leaf that stands for the state at its start, `(N,)`.
        first: the leaf that stands for its first stage, where that was known.
        end: the state at its end.
        stages: the stages that were evaluated, `(N,)` each.
    """

    state: Tensor
    first: Tensor | None
    end: Tensor
    stages: list[Tensor]

    def known_to(self, captured: Inputs) -> bool:
        """Whether its graph leads to nothing but its start and the field's inputs."""
        leaves = captured.unknown_leaves((self.end, *self.stages))
        return all(any(leaf is x for x in (self.state, self.first)) for leaf in leaves)


class KeptSteps:
    """The accepted steps of a solve with their graphs, as many as there is room for.

    Args:
        room: how many evaluations of the field may be kept.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self._steps: list[KeptStep] = []

    def add(self, step: KeptStep) -> None:
        """Keep the next step."""
        self._steps.append(step)
        self.room -= len(step.stages)

    def take(self, captured: Inputs) -> list[KeptStep]:
        """The first steps, where their graphs are those of a replay.

        They are let go here, unless the graph of the solve is retained.
        """
        steps = self._steps.copy()
        if not graph_is_retained():
            self._steps.clear()
        if captured.unchanged and all(step.known_to(captured) for step in steps):
            return steps
        return []


class KeptStages(Stages):
    """The stages of explicit steps, which are kept with their graphs while there is room.

    Args:
        plain: the stages that are taken where there is no room.
        field: the derivative.
        begun: the state at the start and the derivative there, with its graph.
        kept: receives the accepted steps.
    """

    def __init__(
        self,
        plain: Stages,
        field: DifferentiableField,
        begun: Evaluation,
        kept: KeptSteps,
    ) -> None:
        def copied(t: Tensor, u: Tensor) -> Tensor:
            # The memory of a value may be the field's, and used again.
            return field.field(t, u).clone()

        super().__init__(plain.method, copied, plain.marks, RecordedVectors())
        self._plain, self._kept = plain, kept
        self._begun: Evaluation | None = begun
        self._state: Tensor | None = None
        self._first: Tensor | None = None
        self._end: Tensor | None = None
        self._recording = True
        self._go_on()

    def _go_on(self) -> None:
        """Begin another step: without its graph, if there is no room for it."""
        self._state = self._first = self._end = None
        if self._recording and self._kept.room < self.method.all_stages:
            self._recording = False
            self.field, self.vectors = self._plain.field, self._plain.vectors

    def _leaf(self, u: Tensor) -> Tensor:
        """What stands for the state at the step's start."""
        if self._state is None:
            self._state = u.detach().requires_grad_()
        return self._state

    @override
    def start(self, t: Real, h: Real, u: Tensor) -> Tensor:
        if not self._recording:
            return super().start(t, h, u)
        with torch.enable_grad():
            k1 = self.field(self.times(t, h)[0], self._leaf(u))
        super().begin(k1)
        return k1

    @override
    def begin(self, k1: Tensor) -> None:
        if self._recording and self._begun is not None:
            ((value,), (self._state,)), self._begun = self._begun, None
            with torch.enable_grad():
                k1 = value.clone()
        elif self._recording:
            k1 = self._first = k1.detach().clone().requires_grad_()
        super().begin(k1)

    @override
    def evaluate(self, t: Real, h: Real, u: Tensor, upto: int) -> Tensor | None:
        if not self._recording or u is self._state:  # which is of a solution
            return super().evaluate(t, h, u, upto)
        with torch.enable_grad():
            return super().evaluate(t, h, self._leaf(u), upto)

    @override
    def solution(self, t: Real, h: Real, u: Tensor, with_error: bool) -> Tensor:
        if not self._recording:
            return super().solution(t, h, u, with_error)
        with torch.enable_grad():
            self._end = super().solution(t, h, self._leaf(u), with_error)
        return self._end.detach()

    @override
    def leave(self, goes_on: bool) -> Tensor | None:
        if self._recording:
            assert self._state is not None
            assert self._end is not None
            stages = [self.vectors.get(i) for i in range(self.count)]
            self._kept.add(KeptStep(self._state, self._first, self._end, stages))
        k = super().leave(goes_on)
        self._go_on()
        return None if k is None else k.detach()


class KeptPullback:
    """Pulls cotangents back through the steps whose graphs were kept, the last one first.

    Args:
        field: the field prepared for gradients.
        method: the method of the forward solve.
        marks: start, stops and end of the solve.
        steps: the first steps of the solve.
        totals: receives what is pulled back to the field's inputs, and compares the field.
    """

    def __init__(
        self,
        field: DifferentiableField,
        method: Method,
        marks: tuple[float, ...],
        steps: list[KeptStep],
        totals: Totals,
    ) -> None:
        self.field, self.method, self.steps, self.totals = field, method, steps, totals
        self._stages = Stages(method, field.field, marks, RecordedVectors())
        self._looked = False
        # The cotangent of the first stage of the step behind, which is the last one's stage.
        self._behind: Tensor | None = None

    def __call__(self, step: StepBack) -> StepCotangents:
        """Pull the last of the steps back, and let go of its graph."""
        kept, behind = self.steps.pop(), self._behind
        if not self._looked:
            self._look_behind(step, kept)
        method, h, inside = self.method, step.h, step.inside
        outputs, cotangents = [kept.end], [step.end]
        if inside is not None:
            weights = method.dense_weights(step.theta)
            outputs += kept.stages
            cotangents += (h * (weights.T @ inside)).unbind()
        if behind is not None:
            assert method.end_stage is not None
            outputs.append(kept.stages[method.end_stage])
            cotangents.append(behind)
        starts = [kept.state] if kept.first is None else [kept.state, kept.first]
        gradients = pull_back_all(outputs, [*starts, *self.field.leaves], cotangents)
        state_bar, *others = gradients
        self._behind = others.pop(0) if kept.first is not None else None
        self.totals.sums.add(others)
        used = method.stages - method.tableau.fsal + (behind is not None)
        if inside is not None:
            used = len(kept.stages)
        self.totals.nvjp += used - (kept.first is not None)
        u_bar = torch.zeros_like(step.u) if state_bar is None else state_bar
        if inside is not None:
            u_bar = u_bar + inside.sum(0)
        if not self.steps:
            self._expect_same(step)
        return StepCotangents(u_bar)

    def _look_behind(self, step: StepBack, kept: KeptStep) -> None:
        """Evaluate the field at the last step again, where it may depend on more than at the start.

        What it adds to the state is compared, as of a step that is replayed.
        """
        self._looked = True
        end = self.method.end_stage
        i, u = (0, step.u) if end is None or end >= len(kept.stages) else (end, step.u1)
        if not (i or self.steps):
            return  # at the start, where it will be evaluated
        with torch.no_grad():
            again = self.field.field(self._stages.times(step.t, step.h)[i], u)
            self.totals.comparison.add(u + step.h * again, u + step.h * kept.stages[i], u)

    def _expect_same(self, step: StepBack) -> None:
        """Evaluate the field at the start again: it must be as it was."""
        field = self.field
        with torch.no_grad():
            again = field.field(self.method.nodes.new_tensor(step.t), step.u)
        self.totals.comparison.add_value(again, field.k0)
