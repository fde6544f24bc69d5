"""The neural ODE classifier: its model, resuming, and the published effect in miniature."""

from dataclasses import replace

import pytest
import torch
from experiments.stand_in import blobs

import pysciml_node as psn
from pysciml_node.experiments.reporting.trade_off import trade_off
from pysciml_node.experiments.trainer.model import ODEClassifier
from pysciml_node.experiments.trainer.runner import make_trainer, measure
from pysciml_node.experiments.trainer.settings import (
    ADJOINTS,
    COMPARED,
    DTYPES,
    VARIANTS,
    Run,
    Settings,
)

SETTINGS = Settings(
    steps=6, batch_size=16, tolerance=1e-3, hidden=5, engine="torch", evaluate_every=3
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_predictions_are_the_linear_readout_of_the_solution_at_one(variant):
    model = ODEClassifier(4, 3, SETTINGS, Run(variant=variant)).eval()
    x = torch.randn(5, 2, 2, generator=generator())
    prediction = model(x)
    problem = psn.ODEProblem(model.node.field, x.flatten(1), (0.0, 1.0))
    end = psn.solve(problem, psn.Tsit5(), rtol=1e-3, atol=1e-3, engine="torch").u1
    torch.testing.assert_close(prediction.logits, end @ model.head_weight.T + model.head_bias)
    assert float(prediction.penalty) == 0.0
    assert prediction.nfe > 0


def test_variants_of_a_seed_start_alike_and_only_the_local_ones_are_penalized():
    models = [ODEClassifier(4, 3, SETTINGS, Run(variant=v, seed=3)).train() for v in COMPARED]
    x = torch.randn(5, 4, generator=generator())
    predictions = [model(x) for model in models]
    for prediction in predictions[1:]:
        assert torch.equal(prediction.logits, predictions[0].logits)
    assert [float(p.penalty.detach()) > 0 for p in predictions] == [False, True, True]


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_every_adjoint_trains_the_field_and_the_head(adjoint):
    settings = Settings(steps=1, batch_size=8, tolerance=1e-4, hidden=3, adjoint=adjoint)
    trainer = make_trainer(blobs(), settings, Run(variant="local-unbiased"))
    before = [value.clone() for value in trainer.model.parameters()]
    trainer.train()
    for old, new in zip(before, trainer.model.parameters(), strict=True):
        assert not torch.equal(old, new)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_continued_run_ends_bit_for_bit_as_one_never_interrupted(tmp_path, variant):
    run = Run(variant=variant, seed=1, weight=(0.5, 0.2))
    whole = make_trainer(blobs(), SETTINGS, run)
    whole.train()
    interrupted = make_trainer(blobs(), SETTINGS, run)
    interrupted.train(until=4, checkpoint=tmp_path / "run.pt")
    continued = make_trainer(blobs(), SETTINGS, run)
    continued.resume(tmp_path / "run.pt")
    continued.train()
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, continued.model.get_parameter(name))
    assert continued.history == whole.history


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_model_solves_in_its_own_dtype_whatever_the_data(dtype):
    model = ODEClassifier(4, 3, replace(SETTINGS, dtype=dtype), Run(variant="local-biased"))
    single = ODEClassifier(4, 3, SETTINGS, Run(variant="local-biased"))
    for mine, other in zip(model.parameters(), single.parameters(), strict=True):
        assert mine.dtype == getattr(torch, dtype)
        assert torch.equal(mine.float(), other)
    assert model(torch.zeros(2, 4)).logits.dtype == getattr(torch, dtype)


def test_measured_figures_cover_all_parts_of_the_data():
    trainer = make_trainer(blobs(), SETTINGS, Run(variant="local-biased"))
    trainer.train()
    figures = measure(trainer, blobs())
    assert 0.0 <= figures.test == figures.validation <= 1.0
    assert figures.nfe > 0
    assert figures.predict_seconds > 0
    assert figures.train_seconds == trainer.train_seconds
    assert figures.settings["variant"] == "local-biased"
    assert figures.history["evaluated_at"] == [3, 6]


def test_a_trade_off_compares_every_weight_with_vanilla():
    points = trade_off(blobs(), SETTINGS, [(1.0, 1.0), (10.0, 4.0)], seeds=[0, 1])
    assert [(p["variant"], p["weight"]) for p in points] == [
        ("vanilla", None),
        ("local-unbiased", (1.0, 1.0)),
        ("local-unbiased", (10.0, 4.0)),
        ("local-biased", (1.0, 1.0)),
        ("local-biased", (10.0, 4.0)),
    ]
    assert points[0]["nfe_ratio"] == {"mean": 1.0, "std": 0.0}


def test_a_trade_off_without_validation_data_is_refused_before_training():
    data = blobs()
    empty = type(data)(data.train, data.test[:0], data.test)
    with pytest.raises(ValueError, match="validation"):
        trade_off(empty, SETTINGS, [(1.0, 1.0)], seeds=[0])
