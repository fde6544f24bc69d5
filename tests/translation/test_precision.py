"""Numbers of another precision than the state's: rounded as torch rounds them, or refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.translation.export import translate

Field = Callable[[Tensor, Tensor], Tensor]

D = torch.float64
U = torch.linspace(-2.0, 30.0, 97, dtype=D)
HELD = torch.linspace(0.1, 1.3, 97)


def index(u: Tensor) -> Tensor:
    return u.detach().long()


def third(u: Tensor) -> Tensor:
    return index(u) / 3


MADE: dict[str, Callable[[Tensor], Tensor]] = {
    "a quotient": third,
    "a quotient of whole numbers": lambda u: (index(u) + 5) / (index(u).clamp(0) * 2 + 7),
    "a product": lambda u: index(u) * 0.1,
    "sums": lambda u: (0.3 - third(u)) + (third(u) + 0.7) - 0.1 * third(u),
    "a mask": lambda u: (u > 0) * 0.1 + (u > 1) / 7,
    "a choice of numbers": lambda u: torch.where(u > 3, 0.1, 0.2),
    "a choice beside whole numbers": lambda u: torch.where(u > 3, index(u), 0.3),
    "filled": lambda u: third(u).masked_fill(u > 3, 0.3),
    "a root": lambda u: third(u).abs().sqrt() + third(u).square(),
    "a reciprocal": lambda u: 1 / (third(u) + 0.1) + 2 / (index(u).clamp(0) + 3),
    "a floor": lambda u: torch.floor(index(u) * 0.1 * 10) + torch.ceil(index(u) / 49 * 49),
    "a remainder": lambda u: (third(u) + 0.1) % 0.7 + torch.fmod(third(u), 0.7),
    "a comparison": lambda u: (index(u) * 0.1 >= 0.7) * 2 + (third(u) > 0.3),
    "bounds": lambda u: third(u).clamp(0.1, 2.3) + index(u).clamp(min=0.2),
    "extrema": lambda u: torch.maximum(third(u), third(u.flip(0)) + 0.1) + third(u).amax(),
    "a share": lambda u: (u > 0.5).float().mean() + (u > 0.5).float().reshape(-1).sum(),
    "side by side": lambda u: torch.cat([third(u)[:40], index(u)[40:]]) * 0.1,
    "held in single precision": lambda u: HELD * (u > 0) + 0.1,
    "made full": lambda u: torch.full_like(u, 0.1, dtype=torch.float32) * (u > 0),
    "moved": lambda u: third(u).flip(0).roll(1) * 0.3,
    "large whole numbers": lambda u: (index(u) * 3 + 2**25).float() - 2.0**25,
    "large sums": lambda u: (index(u) + 2**25 + 1).sum().float() * 0.1,
    "shares of choices": lambda u: (index(u)[:, None] == torch.arange(5)).float().mean(-1) * 0.1,
}


@pytest.mark.skipif(not available()[0], reason=available()[1])
@pytest.mark.parametrize("what", MADE)
def test_what_is_made_of_whole_numbers_is_torchs_to_the_last_bit(what: str) -> None:
    """One step of Euler's method from 0 in steps of 1 is the field itself."""
    made = MADE[what]

    def field(t: Tensor, u: Tensor) -> Tensor:
        return made(U + u) * 1.0 + 0 * u

    options: Any = {"controller": psn.FixedStep(), "dt0": 1.0}
    problem = psn.ODEProblem(field, torch.zeros_like(U), (0.0, 1.0))
    native = psn.solve(problem, psn.Euler(), compile=True, **options).u1
    expected = made(U).to(D).expand_as(U)
    assert torch.equal(native, expected)


REFUSED: dict[str, Field] = {
    "a state that is cast": lambda t, u: (u.float() * 3).double(),
    "a time that is cast": lambda t, u: u * t.float(),
    "a sine": lambda t, u: u * torch.sin(third(u)),
    "a sum of whole numbers": lambda t, u: u * index(u).float().sum(),
    "a mean of whole numbers": lambda t, u: u * index(u).float().mean(),
    "a sum of rounded numbers": lambda t, u: u * third(u).sum(),
    "a mean of rounded numbers": lambda t, u: u * third(u).mean(),
    "a power": lambda t, u: u * 0.3 ** index(u),
    "products with the state": lambda t, u: u + (third(u) * u[0]).double(),
    "half precision": lambda t, u: u * (index(u).half() * 0.1),
    "a number that is put": lambda t, u: u * third(u).index_fill(0, torch.tensor([1]), 0.1),
    "a product and a sum at once": lambda t, u: u * torch.add(third(u), third(u), alpha=0.1),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_torch_rounds_in_its_own_way_is_refused(what: str) -> None:
    with pytest.raises(UnsupportedModule, match="beside a state of torch"):
        translate(REFUSED[what], StateSpec.of(U))


def test_double_precision_beside_a_state_in_single_is_refused() -> None:
    knots = torch.tensor([0.1, 0.2], dtype=D)
    fields: list[Field] = [
        lambda t, u: (u.double() * 3).float(),
        lambda t, u: (index(u).double() / 3).float() * u,
        lambda t, u: u * (t > knots).sum(),
    ]
    for f in fields:
        with pytest.raises(UnsupportedModule, match="float64 beside a state of"):
            translate(f, StateSpec.of(U.float()))


class Mask(nn.Module):
    """A parameter in single precision, of which torch makes numbers in single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.tensor([0.1, 0.7]))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u * (self.level * (u > 1) + 0.3)


@pytest.mark.skipif(not available()[0], reason=available()[1])
def test_gradients_go_through_rounded_numbers() -> None:
    """At `u(0) = 2` the rate is `level + 0.3` before 1 is reached."""
    field = Mask()
    problem = psn.ODEProblem(field, torch.full((2,), 2.0, dtype=D), (0.0, 0.5))
    u1 = psn.solve(problem, psn.Tsit5(), rtol=1e-12, atol=1e-12, compile=True).u1
    rate = (field.level.detach() + 0.3).double()
    torch.testing.assert_close(u1, 2 * torch.exp(-0.5 * rate), rtol=1e-10, atol=0)
    (gradient,) = torch.autograd.grad(u1.sum(), field.level)
    torch.testing.assert_close(gradient.double(), -0.5 * u1.detach(), rtol=1e-6, atol=0)


@pytest.mark.skipif(not available()[0], reason=available()[1])
def test_a_division_is_a_division() -> None:
    """`49 * (1 / 49)` is below 1, and its floor would be 0."""
    whole, number = torch.arange(1.0, 200.0, dtype=D), torch.tensor(98.0, dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        n = (whole + u).round()
        return torch.floor(n / 49) + torch.floor(n * 7 / (7 * n)) + torch.floor(number / n)

    problem = psn.ODEProblem(field, torch.zeros_like(whole), (0.0, 1.0))
    options: Any = {"controller": psn.FixedStep(), "dt0": 1.0, "compile": True}
    found = psn.solve(problem, psn.Euler(), **options).u1
    expected = [math.floor(n / 49) + 1 + math.floor(98 / n) for n in range(1, 200)]
    assert found.tolist() == expected


@pytest.mark.skipif(not available()[0], reason=available()[1])
def test_logarithms_of_powers_are_whole() -> None:
    """`log(1000) / log(10)` is below 3, and its floor would be 2."""
    powers = torch.arange(-15.0, 16.0, dtype=D)

    def field(t: Tensor, u: Tensor) -> Tensor:
        return torch.floor(torch.log10(u)) + 100 * torch.floor(torch.log2(2 ** (powers + 0 * u)))

    options: Any = {"controller": psn.FixedStep(), "dt0": 1.0, "compile": True}
    start = 10**powers
    found = psn.solve(psn.ODEProblem(field, start, (0.0, 1.0)), psn.Euler(), **options).u1 - start
    assert torch.equal((start + 101 * powers) - start, found)


@pytest.mark.skipif(not available()[0], reason=available()[1])
@pytest.mark.parametrize("count", [49, 98, 103, 161])
def test_a_share_of_all_is_one(count: int) -> None:
    """`count * (1 / count)` is below 1 for these."""

    def field(t: Tensor, u: Tensor) -> Tensor:
        share = (u > -1).to(u).mean()
        return torch.where(share == 1, share.floor(), 2.0) + 0 * u

    start = torch.zeros(count, dtype=D)
    options: Any = {"controller": psn.FixedStep(), "dt0": 1.0, "compile": True}
    found = psn.solve(psn.ODEProblem(field, start, (0.0, 1.0)), psn.Euler(), **options).u1
    assert torch.equal(found, torch.ones_like(start))
