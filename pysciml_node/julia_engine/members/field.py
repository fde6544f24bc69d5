"""The right-hand side of many members: one field in Julia, and parameters for each of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import torch
from torch import Tensor

from pysciml_node.julia_engine.fields import FieldInJulia, split_parameters
from pysciml_node.julia_engine.process.buffers import from_real, real_length, to_real
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.state import tensors_of


@dataclass(frozen=True)
class _Part:
    """A tensor that the flat vector of parameters is made of.

    Attributes:
        tensor: of all members, `(M, ...)` where it is each member's own.
        own: where its numbers stand among those of a member's own, or `None` where all share it.
        wanted: whether it receives gradients.
    """

    tensor: Tensor
    own: slice | None
    wanted: bool


class MembersField:
    """One field in Julia for all members.

    Args:
        field: of the first member.
        ensemble: says what each member has of its own.
        first: the problem of the first member.

    Attributes:
        handle: of the field.
        shared: the flat parameters `(np,)`; those of a member's own are the first member's.
        places: where the `k` numbers of a member's own stand among them, counted from 1, `(k,)`.
        own: these numbers, `(M, k)`.
        inputs: tensors that receive gradients, those of a member's own with a leading `M`.
    """

    def __init__(self, field: FieldInJulia, ensemble: EnsembleProblem, first: ODEProblem) -> None:
        self.handle, self.shared = field.handle, field.parameters()
        self._field, self._size = field, len(ensemble)
        stacked: dict[int, Tensor] = {}
        if ensemble.p is not None:
            pairs = zip(tensors_of(first.p), tensors_of(ensemble.p), strict=True)
            stacked = {id(one): many for one, many in pairs}
        self._parts: list[_Part] = []
        places: list[Tensor] = []
        own: list[Tensor] = []
        start = count = 0
        for x, wanted in zip(field.tensors, field.wanted, strict=True):
            length = real_length(x)
            many = stacked.get(id(x))
            if many is None:
                self._parts.append(_Part(x, None, wanted))
            else:
                self._parts.append(_Part(many, slice(count, count + length), wanted))
                places.append(torch.arange(start + 1, start + length + 1))
                own.append(to_real(many.detach().reshape(self._size, -1)).to(self.shared))
                count += length
            start += length
        self.inputs = [part.tensor for part in self._parts if part.wanted]
        self.places = torch.cat(places) if places else torch.empty(0, dtype=torch.int64)
        self.own = torch.cat(own, 1) if own else self.shared.new_empty((self._size, 0))

    def split(self, shared: Tensor, own: Tensor) -> list[Tensor | None]:
        """Gradients of `shared`, summed over members, and of `own` as those of `inputs`."""
        parts = split_parameters(shared, self._field.tensors)
        return [
            total if part.own is None else self._of_own(part.tensor, own[:, part.own])
            for part, total in zip(self._parts, parts, strict=True)
            if part.wanted
        ]

    @staticmethod
    def _of_own(x: Tensor, gradient: Tensor) -> Tensor:
        return from_real(gradient.to(x.device, x.dtype.to_real()), x.dtype).reshape(x.shape)

    def of(self, m: int) -> FieldInJulia:
        """The field of one member alone."""
        tensors = [part.tensor if part.own is None else part.tensor[m] for part in self._parts]
        flat = self.shared.clone()
        flat[self.places - 1] = self.own[m]
        return _OfOne(self._field, tensors, flat)


class _OfOne(FieldInJulia):
    """The field of one member."""

    def __init__(self, first: FieldInJulia, tensors: list[Tensor], flat: Tensor) -> None:
        self.handle, self.wanted, self.spec = first.handle, first.wanted, first.spec
        self.tensors, self.inputs = tensors, list(compress(tensors, first.wanted))
        self.packages, self._flat = first.packages, flat
