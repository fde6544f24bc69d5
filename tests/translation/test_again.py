"""The second look in C sees what the one in Python sees, of every kind of place."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysciml_node as psn
from pysciml_node.torch_engine.native.compiler import available
from pysciml_node.translation import again
from pysciml_node.translation.entries import Settled
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.watch import Watch

pytestmark = [
    pytest.mark.skipif(not available()[0], reason=available()[1]),
    pytest.mark.usefixtures("looks_in_both"),
]

GAIN: Any = 2.0


class Named(Tensor):
    """Another class of tensors."""


class Slotted:
    __slots__ = ("k",)

    def __init__(self) -> None:
        self.k = 1.0


class Other(Slotted):
    __slots__ = ()


class Switch(Settled):
    """What a table raises; no look goes into it."""

    error: type[BaseException] | None = None


class Table(Mapping[str, float]):
    """A mapping of a user's."""

    def __init__(self) -> None:
        self.switch = Switch()

    def __getitem__(self, key: str) -> float:
        if self.switch.error is not None:
            raise self.switch.error(key)
        return {"a": 1.0, "b": 2.0}[key]

    def __iter__(self) -> Iterator[str]:
        return iter(("a", "b"))

    def __len__(self) -> int:
        return 2


class Field(nn.Module):
    """A field that reaches a place of every kind."""

    factor = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.rows = [1.0, 2.0]
        self.empty: dict[str, float] = {}
        self.numbers = {"a": 1.0, "b": 2.0, "last": 3.0}
        self.ordered = OrderedDict(a=1.0, b=2.0)
        self.chosen = {1, 2}
        self.slotted = Slotted()
        self.table = Table()
        self.context: Any = torch.ones(2)
        self.same = self.context
        self.parts: Any = {"x": torch.ones(2), "y": torch.zeros(2)}

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        try:
            scale = NOT_YET  # type: ignore[name-defined]
        except NameError:
            scale = GAIN
        return scaled(self.layer(u)) * scale


def scaled(u: Tensor, by: float = 2.0) -> Tensor:
    return u * by


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> Field:
    monkeypatch.setitem(globals(), "GAIN", 2.0)
    monkeypatch.setattr(Field, "factor", 1.5)
    monkeypatch.setattr(scaled, "__defaults__", (2.0,))
    made = Field()
    Snapshot.of(made)
    return made


def exchanged_key(m: Field) -> None:
    """An equal key that is another object, and is last as before."""
    m.numbers["".join(("la", "st"))] = m.numbers.pop("last")


def both(m: Field, value: Any) -> None:
    m.context = m.same = value


CHANGES: dict[str, Callable[[Field], Any]] = {
    "an empty dict": lambda m: m.empty.update(a=1.0),
    "no hooks": lambda m: m.layer.register_forward_hook(lambda m, i, o: o),
    "a length": lambda m: m.rows.append(3.0),
    "an item": lambda m: m.rows.__setitem__(1, 3.0),
    "a set": lambda m: m.chosen.add(3),
    "an entry": lambda m: m.numbers.update(b=3.0),
    "a further entry": lambda m: m.numbers.update(d=4.0),
    "an entry less": lambda m: m.numbers.pop("last"),
    "an order": lambda m: m.numbers.update(a=m.numbers.pop("a")),
    "a key": exchanged_key,
    "an order of its own": lambda m: m.ordered.move_to_end("a"),
    "a slot": lambda m: setattr(m.slotted, "k", 2.0),
    "no slot": lambda m: delattr(m.slotted, "k"),
    "a class": lambda m: setattr(m.slotted, "__class__", Other),
    "a class's attribute": lambda m: setattr(Field, "factor", 2.5),
    "a default": lambda m: setattr(scaled, "__defaults__", (3.0,)),
    "a dict exchanged": lambda m: setattr(m.layer, "__dict__", dict(m.layer.__dict__)),
    "a global": lambda m: globals().update(GAIN=3.0),
    "a tensor's dtype": lambda m: both(m, torch.ones(2, dtype=torch.float64)),
    "a tensor's shape": lambda m: both(m, torch.ones(1, 2)),
    "a tensor's device": lambda m: both(m, torch.ones(2, device="meta")),
    "a tensor's gradient": lambda m: m.context.requires_grad_(),
    "a tensor's class": lambda m: both(m, torch.ones(2).as_subclass(Named)),
    "a tensor's attributes": lambda m: setattr(m.context, "k", 1.0),
    "no tensor": lambda m: both(m, 1.0),
    "a tensor taken out": lambda m: m.parts.pop("y"),
    "one of two places": lambda m: setattr(m, "same", torch.ones(2)),
    "one tensor of two": lambda m: m.parts.update(y=m.parts["x"]),
    "a parameter's dtype": lambda m: m.layer.double(),
    "a parameter": lambda m: setattr(m.layer, "bias", nn.Parameter(torch.ones(3))),
}

STANDING: dict[str, Callable[[Field], Any]] = {
    "nothing": lambda m: None,
    "numbers": lambda m: m.context.fill_(3.0),
    "a tensor": lambda m: both(m, torch.zeros(2)),
    "a tensor in a dict": lambda m: m.parts.update(x=torch.zeros(2)),
    "a parameter": lambda m: setattr(m.layer, "bias", nn.Parameter(torch.ones(2))),
    "a frozen parameter": lambda m: m.layer.requires_grad_(False),
    "an attribute back": lambda m: (setattr(m.slotted, "k", 2.0), setattr(m.slotted, "k", 1.0)),
}


def test_the_look_is_in_c(field, monkeypatch):
    monkeypatch.undo()  # no look in Python beside it
    monkeypatch.setattr(Watch, "tensors", None)
    assert Snapshot.again(field) is not None


@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed(field, name):
    assert Snapshot.again(field) is not None
    CHANGES[name](field)
    assert Snapshot.again(field) is None


@pytest.mark.parametrize("name", STANDING)
def test_what_stands(field, name):
    STANDING[name](field)
    now = Snapshot.again(field)
    assert now is not None
    held = field.layer.weight, field.layer.bias, field.context, *field.parts.values()
    assert set(map(id, now.tensors)) == set(map(id, held))


def test_a_name_that_a_module_lacks(field, monkeypatch):
    assert Snapshot.again(field) is not None
    monkeypatch.setitem(globals(), "NOT_YET", 5.0)
    assert Snapshot.again(field) is None


def test_the_default_dtype(field):
    torch.set_default_dtype(torch.float64)
    try:
        assert Snapshot.again(field) is None
    finally:
        torch.set_default_dtype(torch.float32)
    assert Snapshot.again(field) is not None


def given(tensors: list[Tensor], number: float, **attributes: Any) -> Callable[..., Tensor]:
    """A function of the same code each time, which was given tensors and a number."""
    first, second = tensors

    def f(t: Tensor, u: Tensor) -> Tensor:
        return u * first + second * number

    f.__dict__.update(attributes)
    return f


def test_what_a_function_was_given():
    one, other, number = torch.ones(2), torch.zeros(2), 2.0
    f = given([one, other], number)
    Snapshot.of(f)

    def tensors(*tensors: Tensor, number: float = number, **attributes: Any) -> list[int] | None:
        now = Snapshot.again(given(list(tensors), number, **attributes))
        return None if now is None else list(map(id, now.tensors))

    assert tensors(one, other) == [id(one), id(other)]
    assert tensors(other, one) == [id(other), id(one)]
    assert tensors(one, one) is None
    assert tensors(one, torch.ones(3)) is None
    assert tensors(one, nn.Parameter(other)) is None
    assert tensors(one, other, number=3.0) is None
    assert tensors(one, other, k=1.0) is None
    assert tensors(one, other) == [id(one), id(other)]


def test_many_tensors():
    held = [torch.full((2,), float(k)) for k in range(300)]
    module = nn.Identity()
    module.held = held
    Snapshot.of(module)
    now = Snapshot.again(module)
    assert now is not None
    assert list(map(id, now.tensors)) == list(map(id, held))
    held[7], held[280] = held[280], held[7]
    assert Snapshot.again(module) is not None
    held[7] = held[123]
    assert Snapshot.again(module) is None


@pytest.mark.parametrize("error", [KeyError, ValueError, AttributeError, RuntimeError])
def test_what_cannot_be_looked_at_has_changed(field, error):
    field.table.switch.error = error
    assert Snapshot.again(field) is None
    field.table.switch.error = None
    assert Snapshot.again(field) is not None


@pytest.mark.parametrize("error", [KeyboardInterrupt, TypeError, MemoryError])
def test_other_errors_are_raised(field, error):
    watch = Snapshot.of(field).watch
    field.table.switch.error = error
    for look in (again.tensors, Watch.tensors):
        with pytest.raises(error):
            look(watch, ())


def test_looks_leave_no_references(field):
    standing, table = Snapshot.again(field), field.numbers
    assert standing is not None
    tensors = standing.tensors
    objects = [None, *tensors, *table, table, field.layer, field.slotted, torch.float32, nn.Linear]
    objects += [tensors[0].device, tensors, Field.forward, field.ordered]

    def counts() -> list[int]:
        return list(map(sys.getrefcount, objects))

    for change in (lambda: None, lambda: field.rows.append(3.0)):
        change()
        before = counts()
        for _ in range(100):
            Snapshot.again(field)
        assert max(abs(x - y) for x, y in zip(before, counts(), strict=True)) < 50


def test_only_native_solves_compile_the_look():
    code = (
        "import torch, pysciml_node as psn\n"
        "from pysciml_node.translation import again\n"
        "problem = psn.ODEProblem(lambda t, u: -u, torch.ones(1), (0.0, 1.0))\n"
        "psn.solve(problem, compile=False)\n"
        "assert again._look is None\n"
        "psn.solve(problem, compile=True)\n"
        "assert again._look is not None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_solves_go_on_in_python_where_the_look_cannot_be_compiled(field, monkeypatch):
    monkeypatch.setattr(again, "_look", None)
    problem = psn.ODEProblem(field.double(), torch.ones(1, 2, dtype=torch.float64), (0.0, 1.0))
    first = psn.solve(problem, compile=True).u1
    scaled.__defaults__ = (4.0,)
    second = psn.solve(problem, compile=True).u1
    expected = psn.solve(problem, compile=False).u1
    torch.testing.assert_close(second, expected, rtol=1e-10, atol=1e-10)
    assert not torch.allclose(first, second)
