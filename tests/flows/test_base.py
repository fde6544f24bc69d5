"""Base distributions with parameters, and densities that training mode does not change."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Categorical,
    Independent,
    MixtureSameFamily,
    MultivariateNormal,
    Normal,
    TransformedDistribution,
)
from torch.distributions.transforms import AffineTransform

import pysciml_node as psn
from pysciml_node import flows

TIGHT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def points(batch: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 2, dtype=torch.float64, generator=generator)


def decay(t: Tensor, u: Tensor) -> Tensor:
    return -u


def parameter(*values: float) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def normal(loc: Tensor, scale: Tensor) -> Independent:
    return Independent(Normal(loc, scale), 1)


class Trained(nn.Module):
    """A normal distribution whose scale is computed of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.loc, self.log_scale = parameter(0.5, -0.5), parameter(0.1, 0.2)

    def forward(self) -> Independent:
        return normal(self.loc, self.log_scale.exp())


def normal_gradients(z: Tensor, loc: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Of the mean of `-log N(z; loc, scale)`, in closed form."""
    off = (z - loc) / scale
    return -(off / scale).mean(0), ((1 - off.square()) / scale).mean(0)


def test_a_trainable_base_is_trained_with_the_flow() -> None:
    """`u' = -u` over a unit of time: data `x` are `x / e` in the base's space."""
    loc, scale = parameter(0.0, 0.0), parameter(1.0, 1.0)
    flow = psn.CNF(decay, base=normal(loc, scale), **TIGHT)
    assert {id(p) for p in flow.parameters()} == {id(loc), id(scale)}
    assert set(flow.state_dict()) >= {"base_loc", "base_scale"}
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-flow.log_prob(points()).mean()).backward()
        expected = normal_gradients(points() / math.e, loc.detach(), scale.detach())
        torch.testing.assert_close(loc.grad, expected[0], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(scale.grad, expected[1], rtol=1e-6, atol=1e-8)
        optimizer.step()


def test_a_module_may_make_the_base_of_its_parameters() -> None:
    base = Trained()
    flow = psn.CNF(decay, base=base, **TIGHT)
    assert [name for name, _ in flow.named_parameters()] == ["base.loc", "base.log_scale"]
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (-flow.log_prob(points()).mean()).backward()
        scale = base.log_scale.detach().exp()
        of_loc, of_scale = normal_gradients(points() / math.e, base.loc.detach(), scale)
        torch.testing.assert_close(base.loc.grad, of_loc, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(base.log_scale.grad, of_scale * scale, rtol=1e-6, atol=1e-8)
        optimizer.step()
    assert flow.sample((3,)).shape == (3, 2)
    assert flow.float().log_prob(points().float()).dtype is torch.float32


@pytest.mark.parametrize("flow", ["chain", "image"])
def test_every_flow_has_the_parameters_of_its_base(flow: str) -> None:
    if flow == "chain":
        made: flows.Flow = flows.Chain([psn.CNF(decay)], base=Trained())
    else:
        base = Independent(Normal(nn.Parameter(torch.zeros(16)), torch.ones(16)), 1)
        made = flows.MultiScale((1, 4, 4), lambda _: decay, base=base)
    assert any(name.startswith("base") for name, _ in made.named_parameters())


def test_parameters_inside_nested_distributions() -> None:
    tril, shift = nn.Parameter(torch.eye(2)), parameter(0.1, 0.2)
    assert (
        len(
            list(
                psn.CNF(
                    decay, base=MultivariateNormal(torch.zeros(2), scale_tril=tril)
                ).parameters()
            )
        )
        == 1
    )
    moved = TransformedDistribution(
        normal(torch.zeros(2).double(), torch.ones(2).double()), [AffineTransform(shift, 1.0)]
    )
    (only,) = psn.CNF(decay, event_shape=2, base=moved).parameters()
    assert only is shift


@pytest.mark.parametrize(
    "make",
    [
        lambda w: normal(w, w.exp()),
        lambda w: MixtureSameFamily(
            Categorical(logits=w), normal(torch.zeros(2, 2).double(), torch.ones(2, 2).double())
        ),
        lambda w: normal(w.detach().clone().requires_grad_(), torch.ones(2).double()),
    ],
    ids=["computed", "normalized", "no-parameter"],
)
def test_a_base_that_would_not_follow_its_parameters_is_refused(make: Any) -> None:
    with pytest.raises(ValueError, match="would not follow them"):
        psn.CNF(decay, base=make(parameter(0.1, 0.2)))


def test_a_base_left_behind_by_a_conversion_is_refused() -> None:
    """The one scale of both entries is held as a view of the parameter."""
    scale = nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    flow = psn.CNF(decay, base=normal(parameter(0.0, 0.0), scale))
    assert any(p is scale for p in flow.parameters())
    flow.float()
    with pytest.raises(ValueError, match="moved or converted"):
        flow.log_prob(points().float())


def test_the_density_is_the_same_in_both_modes() -> None:
    """`u' = -u` from N(0, e): a random end moves what training maximizes, never the density."""
    regularizers = [psn.RandomEndTime(0.9, generator=torch.Generator().manual_seed(0))]
    flow = psn.CNF(decay, event_shape=2, regularizers=regularizers, **TIGHT)
    chain = flows.Chain([flow], event_shape=2)
    x = points()
    exact = Normal(0.0, math.e).log_prob(x).sum(1)
    for model in (flow, chain):
        for training in (True, False):
            model.train(training)
            torch.testing.assert_close(model.log_prob(x), exact, rtol=1e-7, atol=1e-7)
    flow.train()
    assert not torch.allclose(flow(x).log_prob, exact, atol=1e-2)
    assert flow.node.regularize


def test_the_inverse_ends_at_the_data_in_training_too() -> None:
    regularizers = [psn.RandomEndTime(0.9), psn.KineticEnergy()]
    flow = psn.CNF(decay, event_shape=2, regularizers=regularizers, **TIGHT)
    mapped = flow.train().inverse(points())
    torch.testing.assert_close(mapped.u, points() * math.e, rtol=1e-7, atol=1e-7)
    assert mapped.penalties["KineticEnergy"] > 0
