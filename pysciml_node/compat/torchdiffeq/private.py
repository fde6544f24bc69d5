"""torchdiffeq's private helpers, with the meaning that they have there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pysciml_node import checks, tableaus
from pysciml_node.compat.torchdiffeq.arguments import check_call
from pysciml_node.compat.torchdiffeq.explicit import runge_kutta_step
from pysciml_node.compat.torchdiffeq.grid import Field
from pysciml_node.compat.torchdiffeq.methods import FIXED
from pysciml_node.compat.torchdiffeq.normal import NormalField, normalize
from pysciml_node.compat.torchdiffeq.plan import check_times
from pysciml_node.compat.torchdiffeq.states import Layout, mixed, rms
from pysciml_node.tableaus import Tableau


class ButcherTableau(NamedTuple):
    """An explicit method as torchdiffeq writes it: the first stage is left out of `alpha`."""

    alpha: Tensor
    beta: list[Tensor]
    c_sol: Tensor
    c_error: Tensor

    @classmethod
    def of(cls, tableau: Tableau) -> ButcherTableau:
        """From a table of this package."""

        def row(numbers: Sequence[float]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.float64)

        inner = [row(numbers) for numbers in tableau.a[1:]]
        return cls(row(tableau.c[1:]), inner, row(tableau.b), row(tableau.b_error))


def _middle(tableau: Tableau) -> Tensor:
    """Weights of the state in the middle of a step."""
    weights = torch.tensor(tableau.interpolant.weights, dtype=torch.float64)
    powers = torch.arange(1, weights.shape[1] + 1, dtype=torch.float64)
    return weights @ 0.5**powers


# Two thirds of the usual estimate: Shampine's.
_DP5 = ButcherTableau.of(tableaus.DP5)
DORMAND_PRINCE = _DP5._replace(c_error=_DP5.c_error * 2 / 3)
DORMAND_PRINCE_MIDDLE = _middle(tableaus.DP5)


def find_parameters(module: nn.Module) -> list[Tensor]:
    """The parameters of a module, also of a replica that `DataParallel` has made."""
    checks.instance("module", module, nn.Module, example="nn.Linear(2, 2)")
    if not getattr(module, "_is_replica", False):
        return list(module.parameters())
    return [
        value
        for inner in module.modules()
        for value in vars(inner).values()
        if isinstance(value, Tensor) and value.requires_grad
    ]


def check_inputs(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor,
    rtol: Any,
    atol: Any,
    method: str | None,
    options: Mapping[str, Any] | None,
    event_fn: Callable[..., Tensor] | None,
    solvers: Mapping[str, Any],
) -> tuple[
    tuple[torch.Size, ...] | None,
    NormalField,
    Tensor,
    Tensor,
    Any,
    Any,
    str,
    dict[str, Any],
    Callable[[Tensor, Tensor], Tensor] | None,
    bool,
]:
    """A call in normal form: a flat state, increasing times.

    Returns:
        The shapes of a tuple's parts, the field, the state, the times, both tolerances, the method,
        the options with a norm, the event function, and whether time ran backward.
    """
    check_call(func, y0, method, options)
    check_times(t, event_fn is not None)
    name = checks.choice("method", "dopri5" if method is None else method, solvers)
    call = normalize(func, y0, t, rtol, atol, options, event_fn)
    shapes = None if call.layout is None else call.layout.shapes
    return (
        shapes,
        call.func,
        call.y0,
        call.t,
        call.rtol,
        call.atol,
        name,
        call.options,
        call.event_fn,
        call.reversed,
    )


def flat_to_shape(
    tensor: Tensor, length: Sequence[int], shapes: Sequence[torch.Size]
) -> tuple[Tensor, ...]:
    """The parts of vectors `(*length, N)`, each `(*length, *shape)`."""
    parts: tuple[Tensor, ...] = Layout(tuple(shapes), False).state(tensor, tuple(length))
    return parts


def rms_norm(tensor: Tensor) -> Tensor:
    """Root-mean-square."""
    return rms(tensor)


def linf_norm(tensor: Tensor) -> Tensor:
    """Largest absolute value."""
    return tensor.abs().max()


def mixed_norm(tensors: Sequence[Tensor]) -> Tensor | float:
    """The largest root-mean-square among tensors."""
    return mixed(tensors)


@torch.no_grad()
def optimal_step_size(
    last_step: Tensor,
    error_ratio: Tensor,
    safety: Tensor,
    ifactor: Tensor,
    dfactor: Tensor,
    order: int,
) -> Tensor:
    """The next step: `safety * error_ratio**(-1/order)` times the last, within the two factors.

    After an accepted step it does not shrink.
    """
    if error_ratio == 0:
        return last_step * ifactor
    smallest = 1.0 if error_ratio < 1 else float(dfactor)
    factor = safety * error_ratio.to(last_step) ** (-1.0 / order)
    return last_step * torch.as_tensor(factor).clamp(smallest, float(ifactor))


def rk4_alt_step_func(
    func: Field,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    y0: Tensor,
    f0: Tensor | None = None,
    perturb: bool = False,
) -> Tensor:
    """The change of the state over a step of Kutta's 3/8 rule."""
    tableau = FIXED["rk4"].tableau  # type: ignore[attr-defined]
    return runge_kutta_step(tableau, func, t0, dt, t1, y0, f0, perturb)[0]


def rk4_step_func(
    func: Field,
    t0: Tensor,
    dt: Tensor,
    t1: Tensor,
    y0: Tensor,
    f0: Tensor | None = None,
    perturb: bool = False,
) -> Tensor:
    """The change of the state over a step of the classical method of order 4."""
    return runge_kutta_step(tableaus.RK4, func, t0, dt, t1, y0, f0, perturb)[0]


def interp_fit(
    y0: Tensor, y1: Tensor, y_mid: Tensor, f0: Tensor, f1: Tensor, dt: Tensor
) -> list[Tensor]:
    """Coefficients, the constant one first, of the quartic through three states and two slopes."""
    rise, bulge = y1 - y0, 2 * y_mid - y0 - y1
    first, last = dt * f0, dt * f1
    cubic = first + last - 2 * rise
    # u = x (1 - x) vanishes at both ends, and is 1/4 in the middle.
    quartic = 8 * bulge + 2 * (last - first)
    return [
        y0,
        first,
        rise - first - cubic + quartic,
        cubic - 2 * quartic,
        quartic,
    ]


def interp_evaluate(coefficients: Sequence[Tensor], t0: Tensor, t1: Tensor, t: Tensor) -> Tensor:
    """A polynomial of `(t - t0) / (t1 - t0)`; the constant coefficient comes first."""
    if not bool(((t0 <= t) & (t <= t1)).all()):
        raise ValueError(
            f"t must lie between t0={float(t0)} and t1={float(t1)}.\n"
            "  Evaluate the polynomial of the step that t lies in."
        )
    x = ((t - t0) / (t1 - t0)).to(coefficients[0].dtype)
    value = torch.zeros_like(coefficients[0])
    for coefficient in reversed(coefficients):
        value = value * x + coefficient
    return value
