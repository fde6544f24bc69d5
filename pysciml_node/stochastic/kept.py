"""Steps of a stochastic solve whose graphs are kept for its backward sweep.

They are one graph, as those of ordinary equations are (`replay/kept.py`). The states at times
inside of a step, shorter steps from its start, are parts of it too.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.replay.comparison import Comparison
from pysciml_node.replay.kept import KeptStep, KeptSteps
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.apart import WentBack
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.first_graph import FirstGraph
from pysciml_node.stochastic.brownian import Path
from pysciml_node.stochastic.fields import DifferentiableFields
from pysciml_node.stochastic.step import Motion, SDEMethod, Stepper, Taken


def evaluations_of(method: SDEMethod, adaptive: bool) -> int:
    """How many times a step evaluates drift and diffusion, at most."""
    return max(method.for_error if adaptive else method.for_step)


class KeptStepper(Stepper):
    """Takes the steps of a forward solve, and keeps them with their graph while there is room.

    Args:
        plain: takes them without a graph.
        graph: that of the first evaluation.
        kept: receives the accepted steps.
    """

    def __init__(self, plain: Stepper, graph: FirstGraph, kept: KeptSteps) -> None:
        super().__init__(plain.method, plain.fields)
        self._plain, self._kept = plain, kept
        assert graph.evaluation is not None
        drift, diffusion = graph.evaluation[0]
        # In the graph: drift and diffusion at the start of the solve, where the next step begins,
        # where it ends, and the states inside of it.
        self._first: tuple[Tensor, Tensor] | None = (drift, diffusion)
        self._state = kept.start
        self._end: Tensor | None = None
        self._inside: list[Tensor] = []
        self._recording = kept.room > 0

    @override
    def take(
        self,
        t: float | Tensor,
        vector: Tensor,
        motion: Motion,
        with_error: bool = False,
        first: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Taken]:
        if first is not None and self._first is not None:
            first = self._first
        self._first = None
        if self._recording:
            try:
                with torch.enable_grad():
                    end, taken = self._plain.take(t, self._state, motion, with_error, first)
            except WentBack:
                # Without a graph there is nothing that a derivative inside could come to.
                self._stop()
            else:
                self._end = end
                return end.detach(), taken
        if first is not None:
            first = first[0].detach(), first[1].detach()
        return self._plain.take(t, vector, motion, with_error, first)

    def _stop(self) -> None:
        """Keep neither this step nor those behind it."""
        self._recording = False
        self._end, self._inside = None, []

    @override
    def inside(self, t: float, vector: Tensor, motion: Motion) -> Tensor:
        if self._recording and self._kept.room < len(self._inside) + 2:
            self._stop()
        if not self._recording:
            return super().inside(t, vector, motion)
        end = self._end
        value = super().inside(t, vector, motion)
        if self._recording:
            assert self._end is not None
            self._inside.append(self._state if value is vector else self._end)
            self._end = end
        return value

    @override
    def leave(self) -> None:
        if self._end is None:
            return
        self._kept.add(KeptStep(self._end, self._inside), (self._end,), 1 + len(self._inside))
        self._state, self._end, self._inside = self._end, None, []
        self._recording = self._kept.room > 0


class KeptPullback:
    """Hands cotangents to the first steps of a solve, whose graph was kept.

    Args:
        prepared: the fields with their inputs.
        stepper: the method with these fields.
        kept: the steps.
        backward: the solve, and the cotangents that arrive at it.
        stats: its backward fields are filled.
    """

    def __init__(
        self,
        prepared: DifferentiableFields,
        stepper: Stepper,
        kept: KeptSteps,
        backward: BackwardPass,
        stats: Stats,
    ) -> None:
        self._prepared, self._stepper, self._kept = prepared, stepper, kept
        self._backward, self._stats = backward, stats
        self.steps: list[KeptStep] = []

    def take(self) -> None:
        """Take the steps into hand, where their graph is that of a replay."""
        captured, backward = self._prepared.captured, self._backward
        self.steps = self._kept.take(captured, backward)
        if len(self.steps) < len(backward.record.sizes):
            captured.expect_idle(self._prepared.later(backward))

    def sweep(self) -> Gradients | None:
        """The whole sweep, where all steps were kept and nothing has changed."""
        steps = self._kept.take_all(self._prepared.captured, self._backward)
        if steps is None:
            return None
        self.steps = steps
        through = self.hand_on(None)
        u0 = torch.zeros_like(self._backward.states[0])
        for extra in self._backward.entering(0):
            u0 = u0 + extra
        return Gradients(u0=u0, inputs=[None] * len(self._prepared.leaves), kept=through)

    def hand_on(self, behind: Tensor | None) -> list[Tensor | None]:
        """What arrives at the ends of steps and inside of them, for torch to pull back.

        Args:
            behind: the cotangent of the last one's end, from the steps behind it, where it is not
                zero.
        """
        backward, steps = self._backward, self.steps
        ends: list[Tensor | None] = []
        inner: list[Tensor | None] = []
        count = whole = partial = 0  # of the steps, and of those taken to the end and to the inside
        for n, step in enumerate(steps):
            arriving, inside = backward.entering(n + 1), backward.inside(n)
            if behind is not None and n + 1 == len(steps):
                arriving.append(behind)
            ends.append(functools.reduce(torch.add, arriving) if arriving else None)
            inner += [None] * len(step.inner) if inside is None else inside.unbind()
            if arriving or inside is not None:
                count, whole = n + 1, n + bool(arriving)
                partial += 0 if inside is None else len(inside)
        del steps[count:]
        drifts, _ = self._stepper.method.needed
        used = sum(stage is not None for stage in drifts)
        self._stats.nvjp += used * (whole + partial)
        self._stats.naccept_backward += count
        return self._kept.placed(ends, inner)

    def expect_same(self, path: Path) -> None:
        """Take the first and the last of the steps again: they must end where they did.

        Of fields all of whose tensors have been compared that would say nothing.
        """
        captured, fields = self._prepared.captured, self._prepared.fields
        if captured.all_known or not self.steps:
            return
        record, states = self._backward.record, self._backward.states
        before, comparison = fields.nfe, Comparison()
        for n in sorted({0, len(self.steps) - 1}):
            motion = path.increment(*record.times[n : n + 2])
            with torch.no_grad():
                again, _ = self._stepper.take(record.times[n], states[n], motion)
            comparison.add(again, states[n + 1], states[n])
        comparison.expect_equal(captured.suspects)
        self._stats.nfe_backward += fields.nfe - before
