"""Dense output and local estimates of native solves, by native code."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
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
from pysciml_node.replay.newton import left_missing
from pysciml_node.replay.stages import Method
from pysciml_node.replay.trajectory import TorchTrajectory
from pysciml_node.solutions.solution import StepEstimate, StopGradient
from pysciml_node.steps.record import check_discrete
from pysciml_node.tableaus import ImplicitTableau, RosenbrockTableau
from pysciml_node.torch_engine.native.departure import departure_of
from pysciml_node.torch_engine.native.implicit import Derivatives
from pysciml_node.torch_engine.native.library import Library
from pysciml_node.torch_engine.native.prepared import explicit_library, implicit_library
from pysciml_node.torch_engine.native.pulled import pulled_program
from pysciml_node.torch_engine.native.taken import TakenSteps
from pysciml_node.translation.export import translate
from pysciml_node.translation.numbers import first_to_succeed
from pysciml_node.translation.program import Program


class FieldProgram(NamedTuple):
    """A field as a program.

    Attributes:
        json: the program as text.
        program: itself.
        parameters: the tensors that it reads, and behind them those of its pullback.
        derivatives: with its pullback where gradients of Rosenbrock steps were asked for.
    """

    json: str
    program: Program
    parameters: Sequence[Tensor]
    derivatives: Derivatives = Derivatives()


@dataclass
class NativeTrajectory(TorchTrajectory):
    """The accepted steps of a native solve.

    What native code does not have is had as from any other trajectory: derivatives with respect to
    times, of forward mode and of transforms, local steps of implicit methods.

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
                if self._has_gradients() and self._takes_pullbacks():
                    pulled = pulled_program(problem.f, problem.spec, found)
                    read = [*found.parameters, *pulled.parameters(found.parameters)]
                    self.program = FieldProgram(
                        found.json, found.program, read, Derivatives(pulled)
                    )
        return self.program

    def _has_gradients(self) -> bool:
        """Whether the states do; the last one depends on all that others do."""
        return self.every_state[-1].requires_grad

    def _takes_pullbacks(self) -> bool:
        """Whether the discrete adjoint of a step takes second derivatives of the field."""
        return any(isinstance(x.tableau, RosenbrockTableau) for x in self.methods)

    def _library(self, known: FieldProgram, method: Method) -> Library | None:
        """The code of steps of a method; `None` where it lacks what they need."""
        mass, table = self.problem.mass, method.tableau
        if not isinstance(table, ImplicitTableau):
            return explicit_library(known.json, known.program, method) if mass is None else None
        derivatives = known.derivatives
        lacks = isinstance(table, RosenbrockTableau) and derivatives.pulled is None and recording()
        if lacks and (self._has_gradients() or any(map(moves, known.parameters))):
            return None
        return implicit_library(known.json, known.program, derivatives, method, mass)

    def _taken(self, method: Method, steps: Sequence[tuple[float, float]]) -> TakenSteps | None:
        """Steps that native code takes; `None` where it does not."""
        known = None if _transformed() else self._program()
        if known is None:
            return None
        try:
            library = self._library(known, method)
            if library is None:
                return None
            departure = departure_of((library,), self.problem, self.options, (method.tableau,))
            _ = library.loaded
        except CompileError:
            return None
        return TakenSteps(
            library,
            departure,
            (self.record.marks[0], self.record.marks[-1]),
            steps,
            known.parameters[: len(library.places)],
            self.stats,
        )

    def _accepted(self, numbers: Iterable[int]) -> list[tuple[list[int], TakenSteps]] | None:
        """Accepted steps by the methods that took them, with their numbers."""
        record, groups = self.record, dict[int, list[int]]()
        for n in numbers:
            groups.setdefault(record.method_of(n), []).append(n)
        parts = []
        for method, group in groups.items():
            sizes = [(record.times[n], record.sizes[n]) for n in group]
            steps = self._taken(self.methods[method], sizes)
            if steps is None:
                return None
            parts.append((group, steps))
        return parts

    def _expect_same(self, numbers: Sequence[int], ends: Tensor) -> None:
        """Compare the ends of steps of one method with those of the solve: what they read may have
        changed.
        """
        ended = torch.stack([self.flat_states[n + 1].detach() for n in numbers])
        # The same code gives the same bits, in most cases.
        if torch.equal(ends, ended):
            return
        assert self.surroundings is not None
        comparison, starts = Comparison(self.precision), [self.flat_states[n] for n in numbers]
        implicit = isinstance(self._method_of(numbers[0]).tableau, ImplicitTableau)
        missing = left_missing(ends.dtype) if implicit else 0.0
        comparison.add(ends, ended, torch.stack(starts).detach(), missing)
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
        parts, record = None if self._ends_move() else self._accepted(times), self.record
        if parts is None:
            return None
        found: list[Tensor] = []
        for group, steps in parts:
            steps.again = partial(self._between, [t for n in group for t in times[n]])
            steps.places = [
                (i, (t - record.times[n]) / record.sizes[n])
                for i, n in enumerate(group)
                for t in times[n]
            ]
            found += steps([self.every_state[n] for n in group])
            self._expect_same(group, steps.ends)
        order = {n: i for i, n in enumerate(times)}
        return _in_order(found, [order[n] for group, _ in parts for n in group for _ in times[n]])

    def _between(self, times: list[float], sizes: Sequence[float]) -> tuple[Tensor]:
        """The states at times, with a graph of torch's."""
        return (super().evaluate(torch.tensor(times, dtype=torch.float64)),)

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
        if found is None:
            return super()._state_at(t)
        if known is None:
            return found[0]
        # Where no graph is made it has none: a view would claim to require gradients.
        return known if torch.is_grad_enabled() else known.detach()

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
        count = len(self.record.sizes)
        parts = self._accepted(range(count)) if count else None
        if parts is None:
            return None
        errors, stiffness = list[Tensor](), list[Tensor]()
        for group, steps in parts:
            steps.estimated = True
            of_error, of_stiffness = steps([self.every_state[n] for n in group])
            errors.append(of_error)
            stiffness.append(of_stiffness)
            self._expect_same(group, steps.ends)
        order = [n for group, _ in parts for n in group]
        return _in_order(errors, order), _in_order(stiffness, order)

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


def _in_order(parts: Sequence[Tensor], order: Sequence[int]) -> Tensor:
    """Rows of tensors together, in ascending order of their numbers."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([*parts])[torch.tensor(order).argsort(stable=True)]


def _transformed() -> bool:
    """Whether derivatives are taken, or operations looked at, in ways that native code lacks."""
    return (
        torch._C._are_functorch_transforms_active()
        or torch.autograd.forward_ad._current_level >= 0
        or foreign_mode() is not None
    )
