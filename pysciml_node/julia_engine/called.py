"""Right-hand sides that Julia calls back, and the choice between these and its own."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any, Self

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.julia_engine.fields import (
    ODEField,
    field_in_julia,
    flat_parameters,
    split_parameters,
)
from pysciml_node.julia_engine.process.buffers import (
    CODES,
    from_real,
    real_length,
    real_size,
    to_real,
)
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.replay.comparison import Comparison, as_solved
from pysciml_node.steps.contents import Contents
from pysciml_node.steps.field import DifferentiableField, FlatField, Linearized
from pysciml_node.steps.inputs import changed_message
from pysciml_node.steps.surroundings import Surroundings

FlatFunction = Callable[[Tensor, Tensor], Tensor]
"""Takes the time, a 0-d tensor, and a flat state; gives a flat result."""


def field_of(problem: ODEProblem, u0: Tensor, gradients: bool, implicit: bool) -> ODEField:
    """The right-hand side of a problem as Julia evaluates it.

    Modules and functions are translated, and a `JuliaField` is taken as it is. A function that
    cannot be translated is called back, and so is one that counts, records or prints.

    Args:
        problem: gives the callable, the state's structure and `p`.
        u0: flat initial state.
        gradients: whether the field's inputs will receive gradients.
        implicit: whether the solve may ask for Jacobians.

    Raises:
        UnsupportedModule: a module has an operation that cannot be translated.
    """
    field = field_in_julia(problem, gradients, implicit)
    return CallbackField(problem, u0, gradients) if field is None else field


def _weakly(method: Callable[..., Any]) -> Callable[..., Any]:
    """A method as a function that does not keep its object alive.

    Julia holds on to what it may call, and a field owns its handle in Julia: a cycle that neither
    side's collector would see.
    """
    reference = weakref.WeakMethod(method)

    def call(*arguments: float) -> Any:
        bound = reference()
        assert bound is not None
        return bound(*arguments)

    return call


class CalledField:
    """A Python callable that Julia evaluates through memory that both sides see.

    Args:
        problem: gives the structure of the state.
        evaluate: the callable on flat states.
        outputs: length of its flat result.
        inputs: tensors that receive gradients.
        pullback: `linearize(t, slot)` and `pull(slot)`, where Julia differentiates it.
    """

    calls_python = True
    host = True

    def __init__(
        self,
        problem: Problem,
        evaluate: FlatFunction,
        outputs: int,
        inputs: list[Tensor],
        pullback: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    ) -> None:
        self.problem, self.inputs, self._function = problem, inputs, evaluate
        spec = problem.spec
        parts = 2 if spec.dtype.is_complex else 1
        self._state = torch.empty(real_size(spec), dtype=spec.real_dtype)
        self._slope = torch.empty(outputs * parts, dtype=spec.real_dtype)
        self._gradient = torch.zeros_like(self.parameters())
        linearize, pull = map(_weakly, pullback) if pullback else (None, None)
        self.handle = Handle(
            enter(
                "make_python_field",
                dtype=CODES[spec.real_dtype],
                evaluate=_weakly(self._evaluate),
                linearize=linearize,
                pull=pull,
                n=self._state.numel(),
                state=self._state,
                m=self._slope.numel(),
                slope=self._slope,
                np=self._gradient.numel(),
                gradient=self._gradient,
            )
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # Julia knows this object and its memory.
        return self

    def parameters(self) -> Tensor:
        """Their values are read by the callable itself; Julia needs the length."""
        return flat_parameters(self.inputs, self.problem.spec.real_dtype, torch.device("cpu"))

    def split(self, gradient: Tensor) -> list[Tensor | None]:
        """A gradient of `parameters` as those of `inputs`."""
        return split_parameters(gradient, self.inputs)

    def _time(self, t: float) -> Tensor:
        return self.problem.time_tensor([t])[0]

    def _current(self) -> Tensor:
        # A copy: the callable may keep its argument, and this memory is used again.
        spec = self.problem.spec
        return from_real(self._state.clone(), spec.dtype).to(spec.device)

    def _evaluate(self, t: float) -> None:
        with torch.no_grad():
            self._slope.copy_(to_real(self._function(self._time(t), self._current())))


class CallbackField(CalledField):
    """The right-hand side of an ordinary equation, called back.

    The steps of implicit methods cannot be taken again here to be compared, and torch does not
    count every change of what the field reads. So its contents are remembered, and what the solve
    evaluates first and last is kept.

    Args:
        problem: gives the callable, the state's structure and `p`.
        u0: flat initial state.
        gradients: whether inputs are looked for, by one evaluation at the start.
    """

    def __init__(self, problem: ODEProblem, u0: Tensor, gradients: bool) -> None:
        self._equation, self._u0, self._gradients = problem, u0.detach(), gradients
        self._lines: dict[int, Linearized] = {}
        self._read: set[int] = set()  # numbers of the inputs that a pullback has reached
        self._evaluations: list[tuple[float, Tensor, Tensor]] = []
        self._running = True
        self._contents: Contents | None = None
        field = self._differentiable.field if gradients else FlatField(problem)
        inputs = self._differentiable.inputs if gradients else []
        super().__init__(problem, field, u0.numel(), inputs, (self._linearize, self._pull))

    @cached_property
    def _differentiable(self) -> DifferentiableField:
        problem = self._equation
        return DifferentiableField(problem, problem.time_tensor([problem.t0])[0], self._u0)

    @property
    def linearizer(self) -> DifferentiableField:
        """The callable prepared for gradients, for the sweep of the torch engine."""
        return self._differentiable

    @cached_property
    def _surroundings(self) -> Surroundings:
        """What the field can reach, as it was when the solve began, or when it had run."""
        if self._gradients:
            return self._differentiable.surroundings
        return Surroundings({"f": self._equation.f, "p": self._equation.p})

    def remember(self) -> None:
        """Called before a solve with gradients whose sweep does not take its steps again."""
        self._differentiable.captured.remember()

    def settle(self) -> None:
        """Called when the solve has run: what changes from now on is not its doing."""
        self._running = False
        if self._gradients:
            self._differentiable.settle()
        else:
            self._contents = Contents(self._surroundings.reach)

    def flat(self, problem: ODEProblem) -> FlatField:
        """The field for single steps that torch takes."""
        return FlatField(problem)

    @contextlib.contextmanager
    def as_solved(self) -> Iterator[None]:
        """All that the field reads as the solve saw it, its first and last values compared."""
        with as_solved(self._surroundings) as comparison:
            self._expect_contents()
            yield
            self._compare(comparison)
        if self._contents is not None:
            # The field itself may have changed them.
            self._contents.settle(self._surroundings.reach)

    def _expect_contents(self) -> None:
        if self._contents is None:
            self._differentiable.captured.expect_contents()
            return
        for x in self._contents.changed(self._surroundings.reach):
            raise RuntimeError(changed_message(self._surroundings.names[id(x)]))

    def expect_unchanged(self) -> None:
        """Compare its first and last values in the solve with those now.

        Raises:
            RuntimeError: they differ.
        """
        comparison = Comparison()
        self._compare(comparison)
        comparison.expect_equal(())

    def _compare(self, comparison: Comparison) -> None:
        for t, state, slope in self._evaluations:
            self._state.copy_(state)
            self._evaluate(t)
            comparison.add_value(self._slope.clone(), slope)

    @override
    def _evaluate(self, t: float) -> None:
        super()._evaluate(t)
        if self._running:
            self._evaluations[1:] = [(t, self._state.clone(), self._slope.clone())]

    def _linearize(self, t: float, slot: int) -> None:
        line = self._differentiable.linearize(self._time(t), self._current(), time_gradient=True)
        self._slope.copy_(to_real(line.value))
        self._lines[slot] = line

    def _pull(self, slot: int) -> float:
        spec = self.problem.spec
        cotangent = from_real(self._slope.clone(), spec.dtype).to(spec.device)
        # Implicit methods ask for Jacobians without any input needing a gradient.
        line = self._lines[slot]
        state, time, inputs = line.vjp(cotangent, with_leaves=bool(self.inputs))
        inputs = inputs if self.inputs else []
        if state is None:
            self._state.zero_()
        else:
            self._state.copy_(to_real(state))
        parts = torch.split(self._gradient, [real_length(x) for x in self.inputs])
        for i, (part, gradient) in enumerate(zip(parts, inputs, strict=True)):
            if gradient is None:
                part.zero_()
            else:
                self._read.add(i)
                part.copy_(to_real(gradient.reshape(-1)))
        return 0.0 if time is None else float(time)

    @override
    def split(self, gradient: Tensor) -> list[Tensor | None]:
        parts = super().split(gradient)
        return [part if i in self._read else None for i, part in enumerate(parts)]
