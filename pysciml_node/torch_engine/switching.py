"""Steps of two methods, of which the stiffness of the problem chooses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import override

from pysciml_node.replay.stages import Stages
from pysciml_node.steps.loop import MarchOptions
from pysciml_node.steps.step import Step
from pysciml_node.torch_engine.march import March

# The limits of OrdinaryDiffEq.jl's AutoSwitch: the share of the stability radius above which a step
# is stiff, how many in a row are not yet enough, and what becomes of the size.
SHARE = 0.9
MOST_STIFF = 10
MOST_SMOOTH = 3
FACTOR = 2.0


def march_of(
    parts: Sequence[Stages],
    u: Tensor,
    t0: float,
    t1: float,
    options: MarchOptions,
    k: Tensor | None = None,
) -> March:
    """The steps of one method, or of an explicit and a stiff one.

    Args:
        parts: the stages of each.
        u: as of `March`, and so are the others.
        t0: start.
        t1: end.
        options: step control.
        k: derivative at the start, where it is known.
    """
    if len(parts) == 1:
        return March(parts[0], u, t0, t1, options, k)
    return SwitchingMarch(parts, u, t0, t1, options, k)


class SwitchingMarch(March):
    """Steps of an explicit method, and of a stiff one while the problem is stiff.

    Args:
        parts: the stages of both, the explicit one's first.
        u: as of `March`, and so are the others.
        t0: start.
        t1: end.
        options: step control.
        k: derivative at the start, where it is known.
    """

    def __init__(
        self,
        parts: Sequence[Stages],
        u: Tensor,
        t0: float,
        t1: float,
        options: MarchOptions,
        k: Tensor | None = None,
    ) -> None:
        super().__init__(parts[0], u, t0, t1, options, k)
        self.parts = parts
        radius = parts[0].method.tableau.stability_radius
        assert radius is not None
        self.limit = SHARE * radius
        self.current = 0
        # The attempts in a row that were stiff; those that were not count below zero.
        self.run = 0
        self.eigenvalue = 0.0

    @override
    def take(self, proposed: float, lands: bool) -> Step:
        step = super().take(proposed, lands)
        step.method = self.current
        self.eigenvalue = self.stages.largest_eigenvalue(step.time, step.size, step.u)
        return step

    @override
    def turn(self, h: float) -> float:
        if self.last is None:
            return h
        # What is not finite counts as stiff.
        stiff = not abs(h) * self.eigenvalue <= self.limit
        self.run = max(self.run, 0) + 1 if stiff else min(self.run, 0) - 1
        adaptive = self.options.controller.adaptive
        if self.current == 0 and self.run > MOST_STIFF:
            self._change()
            return h * FACTOR if adaptive else h
        if self.current == 1 and self.run < -MOST_SMOOTH:
            self._change()
            return h / FACTOR if adaptive else h
        return h

    def _change(self) -> None:
        """Go on with the other method."""
        self.current = 1 - self.current
        self.stages = self.parts[self.current]
        self.stages.count = 0
        # The last slope of a stiff method is the derivative but for what an iteration has left.
        self.k = None
        # Its error has another order.
        self.sizes = self.options.controller.start(self.error_order)
