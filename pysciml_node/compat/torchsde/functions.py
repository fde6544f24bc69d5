"""`sdeint` and `sdeint_adjoint`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from pysciml_node import checks
from pysciml_node.algorithms.adjoints import DirectAdjoint, DiscreteAdjoint
from pysciml_node.compat.torchsde.call import Call, Scalar
from pysciml_node.compat.torchsde.settings import METHODS


def sdeint(
    sde: Any,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    bm: Any = None,
    method: str | None = None,
    dt: Scalar = 1e-3,
    adaptive: bool = False,
    rtol: Scalar = 1e-5,
    atol: Scalar = 1e-4,
    dt_min: Scalar = 1e-5,
    options: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    extra: bool = False,
    extra_solver_state: Sequence[Tensor] | None = None,
    **unused_kwargs: Any,
) -> Any:
    """Solve `dy = f(t, y) dt + g(t, y) dW` and differentiate through the solver's steps.

    Args:
        sde: object with the attributes `noise_type` and `sde_type` and methods `f(t, y)`, `(B, d)`,
            and `g(t, y)`, `(B, d)` for diagonal and `(B, d, m)` for other noise (`m = 1` for
            scalar); or `f_and_g`, `g_prod`, `f_and_g_prod`; with `logqp` also `h`, a prior's drift.
        y0: initial states, `(B, d)`, float32 or float64.
        ts: times of the output, `(T,)`, increasing; the first is that of `y0`.
        bm: Brownian motion of shape `(B, m)` over the interval; default a new `BrownianInterval`.
        method: for Ito SDEs `"euler"`, `"milstein"`, `"srk"`; for Stratonovich ones `"midpoint"`,
            `"heun"`, `"euler_heun"`, `"milstein"`, `"reversible_heun"`, `"log_ode"`. Default
            `"srk"` (general noise: `"euler"`) and `"midpoint"`.
        dt: size of the steps, or of the first where they adapt.
        adaptive: whether the size follows an error estimate.
        rtol: relative tolerance of adaptive steps.
        atol: absolute tolerance of adaptive steps.
        dt_min: adaptive steps are never shorter; a warning says where their errors are larger.
        options: `grad_free` of `"milstein"`, which is free of derivatives with either.
        names: other names of the sde's methods, by `"drift"`, `"diffusion"`, `"prior_drift"`,
            `"diffusion_prod"`, `"drift_and_diffusion"`, `"drift_and_diffusion_prod"`.
        logqp: return the relative entropy to the prior, too.
        extra: return the solver's own state at the end, too.
        extra_solver_state: such a state to begin with: `(f, g, z)` of `"reversible_heun"`.
        unused_kwargs: other arguments; a warning names them.

    Returns:
        The states, `(T, B, d)`. With `logqp` also the relative entropies of the intervals,
        `(T - 1, B)`, and with `extra` the solver's state, a tuple of tensors: `(f, g, z)` for
        `"reversible_heun"`, else empty.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: an argument out of range, or a method that is not for the sde.
        SolverFailure: the last time was not reached.

    Examples:
        >>> import torch
        >>> from pysciml_node.compat import torchsde
        >>> class Geometric(torchsde.SDEIto):
        ...     def f(self, t, y):
        ...         return 0.1 * y
        ...
        ...     def g(self, t, y):
        ...         return 0.2 * y
        >>> ys = torchsde.sdeint(Geometric("diagonal"), torch.ones(4, 3), [0.0, 0.5, 1.0], dt=0.1)
        >>> ys.shape
        torch.Size([3, 4, 3])

    Reference: X. Li, T.-K. L. Wong, R. T. Q. Chen, D. Duvenaud, arXiv 2001.01328.
    """
    _warn_of(unused_kwargs, "sdeint")
    call = Call(sde, y0, ts, bm, method, names, logqp, adaptive)
    call.check_options(options)
    control = {"dt": dt, "rtol": rtol, "atol": atol, "dt_min": dt_min}
    return call.run(DirectAdjoint(), control, extra, extra_solver_state)


def sdeint_adjoint(
    sde: Any,
    y0: Tensor,
    ts: Tensor | Sequence[float],
    bm: Any = None,
    method: str | None = None,
    adjoint_method: str | None = None,
    dt: Scalar = 1e-3,
    adaptive: bool = False,
    adjoint_adaptive: bool = False,
    rtol: Scalar = 1e-5,
    adjoint_rtol: Scalar = 1e-5,
    atol: Scalar = 1e-4,
    adjoint_atol: Scalar = 1e-4,
    dt_min: Scalar = 1e-5,
    options: Mapping[str, Any] | None = None,
    adjoint_options: Mapping[str, Any] | None = None,
    adjoint_params: Iterable[Tensor] | None = None,
    names: Mapping[str, str] | None = None,
    logqp: bool = False,
    extra: bool = False,
    extra_solver_state: Sequence[Tensor] | None = None,
    **unused_kwargs: Any,
) -> Any:
    """`sdeint` that keeps one state a step, and graphs of up to 64 MiB.

    Steps whose graphs have no room, or are of no use, are taken again backward.

    The gradient is that of the steps themselves, exact to rounding for every method and for
    adaptive steps too. torchsde solves an adjoint equation instead, whose error is that of its
    steps; its arguments `adjoint_adaptive`, `adjoint_rtol`, `adjoint_atol` and `adjoint_options`
    are checked and have no effect. `"reversible_heun"` undoes its steps, whose states are not kept,
    unless `adjoint_method` is another than `"adjoint_reversible_heun"`.

    Args:
        sde: as in `sdeint`; need not be a module.
        y0: as in `sdeint`.
        ts: as in `sdeint`.
        bm: as in `sdeint`.
        method: as in `sdeint`.
        adjoint_method: one of torchsde's methods; matters for `"reversible_heun"` only.
        dt: as in `sdeint`.
        adaptive: as in `sdeint`.
        adjoint_adaptive: a flag.
        rtol: as in `sdeint`.
        adjoint_rtol: a number.
        atol: as in `sdeint`.
        adjoint_atol: a number.
        dt_min: as in `sdeint`.
        options: as in `sdeint`.
        adjoint_options: a dict.
        adjoint_params: the tensors that receive gradients, beside `y0`; default all that the sde
            is found to use.
        names: as in `sdeint`.
        logqp: as in `sdeint`.
        extra: as in `sdeint`.
        extra_solver_state: as in `sdeint`.
        unused_kwargs: as in `sdeint`.

    Returns:
        As `sdeint`; the result allows one backward pass, not a second derivative.

    Raises:
        TypeError: an argument of the wrong kind.
        ValueError: as in `sdeint`.
        SolverFailure: the last time was not reached.
    """
    _warn_of(unused_kwargs, "sdeint_adjoint")
    checks.flag("adjoint_adaptive", adjoint_adaptive)
    for name, value in (("adjoint_rtol", adjoint_rtol), ("adjoint_atol", adjoint_atol)):
        checks.number(name, value, at_least=0)
    if adjoint_method is not None:
        checks.choice("adjoint_method", adjoint_method, METHODS)
    if adjoint_options is not None and not isinstance(adjoint_options, Mapping):
        checks.refuse("adjoint_options", "a dict", adjoint_options, "Write {}.")
    call = Call(sde, y0, ts, bm, method, names, logqp, adaptive)
    call.check_options(options)
    if adjoint_method == "adjoint_reversible_heun" and call.method != "reversible_heun":
        raise ValueError(
            'adjoint_method="adjoint_reversible_heun" is for method="reversible_heun", but the '
            f'method is "{call.method}".\n  Leave it out.'
        )
    call.reversing = call.method == "reversible_heun" and adjoint_method in (
        None,
        "adjoint_reversible_heun",
    )
    chosen = None if adjoint_params is None else tuple(adjoint_params)
    control = {"dt": dt, "rtol": rtol, "atol": atol, "dt_min": dt_min}
    return call.run(DiscreteAdjoint(), control, extra, extra_solver_state, chosen)


def _warn_of(unused: dict[str, Any], who: str) -> None:
    if unused:
        warnings.warn(f"{who} takes no argument {', '.join(unused)}.", stacklevel=3)
