"""Checks of arguments: what they take, what they refuse, and in which words."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import pysciml_node as psn
from pysciml_node import checks

NUMBERS = [0.5, 1, Fraction(1, 2), np.float32(0.5), np.int64(2), np.array(0.5)]
NUMBERS += [torch.tensor(0.5), torch.tensor(2), torch.tensor(0.5, requires_grad=True)]
NONE = [None, "0.5", b"1", True, np.bool_(True), 1j, np.complex64(1), [1.0], (), object(), int]
NONE += [torch.ones(2), torch.ones(1), torch.tensor(True), torch.tensor(1j), np.ones(1)]
NONE += [torch.tensor(1.0, device="meta"), np.datetime64("2020-01-01"), np.array("a"), math]


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_numbers(value: Any) -> None:
    found = checks.number("x", value)
    assert type(found) is float
    assert found == pytest.approx(float(getattr(value, "item", lambda: value)()))


@pytest.mark.parametrize("value", NONE, ids=lambda x: type(x).__name__)
def test_what_is_no_number(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^x must be a number, but is "):
        checks.number("x", value)
    with pytest.raises(TypeError, match=r"^n must be a positive whole number, but is "):
        checks.whole("n", value)


RANGES: list[tuple[dict[str, Any], list[Any], list[Any], str]] = [
    ({}, [0, -1e300], [math.nan, math.inf, 10**400], "finite"),
    ({"above": 0}, [1e-300], [0, -1, math.inf], "positive and finite"),
    ({"at_least": 0}, [0.0], [-1e-9, math.inf], "finite and at least 0"),
    ({"above": 0, "below": 1}, [0.5], [0, 1, math.inf], "between 0 and 1"),
    ({"at_least": -1, "at_most": 1}, [-1, 1], [1.1], "at least -1 and at most 1"),
    ({"above": 0, "infinite": True}, [math.inf], [math.nan, -math.inf], "positive"),
]


@pytest.mark.parametrize(("limits", "inside", "outside", "words"), RANGES)
def test_ranges(limits: Any, inside: list[Any], outside: list[Any], words: str) -> None:
    for value in inside:
        assert checks.number("x", value, **limits) == value
    for value in outside:
        with pytest.raises(ValueError, match=f"^x must be {words}, but is"):
            checks.number("x", value, **limits)


def test_whole_numbers() -> None:
    for value in (3, np.int32(3), torch.tensor(3), np.array(3)):
        assert checks.whole("n", value) == 3
        assert type(checks.whole("n", value)) is int
    assert checks.whole("n", -3, at_least=None) == -3
    for bad in (0, 2.0, 2.5, np.float64(3), torch.tensor(3.0), math.nan):
        with pytest.raises(ValueError, match=r"^n must be a positive whole number, but is"):
            checks.whole("n", bad)


def test_words_and_flags() -> None:
    assert checks.choice("noise", "scalar", ("diagonal", "scalar")) == "scalar"
    with pytest.raises(
        ValueError, match=r"diagonal.*but is 'diagnal'.*\n  Did you mean 'diagonal'"
    ):
        checks.choice("noise", "diagnal", ("diagonal", "scalar"))
    for bad in ([], {}, torch.ones(2), np.ones(2), None, 1):
        with pytest.raises(ValueError, match=r"^noise must be one of"):
            checks.choice("noise", bad, ("diagonal", "scalar"))
    assert checks.choice("stop", True, (True, False, "state")) is True
    with pytest.raises(ValueError, match="stop"):
        checks.choice("stop", 1, (True, False, "state"))
    assert checks.flag("throw", np.bool_(False)) is False
    for bad in ("julia", 1, None, torch.tensor(True)):
        with pytest.raises(TypeError, match=r"^throw must be True or False"):
            checks.flag("throw", bad)
    with pytest.raises(TypeError, match=r"'reltol'.\n  Did you mean 'rtol'"):
        checks.keywords("solve", ["reltol"], ["rtol", "atol"])


class Field(nn.Module):
    def forward(self, t: Any, u: Any) -> Any:
        return u


def good(t: Any, u: Any, p: Any = None) -> Any:
    return u


@pytest.mark.parametrize("value", [good, Field(), lambda *a: a[1], torch.add, torch.max, max])
def test_callables(value: Callable[..., Any]) -> None:
    assert checks.function("f", value, "t", "u") is value


@pytest.mark.parametrize(
    "value",
    [lambda: 0, lambda t: t, lambda t, u, p: u, nn.Linear(2, 2), torch.sin, 3, None, "f", Field],
)
def test_what_cannot_be_called_so(value: Any) -> None:
    with pytest.raises(TypeError, match=r"^f must be callable as f\(t, u\), but"):
        checks.function("f", value, "t", "u")


def test_functions_of_torch_say_in_their_documentation_how_they_are_called() -> None:
    """`u' = sin(u)`: `tan(u/2)` grows as `exp(t)`."""
    u0 = torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"but takes \(input\).\n  A function of the state alone"):
        psn.ODEProblem(torch.sin, u0, (0.0, 1.0))
    u1 = psn.NeuralODE(torch.sin, tspan=(0.0, 1.0), rtol=1e-9, atol=1e-9)(u0).u1
    torch.testing.assert_close(torch.tan(u1 / 2), math.e * torch.tan(u0 / 2), rtol=1e-8, atol=0)


@dataclass(frozen=True)
class Made(checks.Configured):
    gamma: float = 0.9


def test_misspelled_arguments_of_classes() -> None:
    assert Made(gamma=1).gamma == 1
    assert copy.deepcopy(Made(0.5)) == pickle.loads(pickle.dumps(Made(0.5))) == Made(0.5)
    assert dataclasses.replace(Made(), gamma=2.0).gamma == 2.0
    with pytest.raises(TypeError, match=r"Made takes no argument 'gama'.\n  Did you mean 'gamma'"):
        Made(gama=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"Tsit5 takes no argument 'order'.\n  It takes none"):
        psn.Tsit5(order=5)  # type: ignore[call-arg]


def test_sequences() -> None:
    assert checks.numbers("t", range(3)) == [0.0, 1.0, 2.0]
    for same in ([1, 2.0], (1, 2), np.array([1, 2]), torch.tensor([1.0, 2.0])):
        assert checks.numbers("t", same) == [1.0, 2.0]
    for bad in (1.0, "12", None, {1.0}, {1: 2}, object(), np.array(1.0)):
        with pytest.raises(TypeError, match=r"^t must be a sequence of numbers"):
            checks.numbers("t", bad)
    with pytest.raises(TypeError, match=r"^t\[1\] must be a number, but is 'a'"):
        checks.numbers("t", [0.0, "a"])
    with pytest.raises(ValueError, match=r"^t\[1\] .*nan"):
        checks.numbers("t", [0.0, math.nan])
    with pytest.raises(ValueError, match="one-dimensional"):
        checks.numbers("t", torch.ones(2, 2))
    assert checks.sequence("fields", Field(), Field, example="Field()")
    with pytest.raises(TypeError, match=r"^fields\[0\] .*the class Field.*\n  Write Field\(\)"):
        checks.sequence("fields", [Field], Field, example="Field()")


def test_tensors() -> None:
    array = np.arange(3.0)
    seen = checks.tensor("u0", array, axes=1, floating=True, finite=True)
    array[0] = 7.0
    assert seen[0] == 7.0  # lent, not copied
    array.flags.writeable = False
    assert torch.equal(checks.tensor("u0", array), seen)
    cases: list[tuple[Any, dict[str, Any], type[Exception], str]] = [
        ([1.0], {}, TypeError, "as_tensor"),
        (np.array(["a"]), {}, TypeError, "tensor"),
        (np.ma.array([1.0, 2.0], mask=[0, 1]), {}, TypeError, "tensor"),
        (torch.arange(3), {"floating": True}, TypeError, "double"),
        (torch.ones(2, dtype=torch.complex64), {"real": True}, TypeError, "real"),
        (torch.ones(2), {"axes": 2}, ValueError, "2 axes"),
        (torch.ones(2, device="meta"), {}, ValueError, "meta"),
        (torch.eye(2).to_sparse(), {}, ValueError, "to_dense"),
        (torch.tensor([math.nan]), {"finite": True}, ValueError, "finite"),
    ]
    for value, options, error, words in cases:
        with pytest.raises(error, match=f"(?s)^u0 must be.*{words}"):
            checks.tensor("u0", value, **options)
