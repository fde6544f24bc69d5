"""A program is valid for what it was made from: any change has it made again."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node.errors import UnsupportedModule
from pysciml_node.problems.state import StateSpec
from pysciml_node.translation import export
from pysciml_node.translation.export import translate
from pysciml_node.translation.recent import Recent, RecentOf
from pysciml_node.translation.snapshot import Snapshot
from pysciml_node.translation.watch import have_contents

pytestmark = pytest.mark.usefixtures("looks_in_both")

D = torch.float64
U = torch.randn(2, 3, generator=torch.Generator().manual_seed(0), dtype=D)
T = torch.tensor(0.37, dtype=D)
SCALE: Any = 2.0
TABLE: Any = torch.ones(3, dtype=D)
SETTINGS = SimpleNamespace(gain=1.0)


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(*shape, dtype=D, **options)


def helper(u: Tensor) -> Tensor:
    return u * SCALE + TABLE


class Field(nn.Module):
    """A field with everything a program could be made from."""

    factor = 1.5

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3, dtype=D)
        self.second = nn.Linear(3, 3, dtype=D)
        self.second.weight = self.first.weight
        self.act: Any = nn.LeakyReLU(0.1)
        self.drop = nn.Dropout(0.5)
        self.context = ones(2, 3)
        self.parts: Any = {"a": ones(3), "list": [ones(3), 2.0]}
        self.mask = torch.tensor([True, False, True])
        self.index = torch.tensor([1, 0, 2])
        self.single = torch.tensor([0.1, 0.2, 0.3])
        self.steps = 2
        self.calls = 0
        self.register_buffer("shift", ones(3))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        self.calls += 1
        x = self.act(self.first(u)) * self.context + self.parts["a"] * self.parts["list"][0]
        x = x * self.mask.to(u) + u[:, self.index.tolist()[0] : self.index.tolist()[0] + 1]
        for _ in range(self.steps):
            x = self.second(x) * self.parts["list"][1] + self.single.to(u)
        return helper(self.drop(x)) * self.factor * SETTINGS.gain + self.shift * t


@pytest.fixture
def field(monkeypatch: pytest.MonkeyPatch) -> Field:
    torch.manual_seed(0)
    for name, value in (("SCALE", 2.0), ("TABLE", ones(3))):
        monkeypatch.setitem(globals(), name, value)
    monkeypatch.setattr(SETTINGS, "gain", 1.0)
    monkeypatch.setattr(Field, "factor", 1.5)
    return Field().eval()


def run(module: Callable[..., Any], u: Tensor = U) -> Tensor:
    """The module's program, run by torch."""
    translated = translate(module, StateSpec.of(u))
    p = torch.cat([T.new_empty(0), *(x.reshape(-1).to(u) for x in translated.parameters)])
    (found,) = translated.program.evaluate(T, [u], p)
    return found


def set_global(name: str, value: Any) -> None:
    globals()[name] = value


CHANGES: dict[str, Callable[[Field], Any]] = {
    "nothing": lambda m: None,
    "a parameter's numbers": lambda m: m.first.bias.data.fill_(0.3),
    "a parameter": lambda m: setattr(m.first, "bias", nn.Parameter(ones(3) * 2)),
    "weights untied": lambda m: setattr(m.second, "weight", nn.Parameter(ones(3, 3))),
    "weights tied": lambda m: setattr(m.second, "bias", m.first.bias),
    "an attribute": lambda m: setattr(m, "context", ones(2, 3) * 3),
    "an attribute's size": lambda m: setattr(m, "context", ones(1, 3) * 3),
    "in a dict": lambda m: m.parts.update(a=ones(3) * 4),
    "in a dict in place": lambda m: m.parts["a"].mul_(5),
    "in a list": lambda m: m.parts["list"].__setitem__(0, ones(3) * 6),
    "a number in a list": lambda m: m.parts["list"].__setitem__(1, 7.0),
    "a mask": lambda m: setattr(m, "mask", torch.tensor([False, False, True])),
    "a mask in place": lambda m: m.mask.logical_not_(),
    "integers": lambda m: setattr(m, "index", torch.tensor([2, 0, 1])),
    "integers in place": lambda m: m.index.copy_(torch.tensor([2, 0, 1])),
    "another dtype": lambda m: m.single.add_(1.0),
    "a count": lambda m: setattr(m, "steps", 3),
    "an activation": lambda m: setattr(m, "act", nn.Tanh()),
    "an activation that is a function": lambda m: (delattr(m, "act"), setattr(m, "act", torch.sin)),
    "a slope": lambda m: setattr(m.act, "negative_slope", 0.4),
    "a hook": lambda m: m.first.register_forward_hook(lambda m, i, o: o * 2),
    "a hook before": lambda m: m.first.register_forward_pre_hook(lambda m, i: (i[0] * 2,)),
    "a buffer": lambda m: setattr(m, "shift", ones(3) * 8),
    "a global": lambda m: set_global("SCALE", 9.0),
    "a global tensor": lambda m: set_global("TABLE", ones(3) * 10),
    "an object's attribute": lambda m: setattr(SETTINGS, "gain", 11.0),
    "a class's attribute": lambda m: setattr(Field, "factor", 12.0),
    "the method": lambda m: setattr(m, "forward", lambda t, u: torch.cos(u)),
    "a dropout that is none": lambda m: (m.train(), setattr(m.drop, "p", 0.0)),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_two_solves_is_seen(field, name):
    torch.testing.assert_close(run(field), field(T, U), rtol=1e-13, atol=1e-13)
    before = field(T, U)
    CHANGES[name](field)
    after = field(T, U)
    assert name == "nothing" or not torch.allclose(before, after) or "dropout" in name
    torch.testing.assert_close(run(field), after, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", CHANGES)
def test_a_second_look_stands_only_for_the_same_program(field, name):
    translated = translate(field, StateSpec.of(U))

    def again() -> Snapshot | None:
        now = Snapshot.again(field)
        held = now is not None and have_contents(now.tensors, translated.contents)
        return now if held else None

    assert again() is not None
    CHANGES[name](field)
    now = again()
    assert now is not None or name != "nothing"
    if now is not None:
        parameters = [now.tensors[x] if isinstance(x, int) else x for x in translated.sources]
        p = torch.cat([T.new_empty(0), *(x.reshape(-1).to(U) for x in parameters)])
        (found,) = translated.program.evaluate(T, [U], p)
        torch.testing.assert_close(found, field(T, U), rtol=1e-13, atol=1e-13)


def test_what_depends_on_chance_after_a_change_is_refused(field):
    run(field)
    field.drop.train()
    with pytest.raises(UnsupportedModule, match="random"):
        run(field)
    field.drop.eval()
    torch.testing.assert_close(run(field), field(T, U), rtol=1e-13, atol=1e-13)


def test_a_closure_is_read_again():
    scale = 2.0

    class Closed(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return scale * u

    module = Closed()
    torch.testing.assert_close(run(module), 2 * U)
    scale = 5.0
    torch.testing.assert_close(run(module), 5 * U)


@pytest.mark.parametrize("place", ["attribute", "dict", "buffer", "global"])
def test_tensors_that_require_gradients_receive_them(field, place):
    run(field)
    k = torch.full((3,), 1.5, dtype=D, requires_grad=True)
    for value in (k, k * 2):  # a leaf, and an encoder's output
        if place == "attribute":
            field.context = value
        elif place == "dict":
            field.parts["a"] = value
        elif place == "buffer":
            field.shift = value
        else:
            set_global("TABLE", value)
        (expected,) = torch.autograd.grad(field(T, U).sum(), k, retain_graph=True)
        translated = translate(field, StateSpec.of(U))
        trained = [p.name for p in translated.program.parameters if p.trained]
        assert len(trained) == 5  # the weight by both its names, two biases, and this tensor
        (found,) = torch.autograd.grad(run(field).sum(), k)
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=0)


def test_a_context_and_a_count_cost_no_translation(field, monkeypatch):
    run(field)
    monkeypatch.setattr(export, "trace", None)
    for i in range(3):
        field.context = ones(2, 3) * i
        field.calls = 0
        torch.testing.assert_close(run(field), field(T, U), rtol=1e-13, atol=1e-13)


def test_a_refusal_is_kept(field, monkeypatch):
    class Refused(nn.Module):
        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return functional.dropout(u, 0.5)

    module = Refused()
    with pytest.raises(UnsupportedModule) as first:
        run(module)
    monkeypatch.setattr(export, "trace", None)
    with pytest.raises(UnsupportedModule) as second:
        run(module)
    assert str(first.value) == str(second.value)


class Beside(nn.Module):
    """A field that holds a tensor which its program does not read."""

    def __init__(self, beside: Tensor) -> None:
        super().__init__()
        self.beside = beside

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -u


@pytest.mark.parametrize("layout", [torch.strided, torch.sparse_coo, torch.sparse_csr], ids=str)
def test_tensors_of_every_layout_are_compared_with_those_of_the_translation(
    layout: torch.layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Entries that are no numbers, as those of missing data, equal themselves."""
    field = Beside(torch.tensor([[torch.nan, 0.0], [1.0, 2.0]], dtype=D).to_sparse(layout=layout))
    program = translate(field, StateSpec.of(U)).json
    monkeypatch.setattr(export, "_translate", None)
    assert translate(field, StateSpec.of(U)).json == program
    field.beside = (2 * field.beside.to_dense()).to_sparse(layout=layout)
    with pytest.raises(TypeError, match="NoneType"):
        translate(field, StateSpec.of(U))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr], ids=str)
@pytest.mark.parametrize("given", [False, True], ids=["captured", "p"])
def test_a_sparse_tensor_is_refused_twice_and_a_dense_one_in_its_place_is_not(
    layout: torch.layout, given: bool
) -> None:
    spec, dense = StateSpec.of(U.T), torch.eye(3, dtype=D)

    def translated(a: Tensor) -> Any:
        if given:
            return translate(lambda t, u, p: p @ u, spec, a)
        return translate(lambda t, u: a @ u, spec)

    messages = []
    for _ in range(2):
        with pytest.raises(UnsupportedModule) as refused:
            translated(dense.to_sparse(layout=layout))
        messages.append(str(refused.value))
    assert messages[0] == messages[1]
    assert translated(dense).json


def test_translations_are_bounded():
    module = nn.Linear(3, 3, dtype=D)
    module.forward = lambda t, u: u * module.weight.sum()  # type: ignore[method-assign]
    for n in range(1, 5):
        translate(module, StateSpec.of(torch.zeros(n, dtype=D)))
    kept = export.kept(module)
    assert len(kept) == 4
    assert kept.maxlen == export._MOST


def test_a_look_keeps_nothing_alive():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=D)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return self.layer(u)

    module = Own()
    run(module)
    gone = weakref.ref(module)
    del module
    gc.collect()
    assert gone() is None


def test_translated_in_full_precision_and_outside_of_inference_mode(field):
    expected = field(T, U).detach()
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        inside = run(field)
    torch.testing.assert_close(inside.clone(), expected, rtol=1e-13, atol=1e-13)
    run(field).sum().backward()
    assert field.first.weight.grad is not None


def test_where_both_are_rounding_there_is_no_difference():
    class Attention(nn.Module):
        """A key's bias shifts all scores alike: its derivative is zero, in both rounding."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(3, 3, dtype=D) for _ in range(3))

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            scores = self.q(u) @ self.k(u).mT
            weights = torch.exp(scores)
            return weights / weights.sum(-1, keepdim=True) @ self.v(u)

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(3)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return self.norm(u * 1e-3 + 300.0)

    module = Attention()
    torch.testing.assert_close(run(module), module(T, U), rtol=1e-13, atol=1e-13)
    translate(Shifted(), StateSpec.of(U.float()))


def test_equal_snapshots_mean_equal_places(field):
    before, after = Snapshot.of(field), Snapshot.of(field)
    assert before.tokens == after.tokens
    assert [id(x) for x in before.tensors] == [id(x) for x in after.tensors]
    field.steps = 5
    changed = Snapshot.of(field)
    assert len(before.changes(changed)) == 1
    field.parts["new"] = 1
    assert Snapshot.of(field).tokens != changed.tokens


def test_a_field_is_not_kept_alive_by_its_translation():
    class Field(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, dtype=D)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return torch.tanh(self.layer(u))  # its derivative is computed from what it returns

    field = Field()
    translate(field, StateSpec.of(U))
    weight = weakref.ref(field.layer.weight)
    del field
    gc.collect()
    assert weight() is None


def test_what_is_kept_of_an_object_goes_with_it_or_with_its_class():
    class Other:
        __slots__ = ("__weakref__",)

        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    class Another(Other):
        __slots__ = ()

    first, second, kept = Other(), Other(), RecentOf(8)
    kept[first] = "first"
    assert (kept.get(first), kept.get(second)) == ("first", None)
    first.__class__ = Another
    assert kept.get(first) is None
    del first
    gc.collect()
    assert len(kept) == 0


def test_what_was_used_last_is_kept():
    recent: Recent[int, int] = Recent(2)
    recent[1], recent[2] = 1, 2
    assert recent.get(1) == 1
    recent[3] = 3
    assert recent.get(2) is None
    assert (recent.get(1), recent.get(3)) == (1, 3)


def slope(x: Tensor) -> Tensor | None:
    return x.grad


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.inner(u)


class Sloped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(2, dtype=D))

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        return -self.slope * u


REMEDIES: dict[str, tuple[Any, str]] = {
    "a number that is computed": (
        lambda t, u: u * torch.full((2,), t.item(), dtype=D),
        r"aten.full.default, which cannot be translated with a number .* torch.ones\(shape\)",
    ),
    "a derivative in forward mode": (
        lambda t, u: torch.func.hessian(lambda x: x.cos().sum())(u) @ u,
        r"a derivative in forward mode uses it; take it in reverse, by torch.func.jacrev",
    ),
    "spectral norm in training": (Normed(), r"in place, as spectral_norm .* until .eval\(\)"),
    "gradients that other code reads": (
        lambda t, u: -u if slope(u) is None else u,
        r"reads the gradients of tensors, in slope",
    ),
}


@pytest.mark.parametrize("case", REMEDIES)
def test_a_refusal_says_what_to_do(case: str) -> None:
    field, words = REMEDIES[case]
    with pytest.raises(UnsupportedModule, match=words):
        run(field, torch.ones(2, dtype=D))


def test_an_attribute_may_have_the_name_of_code_that_reads_gradients() -> None:
    field, u = Sloped(), torch.ones(2, dtype=D)
    torch.testing.assert_close(run(field, u), field(T, u), rtol=1e-13, atol=0)


def test_a_hook_of_all_modules_that_changes_what_the_translation_returns_is_named() -> None:
    layer = nn.Linear(2, 2, dtype=D)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: out * 2)
    try:
        with pytest.raises(UnsupportedModule, match="changed by a hook of all modules"):
            run(lambda t, u: -layer(u), torch.ones(2, dtype=D))
    finally:
        handle.remove()


def test_attention_is_translated_or_refused_by_name():
    class Attentive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=D)

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            return self.attention(u, u, u)[0]

    u = torch.randn(2, 3, 4, dtype=D)
    for module in (Attentive(), Attentive().eval()):
        with contextlib.suppress(UnsupportedModule):
            torch.testing.assert_close(run(module, u), module(T, u), rtol=1e-12, atol=1e-12)


def test_what_a_field_counts_and_records_is_as_if_it_had_not_been_traced() -> None:
    seen: list[float] = []

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls = 0

        def forward(self, t: Tensor, u: Tensor) -> Tensor:
            self.calls += 1
            seen.append(self.calls)
            return -u

    field = Counting()
    translate(field, StateSpec.of(torch.zeros(2, dtype=torch.float64)))
    assert (field.calls, seen) == (0, [])


@pytest.mark.parametrize("counted", ["tensor", "entry", "normalization"])
def test_what_a_field_counts_in_tensors_is_as_if_it_had_not_been_traced(counted: str) -> None:
    count, norm = torch.zeros(3, dtype=torch.long), nn.BatchNorm1d(2, dtype=D)

    def f(t: Tensor, u: Tensor) -> Tensor:
        if counted == "tensor":
            count.add_(1)
        elif counted == "entry":
            count[1] += 1
        return norm(u) if counted == "normalization" else -u

    counts: Any = norm.num_batches_tracked if counted == "normalization" else count
    for calls in (1, 2):
        with contextlib.suppress(UnsupportedModule):
            translate(f, StateSpec.of(torch.zeros(4, 2, dtype=D)))
        f(T, torch.ones(4, 2, dtype=D))
        assert int(counts.max()) == calls
