"""Exported networks as data: the JSON that Julia builds its right-hand side from.

Values are numbered. A value is a run of numbers; operations say by which shape (torch's, by rows)
they read it, so views that keep the order of the entries cost nothing.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

VERSION = 1

FLAT = frozenset(("stop", "sign", "floor", "round", "less", "less_equal", "equal", "greatest"))
"""Operations through which no gradient goes. Comparisons give 1 where they hold, and 0."""

_WHOLE = FLAT - {"stop", "greatest"}
"""Those whose results are whole numbers; what is computed of these alone jumps too."""

_CUT = FLAT - {"sign", "floor", "round"}
"""Those whose result has no graph in torch; the gradients of the others are zeros."""


@dataclass(frozen=True)
class Parameter:
    """A run of the flat parameter vector.

    Attributes:
        id: of its value.
        name: within the module.
        shape: of the tensor.
        offset: of its first entry.
        trained: whether a gradient may be asked for; not for buffers and constants.
    """

    id: int
    name: str
    shape: tuple[int, ...]
    offset: int
    trained: bool


@dataclass(frozen=True)
class Operation:
    """One step: `out = op(inputs)`.

    Attributes:
        op: name.
        inputs: values read.
        in_shapes: the shapes by which they are read.
        out: value written.
        shape: of the result.
        attributes: further arguments, by name.
    """

    op: str
    inputs: tuple[int, ...]
    in_shapes: tuple[tuple[int, ...], ...]
    out: int
    shape: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Program:
    """A network as operations on numbered values.

    Attributes:
        time: value of the time, a single number.
        state: value and shape of each part of the state.
        parameters: runs of the flat parameter vector.
        constants: single numbers, by value id.
        operations: in the order of evaluation.
        outputs: values that are the derivative's parts, or the number that a condition is.
        shapes: of the outputs.
    """

    time: int
    state: tuple[tuple[int, tuple[int, ...]], ...]
    parameters: tuple[Parameter, ...]
    constants: tuple[tuple[int, float], ...]
    operations: tuple[Operation, ...]
    outputs: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]

    @functools.cached_property
    def jumps(self) -> bool:
        """Whether it has operations without a gradient."""
        return any(step.op in FLAT for step in self.operations)

    @functools.cached_property
    def reads_time(self) -> bool:
        """Whether an operation reads the time, or it is a result itself."""
        inputs = (id for step in self.operations for id in step.inputs)
        return self.time in {*inputs, *self.outputs}

    @functools.cached_property
    def read(self) -> tuple[bool, ...]:
        """Of each parameter, whether an operation reads it."""
        inputs = {id for step in self.operations for id in step.inputs}
        return tuple(parameter.id in inputs for parameter in self.parameters)

    @functools.cached_property
    def pulled(self) -> tuple[bool, ...]:
        """Of each parameter, whether a gradient goes to it; none goes to one that is detached."""
        followed = set(self.outputs)
        for step in reversed(self.operations):
            if step.out in followed and step.op not in _CUT:
                followed.update(step.inputs)
        return tuple(parameter.id in followed for parameter in self.parameters)

    def to_json(self) -> str:
        """The program as Julia reads it."""
        return json.dumps(
            {
                "version": VERSION,
                "inputs": {
                    "t": self.time,
                    "u": [{"id": id, "shape": shape} for id, shape in self.state],
                },
                "parameters": [vars(parameter) for parameter in self.parameters],
                "constants": [{"id": id, "value": _plain(x)} for id, x in self.constants],
                "ops": [
                    {
                        "op": step.op,
                        "in": step.inputs,
                        "in_shapes": step.in_shapes,
                        "out": step.out,
                        "shape": step.shape,
                        **{name: _plain(x) for name, x in step.attributes.items()},
                    }
                    for step in self.operations
                ],
                "outputs": self.outputs,
            }
        )

    def evaluate(
        self,
        t: Tensor,
        parts: list[Tensor],
        p: Tensor,
        after: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Tensor]:
        """The program run by torch, for tests and to look into a program.

        Args:
            t: the time, a 0-d tensor.
            parts: the parts of the state.
            p: the flat parameter vector.
            after: changes the result of each operation, such as by an error of rounding; not of
                those without a gradient, which jump, nor of what is made of whole numbers alone.

        Returns:
            The outputs.
        """
        values = {self.time: t.reshape(1)}
        values |= {id: part for (id, _), part in zip(self.state, parts, strict=True)}
        for parameter in self.parameters:
            size = math.prod(parameter.shape)
            values[parameter.id] = p[parameter.offset : parameter.offset + size]
        values |= {id: p.new_full((1,), value) for id, value in self.constants}
        whole = {id for id, _ in self.constants}
        for step in self.operations:
            inputs = [
                values[id].reshape(shape)
                for id, shape in zip(step.inputs, step.in_shapes, strict=True)
            ]
            result = _run(step, inputs).reshape(step.shape)
            if step.op in _WHOLE or whole.issuperset(step.inputs):
                whole.add(step.out)
            smooth = step.op not in FLAT and step.out not in whole
            values[step.out] = after(result) if after is not None and smooth else result
        pairs = zip(self.outputs, self.shapes, strict=True)
        return [values[id].reshape(shape) for id, shape in pairs]


def _plain(x: Any) -> Any:
    """JSON has no infinities, and no NaN: they are text."""
    return str(x) if isinstance(x, float) and not math.isfinite(x) else x


def _run(step: Operation, inputs: list[Tensor]) -> Tensor:
    a = step.attributes
    if step.op in _ENTRYWISE:
        return _ENTRYWISE[step.op](inputs[0], a)
    if step.op in _PAIRWISE:
        return _PAIRWISE[step.op](*inputs)
    return _OTHER[step.op](step, inputs)


def _linear(step: Operation, inputs: list[Tensor]) -> Tensor:
    a = step.attributes
    pieces, scalars = len(a["columns"]), len(a["scalars"])
    weight = inputs[pieces + scalars]
    weight = weight if a["by_input"] else weight.mT
    out = weight.new_zeros(math.prod(step.shape[:-1]), a["out_features"])
    for x, (start, width) in zip(inputs, a["columns"], strict=False):
        out = out + x @ weight[:, start : start + width].mT
    for x, start in zip(inputs[pieces:], a["scalars"], strict=False):
        out = out + x.reshape(()) * weight[:, start]
    if a["bias"]:
        out = out + inputs[-1]
    return _ENTRYWISE[a["activation"]](out, a)


def _bmm(step: Operation, inputs: list[Tensor]) -> Tensor:
    a = step.attributes
    left, right = inputs
    left = left.mT if a["transposed_a"] else left
    right = right.mT if a["transposed_b"] else right
    batch = a["batch"]
    return left.expand(batch, -1, -1) @ right.expand(batch, -1, -1)


def _conv(step: Operation, inputs: list[Tensor]) -> Tensor:
    a = step.attributes
    x, weight = inputs[:2]
    bias = inputs[2] if len(inputs) > 2 else None
    groups = x.shape[1] // weight.shape[1]
    return functional.conv2d(x, weight, bias, a["stride"], a["padding"], a["dilation"], groups)


def _norm(step: Operation, inputs: list[Tensor]) -> Tensor:
    a = step.attributes
    rest = list(inputs)
    groups, channels, pixels = a["groups"], a["channels"], a["pixels"]
    x = rest.pop(0).reshape(-1, groups * channels, pixels)
    weight = rest.pop(0).reshape(-1) if a["weight"] else None
    bias = rest.pop(0).reshape(-1) if a["bias"] else None
    # Not that of torch.nn.functional, which refuses groups of one entry.
    return torch.group_norm(x, groups, weight, bias, a["eps"])


def _sum(step: Operation, inputs: list[Tensor]) -> Tensor:
    a = step.attributes
    factor: float = a["factor"]
    return inputs[0].sum(dim=a["dims"], keepdim=True) * factor


def _greatest(step: Operation, inputs: list[Tensor]) -> Tensor:
    return inputs[0].detach().amax(step.attributes["dims"], keepdim=True)


def _take(step: Operation, inputs: list[Tensor]) -> Tensor:
    places = _places(step.attributes)
    taken = inputs[0].reshape(-1)[places.clamp(min=0)]
    return torch.where(places < 0, 0.0, taken)


def _pick(step: Operation, inputs: list[Tensor]) -> Tensor:
    x, places = inputs[0], inputs[1].round()  # a disturbed place is the same one
    inside = (places >= 0) & (places < x.shape[1])
    taken = x[:, torch.where(inside, places, 0).long()]
    return torch.where(inside[:, None], taken, math.nan)


def _put(step: Operation, inputs: list[Tensor]) -> Tensor:
    places = _places(step.attributes)
    zero = inputs[0].new_zeros(math.prod(step.shape))
    return zero.index_add(0, places, inputs[0].reshape(-1))


def _places(a: dict[str, Any]) -> Tensor:
    """The places of `take` and `put`, entry by entry."""
    starts = torch.tensor(a["places"])[None, :, None]
    outer = a["stride"] * torch.arange(a["outer"])[:, None, None]
    within = outer + starts + torch.arange(a["block"])
    return torch.where(starts < 0, -1, within).reshape(-1)


def _cat(step: Operation, inputs: list[Tensor]) -> Tensor:
    dim = step.attributes["dim"]
    shapes = [
        [*step.shape[:dim], width, *step.shape[dim + 1 :]] for width in step.attributes["widths"]
    ]
    pieces = [
        x.reshape(shape) if x.numel() == math.prod(shape) else x.reshape(()).expand(shape)
        for x, shape in zip(inputs, shapes, strict=True)
    ]
    return torch.cat(pieces, dim)


def _view(step: Operation, inputs: list[Tensor]) -> Tensor:
    a = step.attributes
    x = inputs[0].contiguous()
    return x.as_strided(a["size"], a["stride"], x.storage_offset() + a["offset"])


def _range(step: Operation, inputs: list[Tensor]) -> Tensor:
    start = step.attributes["offset"]
    return inputs[0].reshape(-1)[start : start + math.prod(step.shape)]


_ENTRYWISE: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    "identity": lambda x, a: x,
    "tanh": lambda x, a: torch.tanh(x),
    "sigmoid": lambda x, a: torch.sigmoid(x),
    "relu": lambda x, a: torch.relu(x),
    "exp": lambda x, a: torch.exp(x),
    "expm1": lambda x, a: torch.expm1(x),
    "sqrt": lambda x, a: torch.sqrt(x),
    "rsqrt": lambda x, a: torch.rsqrt(x),
    "reciprocal": lambda x, a: torch.reciprocal(x),
    "square": lambda x, a: x * x,
    "cube": lambda x, a: x * x * x,
    "sin": lambda x, a: torch.sin(x),
    "cos": lambda x, a: torch.cos(x),
    "log": lambda x, a: torch.log(x),
    "log2": lambda x, a: torch.log2(x),
    "log10": lambda x, a: torch.log10(x),
    "log1p": lambda x, a: torch.log1p(x),
    "abs": lambda x, a: torch.abs(x),
    "erf": lambda x, a: torch.erf(x),
    "silu": lambda x, a: functional.silu(x),
    "gelu": lambda x, a: functional.gelu(x),
    "gelu_tanh": lambda x, a: functional.gelu(x, approximate="tanh"),
    "leaky_relu": lambda x, a: functional.leaky_relu(x, a["slope"]),
    "elu": lambda x, a: torch.ops.aten.elu(x, a["alpha"], a["scale"], a["input_scale"]),
    "softplus": lambda x, a: functional.softplus(x, a["beta"], a["threshold"]),
    "clamp": lambda x, a: torch.clamp(x, a["low"], a["high"]),
    "affine": lambda x, a: x * a["factor"] + a["shift"],
    "power": lambda x, a: x ** a["exponent"],
    "exponential": lambda x, a: a["base"] ** x,
    "tan": lambda x, a: torch.tan(x),
    "asin": lambda x, a: torch.asin(x),
    "acos": lambda x, a: torch.acos(x),
    "atan": lambda x, a: torch.atan(x),
    "sinh": lambda x, a: torch.sinh(x),
    "cosh": lambda x, a: torch.cosh(x),
    "asinh": lambda x, a: torch.asinh(x),
    "acosh": lambda x, a: torch.acosh(x),
    "atanh": lambda x, a: torch.atanh(x),
    "erfc": lambda x, a: torch.erfc(x),
    "stop": lambda x, a: x.detach(),
    "sign": lambda x, a: torch.sign(x),
    "floor": lambda x, a: torch.floor(x),
    "round": lambda x, a: torch.round(x),
    "single": lambda x, a: x.float().to(x),
}

_PAIRWISE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "pow": torch.pow,
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "atan2": torch.atan2,
    "remainder": torch.remainder,
    "fmod": torch.fmod,
    "less": lambda a, b: (a < b).to(a),
    "less_equal": lambda a, b: (a <= b).to(a),
    "equal": lambda a, b: (a == b).to(a),
    "where": lambda a, b: torch.where(a != 0, b, 0.0),
}

_OTHER: dict[str, Callable[[Operation, list[Tensor]], Tensor]] = {
    "linear": _linear,
    "bmm": _bmm,
    "conv": _conv,
    "norm": _norm,
    "sum": _sum,
    "cat": _cat,
    "view": _view,
    "range": _range,
    "greatest": _greatest,
    "take": _take,
    "put": _put,
    "pick": _pick,
}
