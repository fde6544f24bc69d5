"""Integrals along a solution, as extra states that never drive the step size."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node.problem import ODEProblem
from pysciml_node.solution import Solution
from pysciml_node.state import StateSpec

# The parts of an augmented state: the problem's own, then one for each integral.
_OWN, _EXTRA = "state", "integral"


class FieldPoint:
    """The field at one time and state, with its Jacobian products.

    Attributes:
        t: time, a 0-d tensor.
        u: the state.
        f: the derivative there.
        field: the field itself, as a function of time and state.
    """

    def __init__(
        self, t: Tensor, u: Any, f: Any, field: Callable[[Tensor, Any], Any], with_graph: bool
    ) -> None:
        self.t, self.u, self.f, self.field = t, u, f, field
        self._with_graph = with_graph
        self._pulled: dict[int, tuple[Tensor, Tensor]] = {}

    def pullback(self, vector: Tensor) -> Tensor:
        """`vector^T df/du` for a single-tensor state, in the state's shape; computed once."""
        found = self._pulled.get(id(vector))
        if found is None:
            if not isinstance(self.f, Tensor):
                raise TypeError(
                    "the Jacobian of a state of several tensors is not supported.\n"
                    "  Stack them into one tensor."
                )
            if self.f.requires_grad:
                (product,) = torch.autograd.grad(
                    self.f,
                    self.u,
                    vector,
                    create_graph=self._with_graph,
                    retain_graph=True,
                    allow_unused=True,
                )
                product = torch.zeros_like(self.u) if product is None else product
            else:
                product = torch.zeros_like(self.u)
            # The vector is kept, so that its id stays its own.
            found = self._pulled[id(vector)] = (vector, product)
        return found[1]


Rate = Callable[[FieldPoint], Tensor]


def samples_of(u: Tensor) -> Tensor:
    """A state as `(B, D)`: batch first, everything behind it flattened."""
    return u.reshape(u.shape[0], -1) if u.ndim else u.reshape(1, 1)


class AugmentedField(nn.Module):
    """A problem's field with rates to integrate beside it."""

    def __init__(self, problem: ODEProblem, rates: dict[str, Rate]) -> None:
        super().__init__()
        self.inner = problem.f
        self.spec: StateSpec = problem.spec
        self.with_p = problem.p is not None
        self.rates = rates

    def forward(self, t: Tensor, state: dict[str, Tensor], p: Any = None) -> dict[str, Tensor]:
        """Derivative of the augmented state."""
        own = [part for key, part in state.items() if key.startswith(_OWN)]
        outer_grad = torch.is_grad_enabled()
        with torch.enable_grad():
            parts = [part if part.requires_grad else part.requires_grad_() for part in own]
            u = self.spec.assemble(parts)

            def field(t: Tensor, u: Any) -> Any:
                return self.inner(t, u, p) if self.with_p else self.inner(t, u)

            f = field(t, u)
            point = FieldPoint(t, u, f, field, outer_grad)
            found = {name: rate(point) for name, rate in self.rates.items()}
        out = dict(zip([k for k in state if k.startswith(_OWN)], self.spec.parts(f), strict=True))
        out.update({f"{_EXTRA} {name}": value for name, value in found.items()})
        return out if outer_grad else {key: value.detach() for key, value in out.items()}


def augment(
    problem: ODEProblem, rates: dict[str, Rate], rtol: Any, atol: Any
) -> tuple[ODEProblem, Any, Any]:
    """A problem that integrates `rates` too, with tolerances that only the state answers to.

    Each rate gives one number a sample, shape `(B,)`.
    """
    spec = problem.spec
    parts = spec.parts(problem.u0)
    names = [f"{_OWN} {key}" for key in (spec.keys or ("u",))]
    batch = parts[0].shape[0] if parts[0].ndim else 1
    u0: dict[str, Tensor] = dict(zip(names, parts, strict=True))
    extra = {
        f"{_EXTRA} {name}": torch.zeros(batch, dtype=spec.dtype, device=spec.device)
        for name in rates
    }

    def spread(value: Any, for_extra: float) -> dict[str, Any]:
        given = (
            spec.parts(value) if isinstance(value, tuple | list | dict) else [value] * len(names)
        )
        return {**dict(zip(names, given, strict=True)), **dict.fromkeys(extra, for_extra)}

    bigger = dataclasses.replace(problem, f=AugmentedField(problem, rates), u0={**u0, **extra})
    return bigger, spread(rtol, 0.0), spread(atol, math.inf)


def integrals(solution: Solution) -> dict[str, Tensor]:
    """The integrals at the end of an augmented solve, each `(B,)`."""
    prefix = f"{_EXTRA} "
    return {
        key.removeprefix(prefix): value
        for key, value in solution.u1.items()
        if key.startswith(prefix)
    }


def without_extra(solution: Solution, problem: ODEProblem) -> Solution:
    """The solution of the problem itself, from that of the augmented one."""
    spec = problem.spec

    def own(state: dict[str, Tensor]) -> Any:
        return spec.assemble([part for key, part in state.items() if key.startswith(_OWN)])

    return dataclasses.replace(
        solution,
        problem=problem,
        u1=own(solution.u1),
        trajectory=solution.trajectory.restrict(problem),
        make_states=lambda: own(solution.u),
        _states=None,
    )
