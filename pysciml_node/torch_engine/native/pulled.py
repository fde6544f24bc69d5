"""The pullback of a field, as a field that can be translated and pulled back itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from typing_extensions import override

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec
from pysciml_node.steps.derived import DerivedField
from pysciml_node.translation.export import TranslatedModule, translate
from pysciml_node.translation.program import Program
from pysciml_node.translation.recent import Recent
from pysciml_node.translation.watch import have_same


@dataclass(eq=False)
class PulledField(DerivedField):
    """A field with its pullback beside it.

    Its state is `(u, w, t)` in parts, `t` being there for its cotangent alone; its value is
    `(f, w^T df/du, w^T df/dt)` at the time and `u`. What that is pulled back to are the second
    derivatives that the adjoint of a Rosenbrock step needs.

    Attributes:
        inner: the field, `inner(t, u)` or `inner(t, u, p)`.
        spec: structure of its state.
    """

    inner: Callable[..., Any]
    spec: StateSpec

    @property
    def whole(self) -> StateSpec:
        """Structure of this field's state."""
        count = 2 * len(self.spec.shapes) + 1
        shapes = (*self.spec.shapes, *self.spec.shapes, torch.Size(()))
        return StateSpec(tuple(range(count)), shapes, self.spec.dtype, self.spec.device)

    @override
    def __call__(self, t: Tensor, state: Sequence[Tensor], p: Any = None) -> tuple[Tensor, ...]:
        further = () if p is None else (p,)
        return self._pulled(t, state, lambda t, u: self.inner(t, u, *further), True)

    @override
    def derive(
        self, t: Tensor, state: Sequence[Tensor], field: Callable[[Tensor, Any], Any]
    ) -> tuple[Tensor, ...]:
        return self._pulled(t, state, field, False)

    def _pulled(
        self,
        t: Tensor,
        state: Sequence[Tensor],
        field: Callable[[Tensor, Any], Any],
        with_graph: bool,
    ) -> tuple[Tensor, ...]:
        count = len(self.spec.shapes)
        sources = [x if x.requires_grad else x.requires_grad_() for x in (*state[:count], t)]
        value = self.spec.parts(field(sources[-1], self.spec.assemble(sources[:-1])))
        followed = [
            (x, w) for x, w in zip(value, state[count : 2 * count], strict=True) if x.requires_grad
        ]
        if not followed:
            return (*value, *map(torch.zeros_like, sources))
        outputs, cotangents = zip(*followed, strict=True)
        pulled = torch.autograd.grad(
            outputs, sources, cotangents, create_graph=with_graph, allow_unused=True
        )
        return (
            *value,
            *(
                torch.zeros_like(x) if bar is None else bar
                for x, bar in zip(sources, pulled, strict=True)
            ),
        )


T = TypeVar("T")


@dataclass(frozen=True)
class PulledProgram:
    """The program of a `PulledField`.

    Attributes:
        program: the program.
        json: the same as text.
        of: the program of the field.
        sources: of each of its parameters the number among those of the field, or a constant.
    """

    program: Program
    json: str
    of: Program
    sources: tuple[int | Tensor, ...]

    def parameters(self, of: Sequence[T]) -> list[T | Tensor]:
        """What it reads: of the tensors that the field's program reads, or of their sources."""
        return [x if isinstance(x, Tensor) else of[x] for x in self.sources]


_KNOWN: Recent[int, PulledProgram] = Recent(64)


def pulled_program(
    f: Callable[..., Any], spec: StateSpec, translated: TranslatedModule
) -> PulledProgram:
    """The program of the pullback of a field, made once for each of the field.

    Args:
        f: the field.
        spec: structure of its state.
        translated: the field as a program.

    Raises:
        UnsupportedModule: the pullback cannot be translated.
    """
    known = _KNOWN.get(id(translated.program))
    if known is not None and known.of is translated.program:
        return known
    if isinstance(f, DerivedField):
        raise UnsupportedModule(
            "a field with integrals of regularizers beside it has no second derivatives."
        )
    field = PulledField(f, spec)
    try:
        pulled = translate(field, field.whole, translated.read)
    except UnsupportedModule as error:
        raise UnsupportedModule(
            f"gradients of a Rosenbrock step take its second derivatives, and {error.message}",
            error.operation,
            error.captured,
        ) from error
    places = {x: i for i, x in enumerate(translated.sources) if isinstance(x, int)}
    numbers = [x for x in pulled.sources if isinstance(x, int)]
    same = have_same(translated.snapshot.tensors, pulled.snapshot.tensors, numbers)
    if not (same and places.keys() >= set(numbers)):
        raise UnsupportedModule("the field's derivative reads other tensors than the field itself.")
    sources = tuple(x if isinstance(x, Tensor) else places[x] for x in pulled.sources)
    known = PulledProgram(pulled.program, pulled.json, translated.program, sources)
    _KNOWN[id(translated.program)] = known
    return known
