"""SciPy's `solve_ivp` behind torchdiffeq's interface."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pysciml_node.errors import PsnWarning

# Only this one has a smallest step.
_WITH_SMALLEST = "LSODA"


class ScipyWrapperODESolver:
    """Solves with one of SciPy's solvers, on the host and without gradients.

    `odeint_adjoint` has gradients all the same: it solves the adjoint equation with it, too.

    Args:
        func: the field in normal form.
        y0: the initial state.
        rtol: relative tolerance, a number.
        atol: absolute tolerance, a number or flat.
        min_step: smallest step, of `"LSODA"`.
        max_step: largest step.
        solver: the `method` of `scipy.integrate.solve_ivp`.
        unused: other options, of which a warning tells.
    """

    def __init__(
        self,
        func: Callable[..., Tensor],
        y0: Tensor,
        rtol: Any,
        atol: Any,
        min_step: float = 0.0,
        max_step: float = math.inf,
        solver: str = "LSODA",
        **unused: Any,
    ) -> None:
        names = [name for name in unused if name not in ("norm", "grid_points", "eps")]
        if names:
            warnings.warn(
                f"{type(self).__name__}: Unexpected arguments {', '.join(names)}.", PsnWarning, 3
            )
        self.func, self.y0, self.solver = func, y0, solver
        self.options: dict[str, Any] = {"max_step": float(max_step)}
        self.options |= {"rtol": _on_host(rtol), "atol": _on_host(atol)}
        if solver == _WITH_SMALLEST:
            self.options["min_step"] = float(min_step)

    @classmethod
    def valid_callbacks(cls) -> set[str]:
        """The callbacks that are called: none."""
        return set()

    def integrate(self, t: Tensor) -> Tensor:
        """The states at increasing times, `(T, *y0.shape)`."""
        y0 = self.y0.detach()
        if len(t) == 1:
            return y0.unsqueeze(0)
        try:
            from scipy.integrate import solve_ivp
        except ImportError:
            raise ImportError(
                'method="scipy_solver" needs SciPy.\n  Install it: pip install scipy.'
            ) from None
        shape = y0.shape

        def derivative(time: float, y: Any) -> Any:
            state = torch.as_tensor(y).to(y0).reshape(shape)
            with torch.no_grad():
                rate = self.func(torch.tensor(time, dtype=y0.dtype.to_real()), state)
            return rate.detach().cpu().numpy().reshape(-1)

        times = t.detach().double().cpu().numpy()
        solved = solve_ivp(
            derivative,
            (times[0], times[-1]),
            y0.cpu().numpy().reshape(-1),
            method=self.solver,
            t_eval=times,
            **self.options,
        )
        if not solved.success:
            reached = solved.t[-1] if len(solved.t) else times[0]
            raise RuntimeError(
                f"SciPy's {self.solver} has stopped at t={reached:.6g}: {solved.message}\n"
                '  Loosen rtol and atol, or try another options["solver"].'
            )
        return torch.as_tensor(solved.y.T.copy()).to(y0).reshape(-1, *shape)


def _on_host(tolerance: Any) -> Any:
    return tolerance.detach().cpu().numpy() if isinstance(tolerance, Tensor) else tolerance
