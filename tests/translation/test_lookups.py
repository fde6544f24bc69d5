"""Searches and computed places: programs beside torch at knots, beyond the ends, and at NaN."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec
from pysciml_node.translation.export import translate

Field = Callable[[Tensor, Tensor], Tensor]

KNOTS = [-math.inf, 0.0, 0.1, 0.1, 0.2, 0.3, 1.0, math.inf]
TIMES = [*KNOTS, -0.0, 0.29999999, 0.30000001, -1.0, 2.0, math.nan]


def run(f: Field, t: float, u: Tensor) -> Tensor:
    """What the program of a field gives."""
    translated = translate(f, StateSpec.of(u))
    flat = [x.detach().reshape(-1).to(u) for x in translated.parameters]
    time = torch.tensor(t, dtype=u.dtype)
    (found,) = translated.program.evaluate(time, [u], torch.cat([u.new_empty(0), *flat]))
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("right", [False, True])
def test_a_search_counts_as_torch_does(dtype: torch.dtype, right: bool) -> None:
    knots, u = torch.tensor(KNOTS, dtype=dtype), torch.zeros(2, dtype=dtype)
    side = "right" if right else "left"
    fields: list[Field] = [
        lambda t, u: u + torch.searchsorted(knots, t, right=right),
        lambda t, u: u + torch.searchsorted(knots, t, side=side, out_int32=True),
        lambda t, u: u + torch.bucketize(t, knots, right=right),
        lambda t, u: u + torch.bucketize(u + t, knots, right=right),
    ]
    for f in fields:
        for t in TIMES:
            expected = f(torch.tensor(t, dtype=dtype), u)
            torch.testing.assert_close(run(f, t, u), expected, rtol=0, atol=0)


def test_each_row_is_searched_in_its_own_knots() -> None:
    generator = torch.Generator().manual_seed(0)
    knots = torch.rand(3, 6, generator=generator, dtype=torch.float64).sort(-1).values
    u = torch.rand(3, 4, generator=generator, dtype=torch.float64)

    def f(t: Tensor, u: Tensor) -> Tensor:
        return u + torch.searchsorted(knots, u + t)

    torch.testing.assert_close(run(f, 0.2, u), f(torch.tensor(0.2), u), rtol=0, atol=0)


V = torch.linspace(-1.0, 1.0, 5, dtype=torch.float64)


@pytest.mark.parametrize("i", range(-7, 7))
def test_places_outside_are_refused_by_torch_and_nan_in_programs(i: int) -> None:
    """A negative place counts from the end where torch lets it, and nowhere else."""
    fields: list[Field] = [
        lambda t, u: u * V[t.long()],
        lambda t, u: u * torch.take(V, t.long()),
        lambda t, u: u * V.index_select(0, t.long().reshape(1)),
        lambda t, u: u * V.gather(0, t.long().reshape(1)),
    ]
    u = torch.ones(1, dtype=torch.float64)
    for f in fields:
        try:
            expected = f(torch.tensor(float(i), dtype=torch.float64), u)
        except (IndexError, RuntimeError):
            expected = torch.full_like(u, math.nan)
        torch.testing.assert_close(run(f, float(i), u), expected, equal_nan=True)


def test_several_computed_indices() -> None:
    table = torch.arange(24, dtype=torch.float64).reshape(2, 3, 4)
    last = torch.tensor([3, 0])

    def f(t: Tensor, u: Tensor) -> Tensor:
        i = t.long().reshape(1)
        return u + table[0][i, last] + table[:, i, last].sum(0) + table[1, i, -i - 1]

    u = torch.zeros(2, dtype=torch.float64)
    for t in range(3):
        time = torch.tensor(float(t), dtype=torch.float64)
        torch.testing.assert_close(run(f, float(t), u), f(time, u))
    assert run(f, 3.0, u).isnan().all()  # and no entry of another row


REFUSED: dict[str, Field] = {
    "knots in another precision": lambda t, u: u * torch.searchsorted(V.float(), t.float()),
    "whole knots": lambda t, u: u * torch.bucketize(t.long(), torch.tensor([0, 1])),
    "a sorter": lambda t, u: u * torch.searchsorted(V, t, sorter=torch.arange(5)),
    "a table of whole numbers": lambda t, u: u * torch.tensor([3, 2**60])[t.long()],
    "short whole numbers": lambda t, u: u * V[(300 * t).to(torch.int8).long()],
    "a slice": lambda t, u: u * V[t.long() :].sum(),
    "a number in Python": lambda t, u: u * torch.searchsorted(V, t).item(),
    "a place outside for other states": lambda t, u: u * V.index_select(0, (3 * u).long()),
    "an index that is put": lambda t, u: torch.zeros_like(u).index_put(((u > 0).long(),), t),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_has_no_place_in_programs_is_refused(what: str) -> None:
    u: Any = torch.rand(3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.raises(UnsupportedModule):
        translate(REFUSED[what], StateSpec.of(u))
