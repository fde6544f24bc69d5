"""Fields that native code evaluates by some rows of a batch at a time, beside torch's."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from row_fields import ALONE, BATCH, TOGETHER, D, Field, net, outcome, start
from torch import Tensor, nn

from pysciml_node.problems.state import StateSpec
from pysciml_node.torch_engine.native import emit
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.torch_engine.native.rows import by_rows, without_repetitions
from pysciml_node.translation.export import translate

pytestmark = pytest.mark.skipif(not available()[0], reason=available()[1])

ROWS = 4


@pytest.fixture(autouse=True)
def cut() -> Iterator[None]:
    """Four rows at a time, however small the field is."""
    with mock.patch.multiple(emit, _NEAR=0, _FEWEST_ROWS=2, _MOST_ROWS=5):
        yield


@pytest.mark.parametrize("function", [*ALONE, *TOGETHER])
def test_states_and_gradients_are_those_of_the_loop_in_python(function: Any) -> None:
    field, u0 = Field(function), start(function)
    for native, eager in zip(outcome(field, u0, True), outcome(field, u0, False), strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("function", [*ALONE, *TOGETHER])
def test_rows_are_taken_apart_where_none_depends_on_another(function: Any) -> None:
    u0 = start(function)
    translated = translate(Field(function), StateSpec.of(u0))
    rows = by_rows(translated.program, ROWS)
    assert (rows is not None) == (function in ALONE)


@pytest.mark.parametrize("function", ALONE)
def test_the_program_of_some_rows_has_the_values_of_these_rows(function: Any) -> None:
    field, u0 = Field(function), start(function)
    rows = by_rows(translate(field, StateSpec.of(u0)).program, ROWS)
    assert rows is not None
    if rows.held:  # these lie in the parameters of all rows, which torch cannot be told
        return
    some = {k: x[:ROWS] for k, x in u0.items()} if isinstance(u0, dict) else u0[:ROWS]
    pieces = [some[k] for k in u0] if isinstance(u0, dict) else [some]
    t, p = torch.tensor(0.3, dtype=D), torch.cat([x.reshape(-1) for x in parameters_of(field, u0)])
    value = field(t, u0)
    whole = [value[k] for k in u0] if isinstance(u0, dict) else [value]
    outputs = rows.program.evaluate(t, pieces, p)
    for given, all_rows in zip(outputs, whole, strict=True):
        torch.testing.assert_close(given.reshape(-1), all_rows[:ROWS].reshape(-1))


def parameters_of(field: nn.Module, u0: Any) -> list[Tensor]:
    return translate(field, StateSpec.of(u0)).parameters


def test_a_batch_of_a_prime_number_of_rows_is_taken_at_once() -> None:
    field, u0 = Field(net), start(net, 13)
    for native, eager in zip(outcome(field, u0, True), outcome(field, u0, False), strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("width", [20, 200, 2_000])
def test_values_of_some_rows_take_little_room_on_the_stack(width: int) -> None:
    """Threads have half a megabyte of it on some systems; longer rows are taken at once."""

    def wide(m: Any, t: Tensor, u: Tensor) -> Tensor:
        x = torch.tanh(u) * u
        return torch.sin(x) + torch.sigmoid(x * t)

    program = translate(Field(wide), StateSpec.of(torch.ones(BATCH, width, dtype=D))).program
    chosen = emit.whole_or_by_rows(program, D)
    assert (chosen.emitter.rows is not None) == (width < 2_000)
    rooms = [int(n) for n in re.findall(r"REAL s\[(\d+)\]", chosen.emitted.source)]
    assert 8 * max(rooms, default=0) <= 1.1 * 2**17


def test_products_of_two_rows_are_not_taken_apart_by_the_compiler() -> None:
    """A compiler that makes vectors of neighbouring statements (gcc 12) has mixed these up."""
    weight = nn.Parameter(torch.tensor([[0.3, 0.6, 0.3, -0.3], [-0.3, 0.3, 0.4, -0.2]], dtype=D))

    def pooled(m: Any, t: Tensor, u: Tensor) -> Tensor:
        shares = torch.softmax(u, 1)[..., None]
        products = weight @ (shares.detach() * shares)
        return -0.5 * u - torch.tanh(products.flatten(1).mean(1, keepdim=True))

    u0 = torch.randn(34, 4, dtype=D, generator=torch.Generator().manual_seed(2))
    field = Field(pooled)
    with mock.patch.object(emit, "_MOST_ROWS", 2):
        native = outcome(field, u0, True)
    for one, other in zip(native, outcome(field, u0, False), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_what_is_computed_twice_is_computed_once() -> None:
    def twice(m: Any, t: Tensor, u: Tensor) -> Tensor:
        return torch.tanh(u @ m.w.T) @ m.v.T + (torch.tanh(u @ m.w.T) @ m.v.T).sin()

    program = translate(Field(twice), StateSpec.of(start(twice))).program
    steps = [step.op for step in without_repetitions(program).operations]
    assert steps.count("linear") == 2
    field, u0 = Field(twice), start(twice)
    for native, eager in zip(outcome(field, u0, True), outcome(field, u0, False), strict=True):
        torch.testing.assert_close(native, eager, rtol=1e-12, atol=1e-12)
