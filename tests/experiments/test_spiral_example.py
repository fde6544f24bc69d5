"""The neural SDE's spiral, from its command line, with next to no steps."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = Path(__file__).parents[2] / "examples" / "neural_sde_spiral.py"


def load():
    spec = importlib.util.spec_from_file_location("neural_sde_spiral", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("variant", ["none", "local-unbiased", "global-stiffness"])
def test_the_example_trains_and_writes_its_files(variant, tmp_path, monkeypatch, capsys):
    example = load()
    monkeypatch.setattr(example, "DATA_PATHS", 20)
    arguments = ["--steps", "2", "--paths", "5", "--tolerance", "0.3", "--regularize", variant]
    arguments += ["--output-dir", str(tmp_path), "--engine", "torch"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    example.main()
    (row,) = json.loads((tmp_path / "results.json").read_text()).values()
    assert row["test_mse"] > 0
    assert row["test_nfe"] > 0
    assert (tmp_path / f"{variant}-seed0.png").stat().st_size > 0
    assert variant in capsys.readouterr().out


def test_the_data_are_the_spiral():
    """The mean of many paths turns clockwise, from a start without spread."""
    example = load()
    example.DATA_PATHS = 200
    moments = example.true_moments("torch", 0)
    assert torch.equal(moments.mean[0], example.START)
    assert moments.variance[0].abs().max() == 0
    x, y = moments.mean.T
    turning = x[:-1] * y.diff() - y[:-1] * x.diff()
    assert bool((turning < 0).all())
