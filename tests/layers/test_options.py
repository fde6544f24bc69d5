"""The options that layers hand on to `solve`: the same everywhere, and refused where unknown."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import pysciml_node as psn
from pysciml_node.flows import MultiScale
from pysciml_node.layers import GRUEncoder, LatentODE, ODERNNEncoder
from pysciml_node.layers.options import SolverOptions


def decay(t: Any, u: Any) -> Any:
    return -u


LAYERS: dict[str, Callable[..., Any]] = {
    "NeuralODE": lambda **options: psn.NeuralODE(decay, **options),
    "NeuralSDE": lambda **options: psn.NeuralSDE(decay, decay, **options),
    "CNF": lambda **options: psn.CNF(decay, event_shape=2, **options),
    "MultiScale": lambda **options: MultiScale((1, 4, 4), lambda _: decay, **options),
    "LatentODE": lambda **options: LatentODE(GRUEncoder(3, 2), decay, nn.Linear(2, 3), **options),
    "ODERNNEncoder": lambda **options: ODERNNEncoder(3, 2, decay, **options),
}


def test_options_are_the_arguments_of_solve() -> None:
    """A new argument of `solve` belongs in `SolverOptions` too."""
    solves = set(inspect.signature(psn.solve).parameters)
    own = {"problem", "algorithm", "generator", "members"}
    assert set(SolverOptions.__annotations__) == solves - own | {"regularizers"}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize(
    ("given", "meant"),
    [("rtoll", "rtol"), ("max_step", "max_steps"), ("regularizer", "regularizers")],
)
def test_a_misspelt_option_is_refused_where_it_is_given(layer: str, given: str, meant: str) -> None:
    with pytest.raises(TypeError, match=f"takes no argument '{given}'.\n  Did you mean '{meant}'"):
        LAYERS[layer](**{given: 1})


@pytest.mark.parametrize("layer", ["CNF", "LatentODE", "ODERNNEncoder"])
def test_saved_times_are_refused_where_they_would_be_ignored(layer: str) -> None:
    with pytest.raises(TypeError, match="saveat"):
        LAYERS[layer](saveat=[0.5])


@pytest.mark.parametrize("layer", ["NeuralODE", "NeuralSDE"])
def test_tolerances_default_to_those_of_solve(layer: str) -> None:
    node = LAYERS[layer]()
    usual = 1e-6 if layer == "NeuralODE" else 1e-2
    assert (node.rtol, node.atol) == (usual, usual)
    assert LAYERS[layer](rtol=0.1).rtol == 0.1


def test_options_reach_the_solve() -> None:
    node = psn.NeuralODE(decay, controller=psn.FixedStep(), dt0=0.25)
    assert node(torch.ones(1, 1)).stats.naccept == 4
