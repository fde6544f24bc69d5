"""Functions entry by entry as C expressions, with what they do to a cotangent."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from pysciml_node.torch_engine.native.text import number

Attributes = dict[str, Any]
Forward = Callable[[str, Attributes], str]
Pullback = Callable[[str, str, str, Attributes], str]

LIBRARY = {
    *("erf", "erfc", "gelu", "power", "exponential", "log2", "log10"),
    *("tan", "asin", "acos", "atan", "sinh", "cosh", "asinh", "acosh", "atanh"),
}
"""Functions of the C library: their loops are not made longer than they need be."""


def _bounds(x: str, a: Attributes) -> str:
    low, high = a["low"], a["high"]
    tests = [f"{x} >= {number(low)}"] if low is not None else []
    tests += [f"{x} <= {number(high)}"] if high is not None else []
    return " && ".join(tests) or "1"


def _clamp(x: str, a: Attributes) -> str:
    low = -math.inf if a["low"] is None else a["low"]
    high = math.inf if a["high"] is None else a["high"]
    return f"psn_clamp({x}, {number(low)}, {number(high)})"


def _elu(x: str, a: Attributes) -> str:
    scales = ", ".join(number(a[name]) for name in ("alpha", "scale", "input_scale"))
    return f"psn_elu({x}, {scales})"


def _elu_pull(g: str, x: str, y: str, a: Attributes) -> str:
    factor = a["input_scale"] * a["alpha"] * a["scale"]
    negative = f"{number(factor)} * psn_exp(({x} > 0 ? 0 : {x}) * {number(a['input_scale'])})"
    return f"{g} * ({x} > 0 ? {number(a['scale'])} : {negative})"


def _softplus_pull(g: str, x: str, y: str, a: Attributes) -> str:
    z = f"{x} * {number(a['beta'])}"
    return f"{g} * ({z} > {number(a['threshold'])} ? (REAL)1 : psn_sigmoid({z}))"


def _exponential_pull(g: str, x: str, y: str, a: Attributes) -> str:
    if a["base"] == 0:
        return f"{x} >= 0 ? (REAL)0 : {g} * {y} * -(REAL)INFINITY"
    base = a["base"]
    return f"{g} * {y} * {number(math.log(base) if base > 0 else math.nan)}"


def _tanh_argument(x: str) -> str:
    return f"(REAL)0.79788456080286535588 * ({x} + (REAL)0.044715 * {x} * {x} * {x})"


def _gelu_tanh_pull(g: str, x: str, y: str, a: Attributes) -> str:
    slope = f"(REAL)0.79788456080286535588 * (1 + (REAL)0.134145 * {x} * {x})"
    return f"psn_gelu_tanh_pull({g}, {x}, {_tanh_argument(x)}, {slope})"


FORWARD: dict[str, Forward] = {
    "identity": lambda x, a: x,
    "tanh": lambda x, a: f"psn_tanh({x})",
    "sigmoid": lambda x, a: f"psn_sigmoid({x})",
    "relu": lambda x, a: f"psn_relu({x})",
    "exp": lambda x, a: f"psn_exp({x})",
    "expm1": lambda x, a: f"psn_expm1({x})",
    "sqrt": lambda x, a: f"F(__builtin_sqrt)({x})",
    "rsqrt": lambda x, a: f"1 / F(__builtin_sqrt)({x})",
    "reciprocal": lambda x, a: f"1 / {x}",
    "square": lambda x, a: f"{x} * {x}",
    "cube": lambda x, a: f"{x} * {x} * {x}",
    "log": lambda x, a: f"psn_log({x})",
    "log2": lambda x, a: f"F(log2)({x})",
    "log10": lambda x, a: f"F(log10)({x})",
    "log1p": lambda x, a: f"psn_log1p({x})",
    "abs": lambda x, a: f"F(__builtin_fabs)({x})",
    "erf": lambda x, a: f"F(erf)({x})",
    "silu": lambda x, a: f"{x} * psn_sigmoid({x})",
    "gelu": lambda x, a: f"{x} * psn_normal_cdf({x})",
    "gelu_tanh": lambda x, a: f"(REAL)0.5 * {x} * (1 + psn_tanh({_tanh_argument(x)}))",
    "leaky_relu": lambda x, a: f"{x} > 0 ? {x} : {number(a['slope'])} * {x}",
    "elu": _elu,
    "softplus": lambda x, a: f"psn_softplus({x}, {number(a['beta'])}, {number(a['threshold'])})",
    "clamp": _clamp,
    "affine": lambda x, a: f"{x} * {number(a['factor'])} + {number(a['shift'])}",
    "power": lambda x, a: f"F(pow)({x}, {number(a['exponent'])})",
    "exponential": lambda x, a: f"F(pow)({number(a['base'])}, {x})",
    "erfc": lambda x, a: f"F(erfc)({x})",
    "tan": lambda x, a: f"F(tan)({x})",
    "asin": lambda x, a: f"F(asin)({x})",
    "acos": lambda x, a: f"F(acos)({x})",
    "atan": lambda x, a: f"F(atan)({x})",
    "sinh": lambda x, a: f"F(sinh)({x})",
    "cosh": lambda x, a: f"F(cosh)({x})",
    "asinh": lambda x, a: f"F(asinh)({x})",
    "acosh": lambda x, a: f"F(acosh)({x})",
    "atanh": lambda x, a: f"F(atanh)({x})",
    "stop": lambda x, a: x,
    "sign": lambda x, a: f"(REAL)(({x} > 0) - ({x} < 0))",
    "floor": lambda x, a: f"F(__builtin_floor)({x})",
    "round": lambda x, a: f"F(__builtin_rint)({x})",
    "single": lambda x, a: f"(REAL)(float){x}",
}

PULLBACK: dict[str, Pullback] = {
    "identity": lambda g, x, y, a: g,
    "single": lambda g, x, y, a: g,
    "tanh": lambda g, x, y, a: f"{g} * (1 - {y} * {y})",
    "sigmoid": lambda g, x, y, a: f"{g} * (1 - {y}) * {y}",
    "relu": lambda g, x, y, a: f"{y} <= 0 ? (REAL)0 : {g}",
    "exp": lambda g, x, y, a: f"{g} * {y}",
    "expm1": lambda g, x, y, a: f"{g} * ({y} + 1)",
    "sqrt": lambda g, x, y, a: f"{g} / (2 * {y})",
    "rsqrt": lambda g, x, y, a: f"(REAL)-0.5 * {g} * {y} * {y} * {y}",
    "reciprocal": lambda g, x, y, a: f"-{g} * {y} * {y}",
    "square": lambda g, x, y, a: f"2 * {g} * {x}",
    "cube": lambda g, x, y, a: f"3 * {g} * {x} * {x}",
    "log": lambda g, x, y, a: f"{g} / {x}",
    "log2": lambda g, x, y, a: f"{g} / ({x} * (REAL)0.69314718055994530942)",
    "log10": lambda g, x, y, a: f"{g} / ({x} * (REAL)2.30258509299404568402)",
    "log1p": lambda g, x, y, a: f"{g} / ({x} + 1)",
    "abs": lambda g, x, y, a: f"{g} * (REAL)(({x} > 0) - ({x} < 0))",
    "erf": lambda g, x, y, a: f"{g} * (REAL)1.1283791670955126 * psn_exp(-{x} * {x})",
    "silu": lambda g, x, y, a: f"psn_silu_pull({g}, {x})",
    "gelu": lambda g, x, y, a: f"psn_gelu_pull({g}, {x})",
    "gelu_tanh": _gelu_tanh_pull,
    "leaky_relu": lambda g, x, y, a: f"{x} > 0 ? {g} : {number(a['slope'])} * {g}",
    "elu": _elu_pull,
    "softplus": _softplus_pull,
    "clamp": lambda g, x, y, a: f"({_bounds(x, a)}) ? {g} : (REAL)0",
    "affine": lambda g, x, y, a: f"{g} * {number(a['factor'])}",
    "power": lambda g, x, y, a: (
        f"{g} * ({number(a['exponent'])} * F(pow)({x}, {number(a['exponent'] - 1)}))"
    ),
    "exponential": _exponential_pull,
    "erfc": lambda g, x, y, a: f"{g} * (REAL)-1.1283791670955126 * psn_exp(-{x} * {x})",
    "tan": lambda g, x, y, a: f"{g} * (1 + {y} * {y})",
    "asin": lambda g, x, y, a: f"{g} / F(__builtin_sqrt)(1 - {x} * {x})",
    "acos": lambda g, x, y, a: f"-{g} / F(__builtin_sqrt)(1 - {x} * {x})",
    "atan": lambda g, x, y, a: f"{g} / (1 + {x} * {x})",
    "sinh": lambda g, x, y, a: f"{g} * F(cosh)({x})",
    "cosh": lambda g, x, y, a: f"{g} * F(sinh)({x})",
    "asinh": lambda g, x, y, a: f"{g} / F(__builtin_sqrt)({x} * {x} + 1)",
    "acosh": lambda g, x, y, a: f"{g} / F(__builtin_sqrt)({x} * {x} - 1)",
    "atanh": lambda g, x, y, a: f"{g} / (1 - {x} * {x})",
}

PAIRS: dict[str, Callable[[str, str], str]] = {
    "add": lambda a, b: f"{a} + {b}",
    "sub": lambda a, b: f"{a} - {b}",
    "mul": lambda a, b: f"{a} * {b}",
    "div": lambda a, b: f"{a} / {b}",
    "pow": lambda a, b: f"F(pow)({a}, {b})",
    "maximum": lambda a, b: f"psn_maximum({a}, {b})",
    "minimum": lambda a, b: f"psn_minimum({a}, {b})",
    "atan2": lambda a, b: f"F(atan2)({a}, {b})",
    "remainder": lambda a, b: f"psn_remainder({a}, {b})",
    "fmod": lambda a, b: f"F(fmod)({a}, {b})",
    "less": lambda a, b: f"(REAL)({a} < {b})",
    "less_equal": lambda a, b: f"(REAL)({a} <= {b})",
    "equal": lambda a, b: f"(REAL)({a} == {b})",
    "where": lambda a, b: f"{a} != 0 ? {b} : (REAL)0",
}

JUMPS = {"sign", "floor", "round", "remainder", "fmod", "less", "less_equal", "equal"}
"""Functions with jumps: at one the last bit of an argument decides, which has to be torch's."""

LIBRARY_PAIRS = {"pow", "atan2", "remainder", "fmod"}
"""As `LIBRARY`."""

PAIR_PULLBACKS: dict[str, tuple[Callable[..., str], Callable[..., str]]] = {
    "add": (lambda g, a, b, y: g, lambda g, a, b, y: g),
    "sub": (lambda g, a, b, y: g, lambda g, a, b, y: f"-{g}"),
    "mul": (lambda g, a, b, y: f"{g} * {b}", lambda g, a, b, y: f"{g} * {a}"),
    "div": (lambda g, a, b, y: f"{g} / {b}", lambda g, a, b, y: f"-{g} * {y} / {b}"),
    "pow": (
        lambda g, a, b, y: f"{b} == 0 ? (REAL)0 : {g} * ({b} * F(pow)({a}, {b} - 1))",
        lambda g, a, b, y: f"{a} == 0 && {b} >= 0 ? (REAL)0 : {g} * ({y} * F(log)({a}))",
    ),
    # Where both are equal each has half, as in torch.
    "maximum": (
        lambda g, a, b, y: f"{a} == {b} ? {g} / 2 : {a} < {b} ? (REAL)0 : {g}",
        lambda g, a, b, y: f"{a} == {b} ? {g} / 2 : {b} < {a} ? (REAL)0 : {g}",
    ),
    "minimum": (
        lambda g, a, b, y: f"{a} == {b} ? {g} / 2 : {a} > {b} ? (REAL)0 : {g}",
        lambda g, a, b, y: f"{a} == {b} ? {g} / 2 : {b} > {a} ? (REAL)0 : {g}",
    ),
    "atan2": (
        lambda g, a, b, y: f"psn_angle_pull({g}, {b}, {a})",
        lambda g, a, b, y: f"-psn_angle_pull({g}, {a}, {b})",
    ),
    "remainder": (
        lambda g, a, b, y: g,
        lambda g, a, b, y: f"-{g} * F(__builtin_floor)({a} / {b})",
    ),
    "fmod": (
        lambda g, a, b, y: g,
        lambda g, a, b, y: f"-{g} * F(__builtin_trunc)({a} / {b})",
    ),
    "where": (
        lambda g, a, b, y: "(REAL)0",
        lambda g, a, b, y: f"{a} != 0 ? {g} : (REAL)0",
    ),
}
