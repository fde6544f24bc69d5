"""The demonstration and the MNIST example, from their command lines, with next to no steps."""

import json
import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from experiments.stand_in import blobs

from pysciml_node import data as psn_data
from pysciml_node.cli.main import main
from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.demo import digits_demo
from pysciml_node.experiments.reporting.results import COSTS
from pysciml_node.experiments.trainer.settings import COMPARED

FIGURES = {*COSTS, "test_accuracy", "train_accuracy"}
EXAMPLE = Path(__file__).parents[2] / "examples" / "mnist_ode.py"


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_demo_trains_all_variants_and_writes_its_files(tmp_path, capsys, one_thread):
    assert main(["demo", "--quick", "--output-dir", str(tmp_path)]) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    for variant in digits_demo.DEMONSTRATED:
        assert set(content[variant]) == FIGURES
        assert content[variant]["nfe"]["mean"] > 0
    assert (tmp_path / "training.png").stat().st_size > 0
    shown = capsys.readouterr()
    assert shown.out.startswith("4 trainings of 6 steps")
    assert "test NFE" in shown.out
    assert "Look at the last column" in shown.out
    assert "nfe=" in shown.err


@pytest.mark.parametrize("option", ["--seeds", "--threads", "--steps"])
def test_the_demo_refuses_a_count_below_one(tmp_path, capsys, option):
    assert main(["demo", option, "0", "--output-dir", str(tmp_path)]) == 1
    assert option.strip("-") in capsys.readouterr().err


def test_the_demo_draws_the_trade_off_without_the_test_data(tmp_path, monkeypatch, one_thread):
    splits = blobs()
    poisoned = LabelledData(torch.full_like(splits.test.x, float("nan")), splits.test.y)
    monkeypatch.setattr(
        digits_demo, "digits", lambda: Splits(splits.train, splits.validation, poisoned)
    )
    monkeypatch.setattr(digits_demo, "TRADE_OFF_WEIGHTS", ((2.0, 2.0),))
    small = replace(digits_demo.QUICK_SETTINGS, steps=2, evaluate_every=2, batch_size=8)
    monkeypatch.setattr(digits_demo, "QUICK_SETTINGS", small)
    assert main(["demo", "--quick", "--trade-off", "--output-dir", str(tmp_path)]) == 0
    points = json.loads((tmp_path / "trade_off.json").read_text())
    assert [point["variant"] for point in points] == list(COMPARED)
    assert (tmp_path / "trade_off.png").stat().st_size > 0


@pytest.fixture
def mnist_example(monkeypatch, tmp_path):
    """Runs examples/mnist_ode.py on a small stand-in for MNIST."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 4
    x = torch.randn(4, 3, 3, generator=generator)[y]
    data = LabelledData(x + 0.1 * torch.randn(x.shape, generator=generator), y)
    asked = []

    def small_mnist(data_dir, *, download):
        asked.append((data_dir, download))
        return Splits(data, data[:0], data)

    monkeypatch.setattr(psn_data, "mnist", small_mnist)

    def call(*options: str) -> dict:
        words = ["--data-dir", "somewhere", "--no-download", "--output-dir", str(tmp_path)]
        words += ["--tolerance", "1e-3", "--batch-size", "8", "--evaluate-every", "2"]
        words += ["--adjoint", "discrete", "--engine", "torch", *options]
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *words])
        runpy.run_path(str(EXAMPLE), run_name="__main__")
        assert asked[-1] == (Path("somewhere"), False)
        return json.loads((tmp_path / "results.json").read_text())

    return call


def test_the_mnist_example_gathers_variants_in_one_file(mnist_example, capsys):
    for regularize in ("none", "local-unbiased", "local-biased"):
        content = mnist_example("--steps", "4", "--regularize", regularize)
    assert all(set(content[variant]) == FIGURES for variant in COMPARED)
    assert "[x" in capsys.readouterr().out
    with pytest.raises(ValueError, match="steps is 4 and 5"):
        mnist_example("--steps", "5")


def test_missing_data_are_told_in_words_without_a_traceback(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), "--no-download", "--data-dir", str(tmp_path)])
    with pytest.raises(
        SystemExit, match=r"^mnist_ode.py: .* lacks (.|\n)*\n  Name the folder"
    ) as told:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    assert told.value.__suppress_context__


def test_the_mnist_example_continues_from_its_checkpoint(mnist_example, monkeypatch, tmp_path):
    options = ("--steps", "6", "--regularize", "local-biased", "--checkpoint-every", "2")
    whole = mnist_example(*options)
    checkpoint = tmp_path / "checkpoints" / "local-biased-seed0.pt"
    finished = torch.load(checkpoint, weights_only=True)["model"]
    checkpoint.unlink()

    save = torch.save
    saved = []

    def interrupt_after_second(state, path):
        save(state, path)
        saved.append(state["step"])
        if len(saved) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt_after_second)
    with pytest.raises(KeyboardInterrupt):
        mnist_example(*options)
    monkeypatch.setattr(torch, "save", save)
    continued = mnist_example(*options, "--resume")

    assert saved == [2, 4]
    assert continued["runs"][0]["history"] == whole["runs"][0]["history"]
    state = torch.load(checkpoint, weights_only=True)["model"]
    torch.testing.assert_close(state, finished, rtol=0.0, atol=0.0)
