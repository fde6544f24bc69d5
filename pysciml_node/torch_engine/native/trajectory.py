"""Dense output and local estimates of native solves, by native code."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.algorithms.explicit import ExplicitRungeKutta
from pysciml_node.errors import CompileError, UnsupportedModule
from pysciml_node.problems.modes import foreign_mode
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import moves, recording
from pysciml_node.replay.comparison import Comparison
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.solution import StepEstimate, StopGradient
from pysciml_node.steps.record import check_discrete
from pysciml_node.tableaus import ImplicitTableau
from pysciml_node.torch_engine.native.departure import departure_of
from pysciml_node.torch_engine.native.prepared import explicit_library
from pysciml_node.torch_engine.native.taken import TakenSteps
from pysciml_node.translation.export import translate
from pysciml_node.translation.numbers import first_to_succeed
from pysciml_node.translation.program import Program


class FieldProgram(NamedTuple):
    """A field as a program.

    Attributes:
        json: the program as text.
        program: itself.
        parameters: the tensors that it reads, before others.
    """

    json: str
    program: Program
    parameters: Sequence[Tensor]


@dataclass
class NativeTrajectory(TorchTrajectory):
    """The accepted steps of a native solve.

    What native code does not have is had as from any other trajectory: derivatives with respect to
    times, of forward mode and of transforms, steps of implicit methods and of two in turn.

    Attributes:
        program: the field's; `None` where the problem is another one by now.
        translated: whether it is, or else will be when something asks for it.
    """

    program: FieldProgram | None = None
    translated: bool = True

    @override
    def mapped(self, states: list[Tensor], change: Any) -> TorchTrajectory:
        made = super().mapped(states, change)
        assert isinstance(made, NativeTrajectory)
        if made.problem is not self.problem:
            made.program, made.translated = None, True
        return made

    @override
    def restrict(self, problem: ODEProblem) -> TorchTrajectory:
        made = super().restrict(problem)
        parts = {x.name: getattr(made, x.name) for x in fields(made)}
        return NativeTrajectory(**parts, translated=False)

    @override
    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "program": None, "translated": True}

    def _program(self) -> FieldProgram | None:
        """The field as it was solved, as a program."""
        if not self.translated:
            self.translated, problem = True, self.problem
            assert self.surroundings is not None
            with self.surroundings.as_seen(), suppress(UnsupportedModule):
                make = partial(translate, problem.f, problem.spec, problem.p)
                found = first_to_succeed(problem.p, problem.spec, make)
                self.program = FieldProgram(found.json, found.program, found.parameters)
        return self.program

    def _taken(self, method: Method, steps: Sequence[tuple[float, float]]) -> TakenSteps | None:
        """Steps that native code takes; `None` where it does not."""
        tableau, problem = method.tableau, self.problem
        if isinstance(tableau, ImplicitTableau) or problem.mass is not None or _transformed():
            return None
        known = self._program()
        if known is None:
            return None
        try:
            library = explicit_library(known.json, known.program, method)
            departure = departure_of((library,), problem, self.options, (tableau,))
            _ = library.loaded
        except CompileError:
            return None
        return TakenSteps(
            library,
            departure,
            (self.record.marks[0], self.record.marks[-1]),
            steps,
            known.parameters[: len(known.program.parameters)],
            self.stats,
        )

    def _accepted(self, numbers: Iterable[int]) -> TakenSteps | None:
        """Accepted steps, by their numbers."""
        record = self.record
        if len(self.methods) > 1:
            return None
        return self._taken(self.method, [(record.times[n], record.sizes[n]) for n in numbers])

    def _expect_same(self, numbers: Collection[int], ends: Tensor) -> None:
        """Compare the ends of steps with those of the solve: what they read may have changed."""
        ended = torch.stack([self.flat_states[n + 1].detach() for n in numbers])
        # The same code gives the same bits, in most cases.
        if torch.equal(ends, ended):
            return
        assert self.surroundings is not None
        comparison = Comparison(self.precision)
        comparison.add(ends, ended, torch.stack([self.flat_states[n].detach() for n in numbers]))
        changed = self.surroundings.changed_in_place()
        comparison.expect_equal([self.surroundings.names[id(x)] for x in changed])

    def _ends_move(self) -> bool:
        """Whether steps have derivatives in time."""
        t0, t1 = self.problem.tspan
        return recording() and (moves(t0) or moves(t1))

    def _inside(self, times: dict[int, list[float]]) -> Tensor | None:
        """The states at times in steps that are taken again, one step after the other, `(m, N)`.

        Args:
            times: of steps by their numbers; those in between their ends.

        Returns:
            The states; `None` without native code.
        """
        steps, record = self._accepted(times), self.record
        if steps is None or self._ends_move():
            return None

        def again(sizes: Sequence[float]) -> tuple[Tensor]:
            whole = torch.tensor([*chain.from_iterable(times.values())], dtype=torch.float64)
            return (super(NativeTrajectory, self).evaluate(whole),)

        steps.again = again
        steps.places = [
            (i, (t - record.times[n]) / record.sizes[n])
            for i, n in enumerate(times)
            for t in times[n]
        ]
        (states,) = steps([self.every_state[n] for n in times])
        self._expect_same(times, steps.ends)
        return states

    @override
    def evaluate(self, times: Tensor) -> Tensor:
        if not self.record.sizes or moves(times) or self._ends_move():
            return super().evaluate(times)
        host: list[float] = times.detach().double().tolist()
        inside: dict[int, list[float]] = {}
        rows: dict[float, Tensor] = {}
        for t in host:
            n = self.step_of(t)
            known = self._known_states(n, moving=False)
            if t in known:
                rows[t] = known[t]
            else:
                inside.setdefault(n, []).append(t)
        if inside:
            states = self._inside(inside)
            if states is None:
                return super().evaluate(times)
            between = [*chain.from_iterable(inside.values())]
            if between == host:
                return states
            rows.update(zip(between, states.unbind(), strict=True))
        return torch.stack([rows[t] for t in host])

    @override
    def _state_at(self, t: float) -> Tensor:
        n = self.step_of(t)
        known = self._known_states(n, moving=False).get(t)
        found = self._inside({n: [t] if known is None else []})
        if found is not None:
            return found[0] if known is None else known[:]  # without its graph, where none is made
        return super()._state_at(t)

    @override
    def estimate(
        self, t: float, algorithm: Any, stop_gradient: StopGradient, dt: float | None
    ) -> StepEstimate:
        if not (isinstance(algorithm, ExplicitRungeKutta) and self.record.sizes):
            return super().estimate(t, algorithm, stop_gradient, dt)
        method = Method.of(algorithm.tableau, self.problem.spec.dtype, self.problem.spec.device)
        end = self.record.marks[-1]
        h = math.nan if dt is None else math.copysign(min(dt, abs(end - t)), end - t)
        step = self._taken(method, [(t, h)])
        if step is None:
            return super().estimate(t, algorithm, stop_gradient, dt)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not stop_gradient):
            u = self._state_at(t)

        def again(sizes: Sequence[float]) -> tuple[Tensor, Tensor]:
            with self._as_seen():
                made = self.estimate_from(t, u, method, stop_gradient, abs(sizes[0]))
            return made.error, made.stiffness

        step.interval, step.constant, step.again = (t, end), stop_gradient is True, again
        step.estimated = step.anywhere = True
        error, stiffness = step([u])
        return StepEstimate(method.nodes.new_tensor(step.sizes[0]), error, stiffness)

    def _every_step(self) -> tuple[Tensor, Tensor] | None:
        """Error and stiffness of all accepted steps, `(n,)`; `None` without native code."""
        numbers = range(len(self.record.sizes))
        steps = self._accepted(numbers) if numbers else None
        if steps is None:
            return None
        steps.estimated = True
        errors, stiffness = steps(self.every_state[:-1])
        self._expect_same(numbers, steps.ends)
        return errors, stiffness

    @override
    def stiffness(self) -> Tensor:
        with torch.no_grad():
            found = self._every_step()
        return super().stiffness() if found is None else found[1]

    @override
    def step_estimates(self) -> list[StepEstimate]:
        check_discrete(self.options.adjoint)
        found = self._every_step()
        if found is None:
            return super().step_estimates()
        sizes = self.method.nodes.new_tensor(self.record.sizes)
        return [StepEstimate(*row) for row in zip(sizes, *(x.unbind() for x in found), strict=True)]


def _transformed() -> bool:
    """Whether derivatives are taken, or operations looked at, in ways that native code lacks."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or foreign_mode() is not None
    )
