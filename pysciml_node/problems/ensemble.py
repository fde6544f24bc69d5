"""Ensembles: many initial states or parameters of one problem, each with steps of its own."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.ode import FEWEST_TIMES, ODEProblem, Problem, checked_parameters
from pysciml_node.problems.state import (
    State,
    StateSpec,
    as_parameters,
    as_state,
    map_tensors,
    moves,
    refuse_batched,
    tensors_of,
)

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class OfOne:
    """A field of batches, called for a single member.

    Args:
        function: takes `t` of shape `(M, 1, ...)` and states `(M, ...)`.
        own_p: whether the members have parameters of their own.
    """

    function: Callable[..., Any]
    own_p: bool

    def __call__(self, t: Tensor, u: Tensor, *p: Any) -> Any:
        """The derivative of one state."""
        if self.own_p:
            p = tuple(map_tensors(lambda x: x.unsqueeze(0), extra) for extra in p)
        out = self.function(t.reshape((1,) * (u.ndim + 1)), u.unsqueeze(0), *p)
        return out.squeeze(0) if isinstance(out, Tensor) and out.ndim else out


@dataclass(frozen=True)
class EnsembleProblem(checks.Configured):
    """Many initial states `u_m(t0)` and parameters `p_m` of one problem, `m = 1, ..., M`.

    Each member is solved for itself: it has a time, a step size, an end, output times and a failure
    of its own, where the rows of a batch in one `u0` share theirs. `solve` takes it with the
    options of a single problem and returns an `EnsembleSolution`.

    The torch engine steps all members in one batch. It evaluates the field by `torch.vmap`, so the
    field is written for one member, and members that have reached their end leave the batch.
    Stochastic ones have a Brownian path each, the one that they have alone. Implicit methods
    factor the matrices of all members at once. Events stop and change each member at times of its
    own; conditions and effects are mapped like the field. Continuous adjoints go back in one batch
    too, each member by adaptive steps of its own. One after the other go: methods that switch,
    `jac_sparsity=` and GMRES, events with a mass matrix, stochastic equations off the CPU,
    `InterpolatingAdjoint` of Rosenbrock methods, output times and shared ends that receive
    gradients, controllers of the caller's own, fields with hooks, fields that keep a tensor of an
    evaluation in an attribute, effects of events that change more than the state (such as a list of
    times), and fields that `torch.vmap` cannot run (with a branch on values, checkpoints or random
    numbers) or evaluates to something else.

    The Julia engine solves the members by one call, and takes their gradients by one call, over the
    threads of Julia (the environment variable `PYTHON_JULIACALL_THREADS`, 1 by default) where the
    field can be translated or is a `JuliaField`, and nothing watches the steps. Other callables
    need Python's lock, and run one after the other; so do members with tolerances of their own.

    Args:
        problem: what the members share.
        u0: their initial states, like the problem's with a leading `M`; default the problem's for
            all.
        p: their parameters, like the problem's with a leading `M` in each tensor; default the
            problem's for all.
        tspan: their intervals, `(M, 2)`; default the problem's for all.
        batched: the field takes a batch of members itself: `t` of shape `(M, 1, ...)`, an axis for
            each of `u0`'s, the state and `p` with a leading `M` (a `p` of the problem has none). It
            is called with those members that are still under way, and has to treat each for
            itself. For a state that is one tensor.

    Raises:
        TypeError: `problem` is no problem, or there is nothing that differs between members.
        ValueError: shapes that do not fit the problem or one another.

    Examples:
        >>> import torch, pysciml_node as psn
        >>> problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1).double(), (0.0, 1.0))
        >>> starts = torch.tensor([[1.0], [2.0]]).double()
        >>> solution = psn.solve(psn.EnsembleProblem(problem, starts), rtol=1e-9, atol=1e-9)
        >>> [round(x, 6) for x in solution.u1[:, 0].tolist()]
        [0.367879, 0.735759]
    """

    problem: Problem
    u0: State | None = None
    p: Any = None
    tspan: Tensor | None = None
    batched: bool = False
    size: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        example = "ODEProblem(f, u0, tspan)"
        checks.instance("problem", self.problem, Problem, example=example, noun="one problem")
        checks.settle(self, batched=checks.flag("batched", self.batched))
        if self.batched and not isinstance(self.problem, ODEProblem):
            raise ValueError("batched=True is for an ODEProblem.\n  Leave it out.")
        if self.batched and self.problem.spec.keys is not None:
            raise ValueError(
                "batched=True is for a state that is one tensor, but the problem's u0 has parts.\n"
                "  Leave it out: the field is then evaluated by torch.vmap."
            )
        if self.u0 is not None:
            checks.settle(self, u0=as_state(self.u0))
        if self.p is not None:
            checks.settle(self, p=as_parameters(self.p))
        given = self._given()
        if self.tspan is not None:
            checks.settle(self, tspan=_intervals(self.tspan, self.problem.spec))
            given.append(("tspan", self.tspan, _INTERVAL))
        if not given:
            got, hint = "got none of them", "One solve: solve(problem)."
            if self.p is not None:
                got, hint = "p holds no tensor", "Convert it: p=torch.as_tensor(p)."
            raise TypeError(
                f"an EnsembleProblem needs u0, p or tspan with a leading size M, and {got}.\n"
                f"  {hint}"
            )
        checks.settle(self, size=_common_size(given))

    def _given(self) -> list[tuple[str, Tensor, torch.Size | None]]:
        """The tensors of `u0` and `p` with the shapes that theirs have to end in."""
        states = [] if self.u0 is None else _states("u0", self.u0, self.problem.spec)
        return states if self.p is None else [*states, *_parameters(self.p, self.problem)]

    def __len__(self) -> int:
        return self.size

    def member(self, m: int) -> Problem:
        """The single problem of a member; gradients flow back to the tensors of the ensemble."""
        changes: dict[str, Any] = {}
        for name in ("u0", "p"):
            tree = getattr(self, name)
            if tree is not None:
                changes[name] = map_tensors(lambda x: x[m], tree)
        if self.tspan is not None:
            t0, t1 = self.tspan[m]
            changes["tspan"] = (t0, t1) if moves(self.tspan) else (float(t0), float(t1))
        return self._single(changes)

    def members(self) -> list[Problem]:
        """The single problems of all members."""
        # One node of the graph for each tensor, not one for each member.
        rows = {
            name: _unbind(tree, self.size)
            for name in ("u0", "p")
            if (tree := getattr(self, name)) is not None
        }
        if self.tspan is not None:
            # An optimizer may go on and change what was given.
            ends = self.tspan
            rows["tspan"] = [*ends.clone()] if moves(ends) else ends.tolist()
        return [
            self._single({name: each[m] for name, each in rows.items()}) for m in range(self.size)
        ]

    def part(self, members: slice) -> EnsembleProblem:
        """The ensemble of some members; gradients flow back to the tensors of this one."""
        changes = {
            name: map_tensors(lambda x: x[members].clone(), tree)
            for name in ("u0", "p", "tspan")
            if (tree := getattr(self, name)) is not None
        }
        return dataclasses.replace(self, **changes)

    def _single(self, changes: dict[str, Any]) -> Problem:
        if self.batched:
            problem: Any = self.problem
            changes["f"] = OfOne(problem.f, self.p is not None)
        # What the members are made of has been checked, but not that their function takes a `p`.
        if self.p is not None:
            changes["_called"] = False
        single = copy.copy(self.problem)
        checks.settle(single, **changes)
        return single

    def starts(self) -> Tensor:
        """The flat initial states, `(M, N)`: a copy, which later changes in place do not reach."""
        spec = self.problem.spec
        if self.u0 is None:
            return spec.flatten(self.problem.u0).clone().expand(self.size, -1)
        return torch.cat([part.reshape(self.size, -1) for part in spec.parts(self.u0)], dim=1)

    def spans(self) -> tuple[Array, Array]:
        """Starts and ends of the members' intervals, each `(M,)` in float64."""
        if self.tspan is None:
            return np.full(self.size, self.problem.t0), np.full(self.size, self.problem.t1)
        first, last = self.tspan.detach().cpu().double().numpy().T
        return first.copy(), last.copy()


def check_sizes(ensemble: EnsembleProblem) -> None:
    """Refuse an ensemble whose tensors have been given data of other shapes since it was made.

    Raises:
        ValueError: their leading sizes are no longer the number of members.
    """
    spans = [] if ensemble.tspan is None else [("tspan", ensemble.tspan, _INTERVAL)]
    size = _common_size([*ensemble._given(), *spans])
    if size != len(ensemble):
        raise ValueError(
            "u0, p and tspan must have the leading size that they had when the ensemble was made, "
            f"{len(ensemble)}, but have {size}.\n  Make it anew: EnsembleProblem(problem, u0)."
        )


def pieces_of(
    ensemble: EnsembleProblem, rows: Array, starts: Tensor, tspan: Tensor
) -> EnsembleProblem:
    """Parts of some members' intervals, which may be as short as a step.

    Args:
        ensemble: of all members.
        rows: which members, `(L,)`.
        starts: their flat states at the starts, `(L, N)`.
        tspan: the starts and ends, `(L, 2)` in float64.
    """
    part, p = copy.copy(ensemble), ensemble.p
    if p is not None and len(rows) < len(ensemble):
        p = map_tensors(lambda x: x.index_select(0, torch.from_numpy(rows).to(x.device)), p)
    u0 = ensemble.problem.spec.unflatten(starts)
    checks.settle(part, u0=u0, p=p, tspan=tspan, size=len(rows))
    return part


_INTERVAL = torch.Size((2,))


def _intervals(given: Any, spec: StateSpec) -> Tensor:
    """Own intervals of the members, `(M, 2)`."""
    if isinstance(given, list | tuple) and all(isinstance(row, list | tuple) for row in given):
        given = torch.tensor([checks.numbers("tspan", row) for row in given], dtype=torch.float64)
    tspan = checks.tensor("tspan", given, real=True, finite=True)
    refuse_batched(tspan)
    if tspan.ndim != 2 or tspan.shape[1] != 2:
        raise ValueError(
            "tspan of an ensemble must have shape (M, 2), a start and an end for each member, but "
            f"has {tuple(tspan.shape)}.\n  An interval for all is the problem's own."
        )
    ends = tspan.detach().cpu().double().numpy()
    real = np.float64 if spec.real_dtype == torch.float64 else np.float32
    spacing = np.spacing(np.abs(ends).max(1).astype(real))
    short = np.flatnonzero(np.abs(ends[:, 1] - ends[:, 0]) < FEWEST_TIMES * spacing)
    if len(short):
        m = int(short[0])
        raise ValueError(
            f"tspan must have two different ends for each member, {FEWEST_TIMES} times of "
            f"{spec.real_dtype} apart at least, but tspan[{m}] is {tuple(ends[m].tolist())}.\n"
            "  Leave out members whose end is their start: their state there is u0 itself."
        )
    return tspan


def _parameters(many: Any, problem: Problem) -> list[tuple[str, Tensor, torch.Size | None]]:
    """The tensors of many parameters with the shapes that theirs have to end in."""
    shared = [x.shape for x in tensors_of(problem.p)]
    stacked = checked_parameters(many, problem.spec)
    if shared and len(shared) != len(stacked):
        raise ValueError(
            f"p must have the {len(shared)} tensors of the problem's p, each with a leading size "
            f"M, but has {len(stacked)}.\n"
            "  Stack the members' p, tensor by tensor: torch.stack([p1, p2])."
        )
    shapes: list[torch.Size | None] = [*shared] if shared else [None] * len(stacked)
    return [("p", x, shape) for x, shape in zip(stacked, shapes, strict=True)]


def _states(
    name: str, states: State, spec: StateSpec
) -> list[tuple[str, Tensor, torch.Size | None]]:
    """The parts of the members' states, with the shapes that they have to end in."""
    try:
        parts = spec.parts(states)
    except (KeyError, IndexError, TypeError):
        raise ValueError(
            f"{name} must have the parts of the problem's u0, {list(spec.keys or ())}, but is a "
            f"{type(states).__name__}.\n"
            "  Stack the members' states, part by part: torch.stack([u0, v0])."
        ) from None
    for part in parts:
        if not isinstance(part, Tensor):
            raise TypeError(
                f"{name} must be made of tensors, but has a {type(part).__name__}.\n"
                "  Convert it: torch.as_tensor(...)."
            )
        if part.dtype != spec.dtype or part.device != spec.device:
            raise ValueError(
                f"{name} must be {spec.dtype} on {spec.device} like the problem's u0, but is "
                f"{part.dtype} on {part.device}.\n  Convert it with .to(...)."
            )
    return [(name, part, shape) for part, shape in zip(parts, spec.shapes, strict=True)]


def _common_size(given: Sequence[tuple[str, Tensor, torch.Size | None]]) -> int:
    for name, tensor, shape in given:
        if tensor.ndim == 0 or (shape is not None and tensor.shape[1:] != shape):
            wanted = "(M, ...)" if shape is None else f"(M, {', '.join(map(str, shape))})"
            raise ValueError(
                f"{name} of an ensemble must have shape {wanted}, but has {tuple(tensor.shape)}.\n"
                f"  The members come first: torch.stack of the {name} of each."
            )
    sizes = {tensor.shape[0] for _, tensor, _ in given}
    if len(sizes) > 1 or 0 in sizes:
        raise ValueError(
            "the leading sizes of u0, p and tspan must be one number of members, at least 1, but "
            f"are {sorted(sizes)}.\n  Repeat what is the same for all: u0.expand(M, ...)."
        )
    return sizes.pop()


def _unbind(tree: Any, size: int) -> list[Any]:
    rows = [iter(x.unbind(0)) for x in tensors_of(tree)]
    trees = []
    for _ in range(size):
        leaves = iter([next(row) for row in rows])
        trees.append(map_tensors(lambda _, leaves=leaves: next(leaves), tree))
    return trees
