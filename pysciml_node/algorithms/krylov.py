"""How implicit methods solve their linear systems where a matrix would be too large."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pysciml_node import checks

Precondition = Callable[[Any, Any, float], Callable[[Any], Any]]
"""From time, state and `scale` to a function that nearly solves `(I - scale J) x = r`."""


@dataclass(frozen=True)
class GMRES(checks.Configured):
    """Generalized minimal residuals, by Jacobian-vector products: no matrix is made.

    It serves `KenCarp4` and `TRBDF2`, whose stages Newton's iteration finds: each linear system is
    solved to `rtol`, and the iteration makes up for what is missing. Gradients solve the transposed
    systems, to nearly full precision, by vector-Jacobian products.

    Args:
        rtol: norm of the residual at which a system of the forward solve counts as solved, over
            that of its right-hand side.
        restart: vectors that are kept; memory is as many states.
        max_iterations: products for one system; more make the step fail, and be tried shorter.
        precondition: called as `precondition(t, u, scale)` at a stage, returns a function `r -> x`,
            linear and written in torch, that nearly solves `(I - scale J) x = r`; states and
            residuals have the structure of `u0`.

    Raises:
        ValueError: a number out of its range.
        TypeError: `precondition` is not callable.

    Examples:
        >>> import pysciml_node as psn
        >>> psn.KenCarp4(linsolve=psn.GMRES(restart=40))
        KenCarp4(linsolve=GMRES(rtol=0.0001, restart=40, max_iterations=400, precondition=None))

    Reference: Y. Saad, M. H. Schultz, SIAM J. Sci. Stat. Comput. 7 (1986) 856-869; D. A. Knoll,
    D. E. Keyes, J. Comput. Phys. 193 (2004) 357-397.
    """

    rtol: float = 1e-4
    restart: int = 30
    max_iterations: int = 400
    precondition: Precondition | None = None

    def __post_init__(self) -> None:
        checks.settle(
            self,
            rtol=checks.number("rtol", self.rtol, above=0, below=1),
            restart=checks.whole("restart", self.restart),
            max_iterations=checks.whole("max_iterations", self.max_iterations),
        )
        if self.precondition is not None:
            hint = "It returns a function r -> x that nearly solves (I - scale J) x = r."
            checks.function("precondition", self.precondition, "t", "u", "scale", hint=hint)
