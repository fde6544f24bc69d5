"""`NeuralODE` as a module: solving, training and evaluating, saving."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn

ADJOINTS = [
    psn.DiscreteAdjoint(),
    psn.DirectAdjoint(),
    psn.InterpolatingAdjoint(),
    psn.GaussAdjoint(),
    psn.BacksolveAdjoint(),
]


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2).double()

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(self.linear(u)) * torch.cos(t)


def inputs() -> Tensor:
    return torch.linspace(-1.0, 1.0, 6, dtype=torch.float64).reshape(3, 2)


def test_it_is_the_solve_of_its_problem() -> None:
    field = Field()
    node = psn.NeuralODE(
        field, psn.Vern7(), (0.5, 2.0), rtol=1e-7, atol=1e-8, saveat=[1.0, 2.0], dtmax=0.3
    )
    found = node(inputs())
    expected = psn.solve(
        psn.ODEProblem(field, inputs(), (0.5, 2.0)),
        psn.Vern7(),
        rtol=1e-7,
        atol=1e-8,
        saveat=[1.0, 2.0],
        dtmax=0.3,
    )
    assert torch.equal(found.u, expected.u)
    assert torch.equal(found.u1, expected.u1)
    assert found.stats.nfe == expected.stats.nfe


def test_its_parameters_are_the_fields() -> None:
    node = psn.NeuralODE(Field(), regularizers=[psn.LocalError(), psn.LocalStiffness()])
    assert [name for name, _ in node.named_parameters()] == [
        "field.linear.weight",
        "field.linear.bias",
    ]


def test_one_call_may_have_its_own_interval_and_argument() -> None:
    node = psn.NeuralODE(lambda t, u, p: p * u, rtol=1e-10, atol=1e-10)
    rate = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    end = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    solution = node(torch.ones(1, dtype=torch.float64), rate, (1.0, end))
    assert solution.u1.item() == pytest.approx(math.exp(-1.0), rel=1e-8)
    gradients = torch.autograd.grad(solution.u1, (rate, end))
    assert gradients[0].item() == pytest.approx(2 * math.exp(-1.0), rel=1e-7)
    assert gradients[1].item() == pytest.approx(-0.5 * math.exp(-1.0), rel=1e-7)


def test_penalties_are_off_in_eval_mode() -> None:
    """And cost no evaluation there."""
    node = psn.NeuralODE(Field(), regularizers=[psn.LocalError(weight=2.0)])
    plain = psn.NeuralODE(node.field)
    training = node.train()(inputs())
    evaluating = node.eval()(inputs())
    assert training.penalty.item() > 0
    assert set(training.penalties) == {"LocalError"}
    assert evaluating.penalty.item() == 0.0
    assert evaluating.penalty.dtype is torch.float64
    assert evaluating.penalties == {}
    assert evaluating.stats.nfe == plain(inputs()).stats.nfe < training.stats.nfe
    torch.testing.assert_close(training.u1, evaluating.u1, rtol=0, atol=0)


def test_the_penalty_is_the_weighted_sum() -> None:
    node = psn.NeuralODE(
        Field(),
        regularizers=[
            psn.LocalError(weight=2.0, name="first"),
            psn.LocalError("biased", weight=0.5, name="second"),
            psn.LocalStiffness(weight=-1.0),
        ],
    )
    solution = node(inputs())
    found = solution.penalties
    assert set(found) == {"first", "second", "LocalStiffness"}
    expected = 2 * found["first"] + 0.5 * found["second"] - found["LocalStiffness"]
    torch.testing.assert_close(solution.penalty, expected)


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_loss_and_penalty_are_trained_together(adjoint: psn.DirectAdjoint) -> None:
    """One backward pass adds the gradients of both."""
    node = psn.NeuralODE(
        Field(),
        rtol=1e-8,
        atol=1e-8,
        adjoint=adjoint,
        regularizers=[psn.LocalError(generator=torch.Generator().manual_seed(0))],
    )
    weight = node.field.linear.weight
    solution = node(inputs())
    loss = solution.u1.square().sum()
    (of_loss,) = torch.autograd.grad(loss, weight, retain_graph=True)
    (of_penalty,) = torch.autograd.grad(solution.penalty, weight, retain_graph=True)
    (loss + solution.penalty).backward()
    torch.testing.assert_close(weight.grad, of_loss + of_penalty, rtol=1e-5, atol=1e-8)
    assert of_penalty.norm().item() > 0


@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_it_learns_the_rate_of_a_decay(adjoint: psn.DirectAdjoint) -> None:
    """Gradient descent on one parameter, to the closed form."""

    class Decay(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.2, dtype=torch.float64))

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return -self.rate * u

    node = psn.NeuralODE(Decay(), tspan=(0.0, 1.0), rtol=1e-9, atol=1e-9, adjoint=adjoint)
    optimizer = torch.optim.SGD(node.parameters(), lr=1.5)
    target = torch.tensor([math.exp(-0.7)], dtype=torch.float64)
    for _ in range(40):
        optimizer.zero_grad()
        (node(torch.ones(1, dtype=torch.float64)).u1 - target).square().sum().backward()
        optimizer.step()
    assert node.field.rate.item() == pytest.approx(0.7, abs=1e-6)


def test_samples_of_a_batch_do_not_mix() -> None:
    """At a fixed step each sample's solution is its own."""
    node = psn.NeuralODE(Field(), psn.RK4(), controller=psn.FixedStep(), dt0=0.1)
    together = node(inputs()).u1
    alone = torch.cat([node(x[None]).u1 for x in inputs()])
    torch.testing.assert_close(together, alone, rtol=1e-14, atol=1e-14)


def test_state_dict_round_trip() -> None:
    first, second = psn.NeuralODE(Field()), psn.NeuralODE(Field())
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(inputs()).u1, second(inputs()).u1)


def test_deep_copies_are_independent() -> None:
    node = psn.NeuralODE(Field(), regularizers=[psn.LocalError()])
    other = copy.deepcopy(node)
    before = node(inputs()).u1
    with torch.no_grad():
        other.field.linear.weight.add_(1.0)
    assert torch.equal(node(inputs()).u1, before)
    assert not torch.equal(other(inputs()).u1, before)


def test_it_follows_its_dtype() -> None:
    node = psn.NeuralODE(Field()).to(torch.float32)
    solution = node(inputs().float())
    assert solution.u1.dtype is solution.penalty.dtype is solution.t.dtype is torch.float32


def test_structures() -> None:
    node = psn.NeuralODE(lambda t, u: {"x": -u["x"], "n": u["x"].square()}, rtol=1e-9, atol=1e-9)
    x = torch.ones(3, 2, dtype=torch.float64)
    solution = node({"x": x, "n": torch.zeros_like(x)})
    expected = torch.full_like(x, (1 - math.exp(-2.0)) / 2)
    torch.testing.assert_close(solution.u1["n"], expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"field": 3}, TypeError, "field must be callable"),
        ({"regularizers": [3]}, TypeError, "regularizers.*LocalError"),
        (
            {"regularizers": [psn.LocalError(), psn.LocalError()]},
            ValueError,
            "(?s)two regularizers are named 'LocalError'.*name=",
        ),
        ({"algorithm": psn.Tsit5}, TypeError, r"Tsit5\(\)"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"steps": 3}, TypeError, "steps"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        psn.NeuralODE(**{"field": Field(), **arguments})(inputs())


def test_its_repr_names_the_algorithm() -> None:
    text = repr(psn.NeuralODE(Field(), psn.BS3(), regularizers=[psn.LocalError("biased", 2.5)]))
    for word in ("BS3", "tspan", "rtol", "biased", "2.5"):
        assert word in text


def test_what_hooks_and_losses_read_is_made_in_ordinary_modes() -> None:
    node = psn.NeuralODE(Field())
    seen: list[Tensor] = []
    for hooked in (False, True):
        if hooked:
            node.register_solve_hook(lambda layer, solution: seen.append(torch.ones(())))
        with torch.inference_mode():
            solution = node(torch.ones(2, 2).double())
        assert not any(x.is_inference() for x in (solution.u1, solution.penalty, *seen))
    assert len(seen) == 1
