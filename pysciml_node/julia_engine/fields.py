"""Right-hand sides as Julia evaluates them: translated modules, source, Python callables."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from functools import cached_property
from itertools import compress
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor, nn
from typing_extensions import override

from pysciml_node.errors import UnsupportedModule
from pysciml_node.julia_engine.evaluation import evaluate
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.buffers import (
    CODES,
    from_real,
    real_length,
    real_size,
    to_real,
)
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.julia_engine.source import JuliaField
from pysciml_node.problems.modes import InModes, foreign_mode
from pysciml_node.problems.ode import ODEProblem, Problem
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.field import DifferentiableField, FlatField, Linearized
from pysciml_node.translation.export import translate
from pysciml_node.translation.leaves import form_for, leaves_of
from pysciml_node.translation.recent import Recent
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.surrounded import surroundings_of
from pysciml_node.translation.watch import Contents, have_contents
from pysciml_node.translation.ways import keep, known_of

FlatFunction = Callable[[Tensor, Tensor], Tensor]
"""Takes the time, a 0-d tensor, and a flat state; gives a flat result."""


class Field(Protocol):
    """What a solve needs of a right-hand side.

    Attributes:
        handle: of the field in Julia.
        calls_python: whether Julia calls back, and so needs Python's lock.
        inputs: tensors that receive gradients.
        host: whether its states are in the processor's memory, wherever `u0` is.
    """

    handle: Handle
    calls_python: bool
    inputs: list[Tensor]
    host: bool

    def parameters(self) -> Tensor:
        """The flat vector of what the field depends on, in the state's real dtype."""

    def split(self, gradient: Tensor) -> list[Tensor | None]:
        """A gradient of `parameters` as those of `inputs`."""


def flat_parameters(tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> Tensor:
    """All tensors as one real vector."""
    if not tensors:
        return torch.empty(0, dtype=dtype, device=device)
    if torch.is_grad_enabled():
        tensors = [x.detach() for x in tensors]
    if _are_alike(tensors, dtype, device):
        return torch.cat([x.reshape(-1) for x in tensors])
    return torch.cat([to_real(x.reshape(-1)).to(device, dtype) for x in tensors])


def split_parameters(gradient: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
    """The parts of a flat gradient, like the tensors."""
    if _are_alike(tensors, gradient.dtype, gradient.device):
        sizes = [x.numel() for x in tensors]
        parts = gradient.split_with_sizes(sizes)
        return [part.view(x.shape) for part, x in zip(parts, tensors, strict=True)]
    parts = gradient.split_with_sizes([real_length(x) for x in tensors])
    return [
        from_real(part.to(x.device, x.dtype.to_real()), x.dtype).reshape(x.shape)
        for part, x in zip(parts, tensors, strict=True)
    ]


def _are_alike(tensors: list[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether all tensors are of a real dtype, and on a device."""
    return all(x.dtype is dtype and x.device == device for x in tensors)


def field_of(problem: ODEProblem, u0: Tensor, gradients: bool, implicit: bool) -> Field:
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


def field_in_julia(problem: ODEProblem, gradients: bool, implicit: bool) -> FieldInJulia | None:
    """The right-hand side of a problem as `field_of` finds it; `None` where it is called back."""
    field = native_field(problem, gradients, implicit)
    if field is None and not isinstance(problem.f, InModes):
        with contextlib.suppress(UnsupportedModule):
            return ProgramField(problem)
    return field


def native_field(problem: ODEProblem, gradients: bool, implicit: bool) -> FieldInJulia | None:
    """A module that can be translated, or a `JuliaField`; `None` for anything else."""
    if isinstance(problem.f, JuliaField):
        return SourceField(problem, gradients, implicit)
    real = not problem.spec.dtype.is_complex
    if isinstance(problem.f, nn.Module) and problem.p is None and real:
        try:
            return ProgramField(problem)
        except UnsupportedModule as error:
            # A tensor from outside receives its gradient through the callback.
            if not error.captured:
                raise
    return None


# Each holds the intermediate values of its evaluations: megabytes, for a large batch.
_programs: Recent[tuple[str, torch.dtype], Handle] = Recent(32)


def _program(json: str, dtype: torch.dtype) -> Handle:
    """A program in Julia, made once while it is in use."""
    handle = _programs.get((json, dtype))
    if handle is None:
        number = enter("make_program", json=json, dtype=CODES[dtype])
        handle = _programs[json, dtype] = Handle(number)
    return handle


class FieldInJulia:
    """A right-hand side that Julia evaluates by itself.

    Args:
        handle: of the field in Julia.
        tensors: what its flat vector of parameters is made of.
        wanted: which of them receive gradients.
        spec: structure of the state.
    """

    calls_python = False
    host = False

    def __init__(
        self, handle: Handle, tensors: list[Tensor], wanted: list[bool], spec: StateSpec
    ) -> None:
        self.handle, self.tensors, self.wanted = handle, tensors, wanted
        self.inputs = list(compress(tensors, wanted))
        # What the solve sees, so that its gradient sees the same.
        self._flat = flat_parameters(tensors, spec.real_dtype, spec.device)

    def parameters(self) -> Tensor:
        """All that it depends on, as the solve saw it."""
        return self._flat

    def split(self, gradient: Tensor) -> list[Tensor | None]:
        """A gradient of `parameters` as those of `inputs`."""
        if not self.inputs:
            return []
        return list(compress(split_parameters(gradient, self.tensors), self.wanted))


class _Ready(NamedTuple):
    """A translation, found again by a look at the field.

    Attributes:
        key: by which Julia's program is kept.
        sources: of each parameter the number of its tensor, the field's before those of `p`; the
            tensor itself for a constant.
        pulled: whether each of them has a gradient.
        contents: numbers of tensors whose entries are part of the program, with those entries.
        spec: structure of the state; it is kept, so that no other one is given its identity.
    """

    key: tuple[str, torch.dtype]
    sources: tuple[int | Tensor, ...]
    pulled: tuple[bool, ...]
    contents: Contents
    spec: StateSpec


class ProgramField(FieldInJulia):
    """A module or a function translated for Julia.

    A parameter that the program does not read, or only detached, gets no gradient, not one of
    zeros. A field that looks as it did at an earlier solve is not translated again.

    Args:
        problem: its `f` is translated, and its `p`, if there is one, is among the parameters.

    Attributes:
        see: gives what it can reach, as it is now.

    Raises:
        UnsupportedModule: it cannot be translated, or is a function that does more than evaluate.
    """

    def __init__(self, problem: ODEProblem) -> None:
        f, p, spec = problem.f, problem.p, problem.spec
        leaves = leaves_of(p)
        now = Snapshot.again(f)
        ready = None
        if now is not None and foreign_mode() is None:
            ready = known_of(now.watch, (id(spec), form_for(now, leaves)), _Ready)
        if now is None or ready is None or not have_contents(now.tensors, ready.contents):
            module = isinstance(f, nn.Module) and p is None
            translated = translate(f, spec, p, silent=not module)
            now, key = translated.snapshot, (translated.json, spec.dtype)
            pulled = translated.program.pulled
            ready = _Ready(key, translated.sources, pulled, translated.contents, spec)
            keep(now.watch, (id(spec), form_for(now, leaves)), ready)
        every = [*now.tensors, *leaves[0]]
        tensors = [every[x] if isinstance(x, int) else x for x in ready.sources]
        pairs = zip(tensors, ready.pulled, strict=True)
        wanted = [pulled and x.requires_grad for x, pulled in pairs]
        super().__init__(_program(*ready.key), tensors, wanted, spec)
        self.see = surroundings_of(f, p, now)

    def evaluate(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `(t, u)`, flat, differentiable in all that it depends on."""
        flat = self.parameters()
        if torch.is_grad_enabled() and self.inputs:
            flat = torch.cat([x.reshape(-1).to(u) for x in self.tensors])
            # The graph is that of the tensors, the numbers are those that the solve saw.
            with torch.no_grad():
                flat.copy_(self.parameters())
        return evaluate(self.handle, t, u, flat, ())


class TranslatedFlatField(FlatField):
    """A translated module for replayed steps, evaluated in Julia.

    Args:
        field: the module in Julia.
        problem: of the solve.
    """

    def __init__(self, field: ProgramField, problem: ODEProblem) -> None:
        super().__init__(problem)
        self._field = field

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative; shape `(N,)`."""
        self.nfe += 1
        return self._field.evaluate(t, u)


class SourceField(FieldInJulia):
    """A field written in Julia.

    Args:
        problem: its `f` is a `JuliaField`; its `p` a tensor, or nothing.
        gradients: whether `p` may receive a gradient.
        implicit: whether the solve may ask for Jacobians, without any gradient being asked for.

    Raises:
        TypeError: complex states, or states and parameters of several parts.
    """

    def __init__(self, problem: ODEProblem, gradients: bool, implicit: bool) -> None:
        spec, p = problem.spec, problem.p
        real = isinstance(p, Tensor) and not p.is_complex()
        if spec.keys is not None or spec.dtype.is_complex or not (real or p is None):
            raise TypeError(
                "a JuliaField takes one real tensor as state and one as p.\n"
                "  Join the parts with torch.cat, take torch.view_as_real of complex numbers, or "
                "write the field in Python."
            )
        assert isinstance(problem.f, JuliaField)
        if gradients or implicit:
            runtime.require("Zygote")
        tensors = [] if p is None else [p]
        wanted = [gradients and x.requires_grad for x in tensors]
        super().__init__(problem.f.handle(spec.dtype, spec.shapes[0]), tensors, wanted, spec)


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

    Args:
        problem: gives the callable, the state's structure and `p`.
        u0: flat initial state.
        gradients: whether inputs are looked for, by one evaluation at the start.
    """

    def __init__(self, problem: ODEProblem, u0: Tensor, gradients: bool) -> None:
        self._equation, self._u0 = problem, u0.detach()
        self._lines: dict[int, Linearized] = {}
        self._read: set[int] = set()  # numbers of the inputs that a pullback has reached
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
