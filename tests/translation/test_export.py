"""Modules as programs, without Julia: structure, refusals, and the program run by torch."""

from __future__ import annotations

import gc
import itertools
import json
import queue
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node.layers.timed import TimedField
from pysciml_node.problems.state import StateSpec
from pysciml_node.translation.export import UnsupportedModule, kept, translate

pytestmark = pytest.mark.usefixtures("looks_in_both")


class Field(nn.Module):
    """A function of the module itself, the time and the state."""

    def __init__(self, function: Callable[..., Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, t: Tensor, u: Any) -> Any:
        return self.function(self, t, u)


U = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
T = torch.tensor(0.37, dtype=torch.float64)


def operations(module: nn.Module, u: Any = U) -> list[str]:
    program = translate(module.to(torch.float64), StateSpec.of(u)).program
    return [step.op for step in program.operations]


def assert_same(module: nn.Module, u: Any = U) -> None:
    """The program, run by torch, is the module."""
    module = module.to(torch.float64)
    spec = StateSpec.of(u)
    translated = translate(module, spec)
    p = torch.cat([T.new_empty(0), *(x.detach().reshape(-1) for x in translated.parameters)])
    found = translated.program.evaluate(T, list(spec.parts(u)), p)
    for one, other in zip(found, spec.parts(module(T, u)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-13, atol=1e-13)


def test_the_time_beside_the_state_needs_no_concatenation():
    def forward(m, t, x):
        time = t.reshape(-1, 1).expand(x.shape[0], 1).to(x)
        hidden = torch.tanh(m.first(torch.cat([x, time], 1)))
        return m.second(torch.cat([hidden, torch.ones_like(x[:, :1]) * t], 1))

    field = Field(forward, first=nn.Linear(4, 6), second=nn.Linear(7, 3))
    assert operations(field) == ["linear", "linear"]
    first, second = translate(field, StateSpec.of(U)).program.operations
    assert first.attributes["columns"] == [[0, 3]]
    assert first.attributes["scalars"] == [3]
    assert first.attributes["activation"] == "tanh"
    assert second.attributes["activation"] == "identity"
    assert_same(field)


def test_what_is_repeated_is_computed_once():
    field = Field(lambda m, t, u: u * torch.sin(t.expand(4, 3)) + torch.cos(t) * torch.ones(4, 3))
    sizes = {
        step.op: step.shape for step in translate(field, StateSpec.of(U.float())).program.operations
    }
    assert sizes["sin"] in ((), (1, 1))
    assert sizes["cos"] in ((), (1, 1))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m, t, u: u**3 @ m.a, ["cube", "linear"]),
        (lambda m, t, u: u @ m.a.t() * 1.0 + 0.0, ["linear"]),
        (lambda m, t, u: -(2 * u - 1) / 4, ["affine"] * 4),
        (lambda m, t, u: u, ["identity"]),
        (lambda m, t, u: torch.zeros_like(u), ["view"]),
        (lambda m, t, u: u.clone().contiguous().to(torch.float64) ** 1, ["identity"]),
    ],
)
def test_operations_that_remain(function, expected):
    field = Field(function, a=nn.Parameter(torch.randn(3, 3)))
    assert operations(field) == expected
    assert_same(field)


FIELDS: dict[str, tuple[nn.Module, Any]] = {
    "in place": (
        Field(
            lambda m, t, u: m.net(u).mul(2).add_(t),
            net=nn.Sequential(nn.Linear(3, 3), nn.ReLU(True)),
        ),
        U,
    ),
    "batch normalization": (Field(lambda m, t, u: m.norm(u), norm=nn.BatchNorm1d(3)).eval(), U),
    "literals": (
        Field(
            lambda m, t, u: (
                u * torch.linspace(0, 1, 3, dtype=u.dtype) + torch.tensor([1.0, 2, 3]).to(u)
            )
        ),
        U,
    ),
    "buffers": (Field(lambda m, t, u: m.norm(u) @ torch.eye(3).to(u), norm=nn.LayerNorm(3)), U),
    "dict": (
        Field(lambda m, t, u: {"v": -torch.sin(u["x"]) * t, "x": u["v"]}),
        {"x": U, "v": 2 * U},
    ),
    "tuple": (
        Field(lambda m, t, u: (u[1].sum() * u[0], u[1].T.reshape(2, 6))),
        (U, U.reshape(2, 6)),
    ),
    "norm": (Field(lambda m, t, u: u / (1 + u.norm(dim=-1, keepdim=True))), U),
    "slices": (Field(lambda m, t, u: torch.stack(u.unbind(0)[::-1])), U),
    "padding": (
        Field(lambda m, t, u: m.c(u), c=nn.Conv1d(2, 2, 3, padding="same", dilation=2)),
        U.reshape(2, 2, 3),
    ),
    "unbatched": (Field(lambda m, t, u: m.c(u), c=nn.Conv1d(2, 2, 3, padding=1)), U.reshape(2, 6)),
    "rounded by torch": (
        Field(lambda m, t, u: functional.hardsigmoid(u) + functional.celu(u, 1.3)),
        U,
    ),
    "a parameter that lies by columns": (
        Field(lambda m, t, u: torch.lerp(m.w, u, 0.3), w=nn.Parameter((2 * U).T.contiguous().T)),
        U,
    ),
    "timed": (
        TimedField.conv(2, [3], time="concatsquash", start_at_rest=False),
        U.reshape(1, 2, 2, 3),
    ),
}


@pytest.mark.parametrize("name", FIELDS)
def test_programs_are_their_modules(name):
    assert_same(*FIELDS[name])


CAPTURED = torch.ones(3, 3, dtype=torch.float64, requires_grad=True)


class Doubled(torch.autograd.Function):
    """The identity, said to have slope 2."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


@pytest.mark.parametrize(
    ("function", "parts", "words"),
    [
        (lambda m, t, u: torch.sort(u).values, {}, r"aten\.sort"),
        (lambda m, t, u: u * u.argmax(), {}, r"aten\.argmax"),
        (lambda m, t, u: u * u.max(1, keepdim=True).indices, {}, r"aten\.mul"),
        (lambda m, t, u: u[u > 0].sum() * u, {}, r"aten\.index"),
        (lambda m, t, u: torch.linalg.inv(u[:3]) @ u[:3], {}, r"aten\.linalg_inv"),
        (lambda m, t, u: u if t > 0 else -u, {}, "torch.export"),
        (lambda m, t, u: u * float(t), {}, "torch.export"),
        (lambda m, t, u: functional.dropout(u, 0.5), {}, "random.*eval"),
        (lambda m, t, u: u + torch.randn_like(u), {}, r"aten\.randn_like"),
        (lambda m, t, u: u + torch.rand(3), {}, r"aten\.rand"),
        (lambda m, t, u: m.norm(u), {"norm": nn.BatchNorm1d(3)}, "changes its buffers"),
        (lambda m, t, u: torch.relu(u).add_(t), {}, "differentiated by torch"),
        (lambda m, t, u: Doubled.apply(u), {}, "another derivative"),
        (lambda m, t, u: torch.where(u > 9, Doubled.apply(u), u), {}, "another derivative"),
    ],
)
def test_refusals_name_the_operation_and_the_remedy(function, parts, words):
    field = Field(function, **parts).to(torch.float64)
    with pytest.raises((UnsupportedModule, ValueError), match=words) as caught:
        translate(field, StateSpec.of(U))
    if isinstance(caught.value, UnsupportedModule):
        assert "lambda t, u: module(t, u)" in str(caught.value)
        assert not caught.value.captured
        assert len(str(caught.value).splitlines()) < 6


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        (lambda u: (u, u), "a tensor, but returned tuple"),
        (lambda u: {"u": u}, r"a tensor, but returned a dict of \['u'\]"),
        (lambda u: 1.0, "a tensor, but returned float"),
        (lambda u: u.float(), "float64, but returned torch.float32"),
    ],
)
def test_what_is_no_derivative_is_refused_as_in_python(returned, words):
    with pytest.raises(TypeError, match=words) as caught:
        translate(Field(lambda m, t, u: returned(u)).double(), StateSpec.of(U))
    assert len(str(caught.value).splitlines()) == 2


def test_captured_tensors_that_require_gradients_are_trained():
    translated = translate(Field(lambda m, t, u: u @ CAPTURED), StateSpec.of(U))
    assert translated.parameters[0] is CAPTURED
    assert [p.trained for p in translated.program.parameters] == [True]


def test_captured_tensors_of_another_dtype_that_require_gradients_are_told_apart():
    other = torch.ones(3, 3, requires_grad=True)
    with pytest.raises(UnsupportedModule) as caught:
        translate(Field(lambda m, t, u: u @ other.double()), StateSpec.of(U))
    assert caught.value.captured


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_captured_parameters_of_another_dtype_are_refused_for_they_may_be_set_free(dtype, free):
    weight = nn.Parameter(torch.full((3,), 1.5, dtype=dtype), requires_grad=free)
    with pytest.raises(UnsupportedModule, match="can require gradients") as caught:
        translate(lambda t, u: u * weight, StateSpec.of(U))
    assert caught.value.captured
    table = nn.Parameter(torch.arange(3), requires_grad=False)
    translate(lambda t, u: u * table, StateSpec.of(U))


def test_parameters_that_stand_where_nothing_looks_are_not_taken_for_numbers():
    weight = nn.Parameter(torch.full((3,), 1.5).double())
    held = itertools.repeat(weight)
    with pytest.raises(UnsupportedModule, match="found in none of its attributes") as caught:
        translate(lambda t, u: u * next(held), StateSpec.of(U))
    assert caught.value.captured


def test_parameters_in_an_array_of_objects_or_a_queue_are_found():
    weight, array = nn.Parameter(torch.full((3,), 1.5).double()), np.array([None])
    array[0], held = weight, queue.Queue()
    held.put(weight)
    for f in (lambda t, u: u * array[0], lambda t, u: u * held.queue[0]):
        translated = translate(f, StateSpec.of(U))
        assert translated.parameters[0] is weight
        assert all(translated.program.pulled)


def test_parameters_on_the_same_memory_are_told_apart():
    first = nn.Parameter(torch.full((3,), 1.5).double())
    second = nn.Parameter(first.data)
    translated = translate(lambda t, u: u * first, StateSpec.of(U))
    assert translated.parameters[0] is first
    with pytest.raises(UnsupportedModule, match="trains a tensor"):
        translate(lambda t, u: u * first.detach() * second, StateSpec.of(U))


def test_gradients_go_to_parameters_that_are_not_detached():
    field = Field(
        lambda m, t, u: u * m.scale.detach() + m.turn(u) * (m.edge > 0) + m.step.floor(),
        scale=nn.Parameter(torch.ones(3)),
        edge=nn.Parameter(torch.ones(3)),
        step=nn.Parameter(torch.ones(3)),
        turn=nn.Linear(3, 3, bias=False),
    ).double()
    program = translate(field, StateSpec.of(U)).program
    assert all(program.read)
    pairs = zip(program.parameters, program.pulled, strict=True)
    found = {p.name for p, pulled in pairs if pulled}
    assert found == {"step", "turn.weight"}


def test_complex_states_are_refused():
    with pytest.raises(UnsupportedModule, match="complex"):
        translate(Field(lambda m, t, u: u), StateSpec.of(U + 0j))


def test_a_derivative_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"state's shape \(4, 3\), but returned \(4, 1\)"):
        translate(Field(lambda m, t, u: u[:, :1]), StateSpec.of(U))


def test_parameters_are_the_modules_own_and_read_at_every_call():
    field = Field(
        lambda m, t, u: m.layer(u) + m.shift, layer=nn.Linear(3, 3), shift=torch.ones(3).double()
    ).double()
    spec = StateSpec.of(U)
    first = translate(field, spec)
    own = [field.layer.weight, field.layer.bias, field.shift]
    assert [id(x) for x in first.parameters] == [id(x) for x in own]
    assert [p.trained for p in first.program.parameters] == [True, True, False]
    field.layer.weight = nn.Parameter(torch.zeros(3, 3).double())
    field.shift = torch.zeros(3).double()
    second = translate(field, spec)
    assert second.json is first.json
    assert second.parameters[0] is field.layer.weight
    assert second.parameters[2] is field.shift


def test_translations_are_kept_by_structure_and_mode_and_die_with_the_module():
    field = Field(lambda m, t, u: m.layer(u), layer=nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    field = field.double().eval()
    before = translate(field, StateSpec.of(U)).json
    assert translate(field, StateSpec.of(U + 1)).json is before
    assert translate(field, StateSpec.of(U[:2])).json != before
    field.train()
    with pytest.raises(UnsupportedModule, match="dropout"):
        translate(field, StateSpec.of(U))
    gone = weakref.ref(field)
    assert kept(field)
    del field
    gc.collect()
    assert gone() is None


def test_the_json_is_versioned_and_of_plain_numbers():
    field = Field(lambda m, t, u: torch.tanh(m.layer(u)) * t, layer=nn.Linear(3, 3)).double()
    text = json.loads(translate(field, StateSpec.of(U)).json)
    assert text["version"] == 1
    assert set(text) == {"version", "inputs", "parameters", "constants", "ops", "outputs"}
    assert [p["offset"] for p in text["parameters"]] == [0, 9]
    assert text["ops"][0]["op"] == "linear"
