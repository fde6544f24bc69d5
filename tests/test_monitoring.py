"""What a monitor says is what the solutions say."""

from __future__ import annotations

import copy
import csv
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import pysciml_node as psn
from pysciml_node.monitoring import CSVWriter, Monitor, TensorBoardWriter


def field(features: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(features, 8), nn.Tanh(), nn.Linear(8, features))


def test_values_are_means_of_what_the_solutions_say() -> None:
    weight = psn.schedules.InverseDecay(1.0, 0.5)
    penalties = [psn.LocalError(weight=weight), psn.LocalStiffness(weight=0.0, name="nfe")]
    node = psn.NeuralODE(field(), regularizers=penalties)
    with Monitor(node) as monitor:
        solutions = [node(x * torch.ones(3, 2)) for x in (0.1, 10.0)]
        sum((s.u1.sum() + s.penalty for s in solutions), torch.zeros(())).backward()
        values = monitor.take()
    for name, count in (("nfe", "nfe"), ("steps", "naccept"), ("nfe_backward", "nfe_backward")):
        exact = [getattr(s.stats, count) for s in solutions]
        assert values[name] == sum(exact) / 2 > 0
    exact = [float(s.penalties["LocalError"].detach()) for s in solutions]
    assert values["penalty/LocalError"] == pytest.approx(sum(exact) / 2)
    assert values["penalty"] == pytest.approx(values["penalty/LocalError"])
    assert values["weight/LocalError"] == 1.0
    assert values["seconds"] > 0
    assert monitor.evaluations == 2 * (values["nfe"] + values["nfe_backward"])
    assert monitor.take() == {}
    node(torch.ones(1, 2))
    assert monitor.take() == {}  # closed


def test_eval_mode_is_apart() -> None:
    node = psn.NeuralODE(field(), regularizers=[psn.LocalError()])
    monitor = Monitor(node)
    node(torch.ones(1, 2))
    node.eval()
    with torch.no_grad():
        nfe = node(torch.ones(1, 2)).stats.nfe
    assert monitor.take(training=False).keys() == {"nfe", "steps", "rejected", "seconds"}
    assert monitor.take()["nfe"] > nfe  # with what the penalty takes


def diffusion(t: Any, u: torch.Tensor) -> torch.Tensor:
    return 0.1 * torch.ones_like(u)


MODELS: dict[str, Any] = {
    "independent": lambda: psn.NeuralODE(
        field(), independent=True, regularizers=[psn.LocalError()], saveat=[1.0]
    ),
    "end state": lambda: nn.Sequential(nn.Linear(2, 2), psn.NeuralODE(field(), output="u1")),
    "stochastic": lambda: psn.NeuralSDE(nn.Linear(2, 2), diffusion),
    "flow": lambda: psn.CNF(field(), event_shape=2),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_layer_is_seen(name: str) -> None:
    model = MODELS[name]()
    with Monitor(model) as monitor:
        returned = model(torch.ones(3, 2))
        total = returned.log_prob if name == "flow" else getattr(returned, "u1", returned)
        total.sum().backward()
        values = monitor.take()
    assert values["nfe"] > 0
    assert values["nfe_backward"] > 0


def test_names_of_several_layers() -> None:
    model = nn.ModuleDict({"a": psn.NeuralODE(field()), "b": psn.NeuralODE(field())})
    monitor = Monitor(model)
    model["a"](torch.ones(1, 2))
    assert {"a/nfe", "a/penalty"} <= monitor.take().keys()
    model["b"](torch.ones(1, 2))
    assert "b/nfe" in monitor.take()


def test_a_budget_shows_its_course() -> None:
    budget = psn.Budget(nfe=26)
    penalties = [psn.LocalError(weight=budget), psn.LocalStiffness(weight=0.1 * budget)]
    node = psn.NeuralODE(field(), regularizers=penalties)
    monitor = Monitor(node)
    for _ in range(3):
        node(torch.ones(4, 2))
    values = monitor.take()
    assert values["budget/target"] == 26
    assert values["budget"] == pytest.approx(budget.reached)
    assert values["weight/LocalStiffness"] == pytest.approx(0.1 * values["weight/LocalError"])


def test_monitors_leave_models_as_they_are() -> None:
    """No graph is kept alive, and what is copied or pickled of a model is not watched."""
    node = psn.NeuralODE(field(), regularizers=[psn.LocalError()])
    monitor = Monitor(node)
    solution = node(torch.ones(1, 2))
    kept = weakref.ref(solution)
    del solution
    gc.collect()
    assert kept() is None
    monitor.take()
    for again in (copy.deepcopy(node), pickle.loads(pickle.dumps(node))):
        again(torch.ones(1, 2))
    assert monitor.take() == {}


def test_models_without_equations_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear has none"):
        Monitor(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"hook\(layer, solution\)"):
        psn.NeuralODE(field()).register_solve_hook(lambda solution: None)  # type: ignore[misc, arg-type]


def test_tables_get_their_columns_as_names_come(tmp_path: Path) -> None:
    writer = CSVWriter(tmp_path / "runs" / "solves.csv")
    for step in range(3):
        writer.write(step, {"nfe": 14.0 + step, **({"val, mean": 0.25} if step == 2 else {})})
    writer.write(3, {"nfe": float("nan")})
    with writer.path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]
    assert [row["nfe"] for row in rows] == ["14.0", "15.0", "16.0", "nan"]
    assert [row["val, mean"] for row in rows] == ["", "", "0.25", ""]


def test_tensorboard_gets_every_value(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is not installed, a stand-in of its writer shows what it is given."""
    import sys
    import types

    got: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            got.append(folder)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            got.append((name, value, step))

        def close(self) -> None:
            got.append("closed")

    monkeypatch.setitem(sys.modules, "tensorboard", types.ModuleType("tensorboard"))
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    writer = TensorBoardWriter(tmp_path)
    writer.write(3, {"nfe": 14.0, "steps": 2.0})
    writer.close()
    assert got == [str(tmp_path), ("nfe", 14.0, 3), ("steps", 2.0, 3), "closed"]
