"""The example's studies, at the smallest sizes that still show their laws."""

import json
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "global_convergence.py"


@pytest.fixture(scope="module")
def example():
    return runpy.run_path(str(EXAMPLE))


@pytest.fixture(scope="module")
def digits(example):
    return example["load"](None)


def test_gaps_to_the_ode_shrink_like_one_over_depth(example, digits, tmp_path):
    sizes = example["Sizes"](depth_widths=(30,), depths=(20, 40, 80), samples=3)
    result = example["depth_study"](digits, sizes)
    curve = result["curves"]["softplus, width 30"]
    assert curve["output_slope"] == pytest.approx(-1, abs=0.05)
    assert curve["gradient_slope"] == pytest.approx(-1, abs=0.05)
    example["draw_depth"](result, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 0


def test_the_kernels_prediction_of_training(example, digits, tmp_path):
    sizes = example["Sizes"](
        training=(("softplus", 800),), training_steps=15, training_samples=4, training_layers=4
    )
    result = example["training_study"](digits, sizes)
    (run,) = result["runs"]
    assert run["worst_by_own_kernel"] < 0.05
    assert run["loss"][-1] < run["loss"][0]
    assert min(run["smallest_eigenvalue"].values()) > 0
    example["draw_training"](result, tmp_path / "training.png")


def test_the_limit_kernels_prediction_gets_better_with_the_width(example, digits, tmp_path):
    """Like 1/sqrt(n); at width 960 the mean loss of six networks is within 5 % of it."""
    sizes = example["Sizes"](
        training_steps=25,
        training_samples=4,
        training_layers=4,
        limit_widths=(60, 240, 960),
        limit_networks=6,
    )
    result = example["limit_study"](digits, sizes)
    assert result["slope"] == pytest.approx(-0.5, abs=0.2)
    assert result["rows"][-1]["deviation_of_mean"] < 0.05
    example["draw_limit"](result, tmp_path / "limit.png")
    assert (tmp_path / "limit.png").stat().st_size > 0


def test_from_the_command_line(example, tmp_path, monkeypatch, capsys):
    tiny = example["Sizes"](
        ntk_widths=(10, 20),
        ntk_seeds=2,
        horizons=(1.0, 2.0),
        horizon_width=20,
        gaussian_widths=(2, 50),
        gaussian_networks=400,
        samples=2,
    )
    monkeypatch.setitem(example["main"].__globals__, "QUICK", tiny)
    arguments = ["--quick", "--output-dir", str(tmp_path), "--panels", "ntk", "horizon", "gaussian"]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
    example["main"]()
    results = json.loads((tmp_path / "results.json").read_text())
    for name in ("ntk", "horizon", "gaussian"):
        assert (tmp_path / f"{name}.png").stat().st_size > 0
        assert results[name]["seconds"] > 0
    balanced = [row["ntk"] for row in results["horizon"]["rows"] if row["sigma_w"] * row["T"] == 1]
    assert balanced[0] == pytest.approx(balanced[1], rel=1e-10)
    narrow, wide = results["gaussian"]["rows"]
    assert narrow["p_normal"] < 1e-6 < wide["p_normal"]
    assert "slope in n" in capsys.readouterr().out
