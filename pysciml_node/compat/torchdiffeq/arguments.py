"""Checks of the arguments of torchdiffeq's functions, by their names there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pysciml_node import checks
from pysciml_node.problems.ode import check_field

_DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_POSITIVE = ("first_step", "max_step", "safety", "ifactor", "dfactor")
_NUMBERS = ("min_step", "step_size")
_TIMES = ("step_t", "jump_t")
_SEMINORM = ("seminorm", "adjoint_options")


def check_call(func: Any, y0: Any, method: Any, options: Any) -> None:
    """The arguments that all functions have, before anything is made of them.

    Raises:
        TypeError: one is of the wrong kind.
        ValueError: one is out of range.
    """
    check_field("func", func, "The order is odeint(func, y0, t).")
    parts = y0 if isinstance(y0, tuple) else (y0,)
    if not parts:
        hint = "Write odeint(func, y0, t) with a tensor y0."
        checks.refuse("y0", "a tensor, or a tuple of tensors", y0, hint, ValueError)
    for i, part in enumerate(parts):
        name = f"y0[{i}]" if isinstance(y0, tuple) else "y0"
        if not isinstance(part, Tensor):
            checks.refuse(name, "a tensor", part, "Convert it: torch.as_tensor(y0).")
        checks.tensor(name, part)
        if part.dtype not in _DTYPES:
            hint = f"Convert it: {name}.float() or {name}.double()."
            checks.refuse(name, "float32, float64, complex64 or complex128", part, hint)
    if not sum(part.numel() for part in parts):
        hint = "Skip the solve of an empty batch."
        checks.refuse("y0", "a state with entries", y0, hint, ValueError)
    if method is not None:
        checks.text("method", method)
    _check_options("options", options)


def _check_options(argument: str, options: Any) -> None:
    if options is None:
        return
    if not isinstance(options, Mapping):
        checks.refuse(
            argument, "a dict of options", options, f'Write {argument}={{"step_size": 0.1}}.'
        )
    for key, value in options.items():
        name = f"{argument}[{key!r}]"
        if value is None:
            continue
        if key in _POSITIVE:
            checks.number(name, value, above=0, infinite=key == "max_step")
        elif key in _NUMBERS:
            checks.number(name, value)
        elif key == "max_num_steps":
            _check_count(name, value)
        elif key == "norm" and not callable(value) and (value, argument) != _SEMINORM:
            hint = 'Only adjoint_options has a norm of a name: "seminorm".'
            checks.refuse(name, "a function of the state", value, hint)
        elif key in _TIMES and not isinstance(value, Tensor) and checks.as_float(value) is None:
            checks.numbers(name, value)
        elif key in _TIMES and isinstance(value, Tensor):
            checks.tensor(name, value, real=True)


def _check_count(name: str, value: Any) -> None:
    real = checks.as_float(value)
    checks.whole(name, int(real) if real is not None and real.is_integer() else value)


def check_backward(rtol: Any, atol: Any, options: Any, params: Any) -> list[Tensor] | None:
    """The arguments of the backward solve; returns the chosen parameters.

    Raises:
        TypeError: one is of the wrong kind.
        ValueError: one is out of range.
    """
    for name, value in (("adjoint_rtol", rtol), ("adjoint_atol", atol)):
        if value is not None and not isinstance(value, Tensor | tuple | list):
            checks.number(name, value, at_least=0)
    _check_options("adjoint_options", options)
    if params is None:
        return None
    return checks.sequence("adjoint_params", params, Tensor, example="model.parameters()")


def check_time(name: str, value: Any) -> Tensor | float:
    """One time: a number, or a tensor of one entry.

    Raises:
        TypeError: no real number.
        ValueError: several, or one that is not finite.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        checks.number(name, checks.tensor(name, value, real=True).reshape(()))
        return value if value.is_floating_point() else value.to(torch.float64)
    return checks.number(name, value)
