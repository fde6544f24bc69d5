"""What a problem says of its Jacobian, compared with its field where a native solve begins."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pysciml_node.algorithms.explicit import Algorithm, ExplicitRungeKutta
from pysciml_node.algorithms.options import Array, MemberOptions
from pysciml_node.algorithms.switching import OneStepMethod
from pysciml_node.problems.ensemble import EnsembleProblem
from pysciml_node.problems.ode import ODEProblem
from pysciml_node.replay.jacobians import Expectation, linearizer_of
from pysciml_node.replay.members.field import MembersField
from pysciml_node.replay.members.implicit import jacobians_of
from pysciml_node.steps.field import FlatField
from pysciml_node.tableaus import RosenbrockTableau

# Entries of Jacobians that are held at once, or those of one member.
_ENTRIES = 2**22


def is_told(problem: ODEProblem, algorithm: Algorithm) -> bool:
    """Whether steps read what a problem says of its Jacobian."""
    said = problem.jac is not None or problem.jac_sparsity is not None
    return said and not isinstance(algorithm, ExplicitRungeKutta)


def expect_fitting(problem: ODEProblem, algorithm: OneStepMethod) -> None:
    """Compare what steps read of a Jacobian, as the loop in Python does at the first state.

    Raises:
        ValueError: it does not fit the field.
    """
    if not is_told(problem, algorithm):
        return
    field, (t,) = FlatField(problem), problem.time_tensor([problem.t0])
    u = problem.spec.flatten(problem.u0).detach()
    rosenbrock = any(isinstance(x, RosenbrockTableau) for x in algorithm.tableaus)
    with torch.no_grad():
        linearize = linearizer_of(field, None)
        linearize(field, t, u, with_time=rosenbrock, recorded=False, differentiable=False)


def expect_members_fitting(
    ensemble: EnsembleProblem, algorithm: OneStepMethod, options: MemberOptions, starts: Tensor
) -> None:
    """The same for all members, each at its first state.

    Args:
        ensemble: the members.
        algorithm: how they are solved.
        options: of all, and of each.
        starts: their flat first states, `(M, N)`.

    Raises:
        ValueError: it does not fit the field of one of them.
    """
    problem, (count, size) = ensemble.problem, starts.shape
    assert isinstance(problem, ODEProblem)
    if not is_told(problem, algorithm):
        return
    field, times = MembersField(ensemble), options.spans[0]
    for rows in np.array_split(np.arange(count), -(-count * size**2 // _ENTRIES)):
        try:
            found = _derivatives(field, problem, rows, times[rows], starts.detach()[rows])
        except Exception:  # whatever vmap cannot do
            for m in rows.tolist():
                one = ensemble.member(m)
                assert isinstance(one, ODEProblem)
                expect_fitting(one, algorithm)
            continue
        if problem.jac is None:
            name, remedy = "jac_sparsity", "Mark all entries that can differ from zero"
            Expectation(name, f"{remedy}, or leave it out.")(*found)
        elif any(isinstance(x, RosenbrockTableau) for x in algorithm.tableaus):
            # Newton's iteration takes approximations.
            field.expect_jacobian(*found)


def _derivatives(
    field: MembersField, problem: ODEProblem, rows: Array, times: Array, starts: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What is said to be the Jacobians of some members, `(L, N, N)`, the rates, and the states."""
    t, p = torch.from_numpy(times).to(starts), field.parameters(rows)
    with torch.enable_grad():
        state = starts.clone().requires_grad_()
        rate = field(t, state, p)
        if problem.jac is not None:
            return field.jacobian(t, state, p), rate, state
        assert problem.jac_sparsity is not None
        matrices = jacobians_of(rate, state, False)
    return matrices * problem.jac_sparsity.to(matrices), rate, state
