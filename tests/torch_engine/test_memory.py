"""Without gradients a solve keeps what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import pysciml_node as psn

FIXED: dict[str, Any] = {"controller": psn.FixedStep(), "dt0": 0.05}


def solve(size: int, **options: Any) -> psn.Solution:
    problem = psn.ODEProblem(lambda t, u: -u, torch.ones(size), (0.0, 1.0))
    return psn.solve(problem, psn.Euler(), **FIXED, **options)


def test_large_states_of_steps_are_let_go() -> None:
    size = 2**20
    with torch.no_grad():
        solution = solve(size, saveat=[0.5, 1.0])
    kept = solution.trajectory.flat_states
    assert len(kept) * size * 4 <= 2**25
    assert solution.u[:, 0].tolist() == pytest.approx([0.95**10, 0.95**20], rel=1e-5)
    assert solution.u1[0].item() == solution.u[-1, 0].item()
    assert len(solution.step_times) == 21
    with pytest.raises(RuntimeError, match=r"are not kept.*\n.*saveat"):
        solution(0.3)


@pytest.mark.parametrize("gradients", [False, True])
def test_what_is_small_or_asked_for_or_has_gradients_is_kept(gradients: bool) -> None:
    with torch.set_grad_enabled(gradients):
        small = solve(10, saveat=[1.0])
        every = solve(2**18)
    assert len(small.trajectory.flat_states) == len(every.trajectory.flat_states) == 21
    assert small(0.5).shape == (10,)
    assert every.u.shape == (21, 2**18)


def test_a_failure_with_large_states_says_so() -> None:
    problem = psn.ODEProblem(
        lambda t, u: torch.where(t > 0.5, torch.inf, -1.0) * u, torch.ones(2**22), (0.0, 1.0)
    )
    with torch.no_grad(), pytest.raises(psn.SolverFailure, match="NaN or infinite"):
        psn.solve(problem, psn.Euler(), saveat=[1.0], **FIXED)
