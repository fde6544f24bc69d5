"""Ensembles: many initial states or parameters of one problem, each with steps of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.ode import CONTAINS_ITSELF, Problem
from pysciml_node.problems.state import State, StateSpec, as_state, map_tensors, tensors_of


@dataclass(frozen=True)
class EnsembleProblem(checks.Configured):
    """Many initial states `u_m(t0)` and parameters `p_m` of one problem, `m = 1, ..., M`.

    Each member is solved for itself, with step sizes of its own; the rows of a batch in one `u0`
    share theirs. `solve` takes it with the options of a single problem and returns an
    `EnsembleSolution`.

    The Julia engine solves the members by one call, over the threads of Julia (the environment
    variable `PYTHON_JULIACALL_THREADS`, 1 by default) where the field is a module or a
    `JuliaField` and nothing watches the steps; other callables need Python's lock, and run one
    after the other, as they do in the torch engine.

    Args:
        problem: what the members share.
        u0: their initial states, like the problem's with a leading `M`; default the problem's for
            all.
        p: their parameters, like the problem's with a leading `M` in each tensor; default the
            problem's for all.

    Raises:
        TypeError: `problem` is no problem, or there are neither initial states nor parameters.
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
    size: int = field(init=False, repr=False)

    def __post_init__(self) -> None:
        example = "ODEProblem(f, u0, tspan)"
        checks.instance("problem", self.problem, Problem, example=example, noun="one problem")
        if self.u0 is not None:
            checks.settle(self, u0=as_state(self.u0))
        given: list[tuple[str, Tensor, torch.Size | None]] = []
        if self.u0 is not None:
            given += _states("u0", self.u0, self.problem.spec)
        if self.p is not None:
            shared = [x.shape for x in tensors_of(self.problem.p)]
            try:
                stacked = list(tensors_of(self.p))
            except RecursionError:
                raise ValueError(CONTAINS_ITSELF) from None
            if shared and len(shared) != len(stacked):
                raise ValueError(
                    f"p must have the {len(shared)} tensors of the problem's p, each with a "
                    f"leading size M, but has {len(stacked)}.\n"
                    "  Stack the members' p, tensor by tensor: torch.stack([p1, p2])."
                )
            shapes: list[torch.Size | None] = [*shared] if shared else [None] * len(stacked)
            given += [("p", x, shape) for x, shape in zip(stacked, shapes, strict=True)]
        if not given:
            raise TypeError(
                "an EnsembleProblem needs u0 or p with a leading size M, and got neither.\n"
                "  One solve: solve(problem)."
            )
        object.__setattr__(self, "size", _common_size(given))

    def __len__(self) -> int:
        return self.size

    def members(self) -> list[Problem]:
        """The single problems; gradients flow back from them to the tensors of the ensemble."""
        # One node of the graph for each tensor, not one for each member.
        starts = None if self.u0 is None else _unbind(self.u0, self.size)
        parameters = None if self.p is None else _unbind(self.p, self.size)
        problems: list[Problem] = []
        for i in range(self.size):
            changes: dict[str, Any] = {}
            if starts is not None:
                changes["u0"] = starts[i]
            if parameters is not None:
                changes["p"] = parameters[i]
            problem: Any = self.problem
            problems.append(dataclasses.replace(problem, **changes))
        return problems


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
            f"the leading sizes of u0 and p must be one number of members, at least 1, but are "
            f"{sorted(sizes)}.\n  Repeat what the members share: x.expand(M, *x.shape)."
        )
    return sizes.pop()


def _unbind(tree: Any, size: int) -> list[Any]:
    rows = [iter(x.unbind(0)) for x in tensors_of(tree)]
    trees = []
    for _ in range(size):
        leaves = iter([next(row) for row in rows])
        trees.append(map_tensors(lambda _, leaves=leaves: next(leaves), tree))
    return trees
