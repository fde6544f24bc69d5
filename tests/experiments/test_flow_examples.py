"""The examples of flows and of all regularizers, from their command lines, with few steps."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from pysciml_node import data as psn_data
from pysciml_node.data import LabelledData, Splits
from pysciml_node.data.plane import plane_splits
from pysciml_node.experiments.published.flow_model import (
    FlowSettings,
    ImageFlow,
    ImageFlowSettings,
    PlaneFlow,
)
from pysciml_node.experiments.reporting.flow_pictures import density_grid, paths
from pysciml_node.experiments.trainer.runner import make_trainer
from pysciml_node.experiments.trainer.settings import Run

EXAMPLES = Path(__file__).parents[2] / "examples"
PICTURE = b"\x89PNG"


@pytest.fixture
def example(monkeypatch, tmp_path):
    """Runs an example with options, on one thread; gives the folder of its files."""
    before = torch.get_num_threads()

    def call(name: str, *options: str) -> Path:
        words = ["--quick", "--threads", "1", "--output-dir", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *words])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return tmp_path

    yield call
    torch.set_num_threads(before)


def test_the_plane_example_trains_and_draws(example):
    folder = example("cnf_2d.py", "--shape", "pinwheel", "--regularize", "none", "rnode")
    folder = folder / "pinwheel" / "quick"
    content = json.loads((folder / "results.json").read_text())
    assert {"vanilla", "rnode"} <= set(content)
    assert content["rnode"]["test_nats"]["mean"] > 0
    for name in ("training", "vanilla-seed0", "rnode-seed0"):
        assert (folder / f"{name}.png").read_bytes().startswith(PICTURE)


def test_the_digits_example_trains_and_resumes(example):
    options = ("--regularize", "jacobian", "--steps", "4", "--checkpoint-every", "2")
    folder = example("cnf_digits.py", *options) / "quick"
    whole = json.loads((folder / "results.json").read_text())
    again = example("cnf_digits.py", *options, "--resume") / "quick"
    content = json.loads((again / "results.json").read_text())
    assert content["runs"][0]["history"] == whole["runs"][0]["history"]
    assert content["jacobian"]["test_bits"]["mean"] > 0
    assert (folder / "jacobian-seed0.png").read_bytes().startswith(PICTURE)


def test_the_digits_example_takes_mnist_with_a_folder(example, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(20, 8, 8, generator=generator)
    data = LabelledData(x, torch.zeros(20, dtype=torch.int64))
    monkeypatch.setattr(psn_data, "mnist", lambda folder, download: Splits(data, data[:0], data))
    folder = example("cnf_digits.py", "--data-dir", "somewhere", "--regularize", "kinetic")
    content = json.loads((folder / "quick" / "results.json").read_text())
    assert content["settings"]["architecture"] == "multi-scale"
    assert content["kinetic"]["nfe"]["mean"] > 0


def test_the_comparison_measures_every_run_apart(example, capsys):
    names = ["--task", "flow", "--regularize", "vanilla", "taylor", "--steps", "2"]
    folder = example("compare_regularizers.py", *names) / "flow"
    content = json.loads((folder / "results.json").read_text())
    memory = json.loads((folder / "memory.json").read_text())
    assert set(memory) == {"vanilla", "taylor"} <= set(content)
    assert "memory (MiB)" in capsys.readouterr().out
    example("compare_regularizers.py", *names, "--resume")
    assert json.loads((folder / "results.json").read_text())["runs"] == content["runs"]


def settings(kind=FlowSettings, **changes):
    numbers = {"steps": 4, "batch_size": 8, "hidden": 4, "layers": 1, "tolerance": 1e-3}
    return kind(**{**numbers, "evaluate_every": 2, "step_size": "solver", **changes})


def plane() -> Splits[LabelledData]:
    return plane_splits("pinwheel", train=40, validation=10, test=10)


@pytest.mark.parametrize("variant", ["rnode", "local-biased"])
def test_a_continued_flow_ends_bit_for_bit_as_one_never_interrupted(tmp_path, variant):
    x = torch.rand(30, 4, 4, generator=torch.Generator().manual_seed(0))
    data = LabelledData(x, torch.zeros(30, dtype=torch.int64))
    splits, chosen = Splits(data, data, data), settings(ImageFlowSettings, levels=17)

    def build(data, settings, run):
        return ImageFlow((4, 4), settings, run)

    def trainer():
        return make_trainer(splits, chosen, Run(variant=variant), build=build)

    whole, interrupted, continued = trainer(), trainer(), trainer()
    whole.train()
    interrupted.train(until=3, checkpoint=tmp_path / "run.pt")
    continued.resume(tmp_path / "run.pt")
    continued.train()
    assert continued.history == whole.history
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, continued.model.get_parameter(name))


def test_a_flow_at_rest_scores_as_its_base():
    model = PlaneFlow(settings(), Run(variant="vanilla")).eval()
    data = plane().test
    outcome = model.outcome(data)
    expected = -torch.distributions.Normal(0.0, 1.0).log_prob(data.x).sum(1)
    torch.testing.assert_close(outcome.loss, expected.mean())
    assert outcome.score / outcome.weight == pytest.approx(expected.mean().item())


def test_evaluations_of_images_see_the_same_noise_and_training_does_not():
    model = ImageFlow((4, 4), settings(ImageFlowSettings, levels=17), Run(variant="vanilla"))
    x = torch.rand(5, 4, 4, generator=torch.Generator().manual_seed(0))
    data = LabelledData(x, torch.zeros(5, dtype=torch.int64))
    assert model.outcome(data).score != model.outcome(data).score
    model.eval()
    assert model.outcome(data).score == model.outcome(data).score


def test_the_density_grid_adds_up_and_straight_paths_are_straight():
    cnf = PlaneFlow(settings(), Run(variant="vanilla")).cnf
    grid = density_grid(cnf, side=6.0, cells=60)
    assert float(grid.sum()) * 0.2**2 == pytest.approx(1.0, abs=1e-3)
    with torch.no_grad():
        cnf.node.field.layers[-1].shift_weight.fill_(1.0)
    u, longer = paths(cnf, torch.zeros(3, 2))
    assert u.shape == (41, 3, 2)
    assert longer == pytest.approx(1.0, abs=1e-4)


def test_training_may_take_fixed_steps_and_evaluations_do_not():
    run, data = Run(variant="vanilla"), plane().test
    model = PlaneFlow(settings(training_step=0.25), run)
    # Four stages in each of four steps.
    assert model.train().outcome(data).nfe == 16
    assert model.eval().outcome(data).nfe == PlaneFlow(settings(), run).eval().outcome(data).nfe


def test_wrong_settings_are_named():
    with pytest.raises(ValueError, match="architecture must be one of"):
        settings(ImageFlowSettings, architecture="deep")
    with pytest.raises(ValueError, match="layers must be a positive whole number"):
        settings(layers=0)
