"""Members that step by an explicit Runge-Kutta method, or by an implicit one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.implicit import MakeStages, RosenbrockStages
from pysciml_node.replay.members.limits import StepLimits
from pysciml_node.replay.members.moving import MovingEnds, StepMoves
from pysciml_node.replay.members.stages import MemberStages
from pysciml_node.replay.stages import Method
from pysciml_node.torch_engine.members.crossings import Crossings, Steps
from pysciml_node.torch_engine.members.march import MembersMarch
from pysciml_node.torch_engine.members.stops import Stops
from pysciml_node.torch_engine.members.tape import Tape, Tried


class StagesMarch(MembersMarch):
    """Steps of an explicit Runge-Kutta method, or of an implicit one.

    Args:
        method: the method.
        field: the field of all members.
        options: step control.
        tape: is told of accepted steps.
        recorded: whether autograd is to follow.
        kind: makes its stages.
        moving: the ends of the intervals, where they receive gradients through the steps.
        crossings: watch for events, where there are any.
        stops: where steps end; default those of the options.
    """

    def __init__(
        self,
        method: Method,
        field: MembersField,
        options: MemberOptions,
        tape: Tape,
        recorded: bool,
        kind: MakeStages = MemberStages,
        moving: MovingEnds | None = None,
        crossings: Crossings | None = None,
        stops: Stops | None = None,
    ) -> None:
        super().__init__(method.nodes, method.tableau.error_order, field, options, tape, stops)
        self.method, self.recorded, self.kind = method, recorded, kind
        self.moving, self.crossings = moving, crossings
        self.limits = StepLimits(options, method.nodes.dtype)
        self.stages: MemberStages

    @property
    @override
    def order(self) -> float:
        return self.method.tableau.order

    @override
    def _renew(self) -> None:
        rows, p = self.live.rows, self.field.parameters(self.live.rows)
        if self._tries:
            self.stages.go_on(rows, p, self.u)
        else:
            self.stages = self.kind(self.method, self.field, rows, p, self.u, self.recorded)

    @override
    def _first_stages(self) -> None:
        # A Rosenbrock step evaluates the field at its start with the Jacobian.
        if not isinstance(self.stages, RosenbrockStages):
            super()._first_stages()

    @override
    def _begin(self, h: Array, landing: bool) -> None:
        live = self.live
        # Rounding leads out of the interval at its end alone.
        limits = None
        if landing or self.limits.stops or not self.method.nodes_inside:
            limits = self.limits(live.rows, live.t, h)
        self.stages.begin(self.u, live.t, h, limits)
        if self.moving is not None:
            last = self._lands & self.stops.last(live.stop)
            self._move(self.stages, StepMoves(live.rows, live.stop == 0, self._lands, last))

    def _move(self, stages: MemberStages, moves: StepMoves) -> None:
        if self.moving is not None:
            stages.move(*self.moving.of_steps(moves))

    @override
    def _cut(self, u1: Tensor, steps: Steps, accepted: Array) -> Array | None:
        if self.crossings is None or not accepted.any():
            return None
        cut = self.crossings.look(self.stages, self.k, u1, steps.at(np.flatnonzero(accepted)))
        if cut is None:
            return None
        live, places = self.live, cut.places
        ended = np.isin(np.arange(len(accepted)), places)
        # Taken again with the shorter size: the state at the event is the step's own result.
        rows, t = live.rows[places], live.t[places]
        h = self._sizes_from(rows, t, cut.theta * steps.h[places])
        index = torch.from_numpy(places).to(u1.device)
        u = self.u.index_select(0, index)
        p = self.field.parameters(rows)
        stages = self.kind(self.method, self.field, rows, p, u, self.recorded)
        stages.begin(u, t, h, self.limits(rows, t, h))
        nowhere = np.zeros(len(rows), dtype=bool)
        self._move(stages, StepMoves(rows, live.stop[places] == 0, nowhere, nowhere))
        stages.know(self.k.index_select(0, index))
        end = stages.solution(with_error=False)
        every, error = np.arange(len(rows)), self._last.error[places]
        number = live.naccept[places]
        self.tape.step(stages, end, Tried(rows, t, h, t + h, error, None, number, ~nowhere))
        self.crossings.note(Steps(rows, every, t, h, t + h), u, end)
        self.u = self.u.index_copy(0, index, end)
        return ended
