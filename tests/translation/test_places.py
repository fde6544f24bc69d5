"""Programs are made again where a module of Python's has changed, or the order of attributes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pysciml_node.problems.state import StateSpec
from pysciml_node.translation.export import translate

pytestmark = pytest.mark.usefixtures("looks_in_both")

U = torch.tensor([1.0, 0.5], dtype=torch.float64)
T = torch.tensor(0.25, dtype=torch.float64)
SETTINGS: Any = None


def module(gain: float, name: str = "settings_of_a_test") -> Any:
    """A module of Python as a file with `gain = ...` makes it, with a function and a part."""
    made = ModuleType(name)
    source = f"gain = {gain}\ndef scaled(u):\n    return gain * u"
    exec(compile(source, name, "exec"), made.__dict__)
    vars(made)["part"] = ModuleType(f"{name}.part")
    vars(made)["part"].gain = gain
    return made


class Field(nn.Module):
    """`du/dt` is what a function makes of the state and of this module's `held`."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], held: Any = None) -> None:
        super().__init__()
        self.function, self.held = function, held

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return self.function(self, u)


def run(field: nn.Module) -> Tensor:
    """The module's program, run by torch."""
    translated = translate(field, StateSpec.of(U))
    assert not translated.parameters
    (found,) = translated.program.evaluate(T, [U], U.new_empty(0))
    return found


def imported(field: Any, u: Tensor) -> Tensor:
    import settings_of_a_test  # type: ignore[import-not-found]

    return settings_of_a_test.gain * u  # type: ignore[no-any-return]


def gain_of(settings: Any, u: Tensor) -> Tensor:
    return settings.gain * u  # type: ignore[no-any-return]


def set_settings(value: Any) -> None:
    globals()["SETTINGS"] = value


@pytest.fixture
def settings(monkeypatch: pytest.MonkeyPatch) -> Any:
    made = module(2.0)
    monkeypatch.setitem(sys.modules, made.__name__, made)
    monkeypatch.setitem(globals(), "SETTINGS", made)
    return made


WAYS: dict[str, Callable[[Any], Field]] = {
    "a global": lambda m: Field(lambda f, u: SETTINGS.gain * u),
    "a global that is handed on": lambda m: Field(lambda f, u: gain_of(SETTINGS, u)),
    "a global's function": lambda m: Field(lambda f, u: SETTINGS.scaled(u)),
    "an attribute": lambda m: Field(lambda f, u: f.held.gain * u, m),
    "an attribute's function": lambda m: Field(lambda f, u: f.held.scaled(u), m),
    "a dict": lambda m: Field(lambda f, u: f.held["m"].gain * u, {"m": m}),
    "a closure": lambda m: Field(lambda f, u: m.gain * u),
    "a default": lambda m: Field(lambda f, u, m=m: m.gain * u),
    "an import": lambda m: Field(imported),
}


@pytest.mark.parametrize("way", WAYS)
def test_what_stands_in_a_module_is_read_again(settings: Any, way: str) -> None:
    field = WAYS[way](settings)
    for _ in range(2):
        assert run(field).tolist() == [2.0, 1.0]
    settings.gain = 3.0
    assert run(field).tolist() == [3.0, 1.5]


EXCHANGES: dict[str, Callable[[Field, Any], None]] = {
    "a global": lambda f, m: set_settings(m),
    "an attribute": lambda f, m: setattr(f, "held", m),
    "an import": lambda f, m: sys.modules.update({m.__name__: m}),
}


@pytest.mark.parametrize("way", EXCHANGES)
def test_a_module_in_the_place_of_another_is_another(settings: Any, way: str) -> None:
    field = WAYS[way](settings)
    for _ in range(2):
        assert run(field).tolist() == [2.0, 1.0]
    EXCHANGES[way](field, module(3.0))
    assert run(field).tolist() == [3.0, 1.5]


def test_a_module_inside_of_another(settings: Any) -> None:
    field = Field(lambda f, u: SETTINGS.part.gain * u)
    assert run(field).tolist() == [2.0, 1.0]
    settings.part.gain = 3.0
    assert run(field).tolist() == [3.0, 1.5]
    settings.part = module(4.0)
    assert run(field).tolist() == [4.0, 2.0]


def test_a_module_that_answers_for_names_it_lacks(settings: Any) -> None:
    answers = {"offset": 2.0}

    def answer(name: str) -> float:
        return answers[name]  # a KeyError where it should be an AttributeError

    settings.__getattr__ = answer
    field = Field(lambda f, u: SETTINGS.offset * u)
    assert run(field).tolist() == [2.0, 1.0]
    answers["offset"] = 3.0
    assert run(field).tolist() == [3.0, 1.5]


def test_a_module_that_is_first_imported_by_the_field(settings: Any) -> None:
    del sys.modules[settings.__name__]

    def first(field: Any, u: Tensor) -> Tensor:
        sys.modules.setdefault("settings_of_a_test", settings)
        return imported(field, u)

    field = Field(first)
    assert run(field).tolist() == [2.0, 1.0]
    settings.gain = 3.0
    assert run(field).tolist() == [3.0, 1.5]


def test_names_that_come_and_go_in_modules_are_told_apart(settings: Any) -> None:
    """One name less and one more, with the same value."""
    settings.rate = 2.0

    def signed(field: Any, u: Tensor) -> Tensor:
        return SETTINGS.rate * u if "rate" in vars(SETTINGS) else -SETTINGS.offset * u  # type: ignore[no-any-return]

    field = Field(signed)
    assert run(field).tolist() == [2.0, 1.0]
    del settings.rate
    settings.offset = 2.0
    assert run(field).tolist() == [-2.0, -1.0]


def in_order(items: Any) -> float:
    """1 and then 2, and another number for 2 and then 1."""
    first, second = (value for name, value in items if name.startswith("part_"))
    return 2.0 * first + second  # type: ignore[no-any-return]


def test_the_order_of_a_modules_attributes_matters() -> None:
    field = Field(lambda f, u: in_order(vars(f).items()) * u)
    field.part_a, field.part_b = 1.0, 2.0  # type: ignore[assignment]
    for _ in range(2):
        assert run(field).tolist() == [4.0, 2.0]
    field.__dict__["part_a"] = field.__dict__.pop("part_a")
    assert run(field).tolist() == [5.0, 2.5]


def test_the_order_of_a_classs_attributes_matters() -> None:
    class Parts:
        part_a, part_b = 1.0, 2.0

    field = Field(lambda f, u: in_order(vars(Parts).items()) * u)
    for _ in range(2):
        assert run(field).tolist() == [4.0, 2.0]
    del Parts.part_a
    Parts.part_a = 1.0
    assert run(field).tolist() == [5.0, 2.5]


def test_what_objects_in_an_array_hold() -> None:
    held = np.array([None], dtype=object)
    held[0] = [2.0]
    field = Field(lambda f, u: held[0][0] * u)
    for _ in range(2):
        assert run(field).tolist() == [2.0, 1.0]
    held[0][0] = 3.0
    assert run(field).tolist() == [3.0, 1.5]
