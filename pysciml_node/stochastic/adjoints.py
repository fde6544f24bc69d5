"""Gradients of stochastic solves: the accepted steps replayed backward on the same path.

`discrete_sweep` differentiates each step again, one at a time. `backsolve_sweep` solves the
continuous adjoint equation of a Stratonovich equation backward,

    d lambda = -(df/du)^T lambda dt - (dg/du)^T lambda o dW,

beside the state, by the Euler-Heun scheme on the steps of the forward solve.

Reference: X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, Scalable gradients for stochastic
differential equations, arXiv 2001.01328.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.replay.comparison import Comparison, expect_same
from pysciml_node.solutions.solution import Stats
from pysciml_node.steps.cotangents import BackwardPass, Gradients
from pysciml_node.steps.field import Accumulator
from pysciml_node.steps.graph import pull_back
from pysciml_node.stochastic.brownian import Path
from pysciml_node.stochastic.fields import DifferentiableFields
from pysciml_node.stochastic.kept import KeptPullback
from pysciml_node.stochastic.step import Stepper
from pysciml_node.stochastic.virtual_tree import Increment


class Pullback(Protocol):
    """The discrete adjoint of single steps: `StepPullback`, or another engine's."""

    evaluations: int

    def __call__(
        self,
        t: float,
        start: Tensor,  # (N,)
        motion: Increment,
        upon: Tensor,  # (N,)
        recorded: Tensor | None = None,  # (N,)
    ) -> Tensor:
        """The cotangent of a step's start from that of its end.

        Args:
            t: start of the step.
            start: the vector there.
            motion: the Brownian motion over the step.
            upon: cotangent of the vector at its end.
            recorded: that vector, where the solve has kept it.
        """

    def inputs(self) -> list[Tensor | None]:
        """The sums of gradients for the inputs of the solve."""


class StepPullback(Pullback):
    """Differentiates single steps by autograd.

    Args:
        prepared: the fields with their inputs.
        stepper: the method with these fields.
        sums: gradients of the inputs are added to; default new ones.

    Attributes:
        evaluations: of the drift.
    """

    def __init__(
        self, prepared: DifferentiableFields, stepper: Stepper, sums: Accumulator | None = None
    ) -> None:
        self._prepared, self._stepper = prepared, stepper
        self._sums = Accumulator(prepared.leaves) if sums is None else sums
        self._comparison = Comparison()
        self.evaluations = 0

    @override
    def __call__(
        self,
        t: float,
        start: Tensor,
        motion: Increment,
        upon: Tensor,
        recorded: Tensor | None = None,
    ) -> Tensor:
        prepared = self._prepared
        before = prepared.fields.nfe
        with torch.enable_grad():
            start = start.detach().requires_grad_()
            end, _ = self._stepper.take(t, start, motion)
        prepared.captured.expect_known(end, start)
        if recorded is not None:
            self._comparison.add(end.detach(), recorded, start)
        pulled = pull_back(end, (start, *prepared.leaves), upon)
        self._sums.add(pulled[1:])
        self.evaluations += prepared.fields.nfe - before
        return torch.zeros_like(start) if pulled[0] is None else pulled[0]

    @override
    def inputs(self) -> list[Tensor | None]:
        self._comparison.expect_equal(self._prepared.captured.suspects)
        return self._sums.sums


def discrete_sweep(
    pull: Pullback,
    path: Path,
    backward: BackwardPass,
    stats: Stats,
    kept: KeptPullback | None = None,
) -> Gradients:
    """Pull all cotangents of a solve back to its inputs, through its steps.

    Args:
        pull: the adjoint of single steps.
        path: the Brownian motions of the forward solve.
        backward: its steps, and the cotangents.
        stats: its backward fields are filled.
        kept: the first of the steps, where their graphs were kept.
    """
    record, states = backward.record, backward.states
    cotangent = torch.zeros_like(states[0])
    live = False
    count = 0 if kept is None else len(kept.steps)
    for n in reversed(range(count, len(record.sizes))):
        for extra in backward.entering(n + 1):
            cotangent, live = cotangent + extra, True
        t, total = record.times[n], None
        if live:
            motion = path.increment(t, record.times[n + 1])
            total = pull(t, states[n], motion, cotangent, states[n + 1])
        for at, upon in backward.saved_inside(n):
            part = pull(t, states[n], path.increment(t, at), upon)
            total, live = part if total is None else total + part, True
        if total is not None:
            cotangent = total
            stats.naccept_backward += 1
    through: list[Tensor | None] = []
    if kept is not None and count:
        through = kept.hand_on(cotangent if live else None)
        kept.expect_same(path)
        cotangent = torch.zeros_like(cotangent)
    for extra in backward.entering(0):
        cotangent = cotangent + extra
    stats.nfe_backward += pull.evaluations
    stats.nvjp += pull.evaluations
    return Gradients(u0=cotangent, inputs=pull.inputs(), kept=through)


class _BackwardHeun:
    """Steps of the adjoint equation backward in time, beside the state.

    Args:
        prepared: the fields with their inputs.
        stepper: the method with these fields.
        path: the Brownian motions of the forward solve.

    Attributes:
        sums: the sums of gradients for the inputs.
        steps: number of steps taken.
    """

    def __init__(self, prepared: DifferentiableFields, stepper: Stepper, path: Path) -> None:
        self._prepared, self._fields, self._path = prepared, prepared.fields, path
        self._like = stepper.method.like
        self.sums = Accumulator(prepared.leaves)
        self.steps = 0

    def _rates(
        self, t: float, u: Tensor, costate: Tensor, motion: Increment
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """Changes of state, costate and parameter gradients over the step, backward."""
        prepared, fields = self._prepared, self._fields
        time = self._like.new_full((), t)
        with torch.enable_grad():
            state = u.detach().requires_grad_()
            noise = fields.layout.apply(fields.diffusion(time, state), motion.w)
            change = torch.add(noise, fields.drift(time, state), alpha=motion.h)
        prepared.captured.expect_known(change, state)
        pulled, *leaves = pull_back(change, (state, *prepared.leaves), costate)
        return -change.detach(), torch.zeros_like(u) if pulled is None else pulled, leaves

    def __call__(
        self, start: float, end: float, u: Tensor, costate: Tensor
    ) -> tuple[Tensor, Tensor]:
        """State and costate at `start` from those at `end`, `(N,)` each."""
        motion = self._path.increment(start, end)
        du, dl, leaves = self._rates(end, u, costate, motion)
        du1, dl1, leaves1 = self._rates(start, u + du, costate + dl, motion)
        self.sums.add(leaves, scale=0.5)
        self.sums.add(leaves1, scale=0.5)
        self.steps += 1
        return u + (du + du1) / 2, costate + (dl + dl1) / 2


def backsolve_sweep(
    prepared: DifferentiableFields,
    stepper: Stepper,
    path: Path,
    backward: BackwardPass,
    stats: Stats,
) -> Gradients:
    """Pull all cotangents back by the adjoint equation.

    Args:
        prepared: the fields with their inputs.
        stepper: the method with these fields.
        path: the Brownian motions of the forward solve.
        backward: its steps, and the cotangents.
        stats: its backward fields are filled.
    """
    fields, record, states = prepared.fields, backward.record, backward.states
    before = fields.nfe
    back = _BackwardHeun(prepared, stepper, path)
    u, costate = stepper.state(states[-1]).clone(), torch.zeros_like(stepper.state(states[-1]))
    live = False
    for n in reversed(range(len(record.sizes))):
        t, at = record.times[n], record.times[n + 1]
        for extra in backward.entering(n + 1):
            costate = costate + stepper.state(extra)
            u, live = stepper.state(states[n + 1]), True
        for s, upon in reversed(list(backward.saved_inside(n))):
            if live and s < at:
                u, costate = back(s, at, u, costate)
            if not live:
                start, motion = states[n], path.increment(t, s)
                u, live = stepper.state(stepper.take(t, start, motion)[0]), True
            costate, at = costate + stepper.state(upon), s
        if live:
            u, costate = back(t, at, u, costate)
    for extra in backward.entering(0):
        costate = costate + stepper.state(extra)
    stats.naccept_backward += back.steps
    stats.nvjp += fields.nfe - before
    begin, u0 = stepper.method.like.new_full((), record.times[0]), stepper.state(states[0])
    again = fields.drift(begin, u0), fields.diffusion(begin, u0)
    expect_same(again, prepared.first, prepared.captured.suspects)
    stats.nfe_backward += fields.nfe - before
    if stepper.method.tableau.carry:
        costate = torch.cat((costate, torch.zeros_like(costate)))
    return Gradients(u0=costate, inputs=back.sums.sums)
