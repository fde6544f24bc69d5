"""Right-hand sides that Julia evaluates by itself: translated modules and functions, and source."""

from __future__ import annotations

import contextlib
from itertools import compress
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pysciml_node.errors import UnsupportedModule
from pysciml_node.julia_engine.evaluation import evaluate
from pysciml_node.julia_engine.process import runtime
from pysciml_node.julia_engine.process.buffers import (
    CODES,
    from_real,
    real_length,
    to_real,
)
from pysciml_node.julia_engine.process.entries import enter
from pysciml_node.julia_engine.process.handles import Handle
from pysciml_node.julia_engine.source import JuliaField
from pysciml_node.problems.modes import InModes, foreign_mode
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.field import FlatField
from pysciml_node.translation.export import translate
from pysciml_node.translation.first import At
from pysciml_node.translation.leaves import form_for, leaves_of
from pysciml_node.translation.recent import Recent
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.surrounded import surroundings_of
from pysciml_node.translation.watch import Contents, have_contents
from pysciml_node.translation.ways import keep, known_of


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


class ODEField(Field, Protocol):
    """The right-hand side of an ordinary equation, for what looks at a solve afterwards."""

    def flat(self, problem: ODEProblem) -> FlatField:
        """The field for single steps that torch takes, of the solve or its leading part."""

    def as_solved(self) -> contextlib.AbstractContextManager[None]:
        """All that the field reads as the solve saw it.

        Raises:
            RuntimeError: in the end, where its values are others all the same.
        """


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


def program_of(key: tuple[str, torch.dtype]) -> Handle:
    """A program in Julia, made once while it is in use.

    Args:
        key: the program as text, and its dtype.
    """
    handle = _programs.get(key)
    if handle is None:
        json, dtype = key
        handle = _programs[key] = Handle(enter("make_program", json=json, dtype=CODES[dtype]))
    return handle


class FieldInJulia:
    """A right-hand side that Julia evaluates by itself.

    Args:
        handle: of the field in Julia.
        tensors: what its flat vector of parameters is made of.
        wanted: which of them receive gradients.
        spec: structure of the state.
        flat: the vector as the solve has seen it; default as it is now.

    Attributes:
        packages: Julia packages that its vector-Jacobian product needs.
    """

    packages: tuple[str, ...] = ()
    calls_python = False
    host = False

    def __init__(
        self,
        handle: Handle,
        tensors: list[Tensor],
        wanted: list[bool],
        spec: StateSpec,
        flat: Tensor | None = None,
    ) -> None:
        self.handle, self.tensors, self.wanted, self.spec = handle, tensors, wanted, spec
        self.inputs = list(compress(tensors, wanted))
        # What the solve sees, so that its gradient sees the same.
        if flat is None:
            flat = flat_parameters(tensors, spec.real_dtype, spec.device)
        self._flat = flat

    def parameters(self) -> Tensor:
        """All that it depends on, as the solve saw it."""
        return self._flat

    def split(self, gradient: Tensor) -> list[Tensor | None]:
        """A gradient of `parameters` as those of `inputs`."""
        if not self.inputs:
            return []
        return list(compress(split_parameters(gradient, self.tensors), self.wanted))

    def evaluate(self, t: Tensor, u: Tensor) -> Tensor:
        """The derivative at `(t, u)`, flat, differentiable in all that it depends on."""
        flat = self.parameters()
        if torch.is_grad_enabled() and self.inputs:
            flat = torch.cat([x.reshape(-1).to(u) for x in self.tensors])
            # The graph is that of the tensors, the numbers are those that the solve saw.
            with torch.no_grad():
                flat.copy_(self.parameters())
        return evaluate(self.handle, t, u, flat, self.packages)

    def flat(self, problem: ODEProblem) -> FlatField:
        """The field for single steps that torch takes."""
        return FlatFieldInJulia(self, problem)

    def as_solved(self) -> contextlib.AbstractContextManager[None]:
        """Its program and its numbers are the solve's, whatever has changed."""
        return contextlib.nullcontext()


class Known(NamedTuple):
    """A translation, found again by a look at the field.

    Attributes:
        key: by which Julia's program is kept: see `program_of`.
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

    def parameters(self, tensors: list[Tensor]) -> list[Tensor]:
        """The tensors that the program reads, of those of the field and of `p`."""
        return [tensors[x] if isinstance(x, int) else x for x in self.sources]

    def wanted(self, parameters: list[Tensor]) -> list[bool]:
        """Which of the parameters receive gradients."""
        pairs = zip(parameters, self.pulled, strict=True)
        return [pulled and x.requires_grad for x, pulled in pairs]


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
            ready = known_of(now.watch, (id(spec), form_for(now, leaves)), Known)
        if now is None or ready is None or not have_contents(now.tensors, ready.contents):
            module = isinstance(f, nn.Module) and p is None
            translated = translate(f, spec, p, silent=not module, at=At.start_of(problem))
            now, key = translated.snapshot, (translated.json, spec.dtype)
            pulled = translated.program.pulled
            ready = Known(key, translated.sources, pulled, translated.contents, spec)
            keep(now.watch, (id(spec), form_for(now, leaves)), ready)
        tensors = ready.parameters([*now.tensors, *leaves[0]])
        super().__init__(program_of(ready.key), tensors, ready.wanted(tensors), spec)
        self.see = surroundings_of(f, p, now)


class FlatFieldInJulia(FlatField):
    """A field for single steps that torch takes, evaluated in Julia with what the solve saw.

    Args:
        field: in Julia.
        problem: of the solve, a copy of it in another precision, or one of the leading part of its
            state, whose derivative does not depend on the rest.
    """

    def __init__(self, field: FieldInJulia, problem: ODEProblem) -> None:
        super().__init__(problem)
        self._field = field
        self._missing = sum(field.spec.sizes) - sum(problem.spec.sizes)

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative; shape `(N,)`."""
        self.nfe += 1
        state = u.to(self._field.spec.device, self._field.spec.dtype)
        if self._missing:
            whole = torch.cat([state, state.new_zeros(self._missing)])
            return self._field.evaluate(t, whole)[: len(u)].to(u)
        return self._field.evaluate(t, state).to(u)


class SourceField(FieldInJulia):
    """A field written in Julia.

    Args:
        problem: its `f` is a `JuliaField`; its `p` a tensor, or nothing.
        gradients: whether `p` may receive a gradient.
        implicit: whether the solve may ask for Jacobians, without any gradient being asked for.

    Raises:
        TypeError: complex states, or states and parameters of several parts.
    """

    packages = ("Zygote",)

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
