"""Summaries, results files, the table and the pictures."""

import json
import math
import sys

import pytest

from pysciml_node.experiments.reporting import results
from pysciml_node.experiments.reporting.figures import plot_trade_off, plot_training
from pysciml_node.experiments.reporting.results import (
    COSTS,
    RunResult,
    check_mergeable,
    format_table,
    load_results,
    mean_and_std,
    merge_results,
    save_results,
    summarize,
)
from pysciml_node.experiments.trainer.settings import VARIANTS, Run, Settings, describe
from pysciml_node.experiments.trainer.trainable import METRICS

HISTORY = {
    "monitor": "validation",
    "loss": [1.0, 0.5],
    "penalty": [0.0, 0.0],
    "nfe": [20, 26],
    "evaluated_at": [1, 2],
    "score": [0.5, 0.75],
    "evaluation_nfe": [20.0, 26.0],
}


def result(variant, seed, nfe, *, steps=2) -> RunResult:
    return RunResult(
        variant=variant,
        seed=seed,
        metric="accuracy",
        test=0.97,
        train=0.99,
        nfe=nfe,
        train_seconds=10.0,
        train_cpu_seconds=9.0,
        predict_seconds=0.25,
        predict_cpu_seconds=0.2,
        validation=0.98,
        validation_nfe=nfe,
        settings=describe(Settings(steps=steps), Run(variant=variant, seed=seed)),
        history=HISTORY,
    )


def test_spread_is_the_sample_standard_deviation():
    summary = mean_and_std([1.0, 2.0, 6.0])
    assert summary["mean"] == pytest.approx(3.0)
    assert summary["std"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert mean_and_std([5.0]) == {"mean": 5.0, "std": 0.0}


def test_a_results_file_has_the_agreed_form(tmp_path):
    path = tmp_path / "new" / "results.json"
    save_results(
        path, [result(variant, seed, 10.0 + seed) for variant in VARIANTS for seed in (0, 1)]
    )
    content = json.loads(path.read_text())
    for variant in VARIANTS:
        assert set(content[variant]) == {*COSTS, "test_accuracy", "train_accuracy"}
        assert all(set(figures) == {"mean", "std"} for figures in content[variant].values())
        assert content[variant]["nfe"]["mean"] == pytest.approx(10.5)
    assert content["settings"]["steps"] == 2
    assert not {"variant", "seed", "weight"} & set(content["settings"])
    assert {"python", "torch", "numpy"} <= set(content["environment"])
    assert [run["settings"]["weight"] for run in content["runs"]][:3] == [None, None, [2.5, 1.0]]


def test_runs_survive_the_file_and_merging_replaces_the_same_seed(tmp_path):
    path = tmp_path / "results.json"
    assert load_results(path) == []
    merge_results(path, [result("local-biased", 0, 30.0)])
    merge_results(path, [result("vanilla", 0, 50.0)])
    runs = merge_results(path, [result("local-biased", 0, 31.0), result("local-biased", 1, 33.0)])
    assert runs == load_results(path)
    assert [(run.variant, run.seed, run.nfe) for run in runs] == [
        ("vanilla", 0, 50.0),
        ("local-biased", 0, 31.0),
        ("local-biased", 1, 33.0),
    ]
    assert summarize(runs)["local-biased"]["nfe"]["mean"] == pytest.approx(32.0)


def test_runs_of_other_settings_do_not_mix(tmp_path):
    path = tmp_path / "results.json"
    merge_results(path, [result("vanilla", 0, 50.0)])
    before = path.read_text()
    with pytest.raises(ValueError, match="steps is 2 and 3"):
        merge_results(path, [result("local-biased", 0, 30.0, steps=3)])
    assert path.read_text() == before
    planned = Run(variant="local-biased", weight=(9.0, 1.0))
    check_mergeable(path, describe(Settings(steps=2), planned))
    with pytest.raises(ValueError, match="steps is 2 and 3"):
        check_mergeable(path, describe(Settings(steps=3), planned))


@pytest.mark.parametrize("content", ["", "{}", '{"runs": [{"variant": "vanilla"}]}', "[1]"])
def test_a_file_that_is_no_results_file_is_named(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="not a results file"):
        load_results(path)


def test_the_table_gives_percent_and_ratios_to_vanilla():
    table = format_table(summarize([result("vanilla", 0, 50.0), result("local-biased", 0, 30.0)]))
    header, rule, vanilla, biased = table.splitlines()
    assert len(header) == len(rule) == len(vanilla) == len(biased)
    assert "97.00 ± 0.00" in vanilla
    assert "50.0 ± 0.0 [x1.000]" in vanilla
    assert "30.0 ± 0.0 [x0.600]" in biased
    assert "200.00 ± 0.00 [x1.000]" in biased


def test_without_a_vanilla_run_the_table_has_no_ratios():
    assert "[x" not in format_table(summarize([result("local-biased", 0, 30.0)]))


def test_pictures_are_written(tmp_path):
    pytest.importorskip("matplotlib")
    runs = [result(variant, seed, 10.0) for variant in VARIANTS for seed in (0, 1)]
    plot_training(runs, tmp_path / "new" / "training.png")
    spread = {"mean": 0.7, "std": 0.1}
    points = [
        {"variant": v, "weight": w, "nfe_ratio": spread, "nfe": spread, "accuracy": spread}
        for v, w in (("vanilla", None), ("local-biased", (2.5, 1.0)))
    ]
    plot_trade_off(points, tmp_path / "trade_off.png")
    for path in (tmp_path / "new" / "training.png", tmp_path / "trade_off.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_a_missing_matplotlib_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'pysciml_node\[plots\]'"):
        plot_training([result("vanilla", 0, 1.0)], tmp_path / "training.png")


def test_every_metric_has_its_unit_stated():
    assert {*COSTS, *METRICS} <= set(results.UNITS)
