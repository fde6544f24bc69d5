"""One batched solve: the ways to run it, with and without gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.adjoints import DirectAdjoint
from pysciml_node.algorithms.explicit import Algorithm
from pysciml_node.algorithms.options import MemberOptions
from pysciml_node.problems.ensemble import Array, EnsembleProblem
from pysciml_node.problems.state import moves, recording
from pysciml_node.replay.members.field import GraphWatch, MembersField
from pysciml_node.replay.members.moving import MovingEnds, StepMoves
from pysciml_node.replay.members.node import MembersNode, Sweep
from pysciml_node.replay.members.stacked import (
    MemberEvents,
    MemberSteps,
    StackedMembers,
    good_steps,
)
from pysciml_node.replay.vectors import settle_heap
from pysciml_node.solutions.solution import ReturnCode
from pysciml_node.steps.graph import graph_leaves, pull_back
from pysciml_node.steps.guard import guard
from pysciml_node.steps.inputs import Inputs
from pysciml_node.steps.memory import Evaluate
from pysciml_node.steps.overwritten import Overwritten
from pysciml_node.steps.randomness import Streams, expect_repeatable
from pysciml_node.steps.surroundings import Surroundings
from pysciml_node.torch_engine.members.march import MembersMarch
from pysciml_node.torch_engine.members.sweep import Again, Replay, members_sweep
from pysciml_node.torch_engine.members.tape import SavedPlaces, Tape
from pysciml_node.translation.saved import Numbers, numbers_put_back

NAME = "torch"


class OneByOne(Exception):
    """The members have to be solved one after the other."""


class Batch(ABC):
    """The parts of a batched solve, made once, and the ways to run it.

    Args:
        ensemble: what is solved.
        algorithm: how.
        options: of all, and of each.
        field: of all members.
        u0: what is stepped, at the starts, `(M, N)`.
        nodes: of the method; times have their dtype and device.
    """

    def __init__(
        self,
        ensemble: EnsembleProblem,
        algorithm: Algorithm,
        options: MemberOptions,
        field: MembersField,
        u0: Tensor,
        nodes: Tensor,
    ) -> None:
        self.ensemble, self.algorithm, self.options = ensemble, algorithm, options
        # Ends of the intervals that receive gradients.
        self.moving: MovingEnds | None = None
        if ensemble.tspan is not None and moves(ensemble.tspan) and recording():
            self.moving = MovingEnds.of(ensemble.tspan)
        # A copy: a field that works in place is refused, and has not changed the caller's tensor.
        self.u0 = u0.clone()
        self.field, self.nodes = field, nodes
        settle_heap()
        self.surroundings = self._before = Surroundings(self.field.given)
        if self.surroundings.lazy or (self.surroundings.hooked and not ensemble.batched):
            # Lazy modules take their shapes from one member; hooks are called for each.
            raise OneByOne
        if not ensemble.batched:
            self._begin()

    def _begin(self) -> None:
        """Evaluate one member by itself: what a field makes at first, and keeps, is a member's.

        Made inside of `torch.vmap` it would serve no later evaluation, be it in a place that a walk
        does not come to.
        """
        self._streams = Streams(self.surroundings.generators, self.u0.device)
        self._numbers = Numbers(self.surroundings.tensors)
        with self.surroundings.undisturbed(), torch.set_grad_enabled(recording()):
            try:
                self.alone(0, recording())
            except Exception as error:  # it is raised again by the member
                self._refuse(error)
            if self._streams.moved():
                self._refuse()  # each member draws its own
            self._numbers.put_back()
            self.surroundings = Surroundings(self.field.given)

    @abstractmethod
    def march(self, tape: Tape, recorded: bool) -> MembersMarch:
        """The time loop."""

    @abstractmethod
    def again(self) -> Again:
        """Takes its steps again."""

    @abstractmethod
    def alone(self, m: int, recorded: bool = False) -> Tensor:
        """What the field of a member gives at its start, by itself.

        Args:
            m: its number.
            recorded: whether the state is to require gradients.
        """

    @abstractmethod
    def differing(self, k: Tensor) -> int | None:
        """A member whose derivative alone is another than in the batch, if any."""

    # What is handed back; and whether states of steps that nobody asks for may be let go.
    result: type[StackedMembers] = StackedMembers
    lets_go = True

    def events(self) -> MemberEvents | None:
        """The events that have ended members, where any are watched."""
        return None

    def counts(self) -> dict[str, Array]:
        """Evaluations by each member, as fields of `Stats`."""
        return {"nfe": self.field.nfe.copy()}

    def solve(self) -> StackedMembers:
        """Run it with or without gradients."""
        if not recording():
            return self._run(self._first(), False)
        if isinstance(self.options.common.adjoint, DirectAdjoint):
            with self.surroundings.undisturbed():
                return self._run(self._first(), True)
        return self._node()

    def _evaluate(self, u: Tensor, t: Tensor) -> Tensor:
        """The field of all members at their starts."""
        return self.field(t, u, self.field.given["p"])

    def _starts(self) -> Tensor:
        starts = torch.from_numpy(self.options.spans[0])
        if self.moving is not None:
            starts = starts + self.moving.ends[:, 0]
        return starts.to(self.nodes)

    def _first(self) -> Tensor:
        """Derivatives at the starts, the field having been looked at."""
        t = self._starts()

        def evaluate() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            return (self._attempt(self.u0, t),), ()

        (k,), _ = self._checked(evaluate)()
        self._expect_alike(k)
        return k

    def _checked(self, evaluate: Evaluate) -> Evaluate:
        adaptive = self.options.common.controller.adaptive
        if not adaptive and not recording():
            return evaluate
        who = "an adaptive solve" if adaptive else "its backward pass"
        return expect_repeatable(self.surroundings, self.u0.device, evaluate, who)

    def _attempt(self, u: Tensor, t: Tensor) -> Tensor:
        if self.ensemble.batched:
            return self._evaluate(u, t)
        watch = GraphWatch()
        try:
            if recording():
                with watch:
                    k = self._evaluate(u, t)
                self._expect_pulled(k, u)
            else:
                k = self._evaluate(u, t)
        except Exception as error:
            # Whatever vmap cannot do; what the field itself raises, one member raises again.
            self._refuse(error)
        if watch.seen or self.surroundings.keeps_mapped():
            self._refuse()
        return k

    @staticmethod
    def _expect_pulled(k: Tensor, u: Tensor) -> None:
        """Pull a zero back: the graph has to work outside of `torch.vmap`.

        That of a checkpoint, which evaluates parts of the field again, does not.
        """
        pull_back(k, [u] if u.requires_grad else graph_leaves((k,), ()), torch.zeros_like(k))

    def _refuse(self, error: Exception | None = None) -> NoReturn:
        """Leave everything as it was before the batch, for the members one by one."""
        self._streams.put_back()
        self._numbers.put_back()
        self._before.put_back()
        raise OneByOne from error

    def _expect_alike(self, k: Tensor) -> None:
        with numbers_put_back(self.surroundings.tensors):
            m = self.differing(k)
        self.field.restart()
        if m is None:
            return
        if not self.ensemble.batched:
            self._refuse()
        raise ValueError(
            f"the field treats members not each for itself: member {m} has another derivative in "
            "the batch than alone.\n"
            "  Let it work along the axes after the first, or leave batched=True out."
        )

    def _march(self, k: Tensor, recorded: bool) -> tuple[MembersMarch, Tape]:
        u0 = self.u0 if recorded else self.u0.detach()
        kept = recording() or not self.lets_go
        # In the continuous equation no step moves with the ends of the intervals.
        moves = self.moving is not None and self.options.common.adjoint.discrete
        tape = Tape(self.options, u0, kept, moves)
        march = self.march(tape, recorded)
        march.run(tape.u0, k)
        return march, tape

    def _run(self, k: Tensor, recorded: bool) -> StackedMembers:
        """Without gradients, or with every operation recorded by autograd."""
        before = Overwritten(self.surroundings) if recorded else None
        march, tape = self._march(k, recorded)
        self.surroundings.settle()
        if before is not None:
            at = self.u0.detach(), self._starts().detach()
            before.expect_unread(tape.vectors, lambda: self._evaluate(*at))
            guard(tape.vectors, self.surroundings)
        return self._result(march, tape)[0]

    def _result(self, march: MembersMarch, tape: Tape) -> tuple[StackedMembers, SavedPlaces | None]:
        """What has been found, and where the saved states lie."""
        steps, states = tape.steps()
        codes, naccept = march.codes, march.naccept
        kept = self._finite(steps, states, codes, tape.thinned)
        if kept is not None:
            steps, states = tape.steps(kept)
            naccept = np.minimum(naccept, kept)
        saved = tape.saved(kept)
        count = len(self.ensemble)
        reached = np.zeros(count, dtype=np.int64)
        if saved is not None:
            reached = np.bincount(saved[0].row, minlength=count)
        result = self.result(
            ensemble=self.ensemble,
            algorithm=self.algorithm,
            engine=NAME,
            options=self.options,
            codes=codes,
            columns={**self.counts(), "naccept": naccept, "nreject": march.nreject},
            steps=steps,
            u0=self.u0,
            states=states,
            at_times=None if saved is None else saved[1],
            reached=reached,
            surroundings=self.surroundings,
            thinned=tape.thinned,
            failures=tape.failures,
            events=self.events(),
        )
        return result, None if saved is None else saved[0]

    def _finite(
        self, steps: MemberSteps, states: Tensor, codes: list[ReturnCode], thinned: bool
    ) -> Array | None:
        """How many steps of each member are good, where no error estimate has watched them."""
        common, size = self.options.common, self.u0.shape[1]
        if common.controller.adaptive and common.tolerances.driven == size:
            return None
        return good_steps(steps, states, codes, thinned)

    def _node(self) -> StackedMembers:
        """As one node of the graph, its backward the sweep of the adjoint."""
        t, look = self._starts().detach(), self._attempt

        def evaluate() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            start, time = self.u0.detach().requires_grad_(), t.clone().requires_grad_()
            return (look(start, time),), (start, time)

        with torch.enable_grad():
            captured = Inputs(self.surroundings, self._checked(evaluate), self.field.given["p"])
        # What a sweep meets is told: it is too late for the members one by one.
        look = self._evaluate
        (k,) = captured.first
        self._expect_alike(k)
        if not self.options.common.adjoint.discrete:
            captured.remember()
        self.field.watch = captured.watch
        with torch.no_grad():
            march, tape = self._march(k, False)
        self.field.watch = None
        captured.settle()
        result, places = self._result(march, tape)
        sweep = self.sweep(captured, result, places)
        if not self.u0.requires_grad and self.moving is None:
            sweep = _telling(sweep, captured)
        at_times, states = MembersNode.apply(  # type: ignore[no-untyped-call]
            sweep,
            (result.at_times, result.states),
            True,
            self.u0,
            None if self.moving is None else self.ensemble.tspan,
            *captured.inputs,
        )
        result.at_times, result.states, result.u0 = at_times, states, self.u0
        return result

    def sweep(self, captured: Inputs, result: StackedMembers, places: SavedPlaces | None) -> Sweep:
        """The sweep of the adjoint.

        Args:
            captured: the inputs of the field.
            result: of the solve.
            places: where the saved states lie.
        """
        moves = None
        if self.moving is not None:
            moves = StepMoves.of(result.steps, self.options.spans[1])
        replay = Replay(
            self.again(), self.field, captured, self.options.spans[0], result.steps, places, moves
        )
        return lambda *given: members_sweep(replay, result, *given)


def _telling(sweep: Sweep, captured: Inputs) -> Sweep:
    """A sweep that warns where none of the field's inputs receives a gradient."""

    def telling(*given: Any) -> tuple[Tensor | None, ...]:
        start, ends, *of_inputs = sweep(*given)
        captured.tell_of_cut_graph(of_inputs)
        return (start, ends, *of_inputs)

    return telling
