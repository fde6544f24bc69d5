"""Programs in Julia against the modules in torch: values and vector-Jacobian products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from julia_programs import assert_parity, compare
from torch import Tensor, nn
from torch.nn import functional

from pysciml_node.layers.timed import TimedField

pytestmark = pytest.mark.julia

DTYPES = [torch.float64, torch.float32]
shapes = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
few = settings(max_examples=6, deadline=None, derandomize=True)


class Field(nn.Module):
    """A function of `(t, u)` and some parameters as a module."""

    def __init__(self, function: Callable[..., Tensor], *parameters: Tensor) -> None:
        super().__init__()
        self.function = function
        self.weights = nn.ParameterList(parameters)

    def forward(self, t: Tensor, u: Any) -> Any:
        return self.function(t, u, *self.weights)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def positive(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return normal(*shape, dtype=dtype, seed=seed).abs() + 0.1


SCALARS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "relu": torch.relu,
    "leaky_relu": lambda x: functional.leaky_relu(x, 0.2),
    "elu": lambda x: functional.elu(x, 1.3),
    "selu": functional.selu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "mish": functional.mish,
    "softplus": lambda x: functional.softplus(x, 2.0, 5.0),
    "logsigmoid": functional.logsigmoid,
    "clamp": lambda x: x.clamp(-0.3, 0.8),
    "sin": torch.sin,
    "cos": torch.cos,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "abs": torch.abs,
    "erf": torch.erf,
    "square": torch.square,
    "neg": torch.neg,
    "cube": lambda x: x**3,
    "fifth": lambda x: x**5,
    "exponential": lambda x: 1.7**x,
}
POSITIVE: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "inverse": lambda x: 2 / x,
    "power": lambda x: x**1.7,
    "power of itself": lambda x: x**x,
}


def each(functions: list[Callable[[Tensor], Tensor]]) -> Callable[..., tuple[Tensor, ...]]:
    """A field that applies a function to each part of the state."""
    return lambda t, u: tuple(f(x) for f, x in zip(functions, u, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("functions", "sample"), [(SCALARS, normal), (POSITIVE, positive)])
def test_functions_of_one_value(functions, sample, dtype):
    parts = tuple(sample(4, 7, dtype=dtype, seed=i) for i in range(len(functions)))
    assert_parity(Field(each(list(functions.values()))), parts)
    repeated = [lambda x, f=f: x * f(x[:, :1].expand(4, 7)) + f(x) for f in functions.values()]
    assert_parity(Field(each(repeated)), parts)


EXTREMES = [-1e30, -800.0, -90.0, -30.0, -19.0, -1e-3, -1e-20, 0.0, 1e-30, 1e-4, 0.3, 19.5, 21.0]
EXTREMES += [40.0, 89.0, 750.0, 1e30, float("nan")]
VECTORIZED = [
    "tanh",
    "sigmoid",
    "relu",
    "leaky_relu",
    "elu",
    "silu",
    "gelu_tanh",
    "softplus",
    "exp",
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_values_keep_relative_accuracy(dtype):
    u = torch.tensor(EXTREMES, dtype=dtype).expand(len(VECTORIZED), -1).clone()
    chosen = [SCALARS[name] for name in VECTORIZED]
    field = Field(lambda t, u: torch.stack([f(x) for f, x in zip(chosen, u, strict=True)]))
    result = compare(field, u)
    found, expected = (x.reshape(u.shape) for x in result["du"])
    tiny = torch.finfo(dtype).tiny
    tolerance = 1e-14 if dtype == torch.float64 else 2e-6
    # torch's exp(-x) overflows where the sigmoid is about tiny; 1 + tanh cancels sooner
    smallest = torch.tensor([1e-9 if name == "gelu_tanh" else 100 * tiny for name in VECTORIZED])
    near = (found - expected).abs() <= tolerance * expected.abs() + smallest.to(dtype)[:, None]
    assert (near | (found == expected) | (found.isnan() & expected.isnan())).all()


PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda a, b: torch.add(a, b, alpha=0.7),
    "sub": torch.sub,
    "rsub": lambda a, b: torch.rsub(a, b, alpha=2),
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
}


@st.composite
def broadcastable(draw: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = draw(shapes)
    ones = draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
    other = tuple(1 if one else n for n, one in zip(shape, ones, strict=True))
    return shape, other[draw(st.integers(0, len(other))) :]


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(broadcastable(), st.integers(0, 3))
def test_functions_of_two_values_broadcast(dtype, both, seed):
    shape, other = both
    u = tuple(positive(*shape, dtype=dtype, seed=seed + i) for i in range(2 * len(PAIRS)))
    w = nn.Parameter(positive(*other, dtype=dtype, seed=seed + 99))
    functions = list(PAIRS.values())

    def field(t, u, w):
        straight = tuple(f(x, w) for f, x in zip(functions, u, strict=False))
        turned = tuple(f(w, x) * t for f, x in zip(functions, u[len(PAIRS) :], strict=True))
        return straight + turned

    assert_parity(Field(field, w), u, scale=4)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_products(dtype, rows, inputs, outputs, seed):
    u = normal(rows, inputs, dtype=dtype, seed=seed)
    w, b, back = (
        nn.Parameter(normal(*shape, dtype=dtype, seed=seed + i))
        for i, shape in enumerate([(outputs, inputs + 2), (outputs,), (outputs, inputs)])
    )

    def field(t, u, w, b, back):
        time = torch.stack([t, torch.sin(t)]).expand(u.shape[0], 2)
        joined = torch.cat([time[:, :1], u, t.expand(u.shape[0], 1)], 1)
        hidden = torch.tanh(functional.linear(joined, w, b)) + torch.addmm(b, u, w[:, 2:].mT)
        return hidden @ back + (u @ back.mT) @ back

    assert_parity(Field(field, w, b, back), u, scale=4)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(0, 3))
def test_stacks_of_products(dtype, batch, rows, columns, seed):
    u = normal(batch, rows, columns, dtype=dtype, seed=seed)
    w = nn.Parameter(normal(rows, rows, dtype=dtype, seed=seed + 1))
    v = nn.Parameter(normal(columns, dtype=dtype, seed=seed + 2))
    assert_parity(Field(lambda t, u: torch.bmm(u @ u.mT, u) * t), u, scale=4)
    assert_parity(Field(lambda t, u: torch.bmm(u, torch.bmm(u.mT, u))), u, scale=4)
    assert_parity(Field(lambda t, u, w: w @ u + w.mT @ u, w), u, scale=4)
    assert_parity(Field(lambda t, u, v: u + (u @ v).unsqueeze(-1) + v @ v, v), u, scale=4)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(4, 7), st.integers(4, 7)),
    st.tuples(st.integers(1, 3), st.integers(1, 3)),
    st.tuples(st.integers(1, 2), st.integers(1, 3)),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_convolutions(dtype, size, kernel, stride, padding, dilation, groups):
    batch, per_group, height, width = size
    channels = groups * per_group
    u = normal(batch, channels, height, width, dtype=dtype)
    weight = nn.Parameter(normal(2 * groups, per_group, *kernel, dtype=dtype, seed=1))
    bias = nn.Parameter(normal(2 * groups, dtype=dtype, seed=2))
    arguments = (stride, padding, dilation, groups)
    reach = [dilation * (k - 1) + 1 for k in kernel]
    if any(n + 2 * p < r for n, p, r in zip((height, width), padding, reach, strict=True)):
        return

    def field(t, u, weight, bias):
        out = functional.conv2d(u, weight, bias, *arguments)
        flat = functional.conv1d(
            u[:, :, 0], weight[:, :, 0], None, stride[1], padding[1], dilation, groups
        )
        return u + torch.sin(out).sum() * t + flat.mean()

    assert_parity(Field(field, weight, bias), u, scale=20)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(2, 5))
def test_normalizations(dtype, batch, groups, per_group, pixels):
    channels = groups * per_group
    u = normal(batch, channels, pixels, pixels + 1, dtype=dtype)
    w, b = (nn.Parameter(normal(channels, dtype=dtype, seed=i)) for i in (1, 2))
    v = nn.Parameter(normal(pixels, pixels + 1, dtype=dtype, seed=3))
    # the derivative is a difference of terms as large as 1 / deviation
    assert_parity(
        Field(lambda t, u, w, b: functional.group_norm(u, groups, w, b), w, b), u, scale=9
    )
    assert_parity(Field(lambda t, u: functional.group_norm(u, groups) * t), u, scale=9)
    assert_parity(Field(lambda t, u, v: functional.layer_norm(u, v.shape, v), v), u, scale=9)
    assert_parity(Field(lambda t, u, v: functional.layer_norm(u, v.shape, v, v), v), u, scale=9)


@pytest.mark.parametrize("dtype", DTYPES)
@few
@given(shapes, st.data())
def test_sums(dtype, shape, data):
    axes = st.integers(-len(shape), len(shape) - 1)
    dims = data.draw(
        st.lists(axes, min_size=1, max_size=len(shape), unique_by=lambda d: d % len(shape))
    )
    keepdim = data.draw(st.booleans())
    u = normal(*shape, dtype=dtype)

    def field(t, u):
        total = u.square().sum(dims, keepdim=True) * t
        part = torch.sin(u).mean(dims, keepdim=keepdim).square().sum()
        return u * total + part - u.mean() + u.sum(dims[0], keepdim=True)

    assert_parity(Field(field), u, scale=9)


def moved(t: Tensor, u: Tensor, w: Tensor) -> Tensor:
    """Slices, permutations, stacks and repetitions of `u`, shape `(4, 3, 2)`."""
    a, b = u.unbind(-1)
    left, right = u.chunk(2, 0)
    rows = torch.stack([a.mT, b.mT * t], -1).permute(1, 0, 2)
    halves = torch.cat([right, left[:, ::2][:, :1].expand(2, 3, 2)], 0)
    picked = u.select(1, 2).unsqueeze(1).expand_as(u) * w[None, :, None]
    flat = u.reshape(2, 12)[:, 1:12:2].transpose(0, 1).reshape(-1).narrow(0, 2, 6)
    return rows + halves + picked + flat.view(3, 2) + u.new_full((3, 2), 0.5) + torch.ones_like(u)


@pytest.mark.parametrize("dtype", DTYPES)
def test_moved_entries(dtype):
    w = nn.Parameter(normal(3, dtype=dtype, seed=1))
    assert_parity(Field(moved, w), normal(4, 3, 2, dtype=dtype), scale=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_of_parts(dtype):
    x, y = normal(3, 2, dtype=dtype), normal(4, dtype=dtype, seed=1)
    w = nn.Parameter(normal(2, dtype=dtype, seed=2))
    as_tuple = Field(lambda t, u, w: (u[0] * w + u[1].sum(), -u[1] * t), w)
    as_dict = Field(lambda t, u, w: {"b": u["a"].sum() * u["b"], "a": u["a"] * w}, w)
    swapped = Field(lambda t, u: (u[1], u[0]))
    assert_parity(as_tuple, (x, y))
    assert_parity(as_dict, {"a": x, "b": y})
    assert_parity(swapped, (y, y + 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("time", ["ignore", "concat", "concatsquash"])
@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_fields_of_timed_layers(kind, time, dtype):
    make = TimedField.mlp if kind == "mlp" else TimedField.conv
    generator = torch.Generator().manual_seed(0)
    field = make(3, [5, 4], time=time, start_at_rest=False, generator=generator).to(dtype)
    u = normal(2, 3, dtype=dtype) if kind == "mlp" else normal(2, 3, 4, 5, dtype=dtype)
    assert_parity(field, u, scale=4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_fields_without_time_parameters_or_state(dtype):
    u = normal(3, 2, dtype=dtype)
    assert_parity(Field(lambda t, u: torch.sin(u)), u)
    assert_parity(Field(lambda t, u: t.expand(3, 2) * 2), u)
    assert_parity(Field(lambda t, u: torch.zeros_like(u)), u)
    assert_parity(Field(lambda t, u: u), u)
    assert_parity(Field(lambda t, u, w: w.expand(3, 2), nn.Parameter(normal(2, dtype=dtype))), u)
