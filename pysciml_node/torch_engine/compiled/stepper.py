"""Compiled solves: the adaptive loop and its discrete adjoint, each as one compiled graph.

The graphs of `compiled_graphs` hold whole solves, so a solve costs one launch and one host read
whatever its number of steps. They are compiled once for a field, a method, and the shapes of the
state, of `saveat` and of `p`; times, tolerances, step sizes, controllers, states, parameters and
`p` are values that never compile anything again.
"""

from __future__ import annotations

import math
import types
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pysciml_node.tableaus.base import Tableau
from pysciml_node.torch_engine.compiled import graphs
from pysciml_node.torch_engine.compiled.build import (
    CompileError,
    check_field,
    compiler_available,
)
from pysciml_node.torch_engine.compiled.solve import Layout, Solve, SolveNode, evaluate

__all__ = [
    "CompileError",
    "CompiledResult",
    "CompiledSolver",
    "Status",
    "StepControl",
    "compiled_solver",
    "compiler_available",
]

# Errors below this count as this when they are the previous one (see `PIController`).
_ERROR_FLOOR = 1e-4


class Status(IntEnum):
    """How a compiled solve ended."""

    RUNNING = int(graphs.RUNNING)
    SUCCESS = int(graphs.SUCCESS)
    OUT_OF_STEPS = int(graphs.OUT_OF_STEPS)
    SIZE_TOO_SMALL = int(graphs.SIZE_TOO_SMALL)
    NON_FINITE = int(graphs.NON_FINITE)


@dataclass(frozen=True)
class StepControl:
    """The PI controller as numbers; `beta2=0` is integral control, `fixed` takes steps of `dt0`."""

    beta1: float
    beta2: float = 0.0
    gamma: float = 0.9
    qmin: float = 0.2
    qmax: float = 10.0
    fixed: bool = False


@dataclass
class CompiledResult:
    """What a compiled solve returns.

    Attributes:
        u1: the state where the solve ended, at `t1` exactly if it succeeded; differentiable.
        saved: the states at `saveat`, `(T, *shape)`, or `None`; rows of times that were not
            reached are undefined; differentiable.
        status: how the solve ended.
        t: where it ended.
        dt: the signed step size that would have come next.
        naccept: accepted steps.
        nreject: rejected steps.
        nfe: evaluations of the field.
        nfe_backward: evaluations that one backward sweep takes, each with its pullback.
    """

    u1: Tensor
    saved: Tensor | None
    status: Status
    t: float
    dt: float
    naccept: int
    nreject: int
    nfe: int
    nfe_backward: int
    _steps: Sequence[tuple[int, Tensor]] = field(repr=False)
    _states: Sequence[Tensor] = field(repr=False)
    _solve: Solve = field(repr=False)

    def on_backward(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each backward sweep."""
        self._solve.on_backward = listener

    @property
    def steps(self) -> Tensor:
        """The accepted steps, `(naccept, 4)` float64: start, signed size, end, scaled error."""
        return torch.cat([steps[:rows] for rows, steps in self._steps])

    @property
    def states(self) -> Tensor:
        """The states at the starts of the accepted steps, `(naccept, *shape)`; differentiable.

        Raises:
            RuntimeError: the solve was told not to keep them.
        """
        if not self._states:
            raise RuntimeError("the solve kept no states: call the solver with keep_states=True.")
        parts = zip(self._steps, self._states, strict=True)
        return torch.cat([states[:rows] for (rows, _), states in parts])


class CompiledSolver:
    """Solves one field with one method; made by `compiled_solver`.

    Args:
        f: gives the field.
        tableau: the method.
    """

    def __init__(self, f: Callable[[], Any], tableau: Tableau) -> None:
        self._f, self._tableau = f, tableau
        self._layouts: dict[Any, Layout] = {}

    def __call__(
        self,
        u0: Tensor,
        t0: float | Tensor,
        t1: float | Tensor,
        rtol: float,
        atol: float,
        control: StepControl,
        *,
        dt0: float | None = None,
        dtmin: float = 0.0,
        dtmax: float = math.inf,
        max_steps: int = 100_000,
        saveat: Tensor | None = None,
        p: Any = None,
        keep_states: bool = False,
    ) -> CompiledResult:
        """Solve from `t0` to `t1`.

        Gradients flow from `u1`, `saved` and `states` to `u0`, to the field's parameters and to
        the tensors of `p`.

        Args:
            u0: the state at `t0`, real, of any shape.
            t0: start.
            t1: end, before or after `t0`.
            rtol: relative tolerance.
            atol: absolute tolerance.
            control: the step size controller.
            dt0: size of the first step; `None` takes Hairer's.
            dtmin: the solve fails below this step size.
            dtmax: no step is longer.
            max_steps: the solve fails after this many attempts.
            saveat: `(T,)` times from `t0` to `t1`, in this order.
            p: a tensor, or tuples, lists and dicts of tensors, handed to the field as third
                argument.
            keep_states: keep the states of the steps (they are kept anyway where gradients may
                be asked for).

        Raises:
            CompileError: the field does not compile.
            NotImplementedError: a gradient with respect to a time is asked for.
        """
        if torch.is_inference_mode_enabled():
            # Tensors made in inference mode are of another kind, which compiles anew.
            with torch.inference_mode(False), torch.no_grad():
                return self(
                    _ordinary(u0),
                    float(t0),
                    float(t1),
                    rtol,
                    atol,
                    control,
                    dt0=dt0,
                    dtmin=dtmin,
                    dtmax=dtmax,
                    max_steps=max_steps,
                    saveat=None if saveat is None else _ordinary(saveat),
                    p=None if p is None else pytree.tree_map(_ordinary, p),
                    keep_states=keep_states,
                )
        f = self._f()
        if f is None:
            raise ReferenceError("the field is gone: keep a reference to it while it is solved.")
        _refuse_time_gradients(t0, t1, saveat)
        leaves, p_spec = ([], None) if p is None else _leaves(p)
        module = isinstance(f, nn.Module)
        parameters = _parameters(f) if module else []
        grad = torch.is_grad_enabled()
        wanted = tuple(grad and x.requires_grad for x in leaves)
        key = (
            u0.shape,
            u0.dtype,
            u0.device,
            None if saveat is None else len(saveat),
            p_spec,
            tuple((x.shape, x.dtype, x.requires_grad) for x in leaves),
            len(parameters),
            module and f.training,
        )
        t0, t1 = float(t0), float(t1)
        layout = self._layouts.get(key)
        if layout is None:
            layout = self._layouts[key] = self._make(f, t0, u0, leaves, p_spec)
        direction = 1.0 if t1 > t0 else -1.0
        values = [
            *(t0, math.nan if dt0 is None else direction * abs(dt0), _ERROR_FLOOR),
            *(0.0, 0.0, graphs.RUNNING),
            *(t1, direction, rtol, atol, dtmin, dtmax, float(max_steps), 0.0),
            *(control.beta1, control.beta2, control.gamma, control.qmin, control.qmax),
            *(_ERROR_FLOOR, float(control.fixed)),
        ]
        if saveat is not None:
            saveat = saveat.to(u0.device, torch.float64).contiguous()
        moving = [x for x, w in zip(leaves, wanted, strict=True) if w]
        differentiable = grad and (u0.requires_grad or bool(parameters) or bool(moving))
        solve = Solve(layout, f, values, saveat, leaves, keep_states or differentiable)
        u0 = u0.contiguous()
        if differentiable:
            u1, saved, *states = SolveNode.apply(solve, u0, *parameters, *moving)  # type: ignore[no-untyped-call]
        else:
            with torch.no_grad():
                u1, saved, states = solve.forward(u0.detach())
        last = solve.control
        return CompiledResult(
            u1=u1,
            saved=saved,
            status=Status(int(last[graphs.STATUS])),
            t=last[graphs.TIME],
            dt=last[graphs.SIZE],
            naccept=int(last[graphs.ACCEPTED]),
            nreject=int(last[graphs.REJECTED]),
            nfe=solve.evaluations,
            nfe_backward=solve.evaluations_backward,
            _steps=solve.steps,
            _states=states,
            _solve=solve,
        )

    def _make(self, f: Any, t0: float, u0: Tensor, leaves: list[Tensor], p_spec: Any) -> Layout:
        if u0.is_complex():
            raise CompileError(
                "complex states are not compiled.\n"
                "  Solve with compile=False, or write the field for torch.view_as_real(u)."
            )
        check_field(
            f,
            torch.tensor(t0, dtype=u0.dtype, device=u0.device),
            u0,
            leaves,
            lambda t, u, leaves: evaluate(f, t, u, leaves, p_spec),
        )
        names: tuple[str, ...] = ()
        if isinstance(f, nn.Module):
            names = tuple(name for name, x in f.named_parameters() if x.requires_grad)
        wanted = tuple(x.requires_grad for x in leaves)
        shapes = tuple(x.shape for x in leaves)
        return Layout(self._tableau, names, p_spec, shapes, wanted, u0.device)


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """What `module.parameters()` yields and requires gradients; this runs on every call."""
    found: dict[int, nn.Parameter] = {}
    todo = [module]
    while todo:
        owner = todo.pop()
        for x in owner._parameters.values():
            if x is not None and x.requires_grad:
                found[id(x)] = x
        todo.extend(child for child in reversed(owner._modules.values()) if child is not None)
    return list(found.values())


def _ordinary(x: Any) -> Any:
    """A tensor that was not made in inference mode."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _leaves(p: Any) -> tuple[list[Tensor], Any]:
    """The tensors of `p` and its structure."""
    leaves, spec = pytree.tree_flatten(p)
    for leaf in leaves:
        if not isinstance(leaf, Tensor):
            raise CompileError(
                f"p must hold tensors only, but holds a {type(leaf).__name__}.\n"
                "  Make it a tensor, bind it to the field, or solve with compile=False."
            )
    return leaves, spec


def _refuse_time_gradients(*times: float | Tensor | None) -> None:
    if torch.is_grad_enabled():
        for time in times:
            if isinstance(time, Tensor) and time.requires_grad:
                raise NotImplementedError(
                    "a compiled solve has no gradients with respect to t0, t1 and saveat.\n"
                    "  Detach the times, or solve with compile=False."
                )


# By the identity of the field; fields that live elsewhere are held weakly.
_solvers: weakref.WeakKeyDictionary[Any, dict[int, CompiledSolver]] = weakref.WeakKeyDictionary()
_function_solvers: dict[tuple[int, int], CompiledSolver] = {}


def compiled_solver(f: Any, tableau: Tableau) -> CompiledSolver:
    """The compiled solver of a field with a method, made once for both.

    Nothing is compiled before the solver is called: then once for each choice of the shapes and
    dtypes of `u0`, `saveat` and `p` (tens of seconds for the first, gradients separately). A
    module's parameters are read at each call. A function without closure and defaults is known by
    its code, so that a lambda written inside a training loop is compiled once.

    Args:
        f: `f(t, u)` or `f(t, u, p)`: a module, or a function that captures nothing that requires
            gradients.
        tableau: the method.

    Example:
        >>> import torch
        >>> from pysciml_node.tableaus import TSIT5
        >>> solver = compiled_solver(lambda t, u: -u, TSIT5)
    """
    if isinstance(f, types.FunctionType) and not (f.__closure__ or f.__defaults__):
        key = (id(f.__code__), id(tableau))
        known = _function_solvers.get(key)
        if known is None:
            # The solver holds the function, the function its code: the identity stays taken.
            known = _function_solvers[key] = CompiledSolver(lambda: f, tableau)
        return known
    solvers = _solvers.get(f)
    if solvers is None:
        solvers = _solvers.setdefault(f, {})
    solver = solvers.get(id(tableau))
    if solver is None:
        solver = solvers[id(tableau)] = CompiledSolver(weakref.ref(f), tableau)
    return solver
