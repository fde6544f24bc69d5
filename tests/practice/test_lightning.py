"""Callbacks for Lightning, where it is installed: `pip install lightning`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pysciml_node as psn

pl = pytest.importorskip("lightning.pytorch")


class Model(pl.LightningModule):
    def __init__(self, weight: Any = 0.1) -> None:
        super().__init__()
        field = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        self.node = psn.NeuralODE(
            field, rtol=1e-4, atol=1e-4, regularizers=[psn.LocalError(weight=weight)]
        )
        self.nfe: list[int] = []

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        solution = self.node(batch[0])
        self.nfe.append(solution.stats.nfe)
        return (solution.u1 - 1).square().mean() + solution.penalty

    def validation_step(self, batch: Any, index: int) -> None:
        self.node(batch[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Logged(pl.loggers.Logger):
    """Keeps what is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)

    def log_hyperparams(self, *arguments: Any) -> None:
        pass

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.rows if name in row]


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(24, 2, generator=generator)), batch_size=4)


def trainer(folder: Path, callbacks: list[Any], **options: Any) -> tuple[Any, Logged]:
    logger = Logged()
    made = pl.Trainer(
        **{
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "log_every_n_steps": 1,
            "default_root_dir": folder,
            "logger": logger,
            "callbacks": callbacks,
            **options,
        }
    )
    return made, logger


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|litlogger|pytree|LeafSpec).*")
        torch.manual_seed(0)
        yield


def test_costs_and_penalties_are_logged(tmp_path: Path) -> None:
    model = Model()
    made, logger = trainer(tmp_path, [psn.lightning.LogSolves(progress=("nfe",))])
    made.fit(model, loader(), loader())
    assert logger.column("train/nfe") == model.nfe
    assert min(logger.column("train/nfe_backward")) > 0
    assert logger.column("train/weight/LocalError") == pytest.approx([0.1] * 6)
    penalties = torch.tensor(logger.column("train/penalty"))
    values = torch.tensor(logger.column("train/penalty/LocalError"))
    torch.testing.assert_close(penalties, 0.1 * values)
    assert len(logger.column("val/nfe")) == 1
    assert "val/penalty" not in logger.rows[-1]
    assert not model.node._solve_hooks


def test_schedules_count_steps_of_the_optimizer(tmp_path: Path) -> None:
    model = Model(psn.schedules.InverseDecay(1.0, 0.5))
    made, _ = trainer(tmp_path, [psn.lightning.StepSchedules()], accumulate_grad_batches=2)
    made.fit(model, loader())
    assert model.node.regularizers[0].steps == made.global_step == 3


# A dozen steps do not bring the cost down.
@pytest.mark.filterwarnings("ignore:the budget has not been reached")
def test_a_budget_is_held_and_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    hold = psn.lightning.HoldBudget(nfe=14)
    model = Model(weight=2.0)
    made, _ = trainer(tmp_path, [hold], max_epochs=2, enable_checkpointing=False)
    made.fit(model, loader())
    assert hold.budget is not None
    assert hold.budget.horizon == 12
    assert hold.budget.target == 14
    assert len(hold.budget.history) == 11  # the last solve is closed by the one after it
    regularizer = model.node.regularizers[0]
    assert regularizer.current_weight == 2.0 * hold.budget.weight > 0
    made.save_checkpoint(tmp_path / "end.ckpt")

    again = psn.lightning.HoldBudget(nfe=14)
    longer, _ = trainer(tmp_path, [again], max_epochs=3, enable_checkpointing=False)
    longer.fit(Model(weight=2.0), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=False)
    assert again.budget is not None
    assert again.budget.history.cost[:11] == hold.budget.history.cost
    assert len(again.budget.history) == 17


def test_a_budget_needs_numbers_for_weights(tmp_path: Path) -> None:
    made, _ = trainer(tmp_path, [psn.lightning.HoldBudget(nfe=14)])
    with pytest.raises(ValueError, match=r"has the weight(.|\n)*Give it a number"):
        made.fit(Model(psn.schedules.InverseDecay(1.0, 0.5)), loader())
    with pytest.raises(TypeError, match="one of nfe, steps"):
        psn.lightning.HoldBudget()


def test_training_stops_after_so_many_evaluations(tmp_path: Path) -> None:
    stop, model = psn.lightning.StopAfter(100), Model()
    made, _ = trainer(tmp_path, [stop], max_epochs=10, enable_checkpointing=False)
    made.fit(model, loader())
    assert stop.taken >= 100 > stop.taken - 2 * max(model.nfe)
    assert made.global_step == len(model.nfe) < 6
    made.save_checkpoint(tmp_path / "end.ckpt")
    again = psn.lightning.StopAfter(1000)
    longer, _ = trainer(tmp_path, [again], max_epochs=3, enable_checkpointing=False)
    longer.fit(Model(), loader(), ckpt_path=tmp_path / "end.ckpt", weights_only=False)
    assert again.taken > stop.taken
