"""The flow and the regularizers that the examples on budgets define themselves."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

import pysciml_node as psn
from pysciml_node.experiments.trainer.settings import Run, Settings

EXAMPLES = Path(__file__).parents[2] / "examples"
D = torch.float64


@pytest.fixture
def run_example(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return lambda name: runpy.run_path(str(EXAMPLES / name))


def uneven() -> psn.Solution:
    """Steps that are ten times as small at the end as at the start."""
    problem = psn.ODEProblem(lambda t, u: (30 * t**4).cos() * u, torch.ones(1, dtype=D), (0.0, 1.0))
    return psn.solve(problem, psn.Tsit5(), rtol=1e-6, atol=1e-6)


def test_times_drawn_where_steps_are_have_the_mean_of_uniform_times(run_example: Any) -> None:
    penalty = run_example("beyond_local_error.py")["WhereStepsAre"](
        step_size="solver", generator=torch.Generator().manual_seed(0)
    )
    solution = uneven()
    with torch.no_grad():
        values = torch.stack([penalty(solution) for _ in range(200)])
        grid = (torch.arange(200, dtype=D) + 0.5) / 200
        steps = [penalty.estimate(solution, t) for t in grid.tolist()]
        exact = torch.stack([step.error * step.dt.abs() for step in steps]).mean()
    deviation = values.std() / len(values) ** 0.5
    assert abs(values.mean() - exact) < 4 * deviation < 0.7 * exact


def test_penalized_rejections_vanish_where_no_step_is_near_one(run_example: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    penalty = run_example("beyond_local_error.py")["Rejected"](generator=generator)
    linear = psn.ODEProblem(lambda t, u: torch.ones_like(u), torch.ones(1, dtype=D), (0.0, 1.0))
    assert float(penalty(psn.solve(linear))) == 0.0
    solution = uneven()
    assert max(float(penalty(solution)) for _ in range(20)) > 0.0


def test_both_forms_of_the_moons_flow_are_one_flow(run_example: Any) -> None:
    settings = Settings(steps=1, tolerance=1e-9, dtype="float64", hidden=8)
    model = run_example("moons_flow.py")["MoonsFlow"](settings, Run(variant="vanilla"))
    x = torch.randn(6, 2, dtype=D, generator=torch.Generator().manual_seed(0))
    by_cnf, _, nfe = model.density(x)
    model.node.options["compile"] = True
    by_native, _, again = model.density(x)
    assert torch.allclose(by_native, by_cnf, atol=1e-8)
    assert nfe == again
