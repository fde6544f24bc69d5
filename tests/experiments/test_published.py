"""The published experiments: models, resuming, quick runs of the examples, and the table."""

import json
import runpy
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from experiments.stand_in import blobs
from torch import nn

from pysciml_node.data import LabelledData, Splits
from pysciml_node.experiments.published import cifar10
from pysciml_node.experiments.published.cifar10 import CIFAR10, SIDE, ConvField
from pysciml_node.experiments.published.image_layers import FieldBatchNorm, channel_mask, tracking
from pysciml_node.experiments.published.mnist import MNIST_ODE
from pysciml_node.experiments.published.mnist_sde import MNIST_SDE
from pysciml_node.experiments.published.multiscale import CIFAR10_MULTI_SCALE, MultiScaleField
from pysciml_node.experiments.published.physionet import PHYSIONET, interpolation_errors
from pysciml_node.experiments.reporting.published import TABLES, compare
from pysciml_node.experiments.reporting.results import COSTS
from pysciml_node.experiments.trainer.command import NAMES, make_parser, make_runs, settings_of
from pysciml_node.experiments.trainer.runner import make_trainer
from pysciml_node.experiments.trainer.settings import COMPARED, Run

EXAMPLES = Path(__file__).parents[2] / "examples"
TRAINED = [MNIST_SDE, PHYSIONET, CIFAR10, CIFAR10_MULTI_SCALE]
EXPERIMENTS = [MNIST_ODE, *TRAINED]
NOWHERE = Path("no folder of this name")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def by_name(experiment) -> str:
    return experiment.name


def quick(experiment, steps: int = 4):
    """Quick settings and a handful of samples."""
    settings, _ = experiment.at("quick")
    settings = replace(settings, steps=steps, batch_size=2, evaluate_every=steps, engine="torch")
    if experiment is MNIST_SDE:
        data = blobs()
    else:
        data = experiment.data("quick", NOWHERE, False, settings)
    few = slice(4)
    return settings, Splits(data.train[few], data.validation[:0], data.test[few])


@pytest.mark.parametrize("variant", ["vanilla", "local-biased"])
@pytest.mark.parametrize("experiment", TRAINED, ids=by_name)
def test_a_continued_run_ends_bit_for_bit_as_one_never_interrupted(tmp_path, experiment, variant):
    settings, data = quick(experiment)
    run = Run(variant=variant, seed=1)

    def trainer():
        return make_trainer(data, settings, run, build=experiment.build)

    whole = trainer()
    whole.train()
    trainer().train(until=2, checkpoint=tmp_path / "run.pt")
    continued = trainer()
    torch.manual_seed(99)
    continued.resume(tmp_path / "run.pt")
    continued.train()
    state = continued.model.state_dict()
    for name, value in whole.model.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state[name]), name
    assert continued.history == whole.history


@pytest.mark.parametrize("experiment", TRAINED, ids=by_name)
def test_variants_of_a_seed_start_alike(experiment):
    settings, data = quick(experiment)
    models = [
        experiment.build(data, settings, Run(variant=variant, seed=3)).train()
        for variant in (*COMPARED, "vanilla")
    ]
    outcomes = [model.outcome(data.train) for model in models]
    assert all(torch.equal(o.loss, outcomes[0].loss) for o in outcomes)
    assert [float(o.penalty.detach()) > 0 for o in outcomes] == [False, True, True, False]
    for other in models[1:]:
        for mine, theirs in zip(models[0].parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("experiment", TRAINED, ids=by_name)
def test_every_parameter_learns(experiment):
    settings, data = quick(experiment)
    model = experiment.build(data, settings, Run(variant="local-unbiased")).train()
    outcome = model.outcome(data.train)
    (outcome.loss + outcome.penalty).backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=by_name)
def test_budgets_change_known_settings_and_weights_of_known_variants(experiment):
    names = {f.name for f in fields(experiment.settings)}
    for budget in (experiment.reduced, experiment.quick):
        assert set(budget.changes) <= names
        assert set(budget.weights) <= set(experiment.weights)
    assert set(COMPARED[1:]) <= set(experiment.weights) <= set(NAMES.values())
    assert set(experiment.options) <= names
    assert experiment.name in TABLES
    assert experiment.at("paper")[0] == experiment.settings


def test_the_command_line_changes_the_budgets_settings():
    parser = make_parser(PHYSIONET, "")
    words = ["--budget", "reduced", "--steps", "7", "--latent", "9", "--no-stop-gradient"]
    arguments = parser.parse_args([*words, "--seeds", "1", "2", "--regularize", "none", "steer"])
    settings = settings_of(PHYSIONET, arguments)
    reduced, _ = PHYSIONET.at("reduced")
    assert settings == replace(reduced, steps=7, latent=9, stop_gradient=False)
    variants = [NAMES[name] for name in arguments.regularize]
    runs = make_runs(PHYSIONET, "reduced", variants, arguments.seed)
    assert [run.name for run in runs] == [
        f"{variant}-seed{seed}" for seed in (1, 2) for variant in ("vanilla", "steer")
    ]
    assert runs[1].weight == PHYSIONET.weights["steer"]
    assert make_runs(PHYSIONET, "paper", ["steer"], [0], (0.3, 0.3))[0].weight == (0.3, 0.3)


def test_the_settings_are_the_papers():
    series = PHYSIONET.settings
    assert (series.steps, series.batch_size, series.learning_rate) == (3000, 512, 0.01)
    assert (series.latent, series.state, series.hidden) == (20, 50, 40)
    assert series.learning_rates()(1000) == pytest.approx(0.01 / 1.01)
    conv = CIFAR10.settings
    assert (conv.steps, conv.batch_size, conv.tolerance) == (31250, 32, 1e-4)
    assert conv.learning_rates()(conv.steps) == pytest.approx(1e-4)
    noisy = MNIST_SDE.settings
    assert (noisy.steps, noisy.tolerance, noisy.state, noisy.hidden) == (4000, 0.14, 32, 64)
    large = CIFAR10_MULTI_SCALE.settings
    assert (large.hidden, large.expansion, large.dropout) == (24, 5, 0.2)
    field = ConvField(8, 64, generator=generator())
    shapes = [tuple(c.layer.weight.shape) for c in field.convolutions]
    assert shapes == [(64, 9, 3, 3), (64, 65, 3, 3), (8, 65, 3, 3)]


def test_field_normalization_is_batch_norms_and_moves_its_averages_when_tracked_only():
    mine, theirs = FieldBatchNorm(3), nn.BatchNorm2d(3)
    x = 2.0 + torch.randn(5, 3, 4, 4, generator=generator())
    torch.testing.assert_close(mine(x), theirs(x))
    assert not mine.running_mean.any()
    with tracking(mine):
        tracked = mine(x)
    torch.testing.assert_close(tracked, mine(x))
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_variance, theirs.running_var)
    torch.testing.assert_close(mine.eval()(x), theirs.eval()(x))


def test_dropout_masks_have_mean_one_and_are_whole_channels():
    mask = channel_mask(torch.zeros(400, 3, 2, 2), 50, 0.2, generator())
    assert mask.shape == (400, 50, 1, 1)
    assert sorted(set(mask.flatten().tolist())) == pytest.approx([0.0, 1.25])
    assert float(mask.mean()) == pytest.approx(1.0, abs=0.02)


def test_the_injected_input_drives_the_scales():
    field = MultiScaleField(4, 2).double()
    x = torch.randn(2, 4, SIDE, SIDE, generator=generator(), dtype=torch.float64)
    z = torch.randn(2, sum(field.sizes), generator=generator(1), dtype=torch.float64)
    large, small = field.split(z)
    assert large.shape == (2, 4, 32, 32)
    assert small.shape == (2, 4, 16, 16)
    assert torch.equal(torch.cat((large.flatten(1), small.flatten(1)), 1), z)
    t = torch.zeros(())
    first, second = field(t, z, {"x": x}), field(t, z, {"x": 2 * x})
    changed = [part.abs().max() > 1e-3 for part in field.split(first - second)]
    assert all(changed)


def test_predictions_of_an_sde_repeat_and_average_trajectories():
    settings, data = quick(MNIST_SDE)
    run = Run(variant="vanilla")
    one, many = (
        MNIST_SDE.build(data, replace(settings, trajectories=count), run).eval() for count in (1, 8)
    )
    x = data.test.x
    assert torch.equal(one(x).logits, one(x).logits)
    torch.testing.assert_close(one.train()(x).penalty, torch.zeros(()))
    assert not torch.equal(one(x).logits, one(x).logits)
    assert not torch.equal(many(x).logits, one.eval()(x).logits)
    with pytest.raises(ValueError, match="trajectories"):
        replace(settings, trajectories=0)


def test_hidden_rows_are_predicted_about_as_well_as_by_means_before_training():
    settings, data = quick(PHYSIONET)
    model = PHYSIONET.build(data, settings, Run(variant="vanilla"))
    error, of_means = interpolation_errors(model, data.test)
    assert 0 < of_means < 3
    assert 0 < error < 10


def run_example(monkeypatch, name: str, *words: str) -> None:
    path = EXAMPLES / f"{name}.py"
    monkeypatch.setattr(sys, "argv", [str(path), *words])
    runpy.run_path(str(path), run_name="__main__")


@pytest.mark.parametrize(
    ("name", "words", "metric", "pictures"),
    [
        ("physionet_latent_ode", (), "mse", 1),
        ("cifar10_ode", (), "accuracy", 0),
        ("cifar10_ode", ("--model", "multi-scale"), "accuracy", 0),
    ],
)
def test_examples_run_without_files(monkeypatch, tmp_path, capsys, name, words, metric, pictures):
    options = ("--quick", "--steps", "2", "--engine", "torch", "--output-dir", str(tmp_path))
    run_example(monkeypatch, name, *words, *options, "--regularize", "none", "local-unbiased")
    content = json.loads((tmp_path / "quick" / "results.json").read_text())
    for variant in ("vanilla", "local-unbiased"):
        assert set(content[variant]) == {*COSTS, f"test_{metric}", f"train_{metric}"}
        assert content[variant]["nfe"]["mean"] > 0
        assert (tmp_path / "quick" / f"{variant}-seed0.png").exists() == bool(pictures)
    assert (tmp_path / "quick" / "training.png").stat().st_size > 0
    assert "[x" in capsys.readouterr().out


def test_the_ode_rnn_encoder_trains():
    settings, data = quick(PHYSIONET, steps=1)
    settings = replace(settings, encoder="ode-rnn")
    trainer = make_trainer(data, settings, Run(variant="vanilla"), build=PHYSIONET.build)
    field = trainer.model.latent_ode.encoder.node.field
    before = [p.clone() for p in field.parameters()]
    trainer.train()
    assert not any(torch.equal(a, b) for a, b in zip(before, field.parameters(), strict=True))
    with pytest.raises(ValueError, match="encoder must be one of"):
        replace(settings, encoder="cnn")


def test_reproduce_prints_both_tables_and_trains_nothing_twice(monkeypatch, tmp_path, capsys):
    words = ("physionet", "--quick", "--steps", "2", "--output-dir", str(tmp_path))
    words = (*words, "--seeds", "0", "--engine", "torch")
    run_example(monkeypatch, "reproduce", *words)
    results = tmp_path / "quick" / "physionet" / "results.json"
    shown, first = capsys.readouterr(), results.read_text()
    assert "758.0 x1.000" in shown.out
    assert "422.0 x0.557" in shown.out
    assert len(json.loads(first)["runs"]) == 3
    run_example(monkeypatch, "reproduce", *words)
    assert results.read_text() == first
    run_example(monkeypatch, "reproduce", "--list")
    assert "cifar10-multi-scale" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        run_example(monkeypatch, "reproduce", "imagenet")
    nowhere = ("--no-download", "--data-dir", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="mnist"):
        run_example(monkeypatch, "reproduce", "mnist", *nowhere, "--output-dir", str(tmp_path))


def test_the_comparison_gives_ratios_to_vanilla_on_both_sides():
    ours = {
        "vanilla": {"nfe": {"mean": 200.0, "std": 0.0}, "test_mse": {"mean": 0.005, "std": 0.0}},
        "steer": {"nfe": {"mean": 150.0, "std": 0.0}, "test_mse": {"mean": 0.006, "std": 0.0}},
    }
    _, _, vanilla, steer = compare("physionet", ours).splitlines()
    assert vanilla.split()[:3] == ["vanilla", "5.000", "3.41"]
    assert steer.split()[-4:] == ["150.0", "x0.750", "699.0", "x0.922†"]
    ours["steer"]["nfe"]["std"] = 2.0
    *_, steer = compare("physionet", ours, markdown=True).splitlines()
    assert steer.endswith("| 150.0 ± 2.0 x0.750 | 699.0 x0.922† |")


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=by_name)
def test_weights_of_the_reduced_budget_can_be_chosen_on_held_out_samples(experiment):
    """They are training samples: the test data stay what they are."""
    settings, _ = experiment.at("reduced")
    assert settings.validation_samples > 0
    whole = blobs()
    few = replace(experiment, load=lambda *_: Splits(whole.train, whole.train[:0], whole.test))
    parts = few.data("reduced", NOWHERE, False, replace(settings, validation_samples=5))
    assert len(parts.validation) == 5
    assert torch.equal(torch.cat((parts.train.y, parts.validation.y)), whole.train.y)
    assert torch.equal(parts.test.y, whole.test.y)
    with pytest.raises(ValueError, match="validation_samples"):
        replace(settings, validation_samples=-1)


def test_evaluations_take_a_batch_size_of_their_own():
    settings, _ = MNIST_SDE.at("quick")
    assert settings.evaluated_at_once == settings.batch_size
    assert replace(settings, evaluation_batch_size=7).evaluated_at_once == 7


@pytest.mark.parametrize("experiment", [CIFAR10, CIFAR10_MULTI_SCALE], ids=by_name)
def test_smaller_images_are_classified_too(experiment):
    settings, _ = experiment.at("quick")
    settings = replace(settings, side=8, engine="torch")
    data = experiment.data("quick", NOWHERE, False, settings)
    assert data.train.x.shape[1:] == (3, 8, 8)
    model = experiment.build(data, settings, Run(variant="vanilla"))
    assert len(model.predict(data.test[:2]).logits) == 2
    with pytest.raises(ValueError, match="side must be"):
        replace(settings, side=12)


def test_images_are_averaged_over_blocks(monkeypatch):
    x = torch.rand(3, 3, SIDE, SIDE, generator=generator())
    part = LabelledData(x, torch.arange(3))
    monkeypatch.setattr(cifar10.datasets, "cifar10", lambda *_, **__: Splits(part, part[:0], part))
    settings = replace(CIFAR10.settings, side=16)
    train = cifar10.load_cifar10(NOWHERE, False, settings).train
    torch.testing.assert_close(train.x[1, 2, 3, 5], x[1, 2, 6:8, 10:12].mean())
    assert cifar10.load_cifar10(NOWHERE, False, CIFAR10.settings).train is part


def test_the_sdes_error_is_weighed_as_in_the_papers_code():
    settings, data = quick(MNIST_SDE)
    assert (settings.solver, settings.delta) == ("SOSRI", pytest.approx(1 / 6))
    for solver, delta in (("SOSRI", 0.5), ("SOSRI2", 1.0)):
        changed = replace(settings, solver=solver, delta=delta)
        algorithm = MNIST_SDE.build(data, changed, Run(variant="vanilla")).node.algorithm
        assert (type(algorithm).__name__, algorithm.delta) == (solver, delta)
    plain = replace(settings, solver="EM")
    MNIST_SDE.build(data, plain, Run(variant="vanilla"))


def test_the_published_ratios_are_those_of_the_abstract():
    ratios = [
        table[variant].nfe[0] / table["vanilla"].nfe[0]
        for name, table in TABLES.items()
        for variant in ("local-unbiased", "local-biased")
        if name in ("mnist", "mnist-sde", "physionet")
    ]
    assert min(ratios) == pytest.approx(0.556, abs=1e-3)
    assert max(ratios) == pytest.approx(0.733, abs=1e-3)
