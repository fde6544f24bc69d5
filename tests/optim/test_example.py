"""The tasks of `examples/simplest_ode.py`, and its command line at next to no size."""

import json
import math
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pysciml_node.experiments.studies.terminal_fits import (
    asymptotic_rate,
    descend,
    linear_task,
    network_task,
    straight_line_of_flows,
)
from pysciml_node.optim import VarianceCorrected

EXAMPLE = Path(__file__).parents[2] / "examples" / "simplest_ode.py"


def gauss_newton(task, lr):
    return VarianceCorrected(task.field.parameters(), lr=lr, curvature="gauss-newton", cg_rtol=1e-4)


@pytest.mark.parametrize("horizon", [0.5, 2.0])
@pytest.mark.parametrize(
    "task", [linear_task, network_task], ids=["linear system", "network with few data"]
)
def test_gauss_newton_converges_at_the_predicted_rate_through_the_solver(task, horizon):
    """`2 log 2` an iteration at `lr = 1/2`, whatever the horizon."""
    case = (
        linear_task(2, horizon, seed=1, tolerance=1e-7)
        if task is linear_task
        else network_task(horizon, seed=1, hidden=48, samples=3, tolerance=1e-7)
    )
    run = descend(case, gauss_newton(case, 0.5), 1e-7, 40)
    assert run.reached
    assert asymptotic_rate(run.losses, steps=4) == pytest.approx(2 * math.log(2), rel=0.1)


def rotation(task, start, truth):
    """Replace both fields of a linear task in the plane by rotations of these speeds."""
    turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
    task.field.matrix.data = start * turn
    task.truth.matrix.data = truth * turn
    return task


@pytest.mark.parametrize(
    ("start", "truth", "straight"),
    [(0.0, 3.0, True), (0.0, math.pi, False), (1.5, -1.5, True), (4.0, 1.0, False)],
)
def test_straight_lines_between_rotations(start, truth, straight):
    """The chord between two rotations stays clear of the negative axis within half a turn."""
    task = rotation(linear_task(2, 1.0, seed=1), start, truth)
    assert straight_line_of_flows(task) is straight


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    before = torch.get_num_threads()
    example = runpy.run_path(str(EXAMPLE))
    names = example["main"].__globals__
    few = {"STARTS": (1.0,), "HORIZONS": (1.0,), "RATES": (0.5,), "RATE_HORIZONS": (0.5,)}
    for name, value in (few | {"METHODS": example["METHODS"][-1:], "RATE_LIMIT": 2}).items():
        monkeypatch.setitem(names, name, value)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--quick", "--output-dir", str(tmp_path)])
    example["main"]()
    torch.set_num_threads(before)
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("paper", "rates", "systems"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
        assert len(results[name]) > 0
    assert "rate per iteration" in capsys.readouterr().out
