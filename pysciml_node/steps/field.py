"""The user's vector field as a counted function of flat states."""

from __future__ import annotations

import functools
import types
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pysciml_node.problems.ode import ODEProblem
from pysciml_node.problems.sde import SDEProblem
from pysciml_node.problems.state import StateSpec, map_tensors, tensors_of


class FlatField:
    """`f` on flat states `(N,)`, with its evaluations counted and its output checked.

    Args:
        problem: gives `f` (the drift of a stochastic one), the state's structure and `p`.
        p: replaces the problem's `p` (a detached copy during a backward sweep).
    """

    def __init__(self, problem: ODEProblem | SDEProblem, p: Any = None) -> None:
        self.f = problem.f
        self.spec: StateSpec = problem.spec
        self.p = problem.p if p is None else p
        self.nfe = 0

    def __call__(self, t: Tensor, u: Tensor) -> Tensor:
        """Evaluate the derivative; shape `(N,)`."""
        self.nfe += 1
        spec = self.spec
        state = spec.unflatten(u)
        out = self.f(t, state) if self.p is None else self.f(t, state, self.p)
        if spec.keys is None:
            if (
                type(out) is not Tensor
                or out.shape != spec.shapes[0]
                or out.dtype != spec.dtype
                or out.device != spec.device
            ):
                out = self._checked(out)[0]
            flat: Tensor = out.reshape(-1)
            return flat
        return torch.cat([part.reshape(-1) for part in self._checked(out)])

    def _checked(self, out: Any) -> list[Tensor]:
        """The parts of an output, or an error that says what is wrong with it."""
        spec = self.spec
        expected = {None: "a tensor", int: "a tuple", str: "a dict"}[
            None if spec.keys is None else (int if isinstance(spec.keys[0], int) else str)
        ]
        same_kind = (
            isinstance(out, Tensor)
            if spec.keys is None
            else isinstance(out, tuple | list) and len(out) == len(spec.keys)
            if isinstance(spec.keys[0], int)
            else isinstance(out, dict) and set(out) == set(spec.keys)
        )
        if not same_kind:
            raise TypeError(
                f"the field must return {expected} like u0, but returned {type(out).__name__}"
                + (f" of {len(out)}" if isinstance(out, tuple | list | dict) else "")
                + ".\n  Return the derivative of each part of the state, in the same structure."
            )
        parts = list(spec.parts(out))
        for key, part, shape in zip(spec.keys or ("",), parts, spec.shapes, strict=True):
            name = "the field's output" if spec.keys is None else f"the field's output[{key!r}]"
            if not isinstance(part, Tensor):
                raise TypeError(f"{name} must be a tensor, but is {type(part).__name__}.")
            if part.shape != shape:
                raise ValueError(
                    f"{name} must have the state's shape {tuple(shape)}, but has "
                    f"{tuple(part.shape)}.\n  f(t, u) returns du/dt, one entry for each of u."
                )
            if part.device != spec.device:
                raise ValueError(f"{name} must be on {spec.device}, but is on {part.device}.")
            if part.dtype != spec.dtype:
                raise TypeError(
                    f"{name} must have the state's dtype {spec.dtype}, but has {part.dtype}.\n"
                    "  Convert the field's parameters (module.to(u0.dtype)) or u0."
                )
        return parts


def _modules(f: Any) -> list[nn.Module]:
    """The modules that can be seen in a callable: itself, its owner's, a closure's, attributes."""
    if isinstance(f, nn.Module):
        return [f]
    if isinstance(f, functools.partial):
        return [m for part in (f.func, *f.args, *f.keywords.values()) for m in _modules(part)]
    cells = getattr(f, "__closure__", None) or ()
    contents = [cell.cell_contents for cell in cells if not _is_empty(cell)]
    owner = getattr(f, "__self__", f)
    if not isinstance(owner, nn.Module | type | types.ModuleType):
        contents.extend(getattr(owner, "__dict__", {}).values())
    return [m for held in (owner, *contents) for m in _listed_modules(held)]


def _is_empty(cell: types.CellType) -> bool:
    """Whether a closure's name is not bound yet."""
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return True
    return False


def _listed_modules(held: Any) -> list[nn.Module]:
    """A module, or those in a list, tuple or dict."""
    if isinstance(held, nn.Module):
        return [held]
    if isinstance(held, dict):
        held = list(held.values())
    return [m for m in held if isinstance(m, nn.Module)] if isinstance(held, list | tuple) else []


def graph_leaves(root: Tensor) -> list[Tensor]:
    """The leaf tensors that a tensor's autograd graph ends in."""
    leaves: list[Tensor] = []
    seen: set[Any] = set()
    todo = [root.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.append(node.variable)
        todo.extend(edge for edge, _ in node.next_functions)
    return leaves


def expect_known(
    value: Tensor,
    known: Sequence[Tensor],
    who: str = "the field uses",
    remedy: str = "make the field an nn.Module that owns them",
) -> None:
    """Refuse tensors that need gradients and were not seen at `t0`.

    Args:
        value: of what the user gave.
        known: the leaves that its graph may end in.
        who: the beginning of the message.
        remedy: what to do, beside the ways that are open to all.

    Raises:
        RuntimeError: the graph of the value ends in others.
    """
    ids = {id(x) for x in known}
    late = [x for x in graph_leaves(value) if id(x) not in ids]
    if late:
        raise RuntimeError(
            f"{who} {len(late)} tensor(s) that need gradients and were not seen at t0, the first "
            f"of shape {tuple(late[0].shape)}: the gradient would miss them.\n"
            f"  Pass them as p=, {remedy}, or use adjoint=DirectAdjoint()."
        )


class DifferentiableField:
    """A field prepared for gradients: its inputs found, its vector-Jacobian product at hand.

    The inputs are the tensors of `p` (as detached leaves), the parameters of the modules seen in
    `f`, and every other leaf that one evaluation at `(t0, u0)` is found to depend on, so that
    tensors captured by a closure or set as attributes receive their gradients too. The backward
    sweep looks once more where it begins, and refuses to lose a gradient.

    Attributes:
        k0: the derivative at `(t0, u0)`, from the evaluation that looked for the inputs.
        inputs: the outer tensors that receive gradients, in the order of `leaves`.
        leaves: what stands for them inside the field.
    """

    def __init__(self, problem: ODEProblem, t0: Tensor, u0: Tensor) -> None:
        outer_p = [x for x in tensors_of(problem.p) if x.requires_grad]
        inner: dict[int, Tensor] = {id(x): x.detach().requires_grad_() for x in outer_p}
        p = None
        if problem.p is not None:
            p = map_tensors(lambda x: inner.get(id(x), x), problem.p)
        self.field = FlatField(problem, p)
        with torch.enable_grad():
            start = u0.detach().requires_grad_()
            time = t0.detach().requires_grad_()
            k0 = self.field(time, start)
        known = {id(start), id(time), *(id(x) for x in inner.values())}
        parameters = [x for m in _modules(problem.f) for x in m.parameters() if x.requires_grad] + [
            x for x in graph_leaves(k0) if id(x) not in known
        ]
        captured = list({id(x): x for x in parameters}.values())
        distinct_p = list({id(x): x for x in outer_p}.values())
        self.k0 = k0.detach()
        self.inputs = distinct_p + captured
        self.leaves = [inner[id(x)] for x in distinct_p] + captured
        self._looked_again = False

    @property
    def nfe(self) -> int:
        """Evaluations of the field so far."""
        return self.field.nfe

    def linearize(self, t: Tensor, u: Tensor, time_gradient: bool = False) -> Linearized:
        """Evaluate at `(t, u)`, keeping the graph for one vector-Jacobian product."""
        with torch.enable_grad():
            state = u.detach().requires_grad_()
            time = t.detach().requires_grad_() if time_gradient else t
            k = self.field(time, state)
        if not self._looked_again:
            self._looked_again = True
            expect_known(k, (state, time, *self.leaves))
        return Linearized(k, state, time if time_gradient else None, self.leaves)


class Linearized:
    """One evaluation of the field with its graph."""

    __slots__ = ("_k", "_leaves", "_state", "_time", "value")

    def __init__(self, k: Tensor, state: Tensor, time: Tensor | None, leaves: list[Tensor]) -> None:
        self._k, self._state, self._time, self._leaves = k, state, time, leaves
        self.value = k.detach()

    def vjp(
        self, cotangent: Tensor, with_state: bool = True, with_leaves: bool = True
    ) -> tuple[Tensor | None, Tensor | None, list[Tensor | None]]:
        """Pull a cotangent `(N,)` back to the state, the time and the field's inputs.

        An entry is `None` where the field does not depend on that input.
        """
        wanted: list[Tensor] = []
        if with_state:
            wanted.append(self._state)
        if self._time is not None:
            wanted.append(self._time)
        if with_leaves:
            wanted.extend(self._leaves)
        if not wanted or not self._k.requires_grad:
            return None, None, [None] * len(self._leaves)
        # The graph is kept: parts of it may be the caller's own (a captured non-leaf tensor).
        found: list[Tensor | None] = list(
            torch.autograd.grad(self._k, wanted, cotangent, retain_graph=True, allow_unused=True)
        )
        state = found.pop(0) if with_state else None
        time = found.pop(0) if self._time is not None else None
        return state, time, found if with_leaves else [None] * len(self._leaves)


class Accumulator:
    """Running sums of the gradients of the field's inputs."""

    def __init__(self, leaves: list[Tensor]) -> None:
        self.sums: list[Tensor | None] = [None] * len(leaves)

    def add(self, gradients: list[Tensor | None], scale: float | None = None) -> None:
        """Add one set of gradients, each multiplied by `scale`."""
        totals: list[Tensor] = []
        terms: list[Tensor] = []
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            total = self.sums[i]
            if total is None:
                # Autograd may hand out one tensor twice: copy before adding in place.
                self.sums[i] = gradient.clone() if scale is None else gradient * scale
            else:
                totals.append(total)
                terms.append(gradient)
        if totals:
            torch._foreach_add_(totals, terms, alpha=1.0 if scale is None else scale)
