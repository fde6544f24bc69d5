"""The whole vocabulary in Julia: values and vector-Jacobian products beside torch's, by rows."""

from __future__ import annotations

import functools

import pytest
import torch
from julia_programs import compare
from torch import Tensor
from vocabulary import GROUPS, ROUNDED_BY_TORCH, ROWS, Vocabulary

from pysciml_node.problems.state import StateSpec

pytestmark = pytest.mark.julia

Pair = tuple[Tensor, Tensor]


@functools.cache
def compared(names: tuple[str, ...], dtype: torch.dtype) -> dict[str, Pair]:
    """Of each row the derivative and the state's cotangent; of all together the others."""
    field = Vocabulary(names).to(dtype)
    state = field.state(dtype)
    found = compare(field, state)
    sizes = StateSpec.of(state).sizes
    pairs = {key: found[key] for key in ("pbar", "tbar")}
    for i, name in enumerate(names):
        parts = [[x.split(sizes)[i] for x in found[key]] for key in ("du", "ubar")]
        pairs[name] = (torch.cat([own for own, _ in parts]), torch.cat([x for _, x in parts]))
    return pairs


def assert_close(pair: Pair, bound: float) -> None:
    found, expected = pair
    torch.testing.assert_close(
        found, expected, rtol=bound, atol=bound * (1e-3 + float(expected.abs().max()))
    )


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_that_of_torch(row):
    names = next(names for names in GROUPS if row in names)
    assert_close(compared(names, torch.float64)[row], ROUNDED_BY_TORCH.get(row, 1e-12))


@pytest.mark.parametrize("row", ROWS)
def test_a_row_in_single_precision_is_that_of_torch(row):
    names = next(names for names in GROUPS if row in names)
    assert_close(compared(names, torch.float32)[row], 2e-4)


@pytest.mark.parametrize("what", ["pbar", "tbar"])
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: names[0])
def test_gradients_by_parameters_and_time_are_those_of_torch(names, what):
    pair = compared(names, torch.float64)[what]
    assert pair[0].shape == pair[1].shape
    if pair[0].numel():
        assert_close(pair, 1e-12)
